"""The pipelines: sampling from a known distribution, forms of output, interpolation, self-conditioning, errors."""

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import load_program, optimal_prediction
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline import X0Estimate, log_snr_timesteps

spacing = load_program("studies/spacing")
SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def images(channels=3, size=8, steps=4, **options):
    unet = UNet2D(sample_size=size, in_channels=channels, **SMALL, **options)
    pipe = DDPMPipeline(unet, GaussianScheduler(), num_inference_steps=steps)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sequences(**options):
    unet = UNet1D(sample_size=16, in_channels=2, **SMALL, **options.pop("unet", {}))
    pipe = DDPMPipeline1D(unet, GaussianScheduler(), num_inference_steps=4, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class GaussianModel(diffusers.ModelMixin, diffusers.ConfigMixin):
    """The optimal model of N(mean, std^2) data, as a U-Net would be called."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=4, in_channels=1, mean=0.2, std=0.3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.scheduler = None

    def forward(self, x, t):
        return SimpleNamespace(sample=optimal_prediction(self.scheduler, x, int(t), self.config.mean, self.config.std))


@pytest.mark.parametrize("schedule, second", [("linear", None), ("cosine", None), ("sigmoid", 998)])
@pytest.mark.parametrize("steps", [6, 15, 40])
def test_timesteps_even_in_log_snr(schedule, second, steps):
    """Each lies at the timestep that is nearest to its place, or one below the one before. The places go from the noise
    of T-1, at most 500 times the signal, to t = 0; on the sigmoid schedule, which jumps from 58 to 1,800 times in its
    last step, from T-2."""
    abar = GaussianScheduler(beta_schedule=schedule).alphas_cumprod.double()
    log_snr = (abar / (1 - abar)).log()
    chain = log_snr_timesteps(abar, steps)
    assert chain[0] == 999 and len(chain) == steps
    first = log_snr[second] if second else log_snr[999].clamp(min=-2 * math.log(500))
    places = [first + (log_snr[0] - first) * i / (steps - 1 if second else steps) for i in range(steps)]
    for before, t, place in zip(chain, chain[1:], places if second else places[1:]):
        assert t < before
        assert t == before - 1 or (log_snr[t] - place).abs() <= (log_snr[:999] - place).abs().min() + 1e-12


def from_the_second(abar, steps):
    """The spacing of version 0.2.0: T-1, and from T-2 on evenly in log-SNR."""
    abar = abar.double().clamp(2**-24)
    log_snr = (abar / (1 - abar)).log()
    places = torch.lerp(log_snr[-2], log_snr[0], torch.linspace(0, 1, steps, dtype=torch.float64)[:-1])
    chain = [999]
    for t in (log_snr[:-1, None] - places).abs().argmin(dim=0).tolist():
        chain.append(min(t, chain[-1] - 1))
    return chain


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_no_call_of_the_fast_sampler_is_lost(schedule, zero_snr):
    """Over directions of deviations 0.1 to 32 it errs less than steps even in t, and not more than steps from T-2 on:
    on the linear schedule and with zero SNR, T-2 has noise as high as T-1, and the call there was lost."""
    own = GaussianScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, clip_sample=False)
    for calls in (4, 5, 6, 8, 10, 15, 20, 30):
        chain = log_snr_timesteps(own.alphas_cumprod, calls)
        error = spacing.error(own, chain)
        assert error < 0.85 * spacing.error(own, spacing.even_timesteps(own.alphas_cumprod, calls))
        before = spacing.error(own, from_the_second(own.alphas_cumprod, calls))
        if schedule == "sigmoid" and calls >= 5:
            assert chain == from_the_second(own.alphas_cumprod, calls)
        lost = schedule == "linear" and calls <= 15
        assert error <= (0.85 if lost else 1 + 1e-9) * before, (calls, error, before)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
def test_every_number_of_timesteps_can_be_had(total):
    abar = GaussianScheduler(total, beta_schedule="cosine").alphas_cumprod
    for steps in range(1, total + 1):
        chain = log_snr_timesteps(abar, steps)
        assert len(chain) == steps and chain[0] == total - 1 and chain[-1] >= 0
        assert all(a > b for a, b in zip(chain, chain[1:]))


def test_the_fast_sampler_interpolates_from_the_noise_that_strength_says():
    pipe = images().use_fast_sampler(20)
    started = []
    add_noise = pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda x, noise, t: (started.append(int(t[0])), add_noise(x, noise, t))[1]
    x = torch.rand(1, 3, 8, 8)
    for strength in (0.1, 0.5, 1.0):
        assert len(pipe.interpolate(x, x, strength).images) == 1
    chain = log_snr_timesteps(pipe.scheduler.alphas_cumprod, 20)
    assert started[::2] == [min(chain, key=lambda t: abs(t - (1000 * s - 1))) for s in (0.1, 0.5, 1.0)]


def test_another_scheduler_after_the_fast_sampler_has_its_own_steps():
    pipe = images(steps=4)
    for kind in (GaussianScheduler, diffusers.DPMSolverMultistepScheduler):
        pipe.use_fast_sampler().use_fast_sampler(9)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe()
        assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_the_fast_sampler_is_left_after_it_was_saved(tmp_path):
    pipe = images(steps=4).use_fast_sampler(7)
    pipe.save_pretrained(tmp_path)
    for again in (DDPMPipeline.from_pretrained(tmp_path), DDPMPipeline.from_pipe(pipe)):
        again.set_progress_bar_config(disable=True)
        again()
        assert again.scheduler.timesteps.tolist() == log_snr_timesteps(again.scheduler.alphas_cumprod, 7)
        again.scheduler = GaussianScheduler.from_config(again.scheduler.config)
        again()
        assert again.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    pipe()  # another pipeline of the same parts was left, not this one
    assert len(pipe.scheduler.timesteps) == 7


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["fast", "DDIMScheduler", "UniPCMultistepScheduler"])
def test_learned_variance_under_samplers_that_use_none(channels, name):
    """The half of the channels that predicts the variance changes nothing: as without it, weight for weight."""
    torch.manual_seed(0)
    unet = UNet2D(sample_size=8, in_channels=channels, learned_variance=True, **SMALL)
    plain = UNet2D(sample_size=8, in_channels=channels, **SMALL)
    weights = unet.state_dict()
    for name_of in ("out_stage.conv.weight", "out_stage.conv.bias"):
        weights[name_of] = weights[name_of][:channels]
    plain.load_state_dict(weights)
    samples = []
    for model, variance in ((unet, "learned_range"), (plain, "fixed_small")):
        pipe = DDPMPipeline(model, GaussianScheduler(variance_type=variance))
        pipe.set_progress_bar_config(disable=True)
        if name == "fast":
            pipe.use_fast_sampler(4)
        else:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        samples.append(pipe(2, 4, generator=seeds(1, 2), output_type="pt").images)
        assert GaussianScheduler.from_config(pipe.scheduler.config).config.variance_type == variance
    assert samples[0].shape == (2, channels, 8, 8)
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_the_estimate_for_self_conditioning_is_thresholded_as_configured(name):
    """Dynamic thresholding divides by the percentile instead of clamping at 1."""
    own = GaussianScheduler(thresholding=True, sample_max_value=3.0, dynamic_thresholding_ratio=0.9)
    pipe = DDPMPipeline(UNet2D(sample_size=8, self_condition=True, **SMALL), own)
    pipe.scheduler = getattr(diffusers, name).from_config(own.config)
    prediction, x = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = own.clip_x0(own.predict_x0(prediction, 500, x))
    clamped = own.predict_x0(prediction, 500, x).clamp(-1, 1)
    assert (expected - clamped).abs().max() > 0.3
    torch.testing.assert_close(X0Estimate(pipe.scheduler)(prediction, x, 500), expected, rtol=1e-5, atol=1e-5)


def test_a_callback_stops_the_chain():
    """As in stock pipelines: the steps that are left are not run, and the next call is whole again."""
    pipe, called = images(), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, **k: (called.append(int(t)), forward(x, t, **k))[1]

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    out = pipe(2, callback_on_step_end=stop, return_all_timesteps=True, output_type="pt")
    assert called == [999, 749] and pipe.interrupt and out.trajectory.shape[1] == 3
    assert torch.equal(out.images, out.trajectory[:, -1])
    pipe(2)
    assert len(called) == 6 and not pipe.interrupt


def test_from_pipe():
    """Both ways, with stock classes too: the same parts and settings, and what is given replaces them."""
    pipe = images(steps=3)
    copy = DDPMPipeline.from_pipe(pipe)
    assert copy.unet is pipe.unet and copy.scheduler is pipe.scheduler and copy.config.num_inference_steps == 3
    assert DDPMPipeline.from_pipe(pipe, num_inference_steps=2).config.num_inference_steps == 2
    with pytest.raises(ValueError, match="trained with 'v_prediction'"):
        DDPMPipeline.from_pipe(pipe, scheduler=diffusers.DDIMScheduler())
    stock = diffusers.DDIMPipeline.from_pipe(pipe, unet=pipe.unet)
    assert DDPMPipeline.from_pipe(stock).unet is pipe.unet
    one_d = sequences(data_shift=[10.0, -3.0], data_scale=[2.0, 0.5])
    assert DDPMPipeline1D.from_pipe(one_d).config.data_scale == [2.0, 0.5]
    with pytest.raises(ValueError, match="use DDPMPipeline1D"):
        DDPMPipeline.from_pipe(one_d)


def test_samples_of_a_known_distribution():
    """20,000 values: mean and deviation of N(0.2, 0.3^2), within five standard errors and DDIM's own error."""
    model, scheduler = GaussianModel(), GaussianScheduler(clip_sample=False)
    model.scheduler = scheduler
    pipe = DDPMPipeline1D(model, scheduler, num_inference_steps=100)
    pipe.set_progress_bar_config(disable=True)
    x = pipe(batch_size=5000, generator=torch.Generator().manual_seed(0)).sequences
    assert x.shape == (5000, 1, 4)
    n = x.size
    assert abs(x.mean() - 0.2) < 5 * 0.3 / n**0.5 + 0.002
    assert abs(x.std() / 0.3 - 1) < 5 / (2 * n) ** 0.5 + 0.02  # 0.02: sum of squared turns / 2 at 100 steps


@pytest.mark.parametrize("channels,mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_pil_images_by_channels(channels, mode):
    pipe = images(channels, size=(8, 12))
    got = pipe(batch_size=2).images
    assert [image.mode for image in got] == [mode] * 2 and got[0].size == (12, 8)


def test_forms_of_output_agree():
    pipe = images()
    kinds = {kind: pipe(2, generator=seeds(1, 2), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert kinds["np"].shape == (2, 8, 8, 3) and kinds["pt"].shape == (2, 3, 8, 8)
    assert kinds["np"].min() >= 0 and kinds["np"].max() <= 1
    np.testing.assert_array_equal(kinds["pt"].movedim(1, -1).numpy(), kinds["np"])
    np.testing.assert_array_equal(np.stack(kinds["pil"]), (kinds["np"] * 255).round().astype(np.uint8))
    assert np.array_equal(pipe(2, generator=seeds(1, 2), output_type="np", return_dict=False)[0], kinds["np"])


@pytest.mark.parametrize("steps", [4, 1000])
def test_one_generator_a_sample_frees_it_from_its_batch(steps):
    """DDIM and DDPM; with 1000 steps T is shortened to keep the test quick."""
    pipe = images()
    pipe.unet.double()
    if steps == 1000:
        pipe, steps = DDPMPipeline(pipe.unet, GaussianScheduler(20)), 20
        pipe.set_progress_bar_config(disable=True)
    together = pipe(3, steps, generator=seeds(5, 6, 7), output_type="pt", eta=0.5).images
    alone = pipe(1, steps, generator=seeds(6), output_type="pt", eta=0.5).images
    # the same numbers in float64; only the order of sums within the batch's convolutions may differ
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)


def test_latents_and_seeds():
    pipe = images()
    x_T = torch.randn(2, 3, 8, 8)
    kept = x_T.clone()
    a, b = (pipe(2, latents=x_T, output_type="pt").images for _ in range(2))
    assert torch.equal(a, b) and torch.equal(x_T, kept)
    c, d = (pipe(2, generator=torch.Generator().manual_seed(s), output_type="pt").images for s in (0, 1))
    assert not torch.equal(c, d)


def test_generators_in_a_tuple_and_inputs_with_gradients():
    pipe = images(1, steps=2)
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    for draw in (
        lambda generator: pipe(2, generator=generator, latents=x, return_all_timesteps=True, output_type="np")[1],
        lambda generator: pipe.inpaint(x, torch.eye(8), generator=generator, output_type="np", jump_n_sample=1)[0],
        lambda generator: pipe.interpolate(x, x.flip(0), generator=generator, output_type="np")[0],
    ):
        assert np.array_equal(draw(tuple(seeds(1, 2))), draw(seeds(1, 2)))
    pipe = sequences()
    assert pipe.extend(torch.zeros(1, 2, 9, requires_grad=True), 12, jump_n_sample=1)[0].shape == (1, 2, 12)
    np.testing.assert_array_equal(*(next(pipe.stream(9, 2, 2, kind(seeds(1, 2)))) for kind in (list, tuple)))


@pytest.mark.parametrize("timesteps", [[10, 900], [1900, 5], [], [5, 5], [5, -1], "5"])
def test_timesteps_of_stock_schedulers(timesteps):
    """Some of them take any timesteps, and give samples of no meaning for these."""
    pipe = images()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="descending numbers from 999 to 0"):
        pipe(timesteps=timesteps)


def test_trajectory():
    pipe = images()
    x_T = torch.randn(2, 3, 8, 8).clamp(-1, 1)
    out = pipe(2, latents=x_T, output_type="pt", return_all_timesteps=True)
    assert out.trajectory.shape == (2, 5, 3, 8, 8)
    torch.testing.assert_close(out.trajectory[:, 0], (x_T + 1) / 2)
    assert torch.equal(out.trajectory[:, -1], out.images)
    pil = pipe(2, latents=x_T, return_all_timesteps=True).trajectory
    assert len(pil) == 2 and len(pil[0]) == 5
    assert sequences()(2, return_all_timesteps=True).trajectory.shape == (2, 5, 2, 16)


def test_callback_sees_and_replaces_latents():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    out = images()(1, callback_on_step_end=callback, output_type="pt").images
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert torch.equal(out, torch.full_like(out, 0.5))


def test_progress_bar_can_be_silenced(capfd):
    pipe = images()
    pipe()
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe()
    assert "4/4" in capfd.readouterr().err


def test_sequences_come_in_the_units_of_the_data(tmp_path):
    pipe = sequences(data_shift=[10.0, -3.0], data_scale=[2.0, 0.5])
    plain = sequences()
    plain.unet.load_state_dict(pipe.unet.state_dict())
    a = pipe(3, generator=seeds(1, 2, 3)).sequences
    b = plain(3, generator=seeds(1, 2, 3)).sequences
    np.testing.assert_allclose(a, b * np.array([2, 0.5])[:, None] + np.array([10, -3])[:, None], rtol=1e-6)
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline1D.from_pretrained(tmp_path)
    assert np.array_equal(again(3, generator=seeds(1, 2, 3)).sequences, a)


def test_units_that_float32_cannot_hold():
    pipe = sequences(data_shift=[1e9, 0.0], data_scale=[2.0, 1e300])
    x = pipe(2).sequences
    assert x.dtype == np.float64 and np.isfinite(x).all() and x[:, 0].std() > 0
    assert pipe.interpolate(x[:1], x[1:]).sequences.shape == (1, 2, 16)


def test_one_of_shift_and_scale_brings_the_other():
    """Everything that reads a pipeline then knows its units by its scale."""
    parts = UNet2D(sample_size=8, in_channels=1, **SMALL), GaussianScheduler()
    assert DDPMPipeline(*parts, data_shift=[5]).config.data_scale == [1.0]
    assert DDPMPipeline(*parts, data_scale=[2]).config.data_shift == [0.0]
    assert "data_scale" not in DDPMPipeline(*parts).config and sequences().config.data_scale is None


def test_interpolation_starts_from_the_mix_at_its_timestep():
    """One step of strength 1/4: the model is asked at the last timestep, at sqrt(abar) mix + sqrt(1 - abar) noise."""
    pipe = images(1)
    asked = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, *a, **k: (asked.append((x.clone(), int(t))), forward(x, t, *a, **k))[1]
    x1, x2 = torch.rand(2, 2, 1, 8, 8)
    kept = x1.clone()
    out = pipe.interpolate(x1, x2, 0.25, weights=[0.0, 0.3, 1.0], generator=torch.Generator().manual_seed(3),
                           output_type="pt")  # fmt: skip
    assert out.images.shape == (6, 1, 8, 8) and torch.equal(x1, kept)
    ((x, t),) = asked
    assert t == 249
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for row, weight in enumerate((0.0, 0.3, 1.0)):
        mix = (1 - weight) * (2 * x1 - 1) + weight * (2 * x2 - 1)
        expected = pipe.scheduler.add_noise(mix, noise, t)
        torch.testing.assert_close(x[row::3], expected, rtol=1e-5, atol=1e-6)


def test_interpolation_gives_what_it_takes():
    pil = images()
    ends = pil(2).images
    assert isinstance(pil.interpolate(ends[0], ends[1]).images[0], Image.Image)
    one_d = sequences(data_shift=[100.0, 0.0], data_scale=[5.0, 1.0])
    x = one_d(2).sequences
    out = one_d.interpolate(x[:1], x[1:], weights=[0, 0.5, 1]).sequences
    assert out.shape == (3, 2, 16) and (abs(out[:, 0] - 100) <= 5.001).all()
    for wrong in ({"weights": 1.5}, {"strength": 0.0}, {"x2": ends[:1]}, {"x2": torch.full((2, 3, 8, 8), 2.0)}):
        with pytest.raises(ValueError):
            pil.interpolate(**{"x1": ends, "x2": ends, **wrong})


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_self_conditioning_under_stock_schedulers(name, target):
    """Each call sees the x0 estimate of the call before, computed here from the model's input and output."""
    own = GaussianScheduler(prediction_type=target)
    unet = UNet2D(sample_size=8, self_condition=True, **SMALL)
    pipe = DDPMPipeline(unet, getattr(diffusers, name).from_config(own.config), num_inference_steps=5)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    forward = pipe.unet.forward

    def spy(x, t, x_self_cond=None):
        out = forward(x, t, x_self_cond)
        calls.append((x, t, x_self_cond, out.sample))
        return out

    pipe.unet.forward = spy
    pipe(2, generator=seeds(1, 2))
    assert calls[0][2] is None and len(calls) >= 5
    for (x, t, _, out), (_, _, given, _) in zip(calls, calls[1:]):
        if float(t) == int(t):
            expected = own.predict_x0(out, int(t), x).clamp(-1, 1)
            given = given.clamp(-1, 1)  # Euler's estimate is not clipped
            torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-2)


def test_stock_pipelines_take_our_parts():
    pipe = images()
    for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        stock = kind(unet=pipe.unet, scheduler=pipe.scheduler)
        stock.set_progress_bar_config(disable=True)
        assert stock(batch_size=2, num_inference_steps=3).images[0].size == (8, 8)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batch_size": 0}, "batch_size"), ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "1001"), ({"output_type": "jpeg"}, "'jpeg'"), ({"eta": -0.1}, "eta"),
        ({"generator": seeds(1)}, "got 1 generators"),
        ({"generator": 3}, "torch.Generator"), ({"eta": float("nan")}, "eta"), ({"latents": np.zeros(3)}, "tensor"),
        ({"latents": torch.zeros(2, 3, 8, 9)}, r"\(2, 3, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "latents"), ({"timesteps": [3, 5]}, "descending"),
        ({"callback_on_step_end_tensor_inputs": None}, "latents"), ({"callback_on_step_end": 3}, "callable"),
        ({"eta": 2.0}, "from 0 to 1"), ({"eta": True}, "from 0 to 1"), ({"eta": "0"}, "from 0 to 1"),
        ({"num_inference_steps": 3, "timesteps": [5, 3]}, "not both"),
    ],
)  # fmt: skip
def test_bad_calls(options, message):
    """Each is refused before the model is called."""
    pipe = images()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**{"batch_size": 2, **options})


