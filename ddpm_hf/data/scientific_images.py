"""Images in units of their own: any number of channels and any range, from arrays, TIFF, .npy and other files.

All values are looked at once before training, for the scaling that `ranges` chooses. An item is then read when it is
needed, scaled in float64, and resized and cropped in float32.
"""

import zipfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ddpm_hf.data.images import LONGEST, BadImageError, printable, without_palette
from ddpm_hf.data.labels import as_labels
from ddpm_hf.data.mapped_array import as_mapped, mapped_file
from ddpm_hf.data.ranges import Measured, check_range, choose_scaling, measure, to_model
from ddpm_hf.data.scaling import EIGHT_BIT, Scaling
from ddpm_hf.data.sequences import scan_key
from ddpm_hf.options import IMAGE_NORMS

PART = 1 << 22  # numbers of an array that are looked at together, 32 MiB of float64
THREADS = 8  # the number of threads that read files before training
TIFF = (".tif", ".tiff")


# ---------------------------------------------------------------------------------------------
# One image


def read_values(source: Any, name: str, channels_last: bool = False, missing: bool = False) -> np.ndarray:
    """Read an image (C, H, W) in the type that its file has.

    The channels of a TIFF file are all of its axes but height and width: bands, samples and pages. Pages of another
    size or type than the first, such as overviews, are left out.

    Args:
        source: the path of a TIFF or .npy file or of a format that Pillow reads, or an array (H, W) or (C, H, W).
        name: name of the image in messages; a path is its own name.
        channels_last: arrays, also those of .npy files, are (H, W, C).
        missing: values may be NaN.

    Raises:
        BadImageError: it cannot be read, has another number of dimensions, or holds values that are no finite real
            numbers, or that its file declares to be missing (GDAL_NODATA).
    """
    name = source if isinstance(source, str) else name
    try:
        if not isinstance(source, str):
            values = _channels_first(np.asarray(source), channels_last)
        elif source.lower().endswith(".npy"):
            values = _channels_first(np.load(source, allow_pickle=False), channels_last)
        elif source.lower().endswith(TIFF):
            values = _read_tiff(source)
        else:
            values = _read_other(source)
        if values.dtype.kind not in "iufb" or 0 in values.shape:
            raise ValueError(f"it must hold real numbers, got {values.dtype} of shape {values.shape}")
        finite = np.isfinite(values) | (missing & np.isnan(values))
        if not finite.all():
            channel, row, column = map(int, np.argwhere(~finite)[0])
            raise ValueError(
                f"all values must be finite; channel {channel} has {values[channel, row, column]} in row {row}, column "
                f"{column}, one of {int((~finite).sum()):,} such values"
            )
    except Exception as error:  # decoders raise any kind on damaged files
        reason = str(error) or type(error).__name__
        raise BadImageError(printable(f"cannot read the image {name}: {reason}")) from error
    return values.astype(np.uint8) if values.dtype == bool else values


def _channels_first(values: np.ndarray, channels_last: bool) -> np.ndarray:
    if values.ndim not in (2, 3):
        form = "(H, W, C)" if channels_last else "(C, H, W)"
        raise ValueError(f"an array must have the shape (H, W) or {form}, got {values.shape}")
    if values.ndim == 2:
        return values[None]
    return np.moveaxis(values, -1, 0) if channels_last else values


def _read_tiff(path: str) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page, series = file.pages[0], _tiff_series(file)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:  # its values are the numbers of colours
            return _read_other(path)
        try:
            parts = [each.asarray() for each in series]
        except ValueError as error:
            # tifffile needs imagecodecs for some compressions, which Pillow has for a single page
            if "imagecodecs" not in str(error) or len(file.pages) > 1:
                raise
            values = _read_other(path)
        else:
            height, width = series[0].axes.index("Y"), series[0].axes.index("X")
            parts = [np.moveaxis(part, (height, width), (-2, -1)) for part in parts]
            values = np.concatenate([part.reshape(-1, *part.shape[-2:]) for part in parts])
        missing = _declared_missing(page, values.dtype)
    if missing is not None and (count := int((values == missing).sum())):
        raise ValueError(f"{count:,} values are {missing:g}, which the file declares to be missing (GDAL_NODATA)")
    return values


