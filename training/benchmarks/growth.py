"""Measure how CPU time and memory grow with the size of what is worked on.

    python training/benchmarks/growth.py                        # each row at three sizes, in at most ten minutes
    python training/benchmarks/growth.py --quick                # smaller sizes, in at most two minutes
    python training/benchmarks/growth.py --only csv folder      # some rows

Each row is measured at three sizes, each size in a process of its own with one thread. CPU time counts all threads, so
that other work on the machine changes it little. The exponent is the slope of log time over log size: 1 is linear
growth, 2 quadratic. Memory is the peak above what the process held before. The rows of "once" have no size.

The row "ratio" compares a step of the trainer with two plain loops, which take turns with it.

The program prints the tables in the form of Markdown, and writes them to --output_dir as JSON.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import numpy as np
import pandas  # noqa: F401  imported here, so that no measurement pays for it
import pyarrow
import pyarrow.csv  # noqa: F401  as above
import torch
from accelerate import Accelerator
from measures import alternate, reset_peak, resident
from report import markdown

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig, UNet1D, UNet2D
from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.data.images import ImageDataset, find_images
from ddpm_hf.data.sequence_files import read_sequences
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.tables import ListColumns
from ddpm_hf.evaluation.memorization import Memorization
from ddpm_hf.evaluation.metrics import autocorrelation
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.trainer.loop import Trainer

ROOT = Path(__file__).parents[2]
ENOUGH = 0.3  # seconds of CPU time, after which a measurement is not repeated
Run = Callable[[], object]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def exponent(sizes: list[float], values: list[float]) -> float:
    """Return the slope of log value over log size, by least squares; NaN where a value is 0."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ---------------------------------------------------------------------------------------------
# The rows: a function of the size and of an empty folder prepares what is measured, and returns it as a function


def folder(size: int, place: Path) -> Run:
    """List a folder of `size` image files, in subfolders of 500."""
    for number in range(size):
        if number % 500 == 0:
            (place / f"{number // 500}").mkdir()
        (place / f"{number // 500}" / f"{number}.png").touch()
    return lambda: find_images(str(place))


