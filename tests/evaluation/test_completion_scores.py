"""Scores of completions against closed forms, and baselines on series whose answer is known."""

import numpy as np
import pytest
from scipy.stats import norm

from ddpm_hf.evaluation.completion_scores import (
    bands,
    find_season,
    image_baselines,
    score_sums,
    sequence_baselines,
    summary,
)

RNG = np.random.default_rng(0)


def everywhere(truth):
    return np.ones(truth.shape, dtype=bool)


@pytest.mark.parametrize("samples", [2, 20])
def test_crps_of_a_gaussian_ensemble(samples):
    """CRPS(N(m, s), y) = s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), z = (y - m) / s (Gneiting & Raftery 2007,
    equation 20). The fair estimator has this expected value with any number of completions: 5 standard errors of the
    mean over 400 items."""
    mean, deviation, truth = 3.0, 2.0, RNG.normal(3.5, 2.5, size=(400, 1, 50))
    ensemble = RNG.normal(mean, deviation, size=(400, samples, 1, 50))
    z = (truth - mean) / deviation
    expected = deviation * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    error = score_sums(truth, ensemble, everywhere(truth))[:, 0, 1] / 50 - expected.mean(axis=(1, 2))
    standard_error = error.std() / np.sqrt(400)
    assert standard_error < 0.01  # the ensemble's own bias would be 1 / samples * s / sqrt(pi): 0.06 of 20, 0.56 of 2
    assert abs(error.mean()) < 5 * standard_error


def test_rmse_and_coverage_of_completions_with_the_distribution_of_the_truth():
    """The mean of M numbers has the error variance s^2 (1 + 1 / M); the bands have 50% and 90% of the true values. 5
    deviations of a mean of 40,000 squared normals, and of 40,000 Bernoulli numbers."""
    truth, ensemble = RNG.normal(size=(800, 1, 50)), RNG.normal(size=(800, 20, 1, 50))
    found = summary(score_sums(truth, ensemble, everywhere(truth)).sum(axis=0), np.ones(1), has_bands=True)
    assert found["rmse"] ** 2 == pytest.approx(1 + 1 / 20, rel=5 * np.sqrt(2 / 40_000))
    assert found["coverage_50"] == pytest.approx(0.5, abs=5 * np.sqrt(0.5 * 0.5 / 40_000))
    assert found["coverage_90"] == pytest.approx(0.9, abs=5 * np.sqrt(0.9 * 0.1 / 40_000))
    assert found["crps"] == found["crps_standardized"] and found["rmse"] == found["rmse_standardized"]


def test_bands_of_19_numbers_are_their_order_statistics():
    """The quantiles 0.05, 0.25, 0.5, 0.75, 0.95 of 19 numbers are numbers 1, 5, 10, 15, 19 in ascending order."""
    assert bands(RNG.permutation(19) + 1.0, axis=0) == pytest.approx([1, 5, 10, 15, 19], abs=1e-12)


def test_a_single_prediction_is_scored_by_its_absolute_error():
    truth, guess = np.array([[[1.0, 2.0, 5.0]]]), np.array([[[0.0, 2.5, 9.0]]])
    ((sums,),) = score_sums(truth, guess[:, None], everywhere(truth))
    assert sums.tolist() == [3, 1 + 0.5 + 4, 1 + 0.25 + 16, 0, 0]


def test_values_that_do_not_count_change_nothing():
    truth, ensemble = RNG.normal(size=(3, 2, 8)), RNG.normal(size=(3, 5, 2, 8))
    counted = RNG.random(truth.shape) < 0.5
    counted[0, 1] = False
    hidden = np.where(counted, truth, np.nan)
    sums = score_sums(hidden, np.where(counted[:, None], ensemble, np.nan), counted)
    assert (sums == score_sums(truth, ensemble, counted)).all() and np.isfinite(sums).all()
    assert (sums[..., 0] == counted.sum(axis=2)).all() and not sums[0, 1].any()


def test_channels_in_their_own_units():
    """Two channels, the second with 100 times the unit: each counts alike after division by its deviation."""
    sums = np.array([[10, 5.0, 40.0, 5, 9], [30, 1500.0, 1_200_000.0, 15, 27]])
    found = summary(sums, np.array([1.0, 100.0]), has_bands=True)
    assert found == pytest.approx({
        "crps": 1505 / 40, "rmse": np.sqrt(1_200_040 / 40), "crps_standardized": 20 / 40,
        "rmse_standardized": np.sqrt(160 / 40), "coverage_50": 0.5, "coverage_90": 0.9,
    }, rel=1e-12)  # fmt: skip
    assert "coverage_50" not in summary(sums, np.ones(2), has_bands=False)


