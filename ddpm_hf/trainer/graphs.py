"""An optimizer step captured once as a CUDA graph and replayed from then on.

An eager step costs the host some 3,000 kernel launches; a replay costs it one. The rules of capturing are those of
torch's notes on CUDA semantics ("CUDA Graphs") and NVIDIA's "CUDA Graph Best Practice for PyTorch": warm up on a side
stream, keep inputs and state at their addresses, share one memory pool, read nothing back.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_hf.pipeline.graphs import CudaBackend

# Eager steps before the first capture, of all kinds together. Each kind of step runs eagerly twice before its capture:
# once to make what is made at first use, and once under a watch for reads by the host.
WARM_UP_STEPS = 3
# The beginnings of torch's warnings of a read by the host, and of the watch itself at its first use in a process: that
# it "does not yet detect all synchronizing operations".
READ, FIRST_USE = "called a synchronizing ", "Synchronization debug mode is a prototype"


class StepBackend(CudaBackend):
    """Streams, capture and replay on one graphics card, and what else the steps ask of it.

    The tests' stand-in has the same methods and runs on CPU.
    """

    @contextlib.contextmanager
    def watch(self, found: list[str]) -> Iterator[None]:
        """Append to `found` a message for each read by the host, and each copy that waits, that happens inside."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if READ in str(warning.message):
                found.append(f"{str(warning.message).splitlines()[0]} ({warning.filename}:{warning.lineno})")
            elif FIRST_USE not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def mark(self) -> torch.cuda.Event:
        """Return the moment at which the work so far is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the time between two moments; waits for the later one."""
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def crowded(self) -> bool:
        """Return True if this process holds more than half of the card's memory."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        return torch.cuda.memory_reserved(self.device) > total / 2


@dataclass
class Captured:
    """A captured step: `inputs`, the tensors that it reads, and the function that replays it."""

    inputs: list[Tensor]
    replay: Callable[[], Tensor]


class StepGraphs:
    """A step that runs eagerly at first and as a captured graph once it can be captured.

    Every call is one real step, whether it is run or replayed. A step that cannot be captured (it reads a number back,
    or the capture fails for another reason) runs eagerly for the rest of the run, and one line says why.

    Args:
        step: called as step(*tensors, **choices). It must do all its work on tensors of the device, change its state
            (weights, optimizer, average) in place, and return one tensor. It must follow from the choices alone which
            operations it runs; every number that changes from step to step must be in a tensor.
        backend: a `StepBackend`, or the stand-in of the tests.
        state: returns the tensors of the state. If one of them has moved, the graphs are captured again.
        drop_gradients: sets the gradients to None; called after a capture that failed.
        say: takes the line that says why steps are not captured.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        backend: StepBackend,
        state: Callable[[], Iterable[Tensor]],
        drop_gradients: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
    ):
        self.step, self.backend, self.state = step, backend, state
        self.drop_gradients, self.say = drop_gradients, say
        self.enabled = True
        self.captures = 0  # so far
        self._eager_runs: Counter[Hashable] = Counter()  # of each kind of step, in this form
        self._graphs: dict[Hashable, Captured] = {}
        self._addresses: tuple[int, ...] = ()
        self._look = False

    @property
    def replaying(self) -> bool:
        """True if some kind of step is captured."""
        return bool(self._graphs)

    def __call__(self, tensors: Sequence[Tensor], **choices: Hashable) -> Tensor:
        """Do one step.

        Args:
            tensors: the step's inputs, on the device. They are not changed, and may be freed at once.
            choices: what selects the operations of the step, such as `self_condition`.

        Returns:
            What the step returns, in memory of its own.
        """
        if not self.enabled:
            return self.step(*tensors, **choices)
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        kind = (shapes, tuple(sorted(choices.items())))
        if self._look:
            self._look = False
            if self._graphs and self._state_addresses() != self._addresses:
                self.release()
        if kind not in self._graphs:
            if self._eager_runs[kind] < 2 or self._eager_runs.total() < WARM_UP_STEPS:
                return self._run_eagerly(kind, tensors, choices)
            if not self._capture(kind, tensors, choices):
                return self.step(*tensors, **choices)
        captured = self._graphs[kind]
        for held, x in zip(captured.inputs, tensors, strict=True):
            held.copy_(x, non_blocking=True)
        # the next replay, of this or of another graph of the same pool, writes over the result
        return captured.replay().clone()

    def _run_eagerly(self, kind: Hashable, tensors: Sequence[Tensor], choices: dict) -> Tensor:
        reads: list[str] = []
        watch = self.backend.watch(reads) if self._eager_runs[kind] else contextlib.nullcontext()
        with watch, self.backend.aside():
            result = self.step(*tensors, **choices)
        self._eager_runs[kind] += 1
        if reads:
            self._give_up(reads[0])
        return result

    def _capture(self, kind: Hashable, tensors: Sequence[Tensor], choices: dict) -> bool:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
        for held, x in zip(inputs, tensors):
            held.copy_(x)
        try:
            replay = self.backend.capture(lambda: self.step(*inputs, **choices))
        except Exception as error:  # a read by the host, memory, a library that allocates: any ends the capture
            self.drop_gradients()
            cause = error.__context__ or error  # ending the capture raises another one
            self._give_up(f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no message'])[0]}")
            return False
        self._graphs[kind] = Captured(inputs, replay)
        self._addresses = self._state_addresses()
        self.captures += 1
        return True

    def _give_up(self, reason: str) -> None:
        self.enabled = False
        self.release()
        self.say(f"steps are not captured as a CUDA graph: {reason}")

    def _state_addresses(self) -> tuple[int, ...]:
        return tuple(x.data_ptr() for x in self.state())

    def look_again(self) -> None:
        """Compare the addresses of the state before the next step; to be called after what might have moved it."""
        self._look = True

    def release(self, if_crowded: bool = False) -> None:
        """Forget the graphs and free their memory; the next steps are captured again without a new warm-up.

        Args:
            if_crowded: only if this process holds more than half of the card's memory.
        """
        if not self._graphs or (if_crowded and not self.backend.crowded()):
            return
        self.backend.free(self._graphs)

    def restart(self) -> None:
        """Warm up and capture anew, because the step has another form from here on (a compiled model)."""
        self.release()
        self._eager_runs.clear()
