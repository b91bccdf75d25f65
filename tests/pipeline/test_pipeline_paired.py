"""Methods of pipelines with paired conditions: closed forms on Gaussian pairs, conditions of each item, bad input.

The pairs are x | c ~ N(BASE + SLOPE c, STD^2) at each place, so that a call with the condition c has to be the call of
the optimal model of data with that mean.
"""

import math

import numpy as np
import pytest
import torch
from conftest import exact_abar
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from helpers import MODEL, make
from test_pipeline import seeds

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline.scoring import COMPLETION

BASE, SLOPE, STD = 0.2, 0.5, 0.4
SHIFT, SCALE = 10.0, 4.0  # units of the condition
TOTAL = 30  # timesteps
C = torch.tensor([0.8, -1.0], dtype=torch.float64).reshape(1, 1, 2)  # in the model's units, of half the items' length
X = torch.tensor([[1.1, 0.3, -0.4, 0.2], [0.0, 0.6, -1.0, 0.5]], dtype=torch.float64)[:, None]


def means(c):
    """Return the means of items of four places with the condition c, (B, 1, 2)."""
    return BASE + SLOPE * c.repeat_interleave(2, dim=-1)


class Optimal(ModelMixin, ConfigMixin):
    """The exact epsilon of the pairs, or with condition_channels=0 of items with the means `mean`."""

    config_name, ndim = "config.json", 1

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, condition_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.abar = self.mean = None

    def forward(self, sample, timestep, condition=None):
        assert (condition is not None) == (self.config.condition_channels > 0)
        mean = self.mean if condition is None else BASE + SLOPE * condition
        abar = self.abar[timestep.reshape(-1)].reshape(-1, 1, 1)
        return BaseOutput(sample=(1 - abar).sqrt() / (STD**2 * abar + 1 - abar) * (sample - abar.sqrt() * mean))


def optimal(mean=None, **options):
    """Return a pipeline with the optimal model of the pairs, or of unconditional data with the means `mean`."""
    scheduler = GaussianScheduler(
        **{"num_train_timesteps": TOTAL, "prediction_type": "epsilon", "clip_sample": False, **options}
    )
    unet, paired = Optimal(condition_channels=1 if mean is None else 0), {}
    unet.mean, unet.abar = mean, exact_abar(scheduler)
    if mean is None:
        paired = {"condition": "paired", "condition_size": [2], "condition_shift": [SHIFT], "condition_scale": [SCALE]}
    pipe = DDPMPipeline1D(unet, scheduler, **paired)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_units(c):
    return c * SCALE + SHIFT


def first(output):
    """Return the samples of a call as an array."""
    values = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
    return np.asarray(values)


# the methods, each called with items, generators and what else is given
METHODS = {
    "vary": lambda pipe, x, **given: pipe(**{"image" if x.ndim == 4 else "sequence": x}, strength=0.7, **given,
                                          num_inference_steps=10, num_samples=2, output_type="pt"),
    "encode": lambda pipe, x, generator=None, **given: pipe.encode(x, 4, **given),
    "noise": lambda pipe, x, **given: pipe.interpolate(x, 0.9 * x, weights=[0.3, 0.6], num_inference_steps=10, **given,
                                                       output_type="pt"),
    "latent": lambda pipe, x, generator=None, **given: pipe.interpolate(
        x, 0.9 * x, weights=[0.3, 0.6], method="latent", num_inference_steps=4, **given, output_type="pt"),
    "reconstruct": lambda pipe, x, **given: pipe.reconstruct(x, 0.5, num_samples=2, num_inference_steps=10,
                                                             batch_size=3, **given),
    "reconstruction": lambda pipe, x, **given: pipe.score(x, strengths=[0.2, 0.6], batch_size=3, **given),
    "denoising": lambda pipe, x, **given: pipe.score(x, "denoising", num_timesteps=5, batch_size=3, **given),
    "completed": lambda pipe, x, **given: pipe.score(with_a_gap(x), complete=True, strengths=[0.3], **given),
    "inpaint": lambda pipe, x, **given: pipe.inpaint(with_a_gap(x), num_inference_steps=6, jump_length=1, num_samples=2,
                                                     jump_n_sample=2, output_type="pt", **given),
}  # fmt: skip


def with_a_gap(x):
    x = x.clone()
    x[..., 1:3] = math.nan
    return x


