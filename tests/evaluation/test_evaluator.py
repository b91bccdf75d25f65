"""Metrics of pipelines: true values for known generators, one answer on any number of processes, cache, program."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cleanfid.fid import frechet_distance as clean_fid_frechet
from conftest import ROOT, load_program, optimal_prediction, run_program, simulated
from helpers import SMALL, config, metrics
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, train
from ddpm_hf.data import open_data
from ddpm_hf.data.images import ImageDataset, digits
from ddpm_hf.data.loading import Part, hold_out, split_record
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.tables import ImageColumn
from ddpm_hf.evaluation.evaluator import EvalSettings, Evaluator
from ddpm_hf.evaluation.features import FeatureNetwork
from ddpm_hf.evaluation.metrics import too_close, unit_directions
from ddpm_hf.randomness import Stream, derive_seed, generator_seeds

EVALUATE = ROOT / "training" / "evaluate.py"
evaluate_script = load_program("evaluate")
PIXELS = {"feature_network": "pixels", "batch_size": 50}


class Known:
    """A pipeline whose samples are known: for generator i, what `samples[i]` is (by the seeds that it is given)."""

    device = torch.device("cpu")
    scheduler = GaussianScheduler()

    def __init__(self, samples, shape):
        self.samples = samples
        self.unet = UNet1D(sample_size=8, dim=8, dim_mults=[1]).eval()
        self.unet.forward = lambda x, t: type("Out", (), {"sample": x})

    def __call__(self, batch_size, generator, **_):
        seeds = generator_seeds(0, Stream.SAMPLES, range(len(self.samples)))
        return (self.samples[[seeds.index(g.initial_seed()) for g in generator]],)


def evaluator(dataset, shape, held_out=None, accelerator=None, **options):
    settings = EvalSettings(**{**PIXELS, **options})
    return Evaluator(accelerator or Accelerator(cpu=True), dataset, shape, settings, held_out)


def measure(dataset, shape, samples, **options):
    e = evaluator(dataset, shape, num_samples=len(samples), **options)
    e.prepare()
    return e(Known(samples, shape), 5)


def test_fid_and_kid_are_clean_fids(tmp_path):
    """Of 8-bit samples and un-augmented real pictures, each once."""
    arrays = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    real, fake = arrays[:90], arrays[90:] // 2
    data = ImageDataset(list(real), (8, 8), 3, center_crop=False, random_flip=True)
    options = {"cache_dir": str(tmp_path), "metrics": ["fid", "kid"]}
    # off the 8-bit grid by less than half a level: rounded as pictures are
    values = measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options)
    network = FeatureNetwork("pixels")
    a, b = (network(x).double().numpy() for x in (real, fake))
    expected = clean_fid_frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    # fewer samples than dimensions: the matrix root of clean-fid is of singular matrices, and exact to some 1e-4
    assert values["fid"] == pytest.approx(expected, rel=1e-3)
    x, y = a / np.sqrt(192), b / np.sqrt(192)
    kernel = [(u @ v.T + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    full = sum(off) - 2 * kernel[2].mean()
    # subsets of all 60 samples and 60 of 90 real ones estimate the whole without bias
    assert values["kid"] == pytest.approx(full, rel=0.05)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values and file.stat().st_mtime_ns == written
    file.write_bytes(b"damaged")
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values


def grey(count, seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def images(sources, side=8, **options):
    return ImageDataset(sources, (side, side), 1, **options)


def as_samples(arrays):
    return arrays[..., None] / np.float32(255)


@pytest.mark.parametrize("kind", ["arrays", "bytes", "files", "table", "pictures"])
def test_the_cache_knows_every_picture(kind, tmp_path):
    """One pixel of one picture among 40 is another key, also in files of equal size and time; so are another number of
    items and another treatment of bad ones. The same contents have the same key, wherever they are."""

    def encoded(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "bmp")
        return file.getvalue()

    def sources(arrays, folder):
        if kind == "files":
            folder.mkdir()
            for i, array in enumerate(arrays):
                (folder / f"{i}.bmp").write_bytes(encoded(array))
                os.utime(folder / f"{i}.bmp", (0, 0))
            return [str(folder / f"{i}.bmp") for i in range(len(arrays))]
        if kind == "table":
            rows = {"image": [{"bytes": encoded(array), "path": None} for array in arrays]}
            features = datasets.Features({"image": datasets.Image()})
            return ImageColumn(datasets.Dataset.from_dict(rows, features=features), "image")
        form = {"arrays": lambda x: x, "bytes": encoded, "pictures": Image.fromarray}[kind]
        return [form(array) for array in arrays]

    def key(arrays, folder, **options):
        return evaluator(images(sources(arrays, tmp_path / folder)), (1, 8, 8), **options)._cache_file().name

    arrays = grey(40)
    changed = arrays.copy()
    changed[17, 3, 3] ^= 1
    keys = [key(arrays, "a"), key(changed, "b"), key(arrays[:39], "c"), key(arrays, "d", num_real=39)]
    keys.append(key(arrays, "e", on_bad_image="skip"))
    assert len(set(keys)) == 5 and key(arrays, "f") == keys[0]


def test_the_cache_is_not_for_what_cannot_be_told(tmp_path):
    """Data sets of the user, classes that change ours, and what arrays do not hold have no file."""

    class Own(ImageDataset):
        pass

    assert evaluator(list(digits()), (1, 8, 8))._cache_file() is None
    assert evaluator(Own(list(grey(8)), (8, 8), 1), (1, 8, 8))._cache_file() is None


def test_other_pictures_in_memory_have_other_statistics(tmp_path):
    """All but 16 evenly spaced ones of 200 replaced by black: a distance of their own, not the cached one."""
    options = {"cache_dir": str(tmp_path), "metrics": ["fid"]}
    first, samples = grey(200), as_samples(grey(100, seed=1))
    second = np.zeros_like(first)
    kept = np.linspace(0, 199, 16).astype(int)
    second[kept] = first[kept]
    cached = [measure(images(list(x)), (1, 8, 8), samples, **options)["fid"] for x in (first, second)]
    alone = measure(images(list(second)), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(tmp_path / "other"))["fid"]
    assert cached[1] == alone > 2 * cached[0]


@pytest.mark.parametrize("reason", ["no folder", "full disk"])
def test_a_cache_that_cannot_be_written_stops_nothing(reason, tmp_path, monkeypatch, capsys):
    """The value is the same, a warning names the folder and the option, and no half file is left."""
    samples = as_samples(grey(20, seed=1))
    expected = measure(images(list(grey(30))), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(tmp_path / "good"))
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "cache" if reason == "no folder" else tmp_path / "full"
    if reason == "full disk":

        def full(file, **_):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
    found = measure(images(list(grey(30))), (1, 8, 8), samples, metrics=["fid"], cache_dir=str(folder))
    assert found == expected
    said = capsys.readouterr().out
    assert f"cannot be kept in {folder}" in said and "eval_cache_dir" in said
    assert (tmp_path / "file").read_text() == "mine" and (reason == "no folder" or not list(folder.iterdir()))


def test_bad_pictures_count_nowhere(tmp_path, capsys):
    """Twelve files, six damaged: every metric is that of the six good ones, from the cache too, and their number is
    told. Were the next good one taken for a bad one, one picture would stand seven times."""
    good, options = grey(6), {"cache_dir": str(tmp_path), "on_bad_image": "skip", "metrics": ["fid", "memorization"]}
    places = (0, 1, 2, 3, 4, 8)
    sources = iter(good)
    mixed = [b"damaged" if i in places else next(sources) for i in range(12)]
    samples = as_samples(grey(20, seed=1))
    expected = measure(images(list(good)), (1, 8, 8), samples, **options)
    for metrics_ in (["fid", "memorization"], ["fid", "memorization"], ["fid"]):  # the third needs the cache alone
        e = evaluator(images(mixed), (1, 8, 8), num_samples=20, **{**options, "metrics": metrics_})
        e.prepare()
        values = e(Known(samples, (1, 8, 8)), 5)
        assert values == {name: value for name, value in expected.items() if name[:3] in ("fid", metrics_[-1][:3])}
        records = e.records(values, DDPMPipeline(None, GaussianScheduler()), 5)
        assert {(r["num_real"], r["num_left_out"]) for r in records} == {(6, 6)}
        assert "left out 6 of 12 real pictures" in capsys.readouterr().out
    held = evaluator(images(list(good)), (1, 8, 8), images(mixed), metrics=["held_out_loss"], on_bad_image="skip")
    held(Known([], (1, 8, 8)), 5, GaussianScheduler())
    assert held.num_held_out == 6
    with pytest.raises(ValueError, match="at least 4 real items that can be read, the data has 3"):
        measure(images([*good[:3], *[b"damaged"] * 5]), (1, 8, 8), samples, **options)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_one_answer(processes):
    """For 1 to 5 held-out items, and 2 to 6 samples, so that some processes have no share."""
    data = digits()

    def values(accelerator):
        found = []
        for held, samples in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 6)):
            rest, held_out = hold_out(Part(data, range(12 + held)), held, 0)
            metrics_ = ["memorization", "held_out_loss", "held_out_weighted_loss"]
            options = {"num_samples": samples, "accelerator": accelerator, "metrics": metrics_}
            e = evaluator(rest, (1, 8, 8), held_out, **options)
            e.prepare()
            sequences = evaluator(
                SequenceDataset(rng_rows(5)), (1, 8), None, num_samples=samples, accelerator=accelerator
            )
            sequences.prepare()
            found += e(Known(as_samples(grey(samples)), (1, 8, 8)), 5, GaussianScheduler()).values()
            found += sequences(Known(rng_rows(samples), (1, 8)), 5).values()
        return found

    expected = values(None)
    for found in simulated(processes, values):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def rng_rows(count):
    return np.random.default_rng(3).normal(size=(count, 1, 8))


def gaussian_distance(x, y):
    """The Fréchet distance by covariances and the eigenvalues of their product."""
    a, b = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * roots


def copies(samples, real, mirror):
    """Share of samples nearer to a real item than that item's nearest other one, by all distances. Rows are (h, w)."""
    kept = []
    for item in real:
        if not any(np.array_equal(item, k) or (mirror and np.array_equal(item[:, ::-1], k)) for k in kept):
            kept.append(item)

    def between(a, b):
        turned = [b, b[:, ::-1]] if mirror else [b]
        return min(np.sqrt(((a - each) ** 2).sum()) for each in turned)

    own = [min(between(a, b) for j, b in enumerate(kept) if j != i) for i, a in enumerate(kept)]
    found = [[between(x, item) for item in kept] for x in samples]
    return np.mean([min(row) < own[int(np.argmin(row))] for row in found])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_metric_of_pictures_recomputed(processes):
    """By NumPy in float64 from the definitions, with the shares of so many processes: real pictures of which some come
    twice or mirrored, as many samples, one of the processes without a held-out item."""
    real = grey(20, side=8)
    real[15:18], real[18:] = real[:3], real[3:5, :, ::-1]
    fake, held = np.concatenate((real[:6], grey(12, seed=1), real[6:8, :, ::-1])), grey(2, seed=2)
    data, held_out = images(list(real), random_flip=True), images(list(held))
    scheduler = GaussianScheduler(prediction_type="v_prediction")

    def work(accelerator):
        options = {"num_samples": 20, "accelerator": accelerator, "batch_size": 3}
        e = evaluator(data, (1, 8, 8), held_out, **options)
        e._cache_file = lambda: None
        e.prepare()
        pipeline = Known(as_samples(fake), (1, 8, 8))
        pipeline.unet.forward = lambda x, t: type("Out", (), {"sample": 0.5 * x})
        return e(pipeline, 5, scheduler)

    x, y = (np.repeat(v.reshape(len(v), 1, -1) / 255, 3, 1).reshape(len(v), -1) for v in (real, fake))
    kernel = [(u @ v.T / 192 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
    kid = sum((k.sum() - np.trace(k)) / (20 * 19) for k in kernel[:2]) - 2 * kernel[2].mean()
    errors = []
    abar = scheduler.alphas_cumprod.double().numpy()
    for n, bucket in ((n, bucket) for n in range(2) for bucket in range(10)):
        draw = np.random.default_rng(derive_seed(0, Stream.EVALUATION, 1, n, bucket))
        t = draw.integers(100 * bucket, 100 * bucket + 100)
        noise = draw.standard_normal((1, 8, 8), dtype=np.float32).astype(np.float64)
        x0, a, b = held[n] / 127.5 - 1, abar[t] ** 0.5, (1 - abar[t]) ** 0.5
        error = ((0.5 * (a * x0 + b * noise) - (a * noise - b * x0)) ** 2).mean()
        errors.append((error, error * abar[t]))  # SNR / (SNR + 1) = abar
    plain, weighted = np.mean(errors, axis=0)
    expected = {
        "fid": gaussian_distance(x, y), "kid": kid, "memorization": copies(fake / 127.5, real / 127.5, True),
        "held_out_loss": plain, "held_out_weighted_loss": weighted,
    }  # fmt: skip
    for values in simulated(processes, work):
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_metric_of_sequences_recomputed(processes):
    """The same for sequences of two channels, as many real ones as samples."""
    rng = np.random.default_rng(0)
    real, fake = 3 + 2 * rng.normal(size=(40, 2, 6)), 3.5 + rng.normal(size=(40, 2, 6))
    real[30:35], fake[:10] = real[:5], real[:10]

    def work(accelerator):
        e = evaluator(SequenceDataset(real), (2, 6), num_samples=40, accelerator=accelerator, batch_size=7)
        e.prepare()
        return e(Known(fake, (2, 6)), 5)

    mean, deviation = real.mean(axis=(0, 2), keepdims=True), real.std(axis=(0, 2), keepdims=True, ddof=0)
    x, y = ((v - mean) / deviation * np.sqrt(239 / 240) for v in (real, fake))  # the deviation is over n - 1
    flat_x, flat_y = x.reshape(40, -1), y.reshape(40, -1)
    spectra = [np.log(np.abs(np.fft.fft(v)[..., :4]) ** 2 / 6 + 1e-8).reshape(40, -1) for v in (x, y)]
    w = unit_directions(12, 256, 0)
    sliced = np.sqrt(((np.sort(flat_x @ w.T, axis=0) - np.sort(flat_y @ w.T, axis=0)) ** 2).mean())

    def correlations(v):
        v = v - v.mean(axis=(0, 2), keepdims=True)
        rows = [[(v[:, c, k:] * v[:, c, : 6 - k]).mean() / (v[:, c] ** 2).mean() for k in (1, 2, 3)] for c in (0, 1)]
        return np.array(rows)

    expected = {
        "frechet": gaussian_distance(flat_x, flat_y), "spectral_frechet": gaussian_distance(*spectra),
        "sliced_wasserstein": sliced, "memorization": copies(y, x, False),
        "autocorrelation_error": np.sqrt(((correlations(x) - correlations(y)) ** 2).mean()),
    }  # fmt: skip
    for values in simulated(processes, work):
        # items of a data set are float32
        assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_copies_of_data_that_come_twice_are_copies():
    """Each item twice, once mirrored where training mirrors: all copies are found, and equal items count once."""
    once = grey(50)
    options = {"metrics": ["memorization"], "seed": 0}
    alone = measure(images(list(once)), (1, 8, 8), as_samples(once), **options)
    twice = measure(images([*once, *once]), (1, 8, 8), as_samples(once), **options)
    assert alone == twice and twice["memorization"] == 1
    rows = np.random.default_rng(0).normal(size=(50, 1, 8))
    both = SequenceDataset(np.concatenate((rows, rows)))
    assert measure(both, (1, 8), rows, metrics=["memorization"])["memorization"] == 1


def test_mirrored_copies_are_copies_where_training_mirrors():
    """By the data set's own random_flip or by the setting: also of pictures that are averaged to 32 pixels, of data
    that holds both, and of nearly symmetric pictures. Without, a mirrored picture is another one."""
    options = {"metrics": ["memorization"]}
    pictures = grey(40, side=50)
    mirrored = as_samples(pictures[:, :, ::-1])
    plain = measure(images(list(pictures), 50), (1, 50, 50), mirrored, **options)
    assert plain["memorization"] < 0.9
    by_data = measure(images(list(pictures), 50, random_flip=True), (1, 50, 50), mirrored, **options)
    by_setting = measure(images(list(pictures), 50), (1, 50, 50), mirrored, random_flip=True, **options)
    both = measure(images([*pictures, *pictures[:, :, ::-1]], 50), (1, 50, 50), mirrored, random_flip=True, **options)
    assert by_data == by_setting == both and both["memorization"] == 1
    symmetric = (pictures // 2 + pictures[:, :, ::-1] // 2) // 2 * 2 + (pictures & 1)
    same = measure(images(list(symmetric), 50, random_flip=True), (1, 50, 50), as_samples(symmetric), **options)
    assert same["memorization"] == 1


def test_the_rate_of_real_data_is_of_random_items():
    """Sorted so that half of the data, tight pairs far from each other, comes first: as many items as samples, 60 of
    400, drawn at random, have the rate of all up to 5 deviations; the first 60 have another."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 1, 8)) * 3
    pairs = (centres[:, None] + rng.normal(size=(100, 2, 1, 8)) * 0.01).reshape(200, 1, 8)
    rows = np.concatenate((pairs, rng.normal(size=(200, 1, 8)) * 3))
    samples = rng.normal(size=(60, 1, 8))
    every = measure(SequenceDataset(rows), (1, 8), np.repeat(samples, 7, 0), metrics=["memorization"])
    some, shuffled = (
        measure(SequenceDataset(r), (1, 8), samples, metrics=["memorization"])["memorization_real"]
        for r in (rows, rng.permutation(rows))
    )
    whole, deviation = every["memorization_real"], (0.25 / 60) ** 0.5
    assert abs(some - whole) < 5 * deviation and abs(shuffled - whole) < 5 * deviation
    first = too_close(torch.from_numpy(rows[:60, 0]), torch.from_numpy(rows[:, 0]), torch.arange(60)).double().mean()
    assert abs(first - whole) > 5 * deviation  # the test can fail


def test_memorization_needs_different_items():
    with pytest.raises(ValueError, match="at least 3 different real items, the data has 2"):
        measure(images([*grey(2)] * 4), (1, 8, 8), as_samples(grey(5)), metrics=["memorization"])


def test_sequences_are_compared_in_their_own_units():
    """Real sequences N(7, 3^2) in data units; samples N(7 + 3, 3^2): in units of the real deviation the mean is off by
    1 at each of 8 places. The Fréchet distance of the true distributions is 8; its bias and deviation at 4,000 samples
    of 8 dimensions are below 0.3."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(7, 3, (4000, 1, 8)), rng.normal(10, 3, (4000, 1, 8))
    values = measure(SequenceDataset(real), (1, 8), fake)
    assert values["frechet"] == pytest.approx(8, abs=0.3)
    # (w . delta)^2 averages to |delta|^2 / D = 1 over directions
    assert values["sliced_wasserstein"] == pytest.approx(1, abs=0.15)
    assert values["autocorrelation_error"] < 0.03
    same = measure(SequenceDataset(real), (1, 8), rng.normal(7, 3, (4000, 1, 8)))
    assert same["frechet"] < 0.03 and same["spectral_frechet"] < 0.03 and same["sliced_wasserstein"] < 0.1
    # two binomial shares; five deviations
    assert abs(same["memorization"] - same["memorization_real"]) < 5 * (2 * 0.25 / 4000) ** 0.5
    assert measure(SequenceDataset(real), (1, 8), real[:100], metrics=["memorization"])["memorization"] == 1


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_held_out_loss_of_a_model_that_says_nothing(kind):
    """A model that gives 0 has the mean square of the target, whatever the SNR: E|epsilon|^2 = 1 for noise, 0.25 for
    x0 of +-0.5, abar + 0.25 (1 - abar) for v. Weighted by SNR in units of x0 it is, for epsilon, the same. 80 items of
    64 numbers; 5 deviations of a mean of squared normals."""
    data = list(torch.randint(0, 2, (100, 1, 8, 8)) - 0.5)
    rest, held = hold_out(data, 80, 0)
    pipeline = Known([], (1, 8, 8))
    pipeline.unet.forward = lambda x, t: type("Out", (), {"sample": torch.zeros_like(x)})
    names = ["held_out_loss", "held_out_weighted_loss"]
    scheduler = GaussianScheduler(prediction_type=kind)
    values = evaluator(rest, (1, 8, 8), held, metrics=names)(pipeline, 5, scheduler)
    assert len(values) == 12
    abar = scheduler.alphas_cumprod.double().reshape(10, 100).mean(dim=1)
    expected = {"epsilon": torch.ones(10), "sample": torch.full((10,), 0.25), "v_prediction": abar + 0.25 * (1 - abar)}
    buckets = [value for name, value in values.items() if "_t" in name]
    # of v the timesteps are drawn too: within a bucket abar has a deviation of at most its range / sqrt(12)
    spread = scheduler.alphas_cumprod.double().reshape(10, 100)
    spread = (spread[:, 0] - spread[:, -1]).max().item() * 0.75 / 12**0.5 if kind == "v_prediction" else 0
    tolerance = 5 * np.sqrt(2 / (80 * 64)) + 5 * spread / np.sqrt(80)
    np.testing.assert_allclose(buckets, expected[kind], atol=tolerance)
    assert values["held_out_loss"] == pytest.approx(np.mean(buckets), rel=1e-12)
    if kind == "epsilon":
        assert values["held_out_weighted_loss"] == pytest.approx(values["held_out_loss"], rel=1e-12)


def test_the_weighted_held_out_loss_is_that_of_the_noise():
    """One and the same denoiser as epsilon, x0 and v: plain losses differ, those weighted by SNR are all the squared
    error of the noise."""
    rest, held = hold_out(digits(), 20, 0)
    names, values = ["held_out_loss", "held_out_weighted_loss"], []
    for kind in ("epsilon", "sample", "v_prediction"):
        pipeline, scheduler = Known([], (1, 8, 8)), GaussianScheduler(prediction_type=kind)

        def forward(x, t, scheduler=scheduler):
            return type("Out", (), {"sample": optimal_batch(scheduler, x, t)})

        pipeline.unet.forward = forward
        values.append(evaluator(rest, (1, 8, 8), held, metrics=names)(pipeline, 5, scheduler))
    plain, weighted = ([v[name] for v in values] for name in names)
    assert weighted == pytest.approx([weighted[0]] * 3, rel=1e-3) and len({round(p, 2) for p in plain}) == 3


def optimal_batch(scheduler, x, t):
    return torch.stack([optimal_prediction(scheduler, x[i], int(t[i]), 0.0, 0.5) for i in range(len(x))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["frechet"]}, "metrics of images are fid, kid.*got frechet"),
        ({"metrics": ["held_out_loss"]}, "holdout of at least 1"),
        ({"metrics": ["held_out_weighted_loss"]}, "held_out_weighted_loss needs.*holdout of at least 1"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"num_real": 1}, "num_real must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"on_bad_image": "ignore"}, "'stop' or 'skip', got 'ignore'"),
        ({"feature_network": "nothing.pt"}, "nothing.pt is no file"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        evaluator(digits(), (1, 8, 8), **options)


EVALUATED = {
    "eval_steps": 2, "eval_num_samples": 20, "feature_network": "pixels", "holdout": 40, "max_train_steps": 5,
    "learning_rate": 1e-2,
}  # fmt: skip


def test_in_training(tmp_path):
    """Every second step and the last; the best is kept, and the newest lies with the pipeline."""
    train(config(tmp_path / "run", eval_cache_dir=str(tmp_path / "cache"), **EVALUATED))
    found = [record for record in metrics(tmp_path / "run") if "eval/fid" in record]
    assert [record["step"] for record in found] == [2, 4, 5] and found[0]["eval/num_samples"] == 20
    best = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    lowest = min(found, key=lambda record: record["eval/fid"])
    assert best[0]["metric"] == "fid" and best[0]["value"] == lowest["eval/fid"] and best[0]["step"] == lowest["step"]
    newest = json.loads((tmp_path / "run" / "pipeline" / "evaluation.json").read_text())
    assert {r["step"] for r in newest} == {5} and {r["num_samples"] for r in newest} == {20}
    assert DDPMPipeline.from_pretrained(tmp_path / "run" / "best")(num_inference_steps=2).images
    with pytest.raises(ValueError, match="metric_for_best must be one of.*got 'frechet'"):
        train(config(tmp_path / "other", metric_for_best="frechet", **EVALUATED))
    with pytest.raises(ValueError, match="none.pt is no file"):
        train(config(tmp_path / "other", **{**EVALUATED, "feature_network": "none.pt"}))
    assert not (tmp_path / "other").exists()


def is_evaluation(name):
    """Whether an option is a part of --eval_steps."""
    return name.startswith("eval_") or name in ("feature_network", "metric_for_best")


def test_evaluation_changes_nothing_else(tmp_path):
    """The losses of a run are the same with and without it."""
    options = {**EVALUATED, "eval_cache_dir": str(tmp_path / "cache"), "dropout": 0.1}
    train(config(tmp_path / "with", **options))
    train(config(tmp_path / "without", **{k: v for k, v in options.items() if not is_evaluation(k)}))
    losses = [[r["loss"] for r in metrics(tmp_path / run) if "loss" in r] for run in ("with", "without")]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A trained pipeline of 32 samples of the ECG."""
    folder = tmp_path_factory.mktemp("evaluated")
    train(config(folder / "run", dataset_name="ecg", max_train_steps=3, sequence_length=32))
    return folder / "run" / "pipeline"


def test_the_program(sequences, capsys):
    command = ["--pipeline", str(sequences), "--data", "ecg", "--stride=2", "--num_samples=20"]
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "warning: below 10,000 samples" in out and "from 20 samples" in out and "from 20 real items" in out
    records = json.loads((sequences / "evaluation.json").read_text())
    assert {r["num_inference_steps"] for r in records} == {2, 4} and {r["data"] for r in records} == {"ecg"}
    with Image.open(sequences / "steps-versus-metric.png") as picture:
        assert picture.width > 1000
    assert evaluate_script.main([*command, "--sampler=DPMSolverMultistepScheduler", "--num_inference_steps=2"]) == 0
    both = json.loads((sequences / "evaluation.json").read_text())
    assert both[: len(records)] == records and both[-1]["scheduler"] == "DPMSolverMultistepScheduler"
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    assert len(json.loads((sequences / "evaluation.json").read_text())) == len(both)  # again is not more
    assert evaluate_script.main([*command, "--sampler=fast", "--num_inference_steps=2"]) == 0
    fast = json.loads((sequences / "evaluation.json").read_text())[-1]
    assert fast["scheduler"] == "DPMSolverMultistepScheduler at log_snr_timesteps"
    assert DDPMPipeline1D.from_pretrained(sequences)(num_inference_steps=2).sequences.shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_inference_steps=2000", "1 to 1000, got [2000]"),
        ("--sampler=Nothing", "got 'Nothing'"),
        ("--data=digits", "the data has (1, 8, 8)"),
        ("--pipeline=.", "the pipeline '.' cannot be loaded"),
        ("--metrics=fid", "metrics of sequences are"),
        ("--data=", "--data must be given"),
        ("--feature_network=pixels", "--feature_network applies to images; got 'pixels' for sequences"),
        ("--eval_cache_dir=x", "--eval_cache_dir applies to images"),
        ("--image_column=image", "image_column applies to tables of images"),
        ("--on_bad_image=skip", "on_bad_image applies to images"),
    ],
)
def test_what_the_program_refuses(option, message, sequences, capsys):
    name = option.split("=")[0]
    others = {"--pipeline": sequences, "--data": "ecg"}
    command = [f"{key}={value}" for key, value in others.items() if key != name]
    assert evaluate_script.main([*command, option]) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written(sequences, tmp_path, monkeypatch, capsys):
    """A folder that cannot be written is found before the work; a disk that is full by its end is told."""
    command = [f"--pipeline={sequences}", "--data=ecg", "--num_samples=4", "--num_inference_steps=2"]
    command += ["--metrics=memorization"]

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(evaluate_script, "write_text", fails)
        assert evaluate_script.main([*command, f"--output_dir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "memorization_real" in said.out and f"{tmp_path}/evaluation.json cannot be written" in said.err
    monkeypatch.setattr(evaluate_script.tempfile, "TemporaryFile", fails)
    assert evaluate_script.main([*command, f"--output_dir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "--output_dir" in said.err and "memorization" not in said.out
    (tmp_path / "file").touch()
    assert evaluate_script.main([*command, f"--output_dir={tmp_path}/file/out"]) == 2
    assert "Another folder: --output_dir" in capsys.readouterr().err


def test_the_program_knows_how_training_saw_pictures(tmp_path, capsys):
    """A bad first picture is skipped; random_flip is what the run recorded, unless the option says otherwise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, array in enumerate(grey(12)):
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    train(config(tmp_path / "run", dataset_name=None, train_data_dir=str(folder), resolution=[8], image_channels=1,
                 max_train_steps=1, random_flip=True))  # fmt: skip
    (folder / "00.png").write_bytes(b"damaged")
    command = [f"--pipeline={tmp_path}/run/pipeline", f"--data={folder}", "--num_samples=4", "--num_inference_steps=2"]
    command += ["--metrics=memorization"]
    assert evaluate_script.main(command) == 2 and "--on_bad_image skip" in capsys.readouterr().err
    command += ["--on_bad_image=skip", f"--output_dir={tmp_path}/out"]
    for option, mirrored in ((), True), (("--random_flip=false",), None), (("--random_flip=true",), True):
        (tmp_path / "out" / "evaluation.json").unlink(missing_ok=True)
        assert evaluate_script.main([*command, *option]) == 0
        records = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert {r.get("mirrored") for r in records} == {mirrored} and {r["num_left_out"] for r in records} == {1}


def test_results_of_something_else_are_left(sequences, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text("mine")
    assert evaluate_script.main([f"--pipeline={sequences}", "--data=ecg", f"--output_dir={tmp_path}"]) == 2
    assert "is left as it is" in capsys.readouterr().err and (tmp_path / "evaluation.json").read_text() == "mine"


def test_the_program_holds_out_what_the_run_did(tmp_path, capsys):
    """Count, seed and stride are those that the pipeline's training.json says, whatever the seed of the samples."""
    table = str(tmp_path / "long.csv")
    np.savetxt(table, np.random.default_rng(0).normal(size=(300, 3)), delimiter=",")
    options = {"dataset_name": None, "train_data_file": table, "sequence_length": 16, "stride": 2, "max_train_steps": 2}
    run = config(tmp_path / "run", holdout=10, seed=3, **options)
    train(run)
    pipeline = tmp_path / "run" / "pipeline"
    command = [f"--pipeline={pipeline}", f"--data={table}", "--seed=7", "--num_samples=8", "--num_inference_steps=2"]
    assert evaluate_script.main(command) == 0
    records = {r["metric"]: r for r in json.loads((pipeline / "evaluation.json").read_text())}
    feed = open_data(run)
    assert records["held_out_loss"]["num_held_out"] == 10 and records["frechet"]["num_real"] == feed.items == 118
    assert json.loads((pipeline / "training.json").read_text())["data"]["held_out"] == split_record(feed.held_out)
    capsys.readouterr()
    for option, message in (
        ("--holdout=11", "must be that of the pipeline's run, 10, or 0"),
        ("--stride=1", "is not as it was in training"),
        ("--stride=8", "is not as it was in training"),
    ):
        assert evaluate_script.main([*command, option]) == 2
        assert message in capsys.readouterr().err
    assert evaluate_script.main([*command, "--holdout=0", "--metrics=held_out_loss"]) == 0
    # another name is other data; so long a table has no sequences of its columns
    other = shutil.copy(table, tmp_path / "other.csv")
    command[1] = f"--data={other}"
    assert evaluate_script.main(command) == 2
    assert "to cut windows of 16 from a table whose rows are points in time: --stride" in capsys.readouterr().err
    assert evaluate_script.main([*command, "--stride=2", "--metrics=frechet"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_three_processes_measure_what_one_does(tmp_path, monkeypatch):
    """The same samples and data, in batches of other sizes, whose rounding is other: to 1e-4. One of the three has none
    of the two held-out items."""
    train(config(tmp_path / "run", max_train_steps=3, holdout=2, **{**SMALL, "num_samples": 4}))
    options = [
        "--pipeline=run/pipeline",
        "--data=digits",
        "--feature_network=pixels",
        "--num_samples=31",
        "--holdout=2",
    ]
    monkeypatch.chdir(tmp_path)
    assert evaluate_script.main([*options, "--output_dir=out1", "--eval_cache_dir=cache1"]) == 0
    done = run_program(
        "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", EVALUATE, *options, "--output_dir=out3",
        "--eval_cache_dir=cache3", cwd=tmp_path, ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("out1", "out3")]
    one, three = ({record["metric"]: record["value"] for record in each} for each in records)
    assert one.keys() == three.keys() and len(one) == 4 + 12
    np.testing.assert_allclose(list(one.values()), list(three.values()), rtol=1e-4)


@pytest.mark.parametrize("norm", ["minmax", "meanstd"])
def test_the_program_knows_the_data_of_the_run(norm, tmp_path, monkeypatch):
    """By name in any spelling, and by content; what the run said of reading it is taken over."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("waves.npy", rng.normal(size=(12, 1, 16)))
    options = {"dataset_name": None, "train_data_file": "waves.npy", "max_train_steps": 1, "sequence_norm": norm}
    train(config("run", holdout=4, **options))
    measure = ["--pipeline=run/pipeline", "--num_samples=4", "--metrics", "frechet", "held_out_loss"]

    def done(*arguments):
        (options,) = evaluate_script.Parser(evaluate_script.EvaluateConfig).parse_args_into_dataclasses(
            [*measure, "--num_inference_steps=2", *arguments]
        )
        return {record["metric"]: record for record in evaluate_script.evaluate(options)}

    for spelling in ("waves.npy", "./waves.npy", str(tmp_path / "waves.npy"), "run/../waves.npy"):
        assert done(f"--data={spelling}")["held_out_loss"]["num_held_out"] == 4
    train(config("all", **options))
    measure[0] = "--pipeline=all/pipeline"
    with pytest.raises(ValueError, match="held_out_loss needs items that training does not see"):
        done("--data=waves.npy")
    assert done("--data=waves.npy", "--holdout=0")["held_out_loss"]["num_held_out"] == 12
    measure[0] = "--pipeline=run/pipeline"
    np.save("waves.npy", rng.normal(size=(12, 1, 16)))
    with pytest.raises(ValueError, match="other content"):
        done("--data=waves.npy")
    measure[2:] = ["--num_samples=4", "--metrics", "frechet"]
    assert "frechet" in done("--data=waves.npy", "--holdout=0")
    (tmp_path / "photos").mkdir()
    for data, message in (("nope.npy", "no such file"), ("./nope", "no such file"), ("photos", "folder of images")):
        with pytest.raises(ValueError, match=message):
            done(f"--data={data}")
