"""Model cards: every field is read back from the files that it came from; what was not recorded is said."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from helpers import CARD_RUN, MODEL, make
from hub_server import validate_card
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig, UNet2D, train
from ddpm_hf.config import BUNDLED
from ddpm_hf.hub.card import card_text, write_card
from ddpm_hf.run.record import data_facts, duration, public_command, without_folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of pictures and one of sequences, evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    more = {"eval_steps": 4, "eval_num_samples": 12, "holdout": 8}
    pictures = TrainConfig(
        dataset_name="digits", output_dir=str(folder / "pictures"), feature_network="pixels", hub_license="mit",
        eval_cache_dir=str(folder / "cache"), **CARD_RUN, **more,
    )  # fmt: skip
    train(pictures, command=["python", "training/train.py", f"--output_dir={folder}/pictures", "--holdout", "8"])
    np.save(folder / "waves.npy", np.random.default_rng(0).standard_normal((40, 2, 16)))
    train(TrainConfig(train_data_file=str(folder / "waves.npy"), output_dir=str(folder / "waves"), **CARD_RUN, **more))
    return folder


def read(folder, repo_id=None):
    text = card_text(folder, repo_id)
    return text, ModelCard(text).data.to_dict()


def table(text, heading):
    """The rows of the table under a heading, as {first cell: the other cells}."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [re.sub(r"\\([^\w\s])", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line[1:-1])]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_field_of_a_card_of_pictures(runs):
    folder = runs / "pictures" / "pipeline"
    text, data = read(folder, "alice/digits")
    assert validate_card(text) == []
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "mit" and "ddpm_hf" in data["tags"] and "datasets" not in data
    records = {r["metric"]: r for r in json.loads((folder / "evaluation.json").read_text())}
    results = ModelCard(text).data.eval_results
    measured = {"fid", "kid", "memorization", "held_out_loss", "held_out_weighted_loss"}
    assert {r.metric_type for r in results} == measured == set(data["metrics"])
    for result in results:
        assert result.metric_value == records[result.metric_type]["value"]
        assert result.dataset_name == BUNDLED["digits"] and result.task_type == data["pipeline_tag"]
        assert "8 held-out items" in result.metric_name or "12 samples" in result.metric_name

    assert "![Samples, 3 sampling steps, not selected; after 4 training steps.](samples.png)" in text
    model, schedule, training = (table(text, name) for name in ("Model", "Schedule", "Training"))
    weights = UNet2D.from_pretrained(folder, subfolder="unet")
    assert model["parameters"] == [f"{sum(p.numel() for p in weights.parameters()):,}"]
    assert (
        model["class"] == ["UNet2D"] and model["channels x size"] == ["1 x 8 x 8"] and model["dim_mults"] == ["[1, 2]"]
    )
    assert schedule["beta_schedule"] == ["sigmoid"] and schedule["prediction_type"] == ["v_prediction"]
    assert schedule["sampling steps of a call"] == ["3"] and schedule["num_train_timesteps"] == ["1000"]
    assert training["data"] == [f"{BUNDLED['digits']}, 1,789 items of 1 x 8 x 8"]
    assert training["optimizer steps"] == ["4 of 4"] and training["samples in a step"] == ["4"]
    facts = json.loads((folder / "training.json").read_text())
    assert training["hardware"] == [f"{facts['machine']}, 1 process"] and facts["machine"]
    assert 0 < facts["seconds"] < 100 and training["time"][0].startswith(duration(facts["seconds"]))
    assert f"torch {facts['versions']['torch']}" in training["versions"][0]
    assert "python training/train.py --output_dir=pictures --holdout 8\n" in text
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options["dim"] == 8 and options["output_dir"] == "pictures" and options["eval_cache_dir"] == "cache"
    measured = table(text, "Evaluation")
    for name, record in records.items():
        value, count, against, *_ = measured[name]
        assert float(value) == pytest.approx(record["value"], rel=1e-5, abs=1e-12)
        assert count.split()[0] == ("8" if "held_out" in name else "12")
    assert measured["fid"][4:] == ["GaussianScheduler", "pixels", "0"] and "biased upwards" in text
    assert f"{records['memorization']['value']:.3g} (memorization)" in text
    assert "Licence of the weights: mit" in text and "@inproceedings{ho2020denoising" in text
    for picture in ("samples.png", "loss.png"):
        assert Image.open(folder / picture).size[0] > 100 and f"({picture})" in text


