"""Training with paired conditions: what the model is told, the saved pipeline, resuming, evaluation, pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_program
from helpers import MODEL, OnDevice, config, metrics, state, train_until
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, TrainConfig, UNet1D, UNet2D, train
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import Batch
from ddpm_hf.data.scaling import EIGHT_BIT, Scaling
from ddpm_hf.evaluation.pairs import PairErrors, Pairs, chosen_pairs
from ddpm_hf.pipeline.pairs import enlarged
from ddpm_hf.trainer.loop import Trainer
from ddpm_hf.trainer.step import TrainingStep

evaluate_script, sample_script = load_program("evaluate"), load_program("sample")
RNG = np.random.default_rng(0)
LONG = RNG.normal(size=(24, 2, 16)).cumsum(axis=2)
SHORT = 10 * LONG[:, :1, ::4] + 3  # of other units than the items
SHORT_RUN = {"dataset_name": None, "max_train_steps": 3, "condition_column": "small"}


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    path = tmp_path_factory.mktemp("waves") / "waves.npz"
    np.savez(path, data=LONG, small=SHORT, kind=np.arange(24) % 2)
    return {**SHORT_RUN, "train_data_file": str(path)}


def pictures():
    """Pairs of images of 8 x 8 and their means over 2 x 2 pixels, with a class."""
    x = torch.from_numpy(RNG.uniform(-1, 1, size=(16, 1, 8, 8))).float()
    return [(item, i % 2, torch.nn.functional.avg_pool2d(item, 2)) for i, item in enumerate(x)]


class Spy(torch.nn.Module):
    """A model of a constant, which remembers the conditions that it was told."""

    def __init__(self):
        super().__init__()
        self.value, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, t, condition=None, x_self_cond=None):
        self.seen.append(condition)
        return SimpleNamespace(sample=self.value + 0 * x)


def step_of(model, **options):
    c = TrainConfig(**options)
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False), distributed_type=None)
    return TrainingStep(model, GaussianScheduler(), None, SimpleNamespace(share=lambda step: None), c, accelerator)


def test_the_model_is_told_the_condition_in_the_size_of_the_items():
    """In model units, in the estimate of self-conditioning too; the draws and the loss are those without it."""
    levels = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    items, model = torch.randn(4, 1, 8, 8), Spy()
    told = step_of(model)._loss(Batch(items, [], conditions=levels), 0, self_condition=True)
    for condition in model.seen:
        torch.testing.assert_close(condition[:, :, ::2, 1::2], levels / 127.5 - 1, rtol=0, atol=1e-6)
        assert condition.shape == (4, 3, 8, 8) and condition.dtype == torch.float32
    assert len(model.seen) == 2
    assert torch.equal(told, step_of(Spy())._loss(Batch(items, []), 0, self_condition=True))


def test_nothing_of_the_condition_is_read_by_the_host():
    """On the meta device, where a read raises."""
    step = step_of(Spy().to("meta"))
    with torch.device("meta"):
        batch = Batch(torch.zeros(2, 1, 8, 8), [], conditions=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
        first = torch.zeros((), dtype=torch.int64)
    assert step._loss(batch, first, self_condition=True).device.type == "meta"
    with OnDevice("meta") as seen:
        assert enlarged(batch.condition, (8, 8)).shape == (2, 3, 8, 8)
    assert seen.operations > 0


def test_a_run_of_sequences_is_resumed_to_the_bit(waves, tmp_path, monkeypatch):
    """With classes, self-conditioning, held-out items and evaluations; stopped in step 3, after the checkpoint of 2."""
    options = {
        **waves, "class_labels": "kind", "self_condition": True, "max_train_steps": 4, "checkpointing_steps": 2,
        "holdout": 6, "eval_steps": 2, "eval_metrics": ["held_out_loss", "frechet"], "eval_num_samples": 8,
        "sequence_norm": "meanstd",
    }  # fmt: skip
    result = train(config(tmp_path / "whole", **options))
    train_until(3, monkeypatch, config(tmp_path / "parts", **options))
    train(config(tmp_path / "parts", **options))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, content in whole.items():
        assert parts[name] == content, name
    assert all(np.isfinite(value) for line in metrics(tmp_path / "whole") for value in line.values())
    pipe = DDPMPipeline1D.from_pretrained(result.pipeline_dir)
    feed = open_data(config(tmp_path, **options))
    assert pipe.config.condition == "paired" and pipe.config.condition_size == [4]
    assert pipe.config.condition_scale == list(feed.condition_scaling.scale)
    assert pipe.config.condition_shift == list(feed.condition_scaling.shift)
    assert pipe(condition=SHORT[:3], class_labels="1").sequences.shape == (3, 2, 16)


def test_a_run_of_images_draws_condition_sample_and_truth(tmp_path):
    result = train(config(tmp_path, **{**SHORT_RUN, "class_labels": "y"}, num_samples=2), pictures())
    assert result.steps == 3 and np.isfinite(metrics(tmp_path)[-1]["loss"])
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-000003.png"))
    assert picture.shape == (2 * 66, 3 * 66, 3)
    (pairs, none), chosen = Pairs.of_feed(open_data(config(tmp_path, **SHORT_RUN), [x[::2] for x in pictures()])), 0
    assert none is None and pairs.conditions([chosen]).shape == (1, 1, 4, 4)
    pipe = DDPMPipeline.from_pretrained(result.pipeline_dir)
    assert pipe.config.get("condition_scale") is None and pipe.config.condition_size == [4, 4]
    assert len(pipe(condition=Image.new("L", (4, 4)), batch_size=2).images) == 2


def test_samples_are_given_the_conditions_of_the_pairs(waves, tmp_path):
    """In the units of the data, each pair once before one comes twice, and the same for every number of samples."""
    feed = open_data(config(tmp_path, **waves, holdout=6))
    pairs, held_out = Pairs.of_feed(feed)
    rows = [int(np.abs(SHORT - x.numpy()).sum(axis=(1, 2)).argmin()) for x in held_out.conditions(range(6))]
    assert len(set(rows)) == 6
    np.testing.assert_allclose(feed.scaling.to_data(held_out.items(range(6)).double()), LONG[rows], atol=1e-5)
    np.testing.assert_allclose(pairs.conditions(range(18)), np.delete(SHORT, rows, axis=0), atol=1e-5)
    numbers = chosen_pairs(6, 15, seed=0)
    assert sorted(numbers[:6]) == sorted(numbers[6:12]) == list(range(6))
    assert np.array_equal(numbers[:7], chosen_pairs(6, 7, seed=0))


def test_what_does_not_fit(waves, tmp_path):
    with pytest.raises(ValueError, match="not both; got condition 'known' and condition_column 'small'"):
        TrainConfig(condition="known", condition_column="small", train_data_file="x.npz")
    for channels in (0, 2):
        model = UNet1D(16, in_channels=2, condition_channels=channels, **MODEL)
        with pytest.raises(ValueError, match=f"must be 1 with condition_column 'small', got {channels}"):
            Trainer(config(tmp_path, **waves), model=model)
    model = UNet2D(8, in_channels=1, condition_channels=1, **MODEL)
    with pytest.raises(ValueError, match="condition_channels of the model must be 0 with condition None, got 1"):
        Trainer(config(tmp_path), model=model)


def test_evaluate_gives_samples_the_conditions_of_the_run(waves, tmp_path):
    """The column and the held-out items are found in the run's record; the error is that of the true items."""
    result = train(config(tmp_path / "run", **waves, holdout=6))
    command = ["--pipeline", str(result.pipeline_dir), "--data", waves["train_data_file"], "--num_inference_steps=2"]
    seen, forward = [], UNet1D.forward
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(UNet1D, "forward", lambda *a, **k: (seen.append(k.get("condition")), forward(*a, **k))[1])
        metrics = ["--metrics", "frechet", "held_out_loss", "--num_samples=12", f"--output_dir={tmp_path / 'out'}"]
        assert evaluate_script.main(command + metrics) == 0
    records = {r["metric"]: r for r in json.loads((tmp_path / "out" / "evaluation.json").read_text())}
    assert {"frechet", "held_out_loss", "pair_rmse"} <= records.keys()
    assert records["pair_rmse"]["compared_with"] == "the true items of the held-out pairs"
    assert 0 < records["pair_rmse"]["value"] < 20
    feed = open_data(config(tmp_path, **waves, holdout=6))
    x = Pairs.of_feed(feed)[1].conditions(range(6)).numpy()
    scale, shift = (np.asarray(v)[:, None] for v in (feed.condition_scaling.scale, feed.condition_scaling.shift))
    known = {round(v, 4) for v in ((x - shift) / scale)[:, 0, 0].tolist()}
    told = [c for c in seen if c is not None]
    assert len(told) >= 3 and all(round(v, 4) in known for c in told for v in c[:, 0, 0].tolist())
    assert evaluate_script.main([*command, "--condition_column=none"]) == 2
    card = (result.pipeline_dir / "README.md").read_text()
    assert 'one each, channels x size 1 x 4, in its own units, the data\'s "small"' in card and "condition=c" in card


