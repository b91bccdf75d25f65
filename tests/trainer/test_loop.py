"""The training loop, at small size: exact resume, accumulation, averaging, refusals."""

import errno
import io
import json
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from diffusers import UNet2DModel
from helpers import SMALL, config, metrics, state, train_until, weights
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, TrainConfig, UNet2D, train
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.run import checkpoint
from ddpm_hf.trainer.looking import Looks
from ddpm_hf.trainer.loop import Trainer, TrainingError


@pytest.mark.parametrize(
    "options",
    [
        {
            "dropout": 0.1,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "logging_steps": 3,
            "immiscible": True,
            "optimizer": "muon",
            "timestep_sampling": "logit_normal",
            "loss_weighting": "uniform",
            "class_labels": "label",
        },
        {
            "gradient_accumulation_steps": 2,
            "self_condition": True,
            "random_flip": True,
            "dataloader_num_workers": 2,
            "class_labels": "label",
            "class_dropout_prob": 0.4,
        },
        {"dataset_name": "ecg", "sequence_length": 32, "mixed_precision": "bf16", "noise_offset": 0.1},
    ],
)
def test_six_steps_are_four_a_stop_and_two_more(options, tmp_path, monkeypatch):
    """Stopped in step 5, after the checkpoint of step 4; the same call again ends with the same bits."""
    options = {"max_train_steps": 6, "checkpointing_steps": 4, **options}
    train(config(tmp_path / "whole", **options))
    train_until(5, monkeypatch, config(tmp_path / "parts", **options))
    torch.rand(7)  # what else the process draws does not matter
    assert train(config(tmp_path / "parts", **options)).steps == 6

    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, content in whole.items():
        assert parts[name] == content, name
    optimizers = [
        torch.load(tmp_path / run / "checkpoints" / "step-000006" / "optimizer.bin", weights_only=True)
        for run in ("whole", "parts")
    ]
    for a, b in zip(*(o["state"].values() for o in optimizers)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_whose_noise_came_from_generators_goes_on(tmp_path, capsys):
    """A checkpoint of ddpm_hf 0.3.0 or earlier names no generator of noise: its run goes on, and one line says that
    its noise is now drawn otherwise. A run of this version goes on without that line."""
    train(config(tmp_path, max_train_steps=2))
    newest = tmp_path / "checkpoints" / "step-000002"
    progress = json.loads((newest / "progress.json").read_text())
    assert progress.pop("draws") == "splitmix64"
    assert json.loads((tmp_path / "pipeline" / "training.json").read_text())["draws"] == "splitmix64"
    train(config(tmp_path, max_train_steps=3))
    assert "drew noise" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "step-000003")
    (newest / "progress.json").write_text(json.dumps(progress))
    (newest / checkpoint.CHECKSUMS).unlink()
    checkpoint._seal(newest)
    assert train(config(tmp_path, max_train_steps=3)).steps == 3
    assert (
        "up to step 2 this run drew noise and timesteps with torch.Generator; from here on" in capsys.readouterr().out
    )


