"""diffusers' own tests of models, schedulers and pipelines, run on our classes from a checkout of its repository.

    DIFFUSERS_CHECKOUT=path/to/diffusers pytest tests/test_diffusers_mixins.py

These tests are in diffusers' repository and not in its package, so without a checkout this file is skipped. A checkout
of the version that is installed fits best: the classes are imported from there, and change between versions.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("DIFFUSERS_CHECKOUT does not name a checkout of diffusers' repository", allow_module_level=True)
sys.path.insert(0, CHECKOUT)  # its tests are the package `tests`

models = import_module("tests.models.testing_utils")
pipelines = import_module("tests.pipelines.testing_utils")
ddpm, ddim = (import_module(f"tests.schedulers.test_scheduler_{name}") for name in ("ddpm", "ddim"))

TINY = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 4}


def skipped(reason: str):
    """Return a test to put in the place of one that does not apply to our class."""

    def test(self):
        pytest.skip(reason)

    return test


NOT_CHOSEN = "our step refuses timesteps that set_timesteps has not chosen"
PRIVATE = "_get_variance is a private method of diffusers' scheduler"
BETAS = "our scheduler refuses betas that are not below 1"
THRESHOLD = "our scheduler refuses a maximum below 1, to which dynamic thresholding would shrink every sample"
TRAINED = "our scheduler refuses trained_betas of another length than num_train_timesteps"
HIDDEN = "our _use_default_values is the same in a saved scheduler, so that stock schedulers know our options as ours"


class SchedulerTests:
    """The options of stock schedulers, by our names, and the tests of all schedulers that do not apply."""

    scheduler_classes = (GaussianScheduler,)
    ours = {"prediction_type": "epsilon", "timestep_spacing": "leading"}

    def get_scheduler_config(self, **options):
        config = {**self.ours, **super().get_scheduler_config(**options)}
        if config["beta_schedule"] == "squaredcos_cap_v2":
            config["beta_schedule"] = "cosine"
        if config.get("set_alpha_to_one") is True:  # ours always does that
            del config["set_alpha_to_one"]
        return config

    @pytest.mark.skipif(not find_spec("torchsde"), reason="a compatible scheduler of diffusers needs torchsde")
    def test_compatibles(self):
        super().test_compatibles()

    test_betas = skipped(BETAS)
    test_from_pretrained = skipped(HIDDEN)
    test_thresholding = skipped(THRESHOLD)
    test_trained_betas = skipped(TRAINED)
    test_variance = skipped(PRIVATE)


class TestSchedulerAsDDPM(SchedulerTests, ddpm.DDPMSchedulerTest):
    test_timesteps = skipped(f"{BETAS}: our linear schedule of fewer than 21 steps would have some")
    test_variance_type = skipped("our scheduler refuses unknown names of options, and the test has one")


class TestSchedulerAsDDIM(SchedulerTests, ddim.DDIMSchedulerTest):
    ours = {**SchedulerTests.ours, "sampler": "ddim", "use_clipped_model_output": False}

    @property
    def forward_default_kwargs(self):
        others = ("eta", "from_save_pretrained", "step_shape", "time_indices", "timestep_spacing")
        # These take steps at timesteps that are not among those of 50 steps.
        steps = 1000 if self._testMethodName.removeprefix("test_") in others else 50
        return (("eta", 0.0), ("num_inference_steps", steps))

    test_full_loop_with_no_set_alpha_to_one = skipped("our scheduler always has abar = 1 after the last step")
    test_inference_steps = skipped(NOT_CHOSEN)
    test_steps_offset = skipped(NOT_CHOSEN)
    test_rescale_betas_zero_snr = skipped("our scheduler refuses zero terminal SNR with the target epsilon")


class ModelTests(models.BaseModelTesterConfig, models.ModelTesterMixin, models.TrainingTesterMixin):
    shape: tuple

    @property
    def output_shape(self):
        return self.shape

    def get_init_dict(self):
        return {"sample_size": self.shape[-1], "in_channels": self.shape[0], **TINY}

    def get_dummy_inputs(self):
        noise = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
        return {"sample": noise, "timestep": torch.tensor([10, 20])}


class TestUNet2D(ModelTests):
    model_class, shape = UNet2D, (3, 8, 8)


class TestUNet1D(ModelTests):
    model_class, shape = UNet1D, (2, 16)


class PipelineTests(pipelines.BasePipelineTesterConfig, pipelines.PipelineTesterMixin):
    # Newer versions of diffusers have the second name of each.
    params = required_input_params_in_call_signature = frozenset(["batch_size"])
    batch_params = batch_input_params = frozenset(["class_labels"])
    # There is no prompt, so there is no number of images for each.
    optional_input_params = frozenset(["num_inference_steps", "generator", "latents", "output_type", "return_dict"])
    required_optional_params = optional_input_params

    def get_dummy_components(self):
        torch.manual_seed(0)
        unet = self.model(sample_size=8, in_channels=1, num_class_embeds=3, **TINY).eval()
        return {"unet": unet, "scheduler": GaussianScheduler()}

    def get_dummy_inputs(self, device=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            "batch_size": 1,
            "generator": generator,
            "num_inference_steps": 2,
            "output_type": "pt",
            "class_labels": 1,
        }


class TestImagePipeline(PipelineTests):
    pipeline_class, model = DDPMPipeline, UNet2D


class TestSequencePipeline(PipelineTests):
    pipeline_class, model = DDPMPipeline1D, UNet1D
