"""Precision, recall, density and coverage: which part of each set lies near the other, by balls around its rows.

The ball around a row reaches to its k-th nearest other row of its own set. Distances are computed in blocks, by
products of matrices in float64; those that rounding could put on the wrong side of a ball's surface are computed again
from differences, so that copies count as copies.
"""

from collections.abc import Callable

import numpy as np
import torch

from ddpm_hf.evaluation.settings import FIDELITY, neighbours_of
from ddpm_hf.evaluation.shares import Shares

BLOCK = 2**24  # the number of distances, or of values in differences, that are held at once


class Fidelity:
    """Precision, recall, density and coverage of samples against one set of real rows.

    Args:
        real: the features (N, D) of the real items.
        shares: the exchange between processes, which share the rows.
        neighbours: k; None means 3 for precision and recall, and 5 for density and coverage, as the papers have it.
        kept: a function from a name and a function that computes an array to that array, which may come from a cache.
            All processes call it.
    """

    def __init__(
        self, real: np.ndarray, shares: Shares, neighbours: int | None = None,
        kept: Callable[[str, Callable[[], np.ndarray]], np.ndarray] = lambda name, compute: compute(),
    ):  # fmt: skip
        self.real, self.shares, self.neighbours, self.kept = real, shares, neighbours, kept
        self.balls: np.ndarray | None = None

    def _real_radii(self, k: int) -> np.ndarray:
        """Return the squared radii (N,) of the real balls to neighbour k; those to all k are computed once."""
        if self.balls is None:
            largest = max(neighbours_of(metric, self.neighbours) for metric in FIDELITY)
            self.balls = self.kept(f"radii-{largest}", lambda: shared_radii(self.real, largest, self.shares))
        return self.balls[:, k - 1]

    def values(self, samples: np.ndarray, metrics: list[str]) -> dict[str, float]:
        """Return the values of those of the four metrics that `metrics` names. All processes must call this.

        Precision is the share of samples in at least one real ball, recall the share of real rows in at least one ball
        of a sample (Kynkäänniemi et al., arXiv:1904.06991, equations 1 and 2). Coverage is the share of real balls with
        at least one sample, and density the mean number of real balls that a sample is in, over k (Naeem et al.,
        arXiv:2002.09797, equations 3 and 4). A surface belongs to its ball, except for density, which is then 1 for
        identical sets.

        Args:
            samples: the features (n, D) of the samples; the same on all processes.
            metrics: the metrics that are asked for.
        """
        k = {metric: neighbours_of(metric, self.neighbours) for metric in ("precision", "density")}
        near, dense = (self._real_radii(k[metric]) for metric in ("precision", "density"))
        own = shared_radii(samples, k["precision"], self.shares)[:, -1]
        share = self.shares.of(len(self.real))
        within, counts = np.zeros(len(samples), bool), np.zeros(len(samples), np.int64)
        recalled, covered = np.zeros(len(self.real), bool), np.zeros(len(self.real), bool)
        size = max(1, BLOCK // len(samples))
        for start in range(share.start, share.stop, size):
            rows = slice(start, min(start + size, share.stop))
            r, d = near[rows, None], dense[rows, None]
            distances = squared_distances(self.real[rows], samples, (r, d, own[None]))
            within |= (distances <= r).any(axis=0)
            counts += (distances < d).sum(axis=0)
            recalled[rows] = (distances <= own).any(axis=1)
            covered[rows] = (distances <= d).any(axis=1)
        gathered = (
            self.shares.gather(torch.from_numpy(x[None])).sum(dim=0) for x in (within, counts, recalled, covered)
        )
        within, counts, recalled, covered = (x.double().numpy() for x in gathered)
        found = {
            "precision": (within > 0).mean(), "recall": recalled.mean(),
            "density": counts.mean() / k["density"], "coverage": covered.mean(),
        }  # fmt: skip
        return {name: float(value) for name, value in found.items() if name in metrics}


def shared_radii(x: np.ndarray, k: int, shares: Shares) -> np.ndarray:
    """Return the squared distances (n, k) of each row of x (n, D) to its k nearest other rows, in order.

    All processes must call this, and share the rows.

    Raises:
        ValueError: if there are fewer than k + 1 rows.
    """
    if len(x) <= k:
        raise ValueError(f"balls to the neighbour number {k} need at least {k + 1} rows, got {len(x)}")
    share = shares.of(len(x))
    found = [torch.zeros(0, k, dtype=torch.float64)]
    size = max(1, min(BLOCK // len(x), BLOCK // (x.shape[1] * (k + 4))))
    for start in range(share.start, share.stop, size):
        rows = np.arange(start, min(start + size, share.stop))
        scores = torch.from_numpy(squared_distances(x[rows], x))
        scores[torch.arange(len(rows)), torch.from_numpy(rows)] = torch.inf
        # a few more than k, because rounding may change the order of scores
        near = scores.topk(min(k + 3, len(x) - 1), dim=1, largest=False).indices.numpy()
        exact = of_pairs(x, rows.repeat(near.shape[1]), x, near.ravel()).reshape(near.shape)
        found.append(torch.from_numpy(np.sort(exact, axis=1)[:, :k]))
    return shares.gather(torch.cat(found)).numpy()


def squared_distances(x: np.ndarray, y: np.ndarray, surfaces: tuple = ()) -> np.ndarray:
    """Return the squared distances (n, m) between the rows of x (n, D) and y (m, D), float64.

    Args:
        x, y: the rows.
        surfaces: squared radii that broadcast to (n, m). A distance that rounding cannot tell from one of them is
            computed from differences, so that equal pairs of rows have equal distances.
    """
    # from their centre, because a large number that all rows share would drown the differences in rounding
    centre = y.mean(axis=0, dtype=np.float64)
    a, b = (np.subtract(rows, centre, dtype=np.float64) for rows in (x, y))
    scale = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)
    distances = scale - 2 * a @ b.T
    margin = 4 * (x.shape[1] + 2) * np.finfo(np.float64).eps * scale  # bounds the rounding of sums of D products
    for radius in surfaces:
        first, second = np.nonzero(np.abs(distances - radius) <= margin)
        distances[first, second] = of_pairs(x, first, y, second)
    return distances


def of_pairs(x: np.ndarray, first: np.ndarray, y: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the squared distance (p,) of each row x[first] to the row y[second], from differences in float64."""
    size = max(1, BLOCK // x.shape[1])
    parts = [
        ((x[first[i : i + size]].astype(np.float64) - y[second[i : i + size]]) ** 2).sum(axis=1)
        for i in range(0, len(first), size)
    ]
    return np.concatenate([np.zeros(0), *parts])
