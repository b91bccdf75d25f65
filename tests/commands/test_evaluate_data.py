"""Evaluation of pipelines of every kind of data: with the data's options from the run, and with the same ones given."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from conftest import load_program
from helpers import config

from ddpm_hf import train

evaluate_script = load_program("evaluate")
RNG = np.random.default_rng(0)


def tiff(folder):
    (folder / "x").mkdir()
    for i in range(8):
        tifffile.imwrite(folder / "x" / f"{i}.tif", RNG.normal(3, 2, (2, 8, 8)).astype(np.float32), photometric=1)
    return "x"


def array(shape, dtype=np.float32, suffix="npy", change=lambda x: x):
    def make(folder):
        values = change((RNG.normal(0, 500, shape)).astype(dtype))
        if suffix == "npz":
            np.savez(folder / "x.npz", data=values, other=-values)
        else:
            np.save(folder / "x.npy", values)
        return f"x.{suffix}"

    return make


def sound(folder):
    soundfile = pytest.importorskip("soundfile")
    (folder / "x").mkdir()
    for name in "abc":
        soundfile.write(folder / "x" / f"{name}.wav", RNG.uniform(-0.9, 0.9, (100, 2)), 8000, subtype="FLOAT")
    return "x"


def table(folder):
    rows = [";".join(f"{value:.4f}".replace(".", ",") for value in row) for row in RNG.normal(0, 1, (120, 2))]
    (folder / "x.csv").write_text("a;b\n" + "\n".join(rows) + "\n")
    return "x.csv"


def with_gaps(values):
    values[3, 0, 2], values[11, 1, 5] = np.nan, np.nan
    return values


WINDOWS = {"stride": 8}
# how the data is made, the options of training that evaluation needs too, and other options of training
KINDS = {
    "recording": (array((2, 150)), {"recording": True, **WINDOWS}, {"sequence_length": 16}),
    "bands in TIFF files": (tiff, {}, {"resolution": [8], "image_norm": "meanstd"}),
    "16 bits": (array((12, 1, 8, 8), np.int16), {}, {}),
    "channels last": (array((12, 8, 8, 2)), {"channels_last": True, "image_range": [-900, 900]}, {}),
    "sequences with channels last": (array((12, 16, 2)), {"channels_last": True}, {}),
    "sound": (sound, WINDOWS, {"sequence_length": 16}),
    "decimal commas": (table, {"csv_decimal": ",", **WINDOWS}, {"sequence_length": 16}),
    "left out": (array((16, 2, 16), change=with_gaps), {"on_missing": "drop"}, {}),
    "interpolated": (array((16, 2, 16), change=with_gaps), {"on_missing": "interpolate"}, {}),
    "paired": (array((12, 2, 16), suffix="npz"), {"condition_column": "other"}, {}),
}


def measured(pipeline, data, options):
    arguments = [f"--pipeline={pipeline}", f"--data={data}", "--num_samples=4", "--num_inference_steps=2"]
    arguments += ["--likelihood_items=4", "--likelihood_timesteps=3"]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    assert evaluate_script.main([*arguments, "--metrics", "memorization", "bits_per_dim"]) == 0
    return {record["metric"]: record["value"] for record in json.loads((pipeline / "evaluation.json").read_text())}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "recording" else pytest.mark.slow) for kind in KINDS]
)
def test_the_run_and_the_options_give_the_same_numbers(kind, tmp_path, capsys):
    """Without its record a pipeline does not know the data, which is then read as the options say."""
    make, shared, more = KINDS[kind]
    data = tmp_path / make(tmp_path)
    source = "train_data_dir" if data.is_dir() else "train_data_file"
    options = {"dataset_name": None, source: str(data), "max_train_steps": 2, "train_batch_size": 4, **shared, **more}
    train(config(tmp_path / "run", **options))
    of_run = tmp_path / "run" / "pipeline"
    shutil.copytree(of_run, tmp_path / "alone", ignore=shutil.ignore_patterns("training.json"))
    found = measured(of_run, data, {})
    assert "is taken as the data that the pipeline was trained on" in capsys.readouterr().out
    given = measured(tmp_path / "alone", data, shared)
    assert "is not taken as the data that the pipeline" in capsys.readouterr().out
    assert given == pytest.approx(found, rel=1e-6) and len(found) >= 5
