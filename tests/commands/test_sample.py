"""The program sample.py: files of every format, going on after a stop, refusals, and several processes."""

import json
import os
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, load_program, run_program
from diffusers import EulerDiscreteScheduler
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.commands import sampling
from ddpm_hf.commands.sample_files import SampleFiles
from ddpm_hf.data.sequence_files import read_sequences
from ddpm_hf.evaluation.sampling import sample_generators
from ddpm_hf.hub.publish import load_pipeline

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
    bands, units = {**small, "in_channels": 2}, {"data_shift": [0, 100], "data_scale": [1, 1000]}
    DDPMPipeline(UNet2D(**bands), scheduler, **units).save_pretrained(folder / "units")
    colours = DDPMPipeline(UNet2D(**{**small, "in_channels": 3}), scheduler)
    colours.save_pretrained(folder / "colours")
    paired = UNet2D(condition_channels=1, **small)
    DDPMPipeline(paired, scheduler, condition="paired", condition_size=[4, 4]).save_pretrained(folder / "paired")
    leads = {"condition": "paired", "condition_size": [4], "condition_shift": [5, 0], "condition_scale": [2, 1]}
    DDPMPipeline1D(UNet1D(condition_channels=2, **small), scheduler, **leads).save_pretrained(folder / "leads")
    told = UNet1D(condition_channels=2, **small)
    DDPMPipeline1D(told, scheduler, condition="known").save_pretrained(folder / "told")
    Image.new("L", (8, 8), 9).save(folder / "large.png")
    (folder / "twice").mkdir()
    for ending in ("png", "bmp"):
        Image.new("L", (4, 4), 9).save(folder / "twice" / f"a.{ending}")
    np.save(folder / "flat.npy", np.zeros(4))
    np.save(folder / "bright.npy", np.array([0.0, 2.0]).repeat(16).reshape(2, 4, 4))
    np.save(folder / "gap.npy", np.array([0.0, np.nan]).repeat(8).reshape(2, 2, 4))
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


