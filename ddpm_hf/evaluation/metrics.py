"""Distances between two sets of data, as functions of arrays: Fréchet, sliced Wasserstein, autocorrelation, copies.

All of them compute in float64 and take sets of different sizes. `features` has the networks whose features FID and KID
compare.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

LOG_FLOOR = 1e-8  # added to the power of a standardized sequence, so that silence has a logarithm
SCORES = 2**25  # the number of scores of rows that are held at once
FFT_VALUES = 2**22  # the number of values that are transformed at once


class Gaussian(NamedTuple):
    """A Gaussian distribution, in float64.

    Attributes:
        mean: (D,).
        root: a factor (r, D) of the covariance, which is root' root.
    """

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> "Gaussian":
        """Fit a Gaussian to samples (n, D); the covariance divides by n - 1.

        Raises:
            ValueError: if there are fewer than two samples, or they have another shape.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"samples must be (n, D) with n of at least 2, got {x.shape}")
        root = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
        # with more samples than dimensions, QR gives a D x D factor of the same covariance
        return cls(x.mean(axis=0), np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root)


def frechet_distance(x: Gaussian | np.ndarray, y: Gaussian | np.ndarray) -> float:
    """Return the squared Fréchet distance of two Gaussians: |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    It is due to Dowson and Landau (1982); Heusel et al. (arXiv:1706.08500, equation 6) apply it to features of images.
    With S_x = A'A and S_y = B'B, the trace of the root is the sum of the singular values of A B'. This needs no root of
    a matrix, and holds for fewer samples than dimensions.

    Args:
        x, y: Gaussians, or samples (n, D) and (m, D), to which Gaussians are fitted.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    x, y = (v if isinstance(v, Gaussian) else Gaussian.fit(v) for v in (x, y))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"both must have the same number of dimensions, got {len(x.mean)} and {len(y.mean)}")
    overlap = np.linalg.svd(x.root @ y.root.T, compute_uv=False).sum()
    gap = x.mean - y.mean
    # rounding can make a distance of 0 negative
    return max(0.0, float(gap @ gap + (x.root**2).sum() + (y.root**2).sum() - 2 * overlap))


def log_power_spectrum(x: np.ndarray) -> np.ndarray:
    """Return log(|X_f|^2 / length + 1e-8) of sequences (n, C, length), as (n, C * (length // 2 + 1)).

    X is the discrete Fourier transform. White noise of variance 1 has a mean power of 1 at every frequency.
    """
    x = np.asarray(x, dtype=np.float64)
    power = np.abs(np.fft.rfft(x, axis=-1)) ** 2 / x.shape[-1]
    return np.log(power + LOG_FLOOR).reshape(len(x), -1)


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, projections: int = 256, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance of two sets (Bonneel et al. 2015).

    It is the root of the mean, over random unit directions, of the squared 2-Wasserstein distance between the
    projections onto a direction. The distance in one dimension is exact: it compares sorted samples.

    Args:
        x, y: the sets, (n, D) and (m, D).
        projections: the number of directions.
        seed: the seed that draws the directions.
    """
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    directions = unit_directions(x.shape[1], projections, seed)
    # Both quantile functions are step functions: between two neighbours of all their corners they are constant.
    corners = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
    middle, widths = (corners[1:] + corners[:-1]) / 2, np.diff(corners)
    places = [(middle * len(v)).astype(int) for v in (x, y)]
    total = 0.0
    for part in np.array_split(directions, -(-projections // 32)):
        a, b = (np.sort(v @ part.T, axis=0)[place] for v, place in zip((x, y), places))
        total += float(widths @ ((a - b) ** 2).sum(axis=1))
    return float(np.sqrt(total / projections))


def unit_directions(dimensions: int, count: int, seed: int) -> np.ndarray:
    """Return unit vectors (count, dimensions), drawn uniformly on the sphere by `seed`."""
    directions = np.random.default_rng(seed).normal(size=(count, dimensions))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def autocorrelation(x: np.ndarray, lags: int | None = None) -> np.ndarray:
    """Return the autocorrelation of sequences (n, C, length), as (C, lags).

    rho_k is the mean, over sequences and times, of (x_t - m)(x_{t+k} - m) / s^2, where m and s^2 are the mean and the
    variance of the channel over the whole set, for k from 1 to `lags`, which defaults to length // 2. The sums of
    products are found from the mean power spectrum (Wiener-Khinchin). A channel with a NaN is NaN at all lags.
    """
    x = np.asarray(x)
    length = x.shape[-1]
    lags = lags or max(1, length // 2)
    mean = x.mean(axis=(0, 2), keepdims=True, dtype=np.float64)
    size = scipy.fft.next_fast_len(length + lags, real=True)  # zeros behind the sequence keep it from wrapping around
    power = np.zeros((x.shape[1], size // 2 + 1))
    for part in np.array_split(x, -(-x[:, :, 0].size * size // FFT_VALUES)):  # copies of all of it would cost more
        transformed = scipy.fft.rfft(part - mean, size, axis=-1)
        power += (transformed.real**2 + transformed.imag**2).sum(axis=0)
    sums = scipy.fft.irfft(power, size, axis=-1)[:, : lags + 1]
    variance = sums[:, :1] / (len(x) * length)
    counts = len(x) * (length - np.arange(1, lags + 1))
    return sums[:, 1:] / np.where(counts > 0, counts, np.nan) / np.where(variance > 0, variance, 1)


def autocorrelation_error(x: np.ndarray, y: np.ndarray) -> float:
    """Return the root mean square, over channels and lags, of the difference of two autocorrelations (C, lags)."""
    return float(np.sqrt(((x - y) ** 2).mean()))


class Neighbours(NamedTuple):
    """The nearest rows of some queries, in order.

    Attributes:
        index: the indices (n, count) of each query's nearest rows.
        distance: the Euclidean distances (n, count) to them, float64.
    """

    index: Tensor
    distance: Tensor


Mirror = Callable[[Tensor], Tensor]  # a function from rows (n, D) to their mirror images


def distinct(x: Tensor, mirror: Mirror | None = None) -> Tensor:
    """Return the indices, on the CPU, of the rows of x (N, D) that differ from all rows before them.

    Args:
        x: the rows.
        mirror: if given, rows that are each other's mirror images count as equal.
    """
    rows = (x + 0.0).cpu().numpy()  # -0 becomes 0
    keys: list[bytes] = [row.tobytes() for row in rows]
    if mirror is not None:
        keys = [min(key, row.tobytes()) for key, row in zip(keys, mirror(torch.from_numpy(rows)).numpy())]
    first: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(hashlib.sha256(key).digest(), index)
    return torch.tensor(list(first.values()), dtype=torch.long)


class Reference:
    """Rows among which neighbours are looked for. Their squared norms are computed once.

    Args:
        rows: the rows (N, D).
        mirror: if given, the distance to a row is the smaller one of those to it and to its mirror image.
    """

    def __init__(self, rows: Tensor, mirror: Mirror | None = None):
        self.rows, self.mirror = rows, mirror
        self.centre = rows.mean(dim=0)
        self.squares = squared_norms(rows - self.centre)

    def nearest(self, queries: Tensor, count: int = 1, exclude: Tensor | None = None) -> Neighbours:
        """Find the rows that are nearest to each query, on the device of the rows.

        Args:
            queries: the vectors (n, D) whose neighbours are looked for.
            count: the number of neighbours of each.
            exclude: the indices (n, k) of rows that do not count for each query; k + count must be at most N.
        """
        queries = queries.to(self.rows.device)
        exclude = None if exclude is None else exclude.to(self.rows.device)
        # what is held at once: scores of all rows, and differences to a few of them in float64
        size = max(1, min(SCORES // len(self.rows), SCORES // (8 * (count + 3) * self.rows.shape[1])))
        found = []
        for start in range(0, len(queries), size):
            part, out = queries[start : start + size], None if exclude is None else exclude[start : start + size]
            index, distance = self._candidates(part, count, out)
            if self.mirror is not None:  # mirroring the query gives the same distance as mirroring the row
                turned = self._candidates(self.mirror(part), count, out)
                index, distance = (torch.cat(pair, dim=1) for pair in zip((index, distance), turned))
            order = distance.argsort(dim=1, stable=True)
            index, distance = index.gather(1, order), distance.gather(1, order)
            if self.mirror is not None:  # a row counts once, at its smaller distance
                again = (index[:, :, None] == index[:, None, :]).tril(-1).any(dim=2)
                order = distance.masked_fill(again, torch.inf).argsort(dim=1, stable=True)
                index, distance = index.gather(1, order), distance.gather(1, order)
            found.append((index[:, :count], distance[:, :count]))
        if not found:
            return Neighbours(torch.zeros(0, count, dtype=torch.long), torch.zeros(0, count, dtype=torch.float64))
        return Neighbours(*map(torch.cat, zip(*found)))

    def _candidates(self, queries: Tensor, count: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the indices of a few rows near each query, and the exact distances to them."""
        # |r - c|^2 - 2 (q - c).r ranks the rows, for any c. With their mean as c, what all rows share loses no digits.
        # The first few are then measured without the cancellation in it
        scores = torch.addmm(self.squares, queries - self.centre, self.rows.T, alpha=-2)
        if exclude is not None:
            scores.scatter_(1, exclude, torch.inf)
        ranked = scores.topk(min(count + 3, len(self.rows)), dim=1, largest=False)
        exact = (queries[:, None].double() - self.rows[ranked.indices].double()).square().sum(dim=2).sqrt()
        exact[ranked.values == torch.inf] = torch.inf
        return ranked.indices, exact


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared norms (N,) of rows (N, D)."""
    return torch.linalg.vector_norm(rows, dim=1).square()
