"""Mathematics of GaussianScheduler against closed forms, inversion, Bayes' rule and stock schedulers."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from cards import tolerance
from conftest import exact_abar, optimal_prediction
from diffusers import DDIMScheduler

from ddpm_hf.scheduler import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    GaussianScheduler,
    cosine_betas,
    linear_betas,
    sigmoid_betas,
)

PAIRS = list(itertools.product(BETA_SCHEDULES, PREDICTION_TYPES))
EPS = torch.finfo(torch.float64).eps


def scheduler_of(schedule="cosine", target="epsilon", **options):
    return GaussianScheduler(beta_schedule=schedule, prediction_type=target, **options)


# -- schedules


def test_linear_schedule_is_ddpm_at_1000_steps():
    """At T = 1000 the betas are those of stock DDPM: 1e-4 to 0.02, evenly."""
    stock = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(linear_betas(1000), stock, rtol=4 * EPS, atol=0)


def test_cosine_schedule_is_squaredcos_cap_v2():
    """Stock diffusers computes the same betas by another formula; its alphas_cumprod are float32."""
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(cosine_betas(1000).float(), stock.betas, rtol=1e-5, atol=1e-7)


def test_sigmoid_schedule_has_the_closed_form_alphas_cumprod():
    """abar_t = (s(3) - s(6 t/T - 3)) / (s(3) - s(-3)), up to the cap on the last beta."""
    abar = torch.cumprod(1 - sigmoid_betas(1000), 0)
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    s = torch.special.expit
    three = torch.tensor(3.0, dtype=torch.float64)
    expected = (s(three) - s(6 * t - 3)) / (s(three) - s(-three))
    # each factor of the product carries a rounding error; s(3) - s(.) cancels to 2.7e-4 at the end
    torch.testing.assert_close(abar[:-1], expected, rtol=1000 * EPS / 2e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 250, 1000, 4000])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_lie_in_0_1(schedule, steps):
    if schedule == "linear" and steps <= 20:
        with pytest.raises(ValueError, match="at least 21 steps"):
            GaussianScheduler(num_train_timesteps=steps, beta_schedule=schedule)
        return
    betas = torch.tensor(GaussianScheduler(steps, beta_schedule=schedule).config.trained_betas)
    assert len(betas) == steps
    assert (betas > 0).all() and (betas < 1).all()


def test_zero_terminal_snr():
    """sqrt(abar) is shifted and scaled: its last value is 0, its first is kept, and it stays affine in the old one."""
    old = exact_abar(scheduler_of(target="v_prediction")).sqrt()
    new = scheduler_of(target="v_prediction", rescale_betas_zero_snr=True)
    assert new.alphas_cumprod[-1] == 0 and new.snr(999) == 0
    expected = (old - old[-1]) * old[0] / (old[0] - old[-1])
    torch.testing.assert_close(exact_abar(new).sqrt()[:-1], expected[:-1], rtol=1e-9, atol=0)
    again = GaussianScheduler.from_config(new.config)
    assert torch.equal(again.betas, new.betas) and again.config.beta_schedule == "cosine"
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        scheduler_of(target="epsilon", rescale_betas_zero_snr=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    new.set_timesteps(5)
    assert torch.isfinite(new.step(torch.randn_like(x), 999, x).prev_sample).all()


def test_trained_betas():
    betas = [0.1, 0.2, 0.3]
    scheduler = GaussianScheduler(trained_betas=betas)
    assert scheduler.config.trained_betas == betas and scheduler.config.num_train_timesteps == 3
    assert scheduler.config.beta_schedule == "trained"
    for wrong in ([0.1, 1.0], [0.0], [], [float("nan")]):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            GaussianScheduler(trained_betas=wrong)
    with pytest.raises(ValueError, match="3 and 4"):
        GaussianScheduler(4, trained_betas=betas)


# -- forward process and conversions


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_conversions_invert(schedule, device):
    """epsilon, x0 and v of one x_t convert into each other at every timestep, to 1e-12."""
    s = scheduler_of(schedule)
    t = torch.arange(1000, device=device)
    x0, eps = torch.randn(2, 1000, 4, dtype=torch.float64).to(device)
    x_t, v = s.add_noise(x0, eps, t), s.get_velocity(x0, eps, t)
    tight = tolerance(device, 1e-12, 1e-12)
    # dividing by sqrt(abar) or sqrt(1 - abar) magnifies the rounding of x_t
    by_signal = tolerance(device, 0, max(1e-12, 50 * EPS / exact_abar(s).min().sqrt().item()))
    by_noise = tolerance(device, 0, max(1e-12, 50 * EPS / (1 - exact_abar(s)).min().sqrt().item()))
    torch.testing.assert_close(s.x0_from_v(x_t, t, v), x0, **tight)
    torch.testing.assert_close(s.epsilon_from_v(x_t, t, v), eps, **tight)
    torch.testing.assert_close(s.epsilon_from_x0(x_t, t, s.x0_from_epsilon(x_t, t, eps)), eps, **by_noise)
    torch.testing.assert_close(s.x0_from_epsilon(x_t, t, s.epsilon_from_x0(x_t, t, x0)), x0, **by_signal)
    torch.testing.assert_close(s.epsilon_from_x0(x_t, t, x0), eps, **by_noise)


def test_add_noise_takes_ints_and_half_precision():
    s = scheduler_of()
    x0, eps = torch.randn(2, 3, 4)
    torch.testing.assert_close(s.add_noise(x0, eps, 10), s.add_noise(x0, eps, torch.full((3,), 10)))
    half = s.add_noise(x0.bfloat16(), eps.bfloat16(), torch.tensor([999, 5, 0]))
    assert half.dtype == torch.bfloat16
    # computed in float32: one rounding of the result, and of each input
    torch.testing.assert_close(half.float(), s.add_noise(x0, eps, torch.tensor([999, 5, 0])), rtol=2**-7, atol=2**-7)


WRONG = [-1, 50, 2.0, "3", None, torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0]),
         torch.tensor([True, False])]  # fmt: skip


@pytest.mark.parametrize("t", WRONG, ids=str)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity", "posterior", "x0_from_v", "bound_term", "snr"])
def test_wrong_timesteps_are_refused(method, t):
    """Of tensors the shape and type are checked, not the values, which may lie on a card."""
    s, x = scheduler_of(target="v_prediction", num_train_timesteps=50), torch.zeros(2, 1, 4)
    calls = {"x0_from_v": (x, t, x), "bound_term": (x, x, x, t), "snr": (t,)}
    if method == "snr" and isinstance(t, torch.Tensor) and t.shape == (3,):
        assert s.snr(t).shape == (3,)
        return
    with pytest.raises(ValueError, match="must be an integer from 0 to 49, or a tensor of such integers"):
        getattr(s, method)(*calls.get(method, (x, x, t)))


def test_the_forms_of_timesteps_are_one():
    """NumPy's integers, tensors of 0 or 1 axes, and one sample at several timesteps."""
    s, x = scheduler_of(num_train_timesteps=50), torch.randn(2, 3, 4)
    forms = (np.int64(7), torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7], dtype=torch.int32))
    for t in forms:
        torch.testing.assert_close(s.add_noise(x, x, t), s.add_noise(x, x, 7))
    assert s.add_noise(x[:1], x[:1], torch.arange(5)).shape == (5, 3, 4)
    s.set_timesteps(50)
    for t in forms[:3]:
        assert torch.equal(s.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample,
                           s.step(x, 7, x, generator=torch.Generator().manual_seed(0)).prev_sample)  # fmt: skip


