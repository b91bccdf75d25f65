"""Latents of given items: the way there and back on data with a closed form, interpolation between them, bad input."""

import math

import diffusers
import pytest
import torch
from test_pipeline import images, seeds, sequences
from test_pipeline_guidance import NAMES, mixture
from test_pipeline_varying import gaussian
from test_stock_diffusers import MEAN, STD

from ddpm_hf import DDPMPipeline, GaussianScheduler
from ddpm_hf.pipeline.interpolating import slerp

X = torch.linspace(-1, 1.5, 51, dtype=torch.float64).reshape(-1, 1, 1)


def there_and_back(pipe, x, steps, method, **options):
    latents = pipe.encode(x, steps, method=method, **options)
    back = pipe(len(x), steps, latents=latents, eta=0, output_type="pt", **options)
    return latents, back[0] if isinstance(back, tuple) else back.sequences


@pytest.mark.parametrize(("method", "least", "order"), [("ddim", 3e-2, 1), ("corrected", 2e-6, 3)])
def test_the_way_there_and_back_converges_at_the_order_of_the_method(method, least, order):
    """Song et al.'s form has the order 1, the corrected one 3 with equal angles, with the same calls but one."""
    pipe = gaussian(num_train_timesteps=4000, beta_schedule="cosine")
    calls, forward = [], pipe.unet.forward
    pipe.unet.forward = lambda *given: (calls.append(1), forward(*given))[1]
    errors = {}
    for steps in (50, 100, 200):
        del calls[:]
        _, back = there_and_back(pipe, X, steps, method)
        errors[steps] = (back - X).abs().max().item()
        assert len(calls) == 2 * steps + (method == "corrected")
    first, second = (math.log2(errors[steps] / errors[2 * steps]) for steps in (50, 100))
    assert errors[200] < least
    assert abs(second - order) < 0.1 and abs(second - order) < abs(first - order) < 0.4


