"""Variations of given items: their distribution on Gaussian data, both ends of the strength, and bad calls."""

import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from conftest import exact_abar
from PIL import Image
from test_pipeline import images, seeds, sequences
from test_pipeline_guidance import MEANS, NAMES, mixture
from test_stock_diffusers import MEAN, STD, GaussianModel

from ddpm_hf import DDPMPipeline1D, GaussianScheduler

ODE = ["fast", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
       "HeunDiscreteScheduler", "DEISMultistepScheduler"]  # fmt: skip


def gaussian(**options):
    """A pipeline with the optimal model of x0 ~ N(MEAN, STD^2)."""
    model = GaussianModel()
    model.scheduler = GaussianScheduler(clip_sample=False, prediction_type="epsilon", **options)
    pipe = DDPMPipeline1D(model, model.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change_scheduler(pipe, name):
    if name == "fast":
        return pipe.use_fast_sampler(40)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("name", ["ancestral", *ODE])
def test_variations_have_the_closed_form_mean_and_variance(name):
    """x_t ~ N(sqrt(abar) x0, 1 - abar); the chain from it draws from the posterior, or follows the flow, of the data.

    The posterior of N(MEAN, STD^2) given x_t has the gain STD^2 sqrt(abar) / (STD^2 abar + 1 - abar); the flow
    multiplies by STD / sqrt(STD^2 abar + 1 - abar). 40,000 draws; the chains' own error is below 2%.
    """
    pipe, n, x0 = gaussian(), 40_000, 1.3
    steps = {"ancestral": 1000, "DDIMScheduler": 200, "EulerDiscreteScheduler": 200}.get(name, 40)
    if name != "ancestral":
        change_scheduler(pipe, name)
    started = []
    add_noise = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda x, noise, t: (started.append(int(t[0])), add_noise(x, noise, t))[1]
    x = pipe(sequence=np.full((1, 1, 1), x0), strength=0.4, num_samples=n, output_type="pt", generator=seeds(1)[0],
             num_inference_steps=steps).sequences  # fmt: skip
    (t,) = started
    assert abs(t - 399) < 35
    abar = exact_abar(pipe.unet.scheduler)[t].item()
    total = STD**2 * abar + 1 - abar
    gain, drawn = STD / math.sqrt(total), 0.0
    if name == "ancestral":
        gain, drawn = STD**2 * math.sqrt(abar) / total, STD**2 * (1 - abar) / total
    mean, variance = MEAN + gain * math.sqrt(abar) * (x0 - MEAN), gain**2 * (1 - abar) + drawn
    assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / n) + 0.01
    assert abs(x.var().item() / variance - 1) < 5 * math.sqrt(2 / n) + 0.03


@pytest.mark.parametrize("name", ["ours", "fast", "DDIMScheduler", "EulerAncestralDiscreteScheduler",
                                  "HeunDiscreteScheduler"])  # fmt: skip
def test_both_ends_of_the_strength(name):
    """0 gives the items back to the bit, 1 the samples of an ordinary call; between them is neither."""
    pipe = images(1)
    if name != "ours":
        change_scheduler(pipe, name)
    x = torch.rand(2, 1, 8, 8)
    pil = pipe(2, 4).images
    for given, form in ((x, "pt"), (x.double().movedim(1, -1).numpy(), "np")):
        same = pipe(image=given, strength=0, output_type=form).images
        assert same.dtype == given.dtype and (same == given).all()
    for again, image in zip(pipe(image=pil, strength=0, num_samples=2).images, [pil[0], pil[0], pil[1], pil[1]]):
        assert again.tobytes() == image.tobytes()

    def sample(**options):
        return pipe(generator=seeds(1, 2), num_inference_steps=4, output_type="pt", **options).images

    ordinary = sample(batch_size=2)
    assert torch.equal(sample(image=x, strength=1), ordinary)
    between = sample(image=x, strength=0.5)
    assert not torch.equal(between, ordinary) and not torch.equal(between, x)
    assert torch.equal(sample(image=x, strength=1.0), ordinary)  # a chain that began later leaves no trace


