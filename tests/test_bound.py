"""The variational bound and L_hybrid: closed forms of Gaussian data, quadrature, gradients, a peer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import exact_abar, optimal_prediction
from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from scipy.stats import norm
from test_parity_diffusion import exact_buffers

from ddpm_hf import GaussianScheduler
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.scheduler import PREDICTION_TYPES, VARIANCE_TYPES

MEAN, DEVIATION = 0.3, 0.5


def gaussian_bound(scheduler, best_variance=False, deviation=DEVIATION):
    """The bound of the optimal denoiser of x0 ~ N(0.3, deviation^2), as the mean over x0 and epsilon.

    The terms are polynomials of degree 2 in both, for which the rule of three points is exact.
    """
    nodes, weights = hermegauss(3)
    x, e = (torch.tensor(v.ravel()).reshape(-1, 1, 1) for v in np.meshgrid(nodes, nodes))
    w = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    x0, total = MEAN + deviation * x, 0.0
    betas = scheduler.config.trained_betas
    for t in range(len(scheduler)):
        x_t = scheduler.add_noise(x0, e, t)
        output = optimal_prediction(scheduler, x_t, t, MEAN, deviation)
        if best_variance:  # of x_{t-1} given x_t, where both are Gaussian: by the variances of both and what they share
            before = scheduler._abar[t - 1] if t else 1.0
            spread = deviation**2 * before + 1 - before
            best = spread * betas[t] / ((1 - betas[t]) * spread + betas[t])
            small, large = (scheduler._tables[f"bound_log_{name}"][t].item() for name in ("small", "large"))
            share = (math.log(best) - small) / (large - small)
            output = torch.cat((output, torch.full_like(output, 2 * share - 1)), dim=1)
        term = scheduler.bound_term(output, x0, x_t, t, decoder="density", clip=False)
        total += (w * term.flatten()).sum().item()
    return total + (w * scheduler.prior_term(x0).flatten()).sum().item()


def entropy():
    return 0.5 * math.log(2 * math.pi * math.e * DEVIATION**2)


def of_the_end(scheduler):
    """KL(q(x_T) || N(0, 1)), which no chain can avoid."""
    abar = exact_abar(scheduler)[-1].item()
    variance, mean = 1 + abar * (DEVIATION**2 - 1), abar**0.5 * MEAN
    return 0.5 * (variance - 1 - math.log(variance) + mean**2)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_with_the_best_variance_the_bound_is_the_entropy(kind):
    """For any T: the reverse of the chain is then exact, and only its end differs from the prior."""
    for steps in (25, 100):
        scheduler = GaussianScheduler(steps, "linear", prediction_type=kind, variance_type="learned_range")
        expected = entropy() + of_the_end(scheduler)
        assert gaussian_bound(scheduler, best_variance=True) == pytest.approx(expected, abs=1e-10)


def times_gap(variance, limit):
    """T times the bound's distance to the entropy plus `limit`, for T = 250, 500, 1000 and 2000 and equal betas."""
    gaps = []
    for steps in (250, 500, 1000, 2000):
        scheduler = GaussianScheduler(steps, "linear", beta_start=0.01, beta_end=0.01, variance_type=variance)
        gaps.append(steps * (gaussian_bound(scheduler) - entropy() - limit - of_the_end(scheduler)))
    return gaps


def test_with_beta_as_the_variance_the_bound_goes_to_the_entropy():
    """By order 1 / T, from above."""
    gaps = times_gap("fixed_large", 0.0)
    assert gaps[-1] > 0 and gaps == pytest.approx([gaps[-1]] * 4, rel=0.01)


def test_with_the_posteriors_variance_the_bound_goes_to_the_entropy_and_half_of_eulers_constant():
    """By order log(T) / T. The variance is too small in the first steps, where SNR falls by t / (t + 1) whatever T: a
    step costs (1 / t - log(1 + 1 / t)) / 2 more, which are gamma / 2 in all."""
    growth = np.diff(times_gap("fixed_small", np.euler_gamma / 2))  # of a log(T) + b, by doubling T
    assert growth[-1] < 0 and growth == pytest.approx([growth[-1]] * 3, rel=0.03)


