"""The program score.py: tables, maps, percentiles, going on after a stop, metrics, refusals, several processes."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_program, run_program
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.commands import scoring
from ddpm_hf.hub.publish import load_pipeline

program = load_program("score")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Saved pipelines of both kinds, a folder of images and an array of sequences."""
    folder = tmp_path_factory.mktemp("scored")
    torch.manual_seed(0)
    small = {"dim": 8, "dim_mults": (1, 2), "in_channels": 1, "sample_size": 8}
    scheduler = GaussianScheduler(num_train_timesteps=10)
    DDPMPipeline(UNet2D(**small), scheduler).save_pretrained(folder / "images")
    sequences = DDPMPipeline1D(UNet1D(**small), scheduler, data_shift=[100.0], data_scale=[20.0])
    sequences.save_pretrained(folder / "sequences")
    classes = {0: "good", 1: "bad"}  # in another order than the folders
    DDPMPipeline(UNet2D(**small, num_class_embeds=2), scheduler, id2label=classes).save_pretrained(folder / "classes")
    own = {"data_shift": [50.0], "data_scale": [40.0]}
    DDPMPipeline(UNet2D(**small), scheduler, **own).save_pretrained(folder / "scans")
    draw = np.random.default_rng(0)
    for kind in ("good", "bad"):
        (folder / "data" / kind).mkdir(parents=True)
        for number in range(3):
            picture = draw.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "data" / kind / f"{number}.png")
    np.save(folder / "data.npy", draw.normal(100, 10, (5, 8)))
    return folder


def run(place, kind, output, *more, data=None):
    data = data or place / ("data.npy" if kind == "sequences" else "data")
    command = [f"--pipeline={place / kind}", f"--data={data}", f"--output={output}"]
    return program.main([*command, *more])


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_images_have_a_row_and_a_picture_each(place, tmp_path, capsys):
    """Labels are the subfolders; the settings and metrics lie beside the table, and a second run changes nothing."""
    options = ("--maps", "npy", "pictures", "--labels=folder", "--normal=good", f"--reference={place / 'data'}")
    assert run(place, "images", tmp_path / "s.csv", *options) == 0
    out, shown = capsys.readouterr()
    assert "scoring items: 100%" in shown and "drawing maps: 100%" in shown  # drawing takes about as long as scoring
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table.columns) == ["item", "score", "percentile"]
    assert list(table["item"]) == [f"{kind}/{n}.png" for kind in ("bad", "good") for n in range(3)]
    maps = np.load(tmp_path / "s-maps.npy")
    assert maps.shape == (6, 1, 8, 8) and maps.dtype == np.float32
    # the reference is the data itself, with the same noise: the percentile is the rank
    assert np.allclose(table["percentile"], 100 * table["score"].rank() / 6)
    pictures = {str(path.relative_to(tmp_path / "s-maps")) for path in (tmp_path / "s-maps").rglob("*.png")}
    assert pictures == set(table["item"])
    facts = json.loads((tmp_path / "s.json").read_text())
    assert set(facts["metrics"]) == {"roc_auc", "average_precision"} and "roc auc" in out
    assert str(place) not in json.dumps(facts)
    before = content(tmp_path)
    assert run(place, "images", tmp_path / "s.csv", *options) == 0 and content(tmp_path) == before
    assert run(place, "images", tmp_path / "s.csv", *options, "--seed=1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err and content(tmp_path) == before


def test_sequences_are_the_same_for_any_batch_and_block(place, tmp_path, monkeypatch):
    """The scores of one item follow from its number, in whatever blocks and batches it is scored."""
    for method, maps in zip(program.METHODS, ("pictures", "npy")):
        folder = tmp_path / method
        folder.mkdir()
        assert run(place, "sequences", folder / "a.parquet", "--maps=npy", f"--method={method}") == 0
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "BLOCK", 2)
            more = (f"--maps={maps}", f"--method={method}", "--batch_size=3")
            assert run(place, "sequences", folder / "b.csv", *more) == 0
        one, two = pd.read_parquet(folder / "a.parquet"), pd.read_csv(folder / "b.csv")
        assert list(one["item"]) == list(two["item"]) == list(range(5))
        assert np.allclose(one["score"], two["score"], rtol=1e-4) and one["score"].nunique() == 5
        assert np.load(folder / "a-maps.npy").shape == (5, 1, 8)
        if maps == "pictures":
            assert {path.name for path in (folder / "b-maps").iterdir()} == {f"{n:06d}.png" for n in range(5)}


