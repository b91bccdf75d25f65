"""Completion of what is partly known: RePaint, and models that are given the known part.

On Gaussian data RePaint is linear: mean and covariance of its samples follow from a recursion that is computed here
beside it, and so does how far they are from the exact conditional distribution.
"""

import math
import re

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, exact_abar
from diffusers import ModelMixin  # loading looks for it among this module's names
from PIL import Image
from tape import Tape
from test_pipeline import images, seeds, sequences
from test_pipeline_device import DeviceWork, Model, pipeline
from test_pipeline_guidance import NAMES, mixture

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline import GraphedModel, Repaint, resampling_plan, step_options

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}
# Data x ~ N(MEAN, COVARIANCE) of four positions, of which the first and the last are known.
PLACES = torch.arange(4, dtype=torch.float64)
MEAN = torch.tensor([0.1, 0.2, -0.1, 0.0], dtype=torch.float64)
COVARIANCE = 0.09 * 0.8 ** (PLACES[:, None] - PLACES).abs()
UNKNOWN = torch.tensor([False, True, True, False])
KNOWN = torch.tensor([0.5, math.nan, math.nan, -0.2], dtype=torch.float64)


def conditional(values, unknown):
    """Mean and covariance of the unknown positions, given the values of the others."""
    gain = COVARIANCE[unknown][:, ~unknown] @ torch.linalg.inv(COVARIANCE[~unknown][:, ~unknown])
    mean = MEAN[unknown] + (values[..., ~unknown] - MEAN[~unknown]) @ gain.T
    return mean, COVARIANCE[unknown][:, unknown] - gain @ COVARIANCE[~unknown][:, unknown]


class Series(ModelMixin, diffusers.ConfigMixin):
    """The exact epsilon of x0 ~ N(MEAN, COVARIANCE), or given the known values if `condition_channels` is 2."""

    config_name, ndim = "config.json", 1

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=4, in_channels=1, condition_channels=0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.abar, self.calls = None, []

    def forward(self, sample, timestep, condition=None):
        self.calls.append(condition)
        abar = self.abar[int(timestep)]
        unknown, mean, covariance = torch.ones(4, dtype=torch.bool), MEAN, COVARIANCE
        epsilon = torch.empty_like(sample)
        if condition is not None:
            values, known = condition.chunk(2, dim=1)
            assert (values[known == 0] == 0).all() and (sample[known == 1] == 0).all() and (known == known[0]).all()
            unknown = known[0, 0] == 0
            epsilon[:] = (sample - abar.sqrt() * values) / (1 - abar).sqrt()
            mean, covariance = conditional(values, unknown)
        total = abar * covariance + (1 - abar) * torch.eye(len(covariance))
        residual = sample[..., unknown] - abar.sqrt() * mean
        epsilon[..., unknown] = (1 - abar).sqrt() * residual @ torch.linalg.inv(total)
        return diffusers.utils.BaseOutput(sample=epsilon)


