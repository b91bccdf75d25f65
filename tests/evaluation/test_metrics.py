"""Distances between sets, against closed forms, another library and brute force."""

import numpy as np
import pytest
import torch
from helpers import frechet_by_eigenvalues
from scipy.signal import lfilter
from scipy.stats import wasserstein_distance

from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.metrics import (
    autocorrelation,
    autocorrelation_error,
    frechet_distance,
    log_power_spectrum,
    sliced_wasserstein,
    unit_directions,
)

rng = np.random.default_rng


def with_moments(count, mean, covariance, seed=0):
    """Samples whose fitted mean and covariance are exactly those asked for."""
    x = rng(seed).normal(size=(count, len(mean)))
    x = x - x.mean(axis=0)
    whitened = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def random_covariance(size, seed):
    a = rng(seed).normal(size=(size, size))
    return a @ a.T / size + 0.1 * np.eye(size)


def test_frechet_of_gaussians_is_the_closed_form():
    """Diagonal: |m1 - m2|^2 + sum (s1 - s2)^2. General: by the eigenvalues of the covariances."""
    s1, s2, m2 = np.array([1.0, 2, 0.5]), np.array([1.5, 1, 3]), np.array([1.0, -2, 0])
    x, y = with_moments(400, np.zeros(3), np.diag(s1**2)), with_moments(300, m2, np.diag(s2**2), seed=1)
    assert frechet_distance(x, y) == pytest.approx((m2**2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-10)
    c1, c2 = random_covariance(12, 2), random_covariance(12, 3)
    x, y = with_moments(400, np.zeros(12), c1), with_moments(300, np.ones(12), c2, seed=1)
    expected = frechet_by_eigenvalues(np.zeros(12), c1, np.ones(12), c2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_of_fewer_samples_than_dimensions():
    """Sets in a subspace: the distance is that of their coordinates in it."""
    x, y = with_moments(30, np.zeros(4), random_covariance(4, 0)), with_moments(20, np.ones(4), random_covariance(4, 1))
    basis = np.linalg.qr(rng(2).normal(size=(50, 4)))[0]
    assert frechet_distance(x @ basis.T, y @ basis.T) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    for wrong, message in (((x[:1], y), "at least 2"), ((x, y[:, :3]), "4 and 3"), ((x[0], y), "n, D")):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*wrong)


def test_power_of_white_noise_is_one():
    """E|X_f|^2 / length = 1; its estimate over n sequences has a deviation of 1/sqrt(n), sqrt(2/n) at the ends; 5 of
    those. A sine has all its power at its frequency."""
    power = np.exp(log_power_spectrum(rng(0).normal(size=(20_000, 1, 16)))).mean(axis=0)
    np.testing.assert_allclose(power, 1, atol=5 * np.sqrt(2 / 20_000))
    sine = np.sqrt(2) * np.sin(2 * np.pi * 3 * np.arange(16) / 16)
    spectrum = np.exp(log_power_spectrum(np.stack((sine, sine))[None]))
    assert (
        spectrum.shape == (1, 18)
        and spectrum[0, 3] == pytest.approx(8)
        and np.delete(spectrum[0], [3, 12]).max() < 1e-7
    )


def test_sliced_wasserstein_is_the_projections_own():
    """Against W1's library by a shift (W1 = W2 there), unequal counts by repetition, and Gaussians' closed form."""
    x = rng(0).normal(size=(50, 3))
    shift = np.array([1.0, -2, 0.5])
    directions = unit_directions(3, 256, 0)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-12)
    by_library = [wasserstein_distance(x @ w, (x + shift) @ w) for w in directions]
    assert sliced_wasserstein(x, x + shift) == pytest.approx(np.sqrt(np.mean(np.square(by_library))), rel=1e-10)
    y = rng(1).normal(size=(30, 3))
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(x.repeat(3, 0), y.repeat(5, 0)), rel=1e-10)
    assert sliced_wasserstein(x, x[::-1]) < 1e-15  # the order of a product of matrices may round