def test_a_saved_reference_gives_percentiles(place, tmp_path, capsys):
    """Later runs with the same options of the method have percentiles; the folder loads as before."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(place / "sequences", pipeline)
    reference = (f"--reference={place / 'data.npy'}", "--save_reference", f"--pipeline={pipeline}")
    assert run(place, "sequences", tmp_path / "a.csv", *reference) == 0
    assert run(place, "sequences", tmp_path / "b.csv", f"--pipeline={pipeline}") == 0
    assert run(place, "sequences", tmp_path / "c.csv", f"--pipeline={pipeline}", "--method=denoising") == 0
    one, two, other = (pd.read_csv(tmp_path / f"{name}.csv") for name in "abc")
    assert np.array_equal(one["score"], two["score"]) and "percentile" not in other
    order = np.argsort(one["score"])
    assert np.allclose(one["percentile"][order], [20, 40, 60, 80, 100])
    assert np.allclose(two["percentile"][order], [0, 25, 50, 75, 100], atol=0.5)
    loaded = load_pipeline(str(pipeline))
    assert set(loaded.config["score_quantiles"]) == {"reconstruction"}
    assert run(place, "sequences", tmp_path / "a.csv", *reference) == 0  # has ended, and kept its reference
    more = (*reference, "--method=noise")
    assert run(place, "sequences", tmp_path / "d.csv", *more[::2], more[3]) == 0
    assert run(place, "sequences", tmp_path / "d.csv", *more) == 2
    assert "that scores the reference" in capsys.readouterr().err
    assert content(place / "sequences" / "unet") == content(pipeline / "unet")


def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", 2)
    (tmp_path / "whole").mkdir()
    assert run(place, "sequences", tmp_path / "whole" / "s.csv", "--maps=npy") == 0
    write, written = scoring.ScoreParts.write, []

    def stop(self, block, *arrays):
        written.append(block)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, block, *arrays)

    monkeypatch.setattr(scoring.ScoreParts, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, "sequences", tmp_path / "a" / "s.csv", "--maps=npy")
    assert run(place, "sequences", tmp_path / "a" / "s.csv", "--maps=npy", "--seed=3") == 2  # the parts are others'
    assert run(place, "sequences", tmp_path / "a" / "s.csv", "--maps=npy") == 0
    assert written == [0, 1, 1, 2] and content(tmp_path / "a") == content(tmp_path / "whole")


def test_windows_have_places_and_masks_of_their_recording(place, tmp_path):
    """The mask of a recording is cut as its windows are; its items are labelled by it."""
    recording = np.random.default_rng(1).normal(100, 10, (1, 24))
    mask = np.zeros((1, 24), bool)
    mask[0, 18:] = True
    np.save(tmp_path / "r.npy", recording)
    np.save(tmp_path / "m.npy", mask)
    options = ("--stride=4", f"--masks={tmp_path / 'm.npy'}")
    assert run(place, "sequences", tmp_path / "s.csv", *options, data=tmp_path / "r.npy") == 0
    table = pd.read_csv(tmp_path / "s.csv")
    assert list(table["start"]) == [0, 4, 8, 12, 16] and set(table["sequence"]) == {0}
    metrics = json.loads((tmp_path / "s.json").read_text())["metrics"]
    assert {"roc_auc", "map_roc_auc", "map_average_precision", "best_dice"} < set(metrics)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("images", "--seed=-1", "--seed must be at least 0, got -1"),
        ("images", "--batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("images", "--labels=folder", "--normal names the normal ones of the classes bad, good"),
        ("images", "--normal=good", "--normal needs --labels"),
        ("images", "--smoothing=2", "--smoothing applies to maps (--maps or --masks); got 2.0 without them"),
        ("images", "--num_reference=9", "--num_reference applies to a --reference; got 9 without one"),
        ("images", "--scheduler=ddim", "because no other score depends on it; got 'ddim' for reconstruction"),
        ("images", "--scheduler=Nothing", "got 'Nothing'"),
        ("sequences", "--save_reference", "--save_reference needs --reference"),
        ("sequences", "--masks=nothing.npy", "nothing.npy cannot be read"),
        ("sequences", "--labels=nothing.txt", "nothing.txt"),
        ("sequences", "--strengths=2", "strengths must be numbers above 0 and at most 1, got [2.0]"),
        ("sequences", "--num_timesteps=3", "--num_timesteps applies to --method denoising or noise, got 3"),
        ("images", "--complete", "--complete applies to sequences, and to images in units of their own"),
        ("images", "--class_labels=folder", "--class_labels needs a model with classes"),
        ("images", "--data=./empty", "--data ./empty: there is no such file or folder"),
        ("sequences", "--class_for_all=1", "--class_for_all needs a model with classes"),
        ("classes", "--class_for_all=dog", "one of the model's classes (good, bad), or none; got 'dog'"),
        ("classes", "--class_labels=column", "must be 'folder'"),
    ],
)
def test_refusals_come_before_any_file(place, tmp_path, capsys, kind, option, message):
    assert run(place, kind, tmp_path / "s.csv", option) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_other_files_and_missing_values_are_named(place, tmp_path, capsys):
    (tmp_path / "s.csv").write_text("mine")
    assert run(place, "sequences", tmp_path / "s.csv") == 2 and (tmp_path / "s.csv").read_text() == "mine"
    assert run(place, "sequences", tmp_path / "s.txt") == 2
    array = np.load(place / "data.npy")
    array[3, 2] = np.nan
    np.save(tmp_path / "nan.npy", array)
    assert run(place, "sequences", tmp_path / "n.csv", data=tmp_path / "nan.npy") == 2
    error = capsys.readouterr().err
    assert run(place, "sequences", tmp_path / "n.csv", "--complete", data=tmp_path / "nan.npy") == 0
    assert np.isfinite(pd.read_csv(tmp_path / "n.csv")["score"]).all()
    assert run(place, "sequences", tmp_path / "d.csv", "--on_missing=drop", data=tmp_path / "nan.npy") == 0
    assert list(pd.read_csv(tmp_path / "d.csv")["item"]) == [0, 1, 2, 4]
    assert "without its settings, s.json" in error and "--output must end in .csv or .parquet" in error
    assert "sequence 3" in error or "row 3" in error


def scores(path):
    return pd.read_csv(path)["score"]


def test_items_are_scored_as_their_classes(place, tmp_path, capsys):
    """By the names of the classes, whose numbers differ; the labels of anomalies may be the same folders or others."""
    asked = {
        "none": [],
        "all": ["--class_for_all=bad"],
        "good": ["--class_for_all=0"],
        "own": ["--class_labels=folder"],
    }
    for name, options in asked.items():
        assert run(place, "classes", tmp_path / f"{name}.csv", *options, "--strengths=0.5") == 0
        assert ("scores the items without one" in capsys.readouterr().out) == (name == "none")
    found = {name: scores(tmp_path / f"{name}.csv") for name in asked}
    assert abs(found["all"] - found["none"]).min() > 1e-5 and abs(found["all"] - found["good"]).min() > 1e-5
    assert np.allclose(found["own"], [*found["all"][:3], *found["good"][3:]], rtol=1e-5)
    labels = ("--labels=folder", "--normal=good")
    more = (*labels, "--strengths=0.5", f"--reference={place / 'data'}")
    assert run(place, "classes", tmp_path / "l.csv", *more) == 0  # the labels are no classes for the model
    assert np.allclose(scores(tmp_path / "l.csv"), found["none"], rtol=1e-5)
    assert run(place, "classes", tmp_path / "l.csv", *more, "--class_labels=folder") == 2
    assert run(place, "classes", tmp_path / "b.csv", *more, "--class_labels=folder") == 0
    assert np.allclose(scores(tmp_path / "b.csv"), found["own"], rtol=1e-5)
    assert "roc_auc" in json.loads((tmp_path / "b.json").read_text())["metrics"]
    both = ("--class_for_all=0", "--class_labels=folder")
    assert run(place, "classes", tmp_path / "c.csv", *both) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_items_are_scored_with_their_conditions(place, tmp_path, capsys):
    torch.manual_seed(0)
    unet = UNet1D(8, in_channels=1, dim=8, dim_mults=(1, 2), condition_channels=1)
    DDPMPipeline1D(unet, GaussianScheduler(10), condition="paired").save_pretrained(tmp_path / "paired")
    draw = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 1)):
        x = np.random.default_rng(1).uniform(-1, 1, (3, 1, 8))
        np.savez(tmp_path / f"{name}.npz", data=x, low=low + draw.uniform(-1, 1, (3, 1, 8)))
    for name in "ab":
        options = (f"--pipeline={tmp_path / 'paired'}", f"--data={tmp_path / name}.npz", "--condition_column=low")
        assert run(place, "sequences", tmp_path / f"{name}.csv", *options) == 0
    assert not np.isclose(scores(tmp_path / "a.csv"), scores(tmp_path / "b.csv"), rtol=1e-5).any()
    assert run(place, "sequences", tmp_path / "c.csv", *options[:2]) == 2
    assert "--condition_dir must name the conditions" in capsys.readouterr().err
    for name in ("data", "low"):
        np.save(tmp_path / f"{name}.npy", np.load(tmp_path / "b.npz")[name])
    apart = (options[0], f"--data={tmp_path / 'data.npy'}", f"--condition_column={tmp_path / 'low.npy'}")
    same, other = (f"--reference={tmp_path / name}" for name in ("data.npy", "a.npz"))
    assert run(place, "sequences", tmp_path / "d.csv", *apart, same) == 0
    assert np.allclose(scores(tmp_path / "d.csv"), scores(tmp_path / "b.csv"), rtol=1e-5)
    assert str(tmp_path) not in (tmp_path / "d.json").read_text()
    assert run(place, "sequences", tmp_path / "e.csv", *apart, other) == 2
    assert "low.npy belongs to the items of --data, and --reference has others" in capsys.readouterr().err


def test_an_item_whose_condition_cannot_be_read_has_no_score(place, tmp_path, capsys):
    unet = UNet2D(8, in_channels=1, dim=8, dim_mults=(1, 2), condition_channels=1)
    DDPMPipeline(unet, GaussianScheduler(10), condition="paired").save_pretrained(tmp_path / "paired")
    shutil.copytree(place / "data", tmp_path / "c")
    (tmp_path / "c" / "bad" / "1.png").write_bytes(b"no picture")
    options = (f"--pipeline={tmp_path / 'paired'}", f"--condition_dir={tmp_path / 'c'}", "--strengths=0.5")
    assert run(place, "images", tmp_path / "a.csv", *options) == 2
    assert "cannot read the image" in capsys.readouterr().err
    assert run(place, "images", tmp_path / "b.csv", *options, "--on_bad_image=skip") == 0
    assert scores(tmp_path / "b.csv").isna().tolist() == [False, True, False, False, False, False]


def test_images_with_missing_values_are_completed(place, tmp_path, capsys):
    """Those in units of their own: the values that are missing do not count; an image of NaN alone is named."""
    x = np.random.default_rng(0).normal(50, 20, (3, 8, 8)).astype(np.float32)
    x[1, 2:4, 5] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert run(place, "scans", tmp_path / "a.csv", data=tmp_path / "x.npy") == 2
    assert "NaN or infinity" in (error := capsys.readouterr().err) or "must be finite" in error
    options = ("--complete", "--maps", "npy", "pictures")
    assert run(place, "scans", tmp_path / "b.csv", *options, data=tmp_path / "x.npy") == 0
    maps, found = np.load(tmp_path / "b-maps.npy")[:, 0], scores(tmp_path / "b.csv")
    assert np.isfinite(maps).all() and len(list((tmp_path / "b-maps").iterdir())) == 3
    for item in range(3):
        assert maps[item][~np.isnan(x[item])].mean() == pytest.approx(found[item], rel=1e-4)
    assert maps[1].mean() != pytest.approx(found[1], rel=1e-4)
    x[2] = np.nan
    np.save(tmp_path / "y.npy", x)
    assert run(place, "scans", tmp_path / "c.csv", "--complete", data=tmp_path / "y.npy") == 2
    assert "item 2 has missing values alone" in capsys.readouterr().err


def test_values_outside_the_range_of_training_are_clipped(place, tmp_path, capsys):
    """By the pipeline's record, if it has a range, and by the option, which replaces it."""
    x = np.random.default_rng(0).normal(50, 30, (3, 8, 8))
    assert x.min() < 10 and x.max() > 90
    for name, values in (("x", x), ("trained", x.clip(10, 90)), ("other", x.clip(20, 80))):
        np.save(tmp_path / f"{name}.npy", values)
        assert run(place, "scans", tmp_path / f"{name}.csv", data=tmp_path / f"{name}.npy") == 0
    assert "clipped" not in capsys.readouterr().out
    assert run(place, "scans", tmp_path / "a.csv", "--image_range", "10", "90", data=tmp_path / "x.npy") == 0
    shutil.copytree(place / "scans", tmp_path / "scans")
    facts = {"data": {"name": "theirs.npy"}, "options": {"image_range": [10.0, 90.0]}}
    (tmp_path / "scans" / "training.json").write_text(json.dumps(facts))
    assert run(tmp_path, "scans", tmp_path / "b.csv", data=tmp_path / "x.npy") == 0
    assert "values outside image_range 10 90 are clipped, as in training" in capsys.readouterr().out
    assert run(tmp_path, "scans", tmp_path / "c.csv", "--image_range", "20", "80", data=tmp_path / "x.npy") == 0
    for name, expected in (("a", "trained"), ("b", "trained"), ("c", "other")):
        assert np.array_equal(scores(tmp_path / f"{name}.csv"), scores(tmp_path / f"{expected}.csv"))
    assert not np.isclose(scores(tmp_path / "x.csv"), scores(tmp_path / "a.csv"), rtol=1e-3).any()
    refused = {("scans", "90", "10"): "two finite numbers, the lower first", ("images", "0", "9"): "are in [0, 1], and"}
    for (kind, *ends), message in refused.items():
        assert run(place, kind, tmp_path / "d.csv", "--image_range", *ends, data=tmp_path / "x.npy") == 2
        assert message in capsys.readouterr().err