def test_a_complete_run_says_so_and_can_be_extended(tmp_path, capsys):
    train(config(tmp_path, max_train_steps=3))
    before = state(tmp_path)
    assert train(config(tmp_path, max_train_steps=3)).already_complete
    out = capsys.readouterr().out
    assert "the run is complete (3 steps); nothing left to do\n" in out and state(tmp_path) == before
    for _ in range(2):  # the run keeps its own options
        changed = config(tmp_path, max_train_steps=2, num_samples=9, dataloader_num_workers=1)
        assert train(changed).already_complete
        listed = (
            "options that differ from those of the run have no effect: max_train_steps: 3 -> 2, num_samples: 4 -> 9\n"
        )
        assert listed in capsys.readouterr().out.lower() and state(tmp_path) == before
    train(config(tmp_path, max_train_steps=5))
    train(config(tmp_path / "straight", max_train_steps=5))
    a, b = weights(tmp_path), weights(tmp_path / "straight")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_runs_folder_is_refused(tmp_path):
    train(config(tmp_path, max_train_steps=2))
    before = state(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)other options.*dim: 8 -> 16\n  learning_rate: 0.0004 -> 0.1"):
        train(config(tmp_path, max_train_steps=2, dim=16, learning_rate=0.1))
    assert state(tmp_path) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        train(config(tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="output_dir must be"):
            train(config(wrong))


def test_other_data_in_the_place_of_the_first_is_refused(tmp_path):
    data = np.random.default_rng(0).normal(size=(20, 1, 16))
    options = {"dataset_name": None, "train_data_file": str(tmp_path / "x.npy")}
    for change, message in [(data * 2, r"\(content\)"), (data[:12], "number of items 20 -> 12"), (data, None)]:
        np.save(tmp_path / "x.npy", data)
        train(config(tmp_path / "run", max_train_steps=2, **options))
        np.save(tmp_path / "x.npy", change)
        if message is None:
            train(config(tmp_path / "run", max_train_steps=3, **options))
            continue
        before = (tmp_path / "run" / "config.yaml").read_text()
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path / "run", max_train_steps=3, **options))
        assert (tmp_path / "run" / "config.yaml").read_text() == before
    with pytest.raises(ValueError, match="one source of data"):
        train(config(tmp_path / "both"), dataset=Squares())
    with pytest.raises(ValueError, match="output_dir"):
        train(config(tmp_path / ("x" * 300)))


def test_accumulation_of_two_is_a_batch_of_twice_the_size(tmp_path):
    train(config(tmp_path / "a", max_train_steps=3, train_batch_size=16, num_mem_kv=0))
    train(config(tmp_path / "b", max_train_steps=3, gradient_accumulation_steps=2, num_mem_kv=0))
    losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in "ab"]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_run_folder_and_tensorboard(tmp_path, capsys):
    train(
        config(
            tmp_path, max_train_steps=4, checkpointing_steps=1, report_to=["tensorboard"], checkpoints_total_limit=2,
            lr_scheduler="linear", lr_warmup_steps=2,
        )
    )  # fmt: skip
    assert "warning" not in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "samples", "checkpoints", "pipeline", "logs"
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "lr", "epoch"} <= records[0].keys()
    assert records[-1]["epoch"] == pytest.approx(32 / 1797)
    # the rate that the step was made with: two steps of warm-up, the peak, half of the way down
    assert [r["lr"] / 4e-4 for r in records] == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2])

    events = EventAccumulator(str(tmp_path / "logs" / "ddpm_hf")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records])
    with Image.open(tmp_path / "samples" / "step-000004.png") as grid:
        assert grid.size == (132, 132)  # 2 x 2 cells of 64 pixels and a border
        (shown,) = events.Images("samples")
        assert shown.step == 4
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), np.asarray(grid))


