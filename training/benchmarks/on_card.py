"""The benchmark's table for a graphics card: ours in each form, denoising-diffusion-pytorch, and a stock U-Net.

Every contender is checked before it is timed: predictions of a call against the peer's in float32, the norms of float32
gradients against the peer's, and the losses and gradient norms of the first training steps against those of the same
side in its eager form. The stock U-Net is another model and has one form, so that it is not checked.

The limit of time is kept by leaving rows out, which are named at the end.
"""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import report
import torch
from contenders import TRAINING, WARM_UP, Contender, Task, operations, outputs, save_weights
from measures import rate_of_products
from pictures import make_jpegs

from ddpm_hf import UNet1D, UNet2D

# What is measured, in the order of its importance.
ROWS = (
    ("step", (128, 3, 64, 64)), ("call", (64, 3, 64, 64)), ("call", (1, 3, 64, 64)), ("sample", (64, 3, 64, 64)),
    ("step", (128, 3, 32, 32)), ("step", (32, 32, 128)), ("folder", (64, 3, 64, 64)),
)  # fmt: skip
# On CPU the program can be tried, nothing more.
ROWS_ON_CPU = (
    ("step", (2, 3, 16, 16)), ("call", (1, 3, 16, 16)), ("sample", (1, 3, 16, 16)), ("step", (2, 32, 16)),
    ("folder", (2, 3, 16, 16)),
)  # fmt: skip
PICTURES = 2000  # of about twice the side of a batch's images, in a row "folder"
PEER_STEPS = 250  # DDIM calls of denoising-diffusion-pytorch's README
PEER_PART = 10  # of its chain, whose calls are alike, this part is timed
FAST_STEPS = 12  # calls of our fast sampler, for that distance (docs/studies.md)
QUEUED = 10  # runs that are queued when a step is timed: the peer's average is updated every tenth step
PROFILED = 2  # runs under the profiler
# Seconds that must be left for a row. Compiling took 54 to 72 s a model on one H100 (torch 2.11), so a compiled row may
# not be ready in this time: then it is left out, and nothing else was to follow.
ROW_SECONDS, COMPILED_ROW_SECONDS = 25, 60
ALLOWED_ERROR = 0.02  # of a prediction in bfloat16 or float16, of its norm
ALLOWED_CHANGE = 0.05  # of losses and gradient norms between the forms of one side, in bfloat16 or float16


@dataclass(frozen=True)
class Entry:
    """One contender of the table: a side in one form, for some kinds of rows."""

    side: str
    form: str
    name: str
    kinds: tuple = ("step", "call", "sample", "folder")

    def task(self, base: Task) -> Task:
        """Return its task in the row of `base`, the peer's task."""
        if self.side == "peer":
            return replace(base, form=self.form)
        steps = FAST_STEPS if base.what == "sample" else base.steps
        return replace(base, side=self.side, form=self.form, dtype="bfloat16", steps=steps)


PEER = Entry("peer", "eager", "peer, amp")
EAGER = (
    PEER,
    Entry("ours", "eager", "ours, eager"),
    Entry("ours", "graphs", "ours, graphs"),
    Entry("stock", "graphs", "stock U-Net in our trainer, graphs", ("step",)),
    Entry("stock", "eager", "stock U-Net, eager", ("call",)),
)
COMPILED = (
    Entry("ours", "inductor", "ours, inductor", ("step", "call")),
    Entry("ours", "graphs + inductor", "ours, graphs + inductor", ("step", "call", "folder")),
    Entry("peer", "graphs + inductor", "peer, amp, reduce-overhead", ("step", "call")),
)


class Budget:
    """The time that is left, and what was left out for lack of it."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, clock() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, seconds: float, what: str) -> bool:
        """Return True if so many seconds are left; note `what` as left out if not."""
        if self.end - self.clock() >= seconds:
            return True
        self.left_out.append(f"{what}: the time was over")
        return False


class Crew:
    """The contenders' processes: one for each entry, which serves all rows; another one after a failure."""

    def __init__(self, entries: tuple[Entry, ...]):
        self.processes = {entry: Contender() for entry in entries}  # they import side by side

    def __getitem__(self, entry: Entry) -> Contender:
        if entry not in self.processes:
            self.processes[entry] = Contender()
        return self.processes[entry]

    def end(self, entry: Entry) -> None:
        """End the process of an entry."""
        self.processes.pop(entry).close()

    def close(self) -> None:
        """End all processes."""
        for entry in list(self.processes):
            self.end(entry)


def name_of_row(what: str, shape: tuple) -> str:
    """Return the name of a row, such as "step 128x3x64x64"."""
    return f"{what} {'x'.join(map(str, shape))}"