@pytest.mark.parametrize("t", [torch.tensor([7, 7]), torch.tensor([]), "7", 7.5, None], ids=str)
def test_a_step_has_one_timestep(t):
    s, x = scheduler_of(num_train_timesteps=50), torch.zeros(2, 1, 4)
    for call in (lambda: s.step(x, t, x), lambda: s.previous_timestep(t)):
        with pytest.raises(ValueError, match="a sampling step has one timestep for all samples, a whole number; got"):
            call()


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("t", [1, 7, 30, 49])
def test_posterior_is_bayes_rule(schedule, t):
    """q(x_{t-1} | x_t, x0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x0), normalised by numerical integration."""
    s = scheduler_of(schedule, num_train_timesteps=50)
    x0, x_t = 0.7, -0.4
    beta, abar_prev = s.config.trained_betas[t], exact_abar(s)[t - 1].item()
    prior_mean, prior_std = abar_prev**0.5 * x0, (1 - abar_prev) ** 0.5
    z = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    x = prior_mean + prior_std * z
    exponent = -((x_t - (1 - beta) ** 0.5 * x) ** 2) / (2 * beta) - z**2 / 2
    density = torch.exp(exponent - exponent.max())
    mean = (x * density).sum() / density.sum()
    variance = ((x - mean) ** 2 * density).sum() / density.sum()
    ours = s.posterior(torch.tensor([[x0]], dtype=torch.float64), torch.tensor([[x_t]], dtype=torch.float64), t)
    # the sum over an even grid converges faster than any power for smooth densities that vanish at both ends
    torch.testing.assert_close(ours.mean.squeeze(), mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.variance.squeeze(), variance, rtol=1e-9, atol=1e-12)


