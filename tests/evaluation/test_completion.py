"""Completion of held-out items, with pipelines whose completions are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import simulated
from PIL import Image

from ddpm_hf import GaussianScheduler, UNet1D
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.completion import (
    Completion,
    CompletionSettings,
    describe,
    hidden_part,
    make_records,
    spread_out,
)
from ddpm_hf.plots import save_completed_images, save_fan_plot

RNG = np.random.default_rng(0)
NOISE = SequenceDataset(RNG.normal(5, 2, size=(120, 1, 32)))


class Completing:
    """A pipeline that completes by `draw(known, generator)`, and remembers how it was asked."""

    device = torch.device("cpu")

    def __init__(self, draw, classes=None, condition=None):
        self.draw, self.asked = draw, []
        self.scheduler = GaussianScheduler()
        self.unet = UNet1D(sample_size=8, dim=8, dim_mults=[1], num_class_embeds=classes).eval()
        self.unet.forward = lambda x, t, class_labels=None: SimpleNamespace(sample=x)
        self.config = SimpleNamespace(id2label=None, condition=condition)

    def inpaint(self, known, mask=None, num_samples=1, generator=None, output_type="np", return_dict=True, **options):
        assert output_type == "np" and not return_dict and len(generator) == len(known) * num_samples
        self.asked.append({"known": known, "num_samples": num_samples, **options})
        rows = np.repeat(known, num_samples, axis=0)
        drawn = np.stack([self.draw(row, g) for row, g in zip(rows, generator)])
        return (np.where(np.isnan(rows), drawn, rows),)


def normal(mean, deviation):
    return lambda row, g: mean + deviation * torch.randn(row.shape, generator=g, dtype=torch.float64).numpy()


def completion(held_out, accelerator=None, dataset=None, classes=None, **options):
    settings = CompletionSettings(**{"task": "forecast", **options})
    shape = tuple(held_out[0].shape)
    accelerator = accelerator or Accelerator(cpu=True)
    made = Completion(accelerator, dataset or held_out, held_out, shape, settings, classes)
    made.prepare()
    return made


@pytest.mark.parametrize("task", ["forecast", "impute"])
def test_the_right_distribution_of_independent_values(task):
    """Truth and completions are N(5, 2): CRPS 2 / sqrt(pi), RMSE 2 sqrt(1 + 1 / 20), coverage 50% and 90%. The last
    value as a prediction has the CRPS E|X - X'| = 4 / sqrt(pi) and the RMSE 2 sqrt(2), although the values of an item
    share it: with 120 items, 5 deviations of a mean of 120 numbers are below 5 * 2 * 2 / sqrt(120)."""
    scores = completion(NOISE, task=task, num_items=120)(Completing(normal(5, 2)), 10)
    values = 120 * 8
    model = scores["model"]
    assert model["crps"] == pytest.approx(2 / np.sqrt(np.pi), abs=5 * 2 / np.sqrt(values))
    assert model["rmse"] ** 2 == pytest.approx(4 * 1.05, rel=5 * np.sqrt(2 / values))
    assert model["coverage_50"] == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(values))
    assert model["coverage_90"] == pytest.approx(0.9, abs=5 * 0.3 / np.sqrt(values))
    assert scores["persistence"]["crps"] == pytest.approx(4 / np.sqrt(np.pi), abs=1.8)
    assert scores["persistence"]["crps"] > model["crps"] and "coverage_50" not in scores["persistence"]
    deviation = np.asarray(NOISE.array).std()
    assert model["crps_standardized"] == pytest.approx(model["crps"] / deviation, rel=1e-5)


def test_a_pipeline_that_knows_the_truth():
    """Its CRPS and RMSE are 0 up to float32, and it sees the known part in the data's own units, NaN elsewhere."""
    truth = np.asarray(NOISE.array)
    pipeline = Completing(lambda row, g: truth[np.nanargmin(np.abs(truth[:, 0, 0] - row[0, 0]))])
    scores = completion(NOISE, unknown_share=0.5, num_items=10, num_samples=3)(pipeline, 10)
    assert scores["model"]["crps"] < 1e-5 and scores["model"]["rmse"] < 1e-5
    known = np.concatenate([call["known"] for call in pipeline.asked])
    np.testing.assert_allclose(known[..., :16], truth[::12, :, :16], atol=1e-5)
    assert np.isnan(known[..., 16:]).all()


