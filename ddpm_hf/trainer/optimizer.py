"""The optimizer (torch's AdamW, or Muon) and the learning rate over the steps.

Nothing here reads a number back from the device, and a step can be captured as a CUDA graph: states stay in their
memory, and `rates_from` lets a step read its learning rates from a tensor.

torch has a Muon too, since version 2.9. It takes matrices only, so not the kernels of convolutions, which are most of a
U-Net's weights; it computes in bfloat16 and one matrix at a time. The one here takes kernels, computes in the type of
the weights and in one batch for all matrices of a shape, and runs on torch 2.6.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ddpm_hf.trainer.ema import spread_as, whole


def _fused(parameters: list[nn.Parameter]) -> dict[str, bool]:
    """Return the options of torch's AdamW for one kernel over all weights; on a card it can also be captured."""
    return {"fused": True, "capturable": any(p.is_cuda for p in parameters)}


def _after_loading(optimizer: torch.optim.Optimizer) -> None:
    """Fit loaded states to this device and to the memory layout of the weights.

    A checkpoint says whether its optimizer could be captured, which depends on the device. On CPU, torch's fused kernel
    goes through memory in one line, so it would pair wrong elements of a weight and of moments in another layout.
    """
    for group in optimizer.param_groups:
        group.update(_fused(group["params"]))
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state and state[name].stride() != p.stride():
                    state[name] = torch.empty_like(p).copy_(state[name])


