"""Memorization is the share of samples that are copies of real items, beside the rate of real items themselves."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_hf.evaluation import feature_cache
from ddpm_hf.evaluation.metrics import Reference, distinct
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.version import __version__

NEIGHBOUR_SIDE = 32  # pictures are compared with their neighbours at this size
AT_ONCE = 512  # the number of samples that are gathered before their neighbours are looked for


class Memorization:
    """Copies among samples: those that are nearer to a real item than that item is to any other real item.

    A copy of training data is near one item and far from what that item resembles (compare the nearest-neighbour test
    of Meehan, Chaudhuri, Dasgupta 2020, arXiv:2004.05675). What concerns real items alone is computed once.

    Args:
        reference: the vectors (N, D) of the real items; equal ones count once, or copies of them would not be found.
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        mirrored_shape: the shape (C, H, W) of the vectors if a picture and its mirror image are one item; None if not.
        kept: True if the neighbours of real items are kept on disk, in the folder of the settings, by the content of
            the vectors.

    Attributes:
        num_drawn: the number of real items that `honest_rate` is measured on: as many as there are samples, or all.
        honest_rate: the rate of real items, each left out of the others in turn; a sampler that copies nothing would
            have it.

    Raises:
        ValueError: if there are fewer than 3 different items.
    """

    def __init__(
        self,
        reference: Tensor,
        settings: EvalSettings,
        shares: Shares,
        mirrored_shape: tuple | None = None,
        kept: bool = False,
    ):
        self.shares, mirror = shares, None
        if mirrored_shape is not None:
            mirror = lambda vectors: vectors.unflatten(1, mirrored_shape).flip(-1).flatten(1)  # noqa: E731
        self.known = Reference(reference[distinct(reference, mirror)], mirror)
        count = len(self.known.rows)
        if count < 3:
            raise ValueError(
                f"the metric memorization needs at least 3 different real items, the data has {count}: "
                "name the other metrics"
            )
        # the two nearest other items of each item, and the distances to them; NaN where nobody has asked yet
        self.others = torch.zeros(count, 2, dtype=torch.long)
        self.distances = torch.full((count, 2), torch.nan, dtype=torch.float64)
        self.file = None
        if kept:
            key = hashlib.sha256(self.known.rows.numpy().tobytes())
            key.update(repr((__version__, tuple(self.known.rows.shape), mirrored_shape)).encode())
            self.file = feature_cache.folder_of(settings.cache_dir) / f"{key.hexdigest()[:32]}-neighbours.npz"
            self._load()
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 2)).permutation(count)
        own = torch.from_numpy(order[: settings.num_samples])
        self.num_drawn = len(own)
        self._find_others(own)
        near = self.others[own, 0]
        self._find_others(near)
        # the distance from the nearest item to its own nearest one, without the item that is left out
        beyond = torch.where(self.others[near, 0] == own, self.distances[near, 1], self.distances[near, 0])
        self.honest_rate = (self.distances[own, 0] < beyond).double().mean().item()

    def _load(self) -> None:
        """Take the neighbours that earlier evaluations found, if all processes can read the same ones."""
        self.shares.accelerator.wait_for_everyone()
        stored = feature_cache.load(self.file, self.shares.accelerator.print, ("others", "distances"))
        # each node of a cluster may have its own cache, with the neighbours of other items
        content = None if stored is None else hashlib.sha256(stored["distances"].tobytes()).hexdigest()
        if content is not None and stored["distances"].shape != tuple(self.distances.shape):
            content = None
        if None not in (everyone := set(self.shares.gather_objects([content]))) and len(everyone) == 1:
            self.others, self.distances = (torch.from_numpy(stored[name]) for name in ("others", "distances"))
        self.shares.accelerator.wait_for_everyone()

    def _keep(self) -> None:
        """Write the neighbours that are known to the cache."""
        if self.file is not None and self.shares.accelerator.is_local_main_process:
            arrays = {"others": self.others.numpy(), "distances": self.distances.numpy()}
            feature_cache.save(self.file, arrays, print)

    def _find_others(self, items: Tensor) -> None:
        """Find the nearest others of items (n,), on all processes, unless they are known."""
        items = items.unique()
        missing = items[self.distances[items, 0].isnan()]
        if not len(missing):
            return
        share = self.shares.of(len(missing))
        own = missing[share.start : share.stop]
        found = self.known.nearest(self.known.rows[own], 2, exclude=own[:, None])
        self.others[missing] = self.shares.gather(found.index)
        self.distances[missing] = self.shares.gather(found.distance)
        self._keep()

    def look(self, vectors_of: Callable) -> "Neighbouring":
        """Return a function for `Shares.collect` that finds the nearest real items of batches.

        Args:
            vectors_of: a function from a batch to vectors (B, D).
        """
        return Neighbouring(self.known, vectors_of)

    def values(self, found: Tensor) -> dict[str, float]:
        """Return the metric's value, and the rate of real items. All processes must call this.

        Args:
            found: the index of the nearest real item of each sample, and the distance to it, (n, 2), on all processes.
        """
        near, distance = found[:, 0].long(), found[:, 1]
        self._find_others(near)
        copies = (distance < self.distances[near, 0]).double()
        return {"memorization": copies.mean().item(), "memorization_real": self.honest_rate}


class Neighbouring:
    """Finds the nearest real items of batches, many vectors at once, as rows (n, 2): their indices and distances.

    Args:
        known: the real items.
        vectors_of: a function from a batch to vectors (B, D).
    """

    def __init__(self, known: Reference, vectors_of: Callable):
        self.known, self.vectors_of, self.waiting = known, vectors_of, []

    def __call__(self, batch) -> Tensor:
        """Return the rows of this batch and those before it, or no rows until there are enough."""
        self.waiting.append(self.vectors_of(batch))
        return self.rest() if sum(map(len, self.waiting)) >= AT_ONCE else torch.zeros(0, 2, dtype=torch.float64)

    def rest(self) -> Tensor:
        """Return the rows of what still waits."""
        if not self.waiting:
            return torch.zeros(0, 2, dtype=torch.float64)
        vectors, self.waiting = torch.cat(self.waiting), []
        found = self.known.nearest(vectors)
        return torch.cat((found.index.double(), found.distance), dim=1)


def neighbour_size(size: tuple) -> list[int]:
    """Return the height and width at which pictures of this size are compared."""
    return [min(side, NEIGHBOUR_SIDE) for side in size]


def neighbour_vectors(x: Tensor) -> Tensor:
    """Turn pictures (B, C, H, W) into vectors (B, D), averaged down to a side of at most 32.

    On a grid of 2^-20 all sums are exact in float64, so the vector of a mirrored picture is the mirrored vector.
    """
    grid = (x.double() * 2**20).round()
    return (F.adaptive_avg_pool2d(grid, neighbour_size(x.shape[2:])) / 2**20).float().flatten(1)
