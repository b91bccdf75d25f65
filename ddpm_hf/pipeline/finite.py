"""Samples that are not finite: where in the chain that began, and what usually causes it."""

import torch
from torch import Tensor


def check_finite(model, x: Tensor, sums: list[Tensor], timesteps: Tensor) -> None:
    """Check that x_0 is finite, which reads one number from its device.

    Args:
        model: the model of the chain.
        x: x_0, `(B, C, *spatial)`.
        sums: the sum of x after each step that was made; none is finite where x is not.
        timesteps: those of the chain.

    Raises:
        FloatingPointError: it is not. It is not a RuntimeError, which torch raises for faults of memory and devices, so
            that a caller can tell them apart.
    """
    if sums and not sums[-1].isfinite() and not x.isfinite().all():  # finite values can have a sum that is not
        raise FloatingPointError(where_not_finite(x, sums, timesteps) + why_not_finite(model, x.dtype))


def where_not_finite(x: Tensor, sums: list[Tensor], timesteps: Tensor) -> str:
    """Return the words for how many samples are not finite, and since which timestep.

    The arguments are those of `check_finite`.
    """
    finite = torch.stack(sums).isfinite().tolist()
    first = len(finite) - finite[::-1].index(True) if True in finite else 0
    bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
    return (
        f"{bad} of {len(x)} samples have NaN or infinity, since the step at timestep {float(timesteps[first]):g} "
        f"({first + 1} of {len(timesteps)}). "
    )


def why_not_finite(model, dtype: torch.dtype) -> str:
    """Return the words for what usually causes it: the weights of the model, or the type in which the chain ran."""
    weights = dict(model.named_parameters())
    # weights that are offloaded have no values here
    bad = [name for name, weight in weights.items() if not weight.is_meta and not weight.isfinite().all()]
    if bad:
        return (
            f"The cause is the model: {len(bad)} of its {len(weights)} weight tensors are not finite, the first is "
            f"{bad[0]}. Its training diverged, or the file is damaged: take an earlier checkpoint"
        )
    if dtype == torch.float16:
        return (
            f"The usual cause is the range of float16, up to {torch.finfo(dtype).max:g}: convert the model to "
            "torch.bfloat16 or torch.float32"
        )
    return (
        "The weights of the model are finite. The usual causes are a training that diverged, a guidance_scale that is "
        "too large, a guide, and latents that a callback returned"
    )