def test_bad_parts():
    with pytest.raises(ValueError, match="5: use 'np' or 'pt'"):
        images(5)(1)
    assert images(5)(1, output_type="np").images.shape == (1, 8, 8, 5)
    with pytest.raises(ValueError, match="data_scale"):
        sequences(data_scale=[1.0, -1.0])
    with pytest.raises(ValueError, match="data_shift"):
        sequences(data_shift=[1.0])
    with pytest.raises(ValueError, match="num_inference_steps"):
        DDPMPipeline(UNet2D(**SMALL), GaussianScheduler(), 0)
    unsized = DDPMPipeline(UNet2D(**SMALL), GaussianScheduler())
    with pytest.raises(ValueError, match="sample_size: give latents"):
        unsized(1)
    assert unsized(1, 2, latents=torch.randn(1, 3, 8, 6), output_type="pt").images.shape == (1, 3, 8, 6)
    with pytest.raises(ValueError, match=r"latents must be a tensor of the shape \(1, 3, 8, 6\)"):
        unsized(1, 2, latents=torch.randn(1, 2, 8, 6))
    pipe = images()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no eta"):
        pipe(1, eta=0.5)


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_a_scheduler_given_at_loading_ends_the_fast_sampler(tmp_path, kind):
    model = UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=(1, 2))
    pipe = DDPMPipeline(model, GaussianScheduler(50), num_inference_steps=20).use_fast_sampler(5)
    pipe.save_pretrained(tmp_path)
    other = kind.from_config(pipe.scheduler.config)
    for made in (
        DDPMPipeline.from_pretrained(tmp_path, scheduler=other),
        DDPMPipeline.from_pipe(pipe, scheduler=other),
    ):
        assert not made.is_spaced_by_log_snr() and made.config.num_inference_steps == 20
    kept = DDPMPipeline.from_pretrained(tmp_path)
    assert kept.is_spaced_by_log_snr() and kept.config.num_inference_steps == 5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_way_back_from_the_fast_sampler_keeps_the_spacing(spacing, tmp_path):
    model = UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=(1, 2))
    pipe = DDPMPipeline(model, GaussianScheduler(50, timestep_spacing=spacing))
    pipe.use_fast_sampler(5).use_fast_sampler(6).save_pretrained(tmp_path)
    for fast in (pipe, DDPMPipeline.from_pretrained(tmp_path)):
        own = GaussianScheduler.from_config(fast.scheduler.config)
        assert own.config.timestep_spacing == spacing
        assert (
            GaussianScheduler.from_config(own.config, timestep_spacing="leading").config.timestep_spacing == "leading"
        )
