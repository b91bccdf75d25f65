"""Measure ddpm_hf against what people use now: denoising-diffusion-pytorch (same architecture, same weights, as it
comes) and a stock U-Net of diffusers of about the same cost. Each contender has a process of its own and they take
turns; medians.

    python training/benchmarks/benchmark.py                            # everything
    python training/benchmarks/benchmark.py --only call step           # a model call, a training step
    python training/benchmarks/benchmark.py --only memory import sample loader
    python training/benchmarks/benchmark.py --only call step --check   # fail where a ratio is 15% worse than recorded
    python training/benchmarks/benchmark.py --device cuda --compile    # beside the peer's fp16, in a card's batches

Prints a table and writes it to --output_dir as JSON and as a picture. Needs the extra [bench].
"""

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmark_loader import benchmark_loader
from contenders import (
    Contender,
    Task,
    alternate,
    exact_products,
    host_waits,
    operations,
    our_model,
    outputs,
    peer_diffusion,
    save_weights,
    timed,
)

from ddpm_hf import UNet1D, UNet2D
from ddpm_hf.arguments import SuggestingParser

KEPT = "ratio, memory kept by both"
# Ratios to keep, measured on two CPU threads (README). Speed, where more is better: KEPT, because the other moves with
# what a page fault costs the peer (seen: 1.17 and 1.86 for one step, 1.08 and 1.14 so). Memory, where less is.
RECORDED = {
    "call 4x3x64x64 float32": 1.49, "call 4x3x64x64 bfloat16": 2.53,
    "step 8x3x32x32 float32": 1.08, "step 8x3x32x32 bfloat16": 1.74,
    "step 4x3x64x64 float32": 1.19, "step 4x3x64x64 bfloat16": 1.92,
    "step 32x32x128 float32": 1.09, "step 32x32x128 bfloat16": 1.68,
    "step 4x32x4096 float32": 1.21, "step 4x32x4096 bfloat16": 2.02,
    "memory 4x32x4096 float32": 0.53, "memory 4x32x4096 bfloat16": 0.41,
    "memory 4x3x128x128 checkpointing float32": 0.32, "memory 4x3x128x128 checkpointing bfloat16": 0.29,
}  # fmt: skip
IMPORT_LIMIT = 0.3  # seconds over diffusers' own
CALL_SHAPES = ((4, 3, 64, 64),)
STEP_SHAPES = ((8, 3, 32, 32), (4, 3, 64, 64), (32, 32, 128), (4, 32, 4096))
SAMPLE_SHAPES = ((8, 3, 32, 32),)
ON_CARD = ((4, 3, 64, 64), (1, 3, 128, 128))  # of call, step and sample elsewhere than on CPU, times --batch_factor
PEER_STEPS = 250  # DDIM calls of denoising-diffusion-pytorch's README
FAST_STEPS = 12  # of our fast sampler, for that distance (docs/studies.md)


@functools.cache
def matrix_rate(dtype: str, device: str, size: int = 2048) -> float:
    """Operations per second of this machine in products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * size**3 / alternate({"product": lambda: timed(lambda: a @ b, device)}, 9)["product"]


def base_task(options, what: str, shape: tuple, folder: str) -> Task:
    """The peer's: in float32 on CPU, by its `amp` elsewhere."""
    dtype = "float32" if options.device == "cpu" else "float16"
    task = Task("peer", what, shape, dtype, device=options.device, threads=options.threads)
    return save_weights(task, Path(folder))


def shapes_of(options, on_cpu: tuple) -> list[tuple]:
    shapes = on_cpu if options.device == "cpu" else ON_CARD
    return [(options.batch_factor * batch, *size) for batch, *size in shapes]


def name_of(options, *words) -> str:
    """Return the subject of a row; on CPU the keys of RECORDED."""
    words = ["x".join(map(str, word)) if isinstance(word, tuple) else word for word in words]
    return " ".join(word for word in (*words, "" if options.device == "cpu" else options.device) if word)


def variants(options) -> list[tuple[str, bool]]:
    """Return (dtype, True if compiled) of a contender of ours."""
    return list(itertools.product(options.dtype, [False, True] if options.compile else [False]))


def row_name(options, task: Task) -> str:
    return name_of(options, task.what, task.shape, task.dtype, "compiled" if task.compiled else "")


