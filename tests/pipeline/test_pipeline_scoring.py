"""Reconstructions and scores: closed forms on Gaussian data, draws that do not depend on batches, calls, bad input."""

import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import exact_abar
from diffusers import ModelMixin  # loading looks for it among this module's names
from diffusers.utils import BaseOutput
from measuring import evaluator, grey
from measuring import images as image_data
from test_pipeline import images, seeds, sequences
from test_pipeline_guidance import NAMES, mixture

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.data.scaling import levels_of
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.pipeline import scoring
from ddpm_hf.pipeline.outputs import ScoreOutput
from ddpm_hf.pipeline.scoring import COMPLETION, BoundTimesteps, smoothed

MEAN, STD = 0.2, 0.4
TOTAL = 30  # timesteps


class Exact(ModelMixin, diffusers.ConfigMixin):
    """The exact epsilon of x0 ~ N(MEAN, STD^2), at any timesteps."""

    config_name, ndim = "config.json", 1

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=1, in_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.abar, self.calls = exact_abar(scheduler()), []

    def forward(self, sample, timestep):
        self.calls.append(len(sample))
        abar = self.abar[timestep.reshape(-1)].reshape(-1, 1, 1)
        total = STD**2 * abar + 1 - abar
        return BaseOutput(sample=(1 - abar).sqrt() / total * (sample - abar.sqrt() * MEAN))


def scheduler():
    return GaussianScheduler(TOTAL, prediction_type="epsilon", clip_sample=False)


def exact(scale=1.0):
    pipe = DDPMPipeline1D(Exact(), scheduler(), data_scale=[scale])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_reconstructions_have_the_closed_form_mean_and_deviation():
    """DDPM steps from x_t draw from the posterior; units are the data's, and draws those of each item."""
    pipe = exact(scale=10.0)
    x = np.array([-3.0, 8.0]).reshape(2, 1, 1)
    found = pipe.reconstruct(x, 0.5, num_samples=4000, generator=seeds(0)[0], batch_size=1000)
    abar = exact_abar(pipe.scheduler)
    # the chain's steps are linear: mean and variance by the recursion of DDPM's equation 7, from x_t of the item
    t = pipe.scheduler.timesteps[15].item()
    mean, variance = abar[t].sqrt() * torch.tensor([-0.3, 0.8], dtype=torch.float64), 1 - abar[t]
    for now in range(t, -1, -1):
        before = abar[now - 1] if now else torch.tensor(1.0, dtype=torch.float64)
        beta, total = 1 - abar[now] / before, STD**2 * abar[now] + 1 - abar[now]
        gain = STD**2 * abar[now].sqrt() / total
        of_x0, of_x = before.sqrt() * beta / (1 - abar[now]), (1 - beta).sqrt() * (1 - before) / (1 - abar[now])
        slope = of_x0 * gain + of_x
        mean = slope * mean + of_x0 * (MEAN - gain * abar[now].sqrt() * MEAN)
        variance = slope**2 * variance + (beta * (1 - before) / (1 - abar[now]) if now else 0)
    deviation = 10 * variance.sqrt().item()
    np.testing.assert_allclose(found.mean.ravel(), 10 * mean, atol=5 * deviation / 4000**0.5)
    np.testing.assert_allclose(found.std.ravel(), deviation, rtol=5 / 8000**0.5)
    assert found.samples.shape == (2, 4000, 1, 1)


