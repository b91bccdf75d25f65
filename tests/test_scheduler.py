"""GaussianScheduler against closed forms, inversion, Bayes' rule and stock schedulers."""

import itertools
import math

import diffusers
import pytest
import torch
from conftest import exact_abar, optimal_prediction

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
def test_conversions_invert(schedule):
    """epsilon, x0 and v of one x_t convert into each other at every timestep, to 1e-12."""
    s = scheduler_of(schedule)
    t = torch.arange(1000)
    x0, eps = torch.randn(2, 1000, 4, dtype=torch.float64)
    x_t, v = s.add_noise(x0, eps, t), s.get_velocity(x0, eps, t)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    # dividing by sqrt(abar) or sqrt(1 - abar) magnifies the rounding of x_t
    by_signal = {"rtol": 0, "atol": max(1e-12, 50 * EPS / exact_abar(s).min().sqrt().item())}
    by_noise = {"rtol": 0, "atol": max(1e-12, 50 * EPS / (1 - exact_abar(s)).min().sqrt().item())}
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


# -- configuration


@pytest.mark.parametrize("alias,name", [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v_prediction")])
def test_aliases_are_stored_under_the_first_name(alias, name):
    assert GaussianScheduler(prediction_type=alias).config.prediction_type == name


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "noise"}, {"beta_schedule": "exp"}, {"variance_type": "none"}, {"sampler": "euler"},
        {"cosine_s": -1.0}, {"beta_start": None}, {"eta": "much"}, {"trained_betas": "abc"},
        {"eta": -1.0}, {"num_train_timesteps": 0}, {"timestep_spacing": "log"}, {"clip_sample_range": 0.0},
        {"sigmoid_tau": 0.0, "beta_schedule": "sigmoid"}, {"beta_schedule": "trained"}, {"sample_max_value": 0.5},
    ],
)  # fmt: skip
def test_bad_options_are_named_with_their_value(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError) as caught:
        GaussianScheduler(**options)
    assert str(value) in str(caught.value)


HUGE = 10**400  # no float holds it
NO_NUMBER = (math.nan, math.inf, -math.inf, HUGE, "text", "1", "", True, [1.0], {}, b"1", 1j, object())
NO_NAME = (*NO_NUMBER, None, 0, 1.5)
NO_SWITCH = ("no", "False", 0, 1, None, math.nan, [])
BAD = {
    "num_train_timesteps": (*NO_NUMBER, -1, 0, 2.5, 10**9),
    "trained_betas": (
        "text",
        True,
        0.1,
        [[0.1]],
        [0.1, "x"],
        [HUGE],
        [math.nan],
        [-0.1, 0.1],
        [0.1, math.inf],
        {},
        [None],
    ),
    "steps_offset": (*NO_NUMBER, None, -1, 0.5, 1e300),
    "eta": (*NO_NUMBER, None, -0.1, 1.1),
    "clip_sample_range": (*NO_NUMBER, None, -1.0, 0, 1e308),
    "dynamic_thresholding_ratio": (*NO_NUMBER, None, -1.0, 0, 1.1),
    "sample_max_value": (*NO_NUMBER, None, -1.0, 0.5),
    "beta_start": (*NO_NUMBER, None, -1.0, 0, 0.5),
    "beta_end": (*NO_NUMBER, None, -1.0, 0, 1e-9, 1, 1e308),
    "cosine_s": (*NO_NUMBER, None, -1.0, 1e308),
    "sigmoid_start": (*NO_NUMBER, None, 3.0, -1e308),
    "sigmoid_end": (*NO_NUMBER, None, -3.0, 1e308),
    "sigmoid_tau": (*NO_NUMBER, None, -1.0, 0, 0.07, 5e-324, 1e308),
    **dict.fromkeys(("beta_schedule", "prediction_type", "variance_type", "sampler", "timestep_spacing"), NO_NAME),
    **dict.fromkeys(("clip_sample", "use_clipped_model_output", "thresholding", "rescale_betas_zero_snr"), NO_SWITCH),
}


@pytest.mark.parametrize("name", BAD)
def test_every_option_refuses_bad_values_by_name(name):
    used = {"beta_": "linear", "cosine": "cosine"}
    schedule = next((value for start, value in used.items() if name.startswith(start)), "sigmoid")
    for value in BAD[name]:
        options = {"beta_schedule": schedule, name: value}
        with pytest.raises(ValueError, match=name):
            GaussianScheduler(**options)
    assert set(BAD) == GaussianScheduler._get_init_keys(GaussianScheduler) - {"self"}


