"""The table of larger images in docs/long.md: textures by each method, and their seams.

    python training/studies/large.py        # trains on crops of scikit-learn's photographs; runs/large/table.md

"Sequential", which pipelines do not have for images, is made here of calls of `inpaint`: window after window in the
order of reading, with what the windows before have left known (RePaint). A seam is where the new part of a window
begins, or, for windows that are denoised together, where one begins or ends.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import crops
from PIL import Image
from sklearn.datasets import load_sample_images

from ddpm_hf import DDPMPipeline, TrainConfig, train
from ddpm_hf.pipeline.windows import window_starts
from ddpm_hf.plots import save_image_grid

WINDOW, OVERLAP, SIZE, ITEMS, STEPS = 16, 8, 40, 16, 50
METHODS = ("beside each other", "single", "joint", "sequential")


def halved() -> list[np.ndarray]:
    """Return scikit-learn's photographs at half their size, 8-bit (H, W, 3)."""
    return [np.asarray(Image.fromarray(x).reduce(2)) for x in load_sample_images().images]


def sequential(pipe, generator: torch.Generator) -> np.ndarray:
    """Return images (N, SIZE, SIZE, 3) that are completed window after window."""
    starts = window_starts(SIZE, WINDOW, OVERLAP)
    x, known = np.zeros((ITEMS, SIZE, SIZE, 3)), np.zeros((SIZE, SIZE), bool)
    shared = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
    for top in starts:
        for left in starts:
            place = (slice(top, top + WINDOW), slice(left, left + WINDOW))
            if known[place].any():
                given = x[(slice(None), *place)]
                x[(slice(None), *place)] = pipe.inpaint(given, ~known[place], jump_length=1, **shared).images
            else:
                x[(slice(None), *place)] = pipe(ITEMS, **shared).images
            known[place] = True
    return x


def draw(pipe, method: str) -> tuple[np.ndarray, list[int]]:
    """Return images in [0, 1] by a method, and the places of their seams along each axis."""
    generator = torch.Generator().manual_seed(0)
    shared = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
    starts = window_starts(SIZE, WINDOW, OVERLAP)
    if method == "beside each other":
        tiles = -(-SIZE // WINDOW)
        x = pipe(ITEMS * tiles**2, **shared).images.reshape(ITEMS, tiles, tiles, WINDOW, WINDOW, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(ITEMS, tiles * WINDOW, tiles * WINDOW, 3)
        return x[:, :SIZE, :SIZE], list(range(WINDOW, SIZE, WINDOW))
    if method == "sequential":
        return sequential(pipe, generator), [place + OVERLAP for place in starts[1:]]
    overlap = {} if method == "single" else {"overlap": OVERLAP}
    x = pipe(ITEMS, height=SIZE, width=SIZE, method=method, **overlap, **shared).images
    ends = sorted({*starts, *(place + WINDOW for place in starts)} - {0, SIZE})
    return x, [] if method == "single" else ends


def measure(x: np.ndarray, real: np.ndarray, seams: list[int]) -> list[str]:
    """Return the cells of a row for images (N, H, W, 3) in levels of 255."""
    jumps = [np.abs(np.diff(x, axis=axis)).swapaxes(1, axis) for axis in (1, 2)]
    at = np.zeros(jumps[0].shape[1], bool)
    at[[place - 1 for place in seams]] = True
    cells = [f"{x.std():.0f}"]
    for chosen in (at, ~at):
        part = np.concatenate([each[:, chosen].ravel() for each in jumps])
        cells.append(f"{np.median(part):.1f}, {np.quantile(part, 0.95):.0f}" if part.size else "")
    spectra = [np.log10((abs(np.fft.fft2(y.mean(-1) - y.mean(), axes=(1, 2))) ** 2).mean(0)) for y in (x, real)]
    cells.append(f"{10 * np.sqrt(np.mean((spectra[0] - spectra[1]) ** 2)):.1f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="A pipeline of these crops; it is trained if none is given.")
    parser.add_argument("--steps", type=int, default=1500, help="Steps of training.")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="Rows of the table.")
    parser.add_argument("--output_dir", default="runs/large", help="Folder for the model, the table and the pictures.")
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if options.pipeline is None:
        config = TrainConfig(
            output_dir=str(folder / "run"), max_train_steps=options.steps, train_batch_size=32, learning_rate=1e-3,
            dim=16, dim_mults=[1, 2, 4], attn_heads=2, attn_dim_head=16, report_to="none",
        )  # fmt: skip
        options.pipeline = train(config, dataset=list(crops(halved(), WINDOW, 6000))).pipeline_dir
    pipe = DDPMPipeline.from_pretrained(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    real = crops(halved(), SIZE, 500, seed=1).astype(np.float64)
    lines = ["| images | deviation | jumps at seams | other jumps | spectrum, dB |", "|" + "---|" * 5]
    lines.append("| crops of the photographs | " + " | ".join(measure(real, real, [])) + " |")
    for method in options.methods:
        x, seams = draw(pipe, method)
        pictures = [Image.fromarray(image) for image in (x * 255).round().astype(np.uint8)]
        save_image_grid(pictures, folder / f"{method.replace(' ', '-')}.png")
        lines.append(f"| {method} | " + " | ".join(measure(255 * x, real, seams)) + " |")
        print(lines[-1], flush=True)
        (folder / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