@pytest.mark.parametrize("form", ["npy", "csv", "parquet"])
def test_files_hold_sequences_that_float32_cannot(form, tmp_path):
    """Values of about 1e9 with a deviation of 1, which the pipeline gives as float64."""
    samples = 1e9 + np.random.default_rng(0).standard_normal((3, 1, 4))
    files = SampleFiles(tmp_path, form, 3, 2)
    for block in (0, 1):
        files.write(block, samples[2 * block : 2 * block + 2])
    np.testing.assert_array_equal(np.reshape(read_sequences(str(files.join()))[:], samples.shape), samples)


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
    write, written = sampling.SampleFiles.write, []

    def stop(self, block, samples):
        written.append(len(samples))
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, block, samples)

    monkeypatch.setattr(sampling.SampleFiles, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(pipelines, "sequences", tmp_path / "a")
    assert run(pipelines, "sequences", tmp_path / "a") == 0
    assert written == [2, 2, 2, 1]  # never more than a batch, and the first part is not made again
    assert content(tmp_path / "a") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("images", "--format=csv", "--format of images must be one of"),
        ("images", "--class_labels=two", "must be of zero, one, or a file"),
        ("sequences", "--class_labels=1", "needs a model with classes"),
        ("sequences", "--guidance_scale=2", "guidance_scale needs"),
        ("sequences", "--format=png", "--format of sequences must be one of npy, csv, parquet"),
        ("sequences", "--num_samples=0", "--num_samples must be at least 1, got 0"),
        ("sequences", "--num_inference_steps=11", "1 to 10; got 11"),
        ("sequences", "--scheduler=Nothing", "got 'Nothing'"),
        ("nothing", "--seed=0", "cannot be loaded"),
        ("sequences", "--eta=2", "eta must be a number from 0 to 1, got 2.0"),
        ("images", "--guidance_rescale=2", "guidance_rescale must be a number from 0 to 1, got 2.0"),
        ("paired", "--seed=0", "needs one for each sample, of 1 channel and the size 4 x 4"),
        ("images", "--condition=a.png", "--condition needs a model with paired conditions"),
        ("paired", "--condition=none.png", "--condition must be a file or a folder, got none.png: No such file"),
        ("paired", "--condition={}/large.png", "the size 4 x 4, as in training; {}/large.png has the shape (1, 8, 8)"),
        ("paired", "--condition={}/flat.npy", "must hold conditions (N, 1, 4 x 4), got (4,)"),
        ("paired", "--condition={}/twice", "names without endings must differ"),
        ("paired", "--condition={}/bright.npy", "condition must lie in [0, 1], got 0 to 2"),
        ("leads", "--condition={}/gap.npy", "the values must be finite, and 000001 of"),
        ("leads", "--condition={}/flat.npy", "must have 2 channels of the size 4, as in training"),
        ("leads", "--condition={}/twice", "has no .npy files"),
        ("images", "--mask=a.npy", "--known is missing"),
        ("images", "--length=20", "--length does not apply to a pipeline of images, got 20"),
        ("sequences", "--length=4", "length must be at least the size that the model was trained on"),
        ("sequences", "--overlap=2", "method and overlap need length, the size of the samples"),
        ("images", "--strength=0.5", "--strength needs --init_image"),
        ("images", "--init_sequence=a.npy", "--init_sequence does not apply to a pipeline of images"),
        ("sequences", "--init_sequence=none.npy", "--init_sequence: the file must be a file on disk, got none.npy"),
        ("sequences", "--known=none.npy", "--known: the file must be a file on disk, got none.npy"),
        ("units", "--format=png", "--format png holds levels of pictures, and this pipeline's images are in units"),
        ("images", "--format=webp", "--format webp has no grey images"),
        ("images", "--guide={}/sequences", "--guide must be a pipeline of the same kind"),
        ("images", "--guide={}/images", "with a --guidance_scale other than 1; got a DDPMPipeline and 1"),
        ("images", "--jump_length=3", "--jump_length applies to items to complete (--known); got 3 without it"),
        ("sequences", "--jump_n_sample=1", "--jump_n_sample applies to items to complete (--known); got 1"),
        ("images", "--guidance_rescale=0.5", "applies to samples with guidance; got 0.5 with --guidance_scale 1"),
        ("images", "--guidance_interval 0 0.5", "--guidance_interval applies to samples with guidance"),
        ("sequences", "--length=8 --method=joint", "--method applies to samples of another size than in training"),
        ("images", "--width=8 --overlap=2", "--overlap applies to samples of another size than in training"),
        ("sequences", "--num_inference_steps=10 --eta=0", "--eta applies to DDIM steps, which are fewer than"),
        ("sequences", "--scheduler=ddpm --eta=1", "or those of --scheduler ddim; got 1.0 for DDPM steps"),
        ("sequences", "--known=a.npy --jump_n_sample=3", "got 3 with 2 steps and --jump_length 10: leave it out"),
        ("sequences", "--known=a.npy --jump_length=1 --jump_n_sample=1", "--jump_length applies to jumps; got 1 with"),
        ("told", "--known=a.npy --jump_length=1", "--jump_length applies to models that were not trained to complete"),
    ],
)
def test_refusals_come_before_anything_is_written(pipelines, tmp_path, capsys, kind, option, message):
    assert run(pipelines, kind, tmp_path / "a", *option.format(pipelines).split(" ")) == 2
    assert message.replace("{}", str(pipelines)) in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_folder_with_other_files_is_left_alone(pipelines, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt"):
        assert run(pipelines, "sequences", place) == 2
    assert capsys.readouterr().err.count("another --output_dir") == 2
    assert content(tmp_path) == {"mine.txt": b"mine"}


def saved(folder):
    return json.loads((folder / "settings.json").read_text())


def images_of(folder, count=5):
    return np.stack([np.asarray(Image.open(folder / f"{n:06d}.png")) for n in range(count)]).astype(int)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["all"], ["zero", "one", "zero", "one", "zero"]),
        (["one"], ["one"] * 5),
        (["one", "0", "one"], ["one", "zero", "one", "one", "zero"]),
        (["{}/labels.csv"], ["one", "one", "zero", "one", "one"]),
        (["{}/labels.txt"], ["zero", "one", "zero", "one", "zero"]),
    ],
)
def test_classes_are_taken_in_turn(pipelines, tmp_path, asked, expected):
    (tmp_path / "labels.csv").write_text("label\none\none\nzero\n")
    (tmp_path / "labels.txt").write_text("0\n1\n")
    labels = ["--class_labels", *(each.format(tmp_path) for each in asked)]
    assert run(pipelines, "images", tmp_path / "a", *labels, "--batch_size=5") == 0
    assert (tmp_path / "a" / "labels.csv").read_text().split() == ["label", *expected]
    pipe = load_pipeline(str(pipelines / "images"))
    options = {"num_inference_steps": 2, "class_labels": expected, "output_type": "np"}
    images = pipe(batch_size=5, generator=sample_generators(0, range(5)), **options).images
    assert np.array_equal(images_of(tmp_path / "a"), (images[..., 0] * 255).round())
    if "csv" in asked[0]:
        (tmp_path / "labels.csv").write_text("label\nzero\n")
        assert run(pipelines, "images", tmp_path / "a", *labels, "--batch_size=5") == 2


