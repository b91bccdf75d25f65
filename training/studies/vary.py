"""The pictures of docs/vary.md: variations of a digit by strength, and digits between two encoded ones.

python training/train.py --config training/configs/digits.yaml
python training/studies/vary.py        # runs/vary/: strengths.png and between.png, in some seconds
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_hf import DDPMPipeline

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ROWS, STEPS = 4, 50  # the number of variations, and the steps of the chain
ENDS = ((3, 17), (12, 24))  # numbers of the digits that are interpolated


def save(rows: list[list[Image.Image]], heads: list[float], name: str, file: Path) -> None:
    """Save rows of digits as one picture, with numbers above the columns and their name at the left."""
    figure = Figure(figsize=(0.8 * len(heads), 0.8 * len(rows) + 0.3), layout="constrained")
    for row, (axes, digits) in enumerate(zip(figure.subplots(len(rows), len(heads)), rows)):
        for ax, digit, head in zip(axes, digits, heads):
            ax.imshow(digit, cmap="gray", vmin=0, vmax=255)
            ax.set_axis_off()
            if row == 0:
                ax.set_title(f"{name} {head:.2g}" if head == heads[0] else f"{head:.2g}", fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/digits/pipeline", help="Pipeline of the digits.")
    parser.add_argument("--output_dir", default="runs/vary", help="Folder for the pictures.")
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = DDPMPipeline.from_pretrained(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    data = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in load_digits().images[:32]]
    columns = []
    for strength in STRENGTHS:
        generators = [torch.Generator().manual_seed(seed) for seed in range(ROWS)]
        columns.append(
            pipe(
                image=[data[3]], strength=strength, num_samples=ROWS, generator=generators, num_inference_steps=STEPS
            ).images
        )
    save([list(row) for row in zip(*columns)], list(STRENGTHS), "strength", folder / "strengths.png")
    weights = np.linspace(0, 1, 7).tolist()
    rows = [
        pipe.interpolate(data[first], data[second], weights=weights, method="latent", num_inference_steps=STEPS).images
        for first, second in ENDS
    ]
    save(rows, weights, "weight", folder / "between.png")


if __name__ == "__main__":
    main()
