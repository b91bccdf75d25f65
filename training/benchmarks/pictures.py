"""Folders of pictures to measure with."""

from pathlib import Path

import numpy as np
from PIL import Image


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
