"""Paired conditions: an image or a sequence beside each item, of the item's size or a whole divisor of it."""

import os
from typing import Any

import numpy as np

from ddpm_hf.data.images import BadImageError, ImageDataset, find_images, image_form, printable
from ddpm_hf.data.scaling import MODEL_UNITS, Scaling
from ddpm_hf.data.scientific_images import ScientificImages, array_shape, is_scientific, read_values
from ddpm_hf.data.sequences import SequenceDataset

LOOKED_AT = 1000  # pairs of a table whose forms are looked at before training, at most


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


def image_conditions(
    sources: Any, images: ImageDataset | ScientificImages, where: str, own_units: bool = False, last: bool = False,
    skip_bad: bool = False, all_pairs: bool = False,
) -> ImageDataset | ScientificImages:  # fmt: skip
    """Return the dataset of images that are the conditions of `images`.

    The first pair tells the channels of the conditions and the number by which they are smaller. The forms of others
    are looked at too, as far as the headers of the files tell them.

    Args:
        sources: the conditions, as `ImageDataset` or `ScientificImages` takes them.
        images: the items.
        where: what the conditions are, for messages.
        own_units: the conditions are `ScientificImages`, which are scaled by the range of their own.
        last: arrays of conditions have their channels last.
        skip_bad: leave conditions that cannot be read out of that range, instead of an error.
        all_pairs: look at every pair; otherwise at `LOOKED_AT` pairs at most.

    Raises:
        ValueError: a pair does not fit, random crops are asked for, or the resolution is not divisible.
    """
    if not images.center_crop:
        raise ValueError(f"{where} needs center_crop true, which cuts both images of a pair alike; got false")
    if len(sources) != len(images):
        raise ValueError(f"{where} must have {len(images):,} images, as the data has, got {len(sources):,}")
    factor, channels = _form_of_pairs(sources, images, where, own_units, last, all_pairs)
    if any(side % factor for side in images.resolution):
        raise ValueError(
            f"resolution must be divisible by {factor}, the number by which {where} is smaller than the images, "
            f"got {list(images.resolution)}"
        )
    resolution = tuple(side // factor for side in images.resolution)
    flip, smaller = images.random_flip, f"1/{factor} of the size" if factor > 1 else "the size"
    if own_units:
        found = ScientificImages(
            sources, resolution, random_flip=flip, channels_last=last, skip_bad=skip_bad, name=where
        )  # fmt: skip
    else:
        found = ImageDataset(sources, resolution, channels, True, flip)
    found.notes = [f"conditions: {where}, of {smaller} of the images", *found.notes]
    return found


def _names(images: Any, conditions: Any, number: int, where: str) -> tuple[str, str]:
    """Return names for an image and its condition in messages: their paths, or their number."""
    paths = [source if isinstance(source, str) else None for source in (images[number], conditions[number])]
    return paths[0] or f"image {number}", paths[1] or f"{where}, number {number},"


def _form_of_pairs(
    sources: Any, images: ImageDataset | ScientificImages, where: str, own_units: bool, last: bool, all_pairs: bool
) -> tuple[int, int]:
    """Return the number by which conditions are smaller than their images, and their channels, by the first pair.

    Pairs that cannot be read are left out.

    Raises:
        ValueError: another pair has others, none can be read, or conditions have no whole divisor of the size.
    """
    count, first, unread = len(sources), None, None
    numbers = range(count) if all_pairs or count <= LOOKED_AT else np.linspace(0, count - 1, LOOKED_AT).astype(int)
    items_last = getattr(images, "channels_last", False)
    for number in map(int, numbers):
        name, own_name = _names(images.sources, sources, number, where)
        try:
            size, _ = _form(images.sources[number], name, isinstance(images, ScientificImages), items_last)
            own, channels = _form(sources[number], own_name, own_units, last)
        except BadImageError as error:
            unread = unread or error
            continue  # the image is named when it is read
        factor = same_factor(size, own, first and first[0], where, name, own_name)
        first = first or (factor, channels)
        if channels != first[1]:
            raise ValueError(f"{where} must have {first[1]} channels, as the first one has; {own_name} has {channels}")
    if first is None:
        raise ValueError(f"{where} must have a pair that can be read: {unread}")
    return first


def same_factor(
    size: tuple[int, int], own: tuple[int, int], first: int | None, where: str, name: str, own_name: str
) -> int:
    """Return the number by which a condition is smaller than its image.

    Args:
        size, own: sizes of the image and of the condition, (height, width).
        first: that number of the first pair; None: this is the first one.
        where: what the conditions are, for messages.
        name, own_name: names of the image and of the condition, for messages.

    Raises:
        ValueError: there is no such whole number, or it is another one than `first`.
    """
    factor = divisor(size, own, own_name)
    if first is not None and factor != first:
        raise ValueError(
            f"{where} must be smaller than all images by one whole number, {first} in the first pair; got {factor} for "
            f"{own_name} ({_by(own)}) with {name} ({_by(size)})"
        )
    return factor


def _form(source: Any, name: str, own_units: bool, channels_last: bool) -> tuple[tuple[int, int], int]:
    """Return (height, width) of an image and its number of channels, from its header where that tells them."""
    if own_units and isinstance(source, str) and source.lower().endswith(".npy"):
        shape = array_shape(source)
        if shape is None:
            raise BadImageError(printable(f"cannot read the image {source}: it is no file of an array"))
    elif own_units and isinstance(source, str) and is_scientific(source):
        shape, channels_last = read_values(source, name).shape, False
    elif own_units and not isinstance(source, str):
        shape = source.shape
    else:
        return image_form(source, name)
    if len(shape) == 2:
        return tuple(shape), 1
    return (tuple(shape[:2]), shape[2]) if channels_last else (tuple(shape[-2:]), shape[0])


def folder_conditions(
    folder: str, root: str, images: ImageDataset | ScientificImages, channels_last: bool = False, skip_bad: bool = False
) -> ImageDataset | ScientificImages:
    """Return the dataset of the images in a folder that are the conditions of the images in another folder.

    A condition and its image have the same path in their folders, without its ending. As for items, the first file
    tells if the conditions are pictures or images in units of their own.

    Args:
        folder: the folder of the conditions.
        root: the folder of the images.
        images: the images, whose sources are paths below `root`.
        channels_last, skip_bad: as for `ScientificImages`.

    Raises:
        ValueError: an image has no condition or several (the message names it), or `image_conditions` raises it.
    """
    where = printable(f"condition_dir {folder}")
    if not os.path.isdir(folder):
        raise ValueError(f"condition_dir must be a folder of conditions, and {folder} is not a folder")
    if os.path.samefile(folder, root):
        raise ValueError(f"condition_dir must be another folder than that of the images, got {folder}")
    found: dict[str, list[str]] = {}
    for path in find_images(folder, more=(".npy",))[0]:
        found.setdefault(_stem(path, folder), []).append(path)
    stems = [_stem(path, root) for path in images.sources]
    missing = [path for path, stem in zip(images.sources, stems) if stem not in found]
    if missing:
        raise ValueError(
            printable(
                f"{where} must have a condition for each image, under the same path but for its ending; "
                f"{len(missing):,} have none, such as {missing[0]}"
            )
        )
    several = [stem for stem in stems if len(found[stem]) > 1]
    if several:
        raise ValueError(printable(f"{where} must have one condition for each image, got {found[several[0]]}"))
    sources = [found[stem][0] for stem in stems]
    conditions = image_conditions(
        sources, images, where, is_scientific(sources[0]), channels_last, skip_bad, all_pairs=True
    )
    unused = len(found) - len(set(stems))
    if unused:
        conditions.notes = [*conditions.notes, f"conditions without an image, which are not used: {unused:,}"]
    return conditions


def _stem(path: str, root: str) -> str:
    """Return the path of a file in a folder without its ending."""
    return os.path.splitext(os.path.relpath(path, root))[0]


def array_conditions(array: Any, images: ScientificImages, where: str, last: bool = False) -> ScientificImages:
    """Return the dataset of the images of an array that are the conditions of those of another array.

    Args:
        array: the conditions, (N, C, H, W) or (N, H, W), which are scaled by the range of their own.
        images: the items.
        where: what the conditions are, for messages.
        last: the array is (N, H, W, C).

    Raises:
        ValueError: `image_conditions` or `ScientificImages` raises it.
    """
    if array.ndim not in (3, 4):
        raise ValueError(f"{where} must have the shape (N, C, H, W) or (N, H, W), got {array.shape}")
    return image_conditions(array, images, where, own_units=True, last=last)


def sequence_conditions(array: Any, data: SequenceDataset, where: str, interpolate: bool = False) -> SequenceDataset:
    """Return the dataset of sequences that are the conditions of `data`, cut into the same windows.

    Args:
        array: the conditions, as `SequenceDataset` takes them.
        data: the items.
        where: what the conditions are, for messages.
        interpolate: missing values (NaN) are interpolated.

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
    found = SequenceDataset(array, where, data.norm, data.length // factor, stride, interpolate=interpolate)
    smaller = f"1/{factor} of the length" if factor > 1 else "the length"
    found.notes.insert(0, f"conditions: {where}, of {smaller} of the sequences")
    return found


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
