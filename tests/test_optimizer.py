"""AdamW in any layout: torch's plain one's numbers, without its copies; clipping as torch's."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ddpm_hf.optimizer import DenseAdamW, clip_grad_norm

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
