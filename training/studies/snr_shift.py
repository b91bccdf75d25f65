"""A noise schedule that follows the size of the items: the distance to the data with and without `snr_shift auto`.

    python training/studies/snr_shift.py --data series      # prints the tables of docs/studies.md
    python training/studies/snr_shift.py --data emoji --steps 100 --seeds 2

Two sets, each with one item size that is large for the schedule: 256 sequences of 5,000 points (a slow walk, an
oscillation with a period of its own, and fine noise), and 1,446 emoji of 128 x 128, which are read from a font that
must be installed (on Debian: apt-get install fonts-noto-color-emoji). Both trainings of a set have the same steps, seed
and model; only the schedule differs.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Job, finish, run_jobs, views
from PIL import Image
from scipy.signal import lfilter

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.evaluation.metrics import Gaussian, frechet_distance

ITEMS, LENGTH, SIDE = 256, 5_000, 128
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
MODELS = {
    "series": {"dim": 16, "dim_mults": [1, 2, 4, 8], "attn_heads": [2], "attn_dim_head": [16], "mid_full_attn": False},
    "emoji": {"dim": 8, "dim_mults": [1, 2, 2, 4, 4], "attn_heads": [2], "attn_dim_head": [16]},
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


def emoji(font: str) -> np.ndarray:
    """8-bit pictures (1,446, SIDE, SIDE, 3) on white: each single character that the font has a bitmap of."""
    from fontTools.ttLib import TTFont

    tables, found = TTFont(font), []
    bitmaps = tables["CBDT"].strikeData[0]
    for name in dict.fromkeys(tables.getBestCmap().values()):
        if name in bitmaps:
            picture = Image.open(io.BytesIO(bitmaps[name].imageData)).convert("RGBA")
            left, top = ((side - SIDE) // 2 for side in picture.size)
            picture = picture.crop((left, top, left + SIDE, top + SIDE))
            found.append(np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3])
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


def items(options: dict) -> np.ndarray:
    """The real items of a job: sequences, or 8-bit pictures."""
    return series() if options["data"] == "series" else emoji(options["font"])


def run(options: dict, folder: Path) -> dict:
    """Train and sample once; return the distances."""
    from ddpm_hf import DDPMPipeline, DDPMPipeline1D, TrainConfig, train

    data = options["data"]
    real = items(options)
    x = torch.from_numpy(real if data == "series" else np.moveaxis(real, -1, 1) / np.float32(127.5) - 1)
    config = TrainConfig(
        output_dir=str(folder / "run"), seed=options["seed"], num_cpu_threads=1, report_to="none",
        save_samples_steps=0, num_samples=1, ddpm_num_inference_steps=1, checkpointing_steps=10**9,
        max_train_steps=options["steps"], train_batch_size=4, optimizer="muon", muon_learning_rate=9e-3,
        learning_rate=1.5e-3, lr_warmup_steps=25, ema_power=0.6, snr_shift=options["shift"], **MODELS[data],
    )  # fmt: skip
    kind = DDPMPipeline1D if data == "series" else DDPMPipeline
    pipe = kind.from_pretrained(train(config, x).pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.use_fast_sampler(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(options["samples"] // 16):
        out = pipe(16, generator=generator, output_type="np", return_dict=False)[0]
        parts.append(out if data == "series" else (out * 255).round().astype(np.uint8))
    return {"distances": distances(data, np.concatenate(parts), real)}


def report(jobs: list[Job], samples: int) -> str:
    """Markdown: a row for each training, and one for as many real items as samples."""
    lines = ["| set | snr_shift | seed | layout | texture |", "|---|---|---|---|---|"]
    rows = [(job.options["data"], job.options["shift"], job.options["seed"], job.result()["distances"]) for job in jobs]
    for data, options in {job.options["data"]: job.options for job in jobs}.items():
        real = items(options)
        some = series(samples, 1) if data == "series" else np.random.default_rng(0).permutation(real)[:samples]
        rows.append((data, "real items", "", distances(data, some, real)))
    return "\n".join(lines + [f"| {a} | {b} | {c} | {d[0]:.3f} | {d[1]:.3f} |" for a, b, c, d in rows])


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--samples", type=int, default=64, help="samples of each training, a multiple of 16")
    parser.add_argument("--font", default=FONT, help="font that the emoji are read from")
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
    if "emoji" in options.data and not Path(options.font).is_file():
        parser.error(
            f"the emoji need a font of their bitmaps, such as Debian's fonts-noto-color-emoji: no {options.font}"
        )
    common = {"steps": options.steps, "samples": options.samples, "font": options.font}
    jobs = [
        Job(
            {"data": data, "shift": shift, "seed": seed, **common},
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
