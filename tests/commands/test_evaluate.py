"""The program evaluate.py: results, refusals, and the data of the run that it knows."""

import errno
import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, load_program, run_program
from helpers import SMALL, config
from measuring import grey
from PIL import Image

from ddpm_hf import DDPMPipeline1D, train
from ddpm_hf.commands import evaluating
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import split_record

EVALUATE = ROOT / "training" / "evaluate.py"

evaluate_script = load_program("evaluate")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A trained pipeline of 32 samples of the ECG."""
    folder = tmp_path_factory.mktemp("evaluated")
    train(config(folder / "run", dataset_name="ecg", max_train_steps=3, sequence_length=32))
    return folder / "run" / "pipeline"


def test_the_program(sequences, capsys):
    command = ["--pipeline", str(sequences), "--data", "ecg", "--stride=2", "--num_samples=20"]
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "warning: below 10,000 samples" in out and "from 20 samples" in out and "from 20 real items" in out
    records = json.loads((sequences / "evaluation.json").read_text())
    assert {r["num_inference_steps"] for r in records} == {2, 4} and {r["data"] for r in records} == {"ecg"}
    with Image.open(sequences / "steps-versus-metric.png") as picture:
        assert picture.width > 1000
    assert evaluate_script.main([*command, "--sampler=DPMSolverMultistepScheduler", "--num_inference_steps=2"]) == 0
    both = json.loads((sequences / "evaluation.json").read_text())
    assert both[: len(records)] == records and both[-1]["scheduler"] == "DPMSolverMultistepScheduler"
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    assert len(json.loads((sequences / "evaluation.json").read_text())) == len(both)  # again is not more
    assert evaluate_script.main([*command, "--sampler=fast", "--num_inference_steps=2"]) == 0
    fast = json.loads((sequences / "evaluation.json").read_text())[-1]
    assert fast["scheduler"] == "DPMSolverMultistepScheduler at log_snr_timesteps"
    assert DDPMPipeline1D.from_pretrained(sequences)(num_inference_steps=2).sequences.shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_inference_steps=2000", "1 to 1000, got [2000]"),
        ("--sampler=Nothing", "got 'Nothing'"),
        ("--data=digits", "the data has (1, 8, 8)"),
        ("--pipeline=.", "the pipeline '.' cannot be loaded"),
        ("--metrics=fid", "metrics of sequences are"),
        ("--data=", "--data must be given"),
        ("--feature_network=pixels", "--feature_network applies to images; got 'pixels' for sequences"),
        ("--feature_network=x.pt2", "--feature_network applies to the metrics feature_frechet, precision, recall"),
        ("--eval_cache_dir=x", "--eval_cache_dir applies to images"),
        ("--guidance_interval 0 0.5", "--guidance_interval applies to samples with guidance"),
        ("--metrics bits_per_dim --num_samples=9", "--num_samples applies to samples, which these metrics do not need"),
        ("--metrics held_out_loss --sampler=fast", "--sampler applies to samples, which these metrics do not need"),
        ("--class_labels=label", "--class_labels applies to a pipeline whose model has classes"),
        (
            "--task=forecast --holdout=0 --jump_n_sample=3 --num_inference_steps=5",
            "got 3 with 5 steps and --jump_length 10",
        ),
        ("--image_column=image", "image_column applies to tables of images"),
        ("--on_bad_image=skip", "on_bad_image applies to images"),
    ],
)
def test_what_the_program_refuses(option, message, sequences, capsys):
    name = option.split("=")[0]
    others = {"--pipeline": sequences, "--data": "ecg"}
    command = [f"{key}={value}" for key, value in others.items() if key != name]
    assert evaluate_script.main([*command, *option.split(" ")]) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written(sequences, tmp_path, monkeypatch, capsys):
    """A folder that cannot be written is found before the work; a disk that is full by its end is told."""
    command = [f"--pipeline={sequences}", "--data=ecg", "--num_samples=4", "--num_inference_steps=2"]
    command += ["--metrics=memorization"]

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(evaluating, "write_text", fails)
        assert evaluate_script.main([*command, f"--output_dir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "memorization_real" in said.out and f"{tmp_path}/evaluation.json cannot be written" in said.err
    monkeypatch.setattr(evaluating.tempfile, "TemporaryFile", fails)
    assert evaluate_script.main([*command, f"--output_dir={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "--output_dir" in said.err and "memorization" not in said.out
    (tmp_path / "file").touch()
    assert evaluate_script.main([*command, f"--output_dir={tmp_path}/file/out"]) == 2
    assert "Another folder: --output_dir" in capsys.readouterr().err


def test_the_program_knows_how_training_saw_pictures(tmp_path, capsys):
    """A bad first picture is skipped; random_flip is what the run recorded, unless the option says otherwise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, array in enumerate(grey(12)):
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    train(config(tmp_path / "run", dataset_name=None, train_data_dir=str(folder), resolution=[8], image_channels=1,
                 max_train_steps=1, random_flip=True))  # fmt: skip
    (folder / "00.png").write_bytes(b"damaged")
    command = [f"--pipeline={tmp_path}/run/pipeline", f"--data={folder}", "--num_samples=4", "--num_inference_steps=2"]
    command += ["--metrics=memorization"]
    assert evaluate_script.main(command) == 2 and "--on_bad_image skip" in capsys.readouterr().err
    command += ["--on_bad_image=skip", f"--output_dir={tmp_path}/out"]
    for option, mirrored in ((), True), (("--random_flip=false",), None), (("--random_flip=true",), True):
        (tmp_path / "out" / "evaluation.json").unlink(missing_ok=True)
        assert evaluate_script.main([*command, *option]) == 0
        records = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert {r.get("mirrored") for r in records} == {mirrored} and {r["num_left_out"] for r in records} == {1}


