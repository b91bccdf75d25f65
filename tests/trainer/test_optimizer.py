"""AdamW in any layout: torch's plain one's numbers, without its copies; clipping as torch's; Muon by its definition."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ddpm_hf import UNet1D, UNet2D
from ddpm_hf.trainer.optimizer import (
    NEWTON_SCHULZ,
    DenseAdamW,
    Muon,
    clip_grad_norm,
    make_schedule,
    orthogonalized,
    warmup_warning,
)

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(6, 4, 3, 3), (5, 3, 1, 1), (4, 3, 2), (7, 5), (3,), ()]


def lay(x, last):
    """The same numbers, with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last and x.ndim > 2 else x.clone()


def weights(last):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(lay(torch.randn(s, generator=generator, dtype=torch.float64), last)) for s in SHAPES]


def gradients(step):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def run(optimizer, parameters, steps, last):
    for step in steps:
        for p, g in zip(parameters, gradients(step)):
            p.grad = lay(g, last)
        optimizer.step()


def plain(steps):
    parameters = weights(last=False)
    run(torch.optim.AdamW(parameters, **OPTIONS, foreach=False), parameters, steps, last=False)
    return parameters


@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("gradients_last", [False, True])
def test_the_layout_changes_no_number(weights_last, gradients_last):
    """Also where weights and gradients lie differently, which torch's fused kernel gets wrong on CPU."""
    parameters = weights(weights_last)
    run(DenseAdamW(parameters, **OPTIONS), parameters, range(4), gradients_last)
    for p, expected in zip(parameters, plain(range(4))):
        torch.testing.assert_close(p, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_a_state_of_the_other_layout_is_taken_up(before, after):
    parameters = weights(before)
    optimizer = DenseAdamW(parameters, **OPTIONS)
    run(optimizer, parameters, range(2), before)
    later = [nn.Parameter(lay(p.detach(), after)) for p in parameters]
    resumed = DenseAdamW(later, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    run(resumed, later, range(2, 4), after)
    for p, expected in zip(later, plain(range(4))):
        torch.testing.assert_close(p, expected, rtol=1e-13, atol=1e-15)


def test_a_closure_is_called_once_with_gradients():
    for make in (lambda model: DenseAdamW(model.parameters(), **OPTIONS), lambda model: Muon(model, **MUON)):
        model, calls = Small(False), []

        def closure(model=model, calls=calls):
            calls.append(torch.is_grad_enabled())
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            return 7.0

        before = [p.detach().clone() for p in model.parameters()]
        assert make(model).step(closure) == 7.0 and calls == [True]
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_nothing_big_is_copied():
    p = nn.Parameter(lay(torch.randn(64, 64, 3, 3), last=True))
    p.grad = torch.randn_like(p)
    optimizer = DenseAdamW([p], **OPTIONS)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        optimizer.step()
    names = [event.name for event in found.events()]
    assert "aten::_fused_adamw_" in names and "aten::clone" not in names


def test_weights_with_gaps_in_memory_are_refused():
    p = nn.Parameter(torch.randn(4, 6)[:, ::2])
    p.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"without gaps, got one of shape \(4, 3\), strides \(6, 2\)"):
        DenseAdamW([p], **OPTIONS).step()


@pytest.mark.parametrize("gaps", [False, True])
def test_a_step_leaves_everything_in_its_layout(gaps):
    """Also one that stops at a weight that it refuses. States lie as their weights do; gradients are not replaced."""
    parameters = weights(last=True)
    optimizer = DenseAdamW([*parameters, nn.Parameter(torch.ones(4, 6)[:, :: 2 if gaps else 1])], **OPTIONS)
    run(optimizer, parameters, range(2), last=False)
    gradient = torch.ones_like(optimizer.param_groups[0]["params"][-1])
    optimizer.param_groups[0]["params"][-1].grad = gradient
    kept = [(p.data_ptr(), p.shape, p.stride(), p.grad) for p in parameters]
    with pytest.raises(ValueError, match="without gaps") if gaps else nullcontext():
        optimizer.step()
    for p, (place, shape, stride, gradient) in zip(parameters, kept):
        assert (p.data_ptr(), p.shape, p.stride()) == (place, shape, stride) and p.grad is gradient
        assert all(optimizer.state[p][name].stride() == stride for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_torchs(limit):
    parameters = weights(last=True)
    copies = weights(last=True)
    for these in (parameters, copies):
        for p, g in zip(these, gradients(0)):
            p.grad = g
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    norm = clip_grad_norm(Accelerator(cpu=True), iter(parameters), limit)
    expected = nn.utils.clip_grad_norm_(copies, limit)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
    for p, copy in zip(parameters, copies):
        torch.testing.assert_close(p.grad, copy.grad, rtol=1e-13, atol=0)


def test_a_norm_that_is_not_finite_is_not_hidden():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("nan"), 2.0])
    assert clip_grad_norm(Accelerator(cpu=True), [p], 1.0).isnan()
    assert p.grad.isnan().all()


SCHEDULES = [kind.value for kind in SchedulerType if kind.value not in ("constant", "piecewise_constant")]


