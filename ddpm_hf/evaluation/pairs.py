"""The conditions of real items, for models with paired conditions: samples are given them, and losses are told them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.conditions import matching
from ddpm_hf.data.images import BadImageError
from ddpm_hf.data.loading import load_item, load_pair, underlying
from ddpm_hf.data.scaling import Scaling, has_own_units
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.pipeline.pairs import encode_condition
from ddpm_hf.randomness import Stream, derive_seed


class Pairs:
    """Items and their conditions.

    Args:
        dataset: the items, map-style.
        condition: their conditions, as `load_pair` takes them.
        scaling: the map between data units and model units of the conditions.
    """

    def __init__(self, dataset: Any, condition: Any, scaling: Scaling):
        self.dataset, self.condition, self.scaling = dataset, condition, scaling

    @classmethod
    def of_feed(cls, feed: Any) -> "tuple[Pairs | None, Pairs | None]":
        """Return the pairs that a feed trains on, the first ones of a stream, and those that it holds out, or None."""
        if feed.condition is None:
            return None, None
        held = None
        if feed.held_out is not None:
            held = cls(feed.held_out, feed.held_out_condition, feed.condition_scaling)
        return cls(feed.paired, feed.condition, feed.condition_scaling), held

    @classmethod
    def of_part(cls, dataset: Any, condition: Any) -> "Pairs | None":
        """Return the pairs of a part of stored data, whose conditions `condition` holds; None where there are none."""
        if dataset is None or condition is None:
            return None
        own = matching(underlying(dataset), condition)
        return cls(dataset, own, own.scaling)

    def conditions(self, numbers: Sequence[int]) -> Tensor:
        """Return the conditions of the items with these numbers as a pipeline is given them, (B, C', *own).

        Sequences and images in units of their own are in these units, and other images are levels from 0 to 1.
        """
        x = self._loaded(numbers)
        if x.dtype == torch.uint8:
            return x.float() / 255
        if x.ndim == 4 and not has_own_units(self.scaling):
            return x / 2 + 0.5
        return self.scaling.to_data(x.double().flatten(2)).reshape(x.shape)

    def levels(self, numbers: Sequence[int]) -> Tensor:
        """Return the conditions of images with these numbers as levels from 0 to 1, for a picture."""
        x = self._loaded(numbers)
        return x.float() / 255 if x.dtype == torch.uint8 else (x / self.scaling.limit / 2 + 0.5).clamp(0, 1)

    def is_readable(self, number: int) -> bool:
        """Return False if the item with this number or its condition is an image that cannot be read."""
        try:
            self._loaded([number])
        except BadImageError:
            return False
        return True

    def _loaded(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([load_pair(self.dataset, self.condition, int(number))[1] for number in numbers])

    def items(self, numbers: Sequence[int]) -> Tensor:
        """Return the items with these numbers in model units, (B, C, *spatial)."""
        return torch.stack([load_item(self.dataset, int(number)) for number in numbers])

    def model(self, pipeline: Any, model: Callable, numbers: Sequence[int]) -> Callable:
        """Return the model of a pipeline, told the conditions of the items with these numbers."""
        return partial(model, condition=encode_condition(pipeline, self.conditions(numbers), len(numbers)))


class PairErrors:
    """How far samples are from the true items of their pairs.

    Args:
        pairs: the pairs.
        numbers: the number of the pair of each sample of this process, in the order in which samples are drawn.
        scaling: the map between data units and model units of the items.
    """

    def __init__(self, pairs: Pairs, numbers: np.ndarray, scaling: Scaling):
        self.pairs, self.numbers, self.scaling, self.errors = pairs, numbers, scaling, []

    def watch(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the batches of samples, as a pipeline gives them for "np", and keep their errors."""
        done = 0
        for samples in batches:
            truths = self.pairs.items(self.numbers[done : done + len(samples)]).double().flatten(2)
            done += len(samples)
            if has_own_units(self.scaling):
                truths = self.scaling.to_data(truths)
            elif samples.ndim == 4:
                truths = truths / 2 + 0.5
            given = np.moveaxis(samples, -1, 1) if samples.ndim == 4 else samples
            found = torch.from_numpy(np.ascontiguousarray(given)).double().flatten(2)
            self.errors.append((found - truths).square().flatten(1).mean(dim=1))
            yield samples

    def values(self, shares: Shares, is_picture: bool) -> dict[str, float]:
        """Return `pair_rmse`, in units of the samples, and for pictures `pair_psnr` in dB, the mean over samples."""
        squared = shares.gather(torch.cat(self.errors) if self.errors else None)
        values = {"pair_rmse": squared.mean().sqrt().item()}
        if is_picture:
            values["pair_psnr"] = (-10 * squared.clamp(min=1e-10).log10()).mean().item()  # 100 dB at most
        return values


def chosen_pairs(items: int, num_samples: int, seed: int) -> np.ndarray:
    """Return the number of the pair that each sample is asked for, int64 (num_samples,), drawn by the seed.

    No pair is taken twice before each has been taken once. The pair of sample number i depends on nothing else, so
    neither on the number of processes nor on the batch size.
    """
    order = np.random.default_rng(derive_seed(seed, Stream.EVALUATION, 8)).permutation(items)
    return np.resize(order, num_samples)


def is_paired(pipeline: Any) -> bool:
    """Return True if the model of a pipeline is given a paired condition."""
    return getattr(getattr(pipeline, "config", None), "condition", None) == "paired"
