"""What the pipelines return."""

from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # PIL's mode for each number of channels


@dataclass
class ImageOutput(BaseOutput):
    """Sampled images.

    Attributes:
        images: a list of PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`; floats lie in [0, 1].
        trajectory: None, or with `return_all_timesteps` the images from x_T to x_0: a list of PIL images for each
            sample, an array `(B, steps + 1, H, W, C)` or a tensor `(B, steps + 1, C, H, W)`.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[list[Image.Image]] | np.ndarray | Tensor | None = None


@dataclass
class SequenceOutput(BaseOutput):
    """Sampled sequences, in the units of the data.

    Attributes:
        sequences: an array or tensor `(B, C, length)`.
        trajectory: None, or with `return_all_timesteps` the sequences from x_T to x_0, `(B, steps + 1, C, length)`.
    """

    sequences: np.ndarray | Tensor
    trajectory: np.ndarray | Tensor | None = None
