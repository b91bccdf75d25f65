"""The studies at small size: what they compare, what they count as time, and that both sides train and are measured."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_program, run_program
from PIL import Image

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig, UNet2D
from ddpm_hf.config import read_yaml
from ddpm_hf.data import open_data

anomalies = load_program("studies/anomalies")
common = load_program("studies/common")
guidance = load_program("studies/guidance")
long = load_program("studies/long")
recipe = load_program("studies/recipe")
samplers = load_program("studies/samplers")


@pytest.mark.parametrize("name, shape", [("digits", (1797, 8, 8, 1)), ("crops", (6000, 32, 32, 3))])
def test_the_pictures(name, shape, tmp_path):
    real = common.pictures(name)
    assert real.shape == shape and real.dtype == np.uint8 and real.std() > 40
    assert common.distance(real, name) == pytest.approx(0, abs=1e-6)
    # fewer pictures of the same are nearer than other pictures
    assert common.floor(name, 500) < 0.3 * common.distance(255 - real[:500], name)
    folder = common.write_pictures(name, tmp_path)
    back = np.asarray(Image.open(folder / "00003.png")).reshape(shape[1:])
    np.testing.assert_array_equal(back, real[3])


def test_an_answer_to_other_options_is_not_taken(tmp_path):
    """Names of files do not have all options: another seed of an ablation had the first one's distances."""
    options = SimpleNamespace(only=["ablation"], data=["digits"], setting=["as it is"], output_dir=str(tmp_path))
    first, second = (recipe.jobs_of(SimpleNamespace(seed=seed, **vars(options)))[0] for seed in (0, 1))
    common.finish(first.file, {**first.options, "distance": 1.0})
    assert first.done() and not second.done()


def test_the_views_are_patches_and_averages():
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    small, patches = common.views(image)
    assert patches.shape == (16, 192)
    np.testing.assert_allclose(patches[6].reshape(8, 8, 3) * 255, image[0, 8:16, 16:24], atol=1e-4)
    np.testing.assert_allclose(small.reshape(8, 8, 3)[2, 5] * 255, image[0, 8:12, 20:24].mean(axis=(0, 1)), rtol=1e-5)


def test_every_training_of_ours_has_options_that_apply():
    plan = SimpleNamespace(only=["curves", "ablation"], data=list(common.MODELS), setting=None, seeds=1, seed=0,
                           output_dir="x")  # fmt: skip
    jobs = [job for job in recipe.jobs_of(plan) if job.options["side"] == "ours"]
    for job in jobs:
        TrainConfig(**recipe.listed({**common.MODELS[job.options["data"]], **job.options["config"]}))
    assert len(jobs) == 2 * (1 + len(recipe.ABLATION))
    for data, options in samplers.TRAINING.items():
        TrainConfig(**recipe.listed({**common.MODELS[data], **options}))


