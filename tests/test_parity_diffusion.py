"""The diffusion is denoising-diffusion-pytorch's, number for number; where that is wrong, ours follows the maths."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import exact_abar
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as peer_2d
from denoising_diffusion_pytorch import denoising_diffusion_pytorch_1d as peer_1d
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset as PeerDataset
from ema_pytorch import EMA
from PIL import Image

from ddpm_hf import TrainConfig
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.data.images import image_folder
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer.ema import WeightAverage

TARGETS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
# A schedule's values are float64 in both, kept as float32 buffers there.
FLOAT32 = {"rtol": 2 * torch.finfo(torch.float32).eps, "atol": 0}


def exact_buffers(diffusion, scheduler, gamma=None):
    """Its buffers, which are rounded to float32, at full precision (test_buffers shows that they are the same)."""
    for name, value in our_buffers(scheduler, gamma).items():
        setattr(diffusion, name, value)
    return diffusion


def our_buffers(s, gamma=None):
    """Every buffer of its diffusion, from our scheduler's methods."""
    t = torch.arange(len(s))
    one, zero = torch.ones(len(s), 1, dtype=torch.float64), torch.zeros(len(s), 1, dtype=torch.float64)
    abar = exact_abar(s)
    previous = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    posterior = s.posterior(one, zero, t)
    return {
        "betas": torch.tensor(s.config.trained_betas),
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": s.add_noise(one, zero, t)[:, 0],
        "sqrt_one_minus_alphas_cumprod": s.add_noise(zero, one, t)[:, 0],
        "log_one_minus_alphas_cumprod": 2 * s.add_noise(zero, one, t)[:, 0].log(),
        "sqrt_recip_alphas_cumprod": s.x0_from_epsilon(one, t, zero)[:, 0],
        "sqrt_recipm1_alphas_cumprod": -s.x0_from_epsilon(zero, t, one)[:, 0],
        "posterior_variance": posterior.variance[:, 0],
        "posterior_log_variance_clipped": posterior.log_variance[:, 0].clamp(min=np.log(1e-20)),
        "posterior_mean_coef1": posterior.mean[:, 0],
        "posterior_mean_coef2": s.posterior(zero, one, t).mean[:, 0],
        "loss_weight": s.loss_weights(t, gamma),
    }


class Nothing(torch.nn.Module):
    """Stands for a model where only buffers are looked at."""

    channels = out_dim = 1
    self_condition = False


# its linear schedule of 20 steps ends at beta = 1
CASES = [
    case for case in itertools.product(["linear", "cosine", "sigmoid"], [20, 50, 250, 1000]) if case != ("linear", 20)
]


