"""A noise schedule that follows the size of the items: the distance to the data with and without `snr_shift auto`.

    python training/studies/snr_shift.py --output_dir studies/snr_shift      # prints the table of docs/studies.md

Two sets, each with one item size that is large for the schedule: 256 sequences of 5,000 points (a slow walk, an
oscillation with a period of its own, and fine noise), and 256 crops of 128 x 128 of scikit-learn's two photographs.
Both trainings of a set have the same steps, seed and model; only the schedule differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Job, finish, run_jobs, views
from scipy.signal import lfilter

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.evaluation.metrics import Gaussian, frechet_distance

ITEMS, LENGTH, SIDE = 256, 5_000, 128
MODELS = {
    "series": {"dim": 16, "dim_mults": [1, 2, 4, 8], "attn_heads": [2], "attn_dim_head": [16], "mid_full_attn": False},
    "crops": {"dim": 16, "dim_mults": [1, 2, 4, 8], "attn_heads": [2], "attn_dim_head": [16]},
}
SAMPLING_STEPS = 15
SHIFTS = ("0", "auto")


def series(count: int = ITEMS, seed: int = 0) -> np.ndarray:
    """Sequences (count, 1, LENGTH) in [-1, 1]: a walk with a memory of 1,500 points, a sine, and noise."""
    rng = np.random.default_rng(seed)
    kept = 1 - 1 / 1_500
    warm = 5_000
    walk = lfilter([(1 - kept**2) ** 0.5], [1, -kept], rng.standard_normal((count, warm + LENGTH)))[:, warm:]
    period, phase = rng.uniform(20, 60, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
    sine = np.sin(2 * np.pi * np.arange(LENGTH) / period + phase)
    x = walk + 0.4 * sine + 0.1 * rng.standard_normal((count, LENGTH))
    return np.clip(x / 3.5, -1, 1)[:, None].astype(np.float32)


def crops(count: int = ITEMS, seed: int = 0) -> np.ndarray:
    """8-bit pictures (count, SIDE, SIDE, 3)."""
    from sklearn.datasets import load_sample_images

    rng, photographs, found = np.random.default_rng(seed), load_sample_images().images, []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (int(rng.integers(size - SIDE + 1)) for size in photograph.shape[:2])
        found.append(photograph[top : top + SIDE, left : left + SIDE])
    return np.stack(found)


def series_views(x: np.ndarray) -> list[np.ndarray]:
    """Sequences (N, 1, LENGTH) -> what is compared: means of 100 points, and pieces of 50 points without their mean."""
    coarse = x.reshape(len(x), -1, 100).mean(axis=2)
    pieces = x.reshape(-1, 50)
    return [coarse, pieces - pieces.mean(axis=1, keepdims=True)]


def distances(data: str, samples: np.ndarray, real: np.ndarray) -> list[float]:
    """Fréchet distances of layout and of texture."""
    make = series_views if data == "series" else views
    return [frechet_distance(Gaussian.fit(a), Gaussian.fit(b)) for a, b in zip(make(samples), make(real))]


def run(options: dict, folder: Path) -> dict:
    """Train and sample once; return the distances."""
    from ddpm_hf import DDPMPipeline, DDPMPipeline1D, TrainConfig, train

    data = options["data"]
    real = series() if data == "series" else crops()
    items = torch.from_numpy(real if data == "series" else np.moveaxis(real, -1, 1) / np.float32(127.5) - 1)
    config = TrainConfig(
        output_dir=str(folder / "run"), seed=options["seed"], num_cpu_threads=1, report_to="none",
        save_samples_steps=0, num_samples=1, ddpm_num_inference_steps=1, checkpointing_steps=10**9,
        max_train_steps=options["steps"], train_batch_size=4, optimizer="muon", muon_learning_rate=9e-3,
        learning_rate=1.5e-3, lr_warmup_steps=25, ema_power=0.6, snr_shift=options["shift"], **MODELS[data],
    )  # fmt: skip
    kind = DDPMPipeline1D if data == "series" else DDPMPipeline
    pipe = kind.from_pretrained(train(config, items).pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.use_fast_sampler(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(options["samples"] // 16):
        out = pipe(16, generator=generator, output_type="np", return_dict=False)[0]
        parts.append(out if data == "series" else (out * 255).round().astype(np.uint8))
    return {"distances": distances(data, np.concatenate(parts), real)}


def report(jobs: list[Job], samples: int) -> str:
    """Markdown: a row for each training."""
    lines = ["| set | snr_shift | seed | layout | texture |", "|---|---|---|---|---|"]
    for job in jobs:
        o, found = job.options, job.result()["distances"]
        lines.append(f"| {o['data']} | {o['shift']} | {o['seed']} | {found[0]:.3f} | {found[1]:.3f} |")
    for data, make in (("series", series), ("crops", crops)):
        if any(job.options["data"] == data for job in jobs):
            other = distances(data, make(samples, 1), make())
            lines.append(f"| {data} | new real items | | {other[0]:.3f} | {other[1]:.3f} |")
    return "\n".join(lines)


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--samples", type=int, default=64, help="samples of each training, a multiple of 16")
    parser.add_argument("--at_once", type=int, default=2, help="trainings side by side, of one thread each")
    parser.add_argument("--output_dir", default="studies/snr_shift")
    parser.add_argument("--job", help="(one training, as JSON)")
    parser.add_argument("--file", type=Path, help="(where its answer goes)")
    options = parser.parse_args(arguments)
    if options.job:
        job = json.loads(options.job)
        with tempfile.TemporaryDirectory() as folder:
            finish(options.file, {**job, **run(job, Path(folder))})
        return 0
    jobs = [
        Job(
            {"data": data, "shift": shift, "seed": seed, "steps": options.steps, "samples": options.samples},
            Path(options.output_dir) / f"{data}-{shift}-{seed}.json",
        )
        for seed in range(options.seeds)
        for data in options.data
        for shift in SHIFTS
    ]
    run_jobs(__file__, jobs, options.at_once)
    print(report(jobs, options.samples))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