def test_sliced_wasserstein_of_gaussians():
    """W2^2 of N(0, s^2) and N(m, r^2) is m^2 + (s - r)^2 along each direction. With n samples the distance of two
    samples of one Gaussian is of the order sqrt(log log n / n): 0.02 at 20,000, against 1.9."""
    c1, c2, mean = random_covariance(5, 0), 4 * random_covariance(5, 1), np.full(5, 0.7)
    x, y = with_moments(20_000, np.zeros(5), c1), with_moments(20_000, mean, c2, seed=1)
    w = unit_directions(5, 64, 3)
    s1, s2 = (np.sqrt(np.einsum("pd,de,pe->p", w, c, w)) for c in (c1, c2))
    expected = np.sqrt(((w @ mean) ** 2 + (s1 - s2) ** 2).mean())
    assert sliced_wasserstein(x, y, projections=64, seed=3) == pytest.approx(expected, abs=0.02)


def ar1(phi, count=4000, length=64, seed=0):
    """A stationary AR(1) process of variance 1: rho_k = phi^k."""
    noise = rng(seed).normal(size=(count, 1, length + 200)) * np.sqrt(1 - phi**2)
    return lfilter([1], [1, -phi], noise, axis=-1)[..., 200:]


def test_autocorrelation_of_ar1():
    """phi^k, up to 5 deviations of an estimate from about 4000 x 64 / 10 independent values."""
    tolerance = 5 / np.sqrt(4000 * 64 / 10)
    lags = np.arange(1, 33)
    np.testing.assert_allclose(autocorrelation(ar1(0.8))[0], 0.8**lags, atol=tolerance)
    expected = np.sqrt(((0.8**lags - 0.3**lags) ** 2).mean())
    assert autocorrelation_error(*(autocorrelation(v) for v in (3 * ar1(0.8) + 1, ar1(0.3, seed=1)))) == pytest.approx(
        expected, abs=tolerance
    )
    assert (autocorrelation(np.ones((3, 1, 8))) == 0).all()


@pytest.mark.parametrize("length", [1, 2, 7, 97, 256])
def test_autocorrelation_is_the_mean_of_the_products(length, monkeypatch):
    """By a sum over each lag, also in several parts, at the last lag, and with a NaN or no variance in a channel.
    Products of size 1 in float64, over at most 512 values, round by less than 1e-12."""
    monkeypatch.setattr(metrics, "FFT_VALUES", 500)
    x = 5 + rng(0).normal(size=(9, 4, length))
    x[:, 2], x[3, 3, 0] = 1, np.nan
    lags = max(1, length - 1)
    c = x - x.mean(axis=(0, 2), keepdims=True)
    s = np.where((c**2).mean(axis=(0, 2)) > 0, (c**2).mean(axis=(0, 2)), 1)
    sums = [(c[..., k:] * c[..., : length - k]).sum(axis=(0, 2)) for k in range(1, lags + 1)]
    counts = [9 * (length - k) or np.nan for k in range(1, lags + 1)]  # no pair: no value
    expected = (np.array(sums) / np.array(counts)[:, None] / s).T
    np.testing.assert_allclose(autocorrelation(x, lags), expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(autocorrelation(x).shape, (4, max(1, length // 2)))


def test_spectral_frechet_tells_processes_apart():
    """Sets of equal pointwise moments and different spectra are far apart, sets of one process near."""
    a, b, c = (log_power_spectrum(ar1(*p)) for p in ((0.8, 4000, 64, 0), (0.8, 4000, 64, 1), (0.0, 4000, 64, 2)))
    assert frechet_distance(a, b) < 0.02 * frechet_distance(a, c)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("scores,shared", [(2**25, 0), (150, 0), (2**25, 2**14)])
def test_nearest_is_brute_force(mirrored, scores, shared, monkeypatch):
    """Also in many blocks, for several neighbours, with rows that do not count, and where a mirror image is nearer; and
    where all rows share a number, beside which rounding would drown their differences."""
    monkeypatch.setattr(metrics, "SCORES", scores)
    q, r = shared + torch.randn(40, 6), shared + torch.randn(70, 6)
    full = (q[:, None].double() - r.double()).norm(dim=2)
    if mirrored:
        full = torch.minimum(full, (q.flip(1)[:, None].double() - r.double()).norm(dim=2))
    reference = metrics.Reference(r, (lambda x: x.flip(1)) if mirrored else None)
    ranked = full.argsort(1)
    for count in (1, 3):
        found = reference.nearest(q, count)
        assert torch.equal(found.index, ranked[:, :count])
        torch.testing.assert_close(found.distance, full.sort(1).values[:, :count], rtol=1e-12, atol=0)
        assert torch.equal(reference.nearest(q, count, ranked[:, :2]).index, ranked[:, 2 : 2 + count])