@pytest.mark.parametrize(
    ("options", "name", "change"),
    [
        (["--scheduler=ddim", "--eta=0.5"], "GaussianScheduler", {"eta": 0.5}),
        (["--scheduler=fast"], "DPMSolverMultistepScheduler", {}),
        (["--scheduler=EulerDiscreteScheduler"], "EulerDiscreteScheduler", {}),
        (["--guidance_scale=3", "--guidance_rescale=0.5"], "GaussianScheduler",
         {"guidance_scale": 3.0, "guidance_rescale": 0.5}),
        (["--guidance_scale=2", "--guide={}/images"], "GaussianScheduler", {}),
    ],
)  # fmt: skip
def test_sampler_and_guidance_reach_the_pipeline(pipelines, tmp_path, options, name, change):
    assert run(pipelines, "images", tmp_path / "a", *(each.format(pipelines) for each in options)) == 0
    pipe = load_pipeline(str(pipelines / "images"))
    if name == "DPMSolverMultistepScheduler":
        pipe.use_fast_sampler(2)
    elif name == "EulerDiscreteScheduler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif "ddim" in options[0]:
        pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config, sampler="ddim")
    found = []
    for numbers, labels in (((0, 1), [0, 1]), ((2, 3), [0, 1]), ((4,), [0])):
        named = {"generator": sample_generators(0, numbers), "class_labels": labels, "output_type": "np"}
        found += list(pipe(batch_size=len(labels), num_inference_steps=2, **named, **change).images[..., 0])
    assert np.array_equal(images_of(tmp_path / "a"), (np.stack(found) * 255).round())
    assert saved(tmp_path / "a")["scheduler"] == name


def test_sequences_with_gaps_are_completed_in_turn(pipelines, tmp_path):
    known = np.linspace(-1, 1, 16).reshape(2, 1, 8).astype(np.float32)
    known[0, 0, 3:] = np.nan
    known[1, 0, :2] = np.nan
    np.save(tmp_path / "known.npy", known)
    options = [f"--known={tmp_path}/known.npy", "--jump_length=1", "--jump_n_sample=2"]
    assert run(pipelines, "sequences", tmp_path / "a", *options) == 0
    samples = np.load(tmp_path / "a" / "samples.npy")
    for number, sample in enumerate(samples):
        item = known[number % 2]
        assert np.array_equal(sample[~np.isnan(item)], item[~np.isnan(item)])
    assert np.isfinite(samples).all() and len(np.unique(samples[::2, 0, 5])) == 3
    np.save(tmp_path / "known.npy", known[:1])
    assert run(pipelines, "sequences", tmp_path / "a", *options) == 2  # the items are another's
    np.save(tmp_path / "known.npy", np.zeros((2, 8), np.float32))
    assert run(pipelines, "sequences", tmp_path / "b", *options) == 2 and not (tmp_path / "b").exists()


