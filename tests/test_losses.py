"""The objective: targets, weights, draws, immiscible noise, self-conditioning."""

import itertools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import exact_abar
from scipy.special import expit
from scipy.stats import norm

from ddpm_hf import DDPMPipeline1D, TrainConfig, UNet1D
from ddpm_hf.losses import diffusion_loss, first_step_warning, immiscible_assignment, training_draws
from ddpm_hf.scheduler import PREDICTION_TYPES, GaussianScheduler


class Spy:
    """A model that gives a fixed output and remembers its inputs."""

    def __init__(self, output):
        self.output, self.calls = output, []

    def __call__(self, x_t, t, x_self_cond=None):
        self.calls.append(SimpleNamespace(x_t=x_t, t=t, x_self_cond=x_self_cond, grad=torch.is_grad_enabled()))
        return SimpleNamespace(sample=self.output)


@pytest.fixture
def batch():
    return SimpleNamespace(
        x0=torch.rand(6, 2, 4, dtype=torch.float64) * 2 - 1,
        noise=torch.randn(6, 2, 4, dtype=torch.float64),
        t=torch.tensor([0, 10, 200, 500, 900, 999]),
        out=torch.randn(6, 2, 4, dtype=torch.float64),
    )


@pytest.mark.parametrize("target,gamma", list(itertools.product(PREDICTION_TYPES, [None, 5.0])))
def test_loss_by_hand(batch, target, gamma):
    """weight(t) * mean((output - target)^2), written out sample by sample."""
    s = GaussianScheduler(prediction_type=target)
    kept = {name: value.clone() for name, value in vars(batch).items()}
    model = Spy(batch.out)
    got = diffusion_loss(model, s, batch.x0, batch.t, batch.noise, min_snr_gamma=gamma).loss
    for i, t in enumerate(batch.t.tolist()):
        abar = exact_abar(s)[t].item()
        a, b = abar**0.5, (1 - abar) ** 0.5
        snr = abar / (1 - abar)
        x0, eps = batch.x0[i], batch.noise[i]
        wanted = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[target]
        clipped = min(snr, gamma) if gamma else snr
        weight = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[target]
        assert got[i].item() == pytest.approx(weight * ((batch.out[i] - wanted) ** 2).mean().item(), rel=1e-10)
        torch.testing.assert_close(model.calls[0].x_t[i], a * x0 + b * eps, rtol=1e-12, atol=1e-12)
    for name, value in kept.items():
        assert torch.equal(getattr(batch, name), value), f"{name} was changed"


def test_uniform_weights_are_one(batch):
    """A model that is wrong by 2 everywhere has a loss of 4 at every timestep, whatever gamma."""
    s = GaussianScheduler(1000, prediction_type="v_prediction")
    wrong = s.target(batch.x0, batch.noise, batch.t) + 2

    def model(x, t):
        return SimpleNamespace(sample=wrong)

    loss = diffusion_loss(model, s, batch.x0, batch.t, batch.noise, weighting="uniform", min_snr_gamma=5.0).loss
    torch.testing.assert_close(loss, torch.full_like(loss, 4.0), rtol=1e-5, atol=0)  # a sum of float32 at most
    with pytest.raises(ValueError, match="one of snr, uniform, got 'v'"):
        diffusion_loss(model, s, batch.x0, batch.t, batch.noise, weighting="v")


def test_immiscible_assignment_is_the_best_of_all():
    """Against all 720 permutations of 6 samples."""
    x0, noise = torch.randn(2, 6, 3, dtype=torch.float64)
    cost = torch.cdist(x0, noise)
    best = min(itertools.permutations(range(6)), key=lambda p: sum(cost[i, j].item() for i, j in enumerate(p)))
    assert immiscible_assignment(x0, noise).tolist() == list(best)


def test_immiscible_noise_is_in_x_t_and_in_the_target(batch):
    """A model that reads the assigned noise off x_t has no loss: both use the same assignment."""
    s = GaussianScheduler(prediction_type="epsilon")

    def oracle(x_t, t, x_self_cond=None):
        return SimpleNamespace(sample=s.epsilon_from_x0(x_t, t, batch.x0))

    loss = diffusion_loss(oracle, s, batch.x0, batch.t, batch.noise, immiscible=True).loss
    # sqrt(1 - abar_0) = 0.015 magnifies rounding
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-24)
    assert immiscible_assignment(batch.x0, batch.noise).tolist() != list(range(6))


def test_self_conditioning_shows_the_models_own_estimate(batch):
    s = GaussianScheduler(prediction_type="v_prediction")
    model = Spy(batch.out)
    diffusion_loss(model, s, batch.x0, batch.t, batch.noise, self_condition=True)
    first, second = model.calls
    assert first.x_self_cond is None and not first.grad and second.grad
    expected = s.x0_from_v(first.x_t, batch.t, batch.out)
    torch.testing.assert_close(second.x_self_cond, expected, rtol=1e-12, atol=1e-12)