# -- sampling: for Gaussian data every step is linear, so mean and variance propagate exactly


def propagate(scheduler, steps, mean, std, **options):
    """Mean and variance of the samples for x0 ~ N(mean, std^2) and the optimal model, from x_T ~ N(0, 1)."""
    scheduler.set_timesteps(steps)
    m, v = 0.0, 1.0
    for t in scheduler.timesteps.tolist():
        x = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        noise = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
        out = scheduler.step(
            optimal_prediction(scheduler, x, t, mean, std), t, x, variance_noise=noise, **options
        ).prev_sample
        offset, slope, deviation = out[0].item(), (out[1] - out[0]).item(), (out[2] - out[0]).item()
        m, v = slope * m + offset, slope**2 * v + deviation**2
    return m, v


@pytest.mark.parametrize("schedule,target", PAIRS)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddim_on_gaussian_data(schedule, target, steps):
    """DDIM turns the vector (std sqrt(abar), sqrt(1 - abar)) step by step; each turn by an angle d scales by cos d.

    So the samples' deviation is std * prod(cos d_i) / |first vector| exactly, and 1 - prod(cos d) <= sum(d^2) / 2.
    """
    mean, std = 0.3, 0.5
    s = scheduler_of(schedule, target, clip_sample=False, sampler="ddim")
    got_mean, got_variance = propagate(s, steps, mean, std)
    abar = torch.cat((exact_abar(s)[s.timesteps], torch.ones(1, dtype=torch.float64)))
    angle = torch.atan2((1 - abar).sqrt(), std * abar.sqrt())
    turns = angle[:-1] - angle[1:]
    first = (std**2 * abar[0] + 1 - abar[0]).sqrt()
    factor = (turns.cos().prod() * std / first).item()
    assert got_variance**0.5 == pytest.approx(factor, rel=1e-9)
    assert got_mean == pytest.approx(mean - factor * abar[0].sqrt().item() * mean, abs=1e-9)
    assert abs(got_variance**0.5 / std - 1) <= (turns**2).sum().item() / 2 + abs(1 / first.item() - 1) + 1e-12
    if steps == 1000:
        assert got_variance**0.5 == pytest.approx(std, rel=0.01) and got_mean == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("schedule,target", PAIRS)
@pytest.mark.parametrize("steps", [100, 1000])
def test_ddpm_on_gaussian_data(schedule, target, steps):
    """The exact reverse kernel would give back N(mean, std^2); `fixed_small` leaves out Var(x0 | x_t).

    What is missing in a step, c0^2 Var(x0 | x_t), propagates with the square of the later slopes.
    """
    mean, std = -0.2, 0.6
    s = scheduler_of(schedule, target, num_train_timesteps=steps, clip_sample=False)
    got_mean, got_variance = propagate(s, steps, mean, std)
    abar = [*exact_abar(s).tolist(), 1.0]
    deficit = std**2 * abar[steps - 1] + (1 - abar[steps - 1]) - 1.0  # of the first x_T against N(0, 1)
    shift = -(abar[steps - 1] ** 0.5) * mean
    for t in reversed(range(steps)):
        now, prev = abar[t], abar[t - 1]
        beta, total = 1 - now / prev, std**2 * now + 1 - now
        c0, ct = prev**0.5 * beta / (1 - now), (1 - beta) ** 0.5 * (1 - prev) / (1 - now)
        slope = c0 * std**2 * now**0.5 / total + ct
        deficit = slope**2 * deficit + c0**2 * std**2 * (1 - now) / total
        shift = slope * shift
    assert got_variance == pytest.approx(std**2 - deficit, rel=1e-9)
    assert got_mean == pytest.approx(mean + shift, abs=1e-9)
    if steps == 1000:
        assert got_variance**0.5 == pytest.approx(std, rel=0.02) and got_mean == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("schedule,target", PAIRS)