@pytest.mark.parametrize("form", ["pictures", "arrays"])
def test_the_known_part_of_pictures_is_kept(pipelines, tmp_path, form):
    colours = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 3:6] = 1
    if form == "pictures":
        (tmp_path / "pictures").mkdir()
        for number, each in enumerate(colours):
            Image.fromarray(each).save(tmp_path / "pictures" / f"{number}.png")
        Image.fromarray(hole * 255).save(tmp_path / "mask.png")
        options = [f"--known={tmp_path}/pictures", f"--mask={tmp_path}/mask.png"]
    else:
        np.savez(tmp_path / "known.npz", colours)
        np.save(tmp_path / "mask.npy", hole)
        options = [f"--known={tmp_path}/known.npz", f"--mask={tmp_path}/mask.npy"]
    assert run(pipelines, "colours", tmp_path / "a", *options, "--jump_n_sample=1", "--format=webp") == 0
    for number in range(5):
        found = np.asarray(Image.open(tmp_path / "a" / f"{number:06d}.webp"))
        assert np.array_equal(found[hole == 0], colours[number % 2][hole == 0])
        assert not np.array_equal(found, colours[number % 2])


def test_series_and_images_of_other_sizes(pipelines, tmp_path):
    """The size, and how it is reached, go to the pipeline's call."""
    options = ["--length=20", "--method=joint", "--overlap=2"]
    assert run(pipelines, "sequences", tmp_path / "a", *options, "--batch_size=5") == 0
    pipe = load_pipeline(str(pipelines / "sequences"))
    call = {"length": 20, "method": "joint", "overlap": 2, "num_inference_steps": 2}
    expected = pipe(batch_size=5, generator=sample_generators(0, range(5)), **call).sequences
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npy"), expected)
    assert run(pipelines, "images", tmp_path / "b", "--width=12") == 0
    assert images_of(tmp_path / "b").shape == (5, 8, 12)


def test_given_items_are_varied_in_turn(pipelines, tmp_path, capsys):
    """Strength 0 gives the items back; between, they are those of a call of the pipeline; pictures are resized."""
    items = np.linspace(-0.9, 0.9, 16).reshape(2, 1, 8)
    np.save(tmp_path / "items.npy", items)
    options = [f"--init_sequence={tmp_path}/items.npy"]
    assert run(pipelines, "sequences", tmp_path / "same", *options, "--strength=0") == 0
    assert np.array_equal(np.load(tmp_path / "same" / "samples.npy"), items[[0, 1, 0, 1, 0]])
    assert run(pipelines, "sequences", tmp_path / "a", *options, "--batch_size=5") == 0
    pipe = load_pipeline(str(pipelines / "sequences"))
    call = {"strength": 0.5, "num_inference_steps": 2, "generator": sample_generators(0, range(5))}
    expected = pipe(sequence=items[[0, 1, 0, 1, 0]], **call).sequences
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npy"), expected)
    assert run(pipelines, "sequences", tmp_path / "a", *options, "--batch_size=5", "--strength=0.4") == 2
    assert run(pipelines, "sequences", tmp_path / "b", *options, "--strength=2") == 2
    error = capsys.readouterr().err
    assert "strength: 0.5 there, 0.4 now" in error and "strength must be a number from 0" in error
    for late in ([*options, "--scheduler=PNDMScheduler", "--num_inference_steps=5"],
                 ["--method=sequential", "--length=16", "--scheduler=DDIMScheduler"]):  # fmt: skip
        assert run(pipelines, "sequences", tmp_path / "b", *late) == 2 and not (tmp_path / "b").exists()
    error = capsys.readouterr().err
    assert "cannot start in the middle" in error and "jumps need GaussianScheduler" in error
    table = datasets.Dataset.from_dict({"channel_0": items[:, 0].tolist()})
    table.to_parquet(str(tmp_path / "items.parquet"))
    lists = [f"--init_sequence={tmp_path}/items.parquet", "--strength=0"]
    assert run(pipelines, "sequences", tmp_path / "lists", *lists, count=2) == 0
    assert np.array_equal(np.load(tmp_path / "lists" / "samples.npy"), items)
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1028  # 16 bits: 4 levels of 8 bits apart
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert run(pipelines, "images", tmp_path / "d", f"--init_image={tmp_path}/deep.png", "--strength=0") == 0
    assert (images_of(tmp_path / "d")[0] == deep / 257).all()
    Image.new("RGB", (20, 30), (90, 90, 90)).save(tmp_path / "picture.png")
    assert run(pipelines, "images", tmp_path / "c", f"--init_image={tmp_path}/picture.png", "--strength=0") == 0
    assert (images_of(tmp_path / "c") == 90).all()