@pytest.mark.parametrize("processes", [2, 3])
def test_scores_depend_neither_on_processes_nor_on_batches(processes):
    """One process in batches of 64, and several in batches of 3 (less than one item's completions) and of 13. There are
    two items: one of three processes has none."""
    options = {"num_items": 2, "num_samples": 5, "task": "impute"}
    pipeline = Completing(normal(5, 2))
    one = completion(NOISE, **options)
    expected = one(pipeline, 10)
    for batch_size in (3, 13):

        def work(accelerator, batch_size=batch_size):
            made = completion(NOISE, accelerator, batch_size=batch_size, **options)
            return made(pipeline, 10), made

        pipeline.asked.clear()
        for scores, made in simulated(processes, work):
            assert list(scores) == list(expected)
            for method, values in scores.items():
                assert values == pytest.approx(expected[method], rel=1e-9)
            assert made.count == 2 and made.season == one.season
            for mine, other in zip(made.shown, one.shown, strict=True):
                assert all((a == b).all() for a, b in zip(mine, other))
        assert all(len(call["known"]) * call["num_samples"] <= batch_size for call in pipeline.asked)


def test_a_completion_follows_from_seed_item_and_its_number():
    """More items or more completions leave the others as they were; another seed does not."""
    made = {}
    for name, options in {
        "few": {"num_items": 6, "num_samples": 3}, "more": {"num_items": 12, "num_samples": 5},
        "other": {"num_items": 6, "num_samples": 3, "seed": 1},
    }.items():  # fmt: skip
        each = completion(NOISE, task="impute", **options)
        each(Completing(normal(0, 1)), 10)
        made[name] = dict(zip(each.chosen[spread_out(len(each.chosen), 6)], each.shown))
    few, more, other = made.values()
    shared = sorted(set(few) & set(more))
    assert len(shared) >= 3
    for item in shared:
        assert (few[item].hidden == more[item].hidden).all()
        assert (few[item].completions == more[item].completions[:3]).all()
        assert not (few[item].completions == other[item].completions).all()
    assert len({each.completions.tobytes() for each in few.values()}) == 6


def test_what_is_hidden():
    forecast = CompletionSettings("forecast", unknown_share=0.25)
    assert np.flatnonzero(hidden_part(forecast, (32,), 3)).tolist() == list(range(24, 32))
    gaps = [hidden_part(CompletionSettings("impute"), (32,), item) for item in range(300)]
    firsts = [np.flatnonzero(gap)[0] for gap in gaps]
    assert all(gap.sum() == 8 and gap[first : first + 8].all() for gap, first in zip(gaps, firsts))
    assert set(firsts) == set(range(1, 24))  # known on both sides, and every place occurs
    blocks = [hidden_part(CompletionSettings("impute"), (8, 12), item) for item in range(200)]
    assert all(block.sum() == 4 * 6 for block in blocks)
    assert not any(block[[0, -1]].any() or block[:, [0, -1]].any() for block in blocks)
    assert len({block.tobytes() for block in blocks}) == 3 * 5


def test_channels_are_scored_apart_too():
    array = np.concatenate([RNG.normal(0, 1, (40, 1, 32)), RNG.normal(0, 100, (40, 1, 32))], axis=1)
    made = completion(SequenceDataset(array), num_items=40)
    scores = made(Completing(lambda row, g: np.zeros_like(row)), 10)
    model = scores["model"]
    assert model["crps/0"] == pytest.approx(np.abs(array[:, 0, 24:]).mean(), rel=1e-4)
    assert model["crps/1"] == pytest.approx(np.abs(array[:, 1, 24:]).mean(), rel=1e-4)
    assert model["crps"] == pytest.approx((model["crps/0"] + model["crps/1"]) / 2, rel=1e-12)
    standardized = [model[f"crps/{c}"] / array[:, c].std() for c in range(2)]
    assert model["crps_standardized"] == pytest.approx(np.mean(standardized), rel=1e-4)
    records = make_records(made, scores, Completing(None), 10, 1.0, data="x")
    per_channel = [r for r in records if r["method"] == "model" and r["metric"] == "crps"]
    assert [r.get("channel") for r in per_channel] == [None, 0, 1]


