"""Functions that take several tensors, on all combinations of two devices: they give what they give on one device, or
raise a ValueError."""

import itertools
import re
from functools import partial

import pytest
import torch
from helpers import MODEL
from pretended import DEVICE, Pretended, There
from torch import Tensor

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.evaluation import metrics
from ddpm_hf.losses import diffusion_loss, drop_labels, immiscible_assignment, training_draws

X, Y = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T, LABELS = torch.tensor([3, 7]), torch.tensor([0, 3])
QUERIES, ROWS = torch.randn(14, 6, generator=torch.Generator().manual_seed(2)).split((5, 9))
REFUSED = r"on one device, got (cpu and meta|meta and cpu)$|on the device of x0, (cpu|meta); got "


def outcomes(function, *tensors):
    """Call with every combination of devices -> for each, the tuple of devices and True, or False if it is refused."""
    expected = [x.clone() for x in leaves(function(*(x.clone() for x in tensors)))]
    assert expected
    for places in itertools.product((False, True), repeat=len(tensors)):
        with Pretended():
            try:
                found = leaves(function(*(x.to(DEVICE) if there else x for x, there in zip(tensors, places))))
            except ValueError as error:
                assert re.search(REFUSED, str(error))
                yield places, False
                continue
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
        yield places, True


def leaves(out) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = vars(out).values() if hasattr(out, "__dict__") and not isinstance(out, tuple) else out
    return [x for x in values if isinstance(x, Tensor)]


def schedule(prediction_type="epsilon"):
    scheduler = GaussianScheduler(10, prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    return scheduler


NAMES = ["add_noise", "get_velocity", "x0_from_epsilon", "x0_from_v", "epsilon_from_x0", "epsilon_from_v", "posterior",
         "target", "predict_x0"]  # fmt: skip


@pytest.mark.parametrize("t", [T, torch.tensor(3)], ids=["each", "one"])
@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_moves_timesteps_and_refuses_data_of_two_devices(name, t):
    method = getattr(schedule("v_prediction"), name)
    last = name in ("add_noise", "get_velocity", "target", "posterior")
    for (x, y, _), works in outcomes(lambda x, y, t: method(x, y, t) if last else method(x, t, y), X, Y, t):
        assert works == (x == y)


def test_a_step_of_the_scheduler():
    def step(output, t, x, noise):
        return schedule().step(output, t, x, variance_noise=noise)

    for (output, _, x, _), works in outcomes(step, X, torch.tensor(3), Y, Y.flip(0)):
        assert works == (output == x)


class Model:
    """A model that is where its sample is."""

    def __init__(self):
        torch.manual_seed(0)
        options = {"num_class_embeds": 3, "self_condition": True, "condition_channels": 1, **MODEL}
        self.here, self.there = (UNet2D(8, 1, **options).eval() for _ in range(2))
        self.there.load_state_dict(self.here.state_dict())
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        with Pretended():
            self.there.to(DEVICE)
        torch.__future__.set_overwrite_module_params_on_conversion(before)

    def __call__(self, x, *args, **optional):
        return (self.there if isinstance(x, There) else self.here)(x, *args, **optional)


@torch.no_grad()
def test_a_model_moves_what_comes_with_its_sample():
    model = Model()

    def predict(x, t, estimate, labels, condition):
        return model(x, t, estimate, class_labels=labels, condition=condition).sample

    assert all(works for _, works in outcomes(predict, X, T, Y, LABELS, Y))


@torch.no_grad()
def test_the_loss_refuses_noise_of_another_device_and_moves_the_rest():
    model = Model()

    def loss(x0, t, noise, labels, counted):
        return diffusion_loss(model, schedule(), x0, t, noise, class_labels=labels, counted=counted, condition=x0).loss

    for (x0, _, noise, _, counted), works in outcomes(loss, X, T, Y, LABELS, Y > 0):
        assert works == (x0 == noise == counted)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (partial(training_draws, schedule()), (X, T)),
        (lambda x, n, k: training_draws(schedule(), x, n, 0.1, key=k), (X, T, torch.tensor(5))),
        (lambda labels, n: drop_labels(labels, n, 0.5, 3), (LABELS, T)),
        (immiscible_assignment, (X, Y)),
        (lambda x: schedule().sample_noise(x, 0.1, torch.Generator().manual_seed(0)), (X,)),
        (lambda t: schedule().loss_weights(t, 5.0), (T,)),
        (metrics.distinct, (ROWS,)),
        (lambda q, r, own: metrics.Reference(r).nearest(q, 2, own), (QUERIES, ROWS, torch.arange(5)[:, None])),
    ],
    ids=["draws", "key", "labels", "assignment", "noise", "weights", "distinct", "nearest"],
)
def test_other_functions_move_tensors(function, tensors):
    assert all(works for _, works in outcomes(function, *tensors))


@pytest.mark.parametrize("images", [True, False])
def test_pipelines_take_tensors_of_any_device(images):
    """Labels and latents of a call, and the data of an interpolation, are brought to the pipeline's device."""
    if images:
        pipe = DDPMPipeline(UNet2D(8, 1, num_class_embeds=3, **MODEL), schedule(), 2)
    else:
        pipe = DDPMPipeline1D(UNet1D(8, 1, num_class_embeds=3, **MODEL), schedule(), 2, [1.0], [2.0])
    pipe.set_progress_bar_config(disable=True)
    shape = (2, 1, 8, 8) if images else (2, 1, 8)
    options = {"output_type": "pt", "return_dict": False}

    def call(latents, labels):
        return pipe(2, latents=latents, class_labels=labels, generator=torch.Generator().manual_seed(0), **options)

    def interpolate(x, y):
        return pipe.interpolate(x, y, strength=0.5, generator=torch.Generator().manual_seed(0), **options)

    assert all(works for _, works in outcomes(call, torch.randn(shape), torch.tensor([0, 2])))
    assert all(works for _, works in outcomes(interpolate, torch.rand(shape), torch.rand(shape)))
