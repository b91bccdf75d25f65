"""Large batches go through the model in pieces, so that memory does not grow with the number of samples."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_hf.pipeline.rules import is_whole
from ddpm_hf.pipeline.steps import weights_move

MAPS = 32  # memory that a call of a U-Net takes for each sample, in feature maps of the first width and the full size
ROOM = {"cpu": 2**27}  # bytes of activations of a call; on a CPU larger ones are slower, because caches are small
ROOM_ON_CARD = 2**32


def check_max_batch_size(value) -> None:
    if value is not None and not (is_whole(value) and value >= 1):
        raise ValueError(f"max_batch_size must be a whole number of at least 1, or None; got {value!r}")


def suggested_batch(model, sample: Tensor) -> int | None:
    """Return the number of samples whose activations take about `ROOM` bytes, estimated from the model's first width.

    Args:
        model: a U-Net, which is called.
        sample: x_t, `(B, C, *spatial)`.

    Returns:
        At least 1; None for a model whose width is not known, and for one whose weights are offloaded or sharded: such
        a model would move them once for each piece, and its processes must make equally many calls.
    """
    config = getattr(model, "config", {})
    width = config.get("dim") or (config.get("block_out_channels") or (0,))[0]
    if not width or weights_move(model):
        return None
    room = ROOM.get(sample.device.type, ROOM_ON_CARD)
    return max(1, room // (MAPS * width * math.prod(sample.shape[2:]) * sample.element_size()))


def in_pieces(call: Callable[..., Tensor], model, most: int | None) -> Callable[..., Tensor]:
    """Return a function that predicts as `call` does, with at most a number of samples in each call of the model.

    The pieces differ by at most one sample in size. A batch that fits is given to `call` as it is.

    Args:
        call: predicts from x_t `(B, ...)`, the timestep of all samples or timesteps `(B,)`, and optional tensors
            `(B, ...)`.
        model: the model that it calls.
        most: largest number of samples; None: that of `suggested_batch`.
    """

    def predict(sample: Tensor, timestep: Tensor, **optional: Tensor | None) -> Tensor:
        size = most or suggested_batch(model, sample)
        if size is None or len(sample) <= size:
            return call(sample, timestep, **optional)
        number = math.ceil(len(sample) / size)
        split = {
            name: (None,) * number if x is None else x.tensor_split(number)
            for name, x in {"sample": sample, **optional}.items()
        }
        if timestep.ndim and len(timestep) == len(sample):
            split["timestep"] = timestep.tensor_split(number)
        else:
            split["timestep"] = (timestep,) * number
        return torch.cat(
            [
                call(piece.pop("sample"), piece.pop("timestep"), **piece)
                for piece in (dict(zip(split, parts)) for parts in zip(*split.values()))
            ]
        )

    return predict
