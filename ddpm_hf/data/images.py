"""Datasets of images: decoding and resizing one image, a dataset of many, and the cache of decoded images.

An image is resized to cover the resolution, then cropped. Resized images are kept in memory as far as they fit, so that
each is decoded once.
"""

import io
import mmap
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_hf.data.labels import Labels, as_labels
from ddpm_hf.data.listing import Listing, list_folder
from ddpm_hf.data.scaling import EIGHT_BIT
from ddpm_hf.pipeline.pairs import eight_bit

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# An image that is longer than this many crops is cut to its middle part of that length: a line of 100,000 x 1 pixels
# would fill gigabytes at a height of 64 pixels. The number is odd, so that both have the same middle.
LONGEST = 17


class BadImageError(ValueError):
    """An image cannot be read; the message names it."""


def printable(text: str) -> str:
    """Return the text on one line, in characters that any output takes.

    File names may hold line ends, or bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------
# One image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an upright image to 8-bit "L", "RGB" or "RGBA"; 16 bits are scaled to 8, transparency is laid on white.

    Raises:
        ValueError: values of an image of more than 8 bits lie outside its range.
    """
    image = eight_bit(image)
    if image.has_transparency_data and mode != "RGBA":
        return _on_white(image, mode)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    """Lay an image's transparency on white and convert it to `mode`, in bands, so that no second copy is needed."""
    result = Image.new(mode, image.size)
    for top in range(0, image.height, 64):
        box = (0, top, image.width, min(top + 64, image.height))
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        result.paste(Image.alpha_composite(white, part).convert(mode), box)
    return result


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Convert an 8-bit image, or an array (H, W) or (H, W, C), to uint8 (C, H, W)."""
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.transpose(2, 0, 1).copy())  # the array may be read-only


def without_palette(image: Image.Image) -> Image.Image:
    """Return an image of the colours that its pixels have in its palette; others are returned as they are."""
    if image.mode not in ("P", "PA"):
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def levels_of_image(image: Image.Image) -> Tensor:
    """Convert an image to 8-bit levels (C, H, W) with its own channels; 16 bits are scaled to 8.

    Raises:
        ValueError: values of an image of more than 8 bits lie outside its range.
    """
    image = eight_bit(without_palette(image))
    return to_tensor(image.convert("L") if image.mode == "1" else image)


def _of_array(values: list | np.ndarray) -> Image.Image:
    """Return the image of an 8-bit array (H, W) or (H, W, C), whose type may be that of other whole numbers."""
    array = np.asarray(values)
    if array.dtype != np.uint8 and not (array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255):
        raise ValueError(f"an array must hold 8-bit values, got {array.dtype}")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(array.astype(np.uint8))


def decode(source: Any, mode: str, resolution: tuple[int, int], name: str) -> Image.Image:
    """Decode an image to 8 bits of `mode`, resized so that it just covers `resolution` (height, width) in pixels.

    An image that is more than `LONGEST` times as long as the resolution is cut to its middle part.

    Args:
        source: a path, the bytes of a file, {"bytes", "path"} as the datasets library has them, a PIL image, or an
            8-bit array (H, W) or (H, W, C).
        mode: "L", "RGB" or "RGBA".
        name: name of the image in messages; a path is its own name.

    Raises:
        BadImageError: the image cannot be read.
    """
    height, width = resolution
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        name = source
    try:
        if source is None or isinstance(source, bytes) and not source:
            raise ValueError("there is no content")
        if isinstance(source, (list, np.ndarray)):
            image = to_mode(_of_array(source), mode)
        elif isinstance(source, Image.Image):
            image = to_mode(ImageOps.exif_transpose(source), mode)
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
                if file.format == "EPS":
                    raise ValueError("EPS is not read, because Ghostscript would have to run it as a program")
                # JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves twice the pixels asked for (as for Pillow's own
                # thumbnails); EXIF may swap both sides
                file.draft(None, (2 * max(height, width),) * 2)
                ImageOps.exif_transpose(file, in_place=True)  # another copy of a big image would take gigabytes
                image = to_mode(file, mode)
    except Exception as error:  # decoders raise any kind on damaged files: struct.error, IndexError, RuntimeError, ...
        # Pillow's own text has the address of an object in memory, which differs each time
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "its content is no image that Pillow knows" if unknown else error or type(error).__name__
        message = f"cannot read the image {name}: {reason}"
        raise BadImageError(printable(message)) from error
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    # for reducing, Hamming costs half as much as bicubic and blurs less than bilinear
    kernel = Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BICUBIC
    kept = (min(size[0], LONGEST * width), min(size[1], LONGEST * height))
    if image.size == size == kept:
        return image
    left, top = ((whole - part) // 2 for whole, part in zip(size, kept))
    x, y = image.width / size[0], image.height / size[1]
    box = (left * x, top * y, (left + kept[0]) * x, (top + kept[1]) * y)
    return image.resize(kept, kernel, None if kept == size else box)


def image_form(source: Any, name: str) -> tuple[tuple[int, int], int]:
    """Return (height, width) of an upright image, and its channels: 1 (grey), 3 or 4 (with transparency).

    Args:
        source, name: as in `decode`.

    Raises:
        BadImageError: the image cannot be read.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    try:
        if isinstance(source, (list, np.ndarray)):
            source = _of_array(source)
        image = source if isinstance(source, Image.Image) else None
        image = image or Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        turned = image.getexif().get(0x0112, 1) >= 5  # these orientations lay the image on its side
    except Exception as error:  # decoders raise any kind on damaged files
        raise BadImageError(printable(f"cannot read the image {name}: {error}")) from error
    channels = 4 if image.has_transparency_data else 1 if image.mode in ("1", "L", "F") or image.mode[0] == "I" else 3
    return (image.width, image.height) if turned else (image.height, image.width), channels


