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
    draw = np.random.default_rng(0)
    for kind in ("good", "bad"):
        (folder / "data" / kind).mkdir(parents=True)
        for number in range(3):
            picture = draw.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "data" / kind / f"{number}.png")
    np.save(folder / "data.npy", draw.normal(100, 10, (5, 8)))
    return folder


def run(place, kind, output, *more, data=None):
    data = data or place / ("data" if kind == "images" else "data.npy")
    command = [f"--pipeline={place / kind}", f"--data={data}", f"--output={output}"]
    return program.main([*command, *more])


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_images_have_a_row_and_a_picture_each(place, tmp_path, capsys):
    """Labels are the subfolders; the settings and metrics lie beside the table, and a second run changes nothing."""
    options = ("--maps", "npy", "pictures", "--labels=folder", "--normal=good", f"--reference={place / 'data'}")
    assert run(place, "images", tmp_path / "s.csv", *options) == 0
    out = capsys.readouterr().out
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


def test_a_saved_reference_gives_percentiles(place, tmp_path):
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
        ("images", "--scheduler=Nothing", "got 'Nothing'"),
        ("sequences", "--save_reference", "--save_reference needs --reference"),
        ("sequences", "--masks=nothing.npy", "nothing.npy cannot be read"),
        ("sequences", "--labels=nothing.txt", "nothing.txt"),
        ("sequences", "--strengths=2", "strengths must be numbers above 0 and at most 1, got [2.0]"),
        ("sequences", "--num_timesteps=3", "--num_timesteps applies to --method denoising, got 3 for reconstruction"),
        ("images", "--complete", "--complete applies to sequences"),
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
    assert "s.json with its settings is not" in error and "--output must end in .csv or .parquet" in error
    assert "sequence 3" in error or "row 3" in error


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
