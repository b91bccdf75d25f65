"""Rules for the arguments of constructors and calls: each is a condition and the message for where it is broken."""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.pipeline.outputs import IMAGE_MODES

Generators = torch.Generator | list[torch.Generator] | None
ClassLabels = int | str | Sequence[int | str | None] | None


def check_rules(rules, **arguments) -> None:
    """Raise ValueError with the message of the first rule that the arguments break.

    Args:
        rules: pairs of a function, which is given the arguments as attributes and is true where the rule holds, and a
            message, a format string in which `{c.name}` is an argument.
    """
    c = SimpleNamespace(**arguments)
    for holds, message in rules:
        if not holds(c):
            raise ValueError(message.format(c=c))


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


CALL_RULES = (
    (
        lambda c: is_whole(c.batch_size) and c.batch_size >= 1,
        "batch_size must be a whole number of at least 1, got {c.batch_size!r}",
    ),
    (
        lambda c: c.output_type in c.output_types,
        "output_type must be one of {c.allowed_output_types}; got {c.output_type!r}",
    ),
    (
        lambda c: all(g is None or isinstance(g, torch.Generator) for g in c.generators),
        "generator must be a torch.Generator, or one per sample; got {c.generator!r}",
    ),
    (
        lambda c: c.generators == [c.generator] or len(c.generators) == c.batch_size,
        "generator must be one, or one per sample: "
        "batch_size is {c.batch_size}, got {c.number_of_generators} generators",
    ),
    (
        lambda c: c.latents is None or (isinstance(c.latents, Tensor) and tuple(c.latents.shape) == c.shape),
        "latents must be a tensor of the shape {c.shape}, got {c.shape_of_latents}",
    ),
    (
        lambda c: c.latents is None or torch.isfinite(c.latents).all(),
        "latents must be finite, got NaN or infinity",
    ),
    (
        lambda c: c.output_type != "pil" or c.channels in IMAGE_MODES,
        "output_type 'pil' needs 1, 2, 3 or 4 channels, the model has {c.channels}: use 'np' or 'pt'",
    ),
    (
        lambda c: c.callback is None or callable(c.callback),
        "callback_on_step_end must be callable, got {c.callback!r}",
    ),
    (
        lambda c: all(isinstance(name, str) and name in c.allowed_inputs for name in c.callback_names),
        "callback_on_step_end_tensor_inputs must be of {c.allowed_inputs}, got {c.callback_inputs!r}",
    ),
)
GUIDANCE_RULES = (
    (
        lambda c: c.classes or c.class_labels is None,
        "class_labels needs a model with classes (num_class_embeds), and this one has none; got {c.class_labels!r}",
    ),
    (
        lambda c: is_number(c.scale) and c.scale >= 0,
        "guidance_scale must be a finite number of at least 0, got {c.scale!r}",
    ),
    (
        lambda c: c.classes or c.guide is not None or c.scale == 1,
        "guidance_scale needs a model with classes (num_class_embeds), and this one has none, or a guide; got "
        "{c.scale!r}",
    ),
    (
        lambda c: is_number(c.rescale) and 0 <= c.rescale <= 1,
        "guidance_rescale must be a number from 0 to 1, got {c.rescale!r}",
    ),
    (
        lambda c: isinstance(c.interval, (list, tuple)) and len(c.interval) == 2 and all(map(is_number, c.interval)),
        "guidance_interval must be two numbers, got {c.interval!r}",
    ),
    (
        lambda c: 0 <= c.interval[0] <= c.interval[1] <= 1,
        "guidance_interval must ascend and lie in [0, 1], got {c.interval!r}",
    ),
)
INPAINT_RULES = tuple(
    (
        lambda c, name=name: is_whole(getattr(c, name)) and getattr(c, name) >= 1,
        f"{name} must be a whole number of at least 1, got {{c.{name}!r}}",
    )
    for name in ("num_samples", "jump_length", "jump_n_sample")
)
INTERPOLATION_RULES = (
    (
        lambda c: c.weights and all(0 <= w <= 1 for w in c.weights),
        "weights must lie in [0, 1], got {c.weights}",
    ),
    (
        lambda c: 0 < c.strength <= 1,
        "strength must lie in (0, 1], got {c.strength}",
    ),
)


def check_call(
    pipeline, batch_size, generator, output_type, latents=None, callback=None, callback_inputs=("latents",), size=None
) -> None:
    """Raise ValueError for arguments of a call that break one of `CALL_RULES`; `size` None: as trained."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    got, shape = type(latents).__name__, None
    if isinstance(latents, Tensor):
        got = tuple(latents.shape)
    if latents is not None:
        # a model without a size of its own takes any
        free = size is None and pipeline.unet.config.sample_size is None and isinstance(latents, Tensor)
        size = latents.shape[2:] if free else size or pipeline._size()
        shape = (batch_size, pipeline._channels(), *size)
    check_rules(
        CALL_RULES, batch_size=batch_size, output_type=output_type, output_types=pipeline._output_types,
        allowed_output_types=", ".join(pipeline._output_types), generator=generator, generators=generators,
        number_of_generators=len(generators), latents=latents, shape=shape, shape_of_latents=got,
        channels=pipeline._channels(), callback=callback, callback_inputs=callback_inputs,
        callback_names=callback_inputs if isinstance(callback_inputs, (list, tuple)) else [callback_inputs],
        allowed_inputs=pipeline._callback_tensor_inputs,
    )  # fmt: skip


def interpolation_numbers(weights, strength) -> tuple[list[float], float]:
    """Return the weights and the strength of an interpolation as numbers, checked."""
    try:
        weights = [float(w) for w in np.ravel(weights)]
        strength = float(strength)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights and strength must be numbers, got {weights!r} and {strength!r}") from error
    check_rules(INTERPOLATION_RULES, weights=weights, strength=strength)
    return weights, strength


def check_parts(pipeline, unet, num_inference_steps: int | None, ndim: int, other: str) -> None:
    """Check the arguments of a pipeline's constructor; `other` is the name of the pipeline of other data."""
    if getattr(unet, "ndim", ndim) != ndim:
        raise ValueError(f"{type(pipeline).__name__} was given a {type(unet).__name__}: use {other}")
    if num_inference_steps is not None:
        check_steps(num_inference_steps)


def check_steps(steps, total: int | None = None) -> None:
    """Check a number of model calls against the number of training timesteps, `total` (None: not known yet)."""
    if not is_whole(steps) or steps < 1 or (total is not None and steps > total):
        allowed = "of at least 1" if total is None else f"from 1 to {total}"
        raise ValueError(f"num_inference_steps must be a whole number {allowed}; got {steps!r}")


def check_timesteps(timesteps, total: int) -> None:
    """Check the explicit timesteps of a call, of which stock schedulers take any; `total` is the number in training."""
    given = timesteps if isinstance(timesteps, list) and all(map(is_number, timesteps)) else []
    if not given or any(a <= b for a, b in pairwise(given)) or given[0] >= total or given[-1] < 0:
        raise ValueError(f"timesteps must be descending numbers from {total - 1} to 0; got {timesteps!r}")