def series(total=40, condition=None, **options):
    own = GaussianScheduler(
        total, **{"prediction_type": "epsilon", "clip_sample": False, "beta_schedule": "linear", **options}
    )
    pipe = DDPMPipeline1D(Series(condition_channels=2 if condition else 0), own, condition=condition)
    pipe.unet.abar = exact_abar(own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step_law(mean, covariance, data, a, b, eta):
    """Mean and covariance of x at abar = b, after a step from abar = a with the exact prediction for Gaussian data.

    Args:
        mean, covariance: those of x before the step.
        data: mean and covariance of the data.
        eta: that of a DDIM step; None: a DDPM step.
    """
    data_mean, data_covariance = data
    eye = torch.eye(len(data_mean))
    # epsilon = that times (x - sqrt(a) data_mean), and x0 by equation 4 of DDPM
    epsilon = (1 - a) ** 0.5 * torch.linalg.inv(a * data_covariance + (1 - a) * eye)
    x0 = (eye - (1 - a) ** 0.5 * epsilon) / a**0.5
    variance = (1 - b) / (1 - a) * (1 - a / b)
    if eta is None:
        step = b**0.5 * (1 - a / b) / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * eye
    else:
        variance *= eta**2
        step = b**0.5 * x0 + (1 - b - variance) ** 0.5 * epsilon
    # the mean of x_t, sqrt(a) data_mean, is mapped to that of x_s
    mean = b**0.5 * data_mean + step @ (mean - a**0.5 * data_mean)
    return mean, step @ covariance @ step.T + variance * eye


def chain_abar(own, steps):
    """The values of abar along the chain, and 1 at its end."""
    own.set_timesteps(steps)
    return [*exact_abar(own)[own.timesteps].tolist(), 1.0]


def repaint_law(own, steps, jump_length, jump_n_sample, eta):
    """Mean and covariance of the unknown positions of RePaint's samples; eta None: DDPM steps."""
    abar, eye, unknown = chain_abar(own, steps), torch.eye(4), UNKNOWN.double()
    mean, covariance = torch.zeros(4), eye
    for start, place in resampling_plan(steps, jump_length, jump_n_sample):
        b = abar[start + 1]
        mean, covariance = step_law(mean, covariance, (MEAN, COVARIANCE), abar[start], b, eta)
        mean = torch.where(UNKNOWN, mean, b**0.5 * KNOWN)
        covariance = unknown[:, None] * covariance * unknown + (1 - b) * torch.diag(1 - unknown)
        if place != start + 1:
            kept = abar[place] / b
            mean, covariance = kept**0.5 * mean, kept * covariance + (1 - kept) * eye
    return mean[UNKNOWN], covariance[UNKNOWN][:, UNKNOWN]


def assert_law(x, mean, covariance, slack=0.0):
    """Samples (N, 2) have the mean and the covariance, within five standard errors, and `slack` of the deviations."""
    n, spread = len(x), covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < (5 / n**0.5 + slack) * spread).all()
    error = (torch.cov(x.T) - covariance).abs() / (spread[:, None] * spread)
    assert (error < 5 * (2 / n) ** 0.5 + 2 * slack).all()


def complete(pipe, known=KNOWN, **options):
    """Samples (N, 1, length), from one generator."""
    generator = options.pop("generator", torch.Generator().manual_seed(0))
    return pipe.inpaint(known.reshape(-1, 1, 4), generator=generator, output_type="pt", **options).sequences


# ---------------------------------------------------------------------------------------------
# RePaint


def test_the_schedule_of_jumps():
    """Of 6 steps, with jumps of 2 from t = 0 and t = 2 (the paper's appendix): the calls of the model, and its form."""
    plan = resampling_plan(6, 2, 2)
    assert [5 - start for start, _ in plan] == [5, 4, 3, 4, 3, 2, 1, 2, 1, 0]
    assert [5 - place for _, place in plan] == [4, 3, 4, 3, 2, 1, 2, 1, 0, -1]
    assert len(resampling_plan(250, 10, 10)) == 250 + 24 * 9 * 10
    for steps, length, times in ((1, 1, 5), (5, 10, 10), (10, 10, 10), (40, 3, 1)):
        assert resampling_plan(steps, length, times) == [(i, i + 1) for i in range(steps)]
    # with jumps of one step, every place before the last but x_T is passed jump_n_sample times
    starts = [start for start, _ in resampling_plan(5, 1, 3)]
    assert [starts.count(i) for i in range(5)] == [3, 3, 3, 3, 1]


@pytest.mark.parametrize("steps,eta", [(40, None), (20, 0.0), (20, 0.6)])
def test_repaint_has_the_law_of_its_algorithm(double, steps, eta):
    """DDPM, DDIM, and DDIM with noise: mean and covariance are those that the algorithm has in closed form."""
    pipe = series()
    x = complete(pipe, num_samples=20000, num_inference_steps=steps, jump_length=4, jump_n_sample=3, eta=eta)
    assert torch.equal(x[:, 0, ~UNKNOWN], KNOWN[~UNKNOWN].expand(20000, 2))
    assert len(pipe.unet.calls) == len(resampling_plan(steps, 4, 3))
    assert_law(x[:, 0, UNKNOWN], *repaint_law(pipe.scheduler, steps, 4, 3, eta))


