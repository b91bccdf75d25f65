"""The device work of a step: the same captured as run, without reads by the host, in one graph, in few operations."""

import contextlib
import importlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from helpers import config, state, weights
from tape import Tape
from test_dispatch import card_kernels  # noqa: F401
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf import GaussianScheduler, TrainConfig, UNet1D, UNet2D, train
from ddpm_hf.data.loading import Batch
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.trainer import compiling, graphs, loop
from ddpm_hf.trainer.compiling import Plan, Runner
from ddpm_hf.trainer.ema import WeightAverage
from ddpm_hf.trainer.optimizer import make_optimizer, make_schedule
from ddpm_hf.trainer.step import TrainingStep

SMALL = {"dim": 8, "dim_mults": [1, 2], "attn_dim_head": [8], "ddpm_num_steps": 50, "train_batch_size": 4,
         "ddpm_num_inference_steps": 5}  # fmt: skip


def scheduler_of(c):
    variance = "learned_range" if c.learned_variance else "fixed_small"
    return GaussianScheduler(c.ddpm_num_steps, prediction_type=c.prediction_type, variance_type=variance)


class Training:
    """A run without data, files and evaluations: the step, its schedule, and what the loop does around it."""

    def __init__(self, runner=None, one_dimension=False, **options):
        self.config = c = TrainConfig(**{**SMALL, "max_train_steps": 20, **options})
        torch.manual_seed(0)
        self.classes = 3 if c.class_labels else None
        known = 2 * (2 if one_dimension else 1) if c.condition else 0
        told = {"num_class_embeds": self.classes, "condition_channels": known, **c.model_options()}
        model = UNet1D(sample_size=16, in_channels=2, **told) if one_dimension else UNet2D(
            sample_size=8, in_channels=1, **told
        )  # fmt: skip
        model.channels_last()
        self.accelerator = acc = Accelerator(
            cpu=True, mixed_precision=c.mixed_precision or "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=c.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )  # fmt: skip
        self.average = WeightAverage(model, acc, c)
        optimizer = make_optimizer(model, c)
        self.schedule = make_schedule(optimizer, c)
        self.model, self.optimizer = acc.prepare(model, optimizer)
        self.average.start(self.model)
        self.scheduler = scheduler_of(c)
        self.step = TrainingStep(self.model, self.scheduler, self.optimizer, self.average, c, acc, self.classes)
        self.shape = (c.train_batch_size, *((2, 16) if one_dimension else (1, 8, 8)))
        self.runner = None if runner is None else runner(self.step)

    def parts(self, k):
        g = torch.Generator().manual_seed(k)
        parts = []
        for _ in range(self.config.gradient_accumulation_steps):
            items = torch.randint(256, self.shape, generator=g, dtype=torch.uint8)
            labels = torch.randint(self.classes, self.shape[:1], generator=g) if self.classes else None
            parts.append(Batch(items, [], labels=labels))
        return parts

    def run(self, steps):
        results = []
        for k in steps:
            torch.manual_seed(derive_seed(0, Stream.DROPOUT, k))
            conditioned = self.config.self_condition and k % 2 == 0
            arguments = (self.parts(k), self.step.numbers(k), conditioned)
            results.append(self.step(*arguments) if self.runner is None else self.runner(*arguments, 20 - k))
            self.schedule.step()
            if k % 6 == 5:  # an evaluation
                with self.average.weights() as model, torch.no_grad():
                    model(torch.ones(self.shape), torch.zeros(self.shape[0], dtype=torch.long))
                if self.runner is not None:
                    self.runner.graphs.look_again()
        return torch.stack(results)


def captured(step):
    return Runner(step, Plan(graphs=True), Tape(), say=lambda line: pytest.fail(line))


def never_captured(step):
    """The same work on tensors, which is what a graph does."""
    runner = captured(step)
    runner.graphs.enabled = False
    return runner


@pytest.mark.parametrize(
    "options",
    [
        {"self_condition": True, "gradient_accumulation_steps": 2},
        {"dropout": 0.2, "ema_update_every": 3, "noise_offset": 0.1, "timestep_sampling": "logit_normal"},
        {"optimizer": "muon", "min_snr_gamma": 5.0, "one_dimension": True, "lr_warmup_steps": 3},
        {"mixed_precision": "bf16", "use_ema": False},
        {"class_labels": "label", "class_dropout_prob": 0.3, "self_condition": True, "gradient_accumulation_steps": 2},
        {"condition": "known", "self_condition": True, "one_dimension": True, "class_labels": "label"},
        {"learned_variance": True, "self_condition": True, "prediction_type": "epsilon", "noise_offset": 0.1},
    ],
    ids=["conditioned parts", "dropout", "muon", "bf16", "classes", "known", "learned variance"],
)
def test_captured_steps_are_bit_for_bit_those_that_run(options):
    """Over 20 steps, with changes of the learning rate, of the average's share, and two evaluations between."""
    eager, replayed = Training(never_captured, **options), Training(captured, **options)
    assert torch.equal(eager.run(range(20)), replayed.run(range(20)))
    for x, y in zip(eager.step.state(), replayed.step.state(), strict=True):
        assert torch.equal(x, y)
    made = replayed.runner.graphs
    kinds = 2 if "self_condition" in options or "ema_update_every" in options else 1
    assert made.captures == kinds
    assert made.backend.events.count("replay") == 20 - max(2 * kinds, 3)


def test_a_capture_that_fails_leaves_no_part_of_its_batch_behind():
    """It fails in its first part of two, whose count must not shift the updates of the steps that follow."""
    lines, tape = [], Tape()

    def failing(step):
        loss = step._loss

        def fail(*arguments):
            if "capture" in tape.events and not lines:
                raise RuntimeError("out of something")
            return loss(*arguments)

        step._loss = fail
        return Runner(step, Plan(graphs=True), tape, say=lines.append)

    eager, failed = (Training(form, gradient_accumulation_steps=2) for form in (never_captured, failing))
    assert torch.equal(eager.run(range(8)), failed.run(range(8))) and len(lines) == 1
    for x, y in zip(eager.step.state(), failed.step.state(), strict=True):
        assert torch.equal(x, y)


def test_tensors_for_numbers_change_nothing_but_rounding():
    plain, tensors = Training(dropout=0.2, self_condition=True), Training(captured, dropout=0.2, self_condition=True)
    torch.testing.assert_close(plain.run(range(20)), tensors.run(range(20)), rtol=2e-5, atol=1e-6)


def test_a_checkpoint_from_captured_steps_goes_on_bit_for_bit(tmp_path):
    whole, first, second = (Training(captured, dropout=0.2) for _ in range(3))
    values = whole.run(range(14))
    first.run(range(7))
    first.accelerator.save_state(tmp_path)
    average = [x.clone() for x in first.average.ema.shadow_params]
    first.run(range(7, 14))
    second.accelerator.load_state(tmp_path)
    for x, y in zip(second.average.ema.shadow_params, average):
        x.copy_(y)
    for _ in range(7):
        second.schedule.step()
    assert torch.equal(second.run(range(7, 14)), values[7:])
    for x, y, z in zip(whole.step.state(), first.step.state(), second.step.state(), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


# ---------------------------------------------------------------------------------------------
# The meta device stands for a card: reading a number from it raises, and host tensors are seen


FREE = {"aten._unsafe_view", "aten.new_empty_strided", "aten.empty_like", "aten.promote_types"}


class Watch(TorchDispatchMode):
    """Counts the operations that compute, without views and allocations, and collects those that use a host tensor."""

    def __init__(self):
        super().__init__()
        self.counts, self.on_host = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        if str(func.overloadpacket) not in FREE and any(alias is None or alias.is_write for alias in aliases or [None]):
            self.counts[func.overloadpacket] += 1
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree_leaves((args, kwargs, result))):
            self.on_host.append(str(func))
        return result


def on(device, **options):
    """A `TrainingStep` on a device, without accelerate, which has none called meta."""
    c = TrainConfig(**{**SMALL, **options})
    classes = 3 if c.class_labels else None
    told = {"num_class_embeds": classes, "condition_channels": 2 if c.condition else 0, **c.model_options()}
    model = UNet2D(sample_size=8, in_channels=1, **told).to(device).train()
    accelerator = SimpleNamespace(
        device=torch.device(device), num_processes=1, process_index=0, distributed_type="NO", sync_gradients=True,
        scaler=None, accumulate=lambda model: contextlib.nullcontext(), autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(), clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
    )  # fmt: skip
    average = WeightAverage(model, accelerator, c)
    optimizer = make_optimizer(model, c)
    average.start(model)
    return TrainingStep(model, scheduler_of(c), optimizer, average, c, accelerator, classes)


def one_step(step, device, watch):
    """Run a step twice, as graphs are given it, and watch the second."""
    c = step.config
    runner = Runner(step, Plan(graphs=True), Tape())
    part = {"items": torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device=device)}
    if c.class_labels:
        part["labels"] = torch.zeros(4, dtype=torch.int64, device=device)
    numbers = step.numbers(0)
    tensors = list(part.values()) * c.gradient_accumulation_steps
    tensors += runner._on_device(numbers, torch.device(device))
    choices = {"self_condition": c.self_condition, "averaging": numbers.share is not None, "fields": tuple(part)}
    for mode in (contextlib.nullcontext(), watch):
        with mode:
            values = runner._work(*tensors, **choices)
    return values


