"""Outputs of the pipelines: images, sequences, reconstructions and scores."""

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


@dataclass
class ReconstructionOutput(BaseOutput):
    """The normal form of given items according to the model, in the units of the data.

    Attributes:
        mean, std: mean and standard deviation over the draws (0 for one draw), arrays or tensors of the form of the
            samples: images `(B, H, W, C)` or as tensors `(B, C, H, W)`, sequences `(B, C, length)`.
        samples: the draws, with an axis of their number after the first: `(B, num_samples, ...)`.
    """

    mean: np.ndarray | Tensor
    std: np.ndarray | Tensor
    samples: np.ndarray | Tensor


@dataclass
class ScoreOutput(BaseOutput):
    """Scores of items; more is stranger.

    Attributes:
        scores: `(B,)` float64.
        maps: the score of each value, float32: images `(B, H, W, C)`, sequences `(B, C, length)`.
        options: the options that the scores depend on.
        percentiles: `(B,)`, the percentile of each score among those of the calibration; None without one.
    """

    scores: np.ndarray
    maps: np.ndarray
    options: dict
    percentiles: np.ndarray | None = None