def test_resampling_brings_repaint_near_the_conditional_distribution(double):
    """At the paper's jumps its law is within 6% of the exact one's deviations and covariances; without jumps it is not.

    The rest is the bias of finite jumps: between two passes the chain does not forget all of what did not fit.
    """
    own = GaussianScheduler(1000, beta_schedule="linear")
    mean, covariance = conditional(KNOWN, UNKNOWN)
    spread = covariance.diagonal().sqrt()

    def errors(jump_n_sample):
        m, c = repaint_law(own, 1000, 10, jump_n_sample, None)
        return ((m - mean) / spread).abs().max(), (c / covariance - 1).abs().max()

    assert all(error < 0.06 for error in errors(10))
    assert all(error > 0.4 for error in errors(1))


def test_the_table_of_the_page_is_that_of_the_algorithm(double):
    """docs/completing.md: calls and errors by steps and jumps, on the default schedule."""
    page = (ROOT / "docs" / "completing.md").read_text()
    rows = re.findall(r"^\| (\d+) [^|]*\| (\d+) \| (\d+) [^|]*\|(.*)\|$", page, re.M)
    assert len(rows) == 8
    own, (mean, covariance) = GaussianScheduler(), conditional(KNOWN, UNKNOWN)
    for *numbers, printed in rows:
        steps, jump_length, jump_n_sample = map(int, numbers)
        calls, *errors = [float(cell.replace(",", "")) for cell in printed.split("|")]
        m, c = repaint_law(own, steps, jump_length, jump_n_sample, None if steps == 1000 else 0.0)
        computed = ((m - mean) / covariance.diagonal().sqrt()).abs().max(), *(c / covariance)[0]
        assert calls == len(resampling_plan(steps, jump_length, jump_n_sample))
        assert all(abs(error - one) <= 0.0051 for error, one in zip(errors, computed))