@pytest.fixture(autouse=True)
def short_completions(monkeypatch):
    monkeypatch.setitem(COMPLETION, "num_inference_steps", 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_with_a_condition_is_that_of_the_conditional_data(name):
    """The optimal model of data with the means that follow from c gives the same; another condition gives another."""
    method, generator = METHODS[name], seeds(0)[0]

    def result(pipe, **given):
        return first(method(pipe, X, generator=generator.manual_seed(0), **given))

    got = result(optimal(), condition=in_units(C))
    np.testing.assert_allclose(got, result(optimal(means(C))), rtol=1e-9, atol=1e-12)
    wrong = result(optimal(), condition=in_units(C + 1))
    assert np.abs(got - wrong).max() > 1e-3
    # one condition for all items is the same one for each
    assert np.array_equal(got, result(optimal(), condition=in_units(C).repeat(2, 1, 1).numpy()))


@pytest.mark.parametrize("kind", ["images", "sequences"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "completed"])
def test_each_item_has_its_own_condition(kind, name):
    """Two items are what they are alone, with classes and guidance; conditions that change places change both."""
    torch.manual_seed(0)
    guided = {} if name in ("reconstruction", "denoising") else {"guidance_scale": 2.0}
    common = {"in_channels": 1, "condition_channels": 1, "num_class_embeds": 3, "self_condition": True, **MODEL}
    if kind == "images":
        pipe = DDPMPipeline(UNet2D(8, **common), GaussianScheduler(TOTAL), condition="paired", condition_size=[4, 4])
        x, c = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 4, 4)
    else:
        pipe = DDPMPipeline1D(UNet1D(8, **common), GaussianScheduler(TOTAL), condition="paired")
        x, c = torch.rand(2, 1, 8), torch.randn(2, 1, 8)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.double()

    def result(x, c, labels, *numbers):
        return first(METHODS[name](pipe, x, condition=c, class_labels=labels, generator=seeds(*numbers), **guided))

    both = result(x, c, [0, 2], 1, 2)
    alone = [result(x[:1], c[:1], [0], 1), result(x[1:], c[1:], [2], 2)]
    np.testing.assert_allclose(both, np.concatenate(alone), rtol=1e-6, atol=1e-6)
    swapped = result(x, c.flip(0), [0, 2], 1, 2)
    for item in range(2):
        assert not np.allclose(*(np.array_split(each, 2)[item] for each in (both, swapped)), rtol=1e-6, atol=1e-6)


def test_an_item_that_is_completed_has_its_own_condition():
    pipe, x, c = optimal(), X.clone(), in_units(torch.cat((C, C + 1)))
    x[1, 0, 1:3] = math.nan
    both = pipe.score(x, complete=True, condition=c, generator=seeds(1, 2))
    alone = pipe.score(x[1:], complete=True, condition=c[1:], generator=seeds(2))
    np.testing.assert_allclose(both.maps[1:], alone.maps, rtol=1e-5)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("corrected", 3)])