def divergence(q, p):
    """KL(q || p) of two distributions of SciPy, by quadrature over 12 deviations of q."""
    low, high = q.mean() - 12 * q.std(), q.mean() + 12 * q.std()
    return quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), low, high, epsabs=1e-13, limit=200)[0]


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_terms_by_quadrature(kind, variance):
    """Each term is the integral of q log(q / p), or of the decoder's density, from the betas alone."""
    scheduler = GaussianScheduler(20, "cosine", prediction_type=kind, variance_type=variance)
    betas = np.array(scheduler.config.trained_betas)
    abar = np.cumprod(1 - betas)
    before = np.concatenate(([1.0], abar[:-1]))
    posterior = betas * (1 - before) / (1 - abar)
    rng = np.random.default_rng(0)
    for t in (0, 1, 7, 19):
        x0 = round(rng.uniform(0, 255)) / 127.5 - 1
        eps, guess, fraction = rng.standard_normal(), rng.uniform(-0.9, 0.9), rng.uniform(-1, 1)
        x_t = abar[t] ** 0.5 * x0 + (1 - abar[t]) ** 0.5 * eps
        guessed = (x_t - abar[t] ** 0.5 * guess) / (1 - abar[t]) ** 0.5
        velocity = abar[t] ** 0.5 * guessed - (1 - abar[t]) ** 0.5 * guess
        output = {"sample": guess, "epsilon": guessed, "v_prediction": velocity}[kind]
        of_x0, of_x_t = (
            before[t] ** 0.5 * betas[t] / (1 - abar[t]),
            (1 - betas[t]) ** 0.5 * (1 - before[t]) / (1 - abar[t]),
        )
        small, large = posterior[max(t, 1)], betas[t]
        spread = {
            "fixed_small": small, "fixed_large": large if t else small,
            "learned_range": large ** ((fraction + 1) / 2) * small ** ((1 - fraction) / 2),
        }[variance]  # fmt: skip
        outputs = [output] if variance != "learned_range" else [output, fraction]
        given = torch.tensor(outputs, dtype=torch.float64).reshape(1, -1, 1)
        points = [torch.tensor([[[v]]], dtype=torch.float64) for v in (x0, x_t)]
        p = norm(of_x0 * guess + of_x_t * x_t, spread**0.5)
        if t:
            expected = divergence(norm(of_x0 * x0 + of_x_t * x_t, posterior[t] ** 0.5), p)
        else:
            expected = -math.log(quad(p.pdf, x0 - 1 / 255, x0 + 1 / 255, epsabs=1e-15)[0])
        for steps in (t, torch.tensor([t]), torch.tensor(t)):
            got = scheduler.bound_term(given, *points, steps)
            assert got.shape == (1, 1, 1) and got.item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
        if t == 0:
            wide = spread if variance == "learned_range" else betas[0]
            density = scheduler.bound_term(given, *points, 0, decoder="density").item()
            assert density == pytest.approx(-norm(guess, wide**0.5).logpdf(x0), rel=1e-10)


@pytest.mark.parametrize("guess", [-1.4, -1.0, -0.31, 0.999, 30.0])
@pytest.mark.parametrize("number", [256, 4096, 65536])
def test_the_bins_of_the_decoder_sum_to_one(guess, number):
    """Of 8, 12 and 16 bits; also far from the data, and without underflow in the other bins."""
    scheduler = GaussianScheduler(100, prediction_type="sample")
    levels = (2 * torch.arange(number, dtype=torch.float64) / (number - 1) - 1).reshape(1, 1, -1)
    mean = torch.full_like(levels, guess)
    terms = scheduler.bound_term(mean, levels, levels, 0, clip=False, levels=number)
    if number > 256:
        assert terms.isfinite().all() and torch.exp(-terms).sum().item() == pytest.approx(1, abs=1e-12)
        several = scheduler.bound_term(mean, levels, levels, 0, clip=False, levels=torch.tensor([[[number]]]).double())
        assert torch.equal(several, terms)
        return
    assert terms.isfinite().all() and torch.exp(-terms).sum().item() == pytest.approx(1, abs=1e-12)
    single = scheduler.bound_term(mean.float(), levels.float(), levels.float(), torch.tensor([0]), clip=False)
    torch.testing.assert_close(single.double(), terms, rtol=1e-4, atol=1e-4)
    clipped = scheduler.bound_term(mean, levels, levels, 0)
    assert torch.equal(clipped, scheduler.bound_term(mean.clamp(-1, 1), levels, levels, 0, clip=False))


def test_the_prior_term_by_quadrature():
    scheduler = GaussianScheduler(30, "linear")
    abar = exact_abar(scheduler)[-1].item()
    for x0 in (-0.7, 1.0):
        q = norm(abar**0.5 * x0, (1 - abar) ** 0.5)
        expected = divergence(q, norm())
        got = scheduler.prior_term(torch.tensor([x0], dtype=torch.float64)).item()
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-11)
    ended = GaussianScheduler(30, "linear", rescale_betas_zero_snr=True)
    assert ended.prior_term(torch.ones(1)).item() == 0


def test_bad_arguments_of_the_bound():
    x = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="decoder must be one of discretized, density; got 'exact'"):
        GaussianScheduler(10).bound_term(x, x, x, 0, decoder="exact")
    with pytest.raises(ValueError, match="model_output must have 2 channels"):
        GaussianScheduler(10, variance_type="learned_range").bound_term(x, x, x, 0)


