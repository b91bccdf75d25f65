"""The bookkeeping of captured steps, on CPU, with a stand-in that records operations and replays them.

The stand-in (tape.py) freezes what a CUDA graph freezes: addresses, Python numbers and the choice of operations. So
equality with eager steps, bit for bit, shows that everything that changes from step to step reaches the graph.
"""

import copy
import warnings

import pytest
import torch
from tape import Tape
from torch import nn
from torch.nn import functional as F

from ddpm_hf.trainer.graphs import WARM_UP_STEPS, StepBackend, StepGraphs


class Training:
    """A small model with dropout, momentum, and an average; rate and decay are tensors."""

    def __init__(self, every=1):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 6))
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.weights, lr=torch.tensor(0.0))  # for its state alone
        self.average = [w.detach().clone() for w in self.weights]
        self.every = every

    def state(self):
        moments = [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        return [*self.weights, *moments, *self.average, self.optimizer.param_groups[0]["lr"]]

    def step(self, x, number, decay, twice, averaging):
        hidden = self.model(x).detach() if twice else 0
        noise = torch.sin(number * torch.arange(6.0))
        loss = F.mse_loss(self.model(x + noise + hidden), x)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, 0.05)
        for w, m in zip(self.weights, self.average):
            self.update(w)
            if averaging:
                m.lerp_(w.detach(), 1 - decay)
        self.drop_gradients()
        return torch.stack((loss.detach(), norm))

    @torch.no_grad()
    def update(self, w):
        state = self.optimizer.state[w]
        if not state:
            state["momentum"] = torch.zeros_like(w)
        state["momentum"].mul_(0.9).add_(w.grad)
        w.sub_(self.optimizer.param_groups[0]["lr"] * state["momentum"])

    def drop_gradients(self):
        for w in self.weights:
            w.grad = None

    def inputs(self, k):
        g = torch.Generator().manual_seed(k)
        self.optimizer.param_groups[0]["lr"].fill_(0.1 / (k + 1))
        torch.manual_seed(100 + k)  # for dropout
        tensors = (torch.randn(5, 6, generator=g), torch.tensor(float(k)), torch.tensor(1 - 1 / (k + 2)))
        return tensors, {"twice": k % 3 == 1, "averaging": k % self.every == 0}


def run(training, call, steps, between=lambda k: None):
    results = []
    for k in steps:
        tensors, choices = training.inputs(k)
        results.append(call(tensors, **choices))
        between(k)
    return torch.stack(results)


def eager(training, steps, between=lambda k: None):
    return run(training, lambda tensors, **choices: training.step(*tensors, **choices), steps, between)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


def graphs_of(training, **options):
    tape = Tape()
    lines = []
    graphs = StepGraphs(training.step, tape, training.state, training.drop_gradients, lines.append, **options)
    return graphs, tape, lines


@pytest.mark.parametrize("every", [1, 2])
def test_twenty_steps_are_bit_for_bit_the_eager_ones(every):
    """Rate, decay, step number, dropout, self-conditioning and skipped averages change from step to step."""
    a, b = Training(every), Training(every)
    graphs, tape, lines = graphs_of(b)
    assert torch.equal(eager(a, range(20)), run(b, graphs, range(20)))
    assert same(a, b) and not lines
    kinds = 2 if every == 1 else 4
    assert graphs.captures == tape.events.count("capture") == kinds
    # every step happened once: eagerly or replayed
    assert tape.events.count("aside") + tape.events.count("replay") == 20
    assert tape.events.count("aside") == max(2 * kinds, WARM_UP_STEPS)


def test_results_stay_as_they_are_when_the_next_step_runs():
    a, b = Training(), Training()
    graphs, *_ = graphs_of(b)
    kept = []
    run(b, lambda tensors, **choices: kept.append(graphs(tensors, **choices)) or torch.zeros(()), range(12))
    assert torch.equal(torch.stack(kept), eager(a, range(12)))


def test_given_tensors_are_left_alone_and_may_be_freed():
    b = Training()
    graphs, *_ = graphs_of(b)
    run(b, graphs, range(12))
    tensors, choices = b.inputs(12)
    before = [x.clone() for x in tensors]
    graphs(tensors, **choices)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))
    held = [x.data_ptr() for graph in graphs._graphs.values() for x in graph.inputs]
    assert not set(held) & {x.data_ptr() for x in tensors}


def test_weights_swapped_by_copy_need_no_new_capture():
    """An evaluation puts the average into the weights and takes it out again."""

    def look(training, graphs=None):
        def between(k):
            if k % 5 == 4:
                with torch.no_grad():
                    stored = [w.clone() for w in training.weights]
                    for w, m in zip(training.weights, training.average):
                        w.copy_(m)
                    training.model.eval()(torch.ones(2, 6))
                    for w, s in zip(training.model.train().parameters(), stored):
                        w.copy_(s)
                if graphs is not None:
                    graphs.look_again()

        return between

    a, b = Training(), Training()
    graphs, tape, _ = graphs_of(b)
    assert torch.equal(eager(a, range(20), look(a)), run(b, graphs, range(20), look(b, graphs)))
    assert same(a, b) and graphs.captures == 2


