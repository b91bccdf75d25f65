"""Measure ddpm_hf against what people use now, side by side in one process: alternating, medians.

    python training/benchmark.py --only loader                 # images per second of the loaders alone

Prints a table and writes it to --output_dir as JSON. Needs the extra [bench].
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import UNet2D
from ddpm_hf.data import image_folder
from ddpm_hf.stream import StreamSampler, TrainingView, collate


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each contender returns, called in turn so that the machine's moods fall on all."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


# -- the loader


def make_jpegs(folder: Path, count: int, side: int = 256) -> None:
    """Crops of scikit-learn's two photographs, about side x side, quality 90."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        image = photographs[number % 2]
        width, height = (int(side * rng.uniform(0.9, 1.3)) for _ in range(2))
        left, top = int(rng.integers(image.width - width)), int(rng.integers(image.height - height))
        image.crop((left, top, left + width, top + height)).save(folder / f"{number:05d}.jpg", quality=90)


def rate(loader: DataLoader, images: int) -> float:
    """Images per second of a loader, from the first batch on (workers have started by then)."""
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    for batch in itertools.islice(batches, images // loader_batch(loader)):
        seen += len(getattr(batch, "items", batch))
    return seen / (time.perf_counter() - start)


def loader_batch(loader: DataLoader) -> int:
    return loader.batch_size or loader.batch_sampler.batch_size


def benchmark_loader(options) -> list[dict]:
    """Ours as the trainer builds it, decoding and from its cache, and the peer's `Dataset` in a `DataLoader`; flips."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset as PeerDataset

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"writing {options.images:,} JPEGs", flush=True)
        make_jpegs(folder, options.images)
        for resolution, workers in itertools.product(options.resolutions, options.workers):
            shared = {"num_workers": workers}

            def ours(cache_gb: float, resolution=resolution, shared=shared) -> DataLoader:
                data = image_folder(str(folder), (resolution, resolution), random_flip=True, cache_gb=cache_gb)
                sampler = StreamSampler(len(data), options.batch_size, seed=0)
                return DataLoader(TrainingView(data, 0), batch_sampler=sampler, collate_fn=collate, **shared)

            def peer(resolution=resolution, shared=shared) -> DataLoader:
                data = PeerDataset(str(folder), resolution, augment_horizontal_flip=True)
                return DataLoader(data, options.batch_size, shuffle=True, **shared)

            cached = ours(cache_gb=4)
            for index in range(len(cached.dataset.dataset)):  # an epoch before
                cached.dataset.dataset.load(index)
            found = alternate(
                {
                    "ours": lambda ours=ours: rate(ours(0), options.images // 4),
                    "ours, cached": lambda cached=cached: rate(cached, options.images),
                    "peer": lambda peer=peer: rate(peer(), options.images // 4),
                },
                options.rounds,
            )
            row = {"resolution": resolution, "workers": workers, **{f"{k} images/s": v for k, v in found.items()}}
            row |= {"ratio": found["ours"] / found["peer"], "ratio, cached": found["ours, cached"] / found["peer"]}
            rows.append(row)
            print("  ".join(f"{k} {v:,.2f}" if "ratio" in k else f"{k} {v:,.0f}" for k, v in row.items()), flush=True)
    for row in [row for row in rows if row["workers"] == 1]:
        cost = training_flops(row["resolution"])
        per_core = row["ours images/s"]
        print(
            f"default model at {row['resolution']} pixels: {cost / 1e9:.1f} GFLOP an image and step; 8 workers "
            f"at {per_core:,.0f} images/s each feed a GPU that sustains {8 * per_core * cost / 1e12:,.0f} TFLOP/s"
        )
        row |= {"GFLOP an image": cost / 1e9, "TFLOP/s fed by 8 workers": 8 * per_core * cost / 1e12}
    return rows


def training_flops(resolution: int) -> float:
    """Floating-point operations of forward and backward pass of the default model, one image."""
    with torch.device("meta"):
        model = UNet2D(sample_size=resolution)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, 3, resolution, resolution), torch.zeros(1, dtype=torch.long)).sample.sum().backward()
    return float(counter.get_total_flops())


BENCHMARKS = {"loader": benchmark_loader}


def main(arguments: list) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender is measured")
    parser.add_argument("--images", type=int, default=10_000, help="JPEGs of the loader's measurement")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128], help="that the loader resizes to")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the loader")
    parser.add_argument("--batch_size", type=int, default=64, help="of the loader")
    parser.add_argument("--output_dir", default="benchmark", help="where benchmark.json goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # of the main process, beside the workers
    results = {name: BENCHMARKS[name](options) for name in options.only}
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps({**machine, **results}, indent=1))
    print(f"results: {folder / 'benchmark.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
