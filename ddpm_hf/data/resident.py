"""Data that stays on a graphics card: it is put there once, and every batch is gathered there.

The batches are those that `loading` makes of the same keys, bit for bit. For each item of a batch, only a few whole
numbers are copied to the card.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ddpm_hf.data.images import BadImageError, ImageDataset
from ddpm_hf.data.loading import Batch, Key, TrainingView, load_pair, underlying
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import PART, SequenceDataset
from ddpm_hf.randomness import Stream, derive_seed

# Images are decoded before the first step, so this pays in runs that use each image at least this many times.
LEAST_EPOCHS = 4
IMAGES = (ImageDataset, ScientificImages)


def resident_bytes(dataset: Any, condition: Any = None) -> int | None:
    """Return the bytes that a dataset and its conditions take on a device, or None if they cannot stay there.

    Images stay if they are cropped from the centre, as uint8; those in units of their own, and sequences, stay in model
    units, as float32. Streams and datasets of other classes are read by the host, and so is what random crops change
    each time.

    Args:
        dataset: the items to train on.
        condition: their conditions, as `loading.load_pair` takes them.
    """
    whole = underlying(dataset)
    if type(whole) in IMAGES:
        kept = [whole] if condition is None else [whole, condition]
        if not all(type(data) in IMAGES and data.center_crop for data in kept):
            return None
        return len(dataset) * sum(
            _type(data).itemsize * data.channels * data.resolution[0] * data.resolution[1] for data in kept
        )
    if type(dataset) is SequenceDataset:
        kept = [dataset] if condition is None else [dataset, condition]
        if not all(type(data) is SequenceDataset for data in kept):
            return None
        return sum(4 * data.array.shape[0] * _row(data) for data in kept)
    return None


def _type(data: ImageDataset | ScientificImages) -> torch.dtype:
    """Return the type in which images stay on a device."""
    return torch.uint8 if isinstance(data, ImageDataset) else torch.float32


def _samples(data: SequenceDataset) -> int:
    """Return the number of samples of a sequence that its windows reach."""
    return (data.windows - 1) * data.stride + data.length


def _row(data: SequenceDataset) -> int:
    """Return the number of values in the reached samples of a sequence, all channels together."""
    return data.array.shape[1] * _samples(data)


# ---------------------------------------------------------------------------------------------
# On the device


class Images:
    """Images on a device.

    Args:
        items: (N, C, H, W), uint8, or float32 in model units.
    """

    def __init__(self, items: Tensor):
        self.items = items

    def gather(self, places: Tensor, mirrored: Tensor | None) -> Tensor:
        """Return the images at `places`, mirrored where asked, (B, C, H, W).

        Args:
            places: (B,) int64, the numbers of the images.
            mirrored: (B,) bool, or None if no image is mirrored.
        """
        images = self.items[places]
        return images if mirrored is None else torch.where(mirrored[:, None, None, None], images.flip(3), images)


class Windows:
    """The sequences that windows are cut from, on a device, in model units.

    All sequences of the array are there, those that are held out included.
    """

    def __init__(self, data: SequenceDataset, device: torch.device):
        (count, channels, _), samples = data.array.shape, _samples(data)
        self.values = torch.empty(count, channels, samples, device=device)
        rows, columns = max(1, PART // (channels * samples)), max(1, PART // channels)
        for first in range(0, count, rows):
            own = slice(first, min(first + rows, count))
            for start in range(0, samples, columns):
                part = slice(start, min(start + columns, samples))
                x = data.scaling.to_model(data.read(own, part)).astype(np.float32)
                self.values[own, :, part] = torch.from_numpy(x).to(device)
        channel, sample = (torch.arange(size, device=device) for size in (channels, data.length))
        self.window = channel[:, None] * samples + sample

    def gather(self, places: Tensor, mirrored: None = None) -> Tensor:
        """Return the windows whose first value has the number `places` (B,) among all values, (B, C, length)."""
        return self.values.flatten()[places[:, None, None] + self.window]


class ResidentData:
    """Items of a dataset, and their conditions, on a device.

    Args:
        view: gives the numbers of the items of a batch.
        tables: `Images` or `Windows` of the items, and those of the conditions where there are any.

    Attributes:
        nbytes: bytes of the device's memory that the data takes.
    """

    def __init__(self, view: "ResidentView", tables: Sequence[Images | Windows]):
        self.view, self.tables = view, tables
        self.nbytes = sum(t.items.nbytes if isinstance(t, Images) else t.values.nbytes for t in tables)

    def gather(self, numbers: Batch) -> Batch:
        """Return the batch whose numbers `ResidentView` gave, and which are on the device now."""
        rows = numbers.items
        mirrored = rows[:, -1].bool() if self.view.random_flip else None
        found = [table.gather(rows[:, column], mirrored) for column, table in enumerate(self.tables)]
        return replace(numbers, items=found[0], conditions=found[1] if len(found) > 1 else None)


# ---------------------------------------------------------------------------------------------
# On the host


class ResidentView(TrainingView):
    """The numbers by which a device gathers batches, under the keys and by the rules of a `TrainingView`.

    Args:
        bad: the message of each image that cannot be read, by its index.

    Attributes:
        random_flip: True if a random half of the images is mirrored.
    """

    def __init__(self, dataset, seed: int, on_bad: str, labels: np.ndarray | None, condition: Any, bad: dict[int, str]):
        super().__init__(dataset, seed, on_bad, labels=labels, condition=condition)
        self.bad = bad
        self.data = [underlying(dataset), *([] if condition is None else [condition])]
        self.random_flip = isinstance(self.data[0], IMAGES) and self.data[0].random_flip

    def _load(self, epoch: int, index: int) -> tuple[Tensor, None]:
        if index in self.bad:
            raise BadImageError(self.bad[index])
        return torch.tensor(index), None

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return a batch whose items are numbers, (B, n) int64.

        They are the place of the item on the device, that of its condition if it has one, and 1 for an image that is
        mirrored, which the image and its condition are together.
        """
        skipped: list[str] = []
        errors, chosen = [], []
        for epoch, index in keys:
            if index in self.bad:
                item = self[epoch, index]
                skipped += item.skipped
                if item.error:
                    errors.append(item.error)
                    continue
                index = int(item.x)
            chosen.append((epoch, index))
        if errors:
            return Batch(None, skipped, errors[0])
        numbers = torch.tensor([self._numbers(epoch, index) for epoch, index in chosen], dtype=torch.int64)
        labels = None if self.labels is None else torch.from_numpy(self.labels[[index for _, index in chosen]])
        return Batch(numbers, skipped, labels=labels)

    def _numbers(self, epoch: int, index: int) -> list[int]:
        numbers = [_place(data, index) for data in self.data]
        if self.random_flip:
            rng = np.random.default_rng(derive_seed(self.seed, Stream.AUGMENTATION, epoch, index))
            numbers.append(int(self.data[0].mirrors(rng)))
        return numbers