def test_state_that_moves_is_captured_again():
    """A checkpoint that is loaded gives the optimizer new tensors; weights can be assigned."""

    def load(training, graphs=None):
        def between(k):
            if k == 9:
                training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
            if k == 14:
                training.weights[0].data = training.weights[0].data.clone()
            if graphs is not None:
                graphs.look_again()

        return between

    a, b = Training(), Training()
    graphs, tape, _ = graphs_of(b)
    assert torch.equal(eager(a, range(20), load(a)), run(b, graphs, range(20), load(b, graphs)))
    assert same(a, b)
    assert graphs.captures == 6  # two kinds, three times
    assert tape.events.count("aside") == 4  # with no second warm-up


def test_a_checkpoint_that_is_saved_and_gone_on_from_elsewhere():
    a, b = Training(), Training()
    graphs, *_ = graphs_of(b)
    whole = eager(a, range(20))
    run(b, graphs, range(10))
    c = Training()
    c.model.load_state_dict(b.model.state_dict())
    c.optimizer.load_state_dict(copy.deepcopy(b.optimizer.state_dict()))
    c.average = [m.clone() for m in b.average]
    resumed, *_ = graphs_of(c)
    assert torch.equal(run(c, resumed, range(10, 20)), whole[10:])
    assert same(a, c)


def test_batches_of_another_shape_are_another_kind():
    b = Training()
    graphs, tape, _ = graphs_of(b)

    def smaller(tensors, **choices):
        x, *others = tensors
        return graphs((x[:3].contiguous(), *others), twice=False, averaging=True)

    for _ in range(3):
        run(b, lambda tensors, **c: graphs(tensors, twice=False, averaging=True), range(4))
        run(b, smaller, range(4))
    assert graphs.captures == 2


def test_memory_is_freed_where_it_is_short():
    a, b = Training(), Training()
    graphs, tape, _ = graphs_of(b)

    def between(k):
        graphs.release(if_crowded=True)
        if k == 12:
            assert graphs.replaying and "free" not in tape.events
            tape.full = True
            graphs.release(if_crowded=True)
            assert not graphs.replaying and tape.events.count("free") == 1
            tape.full = False

    assert torch.equal(eager(a, range(20)), run(b, graphs, range(20), between))
    assert graphs.captures == 4 and tape.events.count("aside") == 4


def test_a_step_that_reads_a_number_is_seen_before_it_is_captured():
    a, b = Training(), Training()
    plain = b.step
    b.step = lambda *tensors, **choices: (tensors[1].item(), plain(*tensors, **choices))[1]
    graphs, tape, lines = graphs_of(b)
    assert torch.equal(eager(a, range(8)), run(b, graphs, range(8)))
    assert same(a, b) and not graphs.enabled and graphs.captures == 0
    assert "capture" not in tape.events
    assert lines == [
        "steps are not captured as a CUDA graph: called a synchronizing operation: aten._local_scalar_dense.default"
    ]


FIRST_USE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
READ = "called a synchronizing CUDA operation (Triggered internally at Copy.cpp:1.)"


@pytest.mark.filterwarnings("always")  # also where pytest is told to ignore warnings
@pytest.mark.parametrize("reads", [False, True])
def test_the_first_watch_of_a_process_finds_reads_alone(reads, monkeypatch):
    """torch 2.11 and 2.14 warn in these words: of the mode itself, once a process, and of each read."""
    modes = [0]

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 2:
            warnings.warn(FIRST_USE, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    found = []
    with warnings.catch_warnings(record=True) as passed_on, StepBackend.watch(None, found):
        warnings.warn("another one", stacklevel=1)
        if reads:
            warnings.warn(READ, stacklevel=1)
    assert [message.startswith(READ) for message in found] == [True] * reads
    assert modes == [0, "warn", 0] and [str(warning.message) for warning in passed_on] == ["another one"]


def test_a_capture_that_fails_is_an_eager_step():
    """Also where the failure comes after the gradients: none of it counts."""
    a, b = Training(), Training()
    plain, failed = b.step, []

    def step(*tensors, **choices):
        result = plain(*tensors, **choices)
        if "capture" in tape.events and not failed:
            failed.append(True)
            for w in b.weights:
                w.grad = torch.full_like(w, torch.nan)
            raise RuntimeError("out of something\nwith a second line")
        return result

    b.step = step
    graphs, tape, lines = graphs_of(b)
    assert torch.equal(eager(a, range(12)), run(b, graphs, range(12)))
    assert same(a, b)
    assert lines == ["steps are not captured as a CUDA graph: RuntimeError: out of something"]
    assert tape.events.count("capture") == 1


def test_another_form_of_the_step_is_warmed_up_and_captured_anew():
    a, b = Training(), Training()
    graphs, tape, _ = graphs_of(b)
    assert torch.equal(eager(a, range(20)), run(b, graphs, range(20), lambda k: graphs.restart() if k == 9 else None))
    assert same(a, b) and graphs.captures == 4 and tape.events.count("aside") == 8


def test_the_stand_in_freezes_what_a_graph_freezes():
    """Numbers of Python stay those of the capture, tensors are read anew, a capture changes nothing."""
    x, scale, total = torch.ones(3), torch.tensor(2.0), torch.zeros(3)
    number = [10.0]
    tape = Tape()
    replay = tape.capture(lambda: total.add_(x * scale * number[0]).sum())
    assert total.sum() == 0
    number[0] = 1000.0
    scale.fill_(3.0)
    assert replay() == 90 and replay() == 180
    with pytest.raises(RuntimeError, match="not permitted"):
        tape.capture(lambda: x * x.sum().item())