def test_every_field_of_a_card_of_sequences(runs):
    text, data = read(runs / "waves" / "pipeline")
    assert validate_card(text) == [] and "pipeline_tag" not in data and "license" not in data
    assert "unconditional-sequence-generation" in data["tags"] and "not stated by its publisher" in text
    assert "Generated sequences (left) beside real ones (right), 3 sampling steps" in text
    assert table(text, "Training")["data"] == ["waves.npy, 32 items of 2 x 16"] and "started from Python" in text
    assert {"frechet", "sliced_wasserstein"} <= table(text, "Evaluation").keys()


def test_no_folder_of_the_machine_is_told(runs):
    for file in [*(runs / "pictures" / "pipeline").rglob("*"), *(runs / "waves" / "pipeline").rglob("*")]:
        assert not file.is_file() or str(runs).encode() not in file.read_bytes(), file


HOSTILE = (
    "a | b\n\n# Owned\n```\n~~~\n<script>x</script> [link](https://evil.example) ![i](x) www.evil.example\n---\n*b* \\"
)


def test_names_from_outside_arrive_as_text(tmp_path):
    """Markdown, HTML and YAML in names neither make elements of the page nor leave their cell, line or block."""
    make("images").save_pretrained(tmp_path)
    options = {"max_train_steps": 4, "use_ema": True, "hub_license": HOSTILE, "report_to": HOSTILE}
    facts = {"name": HOSTILE, "data": {"name": HOSTILE, "items": 3, "shape": [1, 8, 8], "hub_id": None}, "steps": 4,
             "options": options, "processes": 1, "global_batch": 4, "machine": HOSTILE, "seconds": 3.0,
             "mixed_precision": "no", "versions": {"torch": HOSTILE}, "command": f"train '{HOSTILE}'"}  # fmt: skip
    (tmp_path / "training.json").write_text(json.dumps(facts))
    record = {"metric": "fid", "value": 1.5, "num_samples": 8, "num_real": 8, "num_inference_steps": 3, "seed": 0,
              "scheduler": HOSTILE, "feature_network": HOSTILE, "data": HOSTILE}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps([record]))
    text, data = read(tmp_path)
    one_line = " ".join(HOSTILE.split())
    assert data["license"] == HOSTILE and data["model-index"][0]["name"] == one_line

    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    ours = MarkdownIt("commonmark").enable("table").parse(ModelCard(render_harmless(tmp_path, facts, record)).text)
    assert [(t.type, t.tag) for t in tokens] == [(t.type, t.tag) for t in ours]  # the same page but for its words
    inline = [child.type for token in tokens for child in token.children or []]
    bare = r"[^\\]://evil|www\.evil"  # GitHub makes links of these
    assert not any(re.search(bare, token.content) for token in tokens if token.type == "inline")
    assert inline.count("link_open") == inline.count("html_inline") == inline.count("image") == 0
    assert tokens[1].content and "".join(c.content for c in tokens[1].children) == one_line
    cells = ["".join(c.content for c in t.children) for t in tokens if t.type == "inline"]
    assert one_line in cells and f"{one_line}, 3 items of 1 x 8 x 8" in cells
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    assert blocks[""] == f"train '{HOSTILE}'\n" and yaml.safe_load(blocks["yaml"]) == options


def render_harmless(folder, facts, record):
    """The card of the same pipeline whose names are one word."""
    facts = json.loads(json.dumps(facts).replace(json.dumps(HOSTILE)[1:-1], "word"))
    (folder / "training.json").write_text(json.dumps(facts))
    (folder / "evaluation.json").write_text(json.dumps([{**record, "scheduler": "w", "feature_network": "w"}]))
    return card_text(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [("training.json", []), ("training.json", {"data": 3}), ("training.json", {"options": []}),
     ("evaluation.json", {"fid": 3}), ("evaluation.json", [{"metric": "fid"}]), ("model_index.json", []),
     ("evaluation.json", [{"metric": "fid", "value": "low"}]), ("unet/config.json", {}),
     ("scheduler/scheduler_config.json", [1])],
)  # fmt: skip
def test_records_of_another_form_are_refused_by_name(file, content, tmp_path):
    make("images").save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*(form|JSON)"):
        card_text(tmp_path)


