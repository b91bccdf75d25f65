"""With stock diffusers: its schedulers in our pipeline on data with a known answer, our parts in its pipelines."""

import itertools
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import exact_abar
from diffusers.configuration_utils import register_to_config

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.scheduler import BETA_SCHEDULES, PREDICTION_TYPES

STOCK = ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
         "HeunDiscreteScheduler", "DEISMultistepScheduler"]  # fmt: skip
MEAN, STD, STEPS = 0.3, 0.5, 100


class GaussianModel(diffusers.ModelMixin, diffusers.ConfigMixin):
    """The optimal prediction for x0 ~ N(MEAN, STD^2), at whole timesteps and between them."""

    @register_to_config
    def __init__(self, sample_size=1, in_channels=1, std=STD):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.scheduler = None

    def forward(self, x, t):
        sigmas = (1 / exact_abar(self.scheduler) - 1).sqrt()
        low = int(t)
        sigma = torch.lerp(sigmas[low], sigmas[min(low + 1, len(sigmas) - 1)], float(t) - low)
        abar = (1 / (1 + sigma**2)).item()
        residual = x - abar**0.5 * MEAN
        std = self.config.std
        total = std**2 * abar + 1 - abar
        x0 = MEAN + std**2 * abar**0.5 / total * residual
        epsilon = (1 - abar) ** 0.5 / total * residual
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x0
        kinds = {"sample": x0, "epsilon": epsilon, "v_prediction": v}
        return SimpleNamespace(sample=kinds[self.scheduler.config.prediction_type])


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("schedule,target", list(itertools.product(BETA_SCHEDULES, PREDICTION_TYPES)))
def test_stock_schedulers_on_gaussian_data(name, schedule, target, diffusers_log):
    """Every one is deterministic, and affine in x_T for this model: x_0 = a x_T + b has mean b and deviation |a|.

    The bound is DDIM's: half the sum of the squared turns of (STD sqrt(abar), sqrt(1 - abar)), see test_scheduler.py;
    the multistep solvers of higher order have to do as well. Heun's steps in sigma have a closed form of their own.
    """
    own = GaussianScheduler(beta_schedule=schedule, prediction_type=target, clip_sample=False)
    model = GaussianModel()
    model.scheduler = own
    pipe = DDPMPipeline1D(model, getattr(diffusers, name).from_config(own.config))
    pipe.set_progress_bar_config(disable=True)
    x_T = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    zero, one = pipe(2, STEPS, latents=x_T, output_type="pt").sequences.flatten().tolist()
    assert not diffusers_log.records, diffusers_log.text

    own.set_timesteps(STEPS)
    abar = torch.cat((exact_abar(own)[own.timesteps], torch.ones(1, dtype=torch.float64)))
    angle = torch.atan2((1 - abar).sqrt(), STD * abar.sqrt())
    bound = (angle.diff() ** 2).sum().item() / 2 + abs(1 - (STD**2 * abar[0] + 1 - abar[0]) ** -0.5).item()
    assert bound < 0.03
    if name == "HeunDiscreteScheduler":
        # it multiplies abar up in float32 (1e-5), and its first step, from sigma 2e4 to 60, magnifies that 300 times
        assert one - zero == pytest.approx(heun_deviation(own, pipe.scheduler.init_noise_sigma), rel=4e-3)
        return
    assert abs(abs(one - zero) / STD - 1) < bound
    assert abs(zero - MEAN) < bound * MEAN + 0.002


def heun_deviation(own, start):
    """Heun's method on dx/dsigma = sigma x / (sigma^2 + STD^2), from deviation `start` on; the last step is Euler's."""
    sigmas = [(1 / abar - 1) ** 0.5 for abar in exact_abar(own)[own.timesteps].tolist()]
    x = float(start)
    for sigma, after in itertools.pairwise(sigmas):
        slope = sigma / (sigma**2 + STD**2) * x
        ahead = x + (after - sigma) * slope
        x += (after - sigma) * (slope + after / (after**2 + STD**2) * ahead) / 2
    return x - sigmas[-1] * sigmas[-1] / (sigmas[-1] ** 2 + STD**2) * x


