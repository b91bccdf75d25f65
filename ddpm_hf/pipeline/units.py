"""Units of the data: data = x * scale + shift, channel by channel, for the model's x."""

import numpy as np
import torch
from torch import Tensor


def checked_units(unet, data_shift, data_scale) -> dict:
    """Return shift and scale of the data as they are saved: a list with one number per channel, or None.

    Raises:
        ValueError: there is another number of them, or one is not finite or a negative scale.
    """
    channels = unet.config.in_channels
    for name, values in (("data_shift", data_shift), ("data_scale", data_scale)):
        if values is not None and (len(values) != channels or not np.isfinite(values).all()):
            raise ValueError(f"{name} must be one finite number per channel ({channels}), got {values}")
    if data_scale is not None and not all(scale >= 0 for scale in data_scale):
        raise ValueError(f"data_scale must be at least 0 (0: a channel that never changes), got {data_scale}")
    given = {"data_shift": data_shift, "data_scale": data_scale}
    return {name: None if values is None else [float(v) for v in values] for name, values in given.items()}


def affine(pipeline, ndim: int) -> tuple:
    """Return scale and shift of data = x * scale + shift, each (1, C, 1, ...) with `ndim` axes, in float64."""
    channels, form = pipeline._channels(), (1, -1, *(1,) * (ndim - 2))
    scale, shift = pipeline.config.get("data_scale"), pipeline.config.get("data_shift")
    scale, shift = scale or [1.0] * channels, shift or [0.0] * channels
    return tuple(torch.tensor(v, dtype=torch.float64).view(form) for v in (scale, shift))


def from_units(pipeline, data: Tensor) -> Tensor:
    """Convert (B, C, ...) from the units of the data to those of the model, float64 on the CPU."""
    scale, shift = affine(pipeline, data.ndim)
    return torch.where(scale > 0, data.cpu().double() - shift, 0.0) / torch.where(scale > 0, scale, 1.0)


def to_units(pipeline, x: Tensor) -> Tensor:
    """Convert (B, C, ...) from the model's units to the data's, on the CPU; float64 where float32 is too coarse."""
    scale, shift = affine(pipeline, x.ndim)
    constant = (scale == 0) & (shift.float() == shift)
    wide_enough = (scale > 1e-4 * shift.abs()) & (scale > 1e-37)
    narrow = (constant | wide_enough).all() and (scale + shift.abs()).max() < 1e37
    exact = x.cpu().double() * scale + shift
    return exact.to(torch.promote_types(x.dtype, torch.float32)) if narrow else exact