@contextlib.contextmanager
def rates_from(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """Let steps of the optimizer read their learning rates from a tensor on the device, meanwhile.

    A captured step has the addresses of its inputs, not their values: if the host writes other rates into the tensor,
    the next replay uses them. Outside, the rates are numbers again, which the schedule sets.

    Args:
        optimizer: from `make_optimizer`, also as accelerate has prepared it.
        rates: (groups,) float32, one rate for each of the optimizer's parameter groups.
    """
    groups = optimizer.param_groups
    numbers = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates.unbind(), strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, number in zip(groups, numbers):
            group["lr"] = number


# a, b, c of X <- (a + b A + c A^2) X, A = X X^T: Jordan's coefficients, which raise small singular values fast
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """Return roughly the nearest (semi-)orthogonal matrices: the same singular vectors, singular values near 1.

    This is the Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks"). Every iterate is a polynomial in A = X X^T, times X. Only the polynomial, a
    matrix of the shorter side, is iterated, and X is multiplied twice; for kernels of convolutions, which are 9 times
    as long as they are wide, that is a third of the multiplications.

    Args:
        x: (..., rows, columns), at least float32; zero stays zero.
        steps: iterations. After 5, singular values of at least 0.002 of x's norm lie in 0.68 to 1.21.
    """
    a, b, c = NEWTON_SCHULZ
    if x.shape[-2] > x.shape[-1]:
        return orthogonalized(x.mT, steps).mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-30)
    gram, product = x @ x.mT, None
    for step in range(steps):
        factor = b * gram + c * (gram @ gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the weights of linear layers and convolutions; AdamW for all other weights.

    A matrix moves by its momentum (Nesterov's, 0.95) made orthogonal, times 0.2 * sqrt(longer side) * its rate: an
    update whose root mean square is 0.2 of the rate, whatever the size (Liu et al., arXiv:2502.16982, equation 4). A
    convolution's kernel is the matrix (out, positions * in). Weights with a side shorter than `SHORTEST` stay with
    AdamW.

    Args:
        model: the model to train; weights that need no gradient are left out.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of the matrices. Both rates follow the same schedule.
        betas: AdamW's betas.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of all weights.
    """

    SHORTEST = 8  # the channels of an image, at the ends of the network, are not mixed by it
    MOMENTUM = 0.95

    def __init__(self, model: nn.Module, lr: float, muon_lr: float, betas: tuple, eps: float = 1e-8,
                 weight_decay: float = 0.0):  # fmt: skip
        layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        kernels = [layer.weight for layer in model.modules() if isinstance(layer, layers)]
        chosen = {id(w) for w in kernels if min(len(w), w[0].numel()) >= self.SHORTEST}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in chosen], "matrices": False},
            {"params": [p for p in trained if id(p) in chosen], "matrices": True, "lr": muon_lr},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **_fused(trained))
        # A GradScaler leaves steps with infinite gradients to AdamW's kernel; Muon's part needs them left out whole.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [group for group in self.param_groups if group["matrices"]]
        gradients = [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]
        for p, _ in gradients:
            p.grad = None  # AdamW leaves weights without a gradient alone
        try:
            super().step()
        finally:
            for p, gradient in gradients:
                p.grad = gradient
        for group in groups:
            self._move_matrices([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _move_matrices(self, weights: list[nn.Parameter], group: dict) -> None:
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                # AdamW expects a step in every state that it loads; it is not used here
                self.state[p].update(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
        gradients, buffers = [p.grad for p in weights], [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - self.MOMENTUM)
        ahead = torch._foreach_lerp(gradients, buffers, self.MOMENTUM)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple, list] = {}
        for p, update in zip(weights, ahead):
            matrix = whole(update).movedim(1, -1).flatten(1)
            matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            by_shape.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), []).append((p, matrix))
        for (shape, *_), found in by_shape.items():  # one batched product for all matrices of a shape
            scale = 0.2 * math.sqrt(max(shape)) * group["lr"]
            moves = orthogonalized(torch.stack([matrix for _, matrix in found])) * scale
            for (p, _), move in zip(found, moves):
                move = move.unflatten(1, (*p.shape[2:], p.shape[1])).movedim(-1, 1) if p.ndim > 2 else move
                p.sub_(spread_as(move.to(p.dtype), p))


def make_optimizer(model: nn.Module, config) -> torch.optim.AdamW:
    """Build the optimizer that a `TrainConfig` asks for. The model must be on its device already.

    Raises:
        ValueError: a weight has gaps in memory (every second column of a matrix, say), which torch's fused kernel would
            get wrong on CPU without a message.
    """
    for p in model.parameters():
        if not p.permute(sorted(range(p.ndim), key=p.stride, reverse=True)).is_contiguous():
            raise ValueError(
                f"weights must lie in memory without gaps, got one of shape {tuple(p.shape)}, strides {p.stride()}"
            )
    c = config
    options = {"lr": c.learning_rate, "betas": (c.adam_beta1, c.adam_beta2), "eps": c.adam_epsilon,
               "weight_decay": c.adam_weight_decay}  # fmt: skip
    if c.optimizer == "muon":
        optimizer = Muon(model, muon_lr=c.muon_learning_rate, **options)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, **options, **_fused(trained))
    optimizer.register_load_state_dict_post_hook(_after_loading)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, config, begin: int = 0) -> LambdaLR:
    """Build the learning rate schedule of a `TrainConfig`: diffusers' schedule, whose warm-up begins above 0.

    Step k of a warm-up of n steps, counted from 1, has k / (n + 1) of the peak, and step n + 1 has the peak. From there
    on the rates are those of diffusers. The schedule covers the steps after step `begin`, at which a run begins that
    continues another one.
    """
    c = config
    # Taken one step later, from a schedule that is one step longer, only the warm-up differs.
    later = get_scheduler(
        c.lr_scheduler,
        optimizer,
        num_warmup_steps=c.lr_warmup_steps + 1,
        # torch asks for the rate after the last step too, where the polynomial divides by the steps since the warm-up
        num_training_steps=max(c.max_train_steps - begin, c.lr_warmup_steps + 1) + 1,
        num_cycles=c.lr_num_cycles,
        power=c.lr_power,
    )
    return LambdaLR(optimizer, [lambda step, share=share: share(step + 1) for share in later.lr_lambdas])


def warmup_warning(config, begin: int = 0) -> str | None:
    """Return a sentence of warning if the warm-up takes more than half of the run; None otherwise."""
    c, steps = config, config.max_train_steps - begin
    if c.lr_scheduler == "constant" or 2 * c.lr_warmup_steps <= steps:
        return None
    share = steps / (c.lr_warmup_steps + 1)
    named = "the remaining steps," if begin else "max_train_steps"
    reached = f"the learning rate reaches {share:.0%} of its peak" if share < 1 else "few steps have the full rate"
    return (
        f"lr_warmup_steps {c.lr_warmup_steps} is more than half of {named} {steps}: {reached}; "
        "give fewer lr_warmup_steps, or more steps"
    )