# ---------------------------------------------------------------------------------------------
# Many images


class ImageCache:
    """Decoded images by index, in memory that forked workers share; the first that fit stay.

    Workers that are not forks of this process keep nothing: each of them decodes for itself.

    Args:
        count: number of images in the dataset.
        size: bytes of memory for decoded images.
    """

    def __init__(self, count: int, size: int):
        self.memory = mmap.mmap(-1, max(1, size))  # pages cost nothing until they are written
        # (place + 1, height, width) of each image, and in the last row the end of the used memory
        self.index = np.frombuffer(mmap.mmap(-1, 24 * (count + 1)), dtype=np.int64).reshape(count + 1, 3)
        self.lock = multiprocessing.get_context("fork").Lock()

    def __getstate__(self) -> dict:
        return {"memory": None, "index": None, "lock": None}

    def get(self, index: int, channels: int) -> np.ndarray | None:
        """Return image `index`, uint8 (H, W, C), or None where it is not kept."""
        if self.memory is None:
            return None
        with self.lock:
            place, height, width = self.index[index].tolist()
        if not place:
            return None
        array = np.frombuffer(self.memory, np.uint8, height * width * channels, place - 1)
        return array.reshape(height, width, channels)

    def put(self, index: int, array: np.ndarray) -> None:
        """Keep image `index`, uint8 (H, W, C), if there is room for it."""
        if self.memory is None:
            return
        with self.lock:
            place = int(self.index[-1, 0])
            if place + array.nbytes > len(self.memory) or self.index[index, 0]:
                return
            self.memory[place : place + array.nbytes] = array.tobytes()
            self.index[index] = (place + 1, *array.shape[:2])
            self.index[-1, 0] = place + array.nbytes


