"""The order in which training sees the data, and the making of its batches.

The order is an endless stream of (epoch, index) keys that follows from the seed alone, so training can start anywhere
in it, on any number of processes.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.data.images import BadImageError, ImageDataset, from_8bit, to_tensor
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.randomness import Stream, derive_seed

Key = tuple[int, int]  # (epoch, index)


@dataclass
class Batch:
    """`items`: (B, C, *spatial), float32, or uint8 of pictures; `skipped`: messages of pictures left out; `error`: why
    the batch could not be made (`items` is None then)."""

    items: Tensor | None
    skipped: list[str]
    error: str | None = None

    @property
    def x0(self) -> Tensor:
        """Float32, pictures in [-1, 1]."""
        return from_8bit(self.items) if self.items.dtype == torch.uint8 else self.items

    def to(self, device: torch.device) -> Tensor:
        """x0 on a device; pictures go there as bytes."""
        return Batch(self.items.to(device, non_blocking=True), []).x0

    def pin_memory(self) -> "Batch":
        """Pin the memory of the items; called by the DataLoader."""
        return self if self.items is None else Batch(self.items.pin_memory(), self.skipped, self.error)


def as_tensor(item: Any, limit: float = 1.0) -> Tensor:
    """An item of a data set as float32 (C, *spatial): a tensor, array or PIL image, alone, first of a tuple, or in a
    dict under "x0", "pixel_values", "image", "images" or "sequence".

    Raises:
        ValueError: something else, or values outside [-limit, limit].
    """
    if isinstance(item, dict):
        names = ("x0", "pixel_values", "image", "images", "sequence")
        found = [name for name in names if name in item]
        if not found:
            raise ValueError(
                f"an item that is a dict must have one of {', '.join(names)}; got {', '.join(map(str, item))}"
            )
        item = item[found[0]]
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, Image.Image):
        return from_8bit(to_tensor(item))
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(item)
    if not isinstance(item, Tensor) or item.ndim not in (2, 3) or not item.is_floating_point():
        got = f"{item.dtype} of shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
        raise ValueError(f"items must be float tensors (C, H, W) or (C, length) in [-1, 1], or PIL images; got {got}")
    if not (item.abs() <= limit * (1 + 1e-4)).all():
        raise ValueError(f"items must lie in [-{limit:g}, {limit:g}]; got {item.min():.4g} to {item.max():.4g}")
    return item.float()


class Part(Dataset):
    """The items of a map-style data set at `indices`, in that order."""

    def __init__(self, dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


def hold_out(dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (what is left to train on, `count` items drawn by `seed`), each in the order of the data.

    Items of a `SequenceDataset` may overlap, so it makes the parts itself, and scales both by the first.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 1 <= count < len(dataset):
        raise ValueError(f"holdout must be at least 0 and less than the {len(dataset)} items of the data, got {count}")
    if isinstance(dataset, SequenceDataset):
        rest, held = dataset.hold_out(count, seed)
        if len(held) > count:  # of whole recordings
            chosen = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT, 1)).permutation(len(held))[:count]
            held = Part(held, np.sort(chosen))
        return rest, held
    order = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT)).permutation(len(dataset))
    return Part(dataset, np.sort(order[count:])), Part(dataset, np.sort(order[:count]))


def split_record(held_out: Dataset) -> dict:
    """Return a fingerprint of the items held out: their number, and a digest of their places."""
    digest, part = hashlib.sha256(), held_out
    while isinstance(part, Part):
        digest.update(part.indices.tobytes())
        part = part.dataset
    digest.update(str(len(part)).encode())
    if isinstance(part, SequenceDataset):
        stride = part.stride if part.windows > 1 else None  # of a single window it moves nothing
        digest.update(repr((list(map(int, part.rows)), part.ranges, part.length, stride)).encode())
    return {"items": len(held_out), "digest": digest.hexdigest()}


def load_item(dataset, index: int, rng: np.random.Generator | None = None, raw: bool = False) -> Tensor:
    """Item `index` as float32; augmented by `rng` where the data set can. `raw`: pictures as uint8.

    Raises:
        BadImageError: a picture that cannot be read.
        ValueError: the item is no tensor, array or picture, or its values are out of range.
    """
    while isinstance(dataset, Part):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if isinstance(dataset, ImageDataset):
        return dataset.load_8bit(index, rng) if raw else dataset.load(index, rng)
    return as_tensor(dataset[index], getattr(dataset, "data_range", 1.0))


def underlying(dataset):
    """The data set that a `Part` is of."""
    while isinstance(dataset, Part):
        dataset = dataset.dataset
    return dataset


class TrainingView(Dataset):
    """A map-style data set under (epoch, index) keys: augmentation follows from (seed, epoch, index).

    A picture that cannot be read makes the batch an error, or (`on_bad="skip"`) another one stands in for it, drawn by
    (seed, epoch, index) from all. Without `augment` items are as the data set has them.
    """

    def __init__(self, dataset, seed: int, on_bad: str = "stop", augment: bool = True):
        self.dataset, self.seed, self.on_bad, self.augment = dataset, seed, on_bad, augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, list[str], str | None]:
        epoch, first = key
        skipped: list[str] = []
        for index in self._candidates(epoch, first):
            try:
                place = derive_seed(self.seed, Stream.AUGMENTATION, epoch, index)
                rng = np.random.default_rng(place) if self.augment else None
                return load_item(self.dataset, index, rng, raw=True), skipped, None
            except BadImageError as error:
                if self.on_bad == "stop":
                    return None, skipped, f"{error}. To leave such pictures out: --on_bad_image skip"
                skipped.append(str(error))
            except ValueError as error:
                return None, skipped, f"item {index} of the data: {error}"
        return None, skipped, "none of the pictures can be read"

    def _candidates(self, epoch: int, first: int) -> Iterator[int]:
        """Yield the picture asked for, then all in a random order: the one after a bad picture is not seen more often
        than others."""
        yield first
        rng = np.random.default_rng(derive_seed(self.seed, Stream.STAND_IN, epoch, first))
        yield from rng.permutation(len(self.dataset)).tolist()


def collate(items) -> Batch:
    """Make a `Batch` of items (x, messages of pictures left out, error).

    Where x is a number instead of a tensor, that number draws the picture of the batch that stands in for it.
    """
    skipped = [message for _, messages, _ in items for message in messages]
    errors = [error for _, _, error in items if error]
    found = [x for x, _, _ in items]
    good = [x for x in found if isinstance(x, Tensor)]
    if not errors and not good:
        errors = ["none of the pictures of a batch can be read"]
    if not errors and len({tuple(x.shape) for x in good}) > 1:
        errors = [f"items must all have one shape, got {sorted({tuple(x.shape) for x in good})}"]
    if errors:
        return Batch(None, skipped, errors[0])
    return Batch(torch.stack([x if isinstance(x, Tensor) else good[x % len(good)] for x in found]), skipped)


class StreamSampler(Sampler):
    """Batches of (epoch, index) keys for one process, from any place of the endless stream on.

    The stream is one permutation of the data after another; sample number k of it is index perm(epoch)[k % N] of epoch
    k // N. A global batch is `batch_size * processes` of consecutive samples, process r takes the r-th part.

    Args:
        length: N, items of the data.
        batch_size: of one process.
        start: sample number to start from (a multiple of the global batch).
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, process: int = 0, processes: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.process, self.processes = start, process, processes

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(self.seed, Stream.ORDER, epoch)).permutation(self.length)

    def __iter__(self) -> Iterator[list[Key]]:
        number = self.start + self.process * self.batch_size
        epoch, order = -1, None
        while True:
            keys = []
            for k in range(number, number + self.batch_size):
                if k // self.length != epoch:
                    epoch = k // self.length
                    order = self._permutation(epoch)
                keys.append((epoch, int(order[k % self.length])))
            yield keys
            number += self.batch_size * self.processes


def fingerprint(dataset, shape: tuple) -> dict:
    """Return a fingerprint of the data: count, shape, and a digest of up to 16 items of our own data sets."""
    digest = hashlib.sha256()
    if isinstance(dataset, (ImageDataset, SequenceDataset)):
        for index in np.linspace(0, len(dataset) - 1, min(16, len(dataset))).astype(int):
            with contextlib.suppress(BadImageError):
                digest.update(dataset[int(index)].numpy().tobytes())
        shift, scale = getattr(dataset, "data_shift", None), getattr(dataset, "data_scale", None)
        # version 0.2.0 gave channels that never change the scale 1; its runs can be resumed
        digest.update(repr((shift, scale and [value or 1.0 for value in scale])).encode())
    return {"items": len(dataset), "shape": list(shape), "digest": digest.hexdigest()}
