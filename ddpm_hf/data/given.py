"""Datasets given from Python: the value in an item, 8-bit images, and items in units of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_hf.data.images import to_tensor, without_palette
from ddpm_hf.data.mapped_array import as_mapped
from ddpm_hf.data.ranges import check_range, choose_scaling, measure, to_model
from ddpm_hf.data.scaling import Scaling

NAMES = ("x0", "pixel_values", "image", "images", "sequence")  # of the value in an item that is a dict
FLOATS = "efd"  # the characters of NumPy's types of floats that torch has too
LOOKED_AT = 16  # items whose range is looked at before training


def value_of(item: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the value in an item of a dataset, and a function that returns the item with another value.

    Args:
        item: the value itself, a tuple that begins with it, or a dict that has it under one of `NAMES`.

    Raises:
        ValueError: a dict has none of these names.
    """
    if isinstance(item, dict):
        found = [name for name in NAMES if name in item]
        if not found:
            raise ValueError(
                f"an item that is a dict must have one of {', '.join(NAMES)}; got {', '.join(map(str, item))}"
            )
        value, put = value_of(item[found[0]])
        return value, lambda new: {**item, found[0]: put(new)}
    if isinstance(item, (tuple, list)) and item:
        return item[0], lambda new: (new, *item[1:])
    return item, lambda new: new


def tensor_of(value: np.ndarray) -> Tensor:
    """Return an array of numbers as a tensor; it is copied if it is read-only or torch does not take its layout."""
    return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), "CW"))


def image_of_bytes(value: np.ndarray | Tensor) -> Tensor:
    """Return an 8-bit image (H, W), (H, W, C) or (C, H, W) as uint8 (C, H, W).

    The shorter one of the first and the last axis is that of the channels. If both are equal, it is the first of a
    tensor and the last of an array.
    """
    tensor = tensor_of(value) if isinstance(value, np.ndarray) else value
    if tensor.ndim == 2:
        return tensor[None]
    first, last = tensor.shape[0], tensor.shape[-1]
    is_last = last < first or last == first and isinstance(value, np.ndarray)
    return tensor.movedim(-1, 0) if is_last else tensor


class GivenUnits(Dataset):
    """A map-style dataset given from Python, whose items are scaled from units of their own to model units.

    Args:
        dataset: the dataset. Its items are as `value_of` takes them; the values are arrays or tensors (C, H, W) or
            (C, length), 8-bit images as `image_of_bytes` takes them, or PIL images.
        norm: as in `choose_scaling`: all items are read once.
        value_range: lowest and highest value, which become -1 and 1.

    Attributes:
        given: the dataset.
        channels: the number of channels.
        dtype: the type of the data; for a given range, that of the first item.
        scaling: the map between data units and model units, a `Scaling`.
        notes: lines to print about the data before training.

    Raises:
        ValueError: an item is no such value, has values that are not finite, or does not fit the norm.
    """

    def __init__(self, dataset: Any, norm: str | None = None, value_range: Sequence[float] | None = None):
        check_range(value_range, norm)
        self.given, self.value_range = as_mapped(dataset), value_range
        if value_range is not None:
            first = self._values(0)[0]
            self.channels, self.dtype = len(first), first.dtype
            low, high = map(float, value_range)
            self.scaling = Scaling(((low + high) / 2,) * self.channels, ((high - low) / 2,) * self.channels)
            self.notes = [f"scaling: {low:g} to {high:g} become -1 to 1"]
            return
        name = "the dataset given from Python"
        parts = ((f"item {index}", self._values(index)[0]) for index in range(len(dataset)))
        found = measure(parts, name)
        self.channels, self.dtype = len(found.low), found.dtype
        self.scaling, self.notes = choose_scaling(found, norm, None, name)

    def _values(self, index: int) -> tuple[np.ndarray, Callable[[Any], Any]]:
        """Return the values of an item, (C, ...), and a function that puts others in their place."""
        value, put = value_of(self.given[index])
        if isinstance(value, Image.Image):
            value = to_tensor(without_palette(value))
        elif not isinstance(value, (np.ndarray, Tensor)):
            raise ValueError(f"item {index} of the data must hold a tensor, an array or an image, got {type(value)}")
        values = image_of_bytes(value) if value.dtype in (torch.uint8, np.uint8) and value.ndim else value
        if isinstance(values, Tensor):
            values = (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
        if values.ndim not in (2, 3) or values.dtype.kind not in "iufb":
            raise ValueError(
                f"item {index} of the data must hold real numbers (C, H, W) or (C, length), got {values.dtype} "
                f"of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"item {index} of the data must be finite, got NaN or infinity")
        return values, put

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        """Return an item whose value is a tensor in model units, float32.

        Raises:
            ValueError: a value lies outside the range that was given.
        """
        values, put = self._values(index)
        if len(values) != self.channels:
            raise ValueError(f"it must have {self.channels} channels, as the first one has, got {len(values)}")
        if self.value_range is not None:
            low, high = self.value_range
            slack = 1e-4 * (high - low) / 2
            least, most = float(values.min()), float(values.max())
            if least < low - slack or most > high + slack:
                raise ValueError(
                    f"its values must lie in the range that was given, {low:g} to {high:g}; got {least:g} to {most:g}"
                )
        return put(to_model(values, self.scaling))


def range_warning(dataset: Any) -> str | None:
    """Return a warning if float items of a dataset lie in [0, 1], half of the range [-1, 1]; otherwise None.

    Up to `LOOKED_AT` items are looked at.
    """
    least, most = np.inf, -np.inf
    numbers = sorted({int(number) for number in np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset)))})
    for number in numbers:
        value = value_of(dataset[number])[0]
        if isinstance(value, np.ndarray) and value.dtype.char in FLOATS:
            value = tensor_of(value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return None
        least, most = min(least, float(value.min())), max(most, float(value.max()))
        if not least >= 0:
            return None
    if not (0 <= least < most <= 1):
        return None
    return (
        f"warning: the values of the {len(numbers)} items that were looked at go from {least:g} to {most:g}, and those "
        "of items should fill -1 to 1: the model would learn half of its range. If the data's range is 0 to 1: "
        "train(config, dataset, data_range=(0, 1))"
    )