def test_clipping_is_carried_over():
    """The multistep solvers ignore clip_sample; our configuration says it as thresholding, which they follow."""
    config = GaussianScheduler().config
    x0 = torch.linspace(-3, 3, 32).reshape(2, 1, 16)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        stock = getattr(diffusers, name).from_config(config)
        torch.testing.assert_close(stock._threshold_sample(x0), x0.clamp(-1, 1))
        assert stock.config.thresholding
        assert not getattr(diffusers, name).from_config(GaussianScheduler(clip_sample=False).config).config.thresholding


def error(own, calls, fast, deviation):
    """Root mean square, over x_T, of the distance to the x0 that the exact solution leads to: MEAN + deviation * z, z
    of unit variance."""
    model = GaussianModel(sample_size=1, std=deviation)
    model.scheduler = own
    pipe = DDPMPipeline1D(model, own)
    pipe.set_progress_bar_config(disable=True)
    if fast:
        assert pipe.use_fast_sampler(calls) is pipe
    x = torch.randn(500, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    abar = exact_abar(own)[-1].item()
    exact = MEAN + deviation * (x - abar**0.5 * MEAN) / (deviation**2 * abar + 1 - abar) ** 0.5
    # the fast sampler's number of calls is the default now
    out = pipe(500, None if fast else calls, latents=x, output_type="pt").sequences
    return (out - exact).square().mean().sqrt().item(), pipe


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_the_fast_sampler_is_nearer_than_ddim_at_three_times_its_calls(schedule, target, diffusers_log):
    own = GaussianScheduler(beta_schedule=schedule, prediction_type=target, clip_sample=False)
    fast, pipe = error(own, 15, True, STD)
    assert fast < error(own, 45, False, STD)[0]
    assert list(pipe.scheduler.config.trained_betas) == list(own.config.trained_betas)
    assert pipe.scheduler.config.prediction_type == target
    assert not diffusers_log.records


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
def test_the_fast_sampler_on_what_many_pixels_share(schedule):
    """The brightness that 32 x 32 x 3 pixels share is one direction of deviation 0.58 * 55 = 32: seen through the
    highest noise, which evenly spaced steps cross in one. 10 calls against DDIM's 250."""
    own = GaussianScheduler(beta_schedule=schedule, clip_sample=False)
    assert error(own, 10, True, 32.0)[0] < 0.75 * error(own, 250, False, 32.0)[0]


def test_the_fast_sampler_keeps_clipping_and_is_left_again():
    own = GaussianScheduler()
    pipe = DDPMPipeline1D(GaussianModel(), own).use_fast_sampler(8)
    x0 = torch.linspace(-3, 3, 32).reshape(2, 1, 16)
    torch.testing.assert_close(pipe.scheduler._threshold_sample(x0), x0.clamp(-1, 1))
    pipe.use_fast_sampler(9)  # again
    back = GaussianScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(back.betas, own.betas, rtol=0, atol=0)
    torch.testing.assert_close(back.clip_x0(x0), x0.clamp(-1, 1))
    # data of another range is not clipped to [-1, 1]
    wide = DDPMPipeline1D(GaussianModel(), GaussianScheduler(clip_sample_range=4.0)).use_fast_sampler()
    assert not wide.scheduler.config.thresholding


@pytest.mark.parametrize("steps", [0, 1001, 2.5, True, "15", None])
def test_the_fast_sampler_takes_a_number_of_steps(steps):
    pipe = DDPMPipeline1D(GaussianModel(), GaussianScheduler())
    with pytest.raises(ValueError, match=r"num_inference_steps must be a whole number from 1 to 1000; got"):
        pipe.use_fast_sampler(steps)
    assert isinstance(pipe.scheduler, GaussianScheduler)


class KnowsTheAnswer(GaussianModel):
    """Predicts v of data that is 0.5 everywhere."""

    def forward(self, x, t):
        abar = exact_abar(self.scheduler)[int(t)].item()
        epsilon = (x - abar**0.5 * 0.5) / (1 - abar) ** 0.5
        return SimpleNamespace(sample=abar**0.5 * epsilon - (1 - abar) ** 0.5 * 0.5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler",
                                  "KDPM2DiscreteScheduler", "UniPCMultistepScheduler"])  # fmt: skip