def hide(values, *places):
    known = np.array(values, dtype=np.float64)[None, None]
    known[..., list(places)] = np.nan
    return known


def test_baselines_of_a_constant_series():
    for task, places in ("forecast", range(6, 8)), ("impute", range(2, 5)):
        found = sequence_baselines(hide([7] * 8, *places), task, 3)
        assert list(found) == ["persistence", "linear", "seasonal"]
        assert all((each == 7).all() for each in found.values())


def test_baselines_of_a_line():
    line = 2.0 * np.arange(12) - 5
    gap = sequence_baselines(hide(line, 4, 5, 6), "impute", None)
    assert gap["linear"][0, 0] == pytest.approx(line, abs=1e-12) and "seasonal" not in gap
    assert gap["persistence"][0, 0, 4:7].tolist() == [line[3]] * 3
    end = sequence_baselines(hide(line, 9, 10, 11), "forecast", 4)
    assert end["linear"][0, 0] == pytest.approx(line, abs=1e-12)
    assert end["persistence"][0, 0, 9:].tolist() == [line[8]] * 3
    assert end["seasonal"][0, 0, 9:].tolist() == [line[5], line[6], line[7]]


def test_baselines_of_a_periodic_series():
    """The season is found, and the seasonal forecast is exact over more than one season; in a gap at the start it takes
    the values one season later."""
    wave = np.tile([0.0, 3.0, 1.0, -2.0, -1.0], 12)
    many = np.stack([np.roll(wave, shift) for shift in range(7)])[:, None]
    season = find_season(many, 45)
    assert season == 5
    for task, places in ("forecast", range(45, 60)), ("impute", range(20, 35)), ("impute", range(1, 16)):
        found = sequence_baselines(hide(wave, *places), task, season)
        assert (found["seasonal"] == wave).all()
        assert not (found["persistence"] == wave).all()


def test_baselines_where_known_values_are_missing():
    """A missing value in the known part is known to no baseline; a channel of which nothing is known stays NaN."""
    known = np.concatenate([hide([np.nan, 4, 5, np.nan, 7, 8, 0, 0], 6, 7), hide(range(8), *range(8))], axis=1)
    found = sequence_baselines(known, "forecast", 3)
    assert found["persistence"][0, 0].tolist() == [4, 4, 5, 5, 7, 8, 8, 8]
    assert found["linear"][0, 0, 6:].tolist() == [9, 10]
    assert found["seasonal"][0, 0, 6:].tolist() == [8, 7]  # phase 0 has no known value: persistence
    assert all(np.isnan(each[0, 1]).all() for each in found.values())


def test_seasons_in_noise_and_of_series_without_any():
    times = np.arange(128)
    shifts = RNG.uniform(0, 20, size=(50, 1))
    waves = 4 + np.sin(2 * np.pi * (times + shifts) / 20) + RNG.normal(0, 0.5, size=(50, 128))
    waves[3, 10:30] = np.nan
    assert find_season(waves[:, None], 96) == 20
    assert find_season(np.ones((4, 1, 64)), 48) is None  # it never changes
    assert find_season(np.cumsum(np.ones((4, 1, 64)), axis=2), 20) is None  # it only grows
    assert find_season(RNG.normal(size=(3, 1, 4)), 1) is None  # nothing fits


def test_baselines_of_images():
    """A block of a plane lies on the lines through its borders; the mean is the known pixels' mean of each channel."""
    y, x = np.mgrid[:6, :8]
    truth = np.stack((0.05 * x + 0.02 * y, np.full_like(x, 0.25, dtype=float)))[None]
    known = truth.copy()
    known[..., 2:4, 3:6] = np.nan
    found = image_baselines(known)
    np.testing.assert_allclose(found["linear"], truth, atol=1e-12)
    assert found["mean"][0, 1] == pytest.approx(truth[0, 1])
    assert found["mean"][0, 0, 2, 3] == pytest.approx(np.nanmean(known[0, 0]), rel=1e-12)
    assert (found["mean"][~np.isnan(known)] == truth[~np.isnan(known)]).all()