def test_reconstructions_of_an_item_do_not_depend_on_batches():
    pipe = images(1)
    x = np.random.default_rng(0).random((3, 8, 8, 1), dtype=np.float32)
    pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config, sampler="ddpm")
    whole, parts, alone = (
        pipe.reconstruct(given, num_samples=2, num_inference_steps=8, generator=generators, batch_size=size)
        for given, generators, size in ((x, seeds(1, 2, 3), 64), (x, seeds(1, 2, 3), 4), (x[2:], seeds(3), 64))
    )
    np.testing.assert_allclose(whole.samples, parts.samples, atol=1e-5)
    np.testing.assert_allclose(whole.samples[2:], alone.samples, atol=1e-5)
    np.testing.assert_allclose(whole.mean, whole.samples.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(whole.std, whole.samples.std(axis=1, ddof=1), atol=1e-6)
    assert whole.samples.shape == (3, 2, 8, 8, 1) and whole.mean.shape == x.shape
    same = pipe.reconstruct(x, 0, output_type="pt")
    assert (same.mean.movedim(1, -1).numpy() == x).all() and (same.std == 0).all()


@pytest.mark.parametrize("number", [TOTAL, 8])
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), (1.5, 0.1)])
def test_the_denoising_score_has_the_bound_as_its_expectation(number, mean, std):
    """For data N(mean, std^2) the error of x0 is linear in x0 and the noise; its square has a closed form."""
    pipe, n = exact(), 2000
    x = mean + std * torch.randn(n, 1, 1, dtype=torch.float64, generator=seeds(5)[0])
    result = pipe.score(x, "denoising", num_timesteps=number, generator=seeds(6)[0], batch_size=8000)
    abar = exact_abar(pipe.scheduler)
    gain = STD**2 * abar.sqrt() / (STD**2 * abar + 1 - abar)
    # x0 - estimate = (1 - gain sqrt(abar)) (x0 - MEAN) - gain sqrt(1 - abar) noise
    square = (1 - gain * abar.sqrt()) ** 2 * ((mean - MEAN) ** 2 + std**2) + gain**2 * (1 - abar)
    before = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    terms = 0.5 * (before / (1 - before) - abar / (1 - abar)) * square  # half the fall of the SNR
    beta = 1 - abar[0]
    terms[0] = 0.5 * (math.log(2 * math.pi) + beta.log() + square[0] / beta)
    prior = 0.5 * (abar[-1] * (mean**2 + std**2 - 1) - torch.log1p(-abar[-1]))
    expected = (terms.sum() + prior).item()
    error = result.scores.std() / n**0.5
    assert abs(result.scores.mean() - expected) < 5 * error and error < 0.1 * abs(expected)
    np.testing.assert_allclose(result.maps.ravel(), result.scores, rtol=1e-5)


def small(kind):
    """A pipeline with random weights, its data as the evaluator has it, and the items as a user gives them."""
    torch.manual_seed(0)
    options = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 1, "attn_dim_head": 4, "sample_size": 8}
    schedule = {"variance_type": "learned_range"} if kind == "learned variance" else {}
    own = GaussianScheduler(12, **schedule)
    if kind == "sequences":
        x = np.random.default_rng(0).normal(3, 2, (4, 2, 8))
        x[:, 1] = 7.0  # a channel that never changes does not count
        data = SequenceDataset(x)
        pipe = DDPMPipeline1D(
            UNet1D(in_channels=2, **options), own, data_shift=list(data.scaling.shift),
            data_scale=list(data.scaling.scale),
        )  # fmt: skip
        return pipe, data, x
    if kind == "16 bits":
        x = np.random.default_rng(0).integers(0, 2**16, (4, 2, 8, 8)).astype(np.uint16)
        x[:, 1] //= 16
        data = ScientificImages(x, norm="minmax")
        units, levels = data.scaling.to_json(), levels_of(data)
        assert levels[0] > 60_000 and 4000 < levels[1] <= 4096
        pipe = DDPMPipeline(UNet2D(in_channels=2, **options), own, **units, data_levels=levels)
        return pipe, data, x.transpose(0, 2, 3, 1)
    data = image_data(list(grey(4)))
    pipe = DDPMPipeline(UNet2D(in_channels=1, out_channels=2 if schedule else 1, **options), own)
    return pipe, data, np.stack([(data.load(i) / 2 + 0.5).movedim(0, -1).numpy() for i in range(4)])