def test_wandb_offline_beside_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"dataset_name": "ecg", "sequence_length": 32, "save_samples_steps": 2}
    train(config(tmp_path / "run", max_train_steps=3, report_to=["wandb", "tensorboard"], **options))
    (events,) = (tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 60
    while (
        b"grad_norm" not in events.read_bytes()
    ):  # a process of W&B's own writes it, which may be late on a busy machine
        assert time.monotonic() < end, "W&B wrote no losses"
        time.sleep(0.1)
    logged = EventAccumulator(str(tmp_path / "run" / "logs" / "ddpm_hf"), {"images": 0}).Reload()
    assert [event.step for event in logged.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in logged.Images("samples")] == [2, 3]
    for step in (2, 3):
        (picture,) = events.parent.glob(f"files/media/images/samples_{step}_*.png")
        with Image.open(picture) as shown, Image.open(tmp_path / f"run/samples/step-00000{step}.png") as plot:
            assert np.array_equal(np.asarray(shown), np.asarray(plot.convert("RGB")))


def test_trackers_that_cannot_be_started(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("No API key")

    monkeypatch.setattr(Accelerator, "init_trackers", refused)
    with pytest.raises(ValueError, match="report_to wandb cannot be started: No API key .*WANDB_MODE=offline"):
        train(config(tmp_path / "run", max_train_steps=3, report_to=["wandb"]))
    monkeypatch.setattr("ddpm_hf.trainer.trackers.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    names = ["tensorboard", "comet_ml", "mlflow"]
    with pytest.raises(ValueError, match="comet_ml, mlflow, which must be installed: pip install comet-ml mlflow$"):
        # before the data are looked for
        train(config(tmp_path / "other", max_train_steps=3, report_to=names, dataset_name=None))
    assert not (tmp_path / "other").exists()


def test_another_tracker_by_name(tmp_path, monkeypatch):
    """A stand-in for a package that is not installed, where accelerate looks for it."""
    logged = []

    class Stand(GeneralTracker):
        name, requires_logging_directory, tracker = "mlflow", False, None

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def log(self, values, step=None, **kwargs):
            logged.append((step, values["loss"]))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mlflow", Stand)
    for module in ("ddpm_hf.trainer.trackers", "accelerate.tracking"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType.MLFLOW])
    train(config(tmp_path, max_train_steps=2, report_to=["mlflow"]))
    assert logged == [(r["step"], r["loss"]) for r in metrics(tmp_path)]


def test_a_tracker_that_fails_costs_its_points_alone(tmp_path, monkeypatch, capsys):
    def down(*_, **__):
        raise ConnectionError("no answer")

    monkeypatch.setattr(TensorBoardTracker, "log", down)
    monkeypatch.setattr(TensorBoardTracker, "log_images", down)
    assert train(config(tmp_path, max_train_steps=2, report_to=["tensorboard"])).steps == 2
    line = "warning: step 2: tensorboard has not logged this step: ConnectionError: no answer"
    assert capsys.readouterr().out.count(line) == 2


def test_dry_run_writes_nothing(tmp_path, capsys):
    warmup = {"lr_scheduler": "cosine", "lr_warmup_steps": 99, "max_train_steps": 50}
    assert train(config(tmp_path / "run", dry_run=True, **warmup)) is None
    out = capsys.readouterr().out
    assert "learning_rate: 0.0004" in out and "parameters" in out and "1,797 items of shape (1, 8, 8)" in out
    assert "warning: lr_warmup_steps 99 is more than half of max_train_steps 50" in out
    assert not (tmp_path / "run").exists()


def test_muon_is_refused_under_deepspeed(tmp_path, monkeypatch):
    made = Accelerator.__init__

    def as_with_deepspeed(self, *args, **options):  # which is not installed
        made(self, *args, **options)
        self.state.distributed_type = DistributedType.DEEPSPEED

    monkeypatch.setattr(Accelerator, "__init__", as_with_deepspeed)
    monkeypatch.setattr(Accelerator, "mixed_precision", "no")  # which accelerate asks DeepSpeed for
    with pytest.raises(ValueError, match="optimizer must be adamw under DeepSpeed.*got 'muon'"):
        train(config(tmp_path / "run", optimizer="muon"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, chosen",
    [({}, ["keep"]), ({"gradient_checkpointing": True}, ["keep"]), ({"release_memory": True}, ["return"])],
)
def test_freed_memory_is_kept_unless_asked(tmp_path, monkeypatch, options, chosen):
    found = []
    for name in ("keep", "return"):
        monkeypatch.setattr(f"ddpm_hf.trainer.build.{name}_freed_memory", lambda name=name: found.append(name))
    train(config(tmp_path, max_train_steps=1, **options))
    assert found == chosen


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    for options, message in [
        ({"train_batch_size": 1798}, "1798, the data has 1797"),
        ({"train_batch_size": 600, "gradient_accumulation_steps": 3}, "1800"),
        ({"dataset_name": None}, "no data"),
        ({"ddpm_beta_schedule": "linear", "ddpm_num_steps": 15}, "at least 21 steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(config(run, **options))
        assert not run.exists()


def test_sequences_of_mean_zero_and_deviation_one(tmp_path):
    """The scaling and the range of its values are saved; an untrained model's samples are in the data's own units."""
    array = np.random.default_rng(0).normal(1000, 5, size=(30, 2, 16))
    np.save(tmp_path / "x.npy", array)
    options = {"dataset_name": None, "train_data_file": str(tmp_path / "x.npy"), "sequence_norm": "meanstd"}
    train(config(tmp_path / "run", max_train_steps=2, **options))
    pipe = DDPMPipeline1D.from_pretrained(tmp_path / "run" / "pipeline")
    np.testing.assert_allclose(pipe.config.data_shift, array.mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(pipe.config.data_scale, array.std(axis=(0, 2)), rtol=1e-9)
    widest = np.abs((array - array.mean(axis=(0, 2), keepdims=True)) / array.std(axis=(0, 2), keepdims=True)).max()
    assert pipe.scheduler.config.clip_sample_range == pytest.approx(widest, rel=1e-9)
    samples = pipe(batch_size=4, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).sequences
    assert np.abs(samples - 1000).max() <= widest * array.std(axis=(0, 2)).max() + 1


BAD_FILES = {
    "train_data_file": ["x.npy", "x.npz", "x.csv", "x.parquet"],
    "train_data_dir": ["d/x.png", "d/x.parquet", "d/x.arrow", "d/x.tar", "d/dataset_dict.json"],
}


@pytest.mark.parametrize(("option", "name"), [(option, name) for option, names in BAD_FILES.items() for name in names])
@pytest.mark.parametrize("content", [b"", b"not what it says"])
def test_a_bad_file_of_each_format(option, name, content, tmp_path):
    """One clear error that names it; neither a run folder, nor the file touched."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = str(file if option == "train_data_file" else file.parent)
    with pytest.raises(ValueError, match=re.escape(str(file.parent))):
        train(config(tmp_path / "run", dataset_name=None, **{option: source}))
    assert not (tmp_path / "run").exists() and file.read_bytes() == content


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_pictures_in_the_middle(workers, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{i:02d}.png")
    bad = tmp_path / "photos" / "07.png"
    bad.write_bytes(bad.read_bytes()[:100])
    options = {"dataset_name": None, "train_data_dir": str(tmp_path / "photos"), "resolution": [8]}
    options.update(max_train_steps=2, dataloader_num_workers=workers)
    with pytest.raises(TrainingError, match=r"step [12]: cannot read the image .*07.png.*--on_bad_image skip"):
        train(config(tmp_path / "a", **options))
    train(config(tmp_path / "b", on_bad_image="skip", **options))
    assert metrics(tmp_path / "b")[-1]["skipped_images"] >= 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
@pytest.mark.parametrize("what", ["weights", "metrics"])
def test_a_full_disk(what, tmp_path, monkeypatch):
    """No file may grow past 20 kB after step 2, or no line be added to the metrics. The run ends with a message, the
    checkpoint of step 2 is whole, and with room again the same call ends with the bits of a run that had it."""
    import resource

    options = {"max_train_steps": 4, "checkpointing_steps": 1, "learning_rate": 1e-2}
    train(config(tmp_path / "whole", **options))
    step, before = Trainer._train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, batches):
        if self.progress.step == 2 and what == "weights":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        elif self.progress.step == 2:
            monkeypatch.setattr(checkpoint.MetricsFile, "append", no_space)
        return step(self, batches)

    def no_space(self, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_train_step", full)
    try:
        with pytest.raises(TrainingError, match="step 3: cannot save in .*newest whole checkpoint is .*step-000002"):
            train(config(tmp_path / "parts", **options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert checkpoint.damage(tmp_path / "parts" / "checkpoints" / "step-000002") is None
    assert DDPMPipeline.from_pretrained(tmp_path / "parts" / "pipeline")
    train(config(tmp_path / "parts", **options))
    assert state(tmp_path / "parts") == state(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    options = {"max_train_steps": 9, "checkpointing_steps": 3}
    step = Trainer._train_step

    def explode(self, batches):
        if self.progress.step == 4:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", explode)
    with pytest.raises(TrainingError, match=r"step 5: the loss is nan.*step-000003"):
        train(config(tmp_path, **options))
    saved = load_file(tmp_path / "checkpoints" / "step-000003" / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in saved.values())
    monkeypatch.undo()
    assert train(config(tmp_path, **options)).steps == 9


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return {"image": torch.full((1, 8, 8), (index % 3) - 1.0), "label": index}


def test_a_compiled_model(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend`, here without code generation, taking over after step 2: the numbers, and
    the names of the weights, of a run that is not compiled."""
    options = {"checkpointing_steps": 2, "learning_rate": 1e-2}
    train(config(tmp_path / "plain", max_train_steps=4, **options))
    train(config(tmp_path / "compiled", max_train_steps=2, **options))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.utils.counters.clear()
    train(config(tmp_path / "compiled", max_train_steps=4, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in ("plain", "compiled")]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


def test_a_dataset_from_python(tmp_path):
    result = train(config(tmp_path, dataset_name=None, max_train_steps=2), dataset=Squares())
    assert DDPMPipeline.from_pretrained(result.pipeline_dir)(1).images[0].mode == "L"
    with pytest.raises(ValueError, match="map-style"):
        train(config(tmp_path / "x", dataset_name=None), dataset=iter([1]))
    pairs = torch.utils.data.TensorDataset(torch.rand(20, 1, 16) * 2 - 1, torch.arange(20))
    train(config(tmp_path / "z", dataset_name=None, max_train_steps=1), dataset=pairs)
    array = np.random.default_rng(0).normal(size=(20, 2, 16))
    train(config(tmp_path / "y", dataset_name=None, max_train_steps=1), dataset=SequenceDataset(array))


def test_a_stock_model_can_be_trained(tmp_path):
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    built = ("dim", "dim_mults", "attn_heads", "attn_dim_head")
    options = {name: value for name, value in SMALL.items() if name not in built}
    result = train(
        TrainConfig(dataset_name="digits", output_dir=str(tmp_path), max_train_steps=2, **options), model=model
    )
    pipe = DDPMPipeline.from_pretrained(result.pipeline_dir)
    assert isinstance(pipe.unet, UNet2DModel) and pipe(2).images[0].size == (8, 8)


def test_a_metric_that_is_not_a_number_is_not_the_best_for_ever(tmp_path, monkeypatch):
    values = iter([float("nan"), 2.0, 3.0])
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: {"fid": next(values)})
    evaluation = {"eval_steps": 1, "eval_metrics": ["fid"], "eval_num_samples": 4, "feature_network": "pixels"}
    train(config(tmp_path / "run", max_train_steps=3, eval_cache_dir=str(tmp_path / "cache"), **evaluation))
    (newest,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((newest / "progress.json").read_text())["best"] == {"metric": "fid", "value": 2.0, "step": 2}


LOOKS = {"max_train_steps": 4, "eval_steps": 2, "eval_metrics": ["held_out_loss"], "holdout": 9}


def test_a_best_pipeline_that_cannot_be_saved(tmp_path, monkeypatch):
    """The errors of a full disk are those of every save: safetensors has its own."""

    def full(self, *_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DDPMPipeline, "save_pretrained", full)
        with pytest.raises(TrainingError, match="step 2: cannot save in .*No space left"):
            train(config(tmp_path, **LOOKS))
    train(config(tmp_path, **{**LOOKS, "max_train_steps": 2}))  # it is saved when there is room
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text())[0]["step"] == 2


@pytest.mark.parametrize("name", ["save_samples", "evaluate"])
def test_samples_or_an_evaluation_that_fail_cost_no_steps(name, tmp_path, monkeypatch, capsys):
    """The steps before are saved, the next start begins with what failed, and the bits are those of a run without."""
    train(config(tmp_path / "whole", **LOOKS, save_samples_steps=2))

    def fail(self):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Looks, name, fail)
        train(config(tmp_path / "parts", **LOOKS, save_samples_steps=2))
    look = {"save_samples": "samples", "evaluate": "evaluation"}[name]
    assert f"step 2 is saved without its {look}, which fail" in capsys.readouterr().out
    assert train(config(tmp_path / "parts", **LOOKS, save_samples_steps=2)).steps == 4
    assert state(tmp_path / "parts") == state(tmp_path / "whole")


def test_two_runs_of_a_process_may_have_other_precisions(tmp_path):
    """Also with one model from Python, which keeps no part of the first run."""
    torch.manual_seed(0)
    model = UNet2D(sample_size=8, in_channels=1, dim=8, dim_mults=[1, 2], attn_heads=2, attn_dim_head=4)
    built = ("dim", "dim_mults", "attn_heads", "attn_dim_head")
    options = {"dataset_name": "digits", **{name: value for name, value in SMALL.items() if name not in built}}
    types = []
    model.mid_stage.register_forward_hook(lambda *arguments: types.append(arguments[-1].dtype))
    for number, precision in enumerate(("no", "bf16", "no")):
        types.clear()
        given = TrainConfig(
            output_dir=str(tmp_path / f"{number}"), max_train_steps=1, mixed_precision=precision, **options
        )
        train(given, model=model)
        assert AcceleratorState().mixed_precision == precision
        model(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
        step, *later = types  # samples are computed in the type of the weights
        assert step == (torch.bfloat16 if precision == "bf16" else torch.float32) and set(later) == {torch.float32}


def test_samples_that_are_not_finite_end_no_run(tmp_path, monkeypatch, capsys):
    failures, check = iter([True, True]), DDPMPipeline._check_finite  # the picture and the evaluation of step 1

    def fail_first(*arguments):
        if next(failures, False):
            raise FloatingPointError("it began at 9")
        check(*arguments)

    monkeypatch.setattr(DDPMPipeline, "_check_finite", staticmethod(fail_first))
    evaluation = {"eval_steps": 1, "eval_metrics": ["fid"], "eval_num_samples": 4, "feature_network": "pixels"}
    options = {"eval_cache_dir": str(tmp_path / "cache"), "save_samples_steps": 1, **evaluation}
    train(config(tmp_path / "run", max_train_steps=2, **options))
    said = capsys.readouterr().out
    assert "warning: step 1: there is no picture of samples: it began at 9" in said
    assert "warning: step 1: the evaluation is left out: it began at 9" in said
    assert [file.name for file in (tmp_path / "run" / "samples").glob("*.png")] == ["step-000002.png"]
    assert [record["step"] for record in metrics(tmp_path / "run") if "eval/fid" in record] == [2]


@pytest.mark.parametrize(
    "options, size, line",
    [
        ({"dataset_name": "ecg", "sequence_length": 37, "dim_mults": [1, 2, 2]}, 37, "it pads 37 to 40 inside"),
        ({"resolution": [9, 7]}, [9, 7], "it pads 9 x 7 to 10 x 8 inside"),
        pytest.param(
            {"dataset_name": "ecg", "sequence_length": 187, "dim_mults": [1, 2, 2, 2]},
            187,
            "it pads 187 to 192 inside",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"resolution": [100, 75], "dim_mults": [1, 2, 2, 2]},
            [100, 75],
            "it pads 100 x 75 to 104 x 80 inside",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sizes_that_cannot_be_halved(options, size, line, tmp_path, capsys):
    """They are trained, saved, loaded and sampled as they are, and a line says what the model does."""
    train(config(tmp_path / "run", max_train_steps=2, **options))
    assert line in capsys.readouterr().out
    kind = DDPMPipeline if isinstance(size, list) else DDPMPipeline1D
    pipeline = kind.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.unet.config.sample_size == size
    samples = pipeline(batch_size=2, output_type="np")[0]
    assert (samples.shape[1:3] if isinstance(size, list) else samples.shape[-1:]) == tuple(np.ravel(size))
    assert torch.isfinite(torch.as_tensor(samples)).all()
