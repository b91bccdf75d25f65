"""AdamW and gradient clipping as torch has them, without the passes over memory that they do not need on CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class DenseAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` for weights in any layout; same numbers, states and arguments.

    torch's fused kernel of CPU goes through memory in one line: it copies each gradient whose layout is not the default
    one (of channels-last weights that is most of the step), and where a gradient or a state lies in another layout than
    its weight it pairs wrong elements, in silence (torch 2.15). Here it is given contiguous views of the same memory.

    Raises:
        ValueError: at a step, a weight that has gaps in memory (every second column of a matrix, say).
    """

    def __init__(self, params, lr: float, betas: tuple, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, *others) -> bool:
        """torch's own hook, which fills the lists that its kernel is given."""
        found = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, *others)
        for i, p in enumerate(params):
            if p.device.type != "cpu" or all(x[i].is_contiguous() for x in (params, grads, exp_avgs, exp_avg_sqs)):
                continue  # elsewhere the kernel minds the layout
            order = sorted(range(p.ndim), key=p.stride, reverse=True)
            if not p.permute(order).is_contiguous():
                raise ValueError(
                    f"weights must lie in memory without gaps, got one of shape {tuple(p.shape)}, strides {p.stride()}"
                )
            for name, states in (("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
                if states[i].stride() != p.stride():  # of a checkpoint of another layout
                    self.state[p][name] = states[i] = torch.empty_like(p).copy_(states[i])
                states[i] = states[i].permute(order)
            params[i], grads[i] = p.permute(order), grads[i].permute(order).contiguous()
        return found


@torch.no_grad()
def clip_grad_norm(accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their common L2 norm is at most `max_norm`; returns the norm before, 0-d.

    As accelerate's own, but on CPU, where the comparison costs nothing, gradients within the limit are left alone.
    """
    parameters = list(parameters)
    if accelerator.device.type != "cpu" or accelerator.distributed_type not in ("NO", "MULTI_CPU"):
        return accelerator.clip_grad_norm_(parameters, max_norm)
    accelerator.unscale_gradients()
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not norm <= max_norm:  # also NaN, which then reaches every weight as with torch's own
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