@pytest.mark.parametrize("steps", [1000, 20])
def test_ddim_with_eta_1_is_ddpm_of_fixed_small(schedule, target, steps):
    ddpm = scheduler_of(schedule, target, sampler="ddpm")
    ddim = scheduler_of(schedule, target, sampler="ddim", eta=1.0)
    x, out, noise = torch.randn(3, 4, 2, dtype=torch.float64)
    for s in (ddpm, ddim):
        s.set_timesteps(steps)
    for t in ddpm.timesteps.tolist()[:: max(1, steps // 10)]:
        a = ddpm.step(out, t, x, variance_noise=noise).prev_sample
        b = ddim.step(out, t, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_fixed_large_has_variance_beta():
    s = scheduler_of(variance_type="fixed_large")
    x, out = torch.zeros(2, 1, 2, dtype=torch.float64)
    noise = torch.ones_like(x)
    for t in (1, 500, 999):
        spread = s.step(out, t, x, variance_noise=noise).prev_sample - s.step(out, t, x, variance_noise=0 * noise)[0]
        deviation = torch.full((1, 2), s.config.trained_betas[t] ** 0.5, dtype=torch.float64)
        torch.testing.assert_close(spread, deviation, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share,expected", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_ends_are_the_fixed_variances(share, expected):
    x, out, noise = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    learned = scheduler_of(variance_type="learned_range")
    fixed = scheduler_of(variance_type=expected)
    both = torch.cat((out, torch.full_like(out, share)), dim=1)
    a = learned.step(both, 300, x, variance_noise=noise).prev_sample
    torch.testing.assert_close(a, fixed.step(out, 300, x, variance_noise=noise).prev_sample, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="channels"):
        learned.step(out, 300, x)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_steps_are_those_of_stock_schedulers(target):
    """DDIM and DDPM of diffusers, made from our configuration, step alike (they compute abar in float32)."""
    ours = scheduler_of("sigmoid", target)
    x, out = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for steps, kind in ((50, diffusers.DDIMScheduler), (1000, diffusers.DDPMScheduler)):
        stock = kind.from_config(ours.config)
        ours.set_timesteps(steps)
        stock.set_timesteps(steps)
        assert torch.equal(ours.timesteps, stock.timesteps)
        for t in (ours.timesteps[1], ours.timesteps[steps // 2], ours.timesteps[-1]):
            options = {"use_clipped_model_output": True} if steps == 50 else {}
            a = ours.step(out, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            b = stock.step(out, t, x, generator=torch.Generator().manual_seed(0), **options).prev_sample
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_timesteps():
    s = scheduler_of()
    for steps in range(1, 1001):
        s.set_timesteps(steps)
        chain = s.timesteps.tolist()
        assert len(chain) == steps == s.num_inference_steps and chain[0] == 999
        assert all(a > b for a, b in itertools.pairwise(chain)) and chain[-1] >= 0
        assert s.previous_timestep(chain[-1]) == -1
    assert s.timesteps.dtype == torch.int64 and len(s) == 1000
    s.set_timesteps(timesteps=[900, 5, 0])
    assert s.timesteps.tolist() == [900, 5, 0] and s.previous_timestep(900) == 5
    for wrong in (0, 1001, 2.5, True, "ten"):
        with pytest.raises(ValueError, match="from 1 to 1000"):
            s.set_timesteps(wrong)
    for wrong in ([5, 6], [1000], [-1], []):
        with pytest.raises(ValueError, match="descending"):
            s.set_timesteps(timesteps=wrong)
    with pytest.raises(ValueError, match="not one of the chosen"):
        s.step(torch.zeros(1, 1), 7, torch.zeros(1, 1))
    for spacing, ends in (("linspace", (999, 0)), ("leading", (900, 0))):
        other = scheduler_of(timestep_spacing=spacing)
        other.set_timesteps(10)
        assert (other.timesteps[0], other.timesteps[-1]) == ends


def test_auto_is_ddpm_only_with_every_step():
    """A DDPM step adds noise, a DDIM step of eta 0 none."""
    s = scheduler_of()
    x, out = torch.randn(2, 1, 5)
    for steps, noisy in ((1000, True), (999, False)):
        s.set_timesteps(steps)
        draws = [s.step(out, 999, x, generator=torch.Generator().manual_seed(i)).prev_sample for i in (0, 1)]
        assert torch.equal(*draws) != noisy


def test_clipping_and_thresholding():
    x0 = torch.linspace(-4, 4, 101).reshape(1, 1, 101)
    assert torch.equal(scheduler_of().clip_x0(x0), x0.clamp(-1, 1))
    assert torch.equal(scheduler_of(clip_sample_range=2.0).clip_x0(x0), x0.clamp(-2, 2))
    assert torch.equal(scheduler_of(clip_sample=False).clip_x0(x0), x0)
    dynamic = scheduler_of(thresholding=True, sample_max_value=10.0, dynamic_thresholding_ratio=0.9)
    s = torch.quantile(x0.abs(), 0.9)
    torch.testing.assert_close(dynamic.clip_x0(x0), x0.clamp(-s, s) / s)


# -- weights and noise


def test_loss_weights_are_snr_in_units_of_x0():
    """A squared error of epsilon is SNR times one of x0, one of v (SNR + 1) times: all weights mean SNR on x0."""
    t = torch.arange(0, 1000, 13)
    snr = scheduler_of().snr(t)
    per_x0 = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
    for target, gain in per_x0.items():
        s = scheduler_of(target=target)
        torch.testing.assert_close(s.loss_weights(t) * gain, snr, rtol=1e-12, atol=0)
        torch.testing.assert_close(s.loss_weights(t, 5.0) * gain, snr.clamp(max=5), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="min_snr_gamma"):
        s.loss_weights(t, 0)


@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("target", ["sample", "v_prediction"])
def test_zero_terminal_snr_has_weights_above_0(target, gamma):
    """SNR counts as at least 1: what sampling begins with is trained. Before, the last weight was 0, the one before it
    2e-6."""
    s = scheduler_of(target=target, rescale_betas_zero_snr=True)
    t = torch.arange(1000)
    snr = exact_abar(s) / (1 - exact_abar(s))
    counted = snr.clamp(min=1) if gamma is None else snr.clamp(min=1).clamp(max=gamma)
    expected = counted if target == "sample" else counted / (snr + 1)
    weights = s.loss_weights(t, gamma)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert weights[-1] == (1 if gamma is None else min(1, gamma)) and s.snr(999) == 0


def test_sample_noise():
    """Offset noise adds one number a channel: the variance of a channel's mean over n positions is 1/n + strength^2."""
    s = scheduler_of()
    like = torch.zeros(2000, 2, 16)
    plain = s.sample_noise(like, generator=torch.Generator().manual_seed(1))
    offset = s.sample_noise(like, 0.5, torch.Generator().manual_seed(1))
    shift = offset - plain
    assert torch.allclose(shift, shift[..., :1].expand_as(shift), atol=1e-6)
    n = 4000
    assert shift[..., 0].var().item() == pytest.approx(0.25, abs=6 * 0.25 * math.sqrt(2 / n))
    assert like.abs().sum() == 0
    alone = s.sample_noise(like[:1], 0.5, [torch.Generator().manual_seed(7)])
    among = s.sample_noise(like[:3], 0.5, [torch.Generator().manual_seed(i) for i in (5, 6, 7)])
    assert torch.equal(alone[0], among[2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("shift", [-1.386, 2.0])
def test_the_log_snr_is_shifted_by_a_constant(schedule, shift, tmp_path):
    """In float64 the log-SNR differs by exactly the shift; stock schedulers and saved copies have these betas."""
    plain, own = (GaussianScheduler(200, schedule, snr_shift=s) for s in (0.0, shift))
    difference = own._tables["snr"].log() - plain._tables["snr"].log()
    torch.testing.assert_close(difference, torch.full_like(difference, shift), rtol=0, atol=1e-8)
    stock = DDIMScheduler.from_config(own.config)
    torch.testing.assert_close(stock.alphas_cumprod, own.alphas_cumprod, rtol=1e-5, atol=1e-9)
    own.save_pretrained(tmp_path)
    for again in (GaussianScheduler.from_pretrained(tmp_path), GaussianScheduler.from_config(stock.config)):
        assert again.config.snr_shift == shift and again.config.beta_schedule == schedule
        assert list(again.config.trained_betas) == list(own.config.trained_betas)
    back = GaussianScheduler.from_config(own.config, snr_shift=0.0)
    assert list(back.config.trained_betas) == list(plain.config.trained_betas)


def test_a_shift_that_would_change_nothing_or_has_no_number():
    with pytest.raises(ValueError, match="snr_shift must be 0 with trained_betas.*got 1.0"):
        GaussianScheduler(trained_betas=[0.1, 0.2], snr_shift=1.0)
    with pytest.raises(ValueError, match="snr_shift must be a finite number, got 'auto'"):
        GaussianScheduler(snr_shift="auto")
