"""Training a model that completes what is partly known: what the model sees, the loss, missing values, resuming."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_program
from helpers import MODEL, config, metrics, state, train_until

from ddpm_hf import DDPMPipeline1D, GaussianScheduler, TrainConfig, UNet1D, UNet2D, train
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import Batch
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.masks import draw_known
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.trainer.loop import Trainer
from ddpm_hf.trainer.step import TrainingStep

evaluate_script = load_program("evaluate")
SHORT = {"max_train_steps": 3, "condition": "known", "dataset_name": None}


def waves(count=12, channels=1, length=16, gaps=0.0):
    """Sines of random phases, of which a share is missing."""
    rng = np.random.default_rng(0)
    array = np.sin(np.arange(length) / 3 + 6 * rng.random((count, channels, 1)))
    array[rng.random(array.shape) < gaps] = np.nan
    return array


class Spy(torch.nn.Module):
    """A model whose prediction is a parameter, and that remembers what it saw."""

    def __init__(self, like):
        super().__init__()
        self.prediction, self.calls = torch.nn.Parameter(torch.zeros_like(like)), []

    def forward(self, x, t, condition=None, x_self_cond=None):
        self.calls.append((x, condition, x_self_cond))
        return SimpleNamespace(sample=self.prediction + 0 * x)


def step_of(model, **options):
    c = TrainConfig(condition="known", **options)
    average = SimpleNamespace(share=lambda step: None)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), distributed_type=None)
    return TrainingStep(model, GaussianScheduler(), None, average, c, accelerator)


def test_what_the_model_sees_and_what_counts():
    """The condition has the known values and the mask, and x_t and the estimate are 0 there. Missing values are never
    known; neither they nor known values have a gradient, and all others do."""
    x0 = torch.from_numpy(waves(64, 2, gaps=0.2)).float()
    missing, model = x0.isnan(), Spy(x0)
    numbers = torch.arange(100, 164)
    known = draw_known("mixed", (2, 16), numbers, derive_seed(0, Stream.MASKS)) & ~missing
    step_of(model)._loss(Batch(x0, []), 100, self_condition=True).backward()
    for x_t, condition, estimate in model.calls:
        assert torch.equal(condition[:, :2], x0.masked_fill(~known, 0)) and torch.equal(condition[:, 2:], known.float())
        assert (x_t[known] == 0).all() and x_t.isfinite().all()
        assert estimate is None or (estimate[known] == 0).all()
    gradient = model.prediction.grad
    assert (gradient[known | missing] == 0).all() and (gradient[~(known | missing)] != 0).all()


def test_of_wholly_unknown_items_the_loss_is_the_ordinary_one(monkeypatch):
    """The same to rounding of a sum: also the draws of timesteps and noise are those without a condition."""
    x0 = torch.from_numpy(waves(8)).float()
    model = UNet1D(16, in_channels=1, condition_channels=2, **MODEL)
    nothing = lambda strategy, shape, numbers, key: torch.zeros(len(numbers), *shape, dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr("ddpm_hf.trainer.step.draw_known", nothing)
    step, ordinary = step_of(model), step_of(model)
    ordinary.config = TrainConfig()
    found, expected = (each._loss(Batch(x0, []), 0, self_condition=False) for each in (step, ordinary))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["minmax", "meanstd"])
def test_missing_values_do_not_change_the_scaling(norm):
    """The moments are those that NumPy finds without them; the others are scaled as ever, and 0 stands for none."""
    array = waves(300, 3, gaps=0.3) * [[1.0], [5.0], [0.1]] + 2
    data = SequenceDataset(array, norm=norm, missing=True)
    assert data.gaps == np.isnan(array).sum()
    low, high = np.nanmin(array, axis=(0, 2)), np.nanmax(array, axis=(0, 2))
    shift, scale = {
        "minmax": ((low + high) / 2, (high - low) / 2),
        "meanstd": (np.nanmean(array, axis=(0, 2)), np.nanstd(array, axis=(0, 2))),
    }[norm]
    np.testing.assert_allclose(data.scaling.shift, shift, rtol=1e-12)
    np.testing.assert_allclose(data.scaling.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(data[5], ((array[5].T - shift) / scale).T, rtol=1e-5, atol=1e-6)
    whole = waves(300, 3)
    plain, allowed = SequenceDataset(whole, norm=norm), SequenceDataset(whole, norm=norm, missing=True)
    np.testing.assert_allclose(allowed.scaling.scale, plain.scaling.scale, rtol=1e-12)


def test_missing_values_that_are_refused(tmp_path):
    array = waves(6, 2, gaps=0.1)
    with pytest.raises(ValueError, match="the array has NaN or infinity in rows 0"):
        SequenceDataset(array)
    array[3, 1, 2] = np.inf
    with pytest.raises(ValueError, match="the array has infinity in rows 3: row 3 has inf in channel 1, sample 2$"):
        SequenceDataset(array, missing=True)
    array[:, 1] = np.nan
    with pytest.raises(ValueError, match="channel 1 of the array must have a value, got NaN alone"):
        SequenceDataset(array, missing=True)
    data = SequenceDataset(waves(6, gaps=0.1), missing=True)
    with pytest.raises(ValueError, match="needs condition 'known'.* got condition None"):
        open_data(TrainConfig(), data)
    with pytest.raises(ValueError, match="metrics must be of held_out_loss.* got frechet"):
        train(config(tmp_path, **SHORT, train_batch_size=2, eval_steps=1, eval_num_samples=4), dataset=data)


def test_files_with_missing_values(tmp_path):
    """Empty cells and the usual words; other texts are refused, and without condition every one of them."""
    (tmp_path / "x.csv").write_text("a,b,c\n1,,3\n4,nan,6\nNA,8,9\n2,3,1\n")
    array = np.array([[1, np.nan, 3], [4, np.nan, 6], [np.nan, 8, 9], [2, 3, 1]])
    np.save(tmp_path / "x.npy", array)
    for name in ("x.csv", "x.npy"):
        feed = open_data(TrainConfig(train_data_file=str(tmp_path / name), condition="known", train_batch_size=2))
        assert np.array_equal([np.isnan(feed.dataset[i][0].numpy()) for i in range(4)], np.isnan(array))
        assert feed.notes[0] == "missing values (NaN), which are never known and never in the loss: 3"
        with pytest.raises(ValueError, match="finite number in every cell|NaN or infinity in rows"):
            open_data(TrainConfig(train_data_file=str(tmp_path / name)))
    (tmp_path / "x.csv").write_text("1,?,3\n4,5,\n")
    with pytest.raises(ValueError, match=r"row 0 has '\?' in column '1', one of 1 such cells"):
        open_data(TrainConfig(train_data_file=str(tmp_path / "x.csv"), condition="known"))


def test_a_run_with_missing_values_is_resumed_to_the_bit(tmp_path, monkeypatch):
    """Stopped in step 3, after the checkpoint of step 2; the held-out loss leaves missing values out too."""
    np.save(tmp_path / "x.npy", waves(20, 2, gaps=0.2))
    options = {
        **SHORT, "train_data_file": str(tmp_path / "x.npy"), "max_train_steps": 4, "checkpointing_steps": 2,
        "holdout": 4, "eval_steps": 2, "eval_metrics": ["held_out_loss"], "self_condition": True,
    }  # fmt: skip
    result = train(config(tmp_path / "whole", **options))
    train_until(3, monkeypatch, config(tmp_path / "parts", **options))
    train(config(tmp_path / "parts", **options))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, content in whole.items():
        assert parts[name] == content, name
    lines = metrics(tmp_path / "whole")
    assert all(np.isfinite(value) for line in lines for value in line.values())
    pipe = DDPMPipeline1D.from_pretrained(result.pipeline_dir)
    assert pipe.config.condition == "known" and pipe.unet.config.condition_channels == 4
    assert np.isfinite(pipe(batch_size=2).sequences).all()
    command = ["--pipeline", str(result.pipeline_dir), "--data", str(tmp_path / "x.npy")]
    assert evaluate_script.main([*command, "--metrics", "held_out_loss"]) == 0
    records = json.loads((result.pipeline_dir / "evaluation.json").read_text())
    assert all(np.isfinite(record["value"]) for record in records) and len(records) > 1
    assert evaluate_script.main([*command, "--num_inference_steps=2"]) == 2  # samples cannot be compared with it


def test_images_with_classes(tmp_path):
    options = {**SHORT, "dataset_name": "digits", "class_labels": "label", "mask_strategy": "blocks"}
    result = train(config(tmp_path, **options))
    assert np.isfinite(metrics(tmp_path)[-1]["loss"]) and result.steps == 3


def test_what_does_not_fit(tmp_path):
    def refused(message, model=None, **options):
        with pytest.raises(ValueError, match=message):
            Trainer(TrainConfig(**{"dataset_name": "digits", "output_dir": str(tmp_path), **options}), model=model)

    forecast = {"condition": "known", "mask_strategy": "forecast"}
    refused("mask_strategy must be random, blocks or mixed for images.*'forecast'", **forecast)
    refused("mask_strategy applies to runs with condition known; got 'blocks'", mask_strategy="blocks")
    refused("condition must be one of known, got 'half'", condition="half")
    for has, asked in ((0, "known"), (2, None), (4, "known")):
        model = UNet2D(8, in_channels=1, condition_channels=has, **MODEL)
        needs = 2 if asked else 0
        refused(f"condition_channels of the model must be {needs} with .*, got {has}", model, condition=asked)


@pytest.mark.slow
def test_completions_of_a_trained_model_have_the_conditional_law(tmp_path):
    """Of a Gaussian series whose neighbours have the correlation r, the value k places after a known one, a, is
    N(r^k a, 1 - r^(2 k)); values before it change nothing.

    The mean of n completions has the standard error s / sqrt(n), and their deviation s / sqrt(2 n); the tolerance is 5
    of them and what this short training leaves, 0.1. Without the known part the law is N(0, 1), which is further away.
    """
    rng, unit, r, count = np.random.default_rng(0), 0.25, 0.9, 2000  # units of the model for one deviation
    series = [rng.normal(size=20_000)]
    for _ in range(3):
        series.append(r * series[-1] + np.sqrt(1 - r**2) * rng.normal(size=20_000))
    items = torch.from_numpy((unit * np.stack(series, axis=1)).clip(-1, 1)).float()[:, None]
    options = {
        "dataset_name": None, "condition": "known", "mask_strategy": "forecast", "dim_mults": [1], "attn_heads": [1],
        "train_batch_size": 256, "learning_rate": 3e-3, "max_train_steps": 500, "lr_scheduler": "cosine",
        "lr_warmup_steps": 20, "ddpm_num_inference_steps": 50, "num_samples": 1, "use_ema": False,
        "logging_steps": 100,
    }  # fmt: skip
    pipe = DDPMPipeline1D.from_pretrained(train(config(tmp_path, **options), list(items)).pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    for a in (2.0, -1.5):
        known = unit * np.array([[[a, a, np.nan, np.nan]]])
        completed = pipe.inpaint(known, num_samples=count, generator=torch.Generator().manual_seed(1))
        drawn = completed.sequences.reshape(count, 4)[:, 2:] / unit
        law = r ** np.array([1, 2])
        deviation = np.sqrt(1 - law**2)
        assert (np.abs(drawn.mean(axis=0) - law * a) < 5 * deviation / np.sqrt(count) + 0.1).all()
        assert (np.abs(drawn.std(axis=0) - deviation) < 5 * deviation / np.sqrt(2 * count) + 0.1).all()
        assert (np.abs(drawn.mean(axis=0)) > 0.9).all() and (drawn.std(axis=0) < 0.85).all()  # not N(0, 1)