@pytest.mark.parametrize("strength", [0.2, 0.3, 0.5, 1.0])
def test_interpolation_under_stock_schedulers(name, strength):
    """Between a thing and itself there is only that: the chain starts at a whole step, at its noise level."""
    own = GaussianScheduler()
    model = KnowsTheAnswer(sample_size=4)
    model.scheduler = own
    pipe = DDPMPipeline1D(model, getattr(diffusers, name).from_config(own.config))
    pipe.set_progress_bar_config(disable=True)
    x = torch.full((1, 1, 4), 0.5, dtype=torch.float64)
    out = pipe.interpolate(x, x, strength, 20, output_type="pt").sequences
    # between timesteps the model is asked at the one below; where they are whole it is exact up to float32
    torch.testing.assert_close(out.double(), x, rtol=0, atol=2e-2 if name.startswith("KDPM2") else 1e-3)


def test_interpolation_refuses_what_cannot_start_in_the_middle():
    own = GaussianScheduler(prediction_type="epsilon")
    pipe = DDPMPipeline1D(GaussianModel(), diffusers.PNDMScheduler.from_config(own.config))
    with pytest.raises(ValueError, match="PNDMScheduler.*strength must be 1"):
        pipe.interpolate(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0.5, 20)


@pytest.mark.parametrize("kind", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_our_parts_in_stock_pipelines(kind):
    """Stock pipelines give the images that ours gives with the same kind of step."""
    unet = UNet2D(sample_size=8, dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4).eval()
    own = GaussianScheduler(20)
    stock = kind(unet=unet, scheduler=own)
    ours = DDPMPipeline(unet, GaussianScheduler(20))
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    steps = 20 if kind is diffusers.DDPMPipeline else 5
    options = {"use_clipped_model_output": True} if kind is diffusers.DDIMPipeline else {}
    a = stock(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np",
              **options).images  # fmt: skip
    b = ours(2, steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    # stock DDIM keeps abar in float32; its last value of this schedule is 2e-5, so 1e-7 / 2e-5 of it
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-2 if steps == 5 else 1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_stock_ddim_steps_past_its_timesteps(spacing):
    """The fault that docs/samplers.md names: at 600 of 1000 steps its mean is 0.21 for 0.3, and ours is right."""
    own = GaussianScheduler(clip_sample=False, timestep_spacing=spacing, sampler="ddim")
    model = GaussianModel()
    model.scheduler = own
    means = []
    for scheduler in (own, diffusers.DDIMScheduler.from_config(own.config)):
        pipe = DDPMPipeline1D(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        zero = torch.zeros(1, 1, 1, dtype=torch.float64)
        means.append([pipe(1, steps, latents=zero, output_type="pt").sequences.item() for steps in (50, 600)])
    assert means[0] == pytest.approx([MEAN, MEAN], abs=1e-3)
    assert means[1][0] == pytest.approx(MEAN, abs=5e-3) and means[1][1] == pytest.approx(0.213, abs=2e-3)


def test_a_saved_scheduler_has_the_same_hidden_entries(tmp_path):
    own = GaussianScheduler(50, eta=0.5)
    own.save_pretrained(tmp_path)
    saved = GaussianScheduler.from_pretrained(tmp_path)
    assert saved.config["_use_default_values"] == own.config["_use_default_values"]
    assert dict(saved.config) == dict(own.config) == dict(GaussianScheduler.from_config(own.config).config)


# ---------------------------------------------------------------------------------------------
# What diffusers' tests of schedulers and pipelines expect of every one of theirs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in schedulers of diffusers
def test_a_scheduler_comes_back_from_each_that_is_compatible():
    own = GaussianScheduler(50)
    for kind in own.compatibles:
        try:
            back = GaussianScheduler.from_config(kind.from_config(own.config).config)
        except ImportError:  # some need further packages
            continue
        assert {name: back.config[name] for name in own.config} == dict(own.config), kind


def test_betas_may_be_an_array(tmp_path):
    own = GaussianScheduler(trained_betas=np.array([0.1, 0.3]))
    own.save_pretrained(tmp_path)
    assert GaussianScheduler.from_pretrained(tmp_path).betas.tolist() == own.betas.tolist()
    assert own.betas.tolist() == pytest.approx([0.1, 0.3])


def test_a_step_needs_no_chosen_timesteps_and_has_two_forms():
    own, x = GaussianScheduler(50), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 1):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        named = own.step(0.1 * x, t, x, generator=generators[0])
        plain = own.step(0.1 * x, t, x, generator=generators[1], return_dict=False)
        assert all(torch.equal(a, b) for a, b in zip(plain, named.to_tuple(), strict=True))
        assert named.prev_sample.shape == x.shape == own.scale_model_input(x, 0.0).shape
    own.set_timesteps(10)
    assert own.add_noise(x, torch.zeros_like(x), own.timesteps[5][None]).shape == x.shape  # one timestep for all


def test_the_previous_timestep_has_the_form_of_the_timestep():
    own = GaussianScheduler(1000, timestep_spacing="leading", steps_offset=1)
    own.set_timesteps(5)
    assert own.timesteps.tolist() == [801, 601, 401, 201, 1]
    previous = [own.previous_timestep(t) for t in own.timesteps]
    assert torch.equal(torch.stack(previous), torch.tensor([601, 401, 201, 1, -1]))
    assert own.previous_timestep(601) == 401 and own.previous_timestep(1) == -1


def test_a_callback_sees_and_changes_the_guidance():
    """A scale that a callback sets holds from the next step on, as in diffusers' pipelines with `_guidance_scale`."""
    unet = UNet1D(sample_size=8, dim=8, dim_mults=(1,), attn_heads=2, attn_dim_head=4, num_class_embeds=2).eval()
    pipe = DDPMPipeline1D(unet, GaussianScheduler(20))
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe(2, 2, generator=generator, class_labels=[0, 1], guidance_scale=3.0, output_type="pt", **options)[0]

    def end_it(pipe, step, timestep, tensors):
        seen.append((step, pipe.guidance_scale, pipe.num_timesteps))
        pipe._guidance_scale = 1.0

    seen = []
    of_first_step = draw(guidance_interval=(0.9, 1.0))
    assert torch.equal(draw(callback_on_step_end=end_it), of_first_step) and not torch.equal(draw(), of_first_step)
    assert seen == [(0, 3.0, 2), (1, 1.0, 2)]
    assert pipe.guidance_scale == 3.0


def test_unknown_attributes_are_errors():
    own = GaussianScheduler(50)
    own.register_to_config(of_ours=5)
    with pytest.warns(FutureWarning, match="of_ours"):
        assert own.of_ours == 5
    with pytest.raises(AttributeError, match="'GaussianScheduler' object has no attribute 'does_not_exist'"):
        own.does_not_exist  # noqa: B018


def test_a_pipeline_has_the_habits_of_diffusers(tmp_path, capsys):
    unet = UNet2D(sample_size=8, dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4).eval()
    pipe = DDPMPipeline(unet, GaussianScheduler(20))
    assert set(pipe.components) == {"unet", "scheduler"}

    def draw(pipe, count=1, **options):
        generator = [torch.Generator().manual_seed(i) for i in range(count)]
        return pipe(count, 2, generator=generator, output_type="np", **options)[0]

    first = draw(pipe)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(pipe, 3)[0] - first[0]).max() < 1e-4  # a sample does not depend on its batch
    assert np.array_equal(draw(pipe, return_dict=False), first)
    pipe.enable_attention_slicing(1)
    assert np.abs(draw(pipe) - first).max() < 1e-3
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    again = DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    capsys.readouterr()  # the bar of loading the parts
    assert np.abs(draw(again) - first).max() < 5e-4
    assert "2/2" not in capsys.readouterr().err
    pipe.to(torch.float16)
    assert pipe.unet.dtype == torch.float16