def test_missing_true_values_are_left_out():
    """A NaN in the truth is unknown to the pipeline and not scored; an item without a hidden value that is known counts
    for nothing."""

    class Missing(list):
        scaling = NOISE.scaling

    held_out = Missing([NOISE[0].clone(), NOISE[1].clone()])
    made = completion(NOISE, num_items=2)
    made.held_out.dataset, made.chosen = held_out, np.arange(2)
    made.data = held_out
    truth = np.asarray(NOISE.array)[:2]
    rows = np.where(np.arange(32) == 30, np.nan, truth[:1])
    batch = SimpleNamespace(numbers=[0, 1], x0=torch.from_numpy(NOISE.scaling.to_model(truth)).float())
    batch.x0[0, 0, 30], batch.x0[0, 0, 3], batch.x0[1, 0, 24:] = torch.nan, torch.nan, torch.nan
    made._items = lambda part, size: SimpleNamespace(read=lambda own: iter([batch]))
    pipeline = Completing(lambda row, g: np.zeros_like(row))
    scores = made(pipeline, 10)
    assert scores["model"]["crps"] == pytest.approx(np.nanmean(np.abs(rows[0, 0, 24:])), rel=1e-5)
    assert np.isnan(pipeline.asked[0]["known"][0, 0, 3])
    batch.x0[0, 0, 24:] = torch.nan
    with pytest.raises(ValueError, match="nothing to score"):
        made(pipeline, 10)


def test_the_classes_of_the_items_are_asked_for():
    classes = DataClasses(["a", "b", "c"], [40, 40, 40], held_out=np.arange(120) % 3)
    pipeline = Completing(normal(5, 2), classes=3)
    made = completion(NOISE, classes=classes, num_items=7, num_samples=2, batch_size=4)
    made.check(pipeline, 2.0)
    scores = made(pipeline, 10, 2.0)
    labels = [label for call in pipeline.asked for label in call["class_labels"]]
    assert labels == (made.chosen % 3).tolist() and {call["guidance_scale"] for call in pipeline.asked} == {2.0}
    records = make_records(made, scores, pipeline, 10, 2.0)
    assert {r.get("guidance_scale") for r in records} == {2.0, None}
    unknown = completion(NOISE, num_items=2, num_samples=2)
    unknown(pipeline, 10)  # the data has no classes: the model is told none
    assert "class_labels" not in pipeline.asked[-1]
    with pytest.raises(ValueError, match="guidance_scale needs a pipeline and data with classes.*got 2"):
        unknown.check(pipeline, 2.0)


def test_records_and_table():
    made = completion(NOISE, num_items=4, num_samples=3, season=4)
    scores = made(Completing(normal(5, 2)), 10)
    records = make_records(made, scores, Completing(None), 10, 1.0, data="waves")
    model = next(r for r in records if r["method"] == "model" and r["metric"] == "crps")
    assert model == {
        "metric": "crps", "value": scores["model"]["crps"], "method": "model", "data": "waves", "task": "forecast",
        "unknown_share": 0.25, "num_items": 4, "shape": [1, 32], "seed": 0, "num_samples": 3,
        "num_inference_steps": 10, "scheduler": "GaussianScheduler", "jump_length": 10, "jump_n_sample": 10,
    }  # fmt: skip
    seasonal = [r for r in records if r["method"] == "seasonal"]
    assert {r["season"] for r in seasonal} == {4} and all("num_samples" not in r for r in seasonal)
    trained = make_records(made, scores, Completing(None, condition="known"), 10, 1.0)
    assert not any("jump_length" in r for r in trained)
    lines = describe(made, scores).splitlines()
    assert [line.split()[0] for line in lines] == ["crps", "model", "persistence", "linear", "seasonal"]
    assert len({len(line) for line in lines[2:]}) == 1 and "seasonal (4)" in lines[-1]
    steady = SequenceDataset(np.cumsum(np.ones((4, 1, 32)), axis=2))
    made = completion(steady)
    assert "no seasonal baseline" in describe(made, made(Completing(normal(0, 1)), 10))


def grey(count):
    return [Image.fromarray(array) for array in RNG.integers(0, 256, (count, 8, 8), dtype=np.uint8)]


