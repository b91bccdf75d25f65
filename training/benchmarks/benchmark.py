"""Measure ddpm_hf beside denoising-diffusion-pytorch, with the same architecture and weights, and beside a stock U-Net
of diffusers that costs about as much. Each contender runs in a process of its own, they take turns, and the results are
medians.

    python training/benchmarks/benchmark.py                            # everything
    python training/benchmarks/benchmark.py --only call step           # a model call, a training step
    python training/benchmarks/benchmark.py --only memory import sample loader
    python training/benchmarks/benchmark.py --only call step --check   # fail if a ratio is 15% worse than recorded
    python training/benchmarks/benchmark.py --device cuda              # the table of a graphics card, eight minutes
    python training/benchmarks/benchmark.py --device cuda --quick      # the same in three minutes, hardly compiled

The program prints a table, and writes it to --output_dir as JSON and as a picture. It needs the extra [bench].
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
from contenders import Contender, Task, operations, our_model, outputs, peer_diffusion, save_weights, waits_of
from measures import alternate, exact_products, rate_of_products
from on_card import FAST_STEPS, PEER_STEPS, benchmark_card
from report import draw, table

from ddpm_hf import UNet1D, UNet2D
from ddpm_hf.arguments import SuggestingParser

KEPT = "ratio, memory kept by both"
# Ratios measured on two CPU threads (docs/performance.md). Speed: higher is better; the ratio with memory kept by both
# is compared, because the other one depends on what a page fault costs the peer (1.17 and 1.86 were seen for one step,
# whose ratios with kept memory were 1.08 and 1.14). Memory: lower is better.
RECORDED = {
    "call 4x3x64x64 float32": 1.31, "call 4x3x64x64 bfloat16": 2.44,
    "step 8x3x32x32 float32": 1.12, "step 8x3x32x32 bfloat16": 1.59,
    "step 4x3x64x64 float32": 1.16, "step 4x3x64x64 bfloat16": 1.88,
    "step 32x32x128 float32": 1.12, "step 32x32x128 bfloat16": 1.59,
    "step 4x32x4096 float32": 1.14, "step 4x32x4096 bfloat16": 2.06,
    "memory 4x32x4096 float32": 0.54, "memory 4x32x4096 bfloat16": 0.40,
    "memory 4x3x128x128 checkpointing float32": 0.32, "memory 4x3x128x128 checkpointing bfloat16": 0.29,
}  # fmt: skip
IMPORT_LIMIT = 0.3  # seconds over diffusers' own
CALL_SHAPES = ((4, 3, 64, 64),)
STEP_SHAPES = ((8, 3, 32, 32), (4, 3, 64, 64), (32, 32, 128), (4, 32, 4096))
SAMPLE_SHAPES = ((8, 3, 32, 32),)
ON_CARD = ((4, 3, 64, 64), (1, 3, 128, 128))  # of call, step and sample elsewhere than on CPU, times --batch_factor


@functools.cache
def matrix_rate(dtype: str, device: str) -> float:
    """Return the operations per second of this machine in products of square matrices."""
    return rate_of_products(dtype, device, size=2048, runs=1)


def base_task(options, what: str, shape: tuple, folder: str) -> Task:
    """Return the peer's task: in float32 on CPU, by its option `amp` elsewhere."""
    dtype = "float32" if options.device == "cpu" else "float16"
    task = Task("peer", what, shape, dtype, device=options.device, threads=options.threads)
    return save_weights(task, Path(folder))


def scaled(options, shapes: tuple) -> list[tuple]:
    """Return the shapes with `--batch_factor` times as many items."""
    return [(options.batch_factor * batch, *size) for batch, *size in shapes]


def name_of(options, *words) -> str:
    """Return the subject of a row. Those of the CPU are the keys of RECORDED."""
    words = ["x".join(map(str, word)) if isinstance(word, tuple) else word for word in words]
    return " ".join(word for word in (*words, "" if options.device == "cpu" else options.device) if word)


def variants(options) -> list[tuple[str, str]]:
    """Return (dtype, form) of the contenders of ours."""
    return list(itertools.product(options.dtype, ["eager", "inductor"] if options.compile else ["eager"]))


def row_name(options, task: Task) -> str:
    """Return the subject of the row of a task."""
    return name_of(options, task.what, task.shape, task.dtype, "compiled" if task.form == "inductor" else "")


