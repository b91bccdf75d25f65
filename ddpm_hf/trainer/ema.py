"""The average of the weights, and the model that samples with it, also where the weights are spread over processes.

Averaging is diffusers' `EMAModel`, its sum torch's (half of the traffic through memory). Under FSDP each process
averages its own shard; sampling and saving gather the average into a whole model of each process, because processes
sample different numbers of batches.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def is_sharded(accelerator) -> bool:
    """Return True if the weights are spread over processes (FSDP).

    Raises:
        ValueError: by FSDP's first version or DeepSpeed's ZeRO-3, whose shards cannot be averaged one by one.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("FSDP must be of version 2: fsdp_version: 2 in accelerate's configuration, got 1")
        return True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage == 3:
            raise ValueError(f"DeepSpeed's zero_stage must be at most 2 (FSDP shards weights too), got {stage}")
    return False


class WeightAverage:
    """The average of a model's weights in training.

    Args:
        model: before accelerate prepares it.
        config: the `TrainConfig`: use_ema and ema_*.
    """

    def __init__(self, model: nn.Module, accelerator, config):
        self.accelerator, self.config, self.model = accelerator, config, model
        self.sharded = is_sharded(accelerator)
        self.whole = copy.deepcopy(model).eval() if self.sharded else None
        self.ema: EMAModel | None = None

    def start(self, model: nn.Module) -> None:
        """Begin with the weights of the prepared model."""
        c, self.model = self.config, model
        if c.use_ema:
            self.ema = EMAModel(
                model.parameters(), decay=c.ema_max_decay, use_ema_warmup=True, inv_gamma=c.ema_inv_gamma,
                power=c.ema_power, update_after_step=c.ema_update_after_step, foreach=not self.sharded,
            )  # fmt: skip

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0 as ema-pytorch does: the first, and every
        `ema_update_every`-th from there."""
        if self.ema is None or step % self.config.ema_update_every:
            return
        self.ema.optimization_step = step
        if self.sharded:
            self.ema.step(self.model.parameters())
            return
        self.ema.optimization_step += 1
        decay = self.ema.get_decay(self.ema.optimization_step)
        get_ema_multi_avg_fn(decay)(self.ema.shadow_params, list(self.model.parameters()), None)

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """A whole model, without wrappers, in eval mode and with the average (or, without one, the weights) for the
        time being. All processes must enter together.

        It computes as the saved model does, in the type of its weights: accelerate's autocast is set aside, and with it
        what was compiled of it.
        """
        model = self.accelerator.unwrap_model(self.model)
        inner = getattr(model, "_orig_mod", model)
        autocast = "_original_forward" in vars(inner)  # accelerate's name for what it has wrapped
        if autocast:
            model, wrapped = inner, inner.forward
            model.forward = inner._original_forward
        model.eval()
        if self.ema is not None:
            self.ema.store(model.parameters())
            self.ema.copy_to(model.parameters())
        try:
            if self.sharded:
                with torch.no_grad():
                    for name, p in _tensors(model).items():
                        _tensors(self.whole)[name].copy_(whole(p))
            yield self.whole if self.sharded else model
        finally:
            if self.ema is not None:
                self.ema.restore(model.parameters())
            if autocast:
                model.forward = wrapped
            model.train()

    def state(self) -> dict[str, Tensor]:
        """The average by number of the parameter, whole; to be called on all processes."""
        if self.ema is None:
            return {}
        return {f"{i:05d}": whole(p).contiguous() for i, p in enumerate(self.ema.shadow_params)}

    def load(self, file: Path) -> None:
        """Take up what `state()` gave, from a safetensors file."""
        if self.ema is None:
            return
        stored = load_file(file)
        for i, p in enumerate(self.ema.shadow_params):
            value = stored[f"{i:05d}"].to(p.device)
            p.copy_(spread_as(value, p))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def whole(p: Tensor) -> Tensor:
    """p, gathered where it is spread over processes (FSDP)."""
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def spread_as(x: Tensor, like: Tensor) -> Tensor:
    """x, the same on all processes, spread over them as `like` is."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