@contextmanager
def base_task(options, what: str, shape: tuple) -> Iterator[Task]:
    """Give the peer's task of a row, with its files (weights, pictures) as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        steps = PEER_STEPS // PEER_PART if what == "sample" else 1
        task = Task("peer", what, shape, "float16", device=options.device, threads=options.threads, steps=steps)
        if what == "folder":
            pictures = Path(folder) / "pictures"
            pictures.mkdir()
            make_jpegs(pictures, PICTURES, side=2 * shape[-1])
            task = replace(task, pictures=str(pictures))
        yield save_weights(task, Path(folder))


def build(entries: list[Entry], crew: Crew, base: Task, budget: Budget, together: bool) -> dict[Entry, list]:
    """Build the tasks of a row; return what the first runs gave. Those that fail are left out and named.

    Args:
        together: build all side by side, because they compile for long; otherwise one after the other, so that cuDNN
            chooses its algorithms on an idle card.
    """
    found = {}
    if together:
        for entry in entries:
            crew[entry].tell("build", entry.task(base), WARM_UP)
    for entry in entries:
        if not together:
            crew[entry].tell("build", entry.task(base), WARM_UP)
        with leaving_out(entry, crew, base, budget):
            found[entry] = crew[entry].answer(budget.end)
    return found


@contextmanager
def leaving_out(entry: Entry, crew: Crew, base: Task, budget: Budget) -> Iterator[None]:
    """Let a contender that fails inside be left out and named, and end its process."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        budget.left_out.append(f"{name_of_row(base.what, base.shape)}, {entry.name}: {reason}")
        print(f"{budget.left_out[-1]}\n{error}", file=sys.stderr, flush=True)
        crew.end(entry)


def check(found: dict[Entry, list], base: Task, expected: np.ndarray | None, eager: dict[str, list]) -> dict:
    """Return the error of each contender in its first runs: of the prediction, or of losses and gradient norms.

    Args:
        found: what `build` returned.
        base: the peer's task.
        expected: the peer's prediction in float32, for a call.
        eager: losses and norms of the first steps of each side in its eager form, for a training step.
    """
    compared = {} if base.what == "sample" else {e: values for e, values in found.items() if e.side != "stock"}
    if base.what == "call":
        return {e: float(np.linalg.norm(v - expected) / np.linalg.norm(expected)) for e, v in compared.items()}
    return {e: largest_change(v, eager[e.side]) if e.side in eager else math.nan for e, v in compared.items()}


def largest_change(values: list, eager: list) -> float:
    """Return the largest relative difference of [loss, norm] pairs. A scaled loss may overflow in the first steps, so
    norms are compared where both are finite; losses must be."""
    a, b = np.array(values), np.array(eager)
    if not np.isfinite(a[:, 0]).all():
        return math.inf
    compared = np.isfinite(a) & np.isfinite(b)
    return float((np.abs(a - b)[compared] / np.abs(b)[compared]).max())


def measure(entries: list[Entry], crew: Crew, base: Task, options, budget: Budget) -> dict[Entry, dict]:
    """Measure the contenders of a row in turn; return {"step s", "host s", ...} of each, medians of the rounds."""
    queued = 1 if base.what == "sample" or base.device_type == "cpu" else QUEUED
    steps, hosts = ({entry: [] for entry in entries} for _ in range(2))
    found = {}
    for _ in range(options.rounds):
        for entry in [entry for entry in entries if entry in crew.processes]:
            with leaving_out(entry, crew, base, budget):
                steps[entry].append(crew[entry].ask("seconds", queued, until=budget.end))
                hosts[entry].append(crew[entry].ask("host", until=budget.end))
    for entry in [entry for entry in entries if entry in crew.processes]:
        with leaving_out(entry, crew, base, budget):
            values = {"step s": statistics.median(steps[entry]), "host s": statistics.median(hosts[entry])}
            values["memory"] = crew[entry].ask("peak", until=budget.end)
            if not options.quick:
                work = crew[entry].ask("device_work", PROFILED, until=budget.end)
                values["device s"], values["kernels"] = work or (None, None)
            crew[entry].ask("drop", until=budget.end)
            found[entry] = values
    return found


def row_of(entry: Entry, base: Task, values: dict, peer: dict | None, rate: float, error: float | None) -> dict:
    """Return a line of the table from what was measured.

    Args:
        entry, base: the contender, and the peer's task of the row.
        values: what `measure` has found of the contender.
        peer: what it has found of the peer by `amp`, or None.
        rate: operations per second of the card in products of bfloat16 matrices.
        error: from `check`, or None.
    """
    parts = PEER_PART if base.what == "sample" and entry.side == "peer" else 1
    seconds = values["step s"] * parts
    share = None
    if entry.side != "stock" and base.what != "sample":
        kind = UNet2D if len(base.shape) == 4 else partial(UNet1D, in_channels=base.shape[1])
        share = operations(kind, base.shape) * (3 if base.what in TRAINING else 1) / seconds / rate
    device, kernels = values.get("device s"), values.get("kernels")
    return {
        "what": name_of_row(base.what, base.shape),
        "contender": entry.name,
        "ms": 1e3 * seconds,
        "device ms": None if device is None else 1e3 * device * parts,
        "host ms": 1e3 * values["host s"] * parts,
        "kernels": None if kernels is None else round(kernels * parts),
        "share of bf16 rate": share,
        "peak GB": values["memory"] / 1e9,
        "ratio to peer": None
        if peer is None
        else peer["step s"] * (PEER_PART if base.what == "sample" else 1) / seconds,
        "error": error,
    }


