"""Shared parts of the studies: two small sets of real pictures, a distance to them, and jobs that run side by side.

digits: scikit-learn's handwritten digits, 1,797 of 8 x 8, grey. crops: 6,000 of 32 x 32 from its two photographs.
"""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_hf.evaluation.metrics import Gaussian, frechet_distance

CROPS = 6_000
# The U-Nets of both sides: few multiplications, so that whole trainings and many samples fit in an hour of two cores.
MODELS = {
    "digits": {"dim": 32, "dim_mults": (1, 2)},
    "crops": {"dim": 16, "dim_mults": (1, 2, 4), "attn_heads": 2, "attn_dim_head": 16},
}


@functools.cache
def pictures(name: str) -> np.ndarray:
    """All pictures of a set, 8-bit (N, H, W, C)."""
    from sklearn.datasets import load_digits, load_sample_images

    if name == "digits":
        return (load_digits().images[..., None] * (255 / 16)).round().astype(np.uint8)
    return crops(load_sample_images().images, 32, CROPS)


def crops(photographs: list[np.ndarray], side: int, count: int, seed: int = 0) -> np.ndarray:
    """Crops at random places of photographs in turn, 8-bit (count, side, side, 3)."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (int(rng.integers(size - side + 1)) for size in photograph.shape[:2])
        found.append(photograph[top : top + side, left : left + side])
    return np.stack(found)


def write_pictures(name: str, folder: Path) -> Path:
    """The set as PNG files, which both trainers read; once."""
    target = folder / name
    if not target.exists():
        aside = folder / f"{name}.{os.getpid()}"
        aside.mkdir(parents=True)
        for number, array in enumerate(pictures(name)):
            Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(aside / f"{number:05d}.png")
        aside.rename(target)
    return target


def views(images: np.ndarray) -> list[np.ndarray]:
    """8-bit pictures (N, H, W, C) -> what is compared, in [0, 1]: pictures of 8 x 8 as they are; larger ones averaged
    down to 8 x 8, and as their patches of 8 x 8 at full resolution, so that both layout and texture count."""
    x = images.astype(np.float32) / 255
    if x.shape[1] == 8:
        return [x.reshape(len(x), -1)]
    n, h, w, c = x.shape
    blocks = x.reshape(n, 8, h // 8, 8, w // 8, c)
    patches = x[:, : h // 8 * 8, : w // 8 * 8].reshape(n, h // 8, 8, w // 8, 8, c).swapaxes(2, 3)
    return [blocks.mean(axis=(2, 4)).reshape(n, -1), patches.reshape(-1, 8 * 8 * c)]


@functools.cache
def _real(name: str) -> list[Gaussian]:
    return [Gaussian.fit(view) for view in views(pictures(name))]


def distance(images: np.ndarray, name: str) -> float:
    """Fréchet distance of 8-bit pictures (N, H, W, C) to a set: of their pixels, summed over `views`."""
    return sum(frechet_distance(Gaussian.fit(view), real) for view, real in zip(views(images), _real(name)))


def floor(name: str, count: int, seed: int = 0) -> float:
    """The distance of `count` real pictures, drawn with replacement: what a perfect sampler would have, about."""
    real = pictures(name)
    return distance(real[np.random.default_rng(seed).integers(len(real), size=count)], name)


@torch.no_grad()
def sample(pipe, count: int, steps: int, seed: int = 0, batch: int = 250) -> np.ndarray:
    """8-bit pictures (count, H, W, C); the same x_T for the same seed, whatever the sampler and number of steps."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    shape = (pipe.unet.config.in_channels, *pipe._size())
    latents = torch.randn(count, *shape, generator=generator)
    arrays = [
        pipe(batch_size=len(x), latents=x, num_inference_steps=steps, generator=generator, output_type="np").images
        for x in latents.split(batch)
    ]
    return (np.concatenate(arrays) * 255).round().astype(np.uint8)


def log_ticks(axis) -> None:
    """Labels of a logarithmic axis: 1, 2, 5, 10, 20, ... in plain numbers."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


@dataclass
class Job:
    """A program's own run of one part: `options` as JSON on its command line, the answer in `file`."""

    options: dict
    file: Path

    def done(self) -> bool:
        """Return True if the file has the answer to these options: it may be left of a run with others."""
        if not self.file.exists():
            return False
        asked, answer = json.loads(json.dumps(self.options)), self.result()
        return all(name in answer and answer[name] == value for name, value in asked.items())

    def result(self) -> dict:
        return json.loads(self.file.read_text())


def run_jobs(program: str, jobs: list[Job], at_once: int) -> None:
    """Each job in a process of one thread, `at_once` side by side, in the order given; finished ones are not run again.

    Raises:
        SystemExit: a job failed; its log is named.
    """
    waiting = list(jobs)
    running: list[tuple[Job, subprocess.Popen]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            if job.done():
                continue
            job.file.parent.mkdir(parents=True, exist_ok=True)
            log = job.file.with_suffix(".log").open("w")
            command = [sys.executable, program, "--job", json.dumps(job.options), "--file", str(job.file)]
            running.append((job, subprocess.Popen(command, stdout=log, stderr=log, env=environment)))
        time.sleep(0.2)
        for job, process in list(running):
            if process.poll() is not None:
                running.remove((job, process))
                if process.returncode or not job.done():
                    for _, other in running:
                        other.terminate()
                    raise SystemExit(f"a job failed: {job.file.with_suffix('.log')}")
                print(f"{job.file.stem}: {job.result().get('distance', '')}", flush=True)


def finish(file: Path, answer: dict) -> None:
    """Write a job's answer, whole or not at all."""
    aside = file.with_suffix(".writing")
    aside.write_text(json.dumps(answer))
    aside.rename(file)
