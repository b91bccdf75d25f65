"""Images in units of their own: any number of channels and any range, from arrays, TIFF, .npy and other files.

All values are looked at once before training, in parts, for the range and the scaling. An item is then read when it is
needed, scaled in float64, and resized and cropped in float32.
"""

import contextlib
import functools
import zipfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ddpm_hf.data.images import LONGEST, BadImageError, ImageDataset, printable
from ddpm_hf.data.labels import as_labels
from ddpm_hf.data.scaling import EIGHT_BIT, Scaling
from ddpm_hf.data.sequences import mapped_file, scan_key
from ddpm_hf.options import IMAGE_NORMS

PART = 1 << 22  # numbers of an array that are looked at together, 32 MiB of float64
THREADS = 8  # the number of threads that read files before training
TIFF = (".tif", ".tiff")
LOOKED_AT = 16  # the images of a folder whose range is looked at, where they are 8-bit pictures for the model
LEAST_SHARE = 0.25  # of a range that data should fill, or it gets a warning
SHOWN = 8  # channels whose ranges are listed, at most


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
            return _read_other(path)
        height, width = series[0].axes.index("Y"), series[0].axes.index("X")
        missing = page.nodata if "GDAL_NODATA" in page.tags else None
    parts = [np.moveaxis(part, (height, width), (-2, -1)) for part in parts]
    values = np.concatenate([part.reshape(-1, *part.shape[-2:]) for part in parts])
    if missing is not None and (count := int((values == missing).sum())):
        raise ValueError(f"{count:,} values are {missing:g}, which the file declares to be missing (GDAL_NODATA)")
    return values


def _tiff_series(file: Any) -> list:
    """Return the parts of a TIFF file that have the shape and type of the first one, each with one or more pages."""
    first = file.series[0]
    form = (first.shape, first.dtype, first.axes)
    return [each for each in file.series if (each.shape, each.dtype, each.axes) == form]


