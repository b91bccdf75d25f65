"""ddpm_hf: denoising diffusion models of images and sequences, as native diffusers components."""

from ddpm_hf.pipeline import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.unet import UNet1D, UNet2D
from ddpm_hf.version import __version__

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


def __getattr__(name: str):
    # The trainer brings accelerate and its trackers; code that only samples does not pay for importing them.
    if name == "TrainConfig":
        from ddpm_hf.config import TrainConfig

        return TrainConfig
    if name == "train":
        from ddpm_hf.trainer import train

        return train
    raise AttributeError(f"module 'ddpm_hf' has no attribute {name!r}")
