"""The choice between eager, compiled and captured steps, on CPU, with a stand-in for a card that has its own clock."""

from types import SimpleNamespace

import pytest
import torch
from tape import Tape
from torch import nn
from torch.nn import functional as F

from ddpm_hf import TrainConfig
from ddpm_hf.data.loading import Batch
from ddpm_hf.trainer import compiling
from ddpm_hf.trainer.compiling import INDUCTOR_SAVES, INDUCTOR_SECONDS, TIMED_STEPS, Plan, Runner
from ddpm_hf.trainer.step import StepNumbers


def accelerator(**changes):
    values = {"num_processes": 1, "distributed_type": "NO", "mixed_precision": "bf16", **changes}
    return SimpleNamespace(device=torch.device(values.pop("device", "cuda")), **values)


def test_graphs_are_refused_without_a_card(monkeypatch):
    monkeypatch.setattr(compiling, "on_card", lambda: False)
    with pytest.raises(ValueError, match="compile must be auto, none or inductor without a CUDA device, got 'graphs'"):
        compiling.check_choice("graphs")
    for choice in ("auto", "none", "inductor"):
        compiling.check_choice(choice)
    monkeypatch.setattr(compiling, "on_card", lambda: True)
    compiling.check_choice("graphs")


def test_accelerates_own_compiler_is_kept_and_not_doubled(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setattr(compiling, "on_card", lambda: True)
    for choice in ("auto", "none"):
        compiling.check_choice(choice)
        assert compiling.make_plan(TrainConfig(compile=choice), accelerator()) == Plan()
    for choice in ("inductor", "graphs"):
        with pytest.raises(ValueError, match=f"compile must be auto or none .*dynamo_backend INDUCTOR.*got '{choice}'"):
            compiling.check_choice(choice)


def test_inductor_is_not_deterministic():
    with pytest.raises(ValueError, match="deterministic must be false with compile 'inductor'"):
        TrainConfig(compile="inductor", deterministic=True)


@pytest.mark.parametrize(
    ("options", "found", "plan"),
    [
        ({}, {"device": "cpu"}, Plan()),
        ({}, {"device": "mps"}, Plan()),
        ({"compile": "none"}, {}, Plan()),
        ({"compile": "inductor"}, {"device": "cpu"}, Plan(inductor="now")),
        ({"compile": "inductor"}, {"num_processes": 2}, Plan(inductor="now")),
        ({}, {}, Plan(graphs=True, inductor="if it pays")),
        ({}, {"mixed_precision": "no"}, Plan(graphs=True, inductor="if it pays")),
        ({"compile": "graphs"}, {}, Plan(graphs=True, inductor="if it pays")),
        ({"deterministic": True}, {}, Plan(graphs=True, inductor="never")),
    ],
)
def test_plans(options, found, plan):
    assert compiling.make_plan(TrainConfig(**options), accelerator(**found)) == plan


@pytest.mark.parametrize(
    ("options", "found", "word"),
    [
        ({}, {"num_processes": 2, "distributed_type": "MULTI_GPU"}, "several processes"),
        ({}, {"distributed_type": "FSDP"}, "FSDP"),
        ({"compile": "graphs"}, {"mixed_precision": "fp16"}, "loss scaler of fp16"),
        ({"immiscible": True}, {}, "immiscible assigns"),
        ({"gradient_checkpointing": True, "dropout": 0.1}, {}, "gradient_checkpointing keeps"),
    ],
)
def test_what_cannot_be_captured_runs_without_and_says_why(options, found, word):
    plan = compiling.make_plan(TrainConfig(**options), accelerator(**found))
    assert not plan.graphs and plan.inductor == "never"
    assert plan.reason.startswith("steps are not captured as a CUDA graph: ") and word in plan.reason


class Step:
    """A step with the methods of `TrainingStep`."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = self.network = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.125)
        self.state = self.model.parameters

    def __call__(self, parts, numbers, twice=False):
        x = parts[0].items
        y = self.network(x + numbers.first[0] / 64)
        loss = F.mse_loss(self.network(y) if twice else y, x)
        loss.backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p.sub_((0.125 if numbers.rates is None else numbers.rates[0]) * p.grad)
                p.grad = None
        return loss.detach()

    def drop_gradients(self):
        for p in self.model.parameters():
            p.grad = None


class Card(Tape):
    """A stand-in whose replays take `busy` seconds, and on which `idle` seconds pass after each."""

    def __init__(self, busy, idle=0.0):
        self.now = 0.0
        super().__init__(clock=lambda: self.now)
        self.busy, self.idle = busy, idle

    def capture(self, work):
        plain = super().capture(work)

        def replay():
            self.now += self.busy
            return plain()

        return replay


def run(busy, steps, idle=0.0, broken=False, monkeypatch=None, twice=False, pause=None):
    """Run 60 steps of a run that has `steps` left -> (losses, losses of eager steps, lines, models compiled).

    With `pause`, samples or a save take 10 s after that step."""
    compiled, lines = [], []

    def stand_in(model, **options):
        compiled.append(model)
        if broken:
            raise_at = lambda x: (_ for _ in ()).throw(RuntimeError("no compiler\nat all"))  # noqa: E731
            return raise_at
        return lambda x: model(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    step, plain, card = Step(), Step(), Card(busy, idle)
    runner = Runner(step, Plan(graphs=True, inductor="if it pays"), card, lines.append)
    made, expected = [], []
    for k in range(60):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        numbers, conditioned = StepNumbers([k], None), twice and k % 2 == 1
        made.append(runner([Batch(x, [])], numbers, conditioned, steps - k))
        expected.append(plain([Batch(x, [])], numbers, conditioned))
        card.now += card.idle
        if k == pause:
            card.now += 10.0
            runner.paused()
    return torch.stack(made), torch.stack(expected), lines, compiled, step, runner.graphs


PAYS = INDUCTOR_SECONDS / INDUCTOR_SAVES  # seconds of replays from which compiling pays


@pytest.mark.parametrize("twice", [False, True])
def test_a_long_run_is_compiled_once_its_first_replays_say_so(monkeypatch, twice):
    made, expected, lines, compiled, step, graphs = run(
        0.06, int(PAYS / 0.06) + 60, monkeypatch=monkeypatch, twice=twice
    )
    assert torch.equal(made, expected)
    assert compiled == [step.model] and step.network is not step.model
    (line,) = lines
    assert line.startswith("compiling the model by inductor, which takes about 72 s: a step takes 60.0 ms")
    assert graphs.captures == 2 * (1 + twice) and graphs.replaying


def test_a_short_run_is_not(monkeypatch):
    steps = int(PAYS / 0.06)
    made, expected, lines, compiled, *_ = run(0.06, steps, monkeypatch=monkeypatch)
    assert torch.equal(made, expected) and not compiled
    (line,) = lines
    assert line.startswith(
        "captured steps are not compiled by inductor: a step takes 60.0 ms, compiled perhaps 29.0 ms"
    )


def test_a_run_that_waits_for_its_data_is_not(monkeypatch):
    made, expected, lines, compiled, *_ = run(0.06, 10**9, idle=0.06, monkeypatch=monkeypatch)
    assert torch.equal(made, expected) and not compiled
    assert lines == [
        "captured steps are not compiled by inductor: a step takes 120.0 ms, of which the card computes 60.0 ms"
    ]


def test_a_save_among_the_first_replays_is_not_taken_for_waiting(monkeypatch):
    *_, lines, compiled, step, _ = run(0.06, 10**9, pause=15, monkeypatch=monkeypatch)
    assert compiled == [step.model] and lines[0].startswith("compiling the model by inductor")


def test_a_compiler_that_fails_costs_no_step(monkeypatch):
    made, expected, lines, compiled, step, graphs = run(0.06, 10**9, broken=True, monkeypatch=monkeypatch)
    assert torch.equal(made, expected) and len(compiled) == 1
    assert step.network is step.model and graphs.replaying
    assert lines[1:] == ["the model cannot be compiled by inductor: RuntimeError: no compiler"]


def test_the_choice_is_made_once_after_the_same_number_of_replays(monkeypatch):
    *_, graphs = run(0.06, 10**9, monkeypatch=monkeypatch)
    events = graphs.backend.events
    first = [i for i, event in enumerate(events) if event == "capture"]
    assert events[first[0] + 1 : first[1]].count("replay") == TIMED_STEPS + 1  # the capture's own is not timed


def test_inductor_by_name_compiles_at_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: model(x))
    step, plain = Step(), Step()
    runner = Runner(step, Plan(inductor="now"))
    assert step.network is not step.model
    parts = [Batch(torch.ones(2, 4), [])]
    assert torch.equal(runner(parts, StepNumbers([0], None), False, 10), plain(parts, StepNumbers([0], None)))