def test_odd_data_and_outputs(place, tmp_path, capsys):
    """One constant item is scored; other shapes, empty folders and files that would be written over are refused."""
    np.save(tmp_path / "one.npy", np.full((1, 8, 8), 5.0))
    assert run(place, "scans", tmp_path / "new" / "one.csv", data=tmp_path / "one.npy") == 0
    assert len(scores(tmp_path / "new" / "one.csv")) == 1
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "two.npy", np.zeros((3, 2, 8, 8)))
    np.save(tmp_path / "mask.npy", np.eye(9)[None, :, :] * np.ones((6, 1, 1)))
    refused = {
        "no images": (tmp_path / "empty",),
        "must be the number of channels of": (tmp_path / "two.npy",),
        "must have one of the shapes (6, 1, 8, 8)": (place / "data", f"--masks={tmp_path / 'mask.npy'}"),
    }
    for message, (data, *options) in refused.items():
        kind = "scans" if data.suffix else "images"
        assert run(place, kind, tmp_path / "out" / "s.csv", *options, data=data) == 2
        error = capsys.readouterr().err
        assert message in error, error
    assert not (tmp_path / "out").exists()
    (tmp_path / "s.json").write_text("mine")
    (tmp_path / "t-maps").mkdir()
    for name, file in (("s", "s.json"), ("t", "t-maps")):
        assert run(place, "images", tmp_path / f"{name}.csv", "--maps=pictures") == 2
        assert f"{file}: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "s.json").read_text() == "mine"


def test_items_of_one_kind_among_those_that_can_be_read(place, tmp_path, capsys):
    """The labels are of two kinds, but the anomalous items cannot be read: the scores are there, the metrics not."""
    shutil.copytree(place / "data", tmp_path / "data")
    for file in (tmp_path / "data" / "bad").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    options = ("--labels=folder", "--normal=good", "--on_bad_image=skip")
    assert run(place, "images", tmp_path / "s.csv", *options, data=tmp_path / "data") == 0
    assert "no more metrics: metrics need normal and anomalous items" in capsys.readouterr().out
    assert scores(tmp_path / "s.csv").isna().sum() == 3


@pytest.mark.slow
def test_two_processes_write_the_same_files(place, tmp_path):
    command = [f"--pipeline={place / 'images'}", f"--data={place / 'data'}", "--maps", "npy", "pictures"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ddpm_hf.commands.score"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    alone = {"cwd": tmp_path, "OMP_NUM_THREADS": "1"}
    done = run_program(*launch, *command, "--output=two/s.csv", **alone, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0 and "6 items, 2 process(es)" in done.stdout, done.stdout + done.stderr
    assert run_program(ROOT / "training" / "score.py", *command, "--output=one/s.csv", **alone).returncode == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")