def test_generators_classes_and_trajectories_are_those_of_the_samples():
    pipe = sequences(data_shift=[100.0, 0.0], data_scale=[5.0, 1.0])
    x = pipe(2).sequences

    def vary(given, generators, **options):
        return pipe(sequence=given, strength=0.5, num_inference_steps=4, generator=generators, **options)

    both = vary(x, seeds(1, 2, 3, 4), num_samples=2, return_all_timesteps=True)
    assert both.sequences.shape == (4, 2, 16) and both.trajectory.shape == (4, 3, 2, 16)
    np.testing.assert_allclose(both.sequences[2:], vary(x[1:], seeds(3, 4), num_samples=2).sequences, rtol=1e-5)
    one_an_item = vary(x, seeds(1, 2), num_samples=2).sequences
    assert not np.array_equal(one_an_item[0], one_an_item[1])
    np.testing.assert_allclose(one_an_item[:2], vary(x[:1], seeds(1)[0], num_samples=2).sequences, rtol=1e-5)
    assert vary(x, None, callback_on_step_end=lambda pipe, i, t, tensors: None).sequences.shape == x.shape

    classes = mixture(NAMES)
    start = torch.zeros(3, *classes(1, 2, output_type="pt").sequences.shape[1:], dtype=torch.float64)
    out = classes(sequence=start, strength=0.9, num_inference_steps=20, class_labels=["zero", "one", "two"], eta=1.0,
                  guidance_scale=1.5, num_samples=30, generator=seeds(0)[0], output_type="pt")  # fmt: skip
    found = out.sequences.unflatten(0, (3, 30)).mean(1)
    distances = (found[:, None] - torch.tensor(MEANS, dtype=torch.float64).reshape(1, 3, -1, 1)).flatten(2).norm(dim=2)
    assert distances.argmin(dim=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength must be a number from 0 .* got 1.5"),
        ({"strength": True}, "strength must be a number"),
        ({"image": None}, "strength=0.5 needs image"),
        ({"image": None, "strength": None, "num_samples": 2}, "num_samples=2 needs image"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"batch_size": 3}, "batch_size must be left out with image, or be 2"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, "give image or latents, not both"),
        ({"image": torch.rand(2, 1, 8, 8)}, "3 channels"),
        ({"image": torch.tensor([0.0, math.nan]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)}, "infinity is in item 1$"),
        ({"generator": seeds(1, 2, 3)}, "one per sample"),
        ({"strength": 0, "num_inference_steps": 0}, "num_inference_steps must be a whole number"),
    ],
)  # fmt: skip
def test_bad_calls(options, message):
    pipe = images()
    pipe.unet.forward = None  # no call of the model
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": torch.rand(2, 3, 8, 8), "strength": 0.5, **options})


def test_pictures_of_more_than_8_bits_are_scaled_and_not_clipped():
    deep, pipe = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1028, images(1)  # 4 levels of 8 bits apart
    for values in (deep, (deep / 65535).astype(np.float32)):
        (same,) = pipe(image=Image.fromarray(values), strength=0).images
        np.testing.assert_array_equal(np.asarray(same), deep / 257)
    with pytest.raises(ValueError, match=r"mode F must lie in \[0, 1\]; got 2 to 2"):
        pipe(image=Image.fromarray(np.full((8, 8), 2, np.float32)))


def test_schedulers_that_cannot_start_from_items():
    pipe = images()
    pipe.unet.forward = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="PNDMScheduler cannot start in the middle"):
        pipe(image=torch.rand(1, 3, 8, 8), strength=0.5)


def test_values_in_other_units_are_warned_of():
    pipe = sequences(data_shift=[100.0, 0.0], data_scale=[5.0, 1.0])
    x = pipe(1, 1).sequences
    with pytest.warns(UserWarning, match="channel 1 of sequence has values from 1000 to 1000, .* about -1 to 1"):
        x[:, 1] = 1000
        pipe(sequence=x, strength=0)