def test_every_condition_gets_its_samples(pipelines, tmp_path, capsys):
    """A picture for each draw, under the name of its condition; the samples are those of a call of the pipeline."""
    levels, small = np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8), tmp_path / "small"
    (small / "sub").mkdir(parents=True)
    for name, each in zip(("a.b", "grid", "sub/c"), levels):
        Image.fromarray(each).save(small / f"{name}.png")
    options = [f"--condition={small}", "--batch_size=6"]
    assert run(pipelines, "paired", tmp_path / "a", *options, count=2) == 0
    assert "6 samples" in capsys.readouterr().out
    names = [f"{name}-{draw:03d}" for name in ("a.b", "grid", "sub/c") for draw in (0, 1)]
    whole = content(tmp_path / "a")
    assert {f"samples/{n}.png" for n in names} | {"settings.json", "conditions.csv", "grid.png"} == set(whole)
    assert whole["conditions.csv"].decode().split() == ["condition", "a.b", "a.b", "grid", "grid", "sub/c", "sub/c"]
    pipe = load_pipeline(str(pipelines / "paired"))
    call = {"num_inference_steps": 2, "generator": sample_generators(0, range(6)), "output_type": "np"}
    expected = pipe(condition=levels.repeat(2, axis=0)[..., None] / 255, **call).images
    found = np.stack([np.asarray(Image.open(tmp_path / "a" / "samples" / f"{n}.png")) for n in names])
    assert np.array_equal(found, (expected[..., 0] * 255).round())
    (tmp_path / "a" / "samples" / "grid-001.png").unlink()
    assert run(pipelines, "paired", tmp_path / "a", *options, count=2) == 0 and content(tmp_path / "a") == whole
    Image.fromarray(levels[0]).save(small / "grid.png")
    assert run(pipelines, "paired", tmp_path / "a", *options, count=2) == 2
    assert "condition_items" in capsys.readouterr().err
    # the same samples from an array, and one sample has the condition's own name
    np.save(tmp_path / "small.npy", levels)
    options[0] = f"--condition={tmp_path}/small.npy"
    assert run(pipelines, "paired", tmp_path / "b", *options, "--format=npy", count=2) == 0
    assert np.array_equal(np.load(tmp_path / "b" / "samples.npy")[:, 0], expected[..., 0])
    assert run(pipelines, "paired", tmp_path / "c", f"--condition={small}/sub/c.png", count=1) == 0
    assert (tmp_path / "c" / "samples" / "c.png").exists()