def _read_other(path: str) -> np.ndarray:
    with Image.open(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        if file.mode == "P":
            file = file.convert("RGBA" if file.has_transparency_data else "RGB")
        elif file.mode not in ("L", "LA", "RGB", "RGBA", "F", "1") and not file.mode.startswith("I"):
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
# The range of the data


class Measured(NamedTuple):
    """The ranges and moments of a data set, each (C,) float64, and what tells its form.

    Attributes:
        dtypes: the names of all types of its parts, sorted.
        outside: the share of the values that lie outside a given range.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    dtypes: tuple[str, ...]
    outside: float = 0.0

    @property
    def dtype(self) -> np.dtype:
        """Return the smallest type to which all types of the parts can be converted."""
        return functools.reduce(np.promote_types, self.dtypes, np.dtype(self.dtypes[0]))

    def to_json(self) -> list:
        """Return the form in which `sequences.write_scans` keeps it."""
        return [*(values.tolist() for values in self[:4]), [self.dtypes, self.outside]]

    @classmethod
    def from_json(cls, kept: list) -> "Measured":
        """Return what `to_json` was called on."""
        *values, (dtypes, outside) = kept
        return cls(*map(np.array, values), tuple(dtypes), outside)


def measure(parts: Iterator[tuple[str, np.ndarray]], name: str, value_range: Sequence[float] | None = None) -> Measured:
    """Measure a data set in one pass.

    The moments of parts are combined by the pairwise formula of Chan, Golub and LeVeque (1983).

    Args:
        parts: (name, values) of parts of the data; the channels are the first axis of the values.
        name: name of the data in messages.
        value_range: lowest and highest value, for the share of values outside.

    Raises:
        ValueError: there is no part, or one of another number of channels.
    """
    low = high = mean = squares = first = None
    count, outside, total, dtypes = 0, 0, 0, set()
    for own, values in parts:
        values = values.reshape(len(values), -1)
        if low is None:
            first, channels = own, len(values)
            low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
            mean, squares = np.zeros(channels), np.zeros(channels)
        if len(values) != len(low):
            raise ValueError(f"all images must have the same channels: {own} has {len(values)}, {first} has {len(low)}")
        dtypes.add(values.dtype.name)
        values = values.astype(np.float64)
        low, high = np.minimum(low, values.min(1)), np.maximum(high, values.max(1))
        n, part_mean = values.shape[1], values.mean(1)
        delta = part_mean - mean
        squares += ((values - part_mean[:, None]) ** 2).sum(1) + delta**2 * count * n / (count + n)
        mean, count = mean + delta * n / (count + n), count + n
        if value_range is not None:
            outside += int(((values < value_range[0]) | (values > value_range[1])).sum())
        total += values.size
    if low is None:
        raise ValueError(f"none of the images of {name} can be read")
    return Measured(low, high, mean, np.sqrt(squares / count), tuple(sorted(dtypes)), outside / total)


# This function is longer than 60 lines because each way of scaling tells its own range and faults.
def choose_scaling(
    found: Measured, norm: str | None, value_range: Sequence[float] | None, name: str
) -> tuple[Scaling, list[str]]:
    """Return the scaling of a data set, and lines that tell its range and what may be wrong with it.

    Args:
        norm: "bits" maps the full range of the integer type to [-1, 1], "minmax" the range of each channel; "meanstd"
            maps each channel to mean 0 and standard deviation 1. None: "bits" for integers, "minmax" for floats.
        value_range: lowest and highest value, which become -1 and 1; values outside are clipped.
        name: name of the data in messages.

    Raises:
        ValueError: floats with "bits", a constant channel, or a range in which no value lies.
    """
    channels, (least, most) = len(found.low), (found.low.min(), found.high.max())
    notes = [f"values of {name}: {found.dtype}, {channels} channel{'s'[: channels > 1]}, {least:g} to {most:g}"]
    if len(found.dtypes) > 1:
        notes.append(
            f"warning: images of {name} have different types, {' and '.join(found.dtypes)}: all of them are "
            "scaled alike, as the numbers that they are"
        )
    integer = found.dtype.kind in "iu"
    if value_range is not None:
        (lowest, highest), norm = map(float, value_range), f"image_range {value_range[0]:g} {value_range[1]:g}"
        if found.outside == 1:
            raise ValueError(
                f"image_range must hold values of {name}, which lie in {least:g} to {most:g}; got {lowest:g} to "
                f"{highest:g}"
            )
        scaling = Scaling(((lowest + highest) / 2,) * channels, ((highest - lowest) / 2,) * channels)
        if found.outside:
            notes.append(
                f"warning: {found.outside:.2%} of the values of {name} lie outside image_range {lowest:g} "
                f"{highest:g} (they go from {least:g} to {most:g}): they are clipped to it"
            )
    elif norm == "bits" or norm is None and integer:
        if not integer:
            raise ValueError(
                f"image_norm bits is for whole numbers, and {name} has {found.dtype}: choose minmax, meanstd or "
                "image_range"
            )
        norm, limits = "bits", np.iinfo(found.dtype)
        lowest, highest = float(limits.min), float(limits.max)
        scaling = Scaling(((lowest + highest) / 2,) * channels, ((highest - lowest) / 2,) * channels)
        if found.dtype == np.uint8:  # pictures, whose samples are in [0, 1]
            scaling = EIGHT_BIT
    else:
        norm = norm or "minmax"
        constant = np.flatnonzero(found.low == found.high)
        if len(constant):
            raise ValueError(
                f"image_norm {norm} needs channels that vary: channel {constant[0]} of {name} has the value "
                f"{found.low[constant[0]]:g} everywhere. Leave it out, or give image_range"
            )
        if norm == "minmax":
            scaling = Scaling.minmax(found.low, found.high)
        else:
            scaling = Scaling.meanstd(found.low, found.high, found.mean, found.deviation)
        each = [f"{channel}: {a:g} to {b:g}" for channel, (a, b) in enumerate(zip(found.low, found.high))]
        if channels > 1:
            more = ", ..." if channels > SHOWN else ""
            notes.append(f"ranges of the channels: {', '.join(each[:SHOWN])}{more}")
        notes.append(f"scaling: image_norm {norm}, channel by channel")
        return scaling, notes
    notes.append(f"scaling: {norm}, {lowest:g} to {highest:g} become -1 to 1")
    warning = narrow_warning(least, most, lowest, highest, name)
    return scaling, [*notes, *([warning] if warning else [])]


def narrow_warning(least: float, most: float, lowest: float, highest: float, name: str) -> str | None:
    """Return a warning if data from `least` to `most` fills little of the range that becomes [-1, 1], or None."""
    share = (most - least) / (highest - lowest)
    if share >= LEAST_SHARE:
        return None
    low, high = least, most
    if least >= 0 and float(most).is_integer():  # the full range of 9, 10, 12 or 14 bits
        low, high = 0, 2 ** max(1, int(most).bit_length()) - 1
    way_out = f". To scale the range that the data has: --image_range {low:.10g} {high:.10g}" if low < high else ""
    return (
        f"warning: the values of {name} go from {least:g} to {most:g}, which is {share:.1%} of the range {lowest:g} to "
        f"{highest:g}: images will be nearly flat for the model{way_out}"
    )


def dark_warning(images: ImageDataset) -> str | None:
    """Return a warning if 16-bit pictures of a folder, which become 8-bit ones, fill little of their range; or None.

    The first picture tells if they are of 16 bits; then up to `LOOKED_AT` pictures are looked at.
    """

    def values(index: int) -> np.ndarray | None:
        try:
            with Image.open(images.sources[index]) as file:
                return np.asarray(file) if file.mode.startswith("I") else None
        except Exception:  # a picture that cannot be read is named when it is needed
            return None

    first = values(0) if len(images) else None
    if first is None:
        return None
    others = np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)[1:]
    looked_at = [first, *(found for found in map(values, others) if found is not None)]
    least, most = min(found.min() for found in looked_at), max(found.max() for found in looked_at)
    name = f"the {len(looked_at)} images that were looked at"
    return narrow_warning(float(least), float(most), 0.0, 65535.0, name)


# ---------------------------------------------------------------------------------------------
# Many images


class ScientificImages(Dataset):
    """Images with any number of channels, in model units that follow from the range of the data.

    Args:
        sources: an array (N, C, H, W), or (N, H, W) for one channel, which may be memory-mapped; or the paths of files
            that `read_values` reads.
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
        for index in range(len(self)):
            with contextlib.suppress(*[BadImageError] if self.skip_bad else []):
                first = self._read(index)
                self._known_channels, self.dtype = len(first), first.dtype
                return scaling
        raise ValueError(f"none of the images of {self.name} can be read")

    def _parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the values of each file, or of some rows of the array, with channels as the first axis.

        Raises:
            ValueError: a value is not finite, or a file cannot be read (unless it is to be skipped).
        """
        if self.is_array:
            size = int(np.prod(self.sources.shape[1:]))
            rows = max(1, PART // size)
            for first in range(0, len(self), rows):
                part = np.asarray(self.sources[first : first + rows])
                bad = ~np.isfinite(part).reshape(len(part), -1).all(1)
                if bad.any():
                    self._read(first + int(np.argmax(bad)))  # raises, with the place
                part = part.astype(np.uint8) if part.dtype == bool else part
                last = self.channels_last and part.ndim == 4
                part = part[:, None] if part.ndim == 3 else part
                yield f"row {first}", np.moveaxis(part, -1 if last else 1, 0)
            return

        def read(index: int) -> np.ndarray | BadImageError:
            try:
                return self._read(index)
            except BadImageError as error:
                return error

        bar = tqdm(total=len(self), desc="reading the range of the images", leave=False, delay=2)
        with bar, ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(self), 4 * THREADS):  # all at once would fill the memory
                some = range(first, min(first + 4 * THREADS, len(self)))
                for index, values in zip(some, pool.map(read, some)):
                    if not isinstance(values, BadImageError):
                        yield str(self.sources[index]), values
                    elif not self.skip_bad:
                        raise ValueError(f"{values}. To leave such images out: --on_bad_image skip") from values
                bar.update(len(some))

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


def check_range(value_range: Sequence[float] | None, norm: str | None = None) -> None:
    """Check the lowest and highest value that become -1 and 1.

    Raises:
        ValueError: they are not two finite numbers, the lower first, or a norm is given too.
    """
    if value_range is None:
        return
    if not (len(value_range) == 2 and np.isfinite(value_range).all() and value_range[0] < value_range[1]):
        raise ValueError(f"image_range must be two finite numbers, the lower first, got {list(value_range)}")
    if norm is not None:
        raise ValueError(f"image_norm and image_range exclude each other, got {norm!r} and {list(value_range)}")


def to_model(values: np.ndarray, scaling: Scaling, value_range: Sequence[float] | None = None) -> Tensor:
    """Scale data (C, ...) to model units, float32, by way of float64; values outside a given range are clipped."""
    if scaling is EIGHT_BIT:
        return EIGHT_BIT.to_model(torch.from_numpy(np.array(values, order="C")))  # a copy: mapped files are read-only
    wide = values.astype(np.float64)
    if value_range is not None:
        wide = wide.clip(*value_range)
    x = scaling.to_model(wide.reshape(len(wide), -1)).astype(np.float32)
    return torch.from_numpy(x.reshape(values.shape))