class Table:
    """The rows that are measured so far, and what belongs to a row from its first contenders to its compiled ones."""

    def __init__(self, options, budget: Budget, check_gradients: Callable[[Task], None]):
        self.options, self.budget, self.check_gradients = options, budget, check_gradients
        size, runs = (256, 1) if options.device == "cpu" else (8192, 10)
        self.rate = rate_of_products("bfloat16", options.device, size, runs, 5)
        self.peers: dict[str, dict] = {}  # what was measured of the peer by `amp`
        self.expected: dict[str, np.ndarray] = {}  # its predictions in float32
        self.eager: dict[str, dict[str, list]] = {}  # losses and norms of the first steps of each side
        self.lines: dict[str, list[dict]] = {}
        self.wrong: list[str] = []  # contenders whose results are not those that they should be

    def add(self, crew: Crew, what: str, shape: tuple, entries: tuple[Entry, ...], together: bool) -> None:
        """Build, check and measure contenders of one row."""
        name, entries = name_of_row(what, shape), [entry for entry in entries if what in entry.kinds]
        entries = [entry for entry in entries if entry.side != "stock" or len(shape) == 4]
        with base_task(self.options, what, shape) as base:
            if what == "call" and name not in self.expected:
                self.expected[name] = outputs([replace(base, dtype="float32")])[0].cpu().numpy()
            if what == "step" and name not in self.eager:
                self.check_gradients(replace(base, dtype="float32"))
            found = build(entries, crew, base, self.budget, together)
            if what in TRAINING:
                eager = {entry.side: values for entry, values in found.items() if entry.form == "eager"}
                self.eager.setdefault(name, eager)
            errors = check(found, base, self.expected.get(name), self.eager.get(name, {}))
            allowed = ALLOWED_ERROR if what == "call" else ALLOWED_CHANGE
            wrong = {entry: error for entry, error in errors.items() if not error <= allowed}
            self.wrong += [
                f"{name}, {e.name}: results differ by {x:.1e}, more than {allowed}" for e, x in wrong.items()
            ]
            right = [entry for entry in found if entry not in wrong]
            measured = measure(right, crew, base, self.options, self.budget)
            if PEER in measured:
                self.peers[name] = measured[PEER]
            lines = [
                row_of(entry, base, values, self.peers.get(name), self.rate, errors.get(entry))
                for entry, values in measured.items()
            ]
            self.lines.setdefault(name, []).extend(lines)
            print(f"{report.table(lines)}\n", flush=True)  # at once, whatever happens later

    @property
    def rows(self) -> list[dict]:
        """The lines of all rows, together by row."""
        return [line for lines in self.lines.values() for line in lines]


def benchmark_card(options, check_gradients: Callable[[Task], None]) -> tuple[list[dict], dict]:
    """Measure the table of a card.

    Args:
        options: `device`, `threads`, `rounds`, `quick` and `minutes` are used.
        check_gradients: compares the gradients of the peer and ours; called with the peer's task in float32.

    Returns:
        The lines of the table, and {"bf16 TFLOP/s": of the card, "left out": names and reasons, "wrong": contenders
        that were not timed, because their results differ from what they should be}.
    """
    budget = Budget(options.minutes)
    on_cpu = torch.device(options.device).type == "cpu"
    rows = ROWS_ON_CPU if on_cpu else ROWS
    eager = tuple(entry for entry in EAGER if not on_cpu or "graphs" not in entry.form)
    crew = Crew(eager if on_cpu else eager + COMPILED)
    try:
        table = Table(options, budget, check_gradients)
        for what, shape in rows:
            if budget.allows(ROW_SECONDS, name_of_row(what, shape)):
                table.add(crew, what, shape, eager, together=False)
        # compiled ones come last: they take long, and the time may not be enough for all
        for what, shape in () if on_cpu else rows[:1] if options.quick else rows:
            if what != "sample" and budget.allows(COMPILED_ROW_SECONDS, f"{name_of_row(what, shape)}, compiled"):
                table.add(crew, what, shape, COMPILED, together=True)
    finally:
        crew.close()
    return table.rows, {"bf16 TFLOP/s": table.rate / 1e12, "left out": budget.left_out, "wrong": table.wrong}