def test_the_way_there_and_back_with_a_condition(method, order):
    """The latents are those of the flow of x | c, and the error falls with the order of the method."""
    pipe, errors = optimal(num_train_timesteps=4000, beta_schedule="cosine"), []
    for steps in (100, 200):
        z = pipe.encode(X, steps, method=method, condition=in_units(C))
        back = pipe(2, steps, latents=z, eta=0, output_type="pt", condition=in_units(C)).sequences
        errors.append((back - X).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4 and errors[1] < 0.1
    pipe = optimal(num_train_timesteps=4000)
    z = pipe.encode(X, 250, method=method, condition=in_units(C))
    abar = pipe.unet.abar[-1]
    exact = abar.sqrt() * means(C) + (STD**2 * abar + 1 - abar).sqrt() * (X - means(C)) / STD
    torch.testing.assert_close(z, exact, rtol=0, atol=3e-2)


def bound_of_an_item(pipe, x, mean):
    """Return the expected terms of the bound at one value x of data N(mean, STD^2), summed."""
    abar = pipe.unet.abar
    gain = STD**2 * abar.sqrt() / (STD**2 * abar + 1 - abar)
    # x0 - estimate = (1 - gain sqrt(abar)) (x0 - mean) - gain sqrt(1 - abar) noise
    square = (1 - gain * abar.sqrt()) ** 2 * (x - mean) ** 2 + gain**2 * (1 - abar)
    before = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    terms = 0.5 * (before / (1 - before) - abar / (1 - abar)) * square  # half the fall of the SNR
    beta = 1 - abar[0]
    terms[0] = 0.5 * (math.log(2 * math.pi) + beta.log() + square[0] / beta)
    return (terms.sum() + 0.5 * (abar[-1] * (x**2 - 1) - torch.log1p(-abar[-1]))).item()


def test_the_score_is_the_bound_given_the_condition():
    """Items score as strange under a condition that is not theirs as its closed form says."""
    pipe, n, expected, found = optimal(), 1000, [], []
    x = means(C)  # what is usual for c
    for c in (C, C + 2):
        result = pipe.score(
            x.expand(n, -1, -1), "denoising", num_timesteps=TOTAL, generator=seeds(3)[0], batch_size=6000,
            condition=in_units(c),
        )  # fmt: skip
        of_places = [bound_of_an_item(pipe, *pair) for pair in zip(x.flatten(), means(c).flatten())]
        error = result.maps.std(axis=0).ravel() / n**0.5
        assert (np.abs(result.maps.mean(axis=0).ravel() - of_places) < 5 * error).all() and error.max() < 0.1
        expected.append(np.mean(of_places))
        found.append(result.scores.mean())
    assert found[1] - found[0] > 0.9 * (expected[1] - expected[0]) > 1


@pytest.mark.parametrize("method", ["single", "joint"])
def test_longer_series_have_the_part_of_the_condition_that_belongs_to_each_window(method):
    """This model is the same at each place, so its windows give what one call gives."""
    c = torch.randn(3, 1, 5, dtype=torch.float64, generator=seeds(0)[0])
    mean = BASE + SLOPE * c.repeat_interleave(2, dim=-1)
    options = {"length": 10, "generator": seeds(1)[0], "output_type": "pt"}
    expected = optimal(mean)(3, method="single", **options).sequences
    options["generator"].manual_seed(1)
    got = optimal()(method=method, condition=in_units(c), **options).sequences
    torch.testing.assert_close(got, expected)


def test_larger_images_have_larger_conditions():
    torch.manual_seed(0)
    unet = UNet2D(8, in_channels=1, condition_channels=1, **MODEL)
    pipe = DDPMPipeline(unet, GaussianScheduler(TOTAL), 2, condition="paired", condition_size=[4, 4])
    c = np.random.default_rng(0).random((2, 12, 6, 1))
    assert pipe(height=24, width=12, condition=c, method="joint", output_type="np").images.shape == (2, 24, 12, 1)
    unet.forward = None
    for options, message in (
        ({"height": 24, "width": 11}, "a multiple of 2 as their size.* got \\(24, 11\\)"),
        ({"height": 24, "width": 16}, "of the size \\(12, 8\\).* got 2 of the size \\(12, 6\\)"),
        ({"height": 24, "width": 12, "overlap": 3}, "overlap must be a multiple of 2, .* that begin at \\[0, 4, 5, "),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(condition=c, **options)


@pytest.mark.parametrize("name", METHODS)
def test_conditions_that_do_not_fit(name):
    pipe, plain, c = optimal(), make("sequences"), in_units(C)
    for each in (pipe, plain):
        each.unet.forward = None  # no call of the model

    def refused(pipe, x, message, **given):
        with pytest.raises(ValueError, match=message):
            METHODS[name](pipe, x, **given)

    refused(pipe, X, r"condition must be given to this model, 1 channels of the size \(2,\); got None")
    refused(pipe, X, r"of the size \(2,\), .* got 1 of the size \(4,\)", condition=X[:1])
    refused(pipe, X, r"for each of 2.*; got 3 of the size \(2,\)", condition=c.repeat(3, 1, 1))
    refused(pipe, X, r"shape \(B, 1, length\), got \(1, 2, 2\)", condition=torch.cat((c, c), dim=1))
    refused(pipe, X, "condition must be finite", condition=c * math.nan)
    refused(plain, torch.rand(2, 2, 16), "condition needs a model that was trained with paired conditions", condition=c)


def test_series_that_grow_window_by_window_are_refused():
    """Inpainting goes on from a beginning instead, as the message says."""
    pipe = optimal()
    for call in (
        lambda: pipe.extend(X, 8), lambda: pipe.stream(), lambda: pipe(length=8, method="sequential"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="stream, extend and method='sequential' need a model without paired"):
            call()
    known = torch.cat((X, torch.full_like(X, math.nan)), dim=-1)
    longer = in_units(torch.cat((C, C), dim=-1))
    assert (pipe.inpaint(known, condition=longer, jump_n_sample=1).sequences[..., :4] == X.numpy()).all()
