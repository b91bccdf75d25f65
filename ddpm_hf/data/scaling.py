"""Scaling between data units and model units, for images and sequences alike.

Data units are those of the user's files: 8-bit levels of images, or the numbers of a recording. Model units are those
that the U-Net is trained on: about [-1, 1], or mean 0 and standard deviation 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
MOST_LEVELS = 65_536  # float32, in which items are given, tells this many values in [-1, 1] apart with room to spare


@dataclass(frozen=True)
class Scaling:
    """The affine map data = x * scale + shift, channel by channel, where x is in model units.

    Attributes:
        shift, scale: one number for each channel, or one number for all channels. A channel that never changes has the
            scale 0; its x is 0.
        limit: largest |x| of the data: 1 for "minmax" and for images (up to rounding), measured for "meanstd".
    """

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    limit: float = 1.0

    @classmethod
    def minmax(cls, low: np.ndarray, high: np.ndarray) -> "Scaling":
        """Map the range of each channel, `low` to `high` of shape (C,), to [-1, 1]."""
        return cls._fit(low, high, (high + low) / 2, (high - low) / 2)

    @classmethod
    def meanstd(cls, low: np.ndarray, high: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> "Scaling":
        """Map each channel to mean 0 and standard deviation 1; all arguments have the shape (C,)."""
        return cls._fit(low, high, mean, deviation).with_limit(low, high)

    @classmethod
    def _fit(cls, low: np.ndarray, high: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> "Scaling":
        # the mean of equal numbers is off by rounding
        shift = np.where(high > low, centre, low)
        scale = np.where(high > low, np.where(spread > 0, spread, 1.0), 0.0)
        return cls(tuple(shift.tolist()), tuple(scale.tolist()))

    def with_limit(self, low: np.ndarray, high: np.ndarray) -> "Scaling":
        """Return the same map with the limit of data whose channels lie between `low` and `high`, of shape (C,)."""
        x = [self.to_model(values[:, None]) for values in (low, high)]
        return type(self)(self.shift, self.scale, float(np.abs(x).max()) or 1.0)

    def to_model(self, data: Array) -> Array:
        """Scale data (..., C, samples) to model units, float64."""
        library, shift, scale = self._columns(data)
        return library.where(scale > 0, data - shift, 0.0) / library.where(scale > 0, scale, 1.0)

    def to_data(self, x: Array) -> Array:
        """Scale x (..., C, samples) in model units back to data units, float64."""
        _, shift, scale = self._columns(x)
        return x * scale + shift

    def to_levels(self, images: np.ndarray) -> np.ndarray:
        """Return images (B, C, H, W) in data units as levels from 0 to 1, where -limit and limit in model units lie."""
        flat = images.reshape(*images.shape[:2], -1)
        return (self.to_model(flat) / self.limit / 2 + 0.5).clip(0, 1).reshape(images.shape)

    def _columns(self, values: Array) -> tuple[Any, Array, Array]:
        """Return the array library of `values`, and shift and scale as its float64 arrays (C, 1)."""
        library = torch if isinstance(values, Tensor) else np
        shift, scale = (library.asarray(v, dtype=library.float64)[:, None] for v in (self.shift, self.scale))
        return library, shift, scale

    def constants(self) -> dict[int, float]:
        """Return the channels that never change, with their values."""
        return {channel: self.shift[channel] for channel, scale in enumerate(self.scale) if scale == 0}

    def levels(self, dtype: np.dtype) -> tuple[int, ...] | None:
        """Return for each channel how many whole numbers its range has, whose ends are -1 and 1 in model units.

        It is None for data of another type than whole numbers, for a range that does not end in whole numbers, as that
        of "meanstd", and for more than `MOST_LEVELS`.
        """
        _, shift, scale = self._columns(np.empty(0))
        whole = (shift - scale) % 1 == 0, (shift + scale) % 1 == 0, scale > 0, 2 * scale < MOST_LEVELS
        if dtype.kind not in "iu" or self.limit > 1 or not np.all(whole):
            return None
        return tuple((2 * scale.ravel() + 1).astype(int).tolist())

    def to_json(self) -> dict[str, list[float]]:
        """Return shift and scale under the names that saved pipelines of sequences have for them.

        `MODEL_UNITS` and `EIGHT_BIT` have an empty form: such data has no units of its own, and samples of pictures
        are levels from 0 to 1.
        """
        return {} if not has_own_units(self) else {"data_shift": list(self.shift), "data_scale": list(self.scale)}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[float]]) -> "Scaling":
        """Build the scaling that `to_json` or the configuration of a saved pipeline describes; its limit is 1."""
        return cls(tuple(values["data_shift"]), tuple(values["data_scale"]))


class EightBitScaling(Scaling):
    """The map of 8-bit levels, 0 to 255, to [-1, 1]."""

    def __init__(self):
        super().__init__(shift=(127.5,), scale=(127.5,))

    def to_model(self, data: Tensor) -> Tensor:
        """Scale levels of any shape, usually uint8, to float32 in [-1, 1]."""
        # (data - 127.5) / 127.5 differs in the last bit, and the runs that exist have seen this form
        return data.float() / 127.5 - 1


EIGHT_BIT = EightBitScaling()
MODEL_UNITS = Scaling()  # for data that already is in model units


def has_own_units(scaling: Scaling) -> bool:
    """Return True if samples have the units of the data, and not those of the model or levels of pictures."""
    return scaling is not MODEL_UNITS and scaling is not EIGHT_BIT


def scaling_of(dataset: Any) -> Scaling:
    """Return the scaling of a dataset; one without the attribute `scaling` is in model units already."""
    return getattr(dataset, "scaling", MODEL_UNITS)


def levels_of(data) -> tuple[int, ...] | None:
    """Return the number of levels of a dataset of images, one for each channel or one for all; None for a density.

    Images without units of their own have 8-bit levels. Those with units have levels if they are whole numbers in a
    range that ends in whole numbers (`Scaling.levels`).
    """
    scaling = scaling_of(data)
    if not has_own_units(scaling):
        return (256,)
    dtype = getattr(data, "dtype", None)
    return None if dtype is None else scaling.levels(dtype)