@pytest.mark.parametrize("form", ["npy", "csv", "folder", "bytes"])
def test_conditions_of_sequences_are_in_their_own_units(pipelines, tmp_path, form):
    leads = np.random.default_rng(0).normal(5, 2, size=(3, 2, 4))
    if form == "bytes":  # numbers in units of the data, and no levels of pictures
        leads = leads.round().clip(0, 255)
    if form in ("folder", "bytes"):
        for number, each in enumerate(leads if form == "folder" else leads.astype(np.uint8)):
            (tmp_path / "leads").mkdir(exist_ok=True)
            np.save(tmp_path / "leads" / f"{number}.npy", each)
    elif form == "npy":
        np.save(tmp_path / "leads.npy", leads)
    else:  # one row a channel, and so a single condition
        leads = leads[:1]
        np.savetxt(tmp_path / "leads.csv", leads[0], delimiter=",")
    place = tmp_path / ("leads" if form in ("folder", "bytes") else f"leads.{form}")
    assert run(pipelines, "leads", tmp_path / "a", f"--condition={place}", count=2) == 0
    pipe = load_pipeline(str(pipelines / "leads"))
    numbers = range(2 * len(leads))
    call = {"num_inference_steps": 2, "generator": sample_generators(0, numbers)}
    expected = pipe(condition=leads.repeat(2, axis=0), **call).sequences
    np.testing.assert_allclose(np.load(tmp_path / "a" / "samples.npy"), expected, rtol=0, atol=1e-5)
    names = (tmp_path / "a" / "conditions.csv").read_text().split()[1::2]
    assert names == [f"{n}" if place.is_dir() else f"{n:06d}" for n in range(len(leads))]
    known = np.full((len(leads), 8), np.nan)
    known[:, :3] = np.arange(len(leads))[:, None] / 4
    np.save(tmp_path / "known.npy", known)
    options = [f"--condition={place}", f"--known={tmp_path}/known.npy", "--jump_n_sample=1"]
    assert run(pipelines, "leads", tmp_path / "k", *options, count=2) == 0
    completed = np.load(tmp_path / "k" / "samples.npy")[:, 0]
    assert np.array_equal(completed[:, :3], known[:, :3].repeat(2, axis=0)) and np.isfinite(completed).all()
    assert run(pipelines, "leads", tmp_path / "b", f"--condition={place}", f"--init_sequence={pipelines}/gap.npy") == 2


@pytest.mark.parametrize("method", ["single", "joint"])
@pytest.mark.parametrize("kind", ["paired", "leads"])
def test_larger_samples_have_conditions_in_proportion(kind, method, pipelines, tmp_path):
    """The samples are those of a call of the pipeline."""
    rng = np.random.default_rng(0)
    if kind == "paired":
        conditions, size = rng.uniform(size=(2, 1, 6, 8)), {"height": 12, "width": 16}
    else:
        conditions, size = rng.normal(5, 2, size=(2, 2, 10)), {"length": 20}
    np.save(tmp_path / "c.npy", conditions)
    options = [f"--condition={tmp_path}/c.npy", "--format=npy", f"--method={method}"]
    assert run(pipelines, kind, tmp_path / "a", *options, *(f"--{name}={n}" for name, n in size.items()), count=1) == 0
    pipe = load_pipeline(str(pipelines / kind))
    call = {"num_inference_steps": 2, "generator": sample_generators(0, range(2)), "output_type": "np", **size}
    expected = pipe(condition=torch.from_numpy(conditions), method=method, return_dict=False, **call)[0]
    expected = np.moveaxis(expected, -1, 1) if kind == "paired" else expected
    np.testing.assert_allclose(np.load(tmp_path / "a" / "samples.npy"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("paired", ["--condition={}/large.png", "--width=16"], "size 4 x 8, in proportion to the samples; {}/large"),
        ("paired", ["--condition={}/large.png", "--width=17"], "a multiple of 2 as their size"),
        ("paired", ["--width=16"], "of 1 channel and the size 4 x 8"),
        ("paired", ["--condition={}/twice", "--height=16", "--width=16", "--overlap=3"], "must be a multiple of 2"),
        ("leads", ["--condition={}/gap.npy", "--length=16"], "2 channels of the size 8, in proportion to the samples"),
        ("leads", ["--condition={}/gap.npy", "--length=8", "--method=sequential"], "without paired conditions"),
    ],
)  # fmt: skip
def test_conditions_out_of_proportion_are_refused(kind, options, message, pipelines, tmp_path, capsys):
    """Before anything is written."""
    assert run(pipelines, kind, tmp_path / "a", *(option.format(pipelines) for option in options)) == 2
    assert message.format(pipelines) in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_images_in_units_of_the_data(pipelines, tmp_path):
    assert run(pipelines, "units", tmp_path / "a") == 0
    samples = np.load(tmp_path / "a" / "samples.npy")
    assert samples.shape == (5, 2, 8, 8) and np.abs(samples[:, 0]).max() <= 1 < np.abs(samples[:, 1]).max()
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert len(np.unique(grid)) > 20


