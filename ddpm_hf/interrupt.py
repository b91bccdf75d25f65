"""Signals that ask a run to stop: SIGTERM (a scheduler's) and SIGINT (Ctrl-C)."""

import signal
import threading


class StopRequest:
    """Within it, the first SIGTERM or SIGINT is only remembered, so that the loop can save and stop; a second one acts.

    `received` is the signal's name, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: str | None = None
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        self._restore()