class ImageDataset(Dataset):
    """Images, resized to cover `resolution` with their aspect kept, then cropped.

    Args:
        sources: the source of each image, as `decode` takes it: a path, bytes, an 8-bit array.
        resolution: (height, width) in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        center_crop: crop from the centre; otherwise at a random place, if `load` is given a random generator.
        random_flip: mirror half of the images left to right, if `load` is given a random generator.
        cache_gb: memory for decoded images, in GB (10^9 bytes).
        labels: the class of each image, `Labels` or values that `Labels.read` takes; None: no classes.

    Attributes:
        scaling: the map between 8-bit levels and model units.
        notes: lines to print about the data before training.
        condition: the condition of each image, a dataset of as many images, or None.

    Raises:
        ValueError: the memory of the cache cannot be had.
    """

    scaling = EIGHT_BIT
    notes: Sequence[str] = ()
    condition: Dataset | None = None

    def __init__(
        self,
        sources: Sequence,
        resolution: tuple[int, int],
        channels: int = 3,
        center_crop: bool = True,
        random_flip: bool = False,
        cache_gb: float = 0.0,
        labels: Any = None,
    ):
        self.sources = sources
        self.labels = as_labels(labels, len(sources), "the classes of the images")
        self.resolution, self.channels = tuple(resolution), channels
        self.center_crop, self.random_flip = center_crop, random_flip
        self.cache = None
        if cache_gb > 0 and sys.platform == "linux":
            # for random crops the need depends on the images' aspects
            whole = len(sources) * resolution[0] * resolution[1] * channels if center_crop else float("inf")
            try:
                self.cache = ImageCache(len(sources), int(min(cache_gb * 1e9, whole)))
            except (OSError, OverflowError) as error:
                raise ValueError(f"cache_gb must be memory that there is, got {cache_gb}: {error}") from error

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def augments(self) -> bool:
        """True if loading an image draws from the generator that is given; a subclass may always draw."""
        return self.random_flip or not self.center_crop or type(self) is not ImageDataset

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index` without augmentation, float32 (C, H, W) in [-1, 1]."""
        return self.load(index)

    def load(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """Load image `index`, augmented by `rng` if given, as float32 (C, H, W) in [-1, 1].

        Raises:
            BadImageError: the image cannot be read.
        """
        return EIGHT_BIT.to_model(self.load_8bit(index, rng))

    def load_8bit(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """Load image `index` as uint8 (C, H, W), a quarter of the memory of float32."""
        return self.finish(self._decoded(index), rng)

    def finish(self, array: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """Crop and flip an image (H, W, C) that covers the resolution; returns uint8 (C, H, W)."""
        array = self._crop(array, None if self.center_crop else rng)
        if rng is not None and self.mirrors(rng):
            array = array[:, ::-1]
        return to_tensor(array)

    def mirrors(self, rng: np.random.Generator) -> bool:
        """Return True if an image is to be mirrored, as `rng` draws it."""
        return self.random_flip and bool(rng.random() < 0.5)

    def _crop(self, array: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Crop from the centre, or at a place that `rng` draws; (H, W, C) -> (height, width, C)."""
        height, width = self.resolution
        spare = (array.shape[0] - height, array.shape[1] - width)
        top, left = (n // 2 if rng is None else int(rng.integers(0, n + 1)) for n in spare)
        return array[top : top + height, left : left + width]

    def _decoded(self, index: int) -> np.ndarray:
        """Return image `index` as uint8 (H, W, C), from the cache if it is there.

        It is resized, and cropped already if crops are taken from the centre.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        index %= len(self)
        array = self.cache.get(index, self.channels) if self.cache else None
        if array is None:
            image = decode(self.sources[index], IMAGE_MODES[self.channels], self.resolution, f"number {index}")
            array = np.asarray(image).reshape(image.height, image.width, self.channels)
            if self.center_crop:
                array = self._crop(array)
            if self.cache:
                self.cache.put(index, array)
        return array


def find_images(folder: str, listing: Listing | None = None, more: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Find all files below `folder` that have an ending which Pillow reads, in upper or lower case.

    Args:
        listing: the content of the folder, if it has been listed already.
        more: other endings that count as images.

    Returns:
        The files, sorted, broken links included (reading them fails later, with their names); and lines about the other
        contents of the folder.

    Raises:
        ValueError: the folder does not exist or cannot be read, or has no image in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"train_data_dir must be a folder of images, and {folder} is not a folder")
    listing = listing or list_folder(folder)
    if listing.error is not None:
        raise ValueError(printable(f"cannot read the folder {listing.error.filename}: {listing.error.strerror}"))
    # cameras write MPO, which Pillow opens as JPEG
    readable = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN or kind == "MPO"}
    readable |= set(more)
    paths, others = [], [Path(path).suffix for path in listing.special]
    for path in listing.files:
        ending = os.path.splitext(path)[1]
        if ending.lower() in readable:
            paths.append(path)
        else:
            others.append(Path(path).suffix)
    endings = sorted({ending or "none" for ending in others})
    listed = ", ".join(endings[:8]) + (", ..." if len(endings) > 8 else "")
    notes = [f"{len(others):,} files with endings {listed}"] if others else []
    if listing.links:
        notes.append(f"{len(listing.links):,} links to folders, which are not followed ({listing.links[0]})")
    notes = [printable(note) for note in notes]
    if not paths:
        found = " and ".join(notes) or "no files"
        raise ValueError(f"no images found in {folder} and its subfolders: {found}; needed are files that Pillow reads")
    return paths, [f"not read in {printable(folder)}: {note}" for note in notes]


def image_folder(
    folder: str, resolution: tuple[int, int], channels: int = 3, subfolder_classes: bool = False,
    listing: Listing | None = None, **options,
) -> ImageDataset:  # fmt: skip
    """Return a dataset of the images in a folder and its subfolders; `options` are those of `ImageDataset`.

    Args:
        subfolder_classes: the names of the first level of subfolders are the classes of the images in them.
        listing: the content of the folder, if it has been listed already.
    """
    paths, notes = find_images(folder, listing)
    if subfolder_classes:
        options["labels"] = subfolder_labels(Path(folder), paths)
    dataset = ImageDataset(paths, resolution, channels, **options)
    dataset.notes = notes
    return dataset


def subfolder_labels(root: Path, paths: list[str]) -> Labels:
    """Return the classes of images by the first level of subfolders below `root`, sorted by name.

    Raises:
        ValueError: an image is in no subfolder, or each subfolder has a single image.
    """
    prefix = "" if str(root) == "." else os.path.join(root, "")
    parts = [path.removeprefix(prefix).split(os.sep, 1) for path in paths]
    outside = [path for path, names in zip(paths, parts) if len(names) == 1]
    if outside:
        raise ValueError(
            printable(
                f"class_labels folder needs each image in a subfolder, whose name is its class; {outside[0]} is in "
                f"none, one of {len(outside):,} such images"
            )
        )
    return Labels.read([printable(names[0]) for names in parts], printable(f"the subfolders of {root}"))


def digits(resolution: tuple[int, int] = (8, 8), channels: int = 1, classes: bool = False, **options) -> ImageDataset:
    """Return the handwritten digits that scikit-learn bundles: 1,797 grey images of 8x8 pixels (17 levels).

    Args:
        classes: give each image the digit that it shows as its class.
        options: those of `ImageDataset`.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    arrays = (found.images * (255 / 16)).round().astype(np.uint8)
    if classes:
        options["labels"] = Labels.read(found.target, "the digits")
    return ImageDataset(list(arrays), resolution, channels, **options)