def test_one_pass_replaces_the_known_part_at_each_level():
    """Before each call the known part is the data at the noise level of that call; the model is called on it."""
    pipe = images(1, steps=6)
    data, mask = torch.rand(1, 1, 8, 8), torch.zeros(8, 8)
    mask[2:5] = 1
    asked, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda x, t, **k: (asked.append((x.clone(), int(t))), forward(x, t, **k))[1]
    pipe.inpaint(data, mask, jump_n_sample=1, num_samples=2000 // 25, generator=seeds(0)[0])
    for x, t in asked[1:]:
        signal, spread = pipe.scheduler._host_rates[t]
        noise = ((x - signal * (2 * data - 1)) / spread)[:, :, mask == 0]
        assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5


def test_repaint_reads_nothing_back():
    pipe = pipeline(Model().to("meta"), GaussianScheduler(100))
    pipe._set_timesteps(6, None)
    x = torch.randn(2, 3, 8, 8, device="meta")
    repaint = Repaint(pipe.scheduler, x, x > 0, 2, 2, None)
    options = {"callback": repaint, "callback_inputs": ("latents",)}
    with DeviceWork(scalars=True) as mode:
        out = pipe._denoise(x, repaint.timesteps, step_options(pipe.scheduler, None, None), **options)
    assert out.shape == x.shape and mode.copies == 1


# ---------------------------------------------------------------------------------------------
# Models that are given the known part


@pytest.mark.parametrize("name", ["GaussianScheduler", "DDIMScheduler", "fast"])
def test_a_conditional_model_completes_in_ordinary_sampling(double, name):
    """As many calls as steps, with any scheduler. DDIM has the law of its steps towards the conditional distribution.

    The fast sampler has that distribution itself, but for 1% that an error of second order leaves at 50 steps.
    """
    pipe, exact = series(1000, condition="known"), conditional(KNOWN, UNKNOWN)
    if name == "fast":
        steps, law = 50, exact
        pipe.use_fast_sampler(steps)
    else:
        steps, law = 40, (torch.zeros(2), torch.eye(2))
        abar = chain_abar(pipe.scheduler, steps)
        for a, b in zip(abar, abar[1:]):
            law = step_law(*law, exact, a, b, 0.0)
        pipe.scheduler = getattr(diffusers, name, GaussianScheduler).from_config(pipe.scheduler.config)
    x = complete(pipe, num_samples=20000, num_inference_steps=steps)
    assert len(pipe.unet.calls) == steps
    assert torch.equal(x[:, 0, ~UNKNOWN], KNOWN[~UNKNOWN].expand(20000, 2))
    assert_law(x[:, 0, UNKNOWN], *law, slack=0.01 if name == "fast" else 0.0)


def test_without_anything_known_the_model_is_given_nothing(double):
    pipe = series(condition="known")
    pipe(3, 10)
    assert pipe.unet.calls == [None] * 10


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_our_models_are_given_the_known_part(kind, tmp_path):
    """The known values in model units, 0 where they are unknown, and 1 where they are known; in the saved form too."""
    if kind == "images":
        unet = UNet2D(8, in_channels=3, condition_channels=6, **SMALL)
        pipe, shape = DDPMPipeline(unet, GaussianScheduler(), 3, condition="known"), (2, 3, 8, 8)
    else:
        unet, units = UNet1D(8, in_channels=2, condition_channels=4, **SMALL), ([1.0, 2.0], [3.0, 4.0])
        pipe, shape = DDPMPipeline1D(unet, GaussianScheduler(), 3, *units, condition="known"), (2, 2, 8)
    data, mask = torch.rand(shape), torch.arange(8) > 4
    given, forward = [], unet.forward
    unet.forward = lambda *a, **k: (given.append(k["condition"]), forward(*a, **k))[1]
    mask = mask.expand(shape[2:])
    x = pipe.inpaint(data, mask, generator=seeds(0)[0], output_type="pt", return_dict=False)[0]
    assert len(given) == 3
    values, known = given[-1].chunk(2, dim=1)
    assert torch.equal(known, (~mask).float().expand(shape))
    assert torch.equal(values, torch.where(mask, 0.0, pipe._encode(data, "data")))
    del unet.forward
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert torch.equal(again.inpaint(data, mask, generator=seeds(0)[0], output_type="pt", return_dict=False)[0], x)
    assert pipe(1, output_type="np", return_dict=False)[0].size == data[0].numel()  # and samples without one


@pytest.mark.parametrize("by", ["classes", "guide"])
def test_guidance_of_a_model_that_is_given_the_known_part(by):
    """Both predictions are given it, and rescaling measures the deviation of what is unknown."""
    torch.manual_seed(0)
    options = {"in_channels": 2, "condition_channels": 4, **SMALL}
    unet, weaker = UNet1D(8, num_class_embeds=3, **options), UNet1D(8, **options)
    pipe, mask = DDPMPipeline1D(unet, GaussianScheduler(), 3, condition="known"), torch.arange(8) > 3
    given, stepped, step = [], [], pipe.scheduler.step
    for model in (unet, weaker):
        model.register_forward_hook(lambda m, args, kwargs, out: given.append((args[0], kwargs, out.sample)),
                                    with_kwargs=True)  # fmt: skip
    pipe.scheduler.step = lambda *a, **k: (stepped.append(a[0]), step(*a, **k))[1]
    guided = {"guidance_scale": 3.0, "guidance_rescale": 1.0, "class_labels": 1}
    pipe.inpaint(torch.rand(2, 2, 8), mask, guide=weaker if by == "guide" else None, **guided)
    assert len(stepped) == 3 and len(given) == (6 if by == "guide" else 3)
    for i, prediction in enumerate(stepped):
        calls = given[2 * i : 2 * i + 2] if by == "guide" else given[i : i + 1]
        x = torch.cat([call[0] for call in calls])
        condition = torch.cat([call[1]["condition"] for call in calls])
        assert torch.equal(x[:2], x[2:]) and torch.equal(condition[:2], condition[2:])
        strong, weak = torch.cat([call[2] for call in calls]).chunk(2)
        hidden, plain = prediction[..., mask], (weak + 3.0 * (strong - weak))[..., mask]
        torch.testing.assert_close(hidden.std((1, 2)), strong[..., mask].std((1, 2)))
        cosine = torch.cosine_similarity(hidden.flatten(1), plain.flatten(1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_the_condition_is_saved(double, tmp_path):
    pipe = series(condition="known")
    pipe.save_pretrained(tmp_path)
    for again in (DDPMPipeline1D.from_pretrained(tmp_path), DDPMPipeline1D.from_pipe(pipe)):
        assert again.config.condition == "known"
    assert "condition" not in series().config
    with pytest.raises(ValueError, match="condition must be 'known', 'paired' or None, got 'all'"):
        DDPMPipeline1D(pipe.unet, pipe.scheduler, condition="all")
    with pytest.raises(ValueError, match="condition='known' needs a model with condition_channels=2, got 0"):
        DDPMPipeline1D(Series(), pipe.scheduler, condition="known")


# ---------------------------------------------------------------------------------------------
# What is given and what comes back


@pytest.mark.parametrize("form", ["np", "pt", "double", "half"])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_known_pixels_come_back_exactly(form, output_type):
    """To the bit, in the wider type of data and sample; in PIL images to the 8-bit value."""
    pipe = images(3, size=(8, 12))
    data = torch.rand(2, 3, 8, 12, dtype={"double": torch.float64, "half": torch.float16}.get(form, torch.float32))
    mask = torch.rand(2, 1, 8, 12) > 0.5
    given = data.movedim(1, -1).numpy() if form == "np" else data
    out = pipe.inpaint(given, mask.movedim(1, -1).numpy() if form == "np" else mask, output_type=output_type).images
    if output_type == "pil":
        out = torch.from_numpy(np.stack(out)).movedim(-1, 1)
        expected = (data.float() * 255).round().to(torch.uint8)
    else:
        out = torch.from_numpy(out).movedim(-1, 1) if output_type == "np" else out
        expected = data.to(torch.float64 if form == "double" else torch.float32)
    assert out.dtype == expected.dtype and torch.equal(out.where(~mask, 0), expected.where(~mask, 0))
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("channels,mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_white_of_a_mask_image_is_unknown(channels, mode):
    """Black pixels come back to the 8-bit value, white ones are drawn anew, greys count by the nearer of the two."""
    pipe, rng = images(channels, size=(8, 12)), np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (8, 12, len(mode)), dtype=np.uint8) for _ in range(2)]
    given = [Image.fromarray(each[..., 0] if mode == "L" else each) for each in pixels]
    painted = np.tile(np.array([0, 127, 128, 255], np.uint8), (8, 3))
    mask = Image.fromarray(painted)
    out = pipe.inpaint(given, mask, num_samples=2).images
    assert len(out) == 4 and {image.mode for image in out} == {mode}
    for i, image in enumerate(out):
        array = np.asarray(image).reshape(8, 12, -1)
        assert np.array_equal(array[painted < 128], pixels[i // 2][painted < 128])
        assert not np.array_equal(array, pixels[i // 2])
    one = pipe.inpaint(given[0], [mask.convert("RGB")], output_type="np").images
    assert np.array_equal(one[0, painted < 128] * 255, pixels[0][painted < 128])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("scale", [([3.0, 0.5], [1.0, 1e6]), ([2.0, 0.0], [10.0, 7.0]), (None, None)])
def test_known_values_of_sequences_come_back_exactly(dtype, scale):
    """In the units of the data, also outside of the range that the model has seen."""
    pipe = sequences(data_scale=scale[0], data_shift=scale[1])
    data = (np.random.default_rng(0).normal(size=(2, 2, 16)) * 40 + 2**24).astype(dtype)
    mask = np.arange(16) > 10
    for output_type in ("np", "pt"):
        out = pipe.inpaint(data, mask, output_type=output_type).sequences
        assert np.array_equal(np.asarray(out)[..., ~mask], data[..., ~mask])
        assert np.isfinite(np.asarray(out)).all() and len(out) == 2
    assert pipe.inpaint(data.tolist(), mask).sequences.dtype == np.float64


def test_every_form_of_a_mask_says_the_same():
    pipe = sequences()
    data = np.random.default_rng(0).normal(size=(3, 2, 16))
    unknown = np.arange(16) >= 12
    whole = np.broadcast_to(unknown, data.shape)
    forecast = np.where(whole, np.nan, data)
    with_nan = pipe.inpaint(forecast, generator=seeds(0)[0]).sequences
    for mask in (unknown, whole, whole[:1], whole[:, :1], whole[:1, :1], torch.tensor(unknown), unknown.astype(float),
                 unknown.tolist()):  # fmt: skip
        assert np.array_equal(pipe.inpaint(data, mask, generator=seeds(0)[0]).sequences, with_nan)
    assert np.array_equal(pipe.inpaint(forecast, np.arange(16) >= 14, generator=seeds(0)[0]).sequences, with_nan)

    pipe = images(3, size=(8, 12))
    data, hole = np.random.default_rng(0).random((2, 8, 12, 3)), np.random.default_rng(1).random((8, 12)) > 0.5
    expected = pipe.inpaint(data, hole, generator=seeds(0)[0], output_type="np").images
    last = np.broadcast_to(hole[..., None], data.shape)
    picture = Image.fromarray(hole.astype(np.uint8) * 255)
    for mask in (last, last[:1], last[..., :1], torch.tensor(hole), torch.tensor(last).movedim(-1, 1), picture,
                 [picture] * 2):  # fmt: skip
        assert np.array_equal(pipe.inpaint(data, mask, generator=seeds(0)[0], output_type="np").images, expected)
    tensor = torch.tensor(np.where(last, np.nan, data)).movedim(-1, 1)
    assert np.array_equal(pipe.inpaint(tensor, generator=seeds(0)[0], output_type="np").images, expected)


def test_items_without_a_gap_stay_as_they_are(double):
    data = torch.stack((KNOWN, KNOWN.nan_to_num(0.3), torch.full((4,), math.nan)))
    x = complete(series(), data)
    assert torch.equal(x[1, 0], data[1]) and torch.isfinite(x).all()


def test_samples_of_an_item_lie_together(double):
    """And differ. One generator for each item or each sample frees it from the others."""
    data = torch.stack((KNOWN, KNOWN.flip(0)))
    options = {"num_samples": 3, "num_inference_steps": 10, "jump_length": 3, "jump_n_sample": 2, "eta": 0.5}
    x = complete(series(), data, **options)
    assert x.shape == (6, 1, 4) and torch.equal(x[:, 0, 0], data[:, 0].repeat_interleave(3))
    assert len(x[:, 0, 1].unique()) == 6
    by_sample = complete(series(), data, generator=seeds(*range(6)), **options)
    alone = complete(series(), data[1:], generator=seeds(4), **{**options, "num_samples": 1})
    torch.testing.assert_close(by_sample[4:5], alone, rtol=1e-12, atol=1e-12)
    by_item = complete(series(), data, generator=seeds(8, 9), **options)
    second = complete(series(), data[1:], generator=seeds(9), **options)
    torch.testing.assert_close(by_item[3:], second, rtol=1e-12, atol=1e-12)
    assert len(by_item[:, 0, 1].unique()) == 6


def test_classes_and_guidance():
    """A label for each item, one for each sample, or one for all; both halves in one call, as in ordinary sampling."""
    pipe = mixture(NAMES)
    known = np.array([[[0.1, np.nan]], [[0.0, np.nan]]])
    options = {"num_samples": 2, "num_inference_steps": 4, "guidance_scale": 1.5}
    for labels, numbers in ((["two", 0], [2, 2, 0, 0]), ([0, 1, 2, None], [0, 1, 2, 3]), (1, [1] * 4)):
        pipe.unet.calls.clear()
        pipe.inpaint(known, class_labels=labels, **options)
        assert {tuple(each.tolist()) for each in pipe.unet.calls} == {(*numbers, 3, 3, 3, 3)}
    guide = mixture().unet
    plain, guided = (
        pipe.inpaint(known, class_labels=0, guide=guide, guidance_scale=scale, generator=seeds(0)[0]).sequences
        for scale in (1.0, 2.0)
    )
    assert np.array_equal(plain, guided)  # guided by itself
    assert len(guide.calls) == 8


@pytest.mark.parametrize("condition", [None, "known"])
def test_calls_are_captured(condition):
    """One graph for RePaint's calls or for those with a condition, with the samples of ordinary calls."""
    pipe, tape = pipeline(Conditioned(), GaussianScheduler(5)), Tape()
    pipe.register_to_config(condition=condition)
    data, mask = torch.rand(2, 1, 8, 8), torch.rand(8, 8) > 0.5
    options = {"jump_length": 1, "jump_n_sample": 2, "output_type": "pt"}
    expected = pipe.inpaint(data, mask, generator=seeds(0)[0], **options).images
    pipe._graphs = GraphedModel(lambda device: tape)
    for other in (False, True):
        got = pipe.inpaint(data, mask ^ other, generator=seeds(0)[0], **options).images
        assert torch.equal(got, expected) != other
    assert tape.events.count("capture") == 1 and tape.events.count("replay") == (10 if condition else 18)


class Conditioned(Model):
    """Its prediction depends on the condition, and on whether there is one."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=8, in_channels=1, condition_channels=2):
        super().__init__(sample_size, in_channels)
        self.weight = torch.nn.Parameter(torch.full((1, 1, 1), 0.5))

    def forward(self, sample, timestep, condition=None):
        prediction = super().forward(sample, timestep).sample
        if condition is not None:
            prediction = prediction + condition[:, :1] - 0.3 * condition[:, 1:]
        return diffusers.utils.BaseOutput(sample=prediction)


# ---------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mask": None}, "something unknown, marked by mask or NaN; got nothing unknown"),
        ({"mask": np.zeros(16)}, "got nothing unknown"), ({"mask": np.ones(16)}, "got everything unknown"),
        ({"mask": np.ones(15)}, r"the data has \(2, 2, 16\), mask \(15,\)"),
        ({"mask": np.ones((2, 16))}, r"mask \(2, 16\)"), ({"mask": np.ones((3, 1, 16))}, r"mask \(3, 1, 16\)"),
        ({"mask": np.full(16, 255)}, "only 0 .known. and 1 .unknown., got 255 to 255"),
        ({"mask": np.linspace(0, 1, 16)}, "got 0 to 1"), ({"mask": "all"}, "mask must be PIL images, an array"),
        ({"mask": Image.new("L", (16, 1))}, "size of the images"),
        ({"known": np.zeros((2, 3, 16))}, r"known must have the shape \(B, 2, length\), got \(2, 3, 16\)"),
        ({"known": np.zeros((0, 2, 16))}, "got nothing unknown"), ({"known": "x"}, "known must be an array or tensor"),
        ({"known": np.full((2, 2, 16), np.inf)}, "known must be finite where it is known, got 0 to inf"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"jump_length": 0}, "jump_length must be .* got 0"), ({"jump_n_sample": 1.5}, "jump_n_sample must be .* 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps"), ({"class_labels": 0}, "needs a model with classes"),
        ({"guidance_scale": 2.0}, "guidance_scale needs"), ({"guidance_scale": -1}, "at least 0, got -1"),
        ({"generator": seeds(1, 2, 3)}, "batch_size is 2, got 3 generators"), ({"output_type": "pil"}, "'pil'"),
        ({"eta": 2.0}, "from 0 to 1"), ({"guide": 3}, "guide must be a model"),
    ],
)  # fmt: skip
def test_bad_calls(options, message):
    """Each is refused before the model is called."""
    pipe = sequences()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(**{"known": np.zeros((2, 2, 16)), "mask": np.arange(16) > 10, **options})


def test_bad_images():
    pipe = images(1)
    pipe.unet.forward = None
    mask = Image.new("L", (8, 8), 255)
    mask.putpixel((3, 3), 0)
    with pytest.raises(ValueError, match=r"known must lie in \[0, 1\]; got 0 to 2"):
        pipe.inpaint(torch.full((1, 1, 8, 8), 2.0), mask)
    with pytest.raises(ValueError, match=r"the size of the images, \(8, 8\); got \[\(9, 8\)\]"):
        pipe.inpaint(Image.new("L", (8, 8)), Image.new("L", (9, 8), 255))
    with pytest.raises(ValueError, match="known must be PIL images"):
        pipe.inpaint(3, mask)


def test_jumps_need_our_own_scheduler():
    """The message has the way back to it."""
    pipe = images(1).use_fast_sampler(4)
    data, mask = torch.rand(1, 1, 8, 8), torch.eye(8)
    with pytest.raises(ValueError, match="pipe.scheduler = GaussianScheduler.from_config.*got DPMSolverMultistep"):
        pipe.inpaint(data, mask)
    pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config)
    assert pipe.inpaint(data, mask, output_type="pt").images.shape == (1, 1, 8, 8)
