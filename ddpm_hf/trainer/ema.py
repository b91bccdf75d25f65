"""The exponential moving average of the weights, and the model that samples with it.

The average and its decay are those of diffusers' `EMAModel`. Its update is one pass over memory here, and takes a share
on the device too, so that it can be captured as a CUDA graph. Under FSDP each process averages its own shard; for
sampling and saving, each process gathers the average into a whole model, because processes sample different numbers of
batches.
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


def is_sharded(accelerator) -> bool:
    """Return True if the weights are spread over processes (FSDP).

    Raises:
        ValueError: the shards are those of FSDP's first version or DeepSpeed's ZeRO-3, which cannot be averaged one by
            one.
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
        model: the model before accelerate prepares it.
        accelerator: says whether the weights are spread over processes.
        config: the `TrainConfig`, whose options use_ema and ema_* are used.
    """

    def __init__(self, model: nn.Module, accelerator, config):
        self.accelerator, self.config, self.model = accelerator, config, model
        self.sharded = is_sharded(accelerator)
        self.whole = copy.deepcopy(model).eval() if self.sharded else None
        self.ema: EMAModel | None = None

    def start(self, model: nn.Module) -> None:
        """Begin with the weights of the prepared model."""
        c, self.model = self.config, model
        # listed once, which takes a while; shards come and go
        self._parameters = None if self.sharded else list(model.parameters())
        if c.use_ema:
            self.ema = EMAModel(
                model.parameters(), decay=c.ema_max_decay, use_ema_warmup=True, inv_gamma=c.ema_inv_gamma,
                power=c.ema_power, update_after_step=c.ema_update_after_step, foreach=not self.sharded,
            )  # fmt: skip

    def share(self, step: int) -> float | None:
        """Return the share that the new weights have in the average after a step; None if the step leaves it alone.

        Args:
            step: counted from 0, as ema-pytorch does. The average takes in the weights after step 0 and after every
                `ema_update_every`-th step from there.
        """
        if self.ema is None or step % self.config.ema_update_every:
            return None
        return 1 - self.ema.get_decay(step + 1)

    @torch.no_grad()
    def update(self, share: float | Tensor) -> None:
        """Take in the new weights: average + share * (weights - average).

        Args:
            share: in [0, 1], from `share`; a 0-d tensor on the device of the weights if the update is to be captured.
        """
        averages, weights = self.ema.shadow_params, self._parameters or list(self.model.parameters())
        if isinstance(share, Tensor):  # torch's lerp of lists would read it
            changes = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(changes, share)
            torch._foreach_add_(averages, changes)
        else:
            torch._foreach_lerp_(averages, weights, share)

    @contextlib.contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """Give a whole model without wrappers, in eval mode, which has the average of the weights inside the context.

        Without an average it has the weights. All processes must enter together. The model computes as the saved one
        does, in the type of its weights: accelerate's autocast is set aside, and its compiled form with it. The weights
        are exchanged in place, so a captured step stays valid.
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
        """Return the average by number of the parameter, whole. All processes must call it."""
        if self.ema is None:
            return {}
        return {f"{i:05d}": whole(p).contiguous() for i, p in enumerate(self.ema.shadow_params)}

    def load(self, file: Path) -> None:
        """Load a safetensors file with what `state()` returned."""
        if self.ema is None:
            return
        stored = load_file(file)
        for i, p in enumerate(self.ema.shadow_params):
            value = stored[f"{i:05d}"].to(p.device)
            p.copy_(spread_as(value, p))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def whole(p: Tensor) -> Tensor:
    """Return p without its history, gathered if it is spread over processes (FSDP)."""
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def spread_as(x: Tensor, like: Tensor) -> Tensor:
    """Spread x, which is the same on all processes, over them as `like` is."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
