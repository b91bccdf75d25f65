"""Distances between two sets of data, as functions of arrays: Fréchet, sliced Wasserstein, autocorrelation, copies.

All compute in float64 and take sets of different sizes. What the network's features are is told in `features`.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LOG_FLOOR = 1e-8  # of the power of a standardized sequence, so that silence has a logarithm


class Gaussian(NamedTuple):
    """`mean` (D,) and a factor `root` (r, D) of the covariance, root' root, in float64."""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> "Gaussian":
        """Fit mean and covariance (over n - 1) to samples (n, D).

        Raises:
            ValueError: fewer than two samples, or another shape.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"samples must be (n, D) with n of at least 2, got {x.shape}")
        root = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
        # tall data in the coordinates of its own span: the same covariance from a D x D factor
        return cls(x.mean(axis=0), np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root)


def frechet_distance(x: Gaussian | np.ndarray, y: Gaussian | np.ndarray) -> float:
    """Fréchet distance of two Gaussians, or of those fitted to two sets (Dowson, Landau 1982; for features: Heusel et
    al. 2017, equation 6): |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).

    With S_x = A'A and S_y = B'B the last trace is the sum of the singular values of A B', which needs no root of a
    matrix and holds for fewer samples than dimensions.

    Args:
        x, y: `Gaussian`, or samples (n, D) and (m, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    x, y = (v if isinstance(v, Gaussian) else Gaussian.fit(v) for v in (x, y))
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"both must have as many dimensions, got {len(x.mean)} and {len(y.mean)}")
    overlap = np.linalg.svd(x.root @ y.root.T, compute_uv=False).sum()
    gap = x.mean - y.mean
    # the distance is not negative; its rounding can be
    return max(0.0, float(gap @ gap + (x.root**2).sum() + (y.root**2).sum() - 2 * overlap))


def log_power_spectrum(x: np.ndarray) -> np.ndarray:
    """Sequences (n, C, length) -> (n, C * (length // 2 + 1)): log(|X_f|^2 / length + 1e-8), X the discrete Fourier
    transform. White noise of variance 1 has a mean power of 1 at every frequency.
    """
    x = np.asarray(x, dtype=np.float64)
    power = np.abs(np.fft.rfft(x, axis=-1)) ** 2 / x.shape[-1]
    return np.log(power + LOG_FLOOR).reshape(len(x), -1)


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015): the root of the mean, over random unit directions, of the
    squared 2-Wasserstein distance between the projections, which are exact (sorted samples).

    Args:
        x, y: (n, D) and (m, D).
        projections: directions, drawn by `seed`.
    """
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    directions = unit_directions(x.shape[1], projections, seed)
    # Quantile functions are steps; between the union of their corners both are constant.
    corners = np.union1d(np.arange(len(x) + 1) / len(x), np.arange(len(y) + 1) / len(y))
    middle, widths = (corners[1:] + corners[:-1]) / 2, np.diff(corners)
    places = [(middle * len(v)).astype(int) for v in (x, y)]
    total = 0.0
    for part in np.array_split(directions, -(-projections // 32)):
        a, b = (np.sort(v @ part.T, axis=0)[place] for v, place in zip((x, y), places))
        total += float(widths @ ((a - b) ** 2).sum(axis=1))
    return float(np.sqrt(total / projections))


def unit_directions(dimensions: int, count: int, seed: int) -> np.ndarray:
    """(count, dimensions) unit vectors, uniform on the sphere."""
    directions = np.random.default_rng(seed).normal(size=(count, dimensions))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def autocorrelation(x: np.ndarray, lags: int | None = None) -> np.ndarray:
    """Sequences (n, C, length) -> (C, lags): rho_k = mean over sequences and times of (x_t - m)(x_{t+k} - m) / s^2, for
    k = 1 ... lags (length // 2 if not given), m and s^2 the channel's mean and variance over the whole set."""
    x = np.asarray(x, dtype=np.float64)
    lags = lags or max(1, x.shape[-1] // 2)
    centred = x - x.mean(axis=(0, 2), keepdims=True)
    variance = (centred**2).mean(axis=(0, 2))
    products = [(centred[..., k:] * centred[..., : x.shape[-1] - k]).mean(axis=(0, 2)) for k in range(1, lags + 1)]
    return np.stack(products, axis=1) / np.where(variance > 0, variance, 1)[:, None]


def autocorrelation_error(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square, over channels and lags, of the difference between the `autocorrelation` of two sets."""
    return float(np.sqrt(((autocorrelation(x) - autocorrelation(y)) ** 2).mean()))


class Neighbours(NamedTuple):
    """`index`: of the nearest row; `distance`: Euclidean, float64."""

    index: Tensor
    distance: Tensor


Mirror = Callable[[Tensor], Tensor]  # rows (n, D) -> their mirror images


def distinct(x: Tensor, mirror: Mirror | None = None) -> Tensor:
    """Indices of the rows of x (N, D) in their order, of equal ones the first only.

    Args:
        mirror: rows that are each other's mirror images are equal too.
    """
    rows = (x + 0.0).numpy()  # -0 becomes 0
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
    """The row of `reference` (N, D) nearest to each of `queries` (n, D).

    Args:
        exclude: (n, k) rows that do not count, for each query; k + 1 must be at most N.
        mirror: the distance is the smaller one of those to a row and to its mirror image.
    """
    if mirror is not None:  # mirroring either of two gives the same distance
        straight, turned = (nearest(q, reference, exclude, chunk=chunk) for q in (queries, mirror(queries)))
        nearer = turned.distance < straight.distance
        return Neighbours(*(torch.where(nearer, b, a) for a, b in zip(straight, turned)))
    indices, distances = [], []
    squares = reference.square().sum(dim=1)
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        # ranked by |r|^2 - 2 q.r; the first few are then measured without its cancellation
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
    """Which of `queries` lie nearer to a row of `reference` than that row's own nearest neighbour does: (n,) of bool.

    A copy of training data is near one item and far from what that item resembles (compare the nearest-neighbour test
    of Meehan, Chaudhuri, Dasgupta 2020). `reference` must be `distinct`: equal rows would be each other's neighbours at
    distance 0, and no copy of them would be found.

    Args:
        own: (n,) the row that each query is, which then counts nowhere: the rate of real data, left out one by one, is
            what a sampler that copies nothing would have.
        mirror: a row and its mirror image are one item, so that mirrored copies are copies.
    """
    own = None if own is None else own[:, None]
    found = nearest(queries, reference, own, mirror)
    itself = found.index[:, None]
    excluded = itself if own is None else torch.cat((itself, own), dim=1)
    other = nearest(reference[found.index], reference, excluded, mirror)
    return found.distance < other.distance
