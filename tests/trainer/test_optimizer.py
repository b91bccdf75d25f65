"""AdamW in both layouts, with rates as numbers and in a tensor; steps without reads by the host; Muon by its
definition."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from helpers import OnDevice, without_a_driver
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_hf import TrainConfig, UNet1D, UNet2D
from ddpm_hf.trainer.optimizer import (
    NEWTON_SCHULZ,
    Muon,
    make_optimizer,
    make_schedule,
    orthogonalized,
    rates_from,
    warmup_warning,
)

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(6, 4, 3, 3), (5, 3, 1, 1), (4, 3, 2), (7, 5), (3,), ()]


def lay(x, last):
    """The same numbers, with the channels last in memory or in the default layout."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last and x.ndim > 2 else x.contiguous().clone()


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


def adamw(parameters):
    """The optimizer of the default configuration, with OPTIONS."""
    model = nn.ParameterList(parameters)
    options = {"learning_rate": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.1}
    return make_optimizer(model, TrainConfig(**options))


@pytest.mark.parametrize("last", [False, True])
def test_adamw_is_torchs_in_both_layouts(last):
    parameters = weights(last)
    run(adamw(parameters), parameters, range(4), last)
    for p, expected in zip(parameters, plain(range(4))):
        torch.testing.assert_close(p, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_states_of_another_layout_and_device_are_taken_up(before, after):
    """A checkpoint of ddpm_hf 0.3.0 has torch's states, in the layout that the weights had, and flags of its device."""
    parameters = weights(before)
    optimizer = adamw(parameters)
    run(optimizer, parameters, range(2), before)
    state = optimizer.state_dict()
    state["param_groups"][0].update(capturable=True, foreach=None)  # as from a card
    later = [nn.Parameter(lay(p.detach(), after)) for p in parameters]
    resumed = adamw(later)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["fused"] and not resumed.param_groups[0]["capturable"]
    run(resumed, later, range(2, 4), after)
    for p, expected in zip(later, plain(range(4))):
        torch.testing.assert_close(p, expected, rtol=1e-13, atol=1e-15)
        assert all(resumed.state[p][name].stride() == p.stride() for name in ("exp_avg", "exp_avg_sq"))


def test_weights_with_gaps_in_memory_are_refused():
    p = nn.Parameter(torch.randn(4, 6)[:, ::2])
    with pytest.raises(ValueError, match=r"without gaps, got one of shape \(4, 3\), strides \(6, 2\)"):
        adamw([p])


def test_a_closure_of_muon_is_called_once_with_gradients():
    model, calls = Small(False), []

    def closure():
        calls.append(torch.is_grad_enabled())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return 7.0

    before = [p.detach().clone() for p in model.parameters()]
    assert Muon(model, **MUON).step(closure) == 7.0 and calls == [True]
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


# -- rates in a tensor, and steps on a card


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_rates_from_a_tensor_are_the_numbers(kind):
    """A step with rates in a tensor is the step with the numbers, to the rounding of float32 of the rates; the schedule
    sets numbers before and after."""
    models = [Small(False) for _ in range(2)]
    config = TrainConfig(optimizer=kind, lr_warmup_steps=3, max_train_steps=9, adam_weight_decay=0.1)
    optimizers = [make_optimizer(model, config) for model in models]
    schedules = [make_schedule(optimizer, config) for optimizer in optimizers]
    for step in range(3):
        for model in models:
            model.give_gradients(step)
        rates = torch.tensor(schedules[0].get_last_lr(), dtype=torch.float32)
        optimizers[0].step()
        with rates_from(optimizers[1], rates):
            optimizers[1].step()
        for schedule in schedules:
            schedule.step()
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
        assert all(isinstance(group["lr"], float) for group in optimizers[1].param_groups)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@without_a_driver
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_and_steps_stay_on_a_card(kind):
    """With fake tensors of a card, where a read by the host raises: clipping, and a step with rates in a tensor, use no
    tensor of the host, from the first step on, and the flag that lets torch capture AdamW is set."""
    accelerator, config = Accelerator(cpu=True), TrainConfig(optimizer=kind, adam_weight_decay=0.1)
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library, FakeTensorMode():
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_.tensor_lr", "Meta"):  # torch 2.14
            library.impl("_fused_adamw_.tensor_lr", lambda *args, **named: None)  # it returns nothing
        with torch.device("cuda"):
            model = Small(False)
        optimizer = make_optimizer(model, config)
        assert all(group["capturable"] and group["fused"] for group in optimizer.param_groups)
        rates = torch.zeros(len(optimizer.param_groups), device="cuda")
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            with OnDevice("cuda"):
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                with rates_from(optimizer, rates):
                    optimizer.step()


OTHER_CURVES = [("cosine_with_restarts", {"lr_num_cycles": 3}), ("polynomial", {"lr_power": 2.0})]
SCHEDULES = [kind.value for kind in SchedulerType if kind.value not in ("constant", "piecewise_constant")]


def schedule_of(optimizer, name, warmup, steps, **more):
    config = TrainConfig(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=steps, **more)
    return make_schedule(optimizer, config)


@pytest.mark.parametrize("warmup", [0, 3, 20])
@pytest.mark.parametrize("name, more", [*((name, {}) for name in SCHEDULES), *OTHER_CURVES])
def test_the_warm_up_begins_above_zero_and_the_rest_is_diffusers(name, more, warmup):
    """Both groups of Muon; step k of n has k / (n + 1) of its rate, step n + 1 all of it, later ones what diffusers
    gives. Taken up in the middle, the rates are the same."""
    optimizers = [Muon(Small(False), **MUON) for _ in range(3)]
    ours = schedule_of(optimizers[0], name, warmup, 12, **more)
    named = {option.removeprefix("lr_"): value for option, value in more.items()}
    theirs = get_scheduler(name, optimizers[1], num_warmup_steps=warmup, num_training_steps=12, **named)
    again = schedule_of(optimizers[2], name, warmup, 12, **more)
    for k in range(1, 13):
        expected = [k / (warmup + 1) * rate for rate in (0.01, 0.03)] if k <= warmup else theirs.get_last_lr()
        assert ours.get_last_lr() == again.get_last_lr() == pytest.approx(expected, rel=1e-14, abs=1e-17)
        assert ours.last_epoch == k - 1
        if k == 5:
            state, optimizers[2] = ours.state_dict(), Muon(Small(False), **MUON)
            again = schedule_of(optimizers[2], name, warmup, 12, **more)
            again.load_state_dict(state)
        for optimizer, schedule in zip(optimizers, (ours, theirs, again)):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_may_be_all_warm_up(name):
    """torch asks for the rate after the last step too."""
    optimizer = Muon(Small(False), **MUON)
    schedule = schedule_of(optimizer, name, 4, 4)
    for k in range(1, 5):
        assert schedule.get_last_lr() == pytest.approx([k / 5 * 0.01, k / 5 * 0.03], rel=1e-14)
        optimizer.step()
        schedule.step()


def test_a_constant_rate_has_no_warm_up():
    optimizer = Muon(Small(False), **MUON)
    schedule = make_schedule(optimizer, TrainConfig(lr_scheduler="constant", max_train_steps=9))
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
