"""Requests to stop a run: SIGTERM (a scheduler's), SIGINT (Ctrl-C), and the end of the launcher that started it."""

import os
import select
import signal
import stat
import threading
import time

import torch


class StopAsked(Exception):
    """Ends samples or an evaluation between two batches, because the run is to stop."""


class StopRequest:
    """A context in which SIGTERM and SIGINT are only remembered, so that the loop can save and stop.

    A second Ctrl-C ends the program at once. A second SIGTERM does not: schedulers signal every process of a job, and
    torch's launcher then passes on the signal that it received itself. Under that launcher the same holds for Ctrl-C.

    Args:
        launcher: the process number of the parent whose end counts as a request; None if its end does not count.
        accelerator: accelerate's `Accelerator`, through which processes agree; None if this process is alone.

    Attributes:
        received: the name of the signal or event that asked to stop, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, launcher: int | None = None, accelerator=None):
        self.received: str | None = None
        self.launcher, self.accelerator = launcher, accelerator
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number in list(self._before):
            self._restore(number)

    def asked(self) -> bool:
        """Return True if the run is to stop; called after each step."""
        # another process has adopted this one
        if self.received is None and self.launcher is not None and os.getppid() != self.launcher:
            self.received = "the end of its launcher"
            drop_broken_output()
        return self.received is not None

    def asked_anywhere(self) -> bool:
        """Return True if any process is to stop; called by all processes together, which get the same answer."""
        acc, asked = self.accelerator, self.asked()
        if acc is None or acc.num_processes == 1:
            return asked
        return acc.reduce(torch.tensor(float(asked), device=acc.device), "sum").item() > 0

    def check(self) -> None:
        """Raise `StopAsked` on all processes if any is to stop; called by all of them together."""
        if self.asked_anywhere():
            raise StopAsked

    def _restore(self, number: int) -> None:
        if number in self._before:
            signal.signal(number, self._before.pop(number))

    def _handle(self, number: int, frame) -> None:
        self.received = self.received or signal.Signals(number).name
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._restore(signal.SIGINT)
        drop_broken_output()


def drop_broken_output() -> None:
    """Discard further output if the program that reads it has ended, so that printing does not fail before the save.

    A scheduler signals the `tee` behind a program together with the program.
    """
    for descriptor in (1, 2) if hasattr(select, "poll") else ():
        try:
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                continue
        except OSError:  # it is closed
            continue
        time.sleep(0.1)  # the reader may have got the same signal just now
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