def test_what_was_not_recorded_is_said(tmp_path):
    make("images").save_pretrained(tmp_path)
    text, data = read(tmp_path)
    assert validate_card(text) == [] and "model-index" not in data
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert text == card_text(tmp_path)  # a variant is not counted twice
    for sentence in ("No samples were recorded", "hardware and time were not recorded", "Nothing was measured",
                     "The loss was not recorded", "Whether it repeats training items was not measured"):  # fmt: skip
        assert sentence in text


def test_the_card_of_a_model_with_classes(tmp_path):
    """Names in the order of the numbers, with the counts of training; the snippet asks for classes; the caption says
    the scale of the pictures; a metric says its class and scale, and what has none leaves the cell empty."""
    unet = UNet2D(sample_size=8, in_channels=1, num_class_embeds=3, **MODEL)
    pipe = DDPMPipeline(unet, GaussianScheduler(), id2label={0: "owl", 1: "a|b", 2: "cat"})
    pipe.save_pretrained(tmp_path)
    (tmp_path / "samples.png").touch()
    data = {"name": "pets", "items": 12, "shape": [1, 8, 8], "hub_id": None, "classes": {"cat": 5, "owl": 7, "a|b": 0}}
    facts = {
        "name": "x",
        "data": data,
        "steps": 4,
        "samples_step": 4,
        "options": {"max_train_steps": 4, "use_ema": True, "ddpm_num_inference_steps": 3},
        "processes": 1,
        "global_batch": 4,
        "machine": "m",
        "seconds": 3.0,
        "mixed_precision": "no",
        "versions": {},
        "command": None,
    }
    (tmp_path / "training.json").write_text(json.dumps(facts))
    shared = {
        "num_samples": 8,
        "num_real": 8,
        "num_inference_steps": 3,
        "seed": 0,
        "scheduler": "s",
        "class_labels": "frequencies",
        "feature_network": "pixels",
    }
    guided = {**shared, "guidance_scale": 2.0}
    records = [{"metric": "fid", "value": 1.0, **guided}, {"metric": "fid", "value": 2.0, **guided, "class": "a|b"},
               {"metric": "class_agreement", "value": 0.75, **guided, "classifier": "judge.pt"},
               {"metric": "held_out_loss", "value": 3.0, **shared, "num_held_out": 4}]  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(records))
    text, data = read(tmp_path)
    assert validate_card(text) == [] and len(data["model-index"][0]["results"][0]["metrics"]) > 0
    model, measured = table(text, "Model"), table(text, "Evaluation")
    assert model["classes"] == ["3: owl (7 items), a|b (0 items), cat (5 items)"] and "num_class_embeds" not in model
    assert "pipe(class_labels=[0, 1, 2], generator=" in text and "3 sampling steps, guidance scale 1, not" in text
    assert measured["fid"] == ["1", "8 samples", "8 items of pets", "3", "s", "2", "pixels", "0"]
    assert measured["fid, class a|b"][0] == "2" and measured["held_out_loss"][5] == ""
    assert measured["class_agreement"][2] == "the class that the classifier judge.pt sees"
    assert "can be asked for one of its 3 classes" in text and "frequencies of the data's classes" in text
    names = [metric["name"] for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert any("class a|b, 8 samples, 3 steps, s, guidance scale 2" in name for name in names)


@pytest.mark.parametrize(("channels", "paired"), [(1, False), (5, False), (3, True), (5, True)])
def test_the_code_of_a_card_runs(channels, paired, tmp_path):
    """Images of more channels than Pillow has are asked for as an array, and a condition is passed."""
    unet = UNet2D(8, in_channels=channels, condition_channels=2 * paired, **MODEL)
    pair = {"condition": "paired", "condition_size": [4, 4]} if paired else {}
    DDPMPipeline(unet, GaussianScheduler(), 2, **pair).save_pretrained(tmp_path)
    code = re.search(r"```python\n(import torch\nfrom ddpm_hf .+?)```", card_text(tmp_path), re.DOTALL)[1]
    names = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)).replace("= ...", "= torch.rand(1, 2, 4, 4)"), names)
    images = names["images"]
    assert images.shape == (4, 8, 8, channels) if channels > 4 else [image.size for image in images] == [(8, 8)] * 4