def test_the_error_is_that_of_the_true_items():
    """Samples that are off by 0.1 of a level, and by a tenth in the data's own units."""

    class Given:
        items = staticmethod(lambda numbers: torch.tensor([[[[-1.0]]], [[[0.5]]], [[[1.0]]]])[list(numbers)])

    shares = SimpleNamespace(gather=lambda rows: rows)
    levels = np.array([0.75, 1.0])[:, None, None, None] - 0.1
    errors = PairErrors(Given, np.array([1, 2]), EIGHT_BIT)
    list(errors.watch(iter([levels[:1], levels[1:]])))
    assert errors.values(shares, True) == pytest.approx({"pair_rmse": 0.1, "pair_psnr": 20.0})
    Given.items = staticmethod(lambda numbers: torch.tensor([[[1.0, 0.0]]])[list(numbers)])
    errors = PairErrors(Given, np.array([0]), Scaling((5.0,), (2.0,)))
    list(errors.watch(iter([np.array([[[7.1, 4.9]]])])))
    assert errors.values(shares, False) == pytest.approx({"pair_rmse": 0.1})


def test_a_pipeline_with_conditions_is_fine_tuned(waves, tmp_path):
    """The condition follows condition_column, and is not taken for the known part of a model that completes."""
    options = {**waves, "max_train_steps": 1}
    first = train(config(tmp_path / "first", **options))
    tuned = train(config(tmp_path / "tuned", **options, init_from=str(first.pipeline_dir)))
    assert DDPMPipeline1D.from_pretrained(tuned.pipeline_dir).config.condition == "paired"


