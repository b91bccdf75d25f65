"""The program evaluate.py with a task: scores, the picture, refusals."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, load_program, run_program
from helpers import MODEL, config
from PIL import Image

from ddpm_hf import DDPMPipeline1D, GaussianScheduler, UNet1D, train

EVALUATE = ROOT / "training" / "evaluate.py"
evaluate_script = load_program("evaluate")
FAST = ["--num_inference_steps=2", "--jump_n_sample=1", "--num_samples=3", "--num_items=4"]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A trained pipeline of 32 samples of the ECG, whose run held 20 windows out."""
    folder = tmp_path_factory.mktemp("completed")
    train(config(folder / "run", dataset_name="ecg", max_train_steps=3, sequence_length=32, holdout=20))
    return folder / "run" / "pipeline"


def test_the_program_completes_sequences(sequences, capsys):
    """Scores and picture are beside the pipeline, again is not more, and evaluations of samples are left alone."""
    command = [f"--pipeline={sequences}", "--data=ecg", *FAST]
    assert evaluate_script.main([*command, "--task=forecast"]) == 0
    out = capsys.readouterr().out
    assert "3 completions of 4 held-out items" in out and "forecast, 2 steps:" in out and "persistence" in out
    records = json.loads((sequences / "completion.json").read_text())
    assert {r["method"] for r in records} >= {"model", "persistence", "linear"}
    assert {(r["task"], r["num_items"], r["data"]) for r in records} == {("forecast", 4, "ecg")}
    assert not (sequences / "evaluation.json").exists()
    assert evaluate_script.main([*command, "--task=forecast"]) == 0
    assert json.loads((sequences / "completion.json").read_text()) == records
    assert evaluate_script.main([*command, "--task=impute", "--season=10", "--num_inference_steps", "2", "3"]) == 0
    both = json.loads((sequences / "completion.json").read_text())
    new = both[len(records) :]
    assert both[: len(records)] == records and {r["season"] for r in new if r["method"] == "seasonal"} == {10}
    assert [r["num_inference_steps"] for r in new if r["metric"] == "crps" and r["method"] == "model"] == [2, 3]
    assert sum(r["metric"] == "crps" and r["method"] == "linear" for r in new) == 1
    for task in ("forecast", "impute"):
        with Image.open(sequences / f"completion-{task}.png") as picture:
            assert picture.width == 1100


def test_the_program_completes_images(tmp_path):
    train(config(tmp_path / "run", max_train_steps=2, holdout=10))
    command = [f"--pipeline={tmp_path}/run/pipeline", "--data=digits", "--task=impute", *FAST]
    assert evaluate_script.main([*command, f"--output_dir={tmp_path}/out"]) == 0
    records = json.loads((tmp_path / "out" / "completion.json").read_text())
    assert {r["method"] for r in records} == {"model", "mean", "linear"}
    assert (tmp_path / "out" / "completion-impute.png").is_file()
    assert evaluate_script.main([*command[:-4], "--task=forecast"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task=guess"], "task must be one of impute, forecast, got 'guess'"),
        (["--task=impute", "--unknown_share=1.5"], "unknown_share must lie between 0 and 1, both excluded, got 1.5"),
        (["--task=forecast", "--season=25"], "has 24 of 32 values, got 25"),
        (
            ["--task=forecast", "--metrics=frechet"],
            "--metrics applies to evaluations of samples",
        ),
        (["--season=5"], "--season applies to a --task; got 5: leave it out"),
        (["--task=forecast", "--guidance_scale=2"], "guidance_scale needs a pipeline and data with classes"),
        (["--task=impute", "--sampler=DDIMScheduler"], "needs a GaussianScheduler, got DDIMScheduler"),
        (["--task=impute", "--num_inference_steps=2000"], "must lie in 1 to 1000, got [2000]"),
    ],
)
def test_what_the_program_refuses(options, message, sequences, capsys):
    assert evaluate_script.main([f"--pipeline={sequences}", "--data=ecg", *options]) == 2
    assert message in capsys.readouterr().err


def test_items_to_complete(sequences, tmp_path, capsys):
    """Other data than the run's is taken as given, or as many items of it as the user says. Data of a run that held
    nothing out is taken if the user says so."""
    other = str(tmp_path / "other.npy")
    np.save(other, np.random.default_rng(0).normal(size=(12, 1, 32)))
    command = [f"--pipeline={sequences}", f"--data={other}", "--task=forecast", f"--output_dir={tmp_path}", *FAST]
    assert evaluate_script.main(command) == 0
    assert evaluate_script.main([*command, "--holdout=3"]) == 0
    records = json.loads((tmp_path / "completion.json").read_text())
    assert {r["num_items"] for r in records} == {3, 4}
    train(config(tmp_path / "run", dataset_name="ecg", max_train_steps=1, sequence_length=32))
    command[:2] = f"--pipeline={tmp_path}/run/pipeline", "--data=ecg"
    assert evaluate_script.main(command) == 2
    assert "--task forecast needs items that training does not see" in capsys.readouterr().err
    assert evaluate_script.main([*command, "--holdout=0"]) == 0


def test_a_model_that_is_given_the_known_part(tmp_path):
    """It completes with any scheduler, and its records name no jumps."""
    unet = UNet1D(sample_size=32, in_channels=2, condition_channels=4, **MODEL)
    DDPMPipeline1D(unet, GaussianScheduler(), condition="known").save_pretrained(tmp_path / "pipeline")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(6, 2, 32)))
    command = [f"--pipeline={tmp_path}/pipeline", f"--data={tmp_path}/data.npy", "--task=impute", *FAST]
    assert evaluate_script.main([*command, "--sampler=DDIMScheduler"]) == 0
    records = json.loads((tmp_path / "pipeline" / "completion.json").read_text())
    assert {r.get("scheduler") for r in records} == {"DDIMScheduler", None}
    assert {r.get("channel") for r in records} == {None, 0, 1} and not any("jump_length" in r for r in records)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_three_processes_complete_what_one_does(sequences, tmp_path):
    """The same completions, in batches of other sizes, whose rounding is other: to 1e-4."""
    shutil.copytree(sequences, tmp_path / "pipeline")
    options = [f"--pipeline={tmp_path}/pipeline", "--data=ecg", "--task=impute", *FAST]
    assert evaluate_script.main([*options, f"--output_dir={tmp_path}/out1"]) == 0
    done = run_program(
        "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", EVALUATE, *options,
        f"--output_dir={tmp_path}/out3", "--batch_size=2", cwd=tmp_path, ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, three = (json.loads((tmp_path / out / "completion.json").read_text()) for out in ("out1", "out3"))
    assert [{**r, "value": 0} for r in one] == [{**r, "value": 0} for r in three]
    assert [r["value"] for r in three] == pytest.approx([r["value"] for r in one], rel=1e-4)
