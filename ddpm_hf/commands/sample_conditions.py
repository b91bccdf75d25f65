"""The conditions of sample.py, for models with paired conditions: read and checked before anything is written."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_hf import DDPMPipeline1D
from ddpm_hf.commands.sample_choices import read_array
from ddpm_hf.data.images import IMAGE_MODES, decode, find_images, image_form
from ddpm_hf.data.listing import list_folder
from ddpm_hf.data.scientific_images import read_values
from ddpm_hf.data.sequence_files import FILE_ENDINGS
from ddpm_hf.pipeline.pairs import encode_condition, size_of_conditions
from ddpm_hf.pipeline.windows import Windows
from ddpm_hf.run.record import without_folders

CHECKED = 64  # the number of conditions that are checked at once


class Conditions(NamedTuple):
    """The conditions of the samples; each has the same number of samples, which follow each other.

    Attributes:
        file: the file or folder of the conditions.
        names: the name of each condition: its path in the folder without ending, or its row in the file.
        data: the conditions, (N, C', *spatial), uint8 for levels of pictures or else as the pipeline takes them.
        draws: the number of samples of each condition.
    """

    file: str
    names: list[str]
    data: Tensor
    draws: int

    @property
    def count(self) -> int:
        """The number of samples in all."""
        return len(self.names) * self.draws

    def places(self, numbers: Sequence[int]) -> list[int]:
        """Return the number of the condition of each of these samples."""
        return [number // self.draws for number in numbers]

    def part(self, numbers: Sequence[int]) -> Tensor:
        """Return the conditions of these samples as a call of the pipeline takes them."""
        return _levels(self.data[self.places(numbers)])

    def sample_names(self) -> list[str]:
        """Return a name for each sample: that of its condition, with the number of the draw if there are several."""
        if self.draws == 1:
            return self.names
        return [f"{name}-{draw:03d}" for name in self.names for draw in range(self.draws)]

    def sample_conditions(self) -> list[str]:
        """Return the name of the condition of each sample."""
        return [name for name in self.names for _ in range(self.draws)]

    def settings(self) -> dict:
        """Return what the samples depend on, without folders of this machine."""
        digest = hashlib.sha256(repr((self.names, tuple(self.data.shape), str(self.data.dtype))).encode())
        digest.update(self.data.contiguous().numpy().tobytes())
        return {"condition": without_folders(self.file), "condition_items": digest.hexdigest()}


def _levels(data: Tensor) -> Tensor:
    return data.double() / 255 if data.dtype == torch.uint8 else data


def read_conditions(
    pipeline, path: str | None, draws: int, size: tuple[int, ...] | None = None, windows: Windows | None = None
) -> Conditions | None:
    """Read the conditions of the samples, and check them; None for a model without paired conditions.

    Args:
        pipeline: the pipeline of the model.
        path: a picture, a folder of pictures or of .npy files with a condition each, or a file of many: .npy or .npz,
            and .csv or .parquet for sequences.
        draws: the number of samples of each condition.
        size, windows: the size of the samples without channels, and the windows in which the model predicts, as in
            `encode_condition`.

    Raises:
        ValueError: the model needs conditions and there are none, or the reverse; a file cannot be read, or holds a
            condition of another size, other channels, or values that are not finite or out of range.
    """
    if pipeline.config.get("condition") != "paired":
        if path is not None:
            raise ValueError(f"--condition needs a model with paired conditions, and this one has none; got {path}")
        return None
    channels, own = pipeline.unet.config.condition_channels, size_of_conditions(pipeline, size, windows)
    if path is None:
        raise ValueError(
            f"--condition must name a file or folder of conditions: this model needs one for each sample, of "
            f"{channels} channel{'s'[: channels > 1]} and the size {_by(own)}"
        )
    if not Path(path).exists():
        raise ValueError(f"--condition must be a file or a folder, got {path}: No such file")
    is_picture = Path(path).suffix.lower() not in FILE_ENDINGS
    if Path(path).is_dir() or (is_picture and len(own) == 2):
        found = _read_files(pipeline, path, channels, own)
    else:
        found = _read_rows(pipeline, path, channels, own)
    conditions = Conditions(path, *found, draws)
    data = _levels(conditions.data)
    bad = ~data.flatten(1).isfinite().all(dim=1)
    if bad.any():
        name = conditions.names[int(bad.int().argmax())]
        raise ValueError(f"--condition: the values must be finite, and {name} of {path} has NaN or infinity")
    for first in range(0, len(data), CHECKED):
        part = data[first : first + CHECKED]
        try:
            encode_condition(pipeline, part, len(part), size=size, windows=windows)  # checks the range
        except ValueError as error:
            raise ValueError(f"--condition: {path}, from {conditions.names[first]} on: {error}") from error
    return conditions


def _read_files(pipeline, path: str, channels: int, size: tuple[int, ...]) -> tuple[list[str], Tensor]:
    """Read one condition a file: pictures, or .npy files."""
    root, files = Path(path), [path]
    if root.is_dir():
        listing = list_folder(path)
        files = [file for file in listing.files if file.lower().endswith(".npy")]
        if len(size) == 2 and not files:
            files = find_images(path, listing)[0]
        if not files:
            raise ValueError(f"--condition must be a file or a folder of .npy files (channels, length); {path} has no "
                             ".npy files")  # fmt: skip
    names = [str(Path(file).relative_to(root if root.is_dir() else root.parent).with_suffix("")) for file in files]
    often, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--condition: names without endings must differ, and {path} has two files {often}")
    found = []
    for file in files:
        try:
            found.append(_read_file(pipeline, file, channels, size))
        except (OSError, ValueError) as error:
            raise ValueError(f"--condition: {error}") from error
        _check_shape(pipeline, found[-1].shape, size, file)
    return names, torch.from_numpy(np.stack(found))


def _read_file(pipeline, file: str, channels: int, size: tuple[int, ...]) -> np.ndarray:
    """Read the condition of a file, (C', *spatial); a picture as training reads it, but in its own size."""
    if len(size) == 1:
        values = np.load(file, allow_pickle=False)
        if values.dtype.kind not in "iufb":
            raise ValueError(f"{file} must hold real numbers, got {values.dtype}")
        return np.atleast_2d(values).astype(np.float64)
    own_units = pipeline.config.get("condition_scale") is not None
    if own_units or file.lower().endswith(".npy"):
        values = read_values(file, file)
        return values if values.dtype == np.uint8 and not own_units else values.astype(np.float64)
    if channels not in IMAGE_MODES:
        raise ValueError(f"conditions of {channels} channels are read from .npy files, got {file}")
    own, _ = image_form(file, file)
    _check_shape(pipeline, (channels, *own), size, file)
    image = np.asarray(decode(file, IMAGE_MODES[channels], size, file))
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _read_rows(pipeline, path: str, channels: int, size: tuple[int, ...]) -> tuple[list[str], Tensor]:
    """Read the conditions in the rows of a file."""
    array = read_array(path, "--condition")
    if isinstance(pipeline, DDPMPipeline1D):
        if array.ndim == 1 or (array.ndim == 2 and channels > 1):
            array = array.reshape(1, -1, array.shape[-1])
    elif array.ndim == 4 and array.shape[1] != channels and array.shape[-1] == channels:
        array = np.moveaxis(array, -1, 1)
    if array.ndim == len(size) + 1:
        array = array[:, None]
    if array.ndim != len(size) + 2 or not len(array):
        raise ValueError(f"--condition: {path} must hold conditions (N, {channels}, {_by(size)}), got {array.shape}")
    _check_shape(pipeline, array.shape[1:], size, path)
    levels = array.dtype == np.uint8 and len(size) == 2 and pipeline.config.get("condition_scale") is None
    return [f"{row:06d}" for row in range(len(array))], torch.from_numpy(array if levels else array.astype(np.float64))


def _check_shape(pipeline, shape: Sequence[int], size: tuple[int, ...], file: str) -> None:
    channels = pipeline.unet.config.condition_channels
    if tuple(shape) != (channels, *size):
        trained = size == tuple(pipeline.config.condition_size)
        raise ValueError(
            f"--condition must have {channels} channel{'s'[: channels > 1]} of the size {_by(size)}, "
            f"{'as in training' if trained else 'in proportion to the samples'}; {file} has the shape {tuple(shape)}"
        )


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