# ---------------------------------------------------------------------------------------------
# L_hybrid


def batch(shape=(5, 2, 4, 4)):
    x0 = torch.randint(256, shape).double() / 127.5 - 1
    noise, out = torch.randn_like(x0), torch.randn(len(x0), 2 * shape[1], *shape[2:]).double()
    return x0, torch.tensor([0, 1, 20, 60, 99]), noise, out.requires_grad_()


def predict(out):
    return lambda x, t, **inputs: SimpleNamespace(sample=out)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(5, 2, 4, 4), (5, 2, 8)])
def test_each_part_of_the_loss_trains_its_own_half(kind, shape):
    """The bound's gradient goes to the variance alone and the simple loss' to the mean; and both are what they say."""
    learned = GaussianScheduler(100, prediction_type=kind, variance_type="learned_range")
    x0, t, noise, out = batch(shape)
    counted = torch.rand(shape) < 0.5
    options = {"min_snr_gamma": 5.0, "counted": counted, "known": ~counted, "self_condition": True}
    losses = {w: diffusion_loss(predict(out), learned, x0, t, noise, vlb_weight=w, **options).loss for w in (0, 0.001)}
    gradients = {w: torch.autograd.grad(loss.sum(), out)[0].split(2, dim=1) for w, loss in losses.items()}
    assert torch.equal(gradients[0][1], torch.zeros_like(gradients[0][1]))
    torch.testing.assert_close(gradients[0.001][0], gradients[0][0], rtol=1e-12, atol=0)
    assert (gradients[0.001][1][counted] != 0).all() and (gradients[0.001][1][~counted] == 0).all()
    fixed = GaussianScheduler(100, prediction_type=kind)
    mean = out[:, :2]
    torch.testing.assert_close(losses[0], diffusion_loss(predict(mean), fixed, x0, t, noise, **options).loss)
    x_t = learned.add_noise(x0, noise, t)
    decoder = "discretized" if len(shape) == 4 else "density"
    terms = learned.bound_term(out, x0, x_t, t, decoder, clip=False)
    bound = torch.stack([term[c].mean() for term, c in zip(terms, counted)]) * 100 / math.log(2)
    torch.testing.assert_close(losses[0.001] - losses[0], 0.001 * bound, rtol=1e-8, atol=1e-12)


def test_gradients_of_the_bound_stay_finite():
    """In float32, of predictions far from the data at all timesteps, for both decoders."""
    learned = GaussianScheduler(1000, prediction_type="epsilon", variance_type="learned_range")
    for shape in ((1000, 1, 2, 2), (1000, 1, 4)):
        x0 = torch.randint(256, shape).float() / 127.5 - 1
        out = (30 * torch.randn(1000, 2, *shape[2:])).clamp(-30, 30)
        out[:, 1] /= 30
        out.requires_grad_()
        loss = diffusion_loss(predict(out), learned, x0, torch.arange(1000), torch.randn(shape), vlb_weight=0.001).loss
        loss.sum().backward()
        assert loss.isfinite().all() and out.grad.isfinite().all()


def test_the_loss_is_the_peers(double):
    """denoising-diffusion-pytorch has the mean of the term where the paper has the bound: its weight is T times ours.
    Its t = 0 differs (variance clipped at 1e-20, an approximation of the normal distribution), and is left out."""
    learned = GaussianScheduler(100, "cosine", prediction_type="epsilon", variance_type="learned_range")
    x0, t, noise, out = batch((5, 1, 4, 4))
    t[0] = 50

    class Model(torch.nn.Module):
        channels, out_dim, self_condition = 1, 2, False
        random_or_learned_sinusoidal_cond = False

        def forward(self, x, t):
            return out

    options = {"timesteps": 100, "beta_schedule": "cosine", "objective": "pred_noise", "image_size": 4}
    peer = exact_buffers(LearnedGaussianDiffusion(Model(), **options), learned)
    expected = peer.p_losses(x0, t, noise, loss_reduction="none")
    ours = diffusion_loss(predict(out), learned, x0, t, noise, weighting="uniform", vlb_weight=0.001 / 100).loss
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), out)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_losses_refuse_variances_that_do_not_fit():
    x0, t, noise, out = batch()
    with pytest.raises(ValueError, match="vlb_weight must be 0 with variance_type 'fixed_small'.*got 0.001"):
        diffusion_loss(predict(out[:, :2]), GaussianScheduler(100), x0, t, noise, vlb_weight=0.001)
    with pytest.raises(ValueError, match="needs a scheduler with variance_type 'learned_range'"):
        diffusion_loss(predict(out), GaussianScheduler(100), x0, t, noise)
