"""The order in which training reads the data, and how items become batches.

The order is an endless stream of (epoch, index) keys that follows from the seed alone, so training can start anywhere
in it, on any number of processes.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.data.conditions import GivenConditions, divisor
from ddpm_hf.data.given import FLOATS, image_of_bytes, tensor_of, value_of
from ddpm_hf.data.images import BadImageError, ImageDataset, levels_of_image
from ddpm_hf.data.labels import Labels
from ddpm_hf.data.scaling import EIGHT_BIT, scaling_of
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.randomness import Stream, derive_seed

Key = tuple[int, int]  # (epoch, index)


# ---------------------------------------------------------------------------------------------
# Items


def as_tensor(item: Any, limit: float = 1.0, missing: bool = False) -> Tensor:
    """Convert an item of a dataset to float32 (C, *spatial).

    Args:
        item: a float tensor or array, a PIL image, or an 8-bit image as `image_of_bytes` takes it; or a tuple that
            begins with one, or a dict that has one under "x0", "pixel_values", "image", "images" or "sequence".
        limit: the values must lie in [-limit, limit].
        missing: values may be NaN.

    Raises:
        ValueError: the item is something else, or a value lies outside.
    """
    item = value_of(item)[0]
    if isinstance(item, Image.Image):
        return EIGHT_BIT.to_model(levels_of_image(item))
    if isinstance(item, (np.ndarray, Tensor)) and item.dtype in (np.uint8, torch.uint8) and item.ndim in (2, 3):
        return EIGHT_BIT.to_model(image_of_bytes(item))
    if isinstance(item, np.ndarray) and item.dtype.char in FLOATS:
        item = tensor_of(item)
    if not isinstance(item, Tensor) or item.ndim not in (2, 3) or not item.is_floating_point():
        has_type = isinstance(item, (np.ndarray, Tensor))
        got = f"{item.dtype} of shape {tuple(item.shape)}" if has_type else type(item).__name__
        raise ValueError(
            "items must be float tensors (C, H, W) or (C, length) in [-1, 1], 8-bit images or PIL images "
            f"(whole numbers of other types: with data_range or image_norm); got {got}"
        )
    fits = item.abs() <= limit * (1 + 1e-4)
    if not (fits | item.isnan() if missing else fits).all():
        way_out = "; data of another range: train(config, dataset, data_range=(low, high))" if limit == 1 else ""
        raise ValueError(
            f"items must lie in [-{limit:g}, {limit:g}]; got {item.min():.4g} to {item.max():.4g}{way_out}"
        )
    return item.float()


class Part(Dataset):
    """The items of a map-style dataset at `indices`, in that order."""

    def __init__(self, dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


def underlying(dataset):
    """Return the dataset that a `Part`, or a part of a part, selects from; another dataset is returned as it is."""
    while isinstance(dataset, Part):
        dataset = dataset.dataset
    return dataset


def load_item(dataset, index: int, rng: np.random.Generator | None = None, raw: bool = False) -> Tensor:
    """Load item `index` as float32 (C, *spatial) in model units.

    Args:
        rng: augments the item, where the dataset can do that.
        raw: images are returned as uint8, which `EIGHT_BIT` scales later.

    Raises:
        BadImageError: the image cannot be read.
        ValueError: the item is no tensor, array or image, or its values are out of range.
    """
    while isinstance(dataset, Part):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if isinstance(dataset, ImageDataset):
        return dataset.load_8bit(index, rng) if raw else dataset.load(index, rng)
    if isinstance(dataset, ScientificImages):
        return dataset.load(index, rng)
    return as_tensor(dataset[index], scaling_of(dataset).limit, getattr(dataset, "missing", False))


def load_pair(dataset, condition, index: int, seed: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Load item `index` and its condition, images as uint8.

    Args:
        condition: an `ImageDataset` or a `SequenceDataset` as long as `underlying(dataset)`; or `GivenConditions`,
            whose items are read once for both; or None.
        seed: both are augmented by the numbers that follow from it; None: neither is.

    Raises:
        BadImageError: one of both images cannot be read.
        ValueError: the item or its condition is no tensor, array or image, out of range, or both sizes do not fit.
    """

    def rng():
        return None if seed is None else np.random.default_rng(seed)

    if condition is None:
        return load_item(dataset, index, rng(), raw=True), None
    while isinstance(dataset, Part):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if not isinstance(condition, GivenConditions):
        return load_item(dataset, index, rng(), raw=True), load_item(condition, index, rng(), raw=True)
    item = dataset[index]
    x = as_tensor(item, scaling_of(dataset).limit, getattr(dataset, "missing", False))
    found = condition.of(item)
    try:
        found = as_tensor(found)
    except ValueError as error:
        raise ValueError(f"its condition: {error}") from error
    divisor(tuple(x.shape[1:]), tuple(found.shape[1:]), "its condition")
    return x, found


