"""The loss on held-out items: closed forms of models that are known."""

import numpy as np
import pytest
import torch
from conftest import optimal_prediction
from measuring import Known, evaluator

from ddpm_hf import GaussianScheduler
from ddpm_hf.data.images import digits
from ddpm_hf.data.loading import hold_out


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_held_out_loss_of_a_model_that_says_nothing(kind):
    """A model that gives 0 has the mean square of the target, whatever the SNR: E|epsilon|^2 = 1 for noise, 0.25 for
    x0 of +-0.5, abar + 0.25 (1 - abar) for v. Weighted by SNR in units of x0 it is, for epsilon, the same. 80 items of
    64 numbers; 5 deviations of a mean of squared normals."""
    data = list(torch.randint(0, 2, (100, 1, 8, 8)) - 0.5)
    rest, held = hold_out(data, 80, 0)
    pipeline = Known([], (1, 8, 8))
    pipeline.unet.forward = lambda x, t: type("Out", (), {"sample": torch.zeros_like(x)})
    names = ["held_out_loss", "held_out_weighted_loss"]
    scheduler = GaussianScheduler(prediction_type=kind)
    values = evaluator(rest, (1, 8, 8), held, metrics=names)(pipeline, 5, scheduler)
    assert len(values) == 12
    abar = scheduler.alphas_cumprod.double().reshape(10, 100).mean(dim=1)
    expected = {"epsilon": torch.ones(10), "sample": torch.full((10,), 0.25), "v_prediction": abar + 0.25 * (1 - abar)}
    buckets = [value for name, value in values.items() if "_t" in name]
    # of v the timesteps are drawn too: within a bucket abar has a deviation of at most its range / sqrt(12)
    spread = scheduler.alphas_cumprod.double().reshape(10, 100)
    spread = (spread[:, 0] - spread[:, -1]).max().item() * 0.75 / 12**0.5 if kind == "v_prediction" else 0
    tolerance = 5 * np.sqrt(2 / (80 * 64)) + 5 * spread / np.sqrt(80)
    np.testing.assert_allclose(buckets, expected[kind], atol=tolerance)
    assert values["held_out_loss"] == pytest.approx(np.mean(buckets), rel=1e-12)
    if kind == "epsilon":
        assert values["held_out_weighted_loss"] == pytest.approx(values["held_out_loss"], rel=1e-12)


def test_the_weighted_held_out_loss_is_that_of_the_noise():
    """One and the same denoiser as epsilon, x0 and v: plain losses differ, those weighted by SNR are all the squared
    error of the noise."""
    rest, held = hold_out(digits(), 20, 0)
    names, values = ["held_out_loss", "held_out_weighted_loss"], []
    for kind in ("epsilon", "sample", "v_prediction"):
        pipeline, scheduler = Known([], (1, 8, 8)), GaussianScheduler(prediction_type=kind)

        def forward(x, t, scheduler=scheduler):
            return type("Out", (), {"sample": optimal_batch(scheduler, x, t)})

        pipeline.unet.forward = forward
        values.append(evaluator(rest, (1, 8, 8), held, metrics=names)(pipeline, 5, scheduler))
    plain, weighted = ([v[name] for v in values] for name in names)
    assert weighted == pytest.approx([weighted[0]] * 3, rel=1e-3) and len({round(p, 2) for p in plain}) == 3


def optimal_batch(scheduler, x, t):
    return torch.stack([optimal_prediction(scheduler, x[i], int(t[i]), 0.0, 0.5) for i in range(len(x))])
