"""GaussianScheduler on a device: nothing is read back, nothing is copied from the host, whole graphs, safe copies.

The meta device stands for a card: it has no values, so that reading one raises an error.
"""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf.scheduler import PREDICTION_TYPES, GaussianScheduler


class OnlyMeta(TorchDispatchMode):
    """Refuses operations that take or give a tensor of another device than meta."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert devices <= {"meta"}, f"{function} with tensors on {sorted(devices)}"
        return out


def inputs(device, dtype=torch.float32):
    """x0, noise and a prediction `(4, 3, 8, 8)`, and timesteps (4,)."""
    x0, noise, prediction = torch.randn(3, 4, 3, 8, 8, dtype=dtype).to(device)
    return x0, noise, prediction, torch.tensor([0, 10, 500, 999]).to(device)


def training(scheduler, x0, noise, prediction, t):
    """Everything that a training step asks of the scheduler, but for its noise."""
    x_t, target = scheduler.add_noise(x0, noise, t), scheduler.target(x0, noise, t)
    estimate = scheduler.predict_x0(prediction, t, x_t)
    return x_t, target, estimate, scheduler.loss_weights(t), scheduler.loss_weights(t, 5.0)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_reads_and_copies_nothing(target, dtype):
    """Once the tables are on the device, by `load_tables` or by a first call, no operation has a tensor of the host."""
    x0, noise, prediction, t = inputs("meta", dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for load in (lambda s: s.load_tables("meta", wide), lambda s: training(s, x0, noise, prediction, t)):
        scheduler = GaussianScheduler(prediction_type=target)
        load(scheduler)
        with OnlyMeta():
            x_t, wanted, estimate, *weights = training(scheduler, x0, noise, prediction, t)
            drawn = scheduler.sample_noise(x0, 0.1)
            one = scheduler.add_noise(x0, noise, t[0])  # a 0-d timestep would be read by indexing with it
        for x in (x_t, wanted, estimate, drawn, one):
            assert x.device.type == "meta" and x.shape == x0.shape and x.dtype == dtype
        assert all(w.shape == t.shape and w.dtype == torch.float64 for w in weights)


def test_the_meta_device_shows_what_is_refused():
    """The tests here can fail: a first call copies the tables, and a device timestep is read by `step`."""
    x0, noise, prediction, t = inputs("meta")
    scheduler = GaussianScheduler()
    with pytest.raises(AssertionError, match="cpu"), OnlyMeta():
        scheduler.add_noise(x0, noise, t)
    with pytest.raises(RuntimeError, match="meta"):
        scheduler.step(prediction, t[0], x0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"variance_type": "fixed_small"},
        {"variance_type": "fixed_large", "eta": 1.0},
        {"variance_type": "learned_range", "use_clipped_model_output": False},
        {"thresholding": True, "sample_max_value": 2.0},
    ],
    ids=str,
)
def test_a_chain_reads_and_copies_nothing(options, target, sampler):
    """With timesteps on the host the coefficients of a step are Python numbers, and no table is needed."""
    scheduler = GaussianScheduler(prediction_type=target, sampler=sampler, **options)
    scheduler.set_timesteps(5)
    chain = scheduler.timesteps.tolist()
    x, _, output, _ = inputs("meta")
    if options.get("variance_type") == "learned_range":
        output = torch.cat((output, output), dim=1)
    with OnlyMeta():
        x = scheduler.add_noise(x, x, chain[0])
        for t in chain:
            x = scheduler.step(output, t, x).prev_sample
    assert x.shape == (4, 3, 8, 8) and not scheduler._loaded_tables


def test_timesteps_of_any_kind_give_the_same_step():
    scheduler = GaussianScheduler()
    x, _, output, _ = inputs("cpu")
    a, b = (scheduler.step(output, t, x, variance_noise=x).prev_sample for t in (7, torch.tensor(7)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_training_is_one_graph(target):
    """`fullgraph=True` refuses host reads; with loaded tables the graph is made once, and equals eager code."""
    scheduler = GaussianScheduler(prediction_type=target)
    scheduler.load_tables("cpu")
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch.compiler.reset()
    compiled = torch.compile(training, fullgraph=True, backend=backend)
    for _ in range(2):
        given = inputs("cpu")
        for got, expected in zip(compiled(scheduler, *given), training(scheduler, *given)):
            assert torch.equal(got, expected)
    assert len(graphs) == 1
    # without tables on the device the first graph copies them
    for got, expected in zip(compiled(GaussianScheduler(prediction_type=target), *given), training(scheduler, *given)):
        assert torch.equal(got, expected)


def test_tables_of_a_tracer_are_not_kept():
    """Under FakeTensorMode tables are fake; a call afterwards must not meet them."""
    scheduler = GaussianScheduler()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x0, t = torch.empty(4, 3, 8, 8, device="cpu"), torch.empty(4, dtype=torch.int64)
        training(scheduler, x0, x0, x0, t)
    given = inputs("cpu")
    for got, expected in zip(training(scheduler, *given), training(GaussianScheduler(), *given)):
        assert torch.equal(got, expected)


def test_loaded_tables_stay_out_of_copies(tmp_path):
    """Pickles, deep copies, saved files and new schedulers have no tensors of a device that may not be there."""
    scheduler = GaussianScheduler()
    training(scheduler, *inputs("cpu"))
    assert scheduler._loaded_tables
    scheduler.save_pretrained(tmp_path)
    for other in (
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
        GaussianScheduler.from_config(scheduler.config),
        GaussianScheduler.from_pretrained(tmp_path),
    ):
        assert not other._loaded_tables
        given = inputs("cpu")
        for got, expected in zip(training(other, *given), training(scheduler, *given)):
            assert torch.equal(got, expected)
    assert scheduler._loaded_tables


def test_tables_made_without_gradients_serve_training():
    """Sampling under inference mode loads the tables; a loss through `predict_x0` has gradients all the same."""
    scheduler = GaussianScheduler()
    x0, noise, prediction, t = inputs("cpu")
    with torch.inference_mode():
        scheduler.add_noise(x0, noise, t)
    scheduler.predict_x0(prediction.requires_grad_(), t, x0).square().sum().backward()
    assert prediction.grad.abs().sum() > 0
