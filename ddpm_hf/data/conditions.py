"""Paired conditions: an image or a sequence beside each item, of the item's size or a whole divisor of it."""

from typing import Any

from ddpm_hf.data.images import ImageDataset, image_form
from ddpm_hf.data.scaling import MODEL_UNITS, Scaling
from ddpm_hf.data.sequences import SequenceDataset


class GivenConditions:
    """The conditions in the items of a dataset given from Python.

    Args:
        column: the entry of items that are dicts.
        place: the place in items that are tuples: 1 in (x, condition), 2 in (x, y, condition).
    """

    scaling = MODEL_UNITS

    def __init__(self, column: str, place: int):
        self.column, self.place = column, place

    def of(self, item: Any) -> Any:
        """Return the condition of an item as the dataset has it.

        Raises:
            ValueError: the item has none.
        """
        if isinstance(item, dict) and self.column in item:
            return item[self.column]
        if isinstance(item, (tuple, list)) and len(item) > self.place:
            return item[self.place]
        form = "(x, condition)" if self.place == 1 else "(x, y, condition)"
        got = f"a dict with {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"condition_column needs items {form} or dicts with {self.column!r}; got {got}")


def divisor(size: tuple[int, ...], own: tuple[int, ...], where: str) -> int:
    """Return the whole number by which an item's size is larger than its condition's.

    Args:
        size, own: sizes of the item and of the condition, without channels.

    Raises:
        ValueError: there is no such number, or not one for all directions.
    """
    factor = size[0] // own[0] if len(own) == len(size) and own[0] else 0
    if factor < 1 or tuple(factor * side for side in own) != tuple(size):
        raise ValueError(
            f"{where} must have the size of the items, {_by(size)}, or that divided by one whole number; got {_by(own)}"
        )
    return factor


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def image_conditions(sources: Any, images: ImageDataset, where: str) -> ImageDataset:
    """Return the dataset of images that are the conditions of `images`.

    The first pair tells the channels of the conditions and the number by which they are smaller.

    Raises:
        ValueError: the first pair does not fit, random crops are asked for, or the resolution is not divisible.
    """
    if not images.center_crop:
        raise ValueError("condition_column needs center_crop, which cuts both images of a pair alike; got false")
    (size, _), (own, channels) = image_form(images.sources[0], "number 0"), image_form(sources[0], where)
    factor = divisor(size, own, f"{where}, number 0,")
    if any(side % factor for side in images.resolution):
        raise ValueError(
            f"resolution must be divisible by {factor}, the number by which {where} is smaller than the images, "
            f"got {list(images.resolution)}"
        )
    resolution = tuple(side // factor for side in images.resolution)
    return ImageDataset(sources, resolution, channels, True, images.random_flip)


def sequence_conditions(array: Any, data: SequenceDataset, where: str) -> SequenceDataset:
    """Return the dataset of sequences that are the conditions of `data`, cut into the same windows.

    Raises:
        ValueError: another number of sequences, or a length, window or stride that does not fit.
    """
    if array.shape[0] != data.array.shape[0]:
        raise ValueError(f"{where} must have {data.array.shape[0]:,} rows, as the data has, got {array.shape[0]:,}")
    factor = divisor(data.array.shape[-1:], tuple(array.shape[-1:]), where)
    for name, value in (("sequence_length", data.length), ("stride", data.stride if data.windows > 1 else 0)):
        if value % factor:
            raise ValueError(
                f"{name} must be divisible by {factor}, the number by which {where} is shorter, got {value}"
            )
    stride = max(1, data.stride // factor)
    return SequenceDataset(array, where, data.norm, data.length // factor, stride)


def matching(dataset: Any, condition: Any, scaling: Scaling | None = None) -> Any:
    """Return the conditions of a `SequenceDataset` that `hold_out` made, with a scaling or the one that they need.

    Conditions of other datasets are found by the item's number in the whole dataset, and are returned as they are.
    """
    if not isinstance(condition, SequenceDataset):
        return condition
    part = condition.part(dataset.rows, dataset.ranges)
    if scaling is None:
        part.scaling = part.fit()
    else:
        part.use(scaling)
    return part