@pytest.mark.parametrize("method", ["ddim", "corrected"])
def test_latents_are_those_of_the_flow(method):
    """The flow is linear on Gaussian data: z = sqrt(abar) MEAN + sqrt(STD^2 abar + 1 - abar) (x0 - MEAN) / STD."""
    pipe = gaussian(num_train_timesteps=4000)
    latents, _ = there_and_back(pipe, X[::10], 250, method)
    abar = pipe.scheduler.alphas_cumprod[-1].double()
    exact = abar.sqrt() * MEAN + (STD**2 * abar + 1 - abar).sqrt() * (X[::10] - MEAN) / STD
    torch.testing.assert_close(latents, exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("options", [{"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}])
def test_every_target_and_schedules_that_end_in_noise(options):
    pipe = DDPMPipeline(images(1).unet, GaussianScheduler(clip_sample=False, **options))
    pipe.set_progress_bar_config(disable=True)
    x = torch.rand(2, 1, 8, 8) * 0.5 + 0.25
    latents = pipe.encode(x, 20)
    assert latents.shape == x.shape and latents.isfinite().all()


def test_classes_and_guidance_are_those_of_the_way_back():
    pipe = mixture(NAMES)
    x = pipe(3, 30, class_labels=["zero", "one", "two"], output_type="pt", generator=seeds(0)[0]).sequences
    options = {"class_labels": ["zero", "one", "two"], "guidance_scale": 1.5}
    latents, back = there_and_back(pipe, x, 39, "corrected", **options)
    torch.testing.assert_close(back, x, atol=2e-2, rtol=0)
    _, other = there_and_back(pipe, x, 39, "corrected", class_labels=["two", "zero", "one"])
    assert not torch.equal(latents, pipe.encode(x, 39, class_labels="zero")) and other.shape == x.shape


def test_units_and_self_conditioning():
    pipe = sequences(data_shift=[100.0, 0.0], data_scale=[5.0, 1.0])
    x = pipe(2, 20, output_type="pt").sequences
    latents = pipe.encode(x, 20)
    assert latents.shape == x.shape and latents.abs().max() < 20
    pipe = images(1, self_condition=True)
    assert pipe.encode(pipe(1).images, 5).shape == (1, 1, 8, 8)


def test_interpolation_in_latents():
    """The ends come back, the way between them is slerp's, and today's method is the default."""
    pipe = gaussian()
    x = torch.tensor([-0.4, 0.9], dtype=torch.float64).reshape(2, 1, 1)
    ends = pipe.interpolate(x[:1], x[1:], weights=[0.0, 1.0], method="latent", num_inference_steps=50).sequences
    torch.testing.assert_close(torch.tensor(ends), x, atol=1e-3, rtol=0)

    pipe = images(1)
    x1, x2 = torch.rand(2, 2, 1, 8, 8)
    out = pipe.interpolate(x1, x2, weights=[0.0, 0.3, 1.0], method="latent", num_inference_steps=10, output_type="pt")
    z1, z2 = pipe.encode(x1, 10), pipe.encode(x2, 10)
    middle = pipe(2, 10, latents=slerp(z1, z2, 0.3), eta=0, output_type="pt").images
    assert out.images.shape == (6, 1, 8, 8)
    torch.testing.assert_close(out.images[1::3], middle, rtol=1e-4, atol=1e-5)
    same = [pipe.interpolate(x1, x2, generator=seeds(1)[0], output_type="pt", **more).images
            for more in ({}, {"method": "noise"})]  # fmt: skip
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("total", "sampler", "own", "steps"),
    [
        (300, "auto", 300, 250),
        (12, "auto", None, 11),
        (12, "ddim", None, 12),
        (12, "auto", 12, 11),
        (12, "auto", 5, 11),
    ],
)
def test_the_default_number_of_steps_is_one_that_the_model_has(total, sampler, own, steps):
    """The pipeline's own number is that of interpolation in latents. What is asked for is not changed."""
    pipe = gaussian(num_train_timesteps=total, sampler=sampler)
    pipe.register_to_config(num_inference_steps=own)
    x = torch.tensor([-0.4, 0.9], dtype=torch.float64).reshape(2, 1, 1)
    assert torch.equal(pipe.encode(x), pipe.encode(x, steps)) and len(pipe.scheduler.timesteps) == steps
    mixed = [
        pipe.interpolate(x[:1], x[1:], method="latent", num_inference_steps=given).sequences
        for given in (None, min(own or 250, total if sampler == "ddim" else total - 1))
    ]
    assert (mixed[0] == mixed[1]).all()
    with pytest.raises(ValueError, match=f"num_inference_steps must be .* 1 to {total}; got {total + 1}"):
        pipe.encode(x, total + 1)


def test_slerp():
    z1, z2 = torch.randn(2, 3, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(slerp(z1, z2, 0.0), z1)
    torch.testing.assert_close(slerp(z1, z2, 1.0), z2)
    torch.testing.assert_close(slerp(z1, z1, 0.3), z1)
    half = slerp(z1, z1.roll(1, dims=-1), 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(half, z1.flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "heun"}, "method must be one of corrected, ddim; got 'heun'"),
        ({"num_inference_steps": 1000}, "encode needs DDIM steps, .* got 1000 steps and sampler='auto'"),
        ({"num_inference_steps": 1}, "at least 2, got 1"),
        ({"num_inference_steps": 0.5}, "num_inference_steps must be a whole number"),
        ({"x": torch.full((3, 3, 8, 8), math.nan)}, "x must be finite; NaN or infinity is in items 0, 1, 2"),
        ({"x": torch.rand(1, 2, 8, 8)}, "3 channels"),
    ],
)
def test_bad_calls(options, message):
    pipe = images()
    pipe.unet.forward = None  # no call of the model
    with pytest.raises(ValueError, match=message):
        pipe.encode(**{"x": torch.rand(1, 3, 8, 8), **options})


def test_bad_interpolation_and_schedulers():
    pipe = images()
    pipe.unet.forward = None
    x = torch.rand(1, 3, 8, 8)
    for options, message in (
        ({"method": "both"}, "method must be one of noise, latent; got 'both'"),
        ({"method": "latent", "strength": 0.3}, "takes no strength"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.interpolate(x, x, **options)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for call in (lambda: pipe.encode(x), lambda: pipe.interpolate(x, x, method="latent")):
        with pytest.raises(ValueError, match="GaussianScheduler.* got EulerDiscreteScheduler"):
            call()
    pipe = images()
    pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config, sampler="ddpm")
    with pytest.raises(ValueError, match="sampler='ddpm'"):
        pipe.encode(x)
