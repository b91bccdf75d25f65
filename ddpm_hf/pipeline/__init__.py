"""Sampling pipelines: `DDPMPipeline` (images) and `DDPMPipeline1D` (sequences).

The package has one file for each thing that a pipeline does. A saved pipeline carries all of them as one file
(`joining.py`), because diffusers fetches one file of code for a pipeline from the Hub. For the same reason nothing here
imports from the rest of ddpm_hf.
"""

from ddpm_hf.pipeline.completing import Repaint, resampling_plan
from ddpm_hf.pipeline.graphs import GraphedModel
from ddpm_hf.pipeline.images import DDPMPipeline
from ddpm_hf.pipeline.outputs import IMAGE_MODES, ImageOutput, SequenceOutput
from ddpm_hf.pipeline.saving import CARRIED, card_to_keep, is_own_card, sign_card
from ddpm_hf.pipeline.schedulers import FAST, log_snr_timesteps, step_options
from ddpm_hf.pipeline.sequences import DDPMPipeline1D
from ddpm_hf.pipeline.steps import X0Estimate

__all__ = [
    "CARRIED",
    "DDPMPipeline",
    "DDPMPipeline1D",
    "FAST",
    "GraphedModel",
    "IMAGE_MODES",
    "ImageOutput",
    "Repaint",
    "SequenceOutput",
    "X0Estimate",
    "card_to_keep",
    "is_own_card",
    "log_snr_timesteps",
    "resampling_plan",
    "sign_card",
    "step_options",
]
