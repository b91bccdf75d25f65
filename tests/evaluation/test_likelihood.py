"""Bits per dimension: closed forms of models that are known, strata, one answer on any number of processes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_program, optimal_prediction, simulated
from helpers import config
from measuring import Known, evaluator, grey, images
from PIL import Image
from test_bound import DEVIATION, MEAN, entropy, gaussian_bound

from ddpm_hf import GaussianScheduler, train
from ddpm_hf.data.loading import hold_out
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.likelihood import stratum_edges
from ddpm_hf.evaluation.records import likelihood_settings

evaluate_script = load_program("evaluate")
NAME = ["bits_per_dim"]


class Gaussian(Known):
    """The optimal denoiser of x0 ~ N(0.3, 0.5^2) in the model's units; data = 4 x + 2."""

    config = SimpleNamespace(data_scale=[4.0], data_shift=[2.0])

    def __init__(self, scheduler, deviation=DEVIATION):
        super().__init__([], None)

        def forward(x, t):
            out = [optimal_prediction(scheduler, x[i].double(), int(t[i]), MEAN, deviation) for i in range(len(x))]
            return SimpleNamespace(sample=torch.stack(out).float())

        self.unet.forward = forward

    def _encode(self, sequences, name):
        return (sequences - 2) / 4


def drawn(count):
    """Sequences of independent numbers, as the optimal denoiser has them, in units of the data."""
    x = np.random.default_rng(0).normal(MEAN, DEVIATION, (count, 1, 32))
    return SequenceDataset(4 * x + 2)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("timesteps", [20, 25, 1000])
def test_gaussian_data_has_the_bound_of_the_closed_form(variance, timesteps):
    """Of 250 sequences of 32 numbers, within 5 standard errors; the density is in the units of the data. All terms, or
    20 of the 25: an unbiased estimate."""
    scheduler = GaussianScheduler(25, "linear", variance_type=variance, clip_sample=False)  # normal numbers go on
    data = drawn(250)
    options = {"metrics": NAME, "likelihood_items": 1000, "likelihood_timesteps": timesteps}
    e = evaluator(data, (1, 32), data, **options)
    values = e(Gaussian(scheduler), 5, scheduler)
    expected = gaussian_bound(scheduler) / math.log(2) + 2  # log2 of the scale
    error = values["bits_per_dim_standard_error"]
    assert abs(values["bits_per_dim"] - expected) < 5 * error < 0.9 and expected > entropy() / math.log(2) + 2
    assert len(e.likelihood.terms) == min(timesteps, 25) and e.likelihood.count == 250
    summed = sum((high - low) * term for low, high, term in e.likelihood.terms)
    assert summed + values["bits_per_dim_prior"] == pytest.approx(values["bits_per_dim"], rel=1e-12)
    assert e.likelihood.terms[0].value == values["bits_per_dim_decoder"]


def whole_images(dtype, low, high, **options):
    """300 images of 4 x 8 pixels of a normal distribution in the model's range, as whole numbers from low to high."""
    x = np.random.default_rng(0).normal(MEAN, 0.1, (300, 1, 4, 8))
    return ScientificImages(np.rint((x + 1) / 2 * (high - low) + low).astype(dtype), **options)


def discretized_bound(scheduler, deviation):
    """The bound in bits of the optimal denoiser, for bins that are narrow beside the decoder's deviation, per width.

    The decoder's variance is the posterior's at t = 1, where a density of a fixed variance has beta_0.
    """
    small, wide = (scheduler._tables[f"bound_log_{name}"][0].item() for name in ("small", "large"))
    noise = scheduler.config.trained_betas[0]
    error = deviation**2 * noise / ((1 - noise) * deviation**2 + noise)
    swap = 0.5 * (small + error * math.exp(-small) - wide - error * math.exp(-wide))
    return (gaussian_bound(scheduler, deviation=deviation) + swap) / math.log(2)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "options"),
    [
        (np.uint16, 0, 65535, {}),
        (np.int16, -(2**15), 2**15 - 1, {"norm": "bits"}),
        (np.uint16, 0, 4095, {"value_range": (0, 4095)}),
    ],
)
def test_16_bit_images_have_the_bound_of_the_closed_form(dtype, low, high, options):
    """A bin has the density times its width, 1 in the units of the data, up to its share of the decoder's deviation."""
    data = whole_images(dtype, low, high, **options)
    scheduler = GaussianScheduler(25, "linear", clip_sample=False)
    e = evaluator(data, (1, 4, 8), data, metrics=NAME, likelihood_items=300, likelihood_timesteps=25)
    assert e.likelihood.levels == (high - low + 1,)
    pipeline = Gaussian(scheduler, 0.1)
    values = e(pipeline, 5, scheduler)
    expected = discretized_bound(scheduler, 0.1) + math.log2((high - low) / 2)
    assert abs(values["bits_per_dim"] - expected) < 5 * values["bits_per_dim_standard_error"] < 0.3
    assert describe_decoder(e) == f"{high - low + 1:,} levels"


