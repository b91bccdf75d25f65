"""Scores of completions of hidden values, and simple baselines that are scored in the same way.

Completions of a value are an ensemble. Its CRPS (continuous ranked probability score) is E|X - y| - E|X - X'| / 2, with
independent completions X and X' and the true value y (Gneiting & Raftery, "Strictly proper scoring rules, prediction,
and estimation", JASA 2007). The fair estimator is used, whose expected value does not depend on the number of
completions. The CRPS of a single prediction is its absolute error.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.signal import find_peaks
from scoringrules import crps_ensemble

from ddpm_hf.evaluation.metrics import autocorrelation

SUMS = 5  # of each channel: number of values, CRPS, squared error, values inside the 50% band and inside the 90% band
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # the edges of both bands, and the median


def bands(ensemble: np.ndarray, axis: int) -> np.ndarray:
    """Return the `QUANTILES` of an ensemble, as (5, ...) without `axis`.

    Between the k-th and the (k+1)-th smallest of M independent numbers lies 1 / (M + 1) of their distribution on
    average. Quantile q is therefore taken at place q (M + 1) of the sorted numbers (Weibull's rule), so that the 90%
    band of 19 or more completions has 90% of the true values if these have the same distribution.
    """
    return np.quantile(ensemble, QUANTILES, axis=axis, method="weibull")


def score_sums(truth: np.ndarray, ensemble: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return the sums of scores of each channel of each item, float64 (n, C, `SUMS`).

    Args:
        truth: the true values (n, C, *spatial).
        ensemble: M completions (n, M, C, *spatial) of each item. With M = 1 it is a single prediction, without bands.
        counted: True (n, C, *spatial) for each value to score; all others are left out.
    """
    item, channel = np.nonzero(counted)[:2]
    y, x = truth[counted], np.moveaxis(ensemble, 1, -1)[counted]  # (values,), (values, M)
    scores = np.zeros((len(y), SUMS))
    scores[:, 0] = 1
    scores[:, 2] = (x.mean(axis=1) - y) ** 2
    if x.shape[1] == 1:
        scores[:, 1] = np.abs(x[:, 0] - y)
    elif len(y):
        # the form of the fair estimator by probability weighted moments sorts M numbers instead of comparing M^2 pairs
        scores[:, 1] = crps_ensemble(y, x, estimator="pwm", backend="numpy")
        low_90, low_50, _, high_50, high_90 = bands(x, axis=1)
        scores[:, 3] = (low_50 <= y) & (y <= high_50)
        scores[:, 4] = (low_90 <= y) & (y <= high_90)
    sums = np.zeros((*truth.shape[:2], SUMS))
    np.add.at(sums, (item, channel), scores)
    return sums


def summary(sums: np.ndarray, deviation: np.ndarray, has_bands: bool) -> dict[str, float]:
    """Return the scores of all channels together.

    Args:
        sums: the sums (C, `SUMS`) over all items.
        deviation: the standard deviation (C,) of each channel in the training data.
        has_bands: True for an ensemble, whose bands are scored too.

    Returns:
        `crps` and `rmse`, the mean and the root of the mean square over all scored values, in the data's units;
        `crps_standardized` and `rmse_standardized`, in which each channel is divided by its deviation first; and the
        shares `coverage_50` and `coverage_90` of values inside the bands.
    """
    count, crps, square, inside_50, inside_90 = sums.T
    total = count.sum()
    values = {
        "crps": crps.sum() / total,
        "rmse": np.sqrt(square.sum() / total),
        "crps_standardized": (crps / deviation).sum() / total,
        "rmse_standardized": np.sqrt((square / deviation**2).sum() / total),
    }
    if has_bands:
        values |= {"coverage_50": inside_50.sum() / total, "coverage_90": inside_90.sum() / total}
    return {name: float(value) for name, value in values.items()}


# ---------------------------------------------------------------------------------------------
# Baselines


def sequence_baselines(known: np.ndarray, task: str, season: int | None) -> dict[str, np.ndarray]:
    """Return simple completions of sequences, by name, each (n, C, length) and filled where `known` is NaN.

    - `persistence`: the last known value (before the first one: the next).
    - `linear`: for a gap, the line between the values at its ends. For a forecast, the line through the first and the
      last known value, continued (the drift method: Hyndman & Athanasopoulos, "Forecasting", section 5.2).
    - `seasonal`: the value one season earlier, or two, ...; where none of these is known, the value one season later,
      or two, ...; where that is not known either, as persistence.

    A channel without any known value stays NaN.

    Args:
        known: the sequences (n, C, length), NaN where they are unknown.
        task: "forecast" or "impute".
        season: the length of a season; None leaves `seasonal` out.
    """
    table = pd.DataFrame(known.reshape(-1, known.shape[-1]).T)  # a column for each channel of each item
    persistence = table.ffill().bfill()
    found = {"persistence": persistence}
    found["linear"] = _drift(table) if task == "forecast" else table.interpolate(limit_direction="both")
    if season is not None:
        phase = np.arange(len(table)) % season
        earlier = table.groupby(phase).ffill()
        found["seasonal"] = earlier.groupby(phase).bfill().fillna(persistence)
    return {name: each.to_numpy().T.reshape(known.shape) for name, each in found.items()}


def _drift(table: pd.DataFrame) -> pd.DataFrame:
    """Continue the line through the first and the last known value of each column."""
    values = table.to_numpy()
    is_known = np.isfinite(values)
    columns = np.arange(values.shape[1])
    first, last = is_known.argmax(axis=0), len(values) - 1 - is_known[::-1].argmax(axis=0)
    rise = values[last, columns] - values[first, columns]
    slope = np.divide(rise, last - first, out=np.zeros_like(rise), where=last > first)
    line = values[last, columns] + slope * (np.arange(len(values))[:, None] - last)
    return pd.DataFrame(np.where(is_known, values, line))


def image_baselines(known: np.ndarray) -> dict[str, np.ndarray]:
    """Return simple completions of images, by name, each (n, C, H, W) and filled where `known` is NaN.

    - `mean`: the mean of the known pixels of the channel.
    - `linear`: the mean of the line between the pixels at the left and right of the hole, and of the line between those
      above and below.

    Args:
        known: the images (n, C, H, W), NaN where they are unknown.
    """
    mean = np.nanmean(known, axis=(2, 3), keepdims=True)
    along = [_lines(known), _lines(known.swapaxes(2, 3)).swapaxes(2, 3)]
    hidden = np.isnan(known)
    return {"mean": np.where(hidden, mean, known), "linear": np.where(hidden, (along[0] + along[1]) / 2, known)}


def _lines(known: np.ndarray) -> np.ndarray:
    """Fill NaN by the line between the known values on both sides, along the last axis."""
    table = pd.DataFrame(known.reshape(-1, known.shape[-1]).T)
    return table.interpolate(limit_direction="both").to_numpy().T.reshape(known.shape)


def find_season(sequences: np.ndarray, longest: int) -> int | None:
    """Return the length of a season, the shortest lag that is one of the highest peaks of the autocorrelation.

    The autocorrelation is the mean over channels. Its peaks at twice, three times, ... the season are about as high as
    the first, so the first peak of at least 90% of the highest is taken.

    Args:
        sequences: the training data (N, C, length); missing values (NaN) count as the mean of their channel.
        longest: the longest season; twice a season must also fit into a sequence.

    Returns:
        At least 2; None if there is no peak above 0.
    """
    longest = min(longest, sequences.shape[-1] // 2)
    if longest < 2:
        return None
    filled = np.where(np.isnan(sequences), np.nanmean(sequences, axis=(0, 2), keepdims=True), sequences)
    # one lag more on each side, lag 0 too, because a peak has neighbours
    at_lags = np.concatenate(([1.0], autocorrelation(filled, longest + 1).mean(axis=0)))
    peaks = [lag for lag in find_peaks(at_lags)[0] if at_lags[lag] > 0]
    return _first_high(peaks, at_lags)


def _first_high(peaks: Sequence[int], heights: np.ndarray) -> int | None:
    """Return the first of these places that is at least 90% as high as the highest, or None if there are none."""
    highest = max((heights[place] for place in peaks), default=0)
    return next((int(place) for place in peaks if heights[place] >= 0.9 * highest), None)