def read_csv(size: int, place: Path) -> Run:
    """Read a .csv file of `size` rows of 8 numbers."""
    block = "".join(",".join(f"{x:.6f}" for x in row) + "\n" for row in np.random.default_rng(0).normal(size=(1000, 8)))
    (place / "data.csv").write_text(block * (size // 1000))
    return lambda: read_sequences(str(place / "data.csv"))


def lists(size: int, place: Path) -> Run:
    """Load 20 items of a table of `size` columns, which are lists of 8 numbers."""
    numbers = list(np.random.default_rng(0).standard_normal((20, 8), np.float32))
    names = [f"c{number}" for number in range(size)]
    found = ListColumns(datasets.Dataset(pyarrow.table(dict.fromkeys(names, pyarrow.array(numbers)))), names, "lists")
    found[:1]  # imports what would be counted
    return lambda: [found[index : index + 1] for index in range(20)]


def _mapped(size: int, place: Path) -> np.ndarray:
    array = np.lib.format.open_memmap(place / "data.npy", "w+", np.float32, (size, 1, 1024))
    array[:] = np.random.default_rng(0).standard_normal((1, 1, 1024), np.float32)
    array.flush()
    return np.load(place / "data.npy", mmap_mode="r")


def first_scan(size: int, place: Path) -> Run:
    """Open a .npy file of `size` sequences of 1,024 numbers for the first time."""
    array = _mapped(size, place)
    return lambda: SequenceDataset(array)


def second_scan(size: int, place: Path) -> Run:
    """Open the same file again, with the results of the first pass."""
    array = _mapped(size, place)
    scans = SequenceDataset(array).scans
    return lambda: SequenceDataset(array, scans=scans)


def autocorrelations(size: int, place: Path) -> Run:
    """Compute the autocorrelation of 500 sequences of the length `size`."""
    x = np.random.default_rng(0).normal(size=(500, 1, size))
    return lambda: autocorrelation(x)


def _memorization(size: int, place: Path) -> Run:
    items = torch.from_numpy(np.random.default_rng(0).standard_normal((size, 3072), np.float32))
    settings = EvalSettings(num_samples=512, cache_dir=str(place))
    samples = items[:512] + 1

    def run() -> None:
        found = Memorization(items, settings, Shares(Accelerator(cpu=True)), kept=True)
        look = found.look(lambda batch: batch)
        found.values(look(samples))

    return run


def first_memorization(size: int, place: Path) -> Run:
    """Look for copies of `size` items of 3,072 numbers among 512 samples, with an empty cache."""
    run = _memorization(size, place)

    def first() -> None:
        for file in place.glob("*.npz"):
            file.unlink()
        run()

    return first


def further_memorization(size: int, place: Path) -> Run:
    """Do the same again, where the neighbours of the real items are known."""
    run = _memorization(size, place)
    run()
    return run


def items(size: int, place: Path) -> Run:
    """Load 1,000 RGB images of `size` pixels from the cache of decoded images."""
    side = math.isqrt(size)
    images = ImageDataset(list(np.zeros((10, side, side, 3), np.uint8)), (side, side), cache_gb=0.1)
    return lambda: [images.load_8bit(index % 10) for index in range(1000)]


def _step_1d(size: int, full: bool) -> Run:
    model = UNet1D(dim=4, in_channels=1, sample_size=size, mid_full_attn=full)
    x, t = torch.randn(1, 1, size), torch.tensor([500])

    def run() -> None:
        model.zero_grad()
        model(x, t).sample.square().mean().backward()

    return run


def step_full(size: int, place: Path) -> Run:
    """Compute a training step's gradients of a `UNet1D` of dim 4 for one sequence of the length `size`."""
    return _step_1d(size, True)


def step_linear(size: int, place: Path) -> Run:
    """Do the same with linear attention in the middle."""
    return _step_1d(size, False)


def sampling(size: int, place: Path) -> Run:
    """Sample `size` images of 32 x 32 with dim 16 in 2 steps."""
    pipeline = DDPMPipeline(UNet2D(dim=16, dim_mults=(1, 2), in_channels=3, sample_size=32), GaussianScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=size, num_inference_steps=2, output_type="np")


def _dim(size: int) -> int:
    """Return the dim of a `UNet2D` of about `size` parameters: a convolution has in times out weights."""
    return 8 * max(1, round(2 * math.sqrt(size / UNet2D(dim=16, sample_size=32).num_parameters())))


def save(size: int, place: Path) -> Run:
    """Save the pipeline of a `UNet2D` of about `size` parameters."""
    pipeline = DDPMPipeline(UNet2D(dim=_dim(size), sample_size=32), GaussianScheduler())
    return lambda: pipeline.save_pretrained(place / "pipeline")


def _trainer(place: Path, steps: int, batch: int, **options) -> Trainer:
    """Return a trainer on 64 images of 8 x 8, which are soon cached."""
    images = ImageDataset(
        list(np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)), (8, 8), 1, cache_gb=0.1
    )
    config = TrainConfig(
        output_dir=str(place / f"{time.monotonic_ns()}"), num_samples=1, train_batch_size=batch, max_train_steps=steps,
        report_to="none", ddpm_num_inference_steps=1, logging_steps=1000, num_cpu_threads=1, **options,
    )  # fmt: skip
    return Trainer(config, images)


def run_saves(size: int, place: Path) -> float:
    """Return the CPU time of a save of a run (checkpoint, pipeline, record) of about `size` parameters."""
    trainer = _trainer(place, 5, 1, dim=_dim(size), checkpointing_steps=1)
    used, finish = [], trainer._finish_step

    def timed(*args, **more) -> None:
        start = cpu_seconds()
        finish(*args, **more)
        used.append(cpu_seconds() - start)

    trainer._finish_step = timed
    trainer.run()
    return min(used[:-1])  # the last one draws samples too


def train_steps(size: int, place: Path) -> float:
    """Return the CPU time of a step of training at the batch size `size`, between the steps 20 and 120 of a run."""
    trainer = _trainer(place, 121, size, dim=8, dim_mults=(1,))
    ends, after = [], trainer._after_step

    def timed(bar) -> None:
        after(bar)
        ends.append(cpu_seconds())

    trainer._after_step = timed
    trainer.run()
    return (ends[119] - ends[19]) / 100


def _looped(step: Run) -> float:
    """Return the CPU time of a step."""
    for turn in range(120):
        if turn == 20:
            start = cpu_seconds()
        step()
    return (cpu_seconds() - start) / 100


def bare_steps(size: int, place: Path) -> float:
    """Return the CPU time of a step of a bare loop of the same model: forward, backward and AdamW, as torch has them.

    There is no noise, no clipping and no average, and AdamW is not fused, which is torch's default.
    """
    model = UNet2D(dim=8, dim_mults=(1,), in_channels=1, sample_size=8)
    optimizer = torch.optim.AdamW(model.parameters())
    x, t = torch.randn(size, 1, 8, 8), torch.full((size,), 500)

    def step() -> None:
        optimizer.zero_grad()
        (model(x, t).sample - x).square().mean().backward()
        optimizer.step()

    return _looped(step)


def same_steps(size: int, place: Path) -> float:
    """Return the CPU time of a step of a plain loop that does the trainer's work on one batch.

    That is: draws of timesteps and noise, the noisy images and the target, the model with its channels last in memory,
    the loss, its gradients, clipping, fused AdamW, the schedule of the learning rate, the average of the weights, and
    the loss as a number. It lacks reading data, draws that can be resumed, a progress bar, stops and saves.
    """
    model, scheduler = UNet2D(dim=8, dim_mults=(1,), in_channels=1, sample_size=8), GaussianScheduler()
    model.channels_last()
    weights = list(model.parameters())
    averages = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    x = torch.randn(size, 1, 8, 8).clamp(-1, 1)

    def step() -> None:
        t, noise = torch.randint(0, 1000, (size,)), torch.randn_like(x)
        output = model(scheduler.add_noise(x, noise, t), t).sample
        loss = (output - scheduler.target(x, noise, t)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 0.01)
        loss.item()

    return _looped(step)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: the subject.
        of: what the size is the number of.
        prepare: returns what is measured as a function, or measures a number of seconds itself.
        sizes, quick: the sizes, and those of --quick.
    """

    what: str
    of: str
    prepare: Callable[[int, Path], Run | float]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]


ROWS = {
    "folder": Row("listing a folder of images", "files", folder, (5_000, 20_000, 80_000), (2_000, 4_000, 8_000)),
    "csv": Row("reading a .csv file of 8 columns", "rows", read_csv, (20_000, 80_000, 320_000),
               (10_000, 20_000, 40_000)),
    "csv large": Row("reading one of 64 MiB and more", "rows", read_csv, (1_000_000, 2_000_000, 4_000_000),
                     (1_000_000, 1_200_000, 1_400_000)),
    "lists": Row("20 items of a table of lists of 8 numbers", "columns", lists, (125, 500, 2_000), (125, 250, 500)),
    "scan": Row("opening a .npy file for the first time", "sequences of 1,024", first_scan, (16_384, 32_768, 65_536),
                (16_384, 24_576, 32_768)),
    "scan again": Row("opening it again", "sequences of 1,024", second_scan, (16_384, 32_768, 65_536),
                      (16_384, 24_576, 32_768)),
    "autocorrelation": Row("autocorrelation of 500 sequences", "length", autocorrelations, (1_024, 4_096, 16_384),
                           (512, 1_024, 2_048)),
    "memorization": Row("memorization, first evaluation", "real items", first_memorization, (2_000, 4_000, 8_000),
                        (1_000, 1_500, 2_000)),
    "memorization again": Row("memorization, further evaluations", "real items", further_memorization,
                              (2_000, 4_000, 8_000), (1_000, 1_500, 2_000)),
    "items": Row("1,000 cached items", "pixels", items, (8**2, 32**2, 128**2), (8**2, 16**2, 32**2)),
    "step": Row("gradients of UNet1D of dim 4", "length", step_full, (4_096, 16_384, 65_536), (1_024, 4_096, 16_384)),
    "step linear": Row("the same, mid_full_attn false", "length", step_linear, (4_096, 16_384, 65_536),
                       (1_024, 4_096, 16_384)),
    "sampling": Row("sampling 32 × 32 in 2 steps", "images", sampling, (64, 256, 1024), (16, 32, 64)),
    "save": Row("saving a pipeline", "parameters", save, (2_000_000, 8_000_000, 32_000_000),
                (500_000, 1_000_000, 2_000_000)),
    "run saves": Row("a save of a run", "parameters", run_saves, (500_000, 2_000_000, 8_000_000),
                     (500_000, 1_000_000, 2_000_000)),
    "trainer": Row("a step of the trainer, dim 8", "batch", train_steps, (4, 16, 64), (4, 8, 16)),
    "bare": Row("a step of a bare AdamW loop, dim 8", "batch", bare_steps, (4, 16, 64), (4, 8, 16)),
    "same": Row("a step of a plain loop of the same work, dim 8", "batch", same_steps, (4, 16, 64), (4, 8, 16)),
}  # fmt: skip
ONCE = {
    "help": ("train.py --help", [str(ROOT / "training" / "train.py"), "--help"]),
    "evaluate help": ("evaluate.py --help", [str(ROOT / "training" / "evaluate.py"), "--help"]),
    "config": ("from ddpm_hf import TrainConfig", ["-c", "from ddpm_hf import TrainConfig"]),
    "import": ("from ddpm_hf import train", ["-c", "from ddpm_hf import train"]),
}


# ---------------------------------------------------------------------------------------------
# Measuring


def measure(prepare: Callable[[int, Path], Run | float], size: int) -> tuple[float, float]:
    """Return the CPU seconds of one run, the least of several if it is short, and the peak of memory in bytes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            run = prepare(size, Path(place))
            if not callable(run):
                return run, math.nan
            reset_peak("cpu")
            before, found, peak = resident("VmRSS"), [], 0
            while not found or (sum(found) < ENOUGH and len(found) < 20):
                start = cpu_seconds()
                run()
                found.append(max(cpu_seconds() - start, 1e-6))
                peak = peak or resident("VmHWM") - before  # of the first run, which still has to ask for memory
        return min(found), float(max(peak, 0))


def _child(results, name: str, size: int) -> None:
    try:
        results.put(measure(ROWS[name].prepare, size))
    except BaseException as error:
        results.put(f"{type(error).__name__}: {error}")
        raise


def apart(name: str, size: int) -> tuple[float, float]:
    """Measure a row at a size in a process of its own, which has the imports of this one.

    Raises:
        RuntimeError: the measurement failed.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_child, args=(results, name, size))
    process.start()
    process.join()
    found = "it ended without a result" if results.empty() else results.get()
    if isinstance(found, str):
        raise RuntimeError(f"the row {name!r} failed at the size {size:,}: {found}")
    return found


def growth(name: str, sizes: tuple[int, ...]) -> dict:
    """Measure a row at its sizes, and return it with its exponents."""
    found = [apart(name, size) for size in sizes]
    seconds, peaks = [each[0] for each in found], [each[1] for each in found]
    row = {"what": ROWS[name].what, "size in": ROWS[name].of}
    for place, size, value in zip(("small", "middle", "large"), sizes, seconds):
        row[place], row[f"{place}, s"] = size, value
    row["exponent"] = round(exponent(sizes, seconds), 3)
    if not math.isnan(peaks[-1]):
        row["large, MB"] = peaks[-1] / 1e6
    return row


def once(name: str) -> dict:
    """Measure a command in a process of its own: the CPU time of the second of two runs."""
    what, arguments = ONCE[name]
    for _ in range(2):
        start = cpu_seconds()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    return {"what": what, "s": cpu_seconds() - start}


def ratios(rounds: int) -> list[dict]:
    """Compare a step of the trainer at dim 8 and batch 4 with both plain loops: medians of rounds of turns."""
    torch.set_num_threads(1)
    names = {"trainer": train_steps, "bare": bare_steps, "same": same_steps}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        turns = {name: lambda run=run: run(4, Path(place)) for name, run in names.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            found = alternate(turns, rounds)
    return [
        {"what": "a step of the trainer, dim 8, batch 4", "over": ROWS[name].what.removesuffix(", dim 8"),
         "trainer, ms": 1e3 * found["trainer"], "loop, ms": 1e3 * found[name],
         "ratio": found["trainer"] / found[name]}
        for name in ("bare", "same")
    ]  # fmt: skip


def main(arguments: list) -> int:
    """Measure what the arguments say, print it and write it; return the exit status."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*ROWS, *ONCE, "ratio"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="the rows. Defaults to all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--output_dir", default="benchmarks", help="folder of growth.json. Defaults to %(default)s")
    options = SimpleNamespace(**vars(parser.parse_args(arguments)))
    grown, single, compared = [], [], []
    for name in options.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        if name in ROWS:
            grown.append(growth(name, ROWS[name].quick if options.quick else ROWS[name].sizes))
        elif name in ONCE:
            single.append(once(name))
        else:
            compared = ratios(1 if options.quick else 3)
    for rows in (grown, single, compared):
        if rows:
            print(markdown(rows) + "\n", flush=True)
    folder_ = Path(options.output_dir)
    folder_.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    content = {"machine": machine, "quick": options.quick, "growth": grown, "once": single,
               "ratios": compared}  # fmt: skip
    (folder_ / "growth.json").write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