def test_the_clock_stops_while_it_measures(monkeypatch):
    now = iter([0.0, 5.0, 105.0, 112.0, 300.0])
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: next(now))
    distances = iter([0.5, 0.25])
    clock = recipe.Clock([1, 3], lambda: next(distances))
    clock.start()
    for step in (1, 2, 3):
        clock.after(step)
    assert clock.curve == [
        {"step": 1, "seconds": 5.0, "distance": 0.5},
        {"step": 3, "seconds": 12.0, "distance": 0.25},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ours", "peer", "tuned"])
def test_a_training_of_each_side(side, tmp_path):
    config = {} if side == "peer" else {**recipe.RECIPE, "train_batch_size": 16, "max_train_steps": 4}
    job = {"side": "ours" if side == "ours" else "peer", "data": "digits", "seed": 0, "config": config, "steps": 4,
           "points": 2, "samples": 40}  # fmt: skip
    options = ("--job", json.dumps(job), "--file", tmp_path / "answer.json")
    result = run_program(ROOT / "training/studies/recipe.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert [point["step"] for point in answer["curve"]] == [2, 4]
    assert 0 < answer["curve"][0]["seconds"] < answer["curve"][1]["seconds"]
    assert all(point["distance"] > 0 for point in answer["curve"])


def test_a_table_and_picture_of_samplers(tmp_path):
    for name, steps, seed, value, count in [
        ("DDIM", 10, 0, 0.5, 100), ("DDIM", 10, 1, 0.7, 100), ("DDIM", 20, 0, 0.25, 100), ("DDIM", 250, 0, 0.1, 100),
        ("UniPC 2", 10, 0, 0.2, 100), ("UniPC 2", 20, 0, 0.1, 50),
    ]:  # fmt: skip
        answer = {"data": "digits", "sampler": name, "steps": steps, "seed": seed, "distance": value, "count": count}
        (tmp_path / f"{name}-{steps}-{seed}.json").write_text(json.dumps(answer))
    found = samplers.collect(tmp_path, {"digits": 100})
    lines = samplers.table(found["digits"]).splitlines()
    assert lines[0] == "| sampler | 10 | 20 | 250 |"
    assert lines[2] == "| DDIM | 0.600 | 0.250 | 0.100 |"
    assert lines[3] == "| DDIM, half the range of the seeds | 0.100 |  |  |"
    assert lines[4] == "| UniPC 2 | 0.200 |  |  |"
    samplers.draw(found, {"digits": 100}, tmp_path / "samplers.png")
    assert Image.open(tmp_path / "samplers.png").width > 300


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_each_sampler_runs_on_the_models_schedule(name):
    from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D

    pipe = DDPMPipeline(UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=(1, 2)), GaussianScheduler())
    betas = pipe.scheduler.config.trained_betas
    samplers.build(pipe, name)
    assert list(pipe.scheduler.config.trained_betas) == list(betas)
    images = common.sample(pipe, 3, 5, batch=2)
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8


def test_the_fast_sampler_of_the_study_is_the_pipelines():
    from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D

    pipes = [DDPMPipeline(UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=(1, 2)), GaussianScheduler())
             for _ in range(2)]  # fmt: skip
    samplers.build(pipes[0], "fast")
    pipes[1].use_fast_sampler()
    assert pipes[0].config.log_snr_spacing and pipes[1].config.log_snr_spacing
    configs = [{k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")} for pipe in pipes]
    assert configs[0] == configs[1]


def test_a_plan():
    assert samplers.parse_plan("DDIM|UniPC 2:5,10:0,1") == (["DDIM", "UniPC 2"], [5, 10], [0, 1])
    for plan in samplers.PLAN:
        names, steps, seeds = samplers.parse_plan(plan)
        assert set(names) <= set(samplers.SAMPLERS) and all(1 <= n <= 1000 for n in steps) and set(seeds) <= {0, 1, 2}


def test_the_share_of_time_is_that_of_the_first_point_as_near(tmp_path):
    def answer(kind, *curve):
        points = [{"step": 1, "seconds": s, "distance": d} for s, d in curve]
        (tmp_path / f"digits-{kind}-0.json").write_text(
            json.dumps({"curve": points, "distance": points[-1]["distance"]})
        )

    answer("peer", (50, 1.0), (100, 0.5))
    answer("tuned", (20, 0.6))
    answer("ours", (5, 0.8), (10, 0.4), (20, 0.3))
    row = recipe.report_curves(tmp_path, "digits").splitlines()[-1]
    assert row == "| 0 | 0.500, 100 s | 0.600, 20 s | 0.300, 20 s | 1/10.0 |"
    answer("ours", (5, 0.8))
    assert "not reached" in recipe.report_curves(tmp_path, "digits")


def test_guidance_is_measured_with_a_classifier_of_the_digits(tmp_path):
    """The classifier learns the digits in two epochs better than chance, and every setting gets a row."""
    feed = open_data(TrainConfig(**read_yaml(str(guidance.PRESET))))
    x, y = guidance.items_and_classes(feed.held_out, feed.labels)
    assert x.shape == (100, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
    network = guidance.train_classifier(*guidance.items_and_classes(feed.dataset, feed.labels), epochs=2)
    assert (network(x).argmax(dim=1) == y).double().mean() > 0.5
    torch.jit.trace(network, x[:2]).save(str(tmp_path / "classifier.pt"))
    unet = UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=[1, 2], num_class_embeds=10)
    pipe = DDPMPipeline(unet.eval(), GaussianScheduler(), id2label={str(i): str(i) for i in range(10)})
    pipe.set_progress_bar_config(disable=True)
    pipe.use_fast_sampler()
    settings = [(1.0, (0.0, 1.0)), (2.0, (0.2, 0.8))]
    rows = list(guidance.measure(pipe, feed, tmp_path / "classifier.pt", settings, num_samples=20, calls=[2, 3]))
    assert [row[:2] for row in rows] == settings
    assert all(len(row[2]) == 2 and 0 <= agreement <= 1 and fid > 0 for row in rows for agreement, fid in row[2])


@pytest.mark.parametrize("artefact", anomalies.ARTEFACTS)
def test_artefacts_change_held_out_windows_where_the_mask_says(artefact):
    known, held_out, beats = anomalies.windows()
    assert known.shape == (5 * 385, 256) and held_out.shape == (65, 256)
    rng = np.random.default_rng(0)
    for window, beat in zip(held_out, beats):
        assert window[beat - 30 : beat + 30].argmax() == 30
        before = window.copy()
        changed, mask = anomalies.put_in(artefact, window, beat, rng)
        assert (window == before).all() and (changed[~mask] == window[~mask]).all()
        assert (changed[mask] != window[mask]).mean() > 0.5 and (mask.sum() in (32, 48))
        if artefact == "dropped beat":
            assert abs(np.diff(changed)).max() < abs(np.diff(window)).max()


def test_distances_of_beats(tmp_path):
    """Beats are peaks, whose distances are measured within each series; the picture shows several series."""
    x = np.zeros((2, 600))
    x[0, [50, 150, 400]] = x[1, [100, 500]] = 200
    x[:, 300] = 50  # another wave
    rate, distances = long.intervals(x)
    assert rate == pytest.approx(1000 * 5 / 1200) and sorted(distances) == [100, 250, 400]
    noisy = x + np.random.default_rng(0).standard_normal(x.shape)
    long.rhythm(noisy[:1], {"joint": noisy}, {"joint": [256]}, tmp_path / "rhythm.png")
    assert Image.open(tmp_path / "rhythm.png").width > 300


@pytest.mark.slow
def test_a_table_of_anomalies(tmp_path):
    for options, rows in ((("--data", "digits", "--classes", 3), 4), (("--data", "ecg"), 10)):
        result = run_program(
            ROOT / "training/studies/anomalies.py", *options, "--steps", 1, "--output_dir", tmp_path, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert len((tmp_path / f"{options[1]}.md").read_text().splitlines()) == rows
    assert Image.open(tmp_path / "anomalies.png").width > 300