@pytest.mark.parametrize("number", [12, 5])
@pytest.mark.parametrize("kind", ["images", "learned variance", "sequences", "16 bits"])
def test_the_map_sums_to_the_bound_of_the_evaluator(kind, number, monkeypatch):
    """For the same timesteps, weights and noise, to the rounding of float64; a call of the model is of one item."""
    pipe, data, x = small(kind)
    pipe.set_progress_bar_config(disable=True)
    shape = (pipe.unet.config.in_channels, *pipe._size())
    e = evaluator(data, shape, data, metrics=["bits_per_dim"], likelihood_timesteps=number, batch_size=1)
    draws, seen = e.likelihood._draws, []

    def kept(chosen, stratum, low, high, x0):
        t, noise = draws(chosen, stratum, low, high, x0)
        seen.append((int(t), float(high - low), noise))
        return t, noise

    monkeypatch.setattr(e.likelihood, "_draws", kept)
    bound = e(pipe, 5, pipe.scheduler)["bits_per_dim"]
    assert len(seen) == 4 * number and (number == 12 or max(weight for _, weight, _ in seen) > 1)
    again = iter(seen)
    noises = []

    def drawn(self, place, generator):
        t, weight, noise = next(again)
        noises.append(noise)
        return t, weight

    monkeypatch.setattr(BoundTimesteps, "draw", drawn)
    monkeypatch.setattr(scoring, "randn_tensor", lambda *args, **named: noises.pop())
    found = pipe.score(x, "denoising", num_timesteps=number, batch_size=1)
    counted = [scale > 0 for scale in pipe.config.get("data_scale") or [1.0]]
    units = [math.log2(s) for s in pipe.config.get("data_scale") or [1.0] if s > 0]  # of a density
    units = 0 if pipe.config.get("data_levels") else np.mean(units)
    assert abs(found.scores.mean() / math.log(2) + units - bound) < 1e-12 * abs(bound)
    maps = found.maps if kind == "sequences" else found.maps.transpose(0, 3, 1, 2)
    # the maps are returned in float32
    np.testing.assert_allclose(maps[:, counted].mean((1, *range(2, maps.ndim))), found.scores, rtol=1e-5)


def test_the_reconstruction_score_has_its_closed_form():
    """Five DDIM steps are linear in x0 and the noise: the squared error's mean follows from both coefficients."""
    pipe, n = exact(), 5000
    x = np.full((n, 1, 1), 1.1)
    found = pipe.score(x, strengths=(0.2, 0.6), generator=seeds(1)[0], batch_size=10_000).scores
    abar, expected = exact_abar(pipe.scheduler), 0.0
    for start in (6, 18):  # 0.2 and 0.6 of 30
        places = [math.ceil(start * left / 5) - 1 for left in (5, 4, 3, 2, 1)]
        item, noise, constant = abar[places[0]].sqrt(), (1 - abar[places[0]]).sqrt(), 0.0
        for place, following in zip(places, [*places[1:], None]):
            gain = STD**2 * abar[place].sqrt() / (STD**2 * abar[place] + 1 - abar[place])
            own = MEAN - gain * abar[place].sqrt() * MEAN
            if following is None:
                slope, own = gain, own
            else:
                ratio = ((1 - abar[following]) / (1 - abar[place])).sqrt()
                share = abar[following].sqrt() - ratio * abar[place].sqrt()
                slope, own = share * gain + ratio, share * own
            item, noise, constant = slope * item, slope * noise, slope * constant + own
        expected += ((item * 1.1 + constant - 1.1) ** 2 + noise**2).item() / 2
    assert abs(found.mean() - expected) < 5 * found.std() / n**0.5


def test_the_noise_score_has_its_closed_form():
    """The error of the noise is that of x0, linear in x0 and the noise, times the SNR; timesteps are parts' middles."""
    pipe, n = exact(), 5000
    found = pipe.score(np.full((n, 1, 1), 1.1), "noise", num_timesteps=3, generator=seeds(1)[0], batch_size=10_000)
    abar = exact_abar(pipe.scheduler)[[5, 15, 25]]  # of 30
    gain = STD**2 * abar.sqrt() / (STD**2 * abar + 1 - abar)
    square = (1 - gain * abar.sqrt()) ** 2 * (1.1 - MEAN) ** 2 + gain**2 * (1 - abar)
    expected = (abar / (1 - abar) * square).mean().item()
    assert abs(found.scores.mean() - expected) < 5 * found.scores.std() / n**0.5 < 0.1 * expected


def test_the_timesteps_of_the_bound():
    """Weights make the sum unbiased: the mean of weight times f is the sum of f, and t = 0 is always there."""
    abar = exact_abar(GaussianScheduler())
    timesteps, generator = BoundTimesteps(abar, 20), seeds(0)[0]
    f = torch.arange(1000, dtype=torch.float64).sqrt()
    draws = [[timesteps.draw(place, generator) for place in range(20)] for _ in range(400)]
    sums = np.array([sum(weight * f[t].item() for t, weight in each) for each in draws])
    assert abs(sums.mean() - f.sum().item()) < 5 * sums.std() / 20
    assert all(each[0] == (0, 1.0) for each in draws)
    assert BoundTimesteps(abar, 2000).number == 1000


