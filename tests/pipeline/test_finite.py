"""Samples that are not finite raise an error that says since when and why; "latent" gives x_0 as the model has it."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler


class Half(ModelMixin, ConfigMixin):
    """Predicts x0 as half of x; from one timestep on down, one value of sample 1 becomes `breaks`."""

    @register_to_config
    def __init__(self, sample_size=8, ndim=2, at=-1, breaks="nan"):
        super().__init__()
        self.ndim, self.asked = ndim, []
        self.register_to_config(in_channels=1)
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        self.asked.append(int(t))
        out = x * self.weight
        if int(t) == self.config.at:
            out.flatten(1)[1, 5] = float(self.config.breaks)
        return BaseOutput(sample=out)


def pipeline(units=None, **options):
    model = Half(**options)
    kind = DDPMPipeline1D if model.ndim == 1 else DDPMPipeline
    scheduler = GaussianScheduler(100, prediction_type="sample", clip_sample=False)
    pipe = kind(model, scheduler, **(units or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("breaks", ["nan", "inf"])
@pytest.mark.parametrize("place", [0, 2, 9])
@pytest.mark.parametrize("ndim", [1, 2])
def test_the_error_names_the_timestep_at_which_it_began(ndim, place, breaks):
    chain = pipeline(ndim=ndim)
    chain(2, 10, output_type="pt")
    pipe = pipeline(ndim=ndim, at=chain.unet.asked[place], breaks=breaks)
    begun = f"1 of 2 samples.*since the step at timestep {chain.unet.asked[place]} \\({place + 1} of 10\\).*finite"
    with pytest.raises(FloatingPointError, match=begun):
        pipe(2, 10)


@pytest.mark.parametrize("how", ["interpolate", "inpaint"])
def test_interpolation_and_completion_are_checked_too(how):
    pipe = pipeline(at=9)
    x = torch.full((2, 1, 8, 8), 0.5)
    with pytest.raises(FloatingPointError, match="at timestep 9 "):
        if how == "interpolate":
            pipe.interpolate(x, x, 1.0, 10)
        else:
            pipe.inpaint(x, x[:, :, :, :] * 0 + (torch.arange(8) > 3), 10, jump_n_sample=1)


def test_weights_that_are_not_finite_are_named_first():
    pipe = pipeline()
    pipe.unet.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="1 of its 1 weight tensors are not finite, the first is weight"):
        pipe(2, 3)


def test_half_precision_is_named():
    pipe = pipeline()
    pipe.unet.weight.data.fill_(6e4)
    pipe.unet.half()
    with pytest.raises(FloatingPointError, match="range of float16, up to 65504: convert the model to torch.bfloat16"):
        pipe(2, 3)


def test_large_finite_values_are_no_error():
    """The sum of these is beyond float32, and the values are not."""
    pipe = pipeline(ndim=1, sample_size=64)
    out = pipe(1, 1, latents=torch.full((1, 1, 64), 3e38), output_type="latent").sequences
    assert out.isfinite().all() and not out.sum().isfinite()


def seeded():
    return torch.Generator().manual_seed(0)


UNITS = {"data_shift": [3.0], "data_scale": [5.0]}


@pytest.mark.parametrize("ndim, units", [(1, None), (1, UNITS), (2, None), (2, UNITS)])
@pytest.mark.parametrize("how", ["call", "interpolate", "inpaint", "vary", "keep"])
def test_latent_is_x0_in_the_units_of_the_model(how, ndim, units):
    pipe = pipeline(units, ndim=ndim)
    low, high = (-2.0, 8.0) if units else (0.0, 1.0) if ndim == 2 else (-1.0, 1.0)
    data = torch.rand(2, 1, *(8,) * ndim, generator=seeded()) * (high - low) + low
    mask = torch.arange(8) > 3

    def run(output_type):
        if how == "call":
            out = pipe(2, 5, generator=seeded(), output_type=output_type, return_all_timesteps=True)
            chain = out.trajectory
            assert tuple(chain.shape[:2]) == (2, 6) and torch.equal(torch.as_tensor(chain[:, -1]), out[0])
            return out[0]
        if how in ("vary", "keep"):
            items = {"sequence" if ndim == 1 else "image": data, "strength": 0.5 if how == "vary" else 0.0}
            return pipe(num_inference_steps=5, generator=seeded(), output_type=output_type, **items)[0]
        if how == "interpolate":
            return pipe.interpolate(data, data.flip(0), 0.5, 5, generator=seeded(), output_type=output_type)[0]
        return pipe.inpaint(data, mask.expand(*(8,) * ndim), 5, generator=seeded(), output_type=output_type)[0]

    latent, shown = run("latent"), run("pt")
    assert latent.dtype == torch.float32
    in_units = latent * (high - low) / 2 + (high + low) / 2
    expected = in_units.clamp(0, 1) if ndim == 2 and not units else in_units
    torch.testing.assert_close(shown, expected, rtol=1e-6, atol=1e-5)
    if how == "inpaint":
        torch.testing.assert_close(latent[..., :4], pipe._encode(data, "data")[..., :4], rtol=0, atol=0)


def test_latents_have_the_type_of_the_model_and_no_clamping():
    pipe = pipeline()
    pipe.unet.to(torch.bfloat16)
    out = pipe(1, 1, latents=torch.full((1, 1, 8, 8), 6.0), output_type="latent", return_dict=False)
    assert out[0].dtype == torch.bfloat16 and (out[0] == 3).all()


@pytest.mark.parametrize("units", [None, UNITS])
@pytest.mark.parametrize("how", ["sequential", "extend"])
def test_longer_series_have_it_too(how, units):
    pipe = pipeline(units, ndim=1)
    data = torch.rand(2, 1, 20, generator=seeded())

    def run(output_type):
        options = {"num_inference_steps": 5, "generator": seeded(), "output_type": output_type}
        return (pipe.extend(data, 30, **options) if how == "extend" else pipe(2, length=30, method=how, **options))[0]

    latent, shown = run("latent"), run("pt")
    assert latent.shape == (2, 1, 30)
    torch.testing.assert_close(pipe._decode(latent, "pt"), shown, rtol=1e-5, atol=1e-5)
