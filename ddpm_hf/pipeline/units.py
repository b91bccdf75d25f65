"""Units of the data: data = x * scale + shift, channel by channel, for the model's x."""

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.pipeline.rules import is_whole


def checked_units(channels: int, shift, scale, name: str = "data") -> dict:
    """Return shift and scale of the data as they are saved: lists with one number per channel, or None for both.

    Beside a scale, the shift is 0 if it is None, and beside a shift, the scale is 1.

    Args:
        channels: the number of channels.
        shift, scale: one number per channel each, or None.
        name: the beginning of the names of both: "data", or "condition" for those of a paired condition.

    Raises:
        ValueError: there is another number of them, or one is not finite or a negative scale.
    """
    if shift is None and scale is None:
        return {f"{name}_shift": None, f"{name}_scale": None}
    shift = [0.0] * channels if shift is None else shift
    scale = [1.0] * channels if scale is None else scale
    given = {f"{name}_shift": shift, f"{name}_scale": scale}
    for each, values in given.items():
        if len(values) != channels or not np.isfinite(values).all():
            raise ValueError(f"{each} must be one finite number per channel ({channels}), got {values}")
    if not all(each >= 0 for each in scale):
        raise ValueError(f"{name}_scale must be at least 0 (0: a channel that never changes), got {scale}")
    return {each: [float(value) for value in values] for each, values in given.items()}


def checked_levels(channels: int, levels, scale) -> list[int] | None:
    """Return the numbers of levels of the data as they are saved: a list with one number per channel, or None.

    Args:
        channels: the number of channels.
        levels: one whole number per channel, or None.
        scale: the scale of the data, or None.

    Raises:
        ValueError: there is another number of them, one is below 2, or the data has no scale.
    """
    if levels is None:
        return None
    if len(levels) != channels or not all(is_whole(number) and number >= 2 for number in levels):
        raise ValueError(f"data_levels must be one whole number of at least 2 per channel ({channels}), got {levels}")
    if scale is None:
        raise ValueError(f"data_levels must be None without data_scale (pictures have 8-bit levels), got {levels}")
    return [int(number) for number in levels]


def affine(pipeline, channels: int, ndim: int, name: str = "data") -> tuple:
    """Return scale and shift of data = x * scale + shift, each (1, C, 1, ...) with `ndim` axes, in float64."""
    form = (1, -1, *(1,) * (ndim - 2))
    scale, shift = pipeline.config.get(f"{name}_scale"), pipeline.config.get(f"{name}_shift")
    scale, shift = scale or [1.0] * channels, shift or [0.0] * channels
    return tuple(torch.tensor(v, dtype=torch.float64).view(form) for v in (scale, shift))


def from_units(pipeline, data: Tensor, name: str = "data") -> Tensor:
    """Convert (B, C, ...) from the units of the data, or of the "condition", to the model's, float64 on the CPU."""
    scale, shift = affine(pipeline, data.shape[1], data.ndim, name)
    return torch.where(scale > 0, data.cpu().double() - shift, 0.0) / torch.where(scale > 0, scale, 1.0)


def to_units(pipeline, x: Tensor) -> Tensor:
    """Convert (B, C, ...) from the model's units to the data's, on the CPU; float64 where float32 is too coarse."""
    scale, shift = affine(pipeline, x.shape[1], x.ndim)
    constant = (scale == 0) & (shift.float() == shift)
    wide_enough = (scale > 1e-4 * shift.abs()) & (scale > 1e-37)
    narrow = (constant | wide_enough).all() and (scale + shift.abs()).max() < 1e37
    exact = x.cpu().double() * scale + shift
    return exact.to(torch.promote_types(x.dtype, torch.float32)) if narrow else exact