def test_a_card_that_someone_has_edited_is_kept(runs, tmp_path):
    shutil.copytree(runs / "pictures" / "best", tmp_path / "best")
    card = tmp_path / "best" / "README.md"
    card.write_text(card.read_text().replace("# pictures", "# My digits"))
    write_card(tmp_path / "best")
    assert "# My digits" in card.read_text() and "# My digits" in card_text(tmp_path / "best", "alice/digits")
    card.unlink()
    write_card(tmp_path / "best")
    assert "# pictures" in card.read_text()


@pytest.mark.parametrize("damage", ["no index", "no weights", "truncated", "not JSON"])
def test_what_is_no_pipeline_is_refused(damage, tmp_path):
    make("images").save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        (tmp_path / "model_index.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    else:
        (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        card_text(tmp_path)


def test_a_folder_with_the_name_of_bundled_data_is_not_taken_for_it(runs, tmp_path):
    folder = shutil.copytree(runs / "pictures" / "pipeline", tmp_path / "p")
    facts = json.loads((folder / "training.json").read_text())
    del facts["options"]["dataset_name"]
    facts["options"]["train_data_dir"] = "digits"
    (folder / "training.json").write_text(json.dumps(facts))
    assert BUNDLED["digits"] not in card_text(folder) and "trained on digits." in card_text(folder)


def test_a_picture_that_no_run_has_recorded_is_not_shown(runs, tmp_path):
    folder = shutil.copytree(runs / "pictures" / "pipeline", tmp_path / "p")
    facts = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**facts, "samples_step": None}))  # samples.png is the user's
    assert "No samples were recorded." in card_text(folder)


def test_a_picture_of_an_earlier_step_may_have_other_sampling_steps(runs, tmp_path):
    """The run may have been resumed with another number meanwhile, which the record does not tell."""
    folder = shutil.copytree(runs / "pictures" / "pipeline", tmp_path / "p")
    facts = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**facts, "samples_step": 2}))
    assert "![Samples, not selected; after 2 training steps.](samples.png)" in card_text(folder)


@pytest.mark.parametrize("place", [".", "../photos", "here/..", "../photos/"])
def test_data_in_a_relative_folder_has_the_name_of_the_folder(place, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    assert data_facts(TrainConfig(train_data_dir=place), None, 3, (1, 8, 8))["name"] == "photos"


def test_paths_are_shortened():
    assert without_folders("/home/me/photos") == "photos" and without_folders("~/photos") == "photos"
    assert without_folders("../photos") == "photos" and without_folders("runs/x") == "runs/x"
    assert without_folders("imagenet/mini") == "imagenet/mini"
    command = ["python", "train.py", "--train_data_dir", "/home/me/my photos", "--x=/a/b", "--dim", "8"]
    assert public_command(command) == "python train.py --train_data_dir 'my photos' --x=b --dim 8"


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (65, "1 min 5 s"), (3600 * 3 + 720, "3 h 12 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "option, source, base, says",
    [
        ("continue_from", "a", None, "continues the run a from its step 1,200 on"),
        ("continue_from", "a", "alice/a", "That is a descendant of alice/a on the Hub"),
        ("init_from", "alice/base", "alice/base", "began with the weights of alice/base"),
        ("init_from", "pipeline", "not a repo", "began with the weights of pipeline"),
    ],
)
def test_the_origin_of_the_weights_is_on_the_card(runs, option, source, base, says, tmp_path):
    folder = tmp_path / "p"
    shutil.copytree(runs / "pictures" / "pipeline", folder)
    training = json.loads((folder / "training.json").read_text())
    assert "lineage" not in training and "base_model" not in read(folder)[1]
    training["lineage"] = {
        "option": option, "source": source, "step": 1200, "base_model": base, "changed": ["dropout: 0.0 -> 0.1"],
        "made_new": ["the embeddings of 2 classes, which begin at zero"],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(training))
    text, data = read(folder)
    part = " ".join(text.split("## Training\n")[1].split("\n## ")[0].split())
    assert says in part and "- dropout: 0.0 -\\> 0.1" in part and "Not taken from there: the embeddings of 2" in part
    assert data.get("base_model") == (base if base and "/" in base else None) and validate_card(text) == []
