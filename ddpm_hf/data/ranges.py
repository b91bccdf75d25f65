"""The range of data in units of its own, and the scaling that follows from it.

All values are looked at once before training, in parts.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.scaling import EIGHT_BIT, Scaling

LOOKED_AT = 16  # the images of a folder whose range is looked at, where they are 8-bit pictures for the model
LEAST_SHARE = 0.25  # of a range that data should fill, or it gets a warning
SHOWN = 8  # channels whose ranges are listed, at most


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