def test_sampling_refuses_bad_values_by_name():
    s = scheduler_of()
    x = torch.zeros(1, 1)
    for value in (*NO_NUMBER, 0, -1, 2.5, 1001):
        with pytest.raises(ValueError, match="num_inference_steps"):
            s.set_timesteps(value)
    for value in ("text", 5, {}, [5, 5], [5.5], [math.nan], [HUGE], ["5"], [True], [None], torch.tensor(5)):
        with pytest.raises(ValueError, match="timesteps"):
            s.set_timesteps(timesteps=value)
    for value in (*NO_NUMBER, -0.1, 1.1):
        with pytest.raises(ValueError, match="eta"):
            s.step(x, 999, x, eta=value)
    for value in (*NO_NUMBER, -1, 0):
        with pytest.raises(ValueError, match="min_snr_gamma"):
            s.loss_weights(5, value)
    s.set_timesteps(timesteps=torch.tensor([900, 5]))
    assert s.timesteps.tolist() == [900, 5]


def test_save_and_load(tmp_path):
    s = GaussianScheduler(250, "sigmoid", sigmoid_tau=0.7, prediction_type="sample", eta=0.3)
    s.save_pretrained(tmp_path)
    again = GaussianScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.betas, s.betas)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in s.config.items() if k[0] != "_"}


