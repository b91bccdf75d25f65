"""The program sample.py: files of every format, going on after a stop, refusals, and several processes."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, load_program, run_program
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.data.sequence_files import read_sequences

program = load_program("sample")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A saved pipeline of images with two named classes, and one of sequences."""
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    small = {"dim": 8, "dim_mults": (1, 2), "in_channels": 1, "sample_size": 8}
    scheduler = GaussianScheduler(num_train_timesteps=10)
    images = DDPMPipeline(UNet2D(num_class_embeds=2, **small), scheduler, id2label={0: "zero", 1: "one"})
    images.save_pretrained(folder / "images")
    DDPMPipeline1D(UNet1D(**small), scheduler).save_pretrained(folder / "sequences")
    return folder


def run(pipelines, kind, folder, *more, count=5):
    command = ["--pipeline", pipelines / kind, "--num_samples", count, "--output_dir", folder, "--batch_size=2"]
    return program.main([*map(str, command), "--num_inference_steps=2", *more])


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_images_go_on_where_they_stopped(pipelines, tmp_path, capsys):
    assert run(pipelines, "images", tmp_path / "a") == 0
    assert "5 samples" in capsys.readouterr().out
    whole = content(tmp_path / "a")
    assert {f"{n:06d}.png" for n in range(5)} | {"settings.json", "labels.csv", "grid.png"} == set(whole)
    assert whole["labels.csv"].split() == [b"label", b"zero", b"one", b"zero", b"one", b"zero"]
    (tmp_path / "a" / "000003.png").unlink()
    kept = (tmp_path / "a" / "000000.png").stat().st_mtime_ns
    assert run(pipelines, "images", tmp_path / "a") == 0
    assert content(tmp_path / "a") == whole and (tmp_path / "a" / "000000.png").stat().st_mtime_ns == kept
    assert run(pipelines, "images", tmp_path / "a", "--seed=1") == 2
    assert "seed: 0 there, 1 now" in capsys.readouterr().err and content(tmp_path / "a") == whole


def test_formats_of_images_hold_the_same_samples(pipelines, tmp_path):
    for form in ("png", "npz", "npy", "parquet"):
        assert run(pipelines, "images", tmp_path / form, f"--format={form}") == 0
    expected = np.stack([np.asarray(Image.open(tmp_path / "png" / f"{n:06d}.png")) for n in range(5)])
    with np.load(tmp_path / "npz" / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"][..., 0], expected)
    floats = np.load(tmp_path / "npy" / "samples.npy")
    assert floats.shape == (5, 1, 8, 8) and np.array_equal((floats[:, 0] * 255).round(), expected)
    table = datasets.Dataset.from_parquet(str(tmp_path / "parquet" / "samples.parquet"), cache_dir=str(tmp_path / "c"))
    assert np.array_equal([np.asarray(image) for image in table["image"]], expected)
    assert list(table["label"]) == ["zero", "one", "zero", "one", "zero"]
    assert not list(tmp_path.rglob("parts"))


def test_formats_of_sequences_are_read_as_data(pipelines, tmp_path):
    for form in ("npy", "csv", "parquet"):
        assert run(pipelines, "sequences", tmp_path / form, f"--format={form}") == 0
    arrays = [np.asarray(read_sequences(str(tmp_path / f / f"samples.{f}"))) for f in ("npy", "csv", "parquet")]
    for array in arrays:
        assert np.allclose(array.reshape(5, 8), arrays[0].reshape(5, 8), rtol=1e-6, atol=0)
    assert (tmp_path / "csv" / "grid.png").exists()


def test_parts_of_a_stopped_run_are_kept(pipelines, tmp_path, monkeypatch):
    assert run(pipelines, "sequences", tmp_path / "whole") == 0
    write, written = program.SampleFiles.write, []

    def stop(self, block, samples):
        written.append(len(samples))
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, block, samples)

    monkeypatch.setattr(program.SampleFiles, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(pipelines, "sequences", tmp_path / "a")
    assert run(pipelines, "sequences", tmp_path / "a") == 0
    assert written == [2, 2, 2, 1]  # never more than a batch, and the first part is not made again
    assert content(tmp_path / "a") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("images", "--format=csv", "--format of images must be one of"),
        ("images", "--class_labels=two", "must be of zero, one; got two"),
        ("sequences", "--class_labels=1", "needs a model with classes"),
        ("sequences", "--guidance_scale=2", "--guidance_scale needs"),
        ("sequences", "--format=png", "--format of sequences must be one of npy, csv, parquet"),
        ("sequences", "--num_samples=0", "--num_samples must be at least 1, got 0"),
        ("sequences", "--num_inference_steps=11", "1 to 10, got 11"),
        ("sequences", "--scheduler=Nothing", "got 'Nothing'"),
        ("nothing", "--seed=0", "cannot be loaded"),
    ],
)
def test_refusals_come_before_anything_is_written(pipelines, tmp_path, capsys, kind, option, message):
    assert run(pipelines, kind, tmp_path / "a", option) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_folder_with_other_files_is_left_alone(pipelines, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        assert run(pipelines, "sequences", place) == 2
    assert capsys.readouterr().err.count("another --output_dir") == 2
    assert content(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.slow
def test_two_processes_write_the_same_files(pipelines, tmp_path):
    command = ["--pipeline", pipelines / "images", "--num_samples=7", "--batch_size=2", "--num_inference_steps=2"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ddpm_hf.commands.sample"]
    done = run_program(
        *launch, *command, "--output_dir=two", cwd=tmp_path, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0 and "7 samples, 2 process(es)" in done.stdout, done.stdout + done.stderr
    script = ROOT / "training" / "sample.py"
    assert run_program(script, *command, "--output_dir=one", cwd=tmp_path, OMP_NUM_THREADS="1").returncode == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "settings.json").read_text())["seed"] == 0
