"""ddpm_hf: denoising diffusion models of images and sequences, as native diffusers components."""

import importlib
from typing import TYPE_CHECKING

from ddpm_hf.version import __version__

if TYPE_CHECKING:  # what editors and type checkers see of the names below
    from ddpm_hf.config import TrainConfig
    from ddpm_hf.pipeline import DDPMPipeline, DDPMPipeline1D
    from ddpm_hf.scheduler import GaussianScheduler
    from ddpm_hf.trainer.loop import train
    from ddpm_hf.unet import UNet1D, UNet2D

__all__ = [
    "DDPMPipeline",
    "DDPMPipeline1D",
    "GaussianScheduler",
    "TrainConfig",
    "UNet1D",
    "UNet2D",
    "__version__",
    "train",
]

MODULES = {
    "DDPMPipeline": "pipeline",
    "DDPMPipeline1D": "pipeline",
    "GaussianScheduler": "scheduler",
    "TrainConfig": "config",
    "UNet1D": "unet",
    "UNet2D": "unet",
    "train": "trainer.loop",
}


def __getattr__(name: str):
    # Each name is imported when it is asked for: code that only samples does not pay for the trainer, and a program
    # that only prints its help pays for neither.
    if name not in MODULES:
        raise AttributeError(f"module 'ddpm_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddpm_hf.{MODULES[name]}"), name)