def item_labels(dataset, labels: Labels | None) -> np.ndarray | None:
    """Return the class number of each item, int64 (len(dataset),), or None where there are no `labels`.

    Args:
        labels: the classes of the rows of `underlying(dataset)`: of its images or items, or of its sequences.
    """
    if labels is None:
        return None
    if isinstance(dataset, Part):
        return item_labels(dataset.dataset, labels)[dataset.indices]
    return dataset.per_item(labels.numbers) if isinstance(dataset, SequenceDataset) else labels.numbers


# ---------------------------------------------------------------------------------------------
# Held-out items


def hold_out(dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split a dataset into a part to train on and `count` held-out items, each in the order of the data.

    The held-out items are drawn by `seed`. Items of a `SequenceDataset` may overlap, so it makes the parts itself, and
    scales both as the part to train on needs.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not 1 <= count < len(dataset):
        raise ValueError(f"holdout must be at least 0 and less than the {len(dataset)} items of the data, got {count}")
    if isinstance(dataset, SequenceDataset):
        rest, held = dataset.hold_out(count, seed)
        if len(held) > count:  # whole recordings may hold more windows than asked for
            chosen = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT, 1)).permutation(len(held))[:count]
            held = Part(held, np.sort(chosen))
        return rest, held
    order = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT)).permutation(len(dataset))
    return Part(dataset, np.sort(order[count:])), Part(dataset, np.sort(order[:count]))


def split_record(held_out: Dataset) -> dict:
    """Return a fingerprint of the held-out items: their number, and a digest of their places in the data."""
    digest, part = hashlib.sha256(), held_out
    while isinstance(part, Part):
        digest.update(part.indices.tobytes())
        part = part.dataset
    digest.update(str(len(part)).encode())
    if isinstance(part, SequenceDataset):
        stride = part.stride if part.windows > 1 else None  # a single window has no use for it
        digest.update(repr((list(map(int, part.rows)), part.ranges, part.length, stride)).encode())
    return {"items": len(held_out), "digest": digest.hexdigest()}


# ---------------------------------------------------------------------------------------------
# Batches


class Item(NamedTuple):
    """An item on its way into a batch.

    Attributes:
        x: (C, *spatial), float32, or uint8 for images. None where the item cannot be loaded. A whole number where
            another image of the batch is to stand in for a bad one; the number draws that image.
        skipped: messages of the images that were left out on the way.
        error: the reason why the item cannot be loaded, or None.
        label: the number of its class; None where classes are not asked for.
        condition: (C', *spatial'), as `x`; None where conditions are not asked for.
    """

    x: Tensor | int | None
    skipped: list[str]
    error: str | None = None
    label: int | None = None
    condition: Tensor | None = None