OPTIONS = [
    {}, {"self_condition": True, "gradient_accumulation_steps": 2}, {"noise_offset": 0.1, "min_snr_gamma": 5.0},
    {"timestep_sampling": "logit_normal", "dropout": 0.1}, {"optimizer": "muon", "ema_update_every": 2},
    {"loss_weighting": "snr", "prediction_type": "epsilon", "norm": "group", "time_embedding": "learned_fourier"},
    {"class_labels": "label", "self_condition": True, "gradient_accumulation_steps": 2},
    {"condition": "known", "self_condition": True},
    {"condition": "known", "self_condition": True, "learned_variance": True, "class_labels": "label"},
]  # fmt: skip


@pytest.fixture
def meta(monkeypatch):
    """Lets torch's fused AdamW run on the meta device, for which it has neither a kernel nor a place in its list."""
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda p, cuda_unsupported=False: None)
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        library.impl("_fused_adamw_.tensor_lr", lambda *args, **named: None)  # it returns nothing
        yield


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_reads_nothing_and_uses_no_host_tensor(options, meta):
    watch = Watch()
    values = one_step(on("meta", **options), "meta", watch)
    assert values.device.type == "meta" and values.shape == (2,)
    assert not watch.on_host


def test_a_read_would_be_seen():
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device="meta").item()
    with Watch() as watch:
        torch.zeros(2) + 1
    assert watch.on_host


