"""Memorization is the share of samples that are copies of real items, beside the rate of real items themselves."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_hf.evaluation.metrics import distinct, too_close
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.randomness import Stream, derive_seed

NEIGHBOUR_SIDE = 32  # pictures are compared with their neighbours at this size


class Memorization:
    """Copies among samples, by the distance to the nearest real item; see `metrics.too_close`.

    Args:
        reference: the vectors (N, D) of the real items; equal ones count once.
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        mirrored_shape: the shape (C, H, W) of the vectors if a picture and its mirror image are one item; None if not.

    Attributes:
        num_drawn: the number of real items that `honest_rate` is measured on: as many as there are samples, or all.
        honest_rate: the rate of real items, each left out of the others in turn; a sampler that copies nothing would
            have it.

    Raises:
        ValueError: if there are fewer than 3 different items.
    """

    def __init__(self, reference: Tensor, settings: EvalSettings, shares: Shares, mirrored_shape: tuple | None = None):
        self.shares, self.mirror = shares, None
        if mirrored_shape is not None:
            self.mirror = lambda vectors: vectors.unflatten(1, mirrored_shape).flip(-1).flatten(1)
        self.known = reference[distinct(reference, self.mirror)]
        if len(self.known) < 3:
            raise ValueError(
                f"the metric memorization needs at least 3 different real items, the data has {len(self.known)}: "
                "name the other metrics"
            )
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 2)).permutation(len(self.known))
        own = torch.from_numpy(order[: settings.num_samples])
        self.num_drawn = len(own)
        share = shares.of(len(own))
        own = own[share.start : share.stop]
        close = too_close(self.known[own], self.known, own, self.mirror).double() if len(own) else None
        self.honest_rate = shares.gather(close).mean().item()

    def copies(self, vectors: Tensor) -> Tensor:
        """Return 1.0 for each vector (B, D) that is too close to a real item, and 0.0 for each other, as (B,)."""
        return too_close(vectors, self.known, mirror=self.mirror).double()

    def values(self, copies: Tensor) -> dict[str, float]:
        """Return the metric's value for all samples (n,), and the rate of real items."""
        return {"memorization": copies.mean().item(), "memorization_real": self.honest_rate}


def neighbour_size(size: tuple) -> list[int]:
    """Return the height and width at which pictures of this size are compared."""
    return [min(side, NEIGHBOUR_SIDE) for side in size]


def neighbour_vectors(x: Tensor) -> Tensor:
    """Turn pictures (B, C, H, W) into vectors (B, D), averaged down to a side of at most 32.

    On a grid of 2^-20 all sums are exact in float64, so the vector of a mirrored picture is the mirrored vector.
    """
    grid = (x.double() * 2**20).round()
    return (F.adaptive_avg_pool2d(grid, neighbour_size(x.shape[2:])) / 2**20).float().flatten(1)