def _declared_missing(page: Any, dtype: np.dtype) -> float | None:
    """Return the value that stands for missing ones in a TIFF file, or None where it declares none.

    The file has it as a text, which may be that of a number outside the type of the image.
    """
    try:
        number = float(page.tags["GDAL_NODATA"].value)
    except (KeyError, TypeError, ValueError):  # there is no such tag, or it holds no number
        return None
    return dtype.type(number) if dtype.kind == "f" else number


def _tiff_series(file: Any) -> list:
    """Return the parts of a TIFF file that have the shape and type of the first one, each with one or more pages."""
    first = file.series[0]
    form = (first.shape, first.dtype, first.axes)
    return [each for each in file.series if (each.shape, each.dtype, each.axes) == form]


def _read_other(path: str) -> np.ndarray:
    with Image.open(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        file = without_palette(file)
        if file.mode not in ("L", "LA", "RGB", "RGBA", "F", "1") and not file.mode.startswith("I"):
            file = file.convert("RGB")
        values = np.asarray(file)
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def array_shape(path: str, leave_out: Collection[str] = ()) -> tuple[int, ...] | None:
    """Return the shape of the array in a .npy or .npz file from its header, or None where that cannot be read.

    Args:
        leave_out: arrays of a .npz file that are not the data.
    """
    try:
        if path.lower().endswith(".npy"):
            with open(path, "rb") as file:
                return _header_shape(file)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.removesuffix(".npy") not in leave_out]
            with archive.open(names[0] if len(names) == 1 else "data.npy") as file:
                return _header_shape(file)
    except Exception:  # an error is told when the array is opened
        return None


def _header_shape(file: Any) -> tuple[int, ...]:
    read = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(file) != (1, 0):
        read = np.lib.format.read_array_header_2_0
    return read(file)[0]


def is_scientific(path: str) -> bool:
    """Return True if a file's values do not fit into 8 bits of grey, RGB or RGBA.

    Those are .npy files, and TIFF files of float, signed or 32-bit numbers, or of 16 bits and other than 1, 3 or 4
    channels. A file that cannot be read counts as a usual picture, which is refused with its name later.
    """
    if path.lower().endswith(".npy"):
        return True
    if not path.lower().endswith(TIFF):
        return False
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            first, *others = _tiff_series(file)
            kind, height, width = np.dtype(first.dtype), first.axes.index("Y"), first.axes.index("X")
            channels = int(np.prod(first.shape)) // (first.shape[height] * first.shape[width]) * (1 + len(others))
    except Exception:  # decoders raise any kind on damaged files
        return False
    return kind not in (np.uint8, np.uint16, np.bool_) or kind == np.uint16 and channels not in (1, 3, 4)


