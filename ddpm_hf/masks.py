"""Masks of the known part of an item, for models that are trained to complete what is partly known.

Such a model is told the known values and the mask, as CSDI does for series (Tashiro et al., arXiv:2107.03502, section
4). The masks are drawn by counters on the device, as the noise is, so a resumed run draws the same ones.
"""

import math

import torch
from torch import Tensor

from ddpm_hf.choices import MASK_STRATEGIES
from ddpm_hf.randomness import happens, random_words, uniform_integers

WHOLLY_UNKNOWN = 0.1  # share of items of which nothing is known, so that the model samples without a condition too
_PARAMETERS = 8  # random words of a sample before those of its positions


def check_strategy(strategy: str, ndim: int) -> None:
    """Check that masks can be drawn by a strategy for items (C, *spatial) with `ndim` axes.

    Raises:
        ValueError: the strategy is unknown, or is "forecast" for images.
    """
    if strategy not in MASK_STRATEGIES:
        raise ValueError(f"mask_strategy must be one of {', '.join(MASK_STRATEGIES)}, got {strategy!r}")
    if strategy == "forecast" and ndim != 2:
        raise ValueError("mask_strategy must be random, blocks or mixed for images, which have no order in time; got "
                         "'forecast'")  # fmt: skip


def draw_known(strategy: str, shape: tuple[int, ...], numbers: Tensor, key: int | Tensor = 0) -> Tensor:
    """Draw which part of each sample is known.

    With a probability of `WHOLLY_UNKNOWN` it is nothing. Otherwise, by strategy:

    - "random": a share is drawn uniformly between 0 and 1, and each position is known with this probability. All
      channels of a pixel are known together; the channels of a sequence are drawn one by one.
    - "blocks": everything but a box (a rectangle, or a gap in a sequence), in all channels. Each of its sides is drawn
      uniformly from an eighth to three quarters of the item's side, and its place uniformly.
    - "forecast": the beginning of a sequence, in all channels. The length of the unknown end is drawn uniformly from an
      eighth to three quarters of the sequence.
    - "mixed": one of these, each with the same probability (for images without "forecast").

    What is drawn for a sample follows from its number and the key alone, as in `ddpm_hf.losses.training_draws`.

    Args:
        strategy: one of `MASK_STRATEGIES`.
        shape: (C, *spatial), the shape of an item.
        numbers: (B,) int64, the numbers of the samples; the masks are drawn on their device.
        key: an int64 number of its own, for instance of `Stream.MASKS`.

    Returns:
        (B, C, *spatial) bool, True where the value is known.

    Raises:
        ValueError: as in `check_strategy`.
    """
    check_strategy(strategy, len(shape))
    channels, *spatial = shape
    is_sequence = len(spatial) == 1
    drawn = shape if is_sequence else (1, *spatial)
    scattered = strategy in ("random", "mixed")
    words = random_words(key, numbers, _PARAMETERS + (math.prod(drawn) if scattered else 0))
    masks = []
    if scattered:
        levels = uniform_integers(words[:, _PARAMETERS:], 2**31).reshape(-1, *drawn)
        masks.append(levels < uniform_integers(words[:, 2], 2**31).reshape(-1, *(1,) * len(drawn)))
    if strategy in ("blocks", "mixed"):
        masks.append(~_box(spatial, words[:, 3:7]))
    if is_sequence and strategy in ("forecast", "mixed"):
        length = spatial[0]
        known = length - _side(length, words[:, 7])
        masks.append(torch.arange(length, device=numbers.device) < known[:, None, None])
    one_a_sample = (-1, *(1,) * len(shape))
    chosen = uniform_integers(words[:, 1], len(masks)).reshape(one_a_sample)
    known = masks[0]
    for place, mask in enumerate(masks[1:], start=1):
        known = torch.where(chosen == place, mask, known)
    some = ~happens(words[:, 0], WHOLLY_UNKNOWN).reshape(one_a_sample)
    return (known & some).expand(len(numbers), *shape)


def _side(length: int, words: Tensor) -> Tensor:
    """Return whole numbers (B,), uniform from an eighth to three quarters of `length` and at least 1."""
    low = -(-length // 8)
    high = max(low, 3 * length // 4)
    return low + uniform_integers(words, high - low + 1)


def _box(spatial: list[int], words: Tensor) -> Tensor:
    """Return (B, 1, *spatial) bool, True inside of a box; `words` (B, 2 * axes or more) draw its sides and place."""
    inside = None
    for axis, length in enumerate(spatial):
        side = _side(length, words[:, 2 * axis])
        start = uniform_integers(words[:, 2 * axis + 1], length - side + 1)
        place = torch.arange(length, device=words.device)
        along = (place >= start[:, None]) & (place < (start + side)[:, None])
        along = along.reshape(len(words), 1, *(length if other == axis else 1 for other in range(len(spatial))))
        inside = along if inside is None else inside & along
    return inside


def condition_of(values: Tensor, known: Tensor) -> Tensor:
    """Return what a model is told of the known part: (B, 2 * C, *spatial), the known values and the mask.

    Args:
        values: (B, C, *spatial), in model units.
        known: shaped as `values`, True where the value is known.
    """
    return torch.cat((values.masked_fill(~known, 0.0), known.to(values.dtype)), dim=1)