def _place(data: ImageDataset | ScientificImages | SequenceDataset, index: int) -> int:
    """Return the number of an image, or that of the first value of a window, on the device."""
    if isinstance(data, IMAGES):
        return index
    row, window = data.place(index)
    return row * _row(data) + window * data.stride


def make_resident(
    dataset, seed: int, on_bad: str, labels: np.ndarray | None, condition: Any, device: torch.device, workers: int = 0,
    batch_size: int = 64,
) -> ResidentData:  # fmt: skip
    """Put a dataset for which `resident_bytes` gives a number, and its conditions, on a device.

    Args:
        dataset, seed, on_bad, labels, condition: as for a `TrainingView`.
        workers, batch_size: processes that decode images, and images that each of them sends at a time.
    """
    if isinstance(underlying(dataset), IMAGES):
        tables, bad = _read_images(dataset, condition, device, workers, batch_size)
    else:
        tables, bad = [Windows(data, device) for data in (dataset, condition) if data is not None], {}
    return ResidentData(ResidentView(dataset, seed, on_bad, labels, condition, bad), tables)


class _Reading(Dataset):
    """The pairs of images of a dataset and its conditions, or the message of an image that cannot be read."""

    def __init__(self, dataset, condition):
        self.dataset, self.condition = dataset, condition

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, tuple[Tensor, Tensor | None] | str]:
        try:
            return index, load_pair(self.dataset, self.condition, index)
        except BadImageError as error:
            return index, str(error)


def _side_by_side(read: Sequence[tuple]) -> tuple[list[int], list[Tensor], dict[int, str]]:
    """Return the indices of the images that could be read, the images and their conditions, and the messages."""
    good = [(index, pair) for index, pair in read if not isinstance(pair, str)]
    kinds = [[x for x in each if x is not None] for each in zip(*(pair for _, pair in good))]
    tensors = [torch.stack(each) for each in kinds if each]
    return [index for index, _ in good], tensors, {index: pair for index, pair in read if isinstance(pair, str)}


def _read_images(dataset, condition, device: torch.device, workers: int, batch_size: int) -> tuple[list, dict]:
    kept = [underlying(dataset), *([] if condition is None else [condition])]
    tables = [
        torch.zeros(len(dataset), data.channels, *data.resolution, dtype=_type(data), device=device) for data in kept
    ]
    bad: dict[int, str] = {}
    loader = DataLoader(
        _Reading(dataset, condition), batch_size, num_workers=workers, collate_fn=_side_by_side,
        generator=torch.Generator(),  # its own, so that workers take nothing from the global one
    )  # fmt: skip
    hidden = not PartialState().is_main_process
    for indices, tensors, messages in tqdm(loader, "reading the images", leave=False, delay=2, disable=hidden):
        bad.update(messages)
        for table, images in zip(tables, tensors):
            table[torch.tensor(indices, device=device)] = images.to(device)
    return [Images(table) for table in tables], bad
