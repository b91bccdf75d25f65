"""Training a learned variance: the bound falls, runs resume bit for bit, models and options fit, samples are drawn."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from helpers import MODEL, config, state

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, TrainConfig, UNet2D, train
from ddpm_hf.data.images import digits
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.trainer.loop import Trainer

LEARNED = {"learned_variance": True, "ddpm_num_steps": 50}


def bound(pipeline):
    settings = EvalSettings(metrics=["bits_per_dim"], likelihood_items=32, likelihood_timesteps=25)
    return Evaluator(Accelerator(cpu=True), digits(), (1, 8, 8), settings)(pipeline, 5)["bits_per_dim"]


def test_training_lowers_the_bound_and_the_pipeline_samples(tmp_path):
    """Also without a better mean: with the mean of the last step and the first step's variance the bound is higher."""
    train(config(tmp_path, max_train_steps=60, learning_rate=3e-3, lr_warmup_steps=0, use_ema=False, **LEARNED))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.learned_variance and pipeline.scheduler.config.variance_type == "learned_range"
    trained = bound(pipeline)
    for steps in (3, 50):  # DDIM, and the whole chain with the variance
        samples = pipeline(batch_size=2, num_inference_steps=steps, output_type="np").images
        assert samples.shape == (2, 8, 8, 1)
    # the variance of an untrained model is about the mean of both logarithms
    with torch.no_grad():
        last = pipeline.unet.out_stage.conv
        last.weight[1:] = 0
        last.bias[1:] = 0
    halfway = bound(pipeline)
    torch.manual_seed(0)
    fresh = UNet2D(**{**dict(pipeline.unet.config), "sample_size": 8})
    assert trained < halfway - 0.02
    assert trained < bound(DDPMPipeline(fresh, pipeline.scheduler)) - 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"self_condition": True, "class_labels": "label", "prediction_type": "epsilon", "dropout": 0.1},
        {"dataset_name": "ecg", "sequence_length": 16, "condition": "known", "gradient_checkpointing": True,
         "min_snr_gamma": 5.0, "prediction_type": "sample", "noise_offset": 0.1},
    ],
    ids=["images", "sequences"],
)  # fmt: skip
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, monkeypatch, options):
    """Stopped in step 4, after the checkpoint of step 2."""
    options = {**LEARNED, **options, "max_train_steps": 4, "checkpointing_steps": 2}
    train(config(tmp_path / "whole", **options))
    step = Trainer._train_step

    def interrupted(self, batches):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "parts", **options))
    monkeypatch.setattr(Trainer, "_train_step", step)
    train(config(tmp_path / "parts", **options))
    assert state(tmp_path / "whole") == state(tmp_path / "parts")


@pytest.mark.parametrize(
    ("dtype", "span", "levels"), [(np.uint16, [0, 4095], 4096), (np.float32, [-900, 900], None), (np.uint8, None, 256)]
)
def test_the_bound_has_the_levels_of_the_data(tmp_path, monkeypatch, dtype, span, levels):
    """As the metric bits_per_dim has them; data that is not whole numbers has a density."""
    draw = np.random.default_rng(0)
    low, high = span or [0, 255]
    np.save(tmp_path / "x.npy", draw.integers(low, high, (8, 1, 8, 8), endpoint=True).astype(dtype))
    seen = []
    term = GaussianScheduler.bound_term

    def watch(self, *args, **kwargs):
        seen.append((kwargs.get("levels"), kwargs.get("decoder")))
        return term(self, *args, **kwargs)

    monkeypatch.setattr(GaussianScheduler, "bound_term", watch)
    options = {"dataset_name": None, "train_data_file": str(tmp_path / "x.npy"), "image_range": span}
    train(config(tmp_path / "run", max_train_steps=1, **options, **LEARNED))
    assert seen == [(levels, None if levels else "density")]
    saved = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    kept = [levels] if levels and span else None  # pictures have 8 bits
    assert saved.get("data_levels") == kept and ("data_levels" in saved) == bool(kept)
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert ("| levels of each channel | 4,096 |" in card) == bool(kept)


def test_options_and_models_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="vlb_weight applies to runs with learned_variance"):
        TrainConfig(vlb_weight=0.01)
    with pytest.raises(ValueError, match="vlb_weight must be greater than 0, got 0"):
        TrainConfig(learned_variance=True, vlb_weight=0.0)
    with pytest.raises(
        ValueError, match="eval_likelihood_items applies to runs with eval_steps and the metric bits_per"
    ):
        TrainConfig(eval_steps=5, eval_likelihood_items=5)
    stock = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4,
             "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip
    for model, asked in (
        (UNet2D(8, in_channels=1, learned_variance=True, **MODEL), {}),
        (UNet2D(8, in_channels=1, **MODEL), LEARNED),
        (UNet2DModel(out_channels=1, **stock), LEARNED),
    ):
        with pytest.raises(ValueError, match="learned_variance must be true for a given model that predicts twice"):
            train(TrainConfig(dataset_name="digits", output_dir=str(tmp_path / "no"), **asked), model=model)
    assert not (tmp_path / "no").exists()
    options = {"dataset_name": "digits", "output_dir": str(tmp_path / "stock"), "max_train_steps": 1, "num_samples": 1,
               "report_to": "none", "train_batch_size": 2, "ddpm_num_inference_steps": 2}  # fmt: skip
    train(TrainConfig(**options, **LEARNED), model=UNet2DModel(out_channels=2, **stock))
    assert (tmp_path / "stock" / "pipeline" / "model_index.json").exists()


def test_sequences_sample_from_their_own_pipeline(tmp_path):
    train(config(tmp_path, dataset_name="ecg", sequence_length=16, max_train_steps=2, **LEARNED))
    pipeline = DDPMPipeline1D.from_pretrained(tmp_path / "pipeline")
    assert pipeline(num_inference_steps=50).sequences.shape == (1, 1, 16)
