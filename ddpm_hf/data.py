"""Data sets of images and of sequences, and the order in which training sees them.

Every source gives float tensors `(C, H, W)` or `(C, length)` in [-1, 1]. The order is an endless stream of
(epoch, index) keys that follows from the seed alone, so training can start anywhere in it, on any number of processes.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.seeding import Stream, derive_seed

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadImageError(ValueError):
    """A picture that cannot be read; the message names it."""


# ---------------------------------------------------------------------------------------------
# Images


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any picture as 8-bit "L", "RGB" or "RGBA": upright by EXIF, 16 bits scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        limit = 65535.0 if image.mode.startswith("I") else 1.0
        if values.min() < 0 or values.max() > limit:
            raise ValueError(
                f"values of a picture of mode {image.mode} must lie in [0, {limit:g}]; "
                f"got {values.min():g} to {values.max():g}"
            )
        image = Image.fromarray((values * (255 / limit)).round().astype(np.uint8))
    if image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit picture -> float32 (C, H, W) in [-1, 1]."""
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array.astype(np.float32)).movedim(-1, 0).contiguous() / 127.5 - 1


class ImageDataset(Dataset):
    """Pictures, resized to cover `resolution` with their aspect kept, then cropped.

    Args:
        sources: a file's path, or an 8-bit array (H, W) or (H, W, C), for each picture.
        resolution: (height, width) in pixels.
        channels: 1, 3 or 4.
        center_crop: crop from the centre, else at random (where `load` is given a random generator).
        random_flip: mirror half of the pictures (likewise).
    """

    def __init__(
        self,
        sources: Sequence,
        resolution: tuple[int, int],
        channels: int = 3,
        center_crop: bool = True,
        random_flip: bool = False,
    ):
        self.sources = sources
        self.resolution, self.channels = tuple(resolution), channels
        self.center_crop, self.random_flip = center_crop, random_flip

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Tensor:
        """Without augmentation."""
        return self.load(index)

    def load(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """Picture `index`, augmented by `rng` if given, float32 (C, H, W) in [-1, 1].

        Raises:
            BadImageError: the picture cannot be read.
        """
        source, mode = self.sources[index], IMAGE_MODES[self.channels]
        if isinstance(source, np.ndarray):
            image = to_mode(Image.fromarray(source), mode)
        else:
            try:
                with Image.open(source) as file:
                    image = to_mode(file, mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise BadImageError(f"cannot read the picture {source}: {error}") from error
        place = (0.5, 0.5)
        if rng is not None and not self.center_crop:
            place = tuple(rng.random(2))
        height, width = self.resolution
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC, centering=place)
        if rng is not None and self.random_flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return to_tensor(image)


def find_images(folder: str) -> list[Path]:
    """All files below `folder` whose ending, in any case, is one that Pillow reads; sorted.

    Raises:
        ValueError: no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"train_data_dir must be a folder of images, and {folder} is not a folder")
    readable = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    # hidden files are not the user's pictures (macOS leaves ._name.jpg)
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    paths = sorted(path for path in files if path.suffix.lower() in readable)
    if not paths:
        endings = sorted({path.suffix or "none" for path in files})[:8]
        found = f"{len(files)} files with endings {', '.join(endings)}" if files else "no files"
        raise ValueError(f"no images found in {folder} and its subfolders: {found}; needed are files that Pillow reads")
    return paths


def image_folder(folder: str, resolution: tuple[int, int], channels: int = 3, **options) -> ImageDataset:
    """The images below a folder; `options` as of `ImageDataset`."""
    return ImageDataset([str(path) for path in find_images(folder)], resolution, channels, **options)


def digits(resolution: tuple[int, int] = (8, 8), channels: int = 1, **options) -> ImageDataset:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels (17 levels), bundled with it."""
    from sklearn.datasets import load_digits

    arrays = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    return ImageDataset(list(arrays), resolution, channels, **options)


# ---------------------------------------------------------------------------------------------
# Sequences


class SequenceDataset(Dataset):
    """Sequences scaled to [-1, 1] by the range of each channel.

    Args:
        array: (N, C, length) finite numbers, or (N, length) for one channel; may be memory-mapped.
        name: what to call the array in messages.

    Attributes:
        data_shift, data_scale: per channel, data = x * scale + shift for the x in [-1, 1] that items are.

    Raises:
        ValueError: another number of dimensions, no sequences, not numbers, or NaN or infinity (the rows are named).
    """

    def __init__(self, array: Any, name: str = "the array"):
        array = array if isinstance(array, np.ndarray) else np.asarray(array)
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{name} must hold real numbers, got the type {array.dtype}")
        if array.ndim == 2:
            array = array[:, None, :]
        if array.ndim != 3 or 0 in array.shape:
            raise ValueError(f"{name} must have the shape (N, channels, length), got {array.shape}")
        low, high = np.full(array.shape[1], np.inf), np.full(array.shape[1], -np.inf)
        bad: list[int] = []
        for start in range(0, len(array), 1024):  # in parts: the file may not fit in memory
            part = np.asarray(array[start : start + 1024], dtype=np.float64)
            rows = np.flatnonzero(~np.isfinite(part).all(axis=(1, 2)))
            bad += [start + int(row) for row in rows]
            if not len(rows):
                low, high = np.minimum(low, part.min(axis=(0, 2))), np.maximum(high, part.max(axis=(0, 2)))
        if bad:
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            raise ValueError(f"{name} has NaN or infinity in rows {', '.join(map(str, bad[:10]))}{more}")
        self.array, self.name = array, name
        self.data_shift = ((high + low) / 2).tolist()
        # A channel that never changes is mapped to 0.
        self.data_scale = np.where(high > low, (high - low) / 2, 1.0).tolist()

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        """Float32 (C, length) in [-1, 1]."""
        row = np.asarray(self.array[index], dtype=np.float64)
        scaled = (row - np.array(self.data_shift)[:, None]) / np.array(self.data_scale)[:, None]
        return torch.from_numpy(scaled.astype(np.float32))


def read_array(path: str) -> np.ndarray:
    """The array of a .npy (memory-mapped) or .npz file (which must hold one array, or one named 'data').

    Raises:
        ValueError: the file cannot be read, is of another kind, or does not say which array is meant.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".npy", ".npz"):
        raise ValueError(f"train_data_file must end in .npy or .npz, got {path}")
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if len(names) != 1 and "data" not in names:
                raise ValueError(f"it must hold one array, or one named 'data'; it has {', '.join(names) or 'none'}")
            return archive[names[0] if len(names) == 1 else "data"]
    except Exception as error:  # NumPy raises many kinds: OSError, ValueError, EOFError, BadZipFile, ...
        raise ValueError(f"cannot read the arrays of {path}: {error}") from error


def windows(recording: np.ndarray, length: int, stride: int) -> np.ndarray:
    """(C, samples) -> every `stride`-th window, (N, C, length); a view."""
    if recording.shape[-1] < length:
        raise ValueError(f"the recording must have at least {length} samples, got {recording.shape[-1]}")
    return np.lib.stride_tricks.sliding_window_view(recording, length, axis=-1)[:, ::stride].swapaxes(0, 1)


def ecg(length: int = 256, stride: int = 2) -> SequenceDataset:
    """Overlapping windows of PyWavelets' electrocardiogram (1,024 samples, one channel), bundled with it."""
    import pywt

    return SequenceDataset(windows(pywt.data.ecg()[None].astype(np.float64), length, stride), "the ECG recording")


# ---------------------------------------------------------------------------------------------
# The training stream

Key = tuple[int, int]  # (epoch, index)


@dataclass
class Batch:
    """`x0`: (B, C, *spatial); `skipped`: messages of pictures left out; `error`: why the batch could not be made."""

    x0: Tensor | None
    skipped: list[str]
    error: str | None = None


def as_tensor(item: Any) -> Tensor:
    """An item of a data set as float32 (C, *spatial): a tensor, array or PIL image, alone, first of a tuple, or in a
    dict under "x0", "pixel_values", "image", "images" or "sequence".

    Raises:
        ValueError: something else, or values outside [-1, 1].
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
        return to_tensor(item)
    if isinstance(item, np.ndarray):
        item = torch.from_numpy(item)
    if not isinstance(item, Tensor) or item.ndim not in (2, 3) or not item.is_floating_point():
        got = f"{item.dtype} of shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
        raise ValueError(f"items must be float tensors (C, H, W) or (C, length) in [-1, 1], or PIL images; got {got}")
    if not (item.abs() <= 1 + 1e-4).all():
        raise ValueError(f"items must lie in [-1, 1]; got {item.min():.4g} to {item.max():.4g}")
    return item.float()


class TrainingView(Dataset):
    """A map-style data set under (epoch, index) keys: augmentation follows from (seed, epoch, index).

    A picture that cannot be read is replaced by the next one (`on_bad="skip"`), or makes the batch an error.
    """

    def __init__(self, dataset, seed: int, on_bad: str = "stop"):
        self.dataset, self.seed, self.on_bad = dataset, seed, on_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor | None, list[str], str | None]:
        epoch, first = key
        skipped: list[str] = []
        for attempt in range(len(self.dataset)):
            index = (first + attempt) % len(self.dataset)
            try:
                if hasattr(self.dataset, "load"):
                    rng = np.random.default_rng(derive_seed(self.seed, Stream.AUGMENTATION, epoch, index))
                    return self.dataset.load(index, rng), skipped, None
                return as_tensor(self.dataset[index]), skipped, None
            except BadImageError as error:
                if self.on_bad == "stop":
                    return None, skipped, f"{error}. To leave such pictures out: --on_bad_image skip"
                skipped.append(str(error))
            except ValueError as error:
                return None, skipped, f"item {index} of the data: {error}"
        return None, skipped, "none of the pictures can be read"


def collate(items) -> Batch:
    """Items of a `TrainingView` -> a `Batch`."""
    skipped = [message for _, messages, _ in items for message in messages]
    errors = [error for _, _, error in items if error]
    if not errors and len({tuple(x.shape) for x, _, _ in items}) > 1:
        errors = [f"items must all have one shape, got {sorted({tuple(x.shape) for x, _, _ in items})}"]
    if errors:
        return Batch(None, skipped, errors[0])
    return Batch(torch.stack([x for x, _, _ in items]), skipped)


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
    """What tells other data from the same: count, shape, and a digest of up to 16 items of our own data sets."""
    digest = hashlib.sha256()
    if isinstance(dataset, (ImageDataset, SequenceDataset)):
        for index in np.linspace(0, len(dataset) - 1, min(16, len(dataset))).astype(int):
            with contextlib.suppress(BadImageError):
                digest.update(dataset[int(index)].numpy().tobytes())
        digest.update(repr((getattr(dataset, "data_shift", None), getattr(dataset, "data_scale", None))).encode())
    return {"items": len(dataset), "shape": list(shape), "digest": digest.hexdigest()}


# ---------------------------------------------------------------------------------------------
# From options to data


def build_dataset(config):
    """The data that a `TrainConfig` names.

    Raises:
        ValueError: no source, nothing found, or data that does not fit the options.
    """
    options = {"center_crop": config.center_crop, "random_flip": config.random_flip}
    size = (
        tuple(config.resolution * 2 if len(config.resolution) == 1 else config.resolution)
        if config.resolution
        else None
    )
    if config.dataset_name == "digits":
        return digits(size or (8, 8), config.image_channels or 1, **options)
    if config.dataset_name == "ecg":
        return ecg(config.sequence_length or 256)
    if config.train_data_dir:
        return image_folder(config.train_data_dir, size or (64, 64), config.image_channels or 3, **options)
    if config.train_data_file:
        array = read_array(config.train_data_file)
        if config.sequence_length is not None:
            if array.ndim >= 2 and array.shape[-1] < config.sequence_length:
                raise ValueError(
                    f"sequence_length must be at most the data's length {array.shape[-1]}, got {config.sequence_length}"
                )
            array = array[..., : config.sequence_length]
        return SequenceDataset(array, config.train_data_file)
    raise ValueError("no data: give one of dataset_name, train_data_dir, train_data_file, or a dataset from Python")
