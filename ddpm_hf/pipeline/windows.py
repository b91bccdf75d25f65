"""Items larger than those of training: overlapping windows that are denoised together.

Each step predicts in every window and averages the predictions where windows overlap (MultiDiffusion, Bar-Tal et al.,
arXiv:2302.08113). A step of a scheduler is linear in the prediction, so this is the paper's average of the windows'
steps, and it works with every scheduler.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_hf.pipeline.rules import check_rules, is_whole

IN_ONE_CALL = 2  # multiples of the trained size up to which one call of the model is the default (docs/long.md)
WINDOW_RULES = (
    (
        lambda c: c.size is not None or (c.method is None and c.overlap is None),
        "method and overlap need {c.names}, the size of the samples; got method={c.method!r}, overlap={c.overlap!r}",
    ),
    (
        lambda c: c.size is None or all(is_whole(n) and n >= 1 for n in c.size),
        "{c.names} must be a whole number of at least 1, got {c.size!r}",
    ),
    (
        lambda c: c.method is None or c.method in c.methods,
        "method must be one of {c.methods}, or None; got {c.method!r}",
    ),
    (
        lambda c: c.size is None or c.method == "single" or c.trained is None
        or all(n >= w for n, w in zip(c.size, c.trained)),
        "{c.names} must be at least the size that the model was trained on, {c.trained}, which windows cannot be cut "
        "smaller than (cut the samples instead); got {c.size}",
    ),
    (
        lambda c: c.trained is not None or c.method in (None, "single"),
        "windows need the model's sample_size, which its configuration does not have; got method={c.method!r}",
    ),
    (
        lambda c: c.overlap is None or c.method != "single",
        "overlap is of windows, and method='single' has none; got {c.overlap!r}",
    ),
    (
        lambda c: c.overlap is None or (c.trained is not None and is_whole(c.overlap)
                                        and 1 <= c.overlap < min(c.trained)),
        "overlap must be a whole number of at least 1 and less than the window, {c.trained}; got {c.overlap!r}",
    ),
)  # fmt: skip


class Windows(NamedTuple):
    """Windows of one size that cover an item: the place of each as slices, and the weight of each value in a window.

    The weights of all windows sum to `total` at each place of the item.
    """

    places: list[tuple[slice, ...]]
    weights: Tensor
    total: Tensor


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Return where windows begin that cover a length, neighbours of which share `overlap` places; the last two more."""
    stride = window - overlap
    return [min(i * stride, length - window) for i in range(1 + max(0, -(-(length - window) // stride)))]


def cover(size: Sequence[int], window: Sequence[int], overlap: Sequence[int]) -> Windows:
    """Return windows that cover an item of a size.

    The weight of a value falls to the edges of its window, within the overlap, so that a window has hardly any weight
    where it begins. Equal weights leave jumps at the seams. For a Gaussian series whose neighbours correlate by 0.95,
    and windows of 16 that share 8, the mean square of a jump is up to 4 times that of the data there, 1.47 times with
    weights that fall linearly, and 1.04 times with their fourth power, which is used here (250 DDIM steps).
    """
    starts = [window_starts(*each) for each in zip(size, window, overlap)]
    weights = torch.ones((), dtype=torch.float64)
    for n, shared in zip(window, overlap):
        place = torch.arange(n, dtype=torch.float64)
        weights = weights[..., None] * (torch.minimum(place + 1, n - place).clamp(max=shared) / shared) ** 4
    places = [tuple(slice(s, s + n) for s, n in zip(corner, window)) for corner in product(*starts)]
    total = weights.new_zeros(tuple(size))
    for place in places:
        total[place] += weights
    return Windows(places, weights, total)


def choose_windows(
    names: str, size: tuple | None, trained: tuple | None, method: str | None, overlap: int | None, methods: tuple
) -> Windows | None:
    """Return the windows of a call, checked; None for one call of the model on the whole item.

    Args:
        names: the name of the argument, or of both, for messages.
        size: that of the samples; None: as trained.
        trained: the size that the model was trained on; None: it is not known.
        method, overlap: as in the call; None: one call of the model up to twice the trained size, and windows that
            share half of each other beyond it.
        methods: those that there are.
    """
    check_rules(WINDOW_RULES, names=names, size=size, trained=trained, method=method, overlap=overlap, methods=methods)
    if size is None or size == trained or trained is None:
        return None
    if method is None and overlap is None:
        method = "joint" if any(n > IN_ONE_CALL * w for n, w in zip(size, trained)) else "single"
    if method == "single":
        return None
    return cover(size, trained, [w // 2 if overlap is None else overlap for w in trained])


def over_windows(call: Callable[..., Tensor], windows: Windows) -> Callable[..., Tensor]:
    """Return a function that predicts for large items, as the weighted average of what `call` predicts in windows.

    Args:
        call: predicts from x_t `(B, C, *spatial)`, the timestep of all samples and optional tensors: of the same size,
            or `(B,)`.
        windows: as `cover` returns them.
    """
    places, number = windows.places, len(windows.places)
    shares = [windows.weights / windows.total[place] for place in places]

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.repeat(number) if x.ndim == 1 else torch.cat([x[(..., *place)] for place in places])

    def predict(sample: Tensor, timestep: Tensor, **optional: Tensor | None) -> Tensor:
        parts = call(cut(sample), timestep, **{name: cut(x) for name, x in optional.items()}).chunk(number)
        averaged = parts[0].new_zeros((*parts[0].shape[:2], *sample.shape[2:]))
        for place, part, share in zip(places, parts, shares):
            averaged[(..., *place)] += part * share.to(part)
        return averaged

    return predict