def test_more_than_a_thousand_pictures_lie_in_folders(tmp_path):
    files = sampling.SampleFiles(tmp_path, "png", 2001, 500)
    assert [str(files.picture(n).relative_to(tmp_path)) for n in (0, 999, 1000, 2000)] == [
        "00000/000000.png", "00000/000999.png", "00001/001000.png", "00002/002000.png",
    ]  # fmt: skip
    files.write(4, np.zeros((1, 8, 8, 1), np.uint8))
    assert files.missing() == [0, 1, 2, 3] and [p.name for p in tmp_path.rglob("*.png")] == ["002000.png"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "parquet"])
def test_a_killed_run_goes_on(pipelines, tmp_path, form):
    command = [ROOT / "training" / "sample.py", "--pipeline", pipelines / "images", "--num_samples=60"]
    command += ["--batch_size=3", f"--format={form}"]
    assert run_program(*command, "--output_dir=whole", cwd=tmp_path).returncode == 0
    parts = tmp_path / "a" / "parts" if form == "parquet" else tmp_path / "a"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, *map(str, command), "--output_dir=a"], cwd=tmp_path, env=env) as process:
        while process.poll() is None and len(list(parts.glob("000*"))) < 6:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("000*") if path.suffix in (".png", ".npy")}
    assert 3 <= len(kept) < 60
    assert run_program(*command, "--output_dir=a", cwd=tmp_path).returncode == 0
    whole = {name: data for name, data in content(tmp_path / "whole").items() if not name.endswith(".parquet")}
    assert {name: data for name, data in content(tmp_path / "a").items() if name in whole} == whole
    if form == "png":
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    else:
        tables = [pq.read_table(tmp_path / run / "samples.parquet") for run in ("a", "whole")]
        assert tables[0].equals(tables[1]) and tables[0].num_rows == 60


def two_processes(*command, cwd):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ddpm_hf.commands.sample"]
    return run_program(*launch, *command, cwd=cwd, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["folder", "option"])
def test_two_processes_refuse_together(pipelines, tmp_path, problem):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    command = ["--pipeline", pipelines / "images", "--num_samples=4", "--num_inference_steps=2"]
    output = "mine" if problem == "folder" else "new"
    start = time.monotonic()
    done = two_processes(*command, f"--output_dir={output}", *["--eta=2"] * (problem == "option"), cwd=tmp_path)
    message = "output_dir must be a new or empty folder" if problem == "folder" else "eta must be a number from 0 to 1"
    assert done.returncode != 0 and done.stderr.count(message) == 1, done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.split(message)[0]
    assert time.monotonic() - start < 120 and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "paired"])
def test_two_processes_write_the_same_files(pipelines, tmp_path, kind):
    command = ["--pipeline", pipelines / kind, "--num_samples=7", "--batch_size=2", "--num_inference_steps=2"]
    if kind == "paired":
        np.save(tmp_path / "small.npy", np.linspace(0, 1, 7 * 16).reshape(7, 4, 4))
        command[2:3] = ["--num_samples=1", f"--condition={tmp_path}/small.npy"]
    done = two_processes(*command, "--output_dir=two", cwd=tmp_path)
    assert done.returncode == 0 and "7 samples, 2 process(es)" in done.stdout, done.stdout + done.stderr
    script = ROOT / "training" / "sample.py"
    assert run_program(script, *command, "--output_dir=one", cwd=tmp_path, OMP_NUM_THREADS="1").returncode == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "settings.json").read_text())["seed"] == 0
