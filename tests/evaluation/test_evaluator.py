"""Every metric computed again by other means, one answer on any number of processes, evaluation in training."""

import json

import numpy as np
import pytest
from conftest import simulated
from helpers import config, metrics
from measuring import Known, as_samples, evaluator, grey, images, measure, rng_rows

from ddpm_hf import DDPMPipeline, GaussianScheduler, train
from ddpm_hf.data.images import digits
from ddpm_hf.data.loading import Part, hold_out
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation import sequences
from ddpm_hf.evaluation.metrics import autocorrelation, unit_directions
from ddpm_hf.randomness import Stream, derive_seed


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
        e.pictures.cache_file = lambda: None
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


def test_the_real_autocorrelation_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(sequences, "autocorrelation", lambda x: calls.append(len(x)) or autocorrelation(x))
    e = evaluator(SequenceDataset(rng_rows(30)), (1, 8), num_samples=20, metrics=["autocorrelation_error"])
    e.prepare()
    for _ in range(3):
        e(Known(rng_rows(20), (1, 8)), 5)
    assert calls == [30, 20, 20, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["frechet"]}, "metrics of images are fid, kid.*got frechet"),
        ({"metrics": ["held_out_loss"]}, "holdout of at least 1"),
        ({"metrics": ["held_out_weighted_loss"]}, "held_out_weighted_loss needs.*holdout of at least 1"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"num_real": 1}, "num_real must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"feature_resolution": 0}, "feature_resolution must be at least 1, got 0"),
        ({"on_bad_image": "ignore"}, "'stop' or 'skip', got 'ignore'"),
        ({"feature_network": "nothing.pt"}, "there is no file nothing.pt"),
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
    with pytest.raises(ValueError, match="there is no file none.pt"):
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