@contextmanager
def no_cache():
    """Autocast without a cache, also where a model's own autocast turns it on."""
    turn = torch.set_autocast_cache_enabled
    turn(False)
    torch.set_autocast_cache_enabled = lambda enabled: turn(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled = turn


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("before", ["estimate", "sampling"])
def test_all_gradients_after_a_call_without_them_under_autocast(wrapped, before):
    """To the bit those of a step that casts each weight anew: after the estimate of self-conditioning, and after a
    pipeline has sampled in the middle of a step; alone, and in the autocast in which accelerate wraps a model."""
    s, net = GaussianScheduler(), UNet1D(16, 1, dim=8, dim_mults=(1, 2), self_condition=before == "estimate")
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(net) if wrapped else net
    pipe = DDPMPipeline1D(model, GaussianScheduler(), num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    x0, noise, t = torch.rand(4, 1, 16) * 2 - 1, torch.randn(4, 1, 16), torch.tensor([10, 200, 500, 900])
    gradients = []
    for fresh in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), no_cache() if fresh else nullcontext():
            if before == "sampling":
                pipe(batch_size=1, generator=torch.Generator().manual_seed(0))
            loss = diffusion_loss(model, s, x0, t, noise, self_condition=before == "estimate").loss.mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    kept, anew = gradients
    assert [name for name, gradient in kept.items() if gradient is None] == []
    for name, gradient in anew.items():
        assert torch.equal(kept[name], gradient), name


def test_autocast_keeps_nothing_of_the_estimate(batch, monkeypatch):
    """On every torch: its cache is emptied between the call without gradients and the one with them."""
    order, empty = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (order.append("emptied"), empty()))

    def model(x, t, x_self_cond=None):
        order.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=torch.zeros_like(x))

    diffusion_loss(model, GaussianScheduler(), batch.x0, batch.t, batch.noise, self_condition=True)
    assert order == [False, "emptied", True]


def test_draws_follow_from_the_seeds():
    """A sample's draws are those of its seed, whatever the batch; timesteps are uniform."""
    s = GaussianScheduler(10)
    x0 = torch.zeros(2000, 1, 2)
    t, noise = training_draws(s, x0, range(2000), 0.1)
    t_part, noise_part = training_draws(s, x0[:3], [7, 8, 9], 0.1)
    assert torch.equal(t[7:10], t_part) and torch.equal(noise[7:10], noise_part)
    counts = torch.bincount(t, minlength=10)
    # binomial: 200 expected, deviation sqrt(2000 * 0.1 * 0.9) = 13.4
    assert counts.shape == (10,) and (counts - 200).abs().max() < 5 * 13.4
    with pytest.raises(ValueError, match="3 samples, 2 seeds"):
        training_draws(s, x0[:3], [1, 2])


def test_logit_normal_timesteps():
    """Their distribution by scipy's, at its quartiles; each sample's from its seed."""
    s = GaussianScheduler(1000)
    x0 = torch.zeros(2000, 1, 2)
    named = {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0}
    t, _ = training_draws(s, x0, range(2000), **named)
    assert torch.equal(t[7:10], training_draws(s, x0[:3], [7, 8, 9], **named)[0])
    for share in (0.25, 0.5, 0.75):
        quartile = 1000 * expit(norm.ppf(share, loc=0.5, scale=2.0))
        # binomial: deviation sqrt(2000 * share * (1 - share)) of at most 22.4; a whole timestep holds up to 0.2%
        assert abs((t < quartile).sum().item() - 2000 * share) < 5 * 22.4 + 4
    t, _ = training_draws(s, x0, range(2000), timestep_sampling="logit_normal", logit_mean=40.0)
    assert (t == 999).all()  # the sigmoid is 1
    with pytest.raises(ValueError, match="one of uniform, logit_normal, got 'cosine'"):
        training_draws(s, x0[:1], [1], timestep_sampling="cosine")


def test_bad_shapes(batch):
    s = GaussianScheduler()
    with pytest.raises(ValueError, match="shaped as x0"):
        diffusion_loss(Spy(batch.out), s, batch.x0, batch.t, batch.noise[:2])
    with pytest.raises(ValueError, match="learned variance"):
        diffusion_loss(Spy(torch.cat((batch.out, batch.out), 1)), s, batch.x0, batch.t, batch.noise)


def test_what_sampling_begins_with_is_trained():
    """With zero SNR: min-SNR and "snr" have a loss there, and logit-normal timesteps that miss it a warning."""
    s = GaussianScheduler(rescale_betas_zero_snr=True)
    x0, noise = torch.randn(2, 3, 1, 8)
    last = torch.full((3,), 999)
    for gamma in (None, 5.0):
        loss = diffusion_loss(Spy(torch.zeros(3, 1, 8)), s, x0, last, noise, min_snr_gamma=gamma).loss
        torch.testing.assert_close(loss, x0.square().flatten(1).mean(1))  # the target is -x0; before: 0

    def warned(**options):
        return first_step_warning(TrainConfig(**{"rescale_betas_zero_snr": True, **options}))

    assert warned() is None
    logit = {"timestep_sampling": "logit_normal"}
    # P(z >= log 999): of a normal number 2.5e-12, with the mean 5 and deviation 2 it is 0.17
    assert f"probability {norm.sf(np.log(999)):.2g}" in warned(**logit) and "t=999" in warned(**logit)
    assert warned(**logit, logit_mean=5.0, logit_std=2.0) is None
    assert first_step_warning(TrainConfig(**logit)) is None
