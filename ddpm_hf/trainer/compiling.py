"""The choice of how steps run: eagerly, compiled by inductor, or captured as CUDA graphs."""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from ddpm_hf.data.loading import Batch
from ddpm_hf.trainer.device import on_card
from ddpm_hf.trainer.graphs import StepGraphs
from ddpm_hf.trainer.step import StepNumbers

# Measured on one H100 with torch 2.11 (dim 64, multipliers 1-2-4-8, bf16, batches of 128 x 3 x 64 x 64): compiling took
# 54 to 72 s, and the kernels of a step took 29 ms instead of 60.
INDUCTOR_SECONDS = 72.0
INDUCTOR_SAVES = 1 - 29 / 60
# Replays that are timed before that choice. A step that takes this many times as long as its kernels waits for
# something else (mostly the data), so that faster kernels would gain nothing.
TIMED_STEPS = 20
WAITING = 1.5


@dataclass(frozen=True)
class Plan:
    """How steps are to run.

    Attributes:
        graphs: capture steps as CUDA graphs.
        inductor: compile the model, "now", "if it pays" (decided from the first replays) or "never".
        reason: the line to print where steps are not captured though they might be; None elsewhere.
    """

    graphs: bool = False
    inductor: str = "never"
    reason: str | None = None


def check_choice(choice: str) -> None:
    """Check the option `compile` against the machine and accelerate's configuration.

    Raises:
        ValueError: graphs without a CUDA device, or a compiler chosen twice.
    """
    backend = _accelerate_backend()
    if backend != "NO" and choice in ("inductor", "graphs"):
        raise ValueError(
            f"compile must be auto or none where accelerate is configured to compile (dynamo_backend {backend}), "
            f"got {choice!r}"
        )
    if choice == "graphs" and not on_card():
        raise ValueError("compile must be auto, none or inductor without a CUDA device, got 'graphs'")


def _accelerate_backend() -> str:
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()


def make_plan(config, accelerator) -> Plan:
    """Return how the steps of a run are to run on the device that accelerate has found."""
    if config.compile == "none" or _accelerate_backend() != "NO":
        return Plan()
    if config.compile == "inductor":
        return Plan(inductor="now")
    if accelerator.device.type != "cuda":
        return Plan()
    obstacle = None
    if accelerator.num_processes > 1 or accelerator.distributed_type != DistributedType.NO:
        obstacle = "training runs on several processes, or through FSDP or DeepSpeed"
    elif accelerator.mixed_precision == "fp16":
        obstacle = "the loss scaler of fp16 reads a number from the device in each step"
    elif config.immiscible:
        obstacle = "immiscible assigns the noise on the host"
    elif config.gradient_checkpointing and config.dropout:
        obstacle = "gradient_checkpointing keeps the state of the random generator, for dropout, on the host"
    if obstacle:
        return Plan(reason=f"steps are not captured as a CUDA graph: {obstacle}")
    # inductor chooses kernels by timing them, so that two starts of a run may not compute the same bits
    return Plan(graphs=True, inductor="never" if config.deterministic else "if it pays")