@pytest.mark.parametrize("method", ["reconstruction", "denoising", "noise"])
def test_calls_batches_and_generators(method):
    """20 calls an item in full batches, the same for any size of a batch, one item alone, and pieces of a batch."""
    pipe = images(1)
    sizes, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda x, t, *more, **named: (sizes.append(len(x)), forward(x, t, *more, **named))[1]
    x = np.random.default_rng(0).random((5, 8, 8, 1), dtype=np.float32)
    whole = pipe.score(x, method, generator=seeds(*range(5)))
    assert sum(sizes) == 5 * 20 and whole.scores.shape == (5,) and whole.maps.shape == x.shape
    assert len(sizes) == {"reconstruction": 5}.get(method, 2)
    for options in ({"batch_size": 3}, {"max_batch_size": 2}):
        pipe.max_batch_size = options.pop("max_batch_size", None)
        again = pipe.score(x, method, generator=seeds(*range(5)), **options)
        np.testing.assert_allclose(again.maps, whole.maps, rtol=1e-3, atol=1e-4)
    alone = pipe.score(x[3:4], method, generator=seeds(3))
    np.testing.assert_allclose(alone.scores, whole.scores[3:4], rtol=1e-4)
    one = [pipe.score(x, method, generator=seeds(9)[0]).scores for _ in range(2)]
    np.testing.assert_array_equal(*one)


def test_smoothing():
    maps = torch.zeros(1, 1, 21, 21)
    maps[0, 0, 10, 10] = 1
    wide = smoothed(maps, 1.5)[0, 0]
    squares = (torch.arange(21) - 10) ** 2
    assert abs(wide.sum() - 1) < 1e-5 and abs((wide.sum(0) * squares).sum() - 1.5**2) < 0.02
    torch.testing.assert_close(wide, wide.T)
    assert torch.equal(smoothed(maps, 0.0), maps)
    constant = torch.full((2, 3, 5), 0.7)
    torch.testing.assert_close(smoothed(constant, 9.0), constant)
    pipe = images(1)
    x = np.random.default_rng(0).random((1, 8, 8, 1), dtype=np.float32)
    plain, smooth = (pipe.score(x, smoothing=sigma, generator=seeds(0)) for sigma in (0.0, 2.0))
    assert plain.scores == smooth.scores and smooth.maps.std() < plain.maps.std()
    with torch.autocast("cpu", torch.bfloat16):
        assert pipe.score(x, smoothing=2.0, generator=seeds(0)).maps.dtype == np.float32


def test_percentiles_are_saved(tmp_path):
    pipe = images(1)
    x = np.random.default_rng(0).random((60, 8, 8, 1), dtype=np.float32)
    normal = pipe.score(x, "denoising", num_timesteps=2, generator=seeds(0)[0])
    assert normal.percentiles is None
    assert pipe.calibrate_score(normal, normal) is pipe
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded.score(x, "denoising", num_timesteps=2, generator=seeds(0)[0])
    ranks = (normal.scores[:, None] > normal.scores).mean(axis=1) * 100
    np.testing.assert_allclose(again.percentiles, ranks, atol=2.5)
    with pytest.warns(UserWarning, match="no percentiles: the calibration was with"):
        assert loaded.score(x[:1], "denoising", num_timesteps=3).percentiles is None
    assert loaded.score(x[:1]).percentiles is None
    with pytest.raises(ValueError, match="results must have the same options"):
        pipe.calibrate_score(normal, pipe.score(x[:1]))
    with pytest.raises(ValueError, match="needs one or more results"):
        pipe.calibrate_score(normal.scores)
    with pytest.raises(ValueError, match="num_quantiles must be"):
        pipe.calibrate_score(normal, num_quantiles=1)


def test_missing_values_are_completed_on_request(monkeypatch):
    """The completed values do not count, and the others are scored as they are."""
    monkeypatch.setitem(COMPLETION, "num_inference_steps", 3)
    pipe = sequences()
    x = pipe(2).sequences
    x[1, 0, 3:6] = np.nan
    with pytest.raises(ValueError, match="x has NaN in item 1: complete=True"):
        pipe.score(x)
    found = pipe.score(x, complete=True, generator=seeds(1, 2), strengths=(0.2,))
    assert found.maps.shape == x.shape and np.isfinite(found.maps).all()
    known = ~np.isnan(x)
    for item in range(2):
        np.testing.assert_allclose(found.scores[item], found.maps[item][known[item]].mean(), rtol=1e-4)
    x[0] = np.nan
    with pytest.raises(ValueError, match="something known in each item"):
        pipe.score(x, complete=True)