def resized(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Resize an image, float32 (C, H, W), so that it just covers `resolution` (height, width).

    It is bilinear, with an average over the area where an image is reduced, so that no value leaves the range of the
    image. An image of more than `LONGEST` times the resolution's length is cut to its middle part.
    """
    height, width = resolution
    scale = max(height / x.shape[1], width / x.shape[2])
    for axis, side in ((1, height), (2, width)):
        most = max(1, round(LONGEST * side / scale))
        if x.shape[axis] > most:
            x = x.narrow(axis, (x.shape[axis] - most) // 2, most)
    size = max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale))
    if size == tuple(x.shape[1:]):
        return x
    return F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]


# ---------------------------------------------------------------------------------------------
# Many images


class ScientificImages(Dataset):
    """Images with any number of channels, in model units that follow from the range of the data.

    Args:
        sources: an array or a tensor (N, C, H, W), or (N, H, W) for one channel, which may be memory-mapped; or the
            paths of files that `read_values` reads.
        resolution: (height, width) in pixels; None: that of the array.
        channels: number of channels that the images must have; None: any.
        norm, value_range: as in `choose_scaling`; not both.
        center_crop: crop from the centre; otherwise at a random place, if `load` is given a random generator.
        random_flip: mirror half of the images left to right, if `load` is given a random generator.
        labels: the class of each image, `Labels` or values that `Labels.read` takes; None: no classes.
        channels_last: arrays, also those of .npy files, have the channels behind height and width.
        skip_bad: leave images that cannot be read out of the range, instead of an error.
        name: name of the data in messages.
        scaling: a scaling to take, instead of one that follows from the data; the data is not looked at then.
        scans: results of earlier passes over the data, as `SequenceDataset` has them.
        missing: values may be NaN, which needs a scaling; a pixel that is resized from a missing one is missing too.

    Attributes:
        scaling: the map between data units and model units, a `Scaling`; `EIGHT_BIT` for the bits of 8-bit images.
        dtype: the type of the data, to which all types of its files can be converted.
        notes: lines to print about the data before training.

    Raises:
        ValueError: the array has another number of dimensions; images have different channels, or values that are
            not finite or do not fit the norm (the message names the file or the row).
    """

    condition: Dataset | None = None  # the condition of each image, or None

    # This function is longer than 60 lines because the shape, the channels and the scaling are checked together.
    def __init__(
        self,
        sources: Any,
        resolution: tuple[int, int] | None = None,
        channels: int | None = None,
        norm: str | None = None,
        value_range: Sequence[float] | None = None,
        center_crop: bool = True,
        random_flip: bool = False,
        labels: Any = None,
        channels_last: bool = False,
        skip_bad: bool = False,
        name: str = "the array",
        scaling: Scaling | None = None,
        scans: dict[str, list] | None = None,
        missing: bool = False,
    ):
        if norm not in (None, *IMAGE_NORMS):
            raise ValueError(f"image_norm must be one of {', '.join(IMAGE_NORMS)}, got {norm!r}")
        check_range(value_range, norm)
        sources = sources.numpy(force=True) if isinstance(sources, Tensor) else as_mapped(sources)
        self.sources, self.channels_last, self.name, self.skip_bad = sources, channels_last, name, skip_bad
        self.center_crop, self.random_flip, self.missing = center_crop, random_flip, missing
        self.is_array = hasattr(sources, "dtype")
        self.value_range, self.notes, self.scans = value_range, [], {} if scans is None else scans
        if self.is_array:
            shape = tuple(sources.shape)
            if len(shape) not in (3, 4) or 0 in shape:
                form = "(N, H, W, C)" if channels_last else "(N, C, H, W)"
                raise ValueError(f"{name} must have the shape {form} or (N, H, W), got {shape}")
            if sources.dtype.kind not in "iufb":
                raise ValueError(f"{name} must hold real numbers, got the type {sources.dtype}")
            self._check_order(shape)
            where = shape[1:3] if channels_last or len(shape) == 3 else shape[2:]
            resolution = resolution or where
        elif resolution is None:
            raise ValueError("resolution must be given for images in files, got None")
        elif len(sources) and (own := array_shape(sources[0])) is not None:
            self._check_order((len(sources), *own))
        self.resolution = tuple(resolution)
        self.labels = as_labels(labels, len(sources), f"the classes of {name}")
        self.scaling = scaling = self._fit(norm) if scaling is None else self._given(scaling)
        self.channels = channels or (self._known_channels if scaling is EIGHT_BIT else len(scaling.shift))
        if self.channels != self._known_channels:
            raise ValueError(
                f"image_channels must be the number of channels of {name}, {self._known_channels}, or left out; got "
                f"{channels or self.channels}"
            )

    def _check_order(self, shape: tuple) -> None:
        """Note that an array, or the first of several arrays, looks as if its channels were last."""
        if len(shape) == 4 and not self.channels_last and shape[3] < min(shape[1], shape[2]) and shape[3] <= 16:
            self.notes.append(
                f"warning: the shape {shape} of {self.name} is taken for {shape[1]} channels of {shape[2]} x "
                f"{shape[3]} pixels; if its channels are last: --channels_last"
            )

    def _fit(self, norm: str | None) -> Scaling:
        key = self._scan_key()
        if key is None or key not in self.scans:
            found = measure(self._parts(), self.name, self.value_range)
            if key is not None:
                self.scans[key] = found.to_json()
        else:
            found = Measured.from_json(self.scans[key])
        scaling, notes = choose_scaling(found, norm, self.value_range, self.name)
        self.notes += notes
        self._known_channels, self.dtype = len(found.low), found.dtype
        return scaling

    def _scan_key(self) -> str | None:
        """Return a digest of the files and of how they are read; None for other data and for little of it."""
        file = mapped_file(self.sources) if self.is_array else None
        files = [file] if file else self.sources if isinstance(self.sources, list) else []
        form = (self.sources.shape, self.sources.strides) if self.is_array and file else None
        return scan_key(files, form, self.channels_last, self.skip_bad, self.value_range)

    def _given(self, scaling: Scaling) -> Scaling:
        for first in map(self._tried, range(len(self))):
            if first is not None:
                self._known_channels, self.dtype = len(first), first.dtype
                return scaling
        raise ValueError(f"none of the images of {self.name} can be read")

    def _parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the values of each file, or of some rows of the array, with channels as the first axis.

        Raises:
            ValueError: a value is not finite, or a file cannot be read (unless such images are to be skipped).
        """
        if self.is_array:
            size = int(np.prod(self.sources.shape[1:]))
            rows = max(1, PART // size)
            for first in range(0, len(self), rows):
                part = np.asarray(self.sources[first : first + rows])
                good = np.isfinite(part).reshape(len(part), -1).all(1)
                if not good.all():
                    self._tried(first + int(np.argmin(good)))  # raises, with the place, unless it is to be skipped
                    part = part[good]
                if not len(part):
                    continue
                part = part.astype(np.uint8) if part.dtype == bool else part
                last = self.channels_last and part.ndim == 4
                part = part[:, None] if part.ndim == 3 else part
                yield f"row {first}", np.moveaxis(part, -1 if last else 1, 0)
            return

        bar = tqdm(total=len(self), desc="reading the range of the images", leave=False, delay=2)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(self), 4 * THREADS):  # all at once would fill the memory
                some = range(first, min(first + 4 * THREADS, len(self)))
                for index, values in zip(some, pool.map(self._tried, some)):
                    if values is not None:
                        yield str(self.sources[index]), values
                bar.update(len(some))

    def _tried(self, index: int) -> np.ndarray | None:
        """Read image `index` as it is, (C, H, W), or return None where it cannot be read and is to be skipped."""
        try:
            return self._read(index)
        except BadImageError as error:
            if self.skip_bad:
                return None
            raise ValueError(f"{error}. To leave such images out: --on_bad_image skip") from error

    def _read(self, index: int) -> np.ndarray:
        """Read image `index` as it is, (C, H, W)."""
        name = f"in row {index} of {self.name}"
        return read_values(self.sources[index], name, self.channels_last, self.missing)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def augments(self) -> bool:
        """True if loading an image draws from the generator that is given."""
        return self.random_flip or not self.center_crop

    def __getitem__(self, index: int) -> Tensor:
        """Return image `index` without augmentation, float32 (C, H, W) in model units."""
        return self.load(index)

    def load(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """Load image `index`, augmented by `rng` if given, as float32 (C, H, W) in model units.

        Raises:
            BadImageError: the image cannot be read, or has other channels.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        index = int(index) % len(self)
        values = self._read(index)
        if len(values) != self.channels:
            raise BadImageError(f"{self.sources[index]} must have {self.channels} channels, got {len(values)}")
        x = resized(to_model(values, self.scaling, self.value_range), self.resolution)
        top, left = (
            spare // 2 if rng is None or self.center_crop else int(rng.integers(0, spare + 1))
            for spare in (x.shape[1] - self.resolution[0], x.shape[2] - self.resolution[1])
        )
        x = x[:, top : top + self.resolution[0], left : left + self.resolution[1]]
        if rng is not None and self.mirrors(rng):
            x = x.flip(2)
        return x.contiguous()

    def mirrors(self, rng: np.random.Generator) -> bool:
        """Return True if an image is to be mirrored, as `rng` draws it."""
        return self.random_flip and bool(rng.random() < 0.5)