class Runner:
    """Runs training steps in the form that a plan asks for, and changes to a faster form where that pays.

    Args:
        step: the `TrainingStep`, or another step with its methods; its `network` is what is compiled.
        plan: from `make_plan`.
        backend: captures steps: a `StepBackend`, or the tests' stand-in; for a plan with graphs.
        say: takes the lines for the user.

    Attributes:
        graphs: the captured steps, or None for a plan without graphs.
    """

    def __init__(self, step, plan: Plan, backend=None, say: Callable[[str], None] = print):
        self.step, self.plan, self.say = step, plan, say
        self.graphs = StepGraphs(self._work, backend, step.state, step.drop_gradients, say) if plan.graphs else None
        self._times: list[tuple] = []  # of timed replays: marks before and after
        self._undecided = plan.graphs and plan.inductor == "if it pays"
        self._plain = None  # the model that the compiled one was made of
        self._compiled: set[frozenset] = set()  # kinds of steps that have run with the compiled model
        if plan.inductor == "now":
            step.network = torch.compile(step.network, dynamic=False)

    def __call__(self, parts: Sequence[Batch], numbers: StepNumbers, self_condition: bool, steps_left: int) -> Tensor:
        """Do one step.

        Args:
            parts: as for `TrainingStep`.
            numbers: numbers of Python.
            self_condition: as for `TrainingStep`.
            steps_left: optimizer steps to the end of the run, this one included.
        """
        if self.graphs is None:
            return self.step(parts, numbers, self_condition)
        tensors = [x for part in parts for x in part.tensors().values()]
        tensors += self._on_device(numbers, tensors[0].device)
        fields = tuple(parts[0].tensors())
        choices = {"self_condition": self_condition, "averaging": numbers.share is not None, "fields": fields}
        if self._undecided and self.graphs.replaying:
            return self._timed(tensors, steps_left, choices)
        if self._plain is not None and frozenset(choices.items()) not in self._compiled:
            return self._try(tensors, choices)
        return self.graphs(tensors, **choices)

    def paused(self) -> None:
        """Take note that something else than steps took time: times before and after it are not compared."""
        self._times.clear()

    def set_aside(self) -> None:
        """Make room on the card for sampling and evaluations, which may also move what the graphs have addresses of."""
        self.paused()
        if self.graphs is not None:
            self.graphs.release(if_crowded=True)
            self.graphs.look_again()

    def _on_device(self, numbers: StepNumbers, device: torch.device) -> list[Tensor]:
        """Return the numbers as 0-d tensors. Kernels write them, so that nothing is copied from the host."""
        first = [torch.full((), number, dtype=torch.int64, device=device) for number in numbers.first]
        rates = [group["lr"] for group in self.step.optimizer.param_groups]
        return first + [torch.full((), number, device=device) for number in (*rates, numbers.share or 0.0)]

    def _work(self, *tensors: Tensor, self_condition: bool, averaging: bool, fields: tuple[str, ...]) -> Tensor:
        """Do one step on tensors: those of each part, by `fields`, then the numbers as `_on_device` has them."""
        groups, width = len(self.step.optimizer.param_groups), len(fields)
        count = (len(tensors) - groups - 1) // (width + 1)
        data, first, rates = tensors[: count * width], tensors[count * width : -groups - 1], tensors[-groups - 1 : -1]
        parts = [
            Batch(skipped=[], **dict(zip(fields, data[start : start + width]))) for start in range(0, len(data), width)
        ]
        numbers = StepNumbers(first, tensors[-1] if averaging else None, torch.stack(rates))
        return self.step(parts, numbers, self_condition)

    def _timed(self, tensors: Sequence[Tensor], steps_left: int, choices: dict) -> Tensor:
        backend, captures = self.graphs.backend, self.graphs.captures
        before = backend.mark()
        values = self.graphs(tensors, **choices)
        if self.graphs.captures == captures and self.graphs.replaying:  # a replay and nothing else
            self._times.append((before, backend.mark()))
        else:
            self._times.clear()
        if len(self._times) == TIMED_STEPS:
            self._undecided = False
            busy = statistics.median(backend.seconds(a, b) for a, b in self._times)
            period = backend.seconds(self._times[0][0], self._times[-1][0]) / (TIMED_STEPS - 1)
            self._decide(busy, period, steps_left - 1)
        return values

    def _decide(self, busy: float, period: float, steps_left: int) -> None:
        """Compile if that is expected to save more time than it takes; the times are those of one step, in seconds."""
        if period > WAITING * busy:
            self.say(
                f"captured steps are not compiled by inductor: a step takes {1e3 * period:.1f} ms, of which the card "
                f"computes {1e3 * busy:.1f} ms"
            )
            return
        saved = INDUCTOR_SAVES * busy * steps_left
        times = f"a step takes {1e3 * busy:.1f} ms, compiled perhaps {1e3 * busy * (1 - INDUCTOR_SAVES):.1f} ms"
        if saved <= INDUCTOR_SECONDS:
            self.say(
                f"captured steps are not compiled by inductor: {times}, which saves {saved:.0f} s in {steps_left:,} "
                f"steps; compiling takes about {INDUCTOR_SECONDS:.0f} s"
            )
            return
        self.say(
            f"compiling the model by inductor, which takes about {INDUCTOR_SECONDS:.0f} s: {times}, which saves "
            f"{saved:.0f} s in {steps_left:,} steps"
        )
        self._plain = self.step.network
        self.step.network = torch.compile(self._plain, dynamic=False)
        self.graphs.restart()

    def _try(self, tensors: Sequence[Tensor], choices: dict) -> Tensor:
        """Do a step whose model still has to be compiled; nothing is lost if that fails."""
        try:
            values = self.graphs(tensors, **choices)
        except Exception as error:  # of the compiler, before the optimizer has changed a weight
            self.graphs.drop_gradients()
            self.step.network, self._plain = self._plain, None
            self.graphs.restart()
            lines = str(error).strip().splitlines() or ["no message"]
            self.say(f"the model cannot be compiled by inductor: {type(error).__name__}: {lines[0]}")
            return self.graphs(tensors, **choices)
        self._compiled.add(frozenset(choices.items()))
        return values