def compete(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    contenders = {name: Contender(task) for name, task in tasks.items()}
    try:
        return alternate({name: contender.seconds for name, contender in contenders.items()}, rounds)
    finally:
        for contender in contenders.values():
            contender.close()


def compare(options, peer: Task) -> list[dict]:
    """The peer, ours in each dtype, and the stock model of images: rows with ratios to the peer, each as it comes to a
    user (our trainer keeps freed memory for the next step), and with memory kept by both."""
    tasks = {"peer": peer, "peer, kept": replace(peer, keep_memory=True)}
    if len(peer.shape) == 4:
        tasks["stock"] = replace(peer, side="stock", dtype="float32")
    for dtype, compiled in variants(options):
        kept = replace(peer, side="ours", dtype=dtype, compiled=compiled, keep_memory=True)
        tasks[dtype, compiled, "kept"] = kept
        if peer.what != "step":
            tasks[dtype, compiled] = replace(kept, keep_memory=False)
    found = compete(tasks, options.rounds)
    kind = UNet2D if len(peer.shape) == 4 else functools.partial(UNet1D, in_channels=peer.shape[1])
    work = operations(kind, peer.shape) * {"call": 1, "step": 3}[peer.what]
    rows = []
    for dtype, compiled in variants(options):
        kept = found[dtype, compiled, "kept"]
        seconds = found.get((dtype, compiled), kept)
        row = {
            "what": row_name(options, replace(peer, dtype=dtype, compiled=compiled)),
            "peer s": found["peer"],
            "ours s": seconds,
            "ratio": found["peer"] / seconds,
            KEPT: found["peer, kept"] / kept,
        }
        if "stock" in found:
            row["stock to ours"] = found["stock"] / seconds
        row["share of matrix rate"] = work / seconds / matrix_rate(dtype, options.device)
        rows.append(row)
    return rows


def benchmark_call(options) -> list[dict]:
    """One call of the model; outputs are compared first, with the peer's in float32."""
    rows = []
    for shape in shapes_of(options, CALL_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            peer = base_task(options, "call", shape, folder)
            ours = [replace(peer, side="ours", dtype=dtype, compiled=c) for dtype, c in variants(options)]
            expected, *found = outputs([replace(peer, dtype="float32"), *ours])
            errors = {}
            for task, output in zip(ours, found):
                error = errors[row_name(options, task)] = ((output - expected).norm() / expected.norm()).item()
                allowed = 1e-4 if task.dtype == "float32" else 0.02
                if not error <= allowed:
                    raise SystemExit(
                        f"outputs differ by {error:.1e} of their norm in {task.dtype}, more than {allowed}"
                    )
            rows += [row | {"error": errors[row["what"]]} for row in compare(options, peer)]
    return rows


def benchmark_step(options) -> list[dict]:
    """One training step; gradients are compared first."""
    rows = []
    for shape in shapes_of(options, STEP_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            peer = base_task(options, "step", shape, folder)
            check_gradients(replace(peer, dtype="float32"))
            rows += compare(options, peer)
    return rows


def check_gradients(task: Task) -> None:
    """That the gradients of the peer and ours have the same norm."""
    x, t = torch.randn(task.shape).to(task.device), torch.full((len(task.shape),), 500, device=task.device)
    x, t = x[:1], t[:1]
    norms = []
    for model in (peer_diffusion(task).model, our_model(task)):
        with exact_products():
            output = model(x, t)
            getattr(output, "sample", output).square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
    if abs(norms[0] - norms[1]) > 1e-4 * norms[0]:
        raise SystemExit(f"the norms of the gradients differ: {norms}")


def benchmark_memory(options) -> list[dict]:
    """Peak memory of a training step over what the libraries take."""
    rows = []
    for shape, checkpointing in (((4, 32, 4096), False), ((4, 3, 128, 128), True)):
        with tempfile.TemporaryDirectory() as folder:
            peer = base_task(options, "step", shape, folder)
            peaks = {}
            for dtype in ("peer", *options.dtype):
                ours = replace(peer, side="ours", dtype=dtype, checkpointing=checkpointing, keep_memory=True)
                contender = Contender(peer if dtype == "peer" else ours)
                for _ in range(3):
                    contender.seconds()
                peaks[dtype] = contender.peak()
                contender.close()
        rows += [
            {"what": name_of(options, "memory", shape, "checkpointing" if checkpointing else "", dtype),
             "peer GB": peaks["peer"] / 1e9, "ours GB": peaks[dtype] / 1e9, "ratio": peaks[dtype] / peaks["peer"]}
            for dtype in options.dtype
        ]  # fmt: skip
    return rows


def benchmark_sample(options) -> list[dict]:
    """A batch of images: the peer's DDIM at 250 calls, ours by the fast sampler at the calls that bring it as near to
    the data (docs/studies.md). Of the peer's chain, whose calls are alike, a tenth is timed."""
    part = 10
    rows = []
    for shape in shapes_of(options, SAMPLE_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            peer = replace(base_task(options, "sample", shape, folder), steps=PEER_STEPS // part)
            ours = {dtype: replace(peer, side="ours", dtype=dtype, steps=FAST_STEPS) for dtype in options.dtype}
            found = compete({"peer": peer, **ours}, options.rounds)
        peer_rate = shape[0] / (found["peer"] * part)
        for dtype in options.dtype:
            rate = shape[0] / found[dtype]
            rows.append({
                "what": name_of(options, "sample", shape, dtype), "peer samples/s": peer_rate, "ours samples/s": rate,
                "ratio": rate / peer_rate, "ratio a call": rate / peer_rate * FAST_STEPS / PEER_STEPS,
            })  # fmt: skip
    return rows


def benchmark_waits(options) -> list[dict]:
    """How often the host waits for the device, by the profiler: in a training step, and in a step of sampling, beyond
    what a chain's beginning and end need. On CPU: how often a number is read from a tensor."""
    (shape, *_) = shapes_of(options, SAMPLE_SHAPES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peer = base_task(options, "sample", shape, folder)
        for dtype in options.dtype:
            task = replace(peer, side="ours", dtype=dtype)
            short, long = (host_waits(replace(task, steps=steps)) for steps in (5, 10))
            step = host_waits(replace(task, what="step"))
            rows.append({"what": name_of(options, "waits", shape, dtype), "a sampling step": (long - short) / 5,
                         "a training step": float(step)})  # fmt: skip
    return rows


def benchmark_import(options) -> list[dict]:
    """Seconds that `import ddpm_hf` takes more than diffusers and its DDPMPipeline, each in a fresh interpreter."""

    def fresh(statement: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - start

    found = alternate(
        {
            "diffusers": lambda: fresh("from diffusers import DDPMPipeline"),
            "ours": lambda: fresh("from ddpm_hf import DDPMPipeline"),
        },
        options.rounds,
    )
    return [{"what": "import", "diffusers s": found["diffusers"], "ours s": found["ours"],
             "more s": found["ours"] - found["diffusers"]}]  # fmt: skip


def draw(rows: list[dict], file: Path) -> None:
    """The ratios as bars, PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "ratio" in row and "what" in row][::-1]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    colours = ["tab:orange" if "bfloat16" in row["what"] else "tab:blue" for row in rows]
    bars = axis.barh([row["what"] for row in rows], [row["ratio"] for row in rows], color=colours)
    axis.bar_label(bars, [f"{row['ratio']:.2f}" for row in rows], padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(right=2.5 * max(1, *(row["ratio"] for row in rows)))  # room for the labels
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if tick < 2 * max(row["ratio"] for row in rows)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("times denoising-diffusion-pytorch (memory: share of its)", fontsize=9)
    figure.savefig(file, dpi=100)


BENCHMARKS = {
    "call": benchmark_call, "step": benchmark_step, "memory": benchmark_memory, "sample": benchmark_sample,
    "waits": benchmark_waits, "import": benchmark_import, "loader": benchmark_loader,
}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Rows as aligned columns, one a key; an empty cell where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names]
    for row in rows:
        values = [row.get(name, "") for name in names]
        cells.append([f"{value:.3g}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def is_worse(row: dict) -> bool:
    """Return True if a ratio is more than 15% on the wrong side of the recorded one, or the import of its limit."""
    if row.get("what") == "import":
        return row["more s"] > 1.15 * IMPORT_LIMIT
    recorded = RECORDED.get(row.get("what"))
    if recorded is None:
        return False
    return row["ratio"] > 1.15 * recorded if row["what"].startswith("memory") else row[KEPT] < 0.85 * recorded


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=9, help="times that each contender is measured")
    parser.add_argument("--device", default="cpu", help="of the model's measurements: cpu or cuda")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch_factor", type=int, help="times the batch sizes. Default: 1 on CPU, else 32")
    parser.add_argument("--threads", type=int, default=2, help="of the model's measurements on CPU")
    parser.add_argument("--compile", action="store_true", help="ours compiled, too: a call by blocks, a step whole")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is 15%% worse than recorded")
    parser.add_argument("--images", type=int, default=10_000, help="JPEGs of the loader's measurement")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128], help="that the loader resizes to")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the loader")
    parser.add_argument("--batch_size", type=int, default=64, help="of the loader")
    parser.add_argument("--output_dir", default="benchmark", help="where benchmark.json and benchmark.png go")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu on a machine without CUDA, got {options.device}")
    if options.batch_factor is None:
        options.batch_factor = 1 if options.device == "cpu" else 32
    if options.batch_factor < 1:
        parser.error(f"--batch_factor must be at least 1, got {options.batch_factor}")
    results = {}
    for name in options.only:
        torch.set_num_threads(1 if name == "loader" else options.threads)  # the loader's workers have the others
        results[name] = BENCHMARKS[name](options)
        print(f"{table(results[name])}\n", flush=True)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps({**machine, **results}, indent=1))
    everything = [row for rows in results.values() for row in rows]
    if any("ratio" in row and "what" in row for row in everything):
        draw(everything, folder / "benchmark.png")
    print(f"results: {folder / 'benchmark.json'}")
    worse = [row for row in everything if is_worse(row)]
    if options.check and worse:
        print("worse than recorded by more than 15%: " + ", ".join(row["what"] for row in worse), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # denoising-diffusion-pytorch's bars, in the contenders' processes
    sys.exit(main(sys.argv[1:]))