def test_images():
    """Levels are from 0 to 1, channels last; an image that cannot be read is left out where the settings say so."""
    pictures = grey(6)
    data = ImageDataset(pictures, (8, 8), 1)
    pipeline = Completing(lambda row, g: np.full_like(row, 0.5))
    made = completion(data, task="impute", num_items=6, num_samples=4)
    scores = made(pipeline, 10)
    assert list(scores) == ["model", "mean", "linear"] and pipeline.asked[0]["known"].shape == (6, 8, 8, 1)
    levels = np.stack([np.asarray(picture) for picture in pictures]) / 255
    hidden = np.stack([hidden_part(made.settings, (8, 8), item) for item in range(6)])
    assert scores["model"]["crps"] == pytest.approx(np.abs(levels - 0.5)[hidden].mean(), rel=1e-5)
    assert scores["model"]["crps_standardized"] == pytest.approx(scores["model"]["crps"] / levels.std(), rel=1e-5)
    assert [each.truth.shape for each in made.shown] == [(1, 8, 8)] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "guess"}, "task must be one of impute, forecast, got 'guess'"),
        ({"unknown_share": 0.0}, "unknown_share must lie between 0 and 1, both excluded, got 0.0"),
        ({"unknown_share": 1.0}, "got 1.0"),
        ({"unknown_share": 0.98}, "at least 2 values known along each side of 32, got 0.98, which leaves 1"),
        ({"season": 25}, "not longer than the known part of a sequence, which has 24 of 32 values, got 25"),
        ({"season": 0}, "season must be at least 1"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"jump_n_sample": 0}, "jump_n_sample must be at least 1, got 0"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be two ascending numbers"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError) as error:
        completion(NOISE, **options)
    assert message in str(error.value)


def test_settings_that_do_not_fit_images():
    data = ImageDataset(grey(4), (8, 8), 1)
    for options, message in (
        ({"task": "forecast"}, "the task forecast applies to sequences"),
        ({"task": "impute", "season": 3}, "season applies to sequences; got 3 for images"),
        ({"task": "impute", "unknown_share": 0.9}, "8 x 8, got 0.9, which leaves 0 x 0"),
    ):
        with pytest.raises(ValueError) as error:
            completion(data, **options)
        assert message in str(error.value)


def test_pipelines_that_cannot_complete_are_refused_before_any_call():
    made = completion(NOISE, num_items=2)

    def refused(pipeline, message, *scale):
        pipeline.unet.forward = None  # a call would fail otherwise
        with pytest.raises(ValueError, match=message):
            made(pipeline, 10, *scale)

    refused(SimpleNamespace(unet=SimpleNamespace(config=None)), "the method inpaint, got SimpleNamespace")
    stock = Completing(None)
    stock.scheduler = SimpleNamespace()
    refused(stock, "needs a GaussianScheduler, got SimpleNamespace")
    paired = Completing(None)
    paired.unet = SimpleNamespace(config=SimpleNamespace(condition_channels=2, num_class_embeds=None))
    refused(paired, "a model with 2 channels of a paired condition")
    refused(Completing(None), "guidance_scale must be a finite number", -1.0)
    trained = Completing(None, condition="known")
    trained.unet, trained.scheduler = paired.unet, stock.scheduler
    made.check(trained)


def test_pictures(tmp_path):
    """A panel for each of six sequences, three channels at most; a row for each of six images."""
    items = completion(NOISE, num_items=12, num_samples=4)
    items(Completing(normal(5, 2)), 10)
    assert len(items.shown) == 6
    save_fan_plot(items.shown, tmp_path / "one.png")
    several = [each._replace(truth=np.repeat(each.truth, 4, 0), completions=np.repeat(each.completions, 4, 1))
               for each in items.shown]  # fmt: skip
    save_fan_plot(several, tmp_path / "four.png")
    images = completion(ImageDataset(grey(6), (8, 8), 1), task="impute", num_samples=4)
    images(Completing(lambda row, g: np.full_like(row, 0.5)), 10)
    save_completed_images(images.shown, tmp_path / "images.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "four.png") as four:
        assert one.width == four.width == 1100 and four.height > 1.5 * one.height
    with Image.open(tmp_path / "images.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    hole = (np.abs(colours - np.array([217, 89, 64])) <= 1).all(axis=1).mean()
    assert 0.02 < hole < 0.1  # a quarter of one column of four, less the margins