@dataclass
class Batch:
    """Items of the data, side by side.

    Attributes:
        items: (B, C, *spatial), float32, or uint8 for images. None where the batch could not be made.
        skipped: messages of the images that were left out.
        error: the reason why the batch could not be made, or None.
        labels: (B,) int64, the numbers of the items' classes; None where classes are not asked for.
        conditions: (B, C', *spatial'), as `items`; None where conditions are not asked for.
    """

    items: Tensor | None
    skipped: list[str]
    error: str | None = None
    labels: Tensor | None = None
    conditions: Tensor | None = None

    @property
    def x0(self) -> Tensor:
        """The items in model units, float32; images lie in [-1, 1]."""
        return _in_model_units(self.items)

    @property
    def condition(self) -> Tensor | None:
        """The conditions in model units, float32, or None."""
        return None if self.conditions is None else _in_model_units(self.conditions)

    def on(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device; images are still bytes there, until `x0` scales them."""
        return self.changed(lambda name, tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch with its tensors in pinned memory; the DataLoader calls this."""
        return self.changed(lambda name, tensor: tensor.pin_memory())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the batch has, by name."""
        found = {name: getattr(self, name) for name in ("items", "labels", "conditions")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        """Return the batch with each of its tensors replaced by change(name, tensor)."""
        return replace(self, **{name: change(name, tensor) for name, tensor in self.tensors().items()})


def _in_model_units(items: Tensor) -> Tensor:
    """Scale images, which are uint8; other items are in model units already."""
    return EIGHT_BIT.to_model(items) if items.dtype == torch.uint8 else items


class TrainingView(Dataset):
    """A map-style dataset under (epoch, index) keys; augmentation follows from (seed, epoch, index).

    Args:
        on_bad: an image that cannot be read makes the item an error ("stop"), or another image stands in for it, drawn
            from all images by (seed, epoch, index) ("skip").
        labels: the class number of each item (`item_labels`); None: classes are not asked for.
        condition: the conditions, as `load_pair` takes them; None: conditions are not asked for.
    """

    def __init__(
        self, dataset, seed: int, on_bad: str = "stop", labels: np.ndarray | None = None, condition: Any = None
    ):
        self.dataset, self.seed, self.on_bad = dataset, seed, on_bad
        self.labels, self.condition = labels, condition
        sources = (underlying(dataset), condition)
        # a seed and a generator take longer than a cached item, so they are made where something is drawn
        images = [data for data in sources if isinstance(data, (ImageDataset, ScientificImages))]
        self._draws = any(data.augments for data in images)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Item:
        epoch, first = key
        skipped: list[str] = []
        for index in self._candidates(epoch, first):
            try:
                label = None if self.labels is None else int(self.labels[index])
                x, condition = self._load(epoch, index)
                return Item(x, skipped, label=label, condition=condition)
            except BadImageError as error:
                if self.on_bad == "stop":
                    return Item(None, skipped, f"{error}. To leave such images out: --on_bad_image skip")
                skipped.append(str(error))
            except ValueError as error:
                return Item(None, skipped, f"item {index} of the data: {error}")
        return Item(None, skipped, "none of the images can be read")

    def _load(self, epoch: int, index: int) -> tuple[Tensor, Tensor | None]:
        place = derive_seed(self.seed, Stream.AUGMENTATION, epoch, index) if self._draws else None
        return load_pair(self.dataset, self.condition, index, place)

    def _candidates(self, epoch: int, first: int) -> Iterator[int]:
        """Yield the image asked for, then all images in a random order.

        If the next image in the order of the data stood in for a bad one, it would be seen more often than others.
        """
        yield first
        rng = np.random.default_rng(derive_seed(self.seed, Stream.STAND_IN, epoch, first))
        yield from rng.permutation(len(self.dataset)).tolist()


def collate(items: Sequence[Item]) -> Batch:
    """Make a `Batch` of items; those that only draw a stand-in get the image that they draw."""
    skipped = [message for item in items for message in item.skipped]
    errors = [item.error for item in items if item.error]
    good = [item for item in items if isinstance(item.x, Tensor)]
    if not errors and not good:
        errors = ["none of the images of a batch can be read"]
    shapes = sorted({tuple(item.x.shape) for item in good})
    if not errors and len(shapes) > 1:
        errors = [f"items must all have one shape, got {shapes}"]
    if errors:
        return Batch(None, skipped, errors[0])
    chosen = [item if isinstance(item.x, Tensor) else good[item.x % len(good)] for item in items]
    labels = None if chosen[0].label is None else torch.tensor([item.label for item in chosen], dtype=torch.int64)
    found = [item.condition for item in chosen if item.condition is not None]
    if len({tuple(condition.shape) for condition in found}) > 1:
        shapes = sorted({tuple(condition.shape) for condition in found})
        return Batch(None, skipped, f"conditions must all have one shape, got {shapes}")
    return Batch(torch.stack([item.x for item in chosen]), skipped, None, labels, torch.stack(found) if found else None)


class StreamSampler(Sampler):
    """Batches of (epoch, index) keys for one process, from any place of the endless stream on.

    The stream is one permutation of the data after another: sample number k is item perm(epoch)[k % N] of epoch
    k // N. A global batch is `batch_size * processes` consecutive samples; process r takes the r-th part.

    Args:
        length: N, the number of items in the data.
        batch_size: samples in a batch of one process.
        start: number of the sample to start from, a multiple of the global batch.
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


# ---------------------------------------------------------------------------------------------
# Fingerprint


def fingerprint(dataset, shape: tuple, labels: Labels | None = None, condition: Any = None) -> dict:
    """Return a fingerprint of the data: number of items, shape, and digests of items, classes and conditions.

    The digest is that of up to 16 items of a dataset of this library, and of the scaling. A dataset of
    another class has the digest of nothing.
    """
    digest = hashlib.sha256()
    own = (ImageDataset, SequenceDataset, ScientificImages)
    if isinstance(dataset, own):
        for index in np.linspace(0, len(dataset) - 1, min(16, len(dataset))).astype(int):
            with contextlib.suppress(BadImageError):
                digest.update(dataset[int(index)].numpy().tobytes())
        shift = scale = None  # images have one scaling for all
        if isinstance(dataset, SequenceDataset):
            # version 0.2.0 gave channels that never change the scale 1; its runs can be resumed
            shift, scale = list(dataset.scaling.shift), [value or 1.0 for value in dataset.scaling.scale]
        elif isinstance(dataset, ScientificImages):
            shift, scale = list(dataset.scaling.shift), list(dataset.scaling.scale)
        digest.update(repr((shift, scale)).encode())
    found = {"items": len(dataset), "shape": list(shape), "digest": digest.hexdigest()}
    if labels is not None:
        found["labels"] = labels.digest()
    if condition is not None:
        given = isinstance(condition, GivenConditions)
        found["conditions"] = "given" if given else fingerprint(condition, ())["digest"]
    return found
