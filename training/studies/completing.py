"""The picture of docs/completing.md: digits and an electrocardiogram of which a part is known, completed by RePaint.

    python training/train.py
    python training/train.py --config training/configs/ecg.yaml --sequence_length 128 --dim 16 --train_batch_size 16 \\
        --max_train_steps 700 --holdout 40 --eval_steps 0 --output_dir runs/ecg-short
    python training/studies/completing.py        # draws runs/completing.png, in a few minutes

What is completed was held out from training: digits as the demo draws them, and the recording's beginning.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from pywt.data import ecg
from sklearn.datasets import load_digits

from ddpm_hf import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.data.loading import hold_out

JUMPS = {"num_inference_steps": 50, "jump_length": 1, "jump_n_sample": 10}
DIGITS, SAMPLES = 4, 4
SERIES_SAMPLES = 40


def show_digits(figure, pipe) -> None:
    """Draw a row for each digit: what is known, four completions of it, and the digit."""
    images = load_digits().images
    places = hold_out(range(len(images)), 100, seed=0)[1].indices[:DIGITS]
    truth = (images[places, ..., None] / 16).astype(np.float32)
    unknown = np.zeros((8, 8), bool)
    unknown[4:] = True
    done = pipe.inpaint(truth, unknown, num_samples=SAMPLES, output_type="np",
                        generator=torch.Generator().manual_seed(0), **JUMPS).images  # fmt: skip
    axes = figure.subplots(DIGITS, SAMPLES + 2)
    for row in range(DIGITS):
        masked = np.where(unknown, 0.5, truth[row, ..., 0])
        for ax, picture in zip(axes[row], (masked, *done[row * SAMPLES :][:SAMPLES, ..., 0], truth[row, ..., 0])):
            size = (64, 64)
            ax.imshow(np.asarray(Image.fromarray(picture.astype(np.float32)).resize(size, Image.Resampling.NEAREST)),
                      cmap="gray", vmin=0, vmax=1)  # fmt: skip
            ax.set_axis_off()
    for ax, title in zip(axes[0, [0, 1, -1]], ("known", "completed", "true")):
        ax.set_title(title, fontsize=9)


def show_series(figure, pipe) -> None:
    """Draw a forecast and a gap: median, bands of 50% and 90% of the completions, and the truth."""
    length = pipe.unet.config.sample_size
    truth = np.asarray(ecg()[:length], np.float64)[None, None]
    place = np.arange(length)
    axes = figure.subplots(2, 1, sharex=True)
    for ax, title, unknown in zip(
        axes, ("forecast", "gap"), (place >= length * 3 // 4, abs(place - length * 0.45) < length / 8)
    ):
        done = pipe.inpaint(np.where(unknown, np.nan, truth), num_samples=SERIES_SAMPLES,
                            generator=torch.Generator().manual_seed(0), **JUMPS).sequences[:, 0]  # fmt: skip
        for low, high, shade in ((5, 95, 0.2), (25, 75, 0.4)):
            ax.fill_between(place, *np.percentile(done, (low, high), axis=0), alpha=shade, color="C0", linewidth=0)
        ax.plot(place, np.where(unknown, np.median(done, axis=0), np.nan), color="C0", linewidth=1.2)
        ax.plot(place, truth[0, 0], color="black", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="runs/digits/pipeline", help="Pipeline of the demo of images.")
    parser.add_argument("--ecg", default="runs/ecg-short/pipeline", help="Pipeline of the recording.")
    parser.add_argument("--output", default="runs/completing.png", help="Picture to write.")
    options = parser.parse_args()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    pipelines = DDPMPipeline.from_pretrained(options.digits), DDPMPipeline1D.from_pretrained(options.ecg)
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
    show_digits(left, pipelines[0])
    show_series(right, pipelines[1])
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
