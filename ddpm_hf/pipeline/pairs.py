"""Paired conditions: an image or a sequence beside each sample, such as the small image that is to be enlarged."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_hf.pipeline.outputs import IMAGE_MODES
from ddpm_hf.pipeline.units import checked_units, from_units
from ddpm_hf.pipeline.windows import Windows

CONDITIONS = ("known", "paired")


def enlarged(condition: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a condition in the size of its samples: each value is repeated along every axis (nearest neighbour).

    Args:
        condition: (B, C', *own), where each side of `own` divides that of `size`.
        size: the size of the samples, without channels.
    """
    for axis, (side, own) in enumerate(zip(size, condition.shape[2:]), start=2):
        condition = condition.repeat_interleave(side // own, dim=axis) if side != own else condition
    return condition


def condition_settings(unet, condition: str | None, size, shift, scale) -> dict:
    """Return the arguments of a constructor that tell the model's condition as they are saved; {} if there is none.

    Raises:
        ValueError: `condition` is unknown, the model does not take it, or the others do not fit it.
    """
    if condition not in (None, *CONDITIONS):
        raise ValueError(f"condition must be 'known', 'paired' or None, got {condition!r}")
    given = {"condition_size": size, "condition_shift": shift, "condition_scale": scale}
    channels = getattr(unet.config, "condition_channels", None)
    if condition == "known" and channels != 2 * unet.config.in_channels:
        raise ValueError(
            f"condition='known' needs a model with condition_channels={2 * unet.config.in_channels}, got {channels!r}"
        )
    if condition != "paired":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} must be None without condition='paired', got {value!r}")
        return {} if condition is None else {"condition": condition}
    if not channels:
        raise ValueError(f"condition='paired' needs a model with condition_channels, got {channels!r}")
    own = unet.config.sample_size
    whole = [own] * unet.ndim if isinstance(own, int) else list(own or ())
    size = whole if size is None else list(size)
    fits = len(size) == len(whole) > 0 and all(isinstance(side, int) and side >= 1 for side in size)
    if not fits or [side * (whole[0] // size[0]) for side in size] != whole:
        raise ValueError(
            f"condition_size must be the model's sample_size, {whole}, or that divided by one whole number; got {size}"
        )
    units = checked_units(channels, shift, scale, "condition")
    return {"condition": condition, "condition_size": size, **units}


def as_torch_takes_it(value: np.ndarray) -> np.ndarray:
    """Return an array in the byte order of this machine, without negative strides and wide unsigned numbers."""
    if value.dtype.kind == "u" and value.itemsize > 1:  # which torch cannot compute with
        return value.astype(np.float64)
    return np.ascontiguousarray(value, value.dtype.newbyteorder("="))


def eight_bit(image: Image.Image) -> Image.Image:
    """Return a PIL image of 16 bits, or of floats from 0 to 1, as one of 8-bit levels, and others as they are.

    Pillow's own conversion would clip the values of 16 bits to 255.

    Raises:
        ValueError: values of an image of more than 8 bits lie outside its range.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    limit = 65535.0 if image.mode.startswith("I") else 1.0
    if not (values.min() >= 0 and values.max() <= limit):  # also NaN
        raise ValueError(
            f"values of an image of mode {image.mode} must lie in [0, {limit:g}]; got {values.min():g} to "
            f"{values.max():g}"
        )
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):  # in parts: float64 takes eight times the memory of the levels
        rows = slice(start, start + 64)
        levels[rows] = (values[rows].astype(np.float64) * (255 / limit)).round()
    return Image.fromarray(levels)


def image_tensor(images, name: str, channels: int) -> tuple[Tensor, bool]:
    """Return PIL images, an array (B, H, W, C) or a tensor (B, C, H, W) as a tensor, and True for PIL images.

    PIL images become levels from 0 to 1, of float64.

    Raises:
        ValueError: it is something else, or has other channels.
    """
    if isinstance(images, Image.Image):
        images = [images]
    is_pil = isinstance(images, (list, tuple)) and bool(images) and isinstance(images[0], Image.Image)
    if is_pil:
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1:
            raise ValueError(f"{name} must have images of one size, got {sizes}")
        mode = IMAGE_MODES.get(channels)
        images = [eight_bit(image) for image in images]
        arrays = [np.asarray(image.convert(mode) if mode else image) / 255.0 for image in images]
        images = np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(as_torch_takes_it(images)).movedim(-1, 1) if images.ndim == 4 else images
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels:
        got = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"{name} must be PIL images, an array (B, H, W, C) or a tensor (B, C, H, W) with "
                         f"{channels} channels; got {got}")  # fmt: skip
    return images, is_pil


def sequence_tensor(sequences, name: str, channels: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Return an array, a tensor or lists (B, C, length) as a tensor on the CPU; `dtype` None keeps the type.

    Raises:
        ValueError: it is something else, or has other channels.
    """
    try:
        array = as_torch_takes_it(sequences) if isinstance(sequences, np.ndarray) else sequences
        x = torch.as_tensor(array, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array or tensor, got {type(sequences).__name__}") from error
    if x.ndim != 3 or x.shape[1] != channels:
        raise ValueError(f"{name} must have the shape (B, {channels}, length), got {tuple(x.shape)}")
    return x


def encode_condition(
    pipeline, condition, items: int, samples: int = 1, size: tuple[int, ...] | None = None,
    windows: Windows | None = None,
) -> Tensor | None:  # fmt: skip
    """Return the condition of a call as its model takes it, (items * samples, C', *size of the samples).

    Args:
        pipeline: the pipeline that is called.
        condition: in its own units: one for all samples, one for each item, or one for each sample; None where the
            model takes none.
        items: the number of items.
        samples: the number of samples of each item, which lie together.
        size: the size of the samples, without channels; None: as trained. The condition has the share of it that a
            condition had in training.
        windows: those in which the model predicts; None: it predicts for whole samples.

    Raises:
        ValueError: it does not fit the pipeline, the number of samples or the windows, or is missing.
    """
    c = pipeline.config
    if c.get("condition") != "paired":
        if condition is not None:
            raise ValueError(
                "condition needs a model that was trained with paired conditions (condition_column), and this one was "
                "not; got one"
            )
        return None
    channels, own, whole = pipeline.unet.config.condition_channels, size_of_conditions(pipeline, size, windows), size
    if condition is None:
        raise ValueError(f"condition must be given to this model, {channels} channels of the size {own}; got None")
    has_units, is_pil = c.condition_scale is not None, False
    if len(own) == 1:
        x = sequence_tensor(condition, "condition", channels)
    else:
        x, is_pil = image_tensor(condition, "condition", channels)
        x = x.cpu().double()
    numbers = sorted({items, items * samples})
    if tuple(x.shape[2:]) != own or len(x) not in (1, *numbers):
        raise ValueError(
            f"condition must be of the size {own}, one for all samples or one for each of "
            f"{' or '.join(map(str, numbers))}; got {len(x)} of the size {tuple(x.shape[2:])}"
        )
    if not x.isfinite().all():
        raise ValueError("condition must be finite, got NaN or infinity")
    if is_pil or (len(own) == 2 and not has_units):
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"condition must lie in [0, 1], got {x.min():.4g} to {x.max():.4g}")
        x = x * 2 - 1
    elif has_units:
        x = from_units(pipeline, x, "condition")
    if len(x) == items and samples > 1:
        x = x.repeat_interleave(samples, dim=0)
    x = x.to(pipeline._execution_device, pipeline.unet.dtype).expand(items * samples, -1, *own)
    return enlarged(x, whole or pipeline._size())


def size_of_conditions(pipeline, size: tuple[int, ...] | None, windows: Windows | None) -> tuple[int, ...]:
    """Return the size of the conditions of samples, without channels; the arguments are those of `encode_condition`.

    Raises:
        ValueError: a value of the condition would belong to a part of a pixel or window.
    """
    own = tuple(pipeline.config.condition_size)
    if size is None:
        return own
    factor = pipeline._size()[0] // own[0]
    if any(side % factor for side in size):
        raise ValueError(
            f"samples must have a multiple of {factor} as their size, because a value of the condition belongs to "
            f"{factor} along each axis; got {tuple(size)}"
        )
    if windows is not None and any(side.start % factor for place in windows.places for side in place):
        raise ValueError(
            f"overlap must be a multiple of {factor}, so that windows begin where a value of the condition does; got "
            f"windows that begin at {sorted({side.start for place in windows.places for side in place})}"
        )
    return tuple(side // factor for side in size)


def chosen_conditions(condition, items: list[int]):
    """Return the conditions of some items in the form in which they were given; one for all items stays as it is."""
    if number_of_conditions(condition) == 1:
        return condition
    return [condition[i] for i in items] if isinstance(condition, (list, tuple)) else condition[items]


def number_of_conditions(condition) -> int:
    """Return how many conditions a call is given; 1 where that cannot be told."""
    return len(condition) if isinstance(condition, (list, tuple, np.ndarray, Tensor)) else 1


def refuse_paired(pipeline) -> None:
    """Raise ValueError if the model of a pipeline needs a paired condition, for series that grow window by window."""
    if pipeline.config.get("condition") == "paired":
        raise ValueError(
            "stream, extend and method='sequential' need a model without paired conditions, because their last window "
            "goes on beyond the end of the series, where there is no condition. For a series of a known length give "
            "pipe(length=..., condition=...) method 'joint' or 'single'; to go on from a beginning, give "
            "pipe.inpaint(known, condition=...) a sequence that ends in NaN; got a model with paired conditions"
        )
