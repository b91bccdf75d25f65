"""Batches on their way to a card: copied on a stream of their own, while the step before is computed."""

from dataclasses import dataclass

import torch
from torch import Tensor


class CopyStream:
    """The stream of the copies to one card. The tests' stand-in has the same methods and runs on CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def allocate(self, like: Tensor) -> Tensor:
        """Return a tensor on the card, shaped as `like`, that the copies may write to."""
        buffer = torch.empty_like(like, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been used by a step
        buffer.record_stream(self.stream)
        return buffer

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy from pinned memory without waiting; steps that are launched from now on wait for it."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def mark(self) -> torch.cuda.Event:
        """Return an event at the end of the steps that have been launched; its `synchronize` waits for it."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


@dataclass
class _Place:
    """A tensor on the card, and the event at the end of the step that read it last."""

    buffer: Tensor | None = None
    read: torch.cuda.Event | None = None


class Transfer:
    """Copies batches into buffers on the card, which are used in turn.

    There are buffers for two steps. Before one is written again, the host waits for the step that read it, so that it
    is never more than two steps ahead of the card, and the memory of waiting batches is bounded.

    Args:
        stream: a `CopyStream`, or the stand-in of the tests.
        parts: batches in a step.
    """

    def __init__(self, stream: CopyStream, parts: int):
        self.stream, self.parts = stream, parts
        self._places = [_Place() for _ in range(2 * parts)]
        self._next = 0

    def __call__(self, items: Tensor) -> Tensor:
        """Return `items` on the card, valid for the steps that are launched until `launched` has been called twice."""
        place = self._places[self._next % len(self._places)]
        self._next += 1
        if place.read is not None:
            place.read.synchronize()
        if place.buffer is None or place.buffer.shape != items.shape or place.buffer.dtype != items.dtype:
            place.buffer = self.stream.allocate(items)
        self.stream.copy(items, place.buffer)
        return place.buffer

    def launched(self) -> None:
        """Take note that the step that reads the newest `parts` batches has been launched."""
        read = self.stream.mark()
        for number in range(self._next - self.parts, self._next):
            self._places[number % len(self._places)].read = read