@pytest.mark.parametrize("schedule,steps", CASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_buffers(schedule, target, steps, gamma, double):
    s = GaussianScheduler(steps, schedule, prediction_type=target)
    ours = our_buffers(s, gamma)
    options = {"timesteps": steps, "objective": target, "beta_schedule": schedule}
    min_snr = {"min_snr_loss_weight": True, "min_snr_gamma": gamma} if gamma else {}
    peers = [GaussianDiffusion(Nothing(), image_size=8, **options, **min_snr)]
    if schedule != "sigmoid" and not gamma:
        peers.append(GaussianDiffusion1D(Nothing(), seq_length=8, **options))
    for peer in peers:
        buffers = dict(peer.named_buffers())
        assert buffers.keys() == ours.keys()
        for name, value in buffers.items():
            # float64 rounding of 1 - abar (1e-16 of 1) and of products, against values down to 1e-5, is below float32's
            atol = 1e-7 if name == "log_one_minus_alphas_cumprod" else 1e-12
            torch.testing.assert_close(
                ours[name].double(), value.double(), rtol=FLOAT32["rtol"], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# -- a model of each kind beside the original


def pair(ndim, target="pred_v", steps=20, schedule="cosine", unet=None, **options):
    """(its diffusion, our pipeline) with the same weights, both float64."""
    options = {"timesteps": steps, "objective": target, "beta_schedule": schedule, **options}
    unet = {"dim": 8, "dim_mults": (1, 2), "channels": 2 if ndim == 1 else 3, **(unet or {})}
    if ndim == 2:
        peer = GaussianDiffusion(Unet(**unet), image_size=8, **options)
    else:
        peer = GaussianDiffusion1D(Unet1D(**unet), seq_length=16, **options)
    pipe = from_denoising_diffusion_pytorch(
        peer.state_dict(),
        sampling_timesteps=options.get("sampling_timesteps"),
        ddim_sampling_eta=options.get("ddim_sampling_eta", 0.0),
        **({"image_size": 8} if ndim == 2 else {"seq_length": 16}),
    )
    pipe.unet.double().load_state_dict(pipe.unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    return exact_buffers(peer.eval(), pipe.scheduler, options.get("min_snr_gamma")), pipe


def assert_samples_equal(peer, pipe):
    """From the same seed both draw the same x_T, and the same noise in every step."""
    torch.manual_seed(11)
    expected = peer.sample(batch_size=3)
    got = pipe(3, generator=torch.Generator().manual_seed(11), output_type="pt", return_dict=False)[0]
    # the image pipeline gives float32; 20 to 50 steps in float64 stay far below its rounding
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if got.dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
    expected = expected.clamp(0, 1).to(got.dtype) if got.ndim == 4 else expected.to(got.dtype)
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("ndim,target", list(itertools.product([1, 2], TARGETS)))
def test_ddpm_chain(ndim, target, double):
    assert_samples_equal(*pair(ndim, target))


@pytest.mark.parametrize("ndim,target", list(itertools.product([1, 2], TARGETS)))
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("sampling_steps", [10, 7])
def test_ddim_chain(ndim, target, eta, sampling_steps, double):
    assert_samples_equal(*pair(ndim, target, 50, sampling_timesteps=sampling_steps, ddim_sampling_eta=eta))


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("sampling_steps", [None, 5])
def test_self_conditioned_chain(ndim, sampling_steps, double):
    assert_samples_equal(*pair(ndim, unet={"self_condition": True}, sampling_timesteps=sampling_steps))


def test_ddim_timesteps():
    """Its linspace(-1, T - 1, S + 1), truncated: the same for every S up to T of 1000, up to float32 rounding there."""
    s = GaussianScheduler()
    different = []
    for steps in range(1, 1001):
        s.set_timesteps(steps)
        exact = torch.linspace(-1, 999, steps + 1, dtype=torch.float64)
        theirs = torch.linspace(-1, 999, steps + 1, dtype=torch.float32).int().tolist()[:0:-1]
        if s.timesteps.tolist() != theirs:
            different.append(steps)
            wrong = [i for i, (a, b) in enumerate(zip(s.timesteps.tolist(), theirs)) if a != b]
            values = exact.flip(0)[wrong]
            # only where the exact value is a whole number, which float32 may put just below
            assert (values - values.round()).abs().max() < 1e-6
    assert len(different) < 100


# -- training loss


@pytest.mark.parametrize("target,gamma", list(itertools.product(TARGETS, [None, 5.0])))
@pytest.mark.parametrize("offset,self_condition", [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_training_loss_2d(target, gamma, offset, self_condition, double, monkeypatch):
    min_snr = {"min_snr_loss_weight": True, "min_snr_gamma": gamma} if gamma else {}
    unet = {"self_condition": self_condition}
    peer, pipe = pair(2, target, 50, unet=unet, offset_noise_strength=offset, **min_snr)
    monkeypatch.setattr(peer_2d, "random", lambda: 0.0)  # its coin: always condition where the model can
    x0, noise, t = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 3, 8, 8), torch.tensor([0, 20, 49])
    torch.manual_seed(5)
    expected = peer.p_losses(x0, t, noise=noise.clone(), loss_reduction="none")
    torch.manual_seed(5)
    ours = noise + offset * torch.randn(3, 3)[..., None, None] if offset else noise
    got = diffusion_loss(
        pipe.unet, pipe.scheduler, x0, t, ours, min_snr_gamma=gamma, self_condition=self_condition
    ).loss
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target,self_condition", list(itertools.product(TARGETS, [False, True])))
def test_training_loss_1d(target, self_condition, double, monkeypatch):
    peer, pipe = pair(1, target, 50, unet={"self_condition": self_condition})
    monkeypatch.setattr(peer_1d, "random", lambda: 0.0)
    x0, noise, t = torch.rand(3, 2, 16) * 2 - 1, torch.randn(3, 2, 16), torch.tensor([0, 20, 49])
    expected = peer.p_losses(x0, t, noise=noise, loss_reduction="none")
    got = diffusion_loss(pipe.unet, pipe.scheduler, x0, t, noise, self_condition=self_condition).loss
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# -- averaging


def test_ema_is_ema_pytorchs():
    """Its settings (0.995, every 10 steps, copies for 100, power 2/3), 300 steps of a walk of the weights."""
    model, twin = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).double()
    twin.load_state_dict(model.state_dict())
    ema = EMA(twin, beta=0.995, update_every=10)
    config = TrainConfig(
        dataset_name="digits", ema_max_decay=0.995, ema_update_every=10, ema_update_after_step=100, ema_power=2 / 3
    )
    ours = WeightAverage(model, Accelerator(cpu=True), config)
    ours.start(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters()):
                a.add_(torch.randn(a.shape, generator=generator, dtype=torch.float64))
                b.copy_(a)
        if (share := ours.share(step)) is not None:
            ours.update(share)
        ema.update()
        for a, b in zip(ours.ema.shadow_params, ema.ema_model.parameters()):
            # it computes the decay in float32: 6e-8 of weights that have walked some 50 far
            torch.testing.assert_close(a, b, rtol=0, atol=50 * torch.finfo(torch.float32).eps)


# -- where it is wrong


def test_interpolation_is_its_chain_from_one_step_higher(double, monkeypatch):
    """It noises to t, denoises from t - 1 on, and neither scales in nor out; ours starts at t, in natural units.

    Where it is right, the chain: given its mix as x at timestep t - 1, ours gives the same.
    """
    peer, pipe = pair(2, steps=20)
    asked = []
    monkeypatch.setattr(peer_2d.torch, "randn_like", lambda x: torch.zeros_like(x))  # no noise, in either
    p_sample = peer.p_sample
    peer.p_sample = lambda x, t, *a: (asked.append(t), p_sample(x, t, *a))[1]
    x1, x2 = torch.rand(2, 1, 3, 8, 8) * 2 - 1
    expected = peer.interpolate(x1, x2, t=10, lam=0.3)
    assert asked == list(range(9, -1, -1))
    mix = torch.lerp(*(pipe.scheduler.add_noise(x, torch.zeros_like(x), 10) for x in (x1, x2)), 0.3)
    pipe.scheduler.set_timesteps(20)
    x = mix
    with torch.no_grad():
        for t in range(9, -1, -1):
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x, variance_noise=torch.zeros_like(x)).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)

    seen = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, *a, **k: (seen.append(int(t)), forward(x, t, *a, **k))[1]
    out = pipe.interpolate((x1 + 1) / 2, (x2 + 1) / 2, strength=0.5, output_type="pt").images
    assert seen == list(range(9, -1, -1)) and out.min() >= 0 and out.max() <= 1
    first = pipe.scheduler.timesteps[10]
    assert first == 9  # noised to the level of the timestep that is denoised first


def test_immiscible_noise(monkeypatch):
    """Its x_t has the assigned noise, its target the noise before: a model that knows the noise still has a loss."""
    torch.manual_seed(0)
    unet = Unet(8, dim_mults=(1, 2), channels=1)
    peer = GaussianDiffusion(unet, image_size=8, timesteps=50, objective="pred_noise", immiscible=True)
    s = GaussianScheduler(50, prediction_type="epsilon")
    x0, noise, t = torch.rand(8, 1, 8, 8) * 2 - 1, torch.randn(8, 1, 8, 8), torch.full((8,), 30)
    oracle = lambda x, t, *a, **k: s.epsilon_from_x0(x, t, x0)  # noqa: E731
    monkeypatch.setattr(unet, "forward", oracle)
    assert peer.p_losses(x0, t, noise=noise).item() > 1
    known = lambda x, t: SimpleNamespace(sample=oracle(x, t))  # noqa: E731
    loss = diffusion_loss(known, s, x0, t, noise, immiscible=True).loss
    assert loss.max() < 1e-10


def test_offset_noise_leaves_the_callers_tensor():
    peer = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=50, offset_noise_strength=0.1)
    x0, noise = torch.zeros(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    kept = noise.clone()
    peer.p_losses(x0, torch.tensor([1, 2]), noise=noise)
    assert not torch.equal(noise, kept)
    like = kept.clone()
    GaussianScheduler().sample_noise(like, 0.1)
    assert torch.equal(like, kept)


def test_short_linear_schedules():
    assert peer_2d.linear_beta_schedule(10).max() > 1
    with pytest.raises(ValueError, match="at least 21 steps"):
        GaussianScheduler(10, "linear")


def test_pictures_are_found_and_not_squashed(tmp_path):
    """Of a wide picture with a square in it, its Dataset makes a narrow rectangle; .PNG and .webp it does not see."""
    array = np.zeros((40, 120, 3), np.uint8)
    array[10:30, 50:70] = 255
    for name in ("a.png", "b.PNG", "c.webp"):
        Image.fromarray(array).save(tmp_path / name, lossless=True)
    peer, ours = PeerDataset(tmp_path, (20, 20)), image_folder(str(tmp_path), (20, 20))
    assert len(peer) == 1 and len(ours) == 3
    inside = peer[0][0] > 0.5
    assert inside.any(1).sum() > 2 * inside.any(0).sum()
    inside = ours[0][0] > 0
    assert inside.any(1).sum() == inside.any(0).sum()
