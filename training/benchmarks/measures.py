"""Measures of one run of something: seconds, the host's part of them, kernels, memory, reads by the host."""

import contextlib
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Run = Callable[[], object]
# Work on a card, by the categories of the profiler's trace.
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# Events in which the host waits for the device; on CPU, those that read a number from a tensor.
WAITS = {
    "cpu": ("aten::_local_scalar_dense",),
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of what each contender returns. They take turns, so that what else the machine does meanwhile
    falls on all of them."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


def timed(run: Run, device: str) -> float:
    """Return the seconds of one run, from an idle device to an idle device."""
    return seconds_a_run(run, device, 1)


def seconds_a_run(run: Run, device: str, runs: int) -> float:
    """Return the seconds of a run when so many are started one after the other without waiting for the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(runs):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / runs


def host_seconds(run: Run, device: str) -> float:
    """Return the seconds until a run returns that finds the device idle.

    Until then the host is busy, or waits for a result that the run reads back.
    """
    synchronize(device)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    synchronize(device)
    return seconds


def device_work(run: Run, device: str, runs: int) -> tuple[float, float] | None:
    """Return the card's part of a run by torch's profiler: seconds of kernels and copies, and the number of kernels.

    The seconds are the sum over all streams. On CPU the result is None.
    """
    if torch.device(device).type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        seconds, kernels = sum_of_trace(json.loads(file.read_text()))
    return seconds / runs, kernels / runs


def sum_of_trace(trace: dict) -> tuple[float, int]:
    """Return the seconds of device work in a trace of the profiler, and the number of kernels."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in DEVICE_WORK]
    return 1e-6 * sum(event["dur"] for event in events), sum(event["cat"] == "kernel" for event in events)


def host_waits(run: Run, device: str) -> int:
    """Return how often the host waits for the device in one run, by the profiler; on CPU, how often a number is read
    from a tensor."""
    from torch.profiler import ProfilerActivity, profile

    kind = torch.device(device).type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    run()
    with profile(activities=activities) as found:
        run()
    return sum(event.name in WAITS[kind] for event in found.events())


def rate_of_products(dtype: str, device: str, size: int, runs: int, rounds: int = 9) -> float:
    """Return the operations per second of a device in products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    a @ b
    return 2 * size**3 / statistics.median(seconds_a_run(lambda: a @ b, device, runs) for _ in range(rounds))


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 convolutions in float32: TF32, a card's default, has ten bits, fewer than are compared."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def resident(field: str) -> int:
    """Return the bytes of this process by /proc/self/status: VmRSS (now) or VmHWM (the peak); without /proc the
    peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))


def reset_peak(device: str) -> None:
    """Begin to count the peak memory anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