@pytest.mark.slow
def test_samples_of_a_trained_model_have_the_conditional_law(tmp_path):
    """Of x = 0.8 c + 0.6 e with standard normal c and e, x given c is N(0.8 c, 0.36), value by value, and x is N(0, 1).

    The mean of n samples has the standard error 0.6 / sqrt(n), and their deviation 0.6 / sqrt(2 n); the tolerance is 5
    of them and what this short training leaves, 0.2. The law without a condition is further away than that.
    """
    rng, unit, count = np.random.default_rng(0), 0.25, 2000  # units of the model for one deviation of c and x
    c = rng.normal(size=(20_000, 1, 4))
    x = 0.8 * c + 0.6 * rng.normal(size=c.shape)
    pairs = [tuple(torch.from_numpy((unit * v).clip(-1, 1)).float() for v in pair) for pair in zip(x, c)]
    options = {
        "dataset_name": None, "condition_column": "c", "dim_mults": [1], "attn_heads": [1], "train_batch_size": 256,
        "learning_rate": 3e-3, "max_train_steps": 400, "lr_scheduler": "cosine", "lr_warmup_steps": 20,
        "ddpm_num_inference_steps": 50, "num_samples": 1, "use_ema": False, "logging_steps": 100,
    }  # fmt: skip
    pipe = DDPMPipeline1D.from_pretrained(train(config(tmp_path, **options), pairs).pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    slack = 0.2
    for given in (np.array([2.0, -2.0, 1.0, -1.0]), np.full(4, -2.0)):
        options = {"batch_size": count, "generator": torch.Generator().manual_seed(1)}
        samples = pipe(condition=unit * given[None, None], **options).sequences[:, 0] / unit
        mean, deviation = samples.mean(axis=0), samples.std(axis=0)
        assert (np.abs(mean - 0.8 * given) < 5 * 0.6 / np.sqrt(count) + slack).all()
        assert (np.abs(deviation - 0.6) < 5 * 0.6 / np.sqrt(2 * count) + slack).all()
        assert (np.abs(mean) > 3 * (5 / np.sqrt(count) + slack) / 2).all() and (deviation < 0.75).all()  # not N(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pictures", "bands"])
def test_a_run_on_two_folders_is_evaluated_and_sampled(kind, tmp_path, monkeypatch, capsys):
    """The program prints the conditions; conditions of bands keep their units up to the samples of sample.py."""
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, size=(12, 4, 4), dtype=np.uint8)
    for name, values in (("x", levels.repeat(2, axis=1).repeat(2, axis=2)), ("c", levels)):
        (tmp_path / name).mkdir()
        for number, each in enumerate(values):
            if kind == "pictures":
                Image.fromarray(each).save(tmp_path / name / f"{number}.png")
            else:
                np.save(tmp_path / name / f"{number}.npy", np.stack([each, each * 1e-3]).astype(np.float32))
    options = {**SHORT_RUN, "condition_column": None, "train_data_dir": "x", "condition_dir": "c", "resolution": [8]}
    options |= {"holdout": 4, "random_flip": True, "image_channels": 1 if kind == "pictures" else None}
    train(config("dry", **options, dry_run=True))
    assert "conditions: condition_dir c, of 1/2 of the size of the images" in capsys.readouterr().out
    result = train(config("run", **options, eval_steps=3, eval_metrics=["held_out_loss"]))
    assert np.isfinite([v for line in metrics(tmp_path / "run") for k, v in line.items() if "held_out_loss" in k]).all()
    pipe = DDPMPipeline.from_pretrained(result.pipeline_dir)
    assert (pipe.config.get("condition_scale") is not None) == (kind == "bands")
    command = ["--pipeline", str(result.pipeline_dir), "--data", "x", "--num_inference_steps=2", "--num_samples=4"]
    command += ["--metrics", "memorization", "held_out_loss", "--output_dir=out"]
    assert evaluate_script.main(command) == 0, capsys.readouterr()
    assert {"held_out_loss", "pair_rmse"} <= {r["metric"] for r in json.loads(Path("out/evaluation.json").read_text())}
    command = ["--pipeline", str(result.pipeline_dir), "--condition=c", "--num_inference_steps=2", "--num_samples=1"]
    assert sample_script.main([*command, "--output_dir=samples"]) == 0, capsys.readouterr()
    assert len((tmp_path / "samples" / "conditions.csv").read_text().split()) == 13
    card = (result.pipeline_dir / "README.md").read_text()
    assert 'the data\'s "c"' in card and "pipeline_tag: image-to-image" in card and "unconditional" not in card
