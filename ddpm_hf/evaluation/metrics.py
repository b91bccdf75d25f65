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
    x = np.asarray(x, dtype=np.float64)
    length = x.shape[-1]
    lags = lags or max(1, length // 2)
    centred = x - x.mean(axis=(0, 2), keepdims=True)
    variance = (centred**2).mean(axis=(0, 2))
    size = scipy.fft.next_fast_len(length + lags, real=True)  # zeros behind the sequence keep it from wrapping around
    power = np.zeros((x.shape[1], size // 2 + 1))
    for part in np.array_split(centred, -(-centred[:, :, 0].size * size // FFT_VALUES)):
        transformed = scipy.fft.rfft(part, size, axis=-1)
        power += (transformed.real**2 + transformed.imag**2).sum(axis=0)
    sums = scipy.fft.irfft(power, size, axis=-1)[:, 1 : lags + 1]
    counts = len(x) * (length - np.arange(1, lags + 1))
    return sums / np.where(counts > 0, counts, np.nan) / np.where(variance > 0, variance, 1)[:, None]


def autocorrelation_error(x: np.ndarray, y: np.ndarray) -> float:
    """Return the root mean square, over channels and lags, of the difference of two autocorrelations (C, lags)."""
    return float(np.sqrt(((x - y) ** 2).mean()))


class Neighbours(NamedTuple):
    """The nearest rows of some queries.

    Attributes:
        index: the index (n,) of each query's nearest row.
        distance: the Euclidean distance (n,) to it, float64.
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


def nearest(
    queries: Tensor, reference: Tensor, exclude: Tensor | None = None, mirror: Mirror | None = None, chunk: int = 512
) -> Neighbours:
    """Find the row of `reference` (N, D) that is nearest to each of `queries` (n, D), on the device of the queries.

    Args:
        queries: the vectors whose neighbours are looked for.
        reference: the rows to look among.
        exclude: the indices (n, k) of rows that do not count for each query; k + 1 must be at most N.
        mirror: if given, the distance to a row is the smaller one of those to it and to its mirror image.
        chunk: the number of queries that are compared at once.
    """
    reference = reference.to(queries.device)
    exclude = None if exclude is None else exclude.to(queries.device)
    if mirror is not None:  # mirroring the query gives the same distance as mirroring the row
        straight, turned = (nearest(q, reference, exclude, chunk=chunk) for q in (queries, mirror(queries)))
        nearer = turned.distance < straight.distance
        return Neighbours(*(torch.where(nearer, b, a) for a, b in zip(straight, turned)))
    indices, distances = [], []
    squares = reference.square().sum(dim=1)
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        # |r|^2 - 2 q.r ranks the rows; the first few are then measured without the cancellation in it
        scores = squares - 2 * part @ reference.T
        if exclude is not None:
            scores.scatter_(1, exclude[start : start + chunk], torch.inf)
        ranked = scores.topk(min(4, len(reference)), dim=1, largest=False)
        exact = (part[:, None].double() - reference[ranked.indices].double()).square().sum(dim=2).sqrt()
        exact[ranked.values == torch.inf] = torch.inf
        best = exact.argmin(dim=1, keepdim=True)
        indices.append(ranked.indices.gather(1, best)[:, 0])
        distances.append(exact.gather(1, best)[:, 0])
    return Neighbours(torch.cat(indices), torch.cat(distances))


def too_close(queries: Tensor, reference: Tensor, own: Tensor | None = None, mirror: Mirror | None = None) -> Tensor:
    """Return True for each query that is nearer to its nearest row than that row is to any other row, as (n,).

    A copy of training data is near one item and far from what that item resembles (compare the nearest-neighbour test
    of Meehan, Chaudhuri, Dasgupta 2020, arXiv:2004.05675).

    Args:
        queries: the vectors (n, D).
        reference: the rows (N, D). They must be `distinct`: equal rows would be each other's neighbours at distance 0,
            and no copy of them would be found.
        own: the index (n,) of the row that each query is. That row counts nowhere for it, so the result is the rate of
            real data, each item left out in turn; a sampler that copies nothing would have that rate.
        mirror: if given, a row and its mirror image are one item, so mirrored copies are copies.
    """
    reference, own = reference.to(queries.device), None if own is None else own[:, None].to(queries.device)
    found = nearest(queries, reference, own, mirror)
    itself = found.index[:, None]
    excluded = itself if own is None else torch.cat((itself, own), dim=1)
    other = nearest(reference[found.index], reference, excluded, mirror)
    return found.distance < other.distance
