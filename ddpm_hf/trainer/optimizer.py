"""AdamW and gradient clipping as torch has them, without the passes over memory that they do not need on CPU; Muon; the
learning rate over the steps."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from ddpm_hf.trainer.ema import spread_as, whole

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch names AdamW's states


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

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        with self._contiguous():
            super().step()
        return loss

    @contextlib.contextmanager
    def _contiguous(self) -> Iterator[None]:
        """Weights, gradients and states as contiguous views meanwhile; off the CPU the kernel minds the layout."""
        changed = []
        try:
            for p in (p for group in self.param_groups for p in group["params"]):
                if p.grad is None or p.device.type != "cpu":
                    continue
                state, data, gradient = self.state.get(p, {}), p.data, p.grad
                moments = {name: state[name] for name in MOMENTS if name in state}
                if all(x.is_contiguous() for x in (p, gradient, *moments.values())):
                    continue
                order = sorted(range(p.ndim), key=p.stride, reverse=True)
                if not data.permute(order).is_contiguous():
                    raise ValueError(
                        "weights must lie in memory without gaps, got one of shape "
                        f"{tuple(p.shape)}, strides {p.stride()}"
                    )
                changed.append((p, data, gradient, sorted(range(p.ndim), key=order.__getitem__)))
                for name, moment in moments.items():
                    if moment.stride() != p.stride():  # of a checkpoint of another layout
                        moment = torch.empty_like(data).copy_(moment)
                    state[name] = moment.permute(order)
                p.grad, p.data = None, data.permute(order)  # a gradient must have its weight's shape
                p.grad = gradient.permute(order).contiguous()
            yield
        finally:
            for p, data, gradient, order in changed:
                p.grad, p.data = None, data
                p.grad = gradient
                for name in MOMENTS:
                    if name in self.state.get(p, {}):
                        self.state[p][name] = self.state[p][name].permute(order)


# a, b, c of X <- (a + b A + c A^2) X, A = X X^T: Jordan's, which lift small singular values fast
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: same singular vectors, singular values moved to about 1.

    Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in
    neural networks"). All iterates are polynomials in A = X X^T times X, so they are kept as matrices of the shorter
    side, and X is multiplied twice only: for the 9 times longer kernels of convolutions a third of the multiplications.

    Args:
        x: (..., rows, columns), at least float32; zero stays zero.
        steps: iterations; after 5, singular values of 0.002 of x's norm and more lie in 0.68 to 1.21.
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


class Muon(DenseAdamW):
    """Muon (Jordan et al. 2024) for the weights of linear layers and convolutions; `DenseAdamW` for all others.

    A matrix moves by its momentum (Nesterov's, 0.95) made orthogonal, times 0.2 * sqrt(longer side) * its rate: an
    update whose root mean square is 0.2 of the rate, whatever the size (Liu et al., arXiv:2502.16982, equation 4). A
    convolution's kernel is the matrix (out, positions * in). Sides below `SHORTEST` stay with AdamW.

    Args:
        model: whose weights that need gradients are trained.
        lr: peak rate of AdamW; betas, eps: of AdamW alone.
        muon_lr: peak rate of the matrices; both follow the same schedule.
        weight_decay: decoupled, of both.
    """

    SHORTEST = 8  # an image's channels at the ends of the network are not mixed by it
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
        super().__init__([group for group in groups if group["params"]], lr, betas, eps, weight_decay)
        # so that a GradScaler leaves a step with infinite gradients out, instead of leaving that to AdamW's kernel
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [group for group in self.param_groups if group["matrices"]]
        gradients = [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]
        for p, _ in gradients:
            p.grad = None  # AdamW leaves alone what has none
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
                # AdamW's own loading asks every state for its step
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            self.state[p]["step"] += 1
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
        for (shape, *_), found in by_shape.items():  # one batched product for all of a shape
            scale = 0.2 * math.sqrt(max(shape)) * group["lr"]
            for (p, _), move in zip(found, orthogonalized(torch.stack([matrix for _, matrix in found]))):
                move = move.unflatten(1, (*p.shape[2:], p.shape[1])).movedim(-1, 1) if p.ndim > 2 else move
                p.sub_(spread_as(move.to(p.dtype), p), alpha=scale)


def make_optimizer(model: nn.Module, config) -> DenseAdamW:
    """Build the optimizer that a `TrainConfig` asks for."""
    c = config
    options = {"lr": c.learning_rate, "betas": (c.adam_beta1, c.adam_beta2), "eps": c.adam_epsilon,
               "weight_decay": c.adam_weight_decay}  # fmt: skip
    if c.optimizer == "muon":
        return Muon(model, muon_lr=c.muon_learning_rate, **options)
    return DenseAdamW([p for p in model.parameters() if p.requires_grad], **options)


def make_schedule(optimizer: torch.optim.Optimizer, config) -> LambdaLR:
    """The learning rate of a `TrainConfig`: diffusers' schedule, whose warm-up begins above 0.

    Step k of a warm-up of n steps, counted from 1, has k / (n + 1) of the peak, and step n + 1 the peak. From there the
    rates are diffusers'.
    """
    c = config
    # one step later in a schedule that is one step longer: only the warm-up differs
    later = get_scheduler(
        c.lr_scheduler, optimizer, num_warmup_steps=c.lr_warmup_steps + 1, num_training_steps=c.max_train_steps + 1
    )
    return LambdaLR(optimizer, [lambda step, share=share: share(step + 1) for share in later.lr_lambdas])


def warmup_warning(config) -> str | None:
    """A sentence on a warm-up that takes more than half of the run; None for any other."""
    c = config
    if c.lr_scheduler == "constant" or 2 * c.lr_warmup_steps <= c.max_train_steps:
        return None
    share = c.max_train_steps / (c.lr_warmup_steps + 1)
    reached = f"the learning rate reaches {share:.0%} of its peak" if share < 1 else "few steps have the full rate"
    return (
        f"lr_warmup_steps {c.lr_warmup_steps} is more than half of max_train_steps {c.max_train_steps}: {reached}; "
        "give fewer lr_warmup_steps, or more steps"
    )


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