def compete(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """Return the median seconds of each task."""
    contenders = {name: Contender(task) for name, task in tasks.items()}
    try:
        return alternate({name: contender.seconds for name, contender in contenders.items()}, rounds)
    finally:
        for contender in contenders.values():
            contender.close()


def compare(options, peer: Task) -> list[dict]:
    """Compare the peer, ours in each dtype, and the stock model of images; return rows with ratios to the peer.

    One ratio is of each as it comes to a user (our trainer keeps freed memory for the next step), the other one of both
    with memory kept.
    """
    tasks = {"peer": peer, "peer, kept": replace(peer, keep_memory=True)}
    if len(peer.shape) == 4:
        tasks["stock"] = replace(peer, side="stock", dtype="float32")
    for dtype, form in variants(options):
        kept = replace(peer, side="ours", dtype=dtype, form=form, keep_memory=True)
        tasks[dtype, form, "kept"] = kept
        if peer.what != "step":
            tasks[dtype, form] = replace(kept, keep_memory=False)
    found = compete(tasks, options.rounds)
    kind = UNet2D if len(peer.shape) == 4 else functools.partial(UNet1D, in_channels=peer.shape[1])
    work = operations(kind, peer.shape) * {"call": 1, "step": 3}[peer.what]
    rows = []
    for dtype, form in variants(options):
        kept = found[dtype, form, "kept"]
        seconds = found.get((dtype, form), kept)
        row = {
            "what": row_name(options, replace(peer, dtype=dtype, form=form)),
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
    """Measure one call of the model, after comparing the outputs with the peer's in float32."""
    rows = []
    for shape in scaled(options, CALL_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            peer = base_task(options, "call", shape, folder)
            ours = [replace(peer, side="ours", dtype=dtype, form=form) for dtype, form in variants(options)]
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
    """Measure one training step, after comparing the gradients."""
    rows = []
    for shape in scaled(options, STEP_SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            peer = base_task(options, "step", shape, folder)
            check_gradients(replace(peer, dtype="float32"))
            rows += compare(options, peer)
    return rows


def check_gradients(task: Task) -> None:
    """Check that the gradients of the peer and ours have the same norm.

    Args:
        task: the peer's, in float32.

    Raises:
        SystemExit: the norms differ.
    """
    x, t = torch.randn(task.shape)[:1].to(task.device), torch.full((1,), 500, device=task.device)
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
    """Measure the peak memory of a training step above what the libraries take."""
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
    """Measure a batch of images: the peer's DDIM at 250 calls, and our fast sampler at the number of calls that brings
    it as near to the data (docs/studies.md). A tenth of the peer's chain is timed, because its calls are alike."""
    part = 10
    rows = []
    for shape in scaled(options, SAMPLE_SHAPES):
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
    """Count how often the host waits for the device, by the profiler: in a training step, and in a step of sampling,
    beyond what a chain's beginning and end need. On CPU, count how often a number is read from a tensor."""
    (shape, *_) = scaled(options, SAMPLE_SHAPES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peer = base_task(options, "sample", shape, folder)
        for dtype in options.dtype:
            task = replace(peer, side="ours", dtype=dtype)
            short, long = (waits_of(replace(task, steps=steps)) for steps in (5, 10))
            step = waits_of(replace(task, what="step"))
            rows.append({"what": name_of(options, "waits", shape, dtype), "a sampling step": (long - short) / 5,
                         "a training step": float(step)})  # fmt: skip
    return rows


def benchmark_import(options) -> list[dict]:
    """Measure by how many seconds `import ddpm_hf` takes longer than diffusers and its DDPMPipeline, each in a fresh
    interpreter."""

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


BENCHMARKS = {
    "call": benchmark_call, "step": benchmark_step, "memory": benchmark_memory, "sample": benchmark_sample,
    "waits": benchmark_waits, "import": benchmark_import, "loader": benchmark_loader,
}  # fmt: skip


def is_worse(row: dict) -> bool:
    """Return True if a ratio is worse than the recorded one by more than 15%, or the import slower than its limit."""
    if row.get("what") == "import":
        return row["more s"] > 1.15 * IMPORT_LIMIT
    recorded = RECORDED.get(row.get("what"))
    if recorded is None:
        return False
    return row["ratio"] > 1.15 * recorded if row["what"].startswith("memory") else row[KEPT] < 0.85 * recorded


def parse(arguments: list) -> argparse.Namespace:
    """Return the options of the command line, with their defaults for the device."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*BENCHMARKS, "card"],
        help="the parts to measure. Defaults to all but card on CPU, and to card, the table of a card, elsewhere; card "
        "on CPU tries that part with small shapes")  # fmt: skip
    add("--rounds", type=int, help="times that each contender is measured. Defaults to 9; for the card 5, quick 3")
    add("--device", default="cpu", help="the device of the model's measurements, cpu or cuda")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="ours, on CPU")
    add("--batch_factor", type=int, default=1, help="times the batch sizes")
    add("--threads", type=int, default=2, help="threads of the model's measurements on CPU")
    add("--compile", action="store_true", help="measure ours compiled too (CPU): a call by its blocks, a step whole")
    add("--quick", action="store_true", help="the card's table with fewer rounds, without the profiler, and compiled "
        "forms of the first row only, if there is time")  # fmt: skip
    add("--minutes", type=float, help="time for the card's table; what does not fit is left out and named. Defaults to "
        "7.5, quick to 3")  # fmt: skip
    add("--check", action="store_true", help="fail if a ratio is 15%% worse than recorded")
    add("--images", type=int, default=10_000, help="number of JPEGs in the loader's measurement")
    add("--resolutions", type=int, nargs="+", default=[64, 128], help="sizes that the loader resizes to")
    add("--workers", type=int, nargs="+", default=[1, 2], help="processes of the loader")
    add("--batch_size", type=int, default=64, help="batch size of the loader")
    add("--output_dir", default="benchmark", help="folder for benchmark.json and benchmark.png")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu on a machine without CUDA, got {options.device}")
    if options.only is None:
        options.only = list(BENCHMARKS) if options.device == "cpu" else ["card"]
    card = "card" in options.only
    if card and len(options.only) > 1:
        parser.error(f"--only card must stand alone, got {' '.join(options.only)}")
    if options.rounds is None:
        options.rounds = (3 if options.quick else 5) if card else 9
    if options.minutes is None:
        options.minutes = 3 if options.quick else 7.5
    for name in ("rounds", "batch_factor"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    return options


def measure_parts(options) -> dict[str, list[dict]]:
    """Measure the parts that are asked for, and print the table of each."""
    results = {}
    for name in options.only:
        torch.set_num_threads(1 if name == "loader" else options.threads)  # the loader's workers have the others
        results[name] = BENCHMARKS[name](options)
        print(f"{table(results[name])}\n", flush=True)
    return results


def measure_card(options, folder: Path) -> int:
    """Measure the table of a card, print and save it; return the exit status."""
    rows, facts = benchmark_card(options, check_gradients)
    print(f"\n{table(rows)}\n")
    print(f"products of bfloat16 matrices: {facts['bf16 TFLOP/s']:.3g} TFLOP/s")
    for line in facts["left out"]:
        print(f"left out: {line}")
    for line in facts["wrong"]:
        print(f"wrong, so not timed: {line}")
    save({"card": rows, **facts}, folder)
    bars = [{"what": f"{row['what']}, {row['contender']}", "ratio": row["ratio to peer"],
             "emphasis": row["contender"].startswith("ours")} for row in rows]  # fmt: skip
    if any(bar["ratio"] for bar in bars):
        draw(bars, folder / "benchmark.png", "times the speed of denoising-diffusion-pytorch with its option amp")
    return 1 if facts["wrong"] else 0


def save(results: dict, folder: Path) -> None:
    """Write the results, and what they were measured on, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
    (folder / "benchmark.json").write_text(json.dumps({**machine, **results}, indent=1))
    print(f"results: {folder / 'benchmark.json'}")


def main(arguments: list) -> int:
    """Run the program; return its exit status."""
    options = parse(arguments)
    folder = Path(options.output_dir)
    if options.only == ["card"]:
        return measure_card(options, folder)
    results = measure_parts(options)
    save(results, folder)
    everything = [row for rows in results.values() for row in rows]
    if any("ratio" in row and "what" in row for row in everything):
        draw(everything, folder / "benchmark.png", "times denoising-diffusion-pytorch (memory: share of its)")
    worse = [row for row in everything if is_worse(row)]
    if options.check and worse:
        print("worse than recorded by more than 15%: " + ", ".join(row["what"] for row in worse), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # denoising-diffusion-pytorch's bars, in the contenders' processes
    sys.exit(main(sys.argv[1:]))