def test_draws_and_loss_are_one_graph():
    """torch.compile takes them whole: an operation that it cannot follow, a read among them, would raise."""
    torch._dynamo.reset()
    options = {"noise_offset": 0.1, "timestep_sampling": "logit_normal", "min_snr_gamma": 5.0}
    options |= {"self_condition": True, "class_labels": "label", "condition": "known", "learned_variance": True}
    step = on("cpu", dim_mults=[1], **options)
    x0, labels, first = torch.randn(2, 1, 8, 8), torch.tensor([2, 0]), torch.tensor(5)

    def loss_of(x0, labels, first):
        return step._loss(Batch(x0, [], labels=labels), first, self_condition=True)

    expected = loss_of(x0, labels, first)
    expected.backward()
    gradients = [p.grad.clone() for p in step.model.parameters()]
    step.drop_gradients()
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(x0, labels, first)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(step.model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_step_is_few_operations(meta, monkeypatch, request):
    """Operations that a step of the default depth dispatches on a card; width, size and batch do not change that."""
    request.getfixturevalue("card_kernels")
    monkeypatch.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"])
    watch = Watch()
    one_step(on("meta", dim_mults=[1, 2, 4, 8]), "meta", watch)
    assert sum(watch.counts.values()) <= 965


def test_a_whole_run_of_captured_steps(tmp_path, monkeypatch):
    """With samples, evaluations and checkpoints in between, it is bit for bit the run whose steps are not captured."""
    options = {
        "max_train_steps": 14, "self_condition": True, "gradient_accumulation_steps": 2, "dropout": 0.1,
        "random_flip": True, "save_samples_steps": 5, "eval_steps": 6, "holdout": 100, "ema_update_every": 2,
        "eval_metrics": ["held_out_loss"], "checkpointing_steps": 4, "class_labels": "label",
    }  # fmt: skip
    tapes, states = [], []
    monkeypatch.setattr(compiling, "make_plan", lambda config, accelerator: Plan(graphs=True))
    monkeypatch.setattr(loop, "StepBackend", lambda device: tapes.append(Tape()) or tapes[-1])
    for name, warm_up in (("graphs", 3), ("eager", 1000)):
        monkeypatch.setattr(graphs, "WARM_UP_STEPS", warm_up)
        train(config(tmp_path / name, **options))
        states.append(state(tmp_path / name))
    assert tapes[0].events.count("capture") >= 2 and tapes[0].events.count("replay") >= 6
    assert "capture" not in tapes[1].events
    assert states[0].keys() == states[1].keys()
    assert not [name for name in states[0] if states[0][name] != states[1][name]]


def test_inductor_by_name_is_for_the_steps_alone(tmp_path, monkeypatch):
    """Samples, evaluations and what is saved are those of the model itself."""
    calls, states = [], []

    def stand_in(model, **options):
        return lambda *args, **kwargs: calls.append(1) or model(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", stand_in)
    for compiler in ("inductor", "none"):
        train(config(tmp_path / compiler, max_train_steps=3, save_samples_steps=2, compile=compiler))
        states.append(state(tmp_path / compiler))
    assert states[0] == states[1]
    assert len(calls) == 3


def test_deterministic_runs_train_and_refuse_before_they_write(tmp_path):
    """And the settings of torch are as they were."""
    train(config(tmp_path / "run", max_train_steps=2, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    train(config(tmp_path / "plain", max_train_steps=2))
    assert all(weights(tmp_path / "run")[name].equal(value) for name, value in weights(tmp_path / "plain").items())

    class Scatter(UNet2D):
        def forward(self, sample, timestep, **inputs):
            made = super().forward(sample, timestep, **inputs)
            made.sample = torch.zeros_like(made.sample).flatten().put_(
                torch.arange(made.sample.numel()), made.sample.flatten()
            ).view_as(made.sample)  # fmt: skip
            return made

    model = Scatter(sample_size=8, in_channels=1, dim=8, dim_mults=[1, 2], attn_dim_head=4, attn_heads=2)
    given = TrainConfig(dataset_name="digits", output_dir=str(tmp_path / "refused"), deterministic=True)
    with pytest.raises(ValueError, match="deterministic must be false with this model on cpu: put_ has no"):
        train(given, model=model)
    assert not (tmp_path / "refused").exists()