def test_results_of_something_else_are_left(sequences, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text("mine")
    assert evaluate_script.main([f"--pipeline={sequences}", "--data=ecg", f"--output_dir={tmp_path}"]) == 2
    assert "is left as it is" in capsys.readouterr().err and (tmp_path / "evaluation.json").read_text() == "mine"


def test_the_program_holds_out_what_the_run_did(tmp_path, capsys):
    """Count, seed and stride are those that the pipeline's training.json says, whatever the seed of the samples."""
    table = str(tmp_path / "long.csv")
    np.savetxt(table, np.random.default_rng(0).normal(size=(300, 3)), delimiter=",")
    options = {"dataset_name": None, "train_data_file": table, "sequence_length": 16, "stride": 2, "max_train_steps": 2}
    run = config(tmp_path / "run", holdout=10, seed=3, **options)
    train(run)
    pipeline = tmp_path / "run" / "pipeline"
    command = [f"--pipeline={pipeline}", f"--data={table}", "--seed=7", "--num_samples=8", "--num_inference_steps=2"]
    assert evaluate_script.main(command) == 0
    records = {r["metric"]: r for r in json.loads((pipeline / "evaluation.json").read_text())}
    feed = open_data(run)
    assert records["held_out_loss"]["num_held_out"] == 10 and records["frechet"]["num_real"] == feed.items == 118
    assert json.loads((pipeline / "training.json").read_text())["data"]["held_out"] == split_record(feed.held_out)
    capsys.readouterr()
    for option, message in (
        ("--holdout=11", "must be that of the pipeline's run, 10, or 0"),
        ("--stride=1", "is not as it was in training"),
        ("--stride=8", "is not as it was in training"),
    ):
        assert evaluate_script.main([*command, option]) == 2
        assert message in capsys.readouterr().err
    assert evaluate_script.main([*command, "--holdout=0", "--metrics", "frechet", "held_out_loss"]) == 0
    # another name is other data; so long a table has no sequences of its columns
    other = shutil.copy(table, tmp_path / "other.csv")
    command[1] = f"--data={other}"
    assert evaluate_script.main(command) == 2
    assert "to cut windows of 16 from a table whose rows are points in time: --stride" in capsys.readouterr().err
    assert evaluate_script.main([*command, "--stride=2", "--metrics=frechet"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_three_processes_measure_what_one_does(tmp_path, monkeypatch):
    """The same samples and data, in batches of other sizes, whose rounding is other: to 1e-4. One of the three has none
    of the two held-out items."""
    train(config(tmp_path / "run", max_train_steps=3, holdout=2, **{**SMALL, "num_samples": 4}))
    options = [
        "--pipeline=run/pipeline",
        "--data=digits",
        "--feature_network=pixels",
        "--num_samples=31",
        "--holdout=2",
    ]
    monkeypatch.chdir(tmp_path)
    assert evaluate_script.main([*options, "--output_dir=out1", "--eval_cache_dir=cache1"]) == 0
    done = run_program(
        "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone", EVALUATE, *options, "--output_dir=out3",
        "--eval_cache_dir=cache3", cwd=tmp_path, ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("out1", "out3")]
    one, three = ({record["metric"]: record["value"] for record in each} for each in records)
    assert one.keys() == three.keys() and len(one) == 4 + 12
    np.testing.assert_allclose(list(one.values()), list(three.values()), rtol=1e-4)


@pytest.mark.parametrize("norm", ["minmax", "meanstd"])
def test_the_program_knows_the_data_of_the_run(norm, tmp_path, monkeypatch):
    """By name in any spelling, and by content; what the run said of reading it is taken over."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("waves.npy", rng.normal(size=(12, 1, 16)))
    options = {"dataset_name": None, "train_data_file": "waves.npy", "max_train_steps": 1, "sequence_norm": norm}
    train(config("run", holdout=4, **options))
    measure = ["--pipeline=run/pipeline", "--num_samples=4", "--metrics", "frechet", "held_out_loss"]

    def done(*arguments):
        (options,) = evaluate_script.Parser(evaluate_script.EvaluateConfig).parse_args_into_dataclasses(
            [*measure, "--num_inference_steps=2", *arguments]
        )
        return {record["metric"]: record for record in evaluate_script.evaluate(options)}

    for spelling in ("waves.npy", "./waves.npy", str(tmp_path / "waves.npy"), "run/../waves.npy"):
        assert done(f"--data={spelling}")["held_out_loss"]["num_held_out"] == 4
    train(config("all", **options))
    measure[0] = "--pipeline=all/pipeline"
    with pytest.raises(ValueError, match="held_out_loss needs items that training does not see"):
        done("--data=waves.npy")
    assert done("--data=waves.npy", "--holdout=0")["held_out_loss"]["num_held_out"] == 12
    measure[0] = "--pipeline=run/pipeline"
    np.save("waves.npy", rng.normal(size=(12, 1, 16)))
    with pytest.raises(ValueError, match="other content"):
        done("--data=waves.npy")
    measure[2:] = ["--num_samples=4", "--metrics", "frechet"]
    assert "frechet" in done("--data=waves.npy", "--holdout=0")
    (tmp_path / "photos").mkdir()
    for data, message in (("nope.npy", "no such file"), ("./nope", "no such file"), ("photos", "folder of images")):
        with pytest.raises(ValueError, match=message):
            done(f"--data={data}")