def test_classes_and_stock_schedulers():
    pipe = mixture(NAMES)
    x = torch.tensor([-0.6, 0.1, 0.7], dtype=torch.float64).reshape(3, 1, 1).expand(3, 1, 2).contiguous()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match="does not know"):
        pipe.score(x, class_labels="four")
    with pytest.raises(ValueError, match="one per sample: batch_size is 3, got 4 labels"):
        pipe.reconstruct(x, class_labels=[0, 1, 2, 1])
    named = DDPMPipeline(UNet2D(8, 1, dim=8, dim_mults=(1, 2), num_class_embeds=2), GaussianScheduler(20))
    x = torch.rand(2, 1, 8, 8)
    labelled = [named.score(x, class_labels=each, generator=seeds(0)[0]).scores for each in ([0, 1], (0, 1))]
    np.testing.assert_array_equal(*labelled)
    pipe = images(1).use_fast_sampler(4)
    pipe.score(x, generator=seeds(0)[0])
    own = images(1)
    pipe.unet.load_state_dict(own.unet.state_dict())
    np.testing.assert_allclose(*(each.score(x, generator=seeds(0)[0]).scores for each in (pipe, own)), rtol=1e-4)
    assert isinstance(pipe.score(x), ScoreOutput)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "distance"}, "method must be one of reconstruction, denoising, noise; got 'distance'"),
        ({"strengths": (0.2, 1.2)}, "strengths must be numbers above 0 and at most 1"),
        ({"strengths": ()}, "strengths must be numbers"),
        ({"num_timesteps": 1}, "num_timesteps must be a whole number of at least 2, got 1"),
        ({"smoothing": -1.0}, "smoothing must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"x": torch.rand(2, 3, 8, 8)}, "1 channels"),
        ({"x": torch.rand(2, 1, 8, 8) * 255}, r"must lie in \[0, 1\]"),
        ({"generator": seeds(1, 2, 3)}, "one per item: 2 items, got 3"),
        ({"generator": 3}, "generator must be a torch.Generator"),
    ],
)
def test_bad_calls(options, message):
    pipe = images(1)
    pipe.unet.forward = None  # no call of the model
    with pytest.raises(ValueError, match=message):
        pipe.score(**{"x": torch.rand(2, 1, 8, 8), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "strength must be a number from 0"),
        ({"num_samples": 0}, "num_samples and batch_size must be whole numbers"),
        ({"output_type": "pil"}, "output_type must be one of np, pt"),
        ({"x": torch.full((1, 1, 8, 8), math.nan)}, "NaN or infinity is in item 0"),
    ],
)
def test_bad_reconstructions(options, message):
    pipe = images(1)
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe.reconstruct(**{"x": torch.rand(2, 1, 8, 8), **options})


def test_scores_that_are_not_finite():
    pipe = exact()
    pipe.unet.forward = lambda x, t: BaseOutput(sample=x * math.nan)
    with pytest.raises(FloatingPointError, match="score of items 0, 1 is NaN or infinity. The weights of the model"):
        pipe.score(np.zeros((2, 1, 1)))


def test_arrays_of_wide_unsigned_numbers():
    pipe, levels = images(1), np.indices((8, 8)).sum(0).reshape(1, 8, 8, 1) % 2
    wide, plain = (pipe.score(levels.astype(kind), generator=seeds(0)) for kind in (np.uint16, np.float32))
    np.testing.assert_array_equal(wide.maps, plain.maps)
    with pytest.raises(ValueError, match="must lie in"):
        pipe.score(levels.astype(np.uint16) * 65535)


def test_arrays_of_any_byte_order_and_strides():
    """Arrays that torch does not take as they are: big-endian ones of scientific files, and reversed views."""
    x = np.random.default_rng(0).random((2, 1, 1), dtype=np.float32)
    pipe, found = exact(), []
    for each in (x, x.astype(">f4"), np.ascontiguousarray(x[::-1])[::-1]):
        found.append(pipe.score(each, generator=seeds(0)[0]).scores)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_bound_needs_our_scheduler():
    pipe = images(1).use_fast_sampler(4)
    pipe.unet.forward = None
    with pytest.raises(ValueError, match="'denoising' needs the bound of GaussianScheduler.* got DPMSolver"):
        pipe.score(torch.rand(1, 1, 8, 8), "denoising")