@pytest.mark.parametrize(("dtype", "norm"), [(np.float32, "meanstd"), (np.float64, None), (np.int16, "meanstd")])
def test_other_images_have_a_density_in_the_units_of_the_data(dtype, norm):
    """Data that is scaled by 2 ** 6 has 6 bits more a dimension; so have whole numbers whose range has no ends."""
    x = np.random.default_rng(0).normal(0, 500, (40, 1, 4, 8)).astype(dtype)
    scheduler, found = GaussianScheduler(25, "linear", clip_sample=False), []
    for factor in (1, 2**6):
        data = ScientificImages(x.astype(np.int32 if dtype is np.int16 else dtype) * factor, norm=norm)
        e = evaluator(data, (1, 4, 8), data, metrics=NAME, likelihood_timesteps=25)
        pipeline = Gaussian(scheduler)
        pipeline.config = SimpleNamespace(data_scale=list(data.scaling.scale))
        found.append(e(pipeline, 5, scheduler)["bits_per_dim"])
        assert e.likelihood.levels is None and describe_decoder(e) == "density in the units of the data"
    assert found[1] == pytest.approx(found[0] + 6, abs=1e-6)


def describe_decoder(e):
    return likelihood_settings(e)["decoder"]


def test_images_that_are_resized_have_no_levels():
    """They are refused before samples are drawn, which takes long: this pipeline can draw none."""
    data = ScientificImages(np.random.default_rng(0).integers(0, 60000, (8, 1, 6, 6)).astype(np.uint16), (4, 4))
    e = evaluator(data, (1, 4, 4), data, metrics=["memorization", *NAME], likelihood_timesteps=5)
    with pytest.raises(ValueError, match="needs whole numbers in the range.*as resized images do, or outside"):
        e(Gaussian(GaussianScheduler(10)), 5, GaussianScheduler(10))


def test_a_constant_channel_is_left_out():
    scheduler = GaussianScheduler(25, "linear")
    rows = np.random.default_rng(0).normal(2, 2, (8, 1, 32))
    found = []
    for data in (rows, np.concatenate((rows, np.full_like(rows, 7.0)), axis=1)):
        channels = data.shape[1]
        pipeline = Gaussian(scheduler)
        pipeline.config = SimpleNamespace(data_scale=[4.0, 0.0][:channels])
        pipeline._encode = lambda x, name: (x - 2) / 4 * (torch.arange(x.shape[1]) == 0).reshape(-1, 1)
        data = SequenceDataset(data)
        e = evaluator(data, (channels, 32), data, metrics=NAME, likelihood_timesteps=25)
        # the same noise for the channel that changes
        e.likelihood._draws = lambda chosen, stratum, low, high, x0: (
            torch.full((len(x0),), low),
            torch.randn(len(x0), 1, 32, generator=torch.Generator().manual_seed(stratum)).expand_as(x0),
        )
        found.append(e(pipeline, 5, scheduler))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
