"""The program evaluate.py with a model of classes: frequencies, each class alone, guidance, a classifier, the card."""

import json

import datasets
import huggingface_hub
import pytest
import torch
from conftest import load_program
from helpers import MODEL, config
from PIL import Image

from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D, train

evaluate = load_program("evaluate").main
NAMES = [str(digit) for digit in range(10)]


class First(torch.nn.Module):
    """Takes every image for one of class 0."""

    def forward(self, x):
        return torch.zeros(x.shape[0], 10).index_fill(1, torch.tensor([0]), 1.0)


@pytest.fixture
def digits(tmp_path):
    """A saved pipeline of digits with classes, which was not trained."""
    unet = UNet2D(sample_size=8, in_channels=1, num_class_embeds=10, **MODEL)
    pipe = DDPMPipeline(unet, GaussianScheduler(), num_inference_steps=2, id2label=dict(enumerate(NAMES)))
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_program_with_classes(digits, tmp_path, capsys):
    torch.jit.script(First()).save(tmp_path / "first.pt")
    command = [f"--pipeline={digits}", "--data=digits", "--class_labels=label", "--feature_network=pixels"]
    command += ["--num_samples=40", f"--eval_cache_dir={tmp_path}/cache", "--metrics=fid"]
    options = ["--guidance_scale", "1", "2.5", "--guidance_interval", "0.1", "0.9", "--per_class"]
    assert evaluate([*command, *options, f"--classifier={tmp_path}/first.pt"]) == 0, capsys.readouterr().err
    records = json.loads((digits / "evaluation.json").read_text())
    assert len(records) == 2 * (1 + 10 + 1)
    values = {(r["metric"], r.get("class"), r["guidance_scale"]): r for r in records}
    assert {key[1] for key in values} == {None, *NAMES} and values["fid", None, 1.0] != values["fid", None, 2.5]
    # 40 samples of classes that have 174 to 183 of 1,797 items
    assert all(values["fid", name, 1.0]["num_samples"] == 4 for name in NAMES)
    assert sum(values["fid", name, 1.0]["num_real"] for name in NAMES) == 1797
    agreement = values["class_agreement", None, 2.5]
    assert agreement["value"] == 0.1 and agreement["classifier"] == "first.pt"
    assert agreement["guidance_interval"] == [0.1, 0.9] and agreement["num_classes"] == 10
    with Image.open(digits / "steps-versus-metric.png") as picture:
        assert picture.width > 500
    said = capsys.readouterr().out
    assert "2 steps, guidance scale 2.5:" in said and "fid/7" in said
    card = (digits / "README.md").read_text()
    assert "| fid |" in card and "| class_agreement |" in card and "class 7" in card and "2.5" in card


def test_a_run_with_classes_is_measured_as_in_training(tmp_path):
    """The program takes classes and held-out items from the run: its values are those of the run's last evaluation."""
    train(
        config(
            tmp_path / "run", class_labels="label", max_train_steps=2, eval_steps=2, eval_num_samples=30, holdout=20,
            feature_network="pixels", eval_cache_dir=str(tmp_path / "cache"),
        )
    )  # fmt: skip
    pipeline = tmp_path / "run" / "pipeline"
    trained = json.loads((pipeline / "evaluation.json").read_text())
    command = [f"--pipeline={pipeline}", "--data=digits", "--feature_network=pixels", "--num_samples=30"]
    assert evaluate([*command, f"--output_dir={tmp_path}/out", f"--eval_cache_dir={tmp_path}/cache"]) == 0
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {r["metric"] for r in again} == {r["metric"] for r in trained}
    for record, other in zip(trained, again):
        record.pop("step")
        assert other == {
            **record,
            "value": pytest.approx(record["value"], rel=1e-4),
            "data": "digits",
            "split": "train",
        }
    classes = json.loads((pipeline / "training.json").read_text())["data"]["classes"]
    assert sum(classes.values()) == 1797 - 20 and list(classes) == NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=digits"], "class_labels must name the classes of the data"),
        (["--data=digits", "--class_labels=label", "--per_class", "--num_samples=9"], "num_samples must be about"),
        (["--data=digits", "--class_labels=label", "--guidance_scale=-1"], "guidance_scale must be"),
        (
            ["--data=digits", "--class_labels=label", "--guidance_scale=2", "--guidance_interval", "0.5"],
            "guidance_interval must be two",
        ),
        (["--data=digits", "--class_labels=label", "--classifier=none.pt"], "there is no file none.pt"),
        (["--data=digit"], "did you mean digits?"),
    ],
)
def test_what_the_program_refuses_with_classes(options, message, digits, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # without a connection each try waits
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert evaluate([f"--pipeline={digits}", "--feature_network=pixels", "--num_inference_steps=2", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err and "sampling" not in said.err