@pytest.mark.parametrize("warmup", [0, 3, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_warm_up_begins_above_zero_and_the_rest_is_diffusers(name, warmup):
    """Both groups of Muon; step k of n has k / (n + 1) of its rate, step n + 1 all of it, later ones what diffusers
    gives. Taken up in the middle, the rates are the same."""
    options = SimpleNamespace(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=12)
    optimizers = [Muon(Small(False), **MUON) for _ in range(3)]
    ours = make_schedule(optimizers[0], options)
    theirs = get_scheduler(name, optimizers[1], num_warmup_steps=warmup, num_training_steps=12)
    again = make_schedule(optimizers[2], options)
    for k in range(1, 13):
        expected = [k / (warmup + 1) * rate for rate in (0.01, 0.03)] if k <= warmup else theirs.get_last_lr()
        assert ours.get_last_lr() == again.get_last_lr() == pytest.approx(expected, rel=1e-14, abs=1e-17)
        assert ours.last_epoch == k - 1
        if k == 5:
            state, optimizers[2] = ours.state_dict(), Muon(Small(False), **MUON)
            again = make_schedule(optimizers[2], options)
            again.load_state_dict(state)
        for optimizer, schedule in zip(optimizers, (ours, theirs, again)):
            optimizer.step()
            schedule.step()


def test_a_constant_rate_has_no_warm_up():
    optimizer = Muon(Small(False), **MUON)
    schedule = make_schedule(optimizer, SimpleNamespace(lr_scheduler="constant", lr_warmup_steps=5, max_train_steps=9))
    assert schedule.get_last_lr() == [0.01, 0.03]


def test_a_warm_up_longer_than_half_of_the_run_is_warned_of():
    def warning(name, warmup):
        return warmup_warning(SimpleNamespace(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=50))

    assert "lr_warmup_steps 99 is more than half of max_train_steps 50: the learning rate reaches 50%" in warning(
        "cosine", 99
    )
    assert "few steps have the full rate" in warning("linear", 26)
    assert warning("cosine", 25) is None and warning("constant", 99) is None


# -- Muon


def by_singular_values(x, steps):
    """The iteration on the singular values alone, by torch's decomposition."""
    a, b, c = NEWTON_SCHULZ
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s.unsqueeze(-2) @ v


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (6, 6)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_singular_values_are_moved_to_one_and_nothing_else(shape, steps):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalized(x, steps)
    torch.testing.assert_close(found, by_singular_values(x, steps), rtol=0, atol=1e-10)  # 1e-16 * 3.4^5 * sides
    if steps == 5:
        values = torch.linalg.svdvals(orthogonalized(torch.diag(torch.linspace(0.01, 1, 50, dtype=torch.float64))))
        assert values.min() > 0.68 and values.max() < 1.21


def test_no_gradient_is_no_move():
    assert torch.equal(orthogonalized(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


class Small(nn.Module):
    """A kernel and a matrix for Muon; what is too short, or no layer's weight, for AdamW."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.matrix = nn.Conv2d(10, 9, 3, dtype=torch.float64), nn.Linear(12, 8, dtype=torch.float64)
        self.out = nn.Conv2d(9, 3, 1, dtype=torch.float64)
        self.table = nn.Embedding(20, 12, dtype=torch.float64)
        if last:
            self.to(memory_format=torch.channels_last)

    def give_gradients(self, step, last=False):
        generator = torch.Generator().manual_seed(step + 1)
        for p in self.parameters():
            p.grad = lay(torch.randn(p.shape, generator=generator, dtype=torch.float64), last)


MUON = {"lr": 0.01, "muon_lr": 0.03, "betas": (0.9, 0.99), "weight_decay": 0.1}


@pytest.mark.parametrize("last", [False, True])
def test_muon_is_its_definition_and_adamw_for_the_rest(last):
    """Momentum, Nesterov's look ahead, orthogonal, scaled to a root mean square of 0.2 of the rate (of full rank)."""
    model, other = Small(last), Small(False)
    optimizer = Muon(model, **MUON)
    matrices = {"kernel.weight", "matrix.weight"}
    kept = [p for name, p in other.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(kept, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    momentum = {name: 0 for name in matrices}
    for step in range(3):
        model.give_gradients(step, last)
        optimizer.step()
        other.give_gradients(step)
        adamw.step()
        for name, p in other.named_parameters():
            if name in matrices:
                momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad
                ahead = (0.95 * momentum[name] + 0.05 * p.grad).movedim(1, -1).flatten(1)
                move = by_singular_values(ahead, 5).unflatten(1, (*p.shape[2:], p.shape[1])).movedim(-1, 1)
                with torch.no_grad():
                    p.mul_(1 - 0.03 * 0.1).sub_(move, alpha=0.03 * 0.2 * max(ahead.shape) ** 0.5)
    for (name, p), expected in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-11, msg=name)


def test_muons_state_goes_on_where_it_was():
    whole, first, second = Small(True), Small(True), Small(False)
    optimizers = [Muon(m, **MUON) for m in (whole, first)]
    for step in range(4):
        whole.give_gradients(step)
        optimizers[0].step()
    for step in range(2):
        first.give_gradients(step)
        optimizers[1].step()
    second.load_state_dict(first.state_dict())
    resumed = Muon(second, **MUON)
    resumed.load_state_dict(optimizers[1].state_dict())
    for step in range(2, 4):
        second.give_gradients(step)
        resumed.step()
    for a, b in zip(whole.parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_scaler_leaves_out_a_step_with_infinite_gradients():
    model = Small(False).float()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = Muon(model, **MUON), torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))  # as the loss is scaled, before the gradients are there
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.out.bias.grad[0] = torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before)) and not optimizer.state


def test_the_u_nets_matrices():
    """All kernels of the U-Nets but the first and the last that meet the data; no norm, bias or memory."""
    options = {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8}
    for model in (UNet2D(sample_size=8, in_channels=1, **options), UNet1D(sample_size=16, in_channels=1, **options)):
        chosen = {id(p) for g in Muon(model, **MUON).param_groups if g["matrices"] for p in g["params"]}
        names = {name for name, p in model.named_parameters() if id(p) in chosen}
        expected = {n for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n}
        left = expected - names
        assert names <= expected and left <= {"conv_in.weight", "out_stage.conv.weight"}