@pytest.mark.parametrize("timesteps", [2, 3, 11, 100, 2000])
def test_strata_cover_each_timestep_once(steps, timesteps):
    edges = stratum_edges(steps, timesteps)
    assert edges[0] == 0 and edges[-1] == steps and (np.diff(edges) > 0).all()
    assert len(edges) == min(steps, timesteps) + 1 and (steps == 1 or edges[1] == 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_and_batch_size_gives_one_answer(processes):
    """For fewer items than processes, too; more items keep the draws of those that there were."""
    data = images(list(grey(12)))
    scheduler = GaussianScheduler(20)

    def values(accelerator, size=50):
        found = []
        for held, count in ((1, 256), (2, 1), (5, 3), (5, 256)):
            rest, held_out = hold_out(data, held, 0)
            options = {"accelerator": accelerator, "metrics": NAME, "likelihood_timesteps": 6, "batch_size": size}
            e = evaluator(rest, (1, 8, 8), held_out, likelihood_items=count, **options)
            found += e(Known([], (1, 8, 8)), 5, scheduler).values()
        return found

    expected = values(None)
    assert values(None, 2) == pytest.approx(expected, rel=1e-6)
    for found in simulated(processes, values):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_images_are_coded_by_their_bins():
    """A model that knows the image needs the bits of the decoder alone. One that says nothing has, at t = 0, the
    likelihood of its bins around 0."""
    data = images(list(grey(6)))
    scheduler = GaussianScheduler(10, prediction_type="sample")
    x0 = torch.stack([data.load(i, None) for i in range(6)])
    pipeline = Known([], (1, 8, 8))
    e = evaluator(data, (1, 8, 8), metrics=NAME, likelihood_timesteps=10)
    assert e.likelihood.seen
    pipeline.unet.forward = lambda x, t: SimpleNamespace(sample=x0.to(x))
    knows = e(pipeline, 5, scheduler)
    assert all(term.value == 0 for term in e.likelihood.terms[1:])
    decoder = scheduler.bound_term(x0.double(), x0.double(), x0.double(), 0).mean().item() / math.log(2)
    assert knows["bits_per_dim_decoder"] == pytest.approx(decoder, rel=1e-6)
    e.likelihood._check_levels = None  # the items are read for their levels once, not at every evaluation
    pipeline.unet.forward = lambda x, t: SimpleNamespace(sample=torch.zeros_like(x))
    assert e(pipeline, 5, scheduler)["bits_per_dim"] > knows["bits_per_dim"] + 1


def test_bad_input(tmp_path):
    floats = list(torch.rand(6, 1, 8, 8))
    e = evaluator(floats, (1, 8, 8), metrics=NAME)
    with pytest.raises(ValueError, match="needs 8-bit levels.*between two levels"):
        e(Known([], (1, 8, 8)), 5, GaussianScheduler(10))
    with pytest.raises(ValueError, match="needs the bound of a GaussianScheduler .*got DDIMScheduler"):
        from diffusers import DDIMScheduler

        e(Known([], (1, 8, 8)), 5, DDIMScheduler())
    with pytest.raises(ValueError, match="likelihood_timesteps must be at least 2, got 1"):
        evaluator(floats, (1, 8, 8), metrics=NAME, likelihood_timesteps=1)
    assert "bits_per_dim" not in evaluator(floats, (1, 8, 8)).metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a learned variance, measured while it trains."""
    folder = tmp_path_factory.mktemp("likelihood") / "run"
    measured = {"eval_steps": 3, "eval_metrics": NAME, "eval_likelihood_items": 8, "eval_likelihood_timesteps": 4}
    options = {"max_train_steps": 3, "holdout": 20, "ddpm_num_steps": 30, "learned_variance": True}
    train(config(folder, **options, **measured))
    return folder


def test_training_and_the_program_measure_it(run, capsys):
    """Training measures it on held-out items, with the best pipeline by it; the program gives the same number, a plot
    and records that the card has."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if "eval/bits_per_dim" in line)
    assert (run / "best" / "model_index.json").exists()
    arguments = ["--pipeline", str(run / "pipeline"), "--data", "digits", "--metrics", "bits_per_dim"]
    short = ["--likelihood_items=8", "--likelihood_timesteps=4"]
    assert evaluate_script.main([*arguments, *short]) == 0
    out = capsys.readouterr().out
    assert "from 8 held-out items" in out and "samples of" not in out
    records = json.loads((run / "pipeline" / "evaluation.json").read_text())
    measured = {r["metric"]: r for r in records}
    assert measured["bits_per_dim"]["value"] == pytest.approx(trained["eval/bits_per_dim"], rel=1e-6)
    assert measured["bits_per_dim"]["num_held_out"] == 8 and measured["bits_per_dim"]["num_timesteps"] == 4
    with Image.open(run / "pipeline" / "bits-per-dim.png") as picture:
        assert picture.width > 500
    assert "bits_per_dim (8 held-out items, 8-bit levels)" in (run / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--likelihood_items=8"], "--likelihood_items applies to the metric bits_per_dim; got 8 without it"),
        (["--metrics", "bits_per_dim", "--likelihood_items=0"], "likelihood_items must be at least 1, got 0"),
        (["--task=impute", "--likelihood_timesteps=5"], "--likelihood_timesteps applies to evaluations of samples"),
    ],
)
def test_the_program_refuses(run, capsys, options, message):
    assert evaluate_script.main(["--pipeline", str(run / "pipeline"), "--data", "digits", *options]) == 2
    assert message in capsys.readouterr().err