def test_changing_the_schedule_of_a_configuration():
    """Published betas give way where an option that they follow from is changed."""
    config = GaussianScheduler().config
    changed = GaussianScheduler.from_config(config, beta_schedule="linear")
    assert changed.config.trained_betas == linear_betas(1000).tolist()
    assert len(GaussianScheduler.from_config(config, num_train_timesteps=50)) == 50
    # explicit betas stay where only their rescaling is asked for, and where nothing is changed
    explicit = GaussianScheduler(trained_betas=[0.1, 0.2, 0.9], prediction_type="sample")
    same = GaussianScheduler.from_config(explicit.config, num_train_timesteps=3)
    assert same.config.trained_betas == [0.1, 0.2, 0.9]
    rescaled = GaussianScheduler.from_config(explicit.config, rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[0] == pytest.approx(0.9) and rescaled.config.trained_betas[-1] == 1
    unclipped = GaussianScheduler.from_config(config, clip_sample=False)
    x0 = torch.full((1, 1), 3.0)
    assert torch.equal(unclipped.clip_x0(x0), x0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_a_stock_configuration(schedule):
    """Schedule, target and clipping of a stock scheduler are kept, its defaults too."""
    stock = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule=schedule)
    ours = GaussianScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert ours.config.prediction_type == "epsilon" and ours.config.clip_sample
    back = diffusers.DDPMScheduler.from_config(ours.config)
    torch.testing.assert_close(back.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)


# -- from stock configurations

STOCK = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
KEPT = {"DDPMScheduler": "ddpm", "DDPMParallelScheduler": "ddpm", "DDIMScheduler": "ddim",
        "DDIMParallelScheduler": "ddim"}  # fmt: skip


def chain(scheduler, steps, target, std=0.5):
    """x_0 from one x_T, by the best model for N(0.3, std^2) data on the scheduler's own abar."""
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 4)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps.tolist():
        abar = scheduler.alphas_cumprod[t].item()
        total = std**2 * abar + 1 - abar
        x0 = 0.3 + std**2 * abar**0.5 / total * (x - abar**0.5 * 0.3)
        epsilon = (1 - abar) ** 0.5 / total * (x - abar**0.5 * 0.3)
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x0
        out = {"sample": x0, "epsilon": epsilon, "v_prediction": v}[target]
        if scheduler.config.get("variance_type") == "learned_range":
            out = torch.cat((out, torch.full_like(out, 0.3)), dim=1)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("name", sorted(KEPT))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "timestep_spacing": "trailing"},
        {"clip_sample": False, "beta_start": 1e-3, "beta_end": 0.05, "steps_offset": 1},
        {"clip_sample_range": 0.4},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.7},
        {"trained_betas": torch.linspace(0.01, 0.1, 100).tolist()},
        {"variance_type": "fixed_small_log", "beta_schedule": "sigmoid"},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned_range", "timestep_spacing": "linspace"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_a_stock_sampler_is_kept(name, options):
    """A DDIM configuration steps as DDIM at every number of steps, a DDPM one ancestrally; stock abar is float32."""
    if "variance_type" in options and KEPT[name] == "ddim":
        options = {"prediction_type": "sample"}
    stock = getattr(diffusers, name)(num_train_timesteps=100, **options)
    ours = GaussianScheduler.from_config(stock.config)
    saved = GaussianScheduler.from_config({**stock.config, "_class_name": name})
    assert ours.config.sampler == saved.config.sampler == KEPT[name]
    assert {**ours.config, "_class_name": "GaussianScheduler"} == dict(saved.config)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    for steps in (10, 50) if options.get("steps_offset") else (10, 100):
        target = stock.config.prediction_type
        got, expected = chain(ours, steps, target), chain(stock, steps, target)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_configuration_is_kept_or_refused_by_name(name):
    try:
        config = getattr(diffusers, name)().config
    except (ImportError, TypeError):  # another library is needed, or there are no defaults
        config = {"_class_name": name}
    saved = {**config, "_class_name": name}
    if name in KEPT:  # in numbers: see above
        assert GaussianScheduler.from_config(saved).config.sampler == KEPT[name]
        return
    with pytest.raises(ValueError, match=name):
        GaussianScheduler.from_config(saved)
    with pytest.raises(ValueError, match="Scheduler"):
        GaussianScheduler.from_config(config)
    try:
        taken = GaussianScheduler.from_config(saved, sampler="ddim")
    except ValueError as error:
        assert name in str(error)
        return
    stock = getattr(diffusers, name)()
    torch.testing.assert_close(taken.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert taken.config.prediction_type == stock.config.prediction_type and taken.config.sampler == "ddim"
    assert taken.config.clip_sample == stock.config.get("clip_sample", False) and not taken.config.thresholding


def test_a_keyword_beside_a_stock_configuration_changes_only_itself():
    """Stock "sigmoid" is a sigmoid of betas: with another end it is still that, and with zero SNR it is rescaled."""
    stock = diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction", clip_sample_range=3.0)
    for options in ({"beta_end": 0.01}, {"num_train_timesteps": 200}, {"rescale_betas_zero_snr": True}, {"eta": 0.5}):
        ours = GaussianScheduler.from_config(stock.config, **options)
        changed = diffusers.DDPMScheduler.from_config(stock.config, **{k: v for k, v in options.items() if k != "eta"})
        torch.testing.assert_close(ours.alphas_cumprod, changed.alphas_cumprod, rtol=1e-5, atol=1e-7)
        assert ours.config.sampler == "ddpm" and ours.config.clip_sample_range == 3
    # the keyword beta_schedule is the constructor's; stock's names stay stock's
    ours = GaussianScheduler.from_config(stock.config, beta_schedule="sigmoid")
    assert ours.config.trained_betas == sigmoid_betas(1000).tolist() and ours.config.clip_sample_range == 3
    ours = GaussianScheduler.from_config(stock.config, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.betas, cosine_betas(1000).float(), rtol=1e-5, atol=1e-7)
    assert GaussianScheduler.from_config(stock.config, sampler="ddim").config.sampler == "ddim"


@pytest.mark.parametrize(
    "options, keywords, match",
    [
        ({"set_alpha_to_one": False}, {}, "set_alpha_to_one must be True"),
        ({}, {"sigmoid_tau": 0.5}, "sigmoid_tau would change nothing"),
        ({"trained_betas": [0.1, 0.2]}, {"beta_end": 0.5}, "beta_end would change nothing"),
        ({}, {"sigmoid_tua": 0.5}, "does not know: sigmoid_tua"),
        ({}, {"solver_order": 3}, "does not know: solver_order"),
        ({}, {"beta_schedule": "exp"}, "'exp'"),
        ({"prediction_type": "flow"}, {}, "flow"),
        ({"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr.*epsilon"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(options, keywords, match):
    total = len(options.get("trained_betas", range(1000)))
    stock = diffusers.DDIMScheduler(total, **options)
    with pytest.raises(ValueError, match=match):
        GaussianScheduler.from_config(stock.config, **keywords)
    with pytest.raises(ValueError, match="does not know: beta_strat"):
        GaussianScheduler.from_config({**stock.config, "beta_strat": 1})
    assert GaussianScheduler.from_config(diffusers.DDIMScheduler(set_alpha_to_one=False).config, set_alpha_to_one=True)


@pytest.mark.parametrize("name", [*KEPT, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
                                  "EulerDiscreteScheduler", "LCMScheduler"])  # fmt: skip
def test_a_stock_scheduler_made_of_our_configuration_gives_it_back(name):
    own = GaussianScheduler(50, "sigmoid", sigmoid_tau=0.7, eta=0.2, steps_offset=0, clip_sample_range=2.0)
    kind = getattr(diffusers, name)
    through = kind.from_config(own.config)
    for config in (through.config, {**through.config, "_class_name": name}):
        back = GaussianScheduler.from_config(config)
        public = [{k: v for k, v in s.config.items() if k in GaussianScheduler._get_init_keys(s)} for s in (own, back)]
        assert public[0] == public[1]
    # a schedule that was changed meanwhile is the stock library's
    if name in KEPT:
        other = kind.from_config(own.config, trained_betas=None, beta_schedule="linear")
        back = GaussianScheduler.from_config(other.config)
        torch.testing.assert_close(back.alphas_cumprod, other.alphas_cumprod, rtol=1e-5, atol=1e-7)


# -- betas, and what is published


@pytest.mark.parametrize(
    "options, wrong",
    [
        ({"beta_schedule": "sigmoid", "sigmoid_tau": 0.07}, "sigmoid_tau=0.07"),
        ({"beta_schedule": "sigmoid", "sigmoid_start": -100.0}, "sigmoid_start=-100.0"),
        ({"beta_schedule": "sigmoid", "sigmoid_end": 50.0}, "sigmoid_end=50.0"),
        ({"beta_schedule": "cosine", "cosine_s": 1e30}, "cosine_s=1e[+]30"),
        ({"beta_schedule": "linear", "beta_start": 1e-30}, "beta_start=1e-30"),
        ({"beta_schedule": "cosine", "num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "timesteps=1"),
        ({"trained_betas": [0.1, math.nan, 0.2]}, "nan at t=1, from trained_betas"),
        ({"trained_betas": [0.1, 1.0, 0.2], "rescale_betas_zero_snr": True}, "1 at t=1, from trained_betas"),
        ({"trained_betas": [0.99] * 200}, "from trained_betas"),
        ({"trained_betas": [1e-17, 0.5]}, "1e-17 at t=0, from trained_betas"),
    ],
)
def test_betas_are_checked_whatever_made_them(options, wrong):
    """At sigmoid_tau=0.07 the schedule's last 71 betas were 0 / 0, and samples NaN."""
    with pytest.raises(ValueError, match=wrong):
        GaussianScheduler(**options)


def test_what_is_published_is_float32_as_in_stock_schedulers():
    """A hand-written loop keeps its dtype; inside, coefficients stay float64."""
    ours = scheduler_of("cosine")
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for name in ("betas", "alphas", "alphas_cumprod"):
        values = getattr(ours, name)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, getattr(stock, name), rtol=1e-5, atol=1e-7)
    x = torch.randn(2, 3)
    abar = ours.alphas_cumprod[[10, 500]].reshape(2, 1)
    noisy = abar.sqrt() * x + (1 - abar).sqrt() * x
    assert noisy.dtype == torch.float32 and torch.nn.Linear(3, 3)(noisy).shape == (2, 3)
    torch.testing.assert_close(noisy, ours.add_noise(x, x, torch.tensor([10, 500])), rtol=1e-5, atol=1e-6)
    assert ours.snr(999).dtype == torch.float64


@pytest.mark.parametrize(
    "made, changed, limit",
    [
        ({}, {}, 1.0),
        ({}, {"clip_sample_range": 2}, 2.0),
        ({}, {"clip_sample": False}, math.inf),
        ({}, {"sample_max_value": 3.0}, 1.0),
        ({"clip_sample": False}, {"clip_sample": True}, 1.0),
        ({"clip_sample_range": 2.0}, {"clip_sample_range": 1.0}, 1.0),
        ({"thresholding": True, "clip_sample_range": 2.0}, {}, 1.0),
    ],
)
def test_what_is_published_is_what_is_used(made, changed, limit):
    """Ours and a stock DDIM of its configuration clip x0 at the same place, before and after a change."""
    own = GaussianScheduler.from_config(GaussianScheduler(**made).config, **changed)
    x0 = torch.linspace(-4, 4, 9, dtype=torch.float64).reshape(1, 1, 9)
    assert torch.equal(own.clip_x0(x0), x0.clamp(-limit, limit))
    stock = diffusers.DDIMScheduler.from_config(own.config)
    for s in (own, stock):
        s.set_timesteps(1)
    x_t = own.add_noise(x0, torch.zeros_like(x0), 999)
    v = own.get_velocity(x0, torch.zeros_like(x0), 999)
    got = stock.step(v, 999, x_t).pred_original_sample
    torch.testing.assert_close(got, x0.clamp(-limit, limit), rtol=1e-4, atol=1e-4)
