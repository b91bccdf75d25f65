"""Every option of a run: its type, default, help, rule and scope side by side, one class for each heading.

The help of the command line and the page of options are made from these classes; `TrainConfig` joins them. Names are
those of diffusers' unconditional training example where it has them.
"""

from ddpm_hf.options.data import IMAGE_NORMS, SEQUENCE_NORMS, DataOptions, ImageOptions, LoadingOptions, SequenceOptions
from ddpm_hf.options.model import DiffusionOptions, ModelOptions
from ddpm_hf.options.optimization import AveragingOptions, OptimizationOptions
from ddpm_hf.options.results import EvaluationOptions, PublishingOptions, SavingOptions
from ddpm_hf.options.run import RunOptions

__all__ = [
    "AveragingOptions",
    "DataOptions",
    "DiffusionOptions",
    "EvaluationOptions",
    "IMAGE_NORMS",
    "ImageOptions",
    "LoadingOptions",
    "ModelOptions",
    "OptimizationOptions",
    "PublishingOptions",
    "RunOptions",
    "SEQUENCE_NORMS",
    "SavingOptions",
    "SequenceOptions",
]
