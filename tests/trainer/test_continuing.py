"""Runs that continue another run or begin with a pipeline's weights, and the lock of a run folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_program
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from helpers import config, make, metrics, state, weights
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipeline, GaussianScheduler, TrainConfig, train
from ddpm_hf.commands.train import parse
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.run.lock import RunLock
from ddpm_hf.trainer.loop import Trainer


def optimizer(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:06d}" / "optimizer.bin", weights_only=True)


def continued(source, folder, **options):
    return TrainConfig(continue_from=str(source), output_dir=str(folder), num_cpu_threads=1, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of 6 steps with classes, at the constant rate; tests only read it."""
    folder = tmp_path_factory.mktemp("source") / "a"
    train(config(folder, max_train_steps=6, checkpointing_steps=3, class_labels="label"))
    return folder


def test_six_steps_and_six_more_are_twelve(source, tmp_path, monkeypatch, capsys):
    """At a constant rate, a run that is continued ends with the bits of the run that was not; so does its resume, for
    which the source is not needed."""
    before = contents(source)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    train(config(tmp_path / "whole", max_train_steps=12, class_labels="label", checkpointing_steps=3))
    options = continued(moved, tmp_path / "b", max_train_steps=12)
    assert (options.dim, options.dataset_name, options.class_labels) == (8, "digits", "label")
    step = Trainer._train_step

    def stop(self, batches):
        if self.progress.step == 10:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert "after step 6: 6 steps remain" in out and "the order of the data goes on where" in out
    assert {name: data for name, data in contents(moved).items() if ".lock" not in name} == {
        name: data for name, data in before.items() if ".lock" not in name
    }
    first = tmp_path / "b" / "checkpoints" / "step-000006"
    for name in ("model.safetensors", "ema.safetensors"):
        assert not first.exists() or (first / name).read_bytes() == before[f"checkpoints/step-000006/{name}"]
    shutil.rmtree(moved)
    assert train(continued(moved, tmp_path / "b", max_train_steps=12)).steps == 12
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "b")
    for name, content in whole.items():
        if name != "metrics.jsonl" and name in parts:
            assert parts[name] == content, name
    assert metrics(tmp_path / "b") == metrics(tmp_path / "whole")[6:]
    left, right = (optimizer(tmp_path / run, 12)["state"] for run in ("whole", "b"))
    assert all(torch.equal(left[k][n], right[k][n]) for k in left for n in left[k])


@pytest.mark.slow
def test_other_rate_batch_and_optimizer(source, tmp_path, capsys):
    """The first checkpoint of the new run has the source's weights, average and moments; the rate covers the rest."""
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "learning_rate": 1e-3, "checkpoints_total_limit": 0}
    train(continued(source, tmp_path / "b", max_train_steps=12, train_batch_size=4, **options))
    out = capsys.readouterr().out
    assert "the order of the data begins anew: a step has 4 samples in the place of 8" in out
    for name in ("model.safetensors", "ema.safetensors"):
        now, then = (run / "checkpoints" / "step-000006" / name for run in (tmp_path / "b", source))
        assert now.read_bytes() == then.read_bytes()
    now, then = optimizer(tmp_path / "b", 6), optimizer(source, 6)
    assert all(torch.equal(now["state"][k]["exp_avg"], then["state"][k]["exp_avg"]) for k in then["state"])
    assert then["state"][0]["step"] == 6 and optimizer(tmp_path / "b", 12)["state"][0]["step"] == 12
    rates = [record["lr"] for record in metrics(tmp_path / "b")]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(rates, 1e-3 * np.array([1 / 3, 2 / 3, *cosine]), rtol=1e-12)
    assert [record["epoch"] for record in metrics(tmp_path / "b")][0] == 4 / 1797
    kept = json.loads((tmp_path / "b" / "lineage.json").read_text())
    assert kept["step"] == kept["order_from"] == 6 and "learning_rate: 0.0004 -> 0.001" in kept["changed"]
    train(continued(source, tmp_path / "c", max_train_steps=7, optimizer="muon", use_ema=False, dropout=0.1))
    assert "made new: the state of the optimizer, which is muon in the place of adamw" in capsys.readouterr().out


def test_what_cannot_be_continued(source, tmp_path):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            train(TrainConfig(**{"continue_from": str(source), "output_dir": str(tmp_path / "b"), **options}))
        assert not (tmp_path / "b").exists()

    refused("no folder nowhere", continue_from="nowhere")
    refused("has no config.yaml", continue_from=str(tmp_path))
    refused("output_dir must be another folder", output_dir=str(source))
    refused("max_train_steps must be more than the 6 steps")
    refused(r"dim must be that of the run which is continued, 8", max_train_steps=9, dim=16)
    refused("give one of continue_from and init_from", init_from="x")
    refused("'best' needs a run that was evaluated", max_train_steps=9, continue_checkpoint="best")
    refused(r"a checkpoint of .*step-000003, step-000006", max_train_steps=9, continue_checkpoint="step-000004")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(source / "config.yaml", empty)
    refused("a run with a checkpoint", max_train_steps=9, continue_from=str(empty))
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "checkpoints" / "step-000006" / "optimizer.bin").write_bytes(b"x")
    refused("is damaged: optimizer.bin.*continue_checkpoint names another", max_train_steps=9,
            continue_from=str(damaged))  # fmt: skip
    np.save(tmp_path / "waves.npy", np.random.default_rng(0).standard_normal((40, 1, 16)))
    refused("do not fit the model", max_train_steps=9, train_data_file=str(tmp_path / "waves.npy"))


def test_an_earlier_checkpoint_and_the_dry_run(source, tmp_path, capsys):
    options = {"continue_checkpoint": "step-000003", "max_train_steps": 9}
    assert train(continued(source, tmp_path / "b", dry_run=True, **options)) is None
    out = capsys.readouterr().out
    assert "step-000003 after step 3: 6 steps remain" in out and not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_best_checkpoint(tmp_path, capsys):
    """It is that of the best evaluation; where it was not kept, the message names the way on with its weights."""
    options = {"eval_steps": 2, "holdout": 20, "eval_metrics": ["held_out_loss"], "checkpointing_steps": 2,
               "checkpoints_total_limit": 0, "max_train_steps": 6}  # fmt: skip
    train(config(tmp_path / "a", **options))
    progress = tmp_path / "a" / "checkpoints" / "step-000006" / "progress.json"
    content = json.loads(progress.read_text())
    assert content["best"]["metric"] == "held_out_loss" and content["best"]["step"] in (2, 4, 6)

    def say_best(step):
        progress.write_text(json.dumps({**content, "best": {**content["best"], "step": step}}))

    options = {"continue_checkpoint": "best", "max_train_steps": 8}
    say_best(4)
    train(continued(tmp_path / "a", tmp_path / "b", **options))
    assert "step-000004 after step 4: 4 steps remain" in capsys.readouterr().out
    assert metrics(tmp_path / "b")[0]["step"] == 5
    say_best(3)
    with pytest.raises(ValueError, match="has not kept.* --init_from .*best"):
        train(continued(tmp_path / "a", tmp_path / "d", **options))
    train(initialised(tmp_path / "a" / "best", tmp_path / "d", dry_run=True))


def test_a_refused_resume_names_the_way_on(tmp_path, source):
    shutil.copytree(source, tmp_path / "a")
    with pytest.raises(ValueError, match="other options") as caught:
        train(config(tmp_path / "a", max_train_steps=6, class_labels="label", learning_rate=0.1))
    arguments = str(caught.value).splitlines()[-1].split(": ")[1].split()
    found = parse([*arguments, "--max_train_steps", "9", "--learning_rate", "0.1"])
    assert found.continue_from == str(tmp_path / "a") and found.output_dir == f"{tmp_path / 'a'}-continued"
    assert (found.learning_rate, found.max_train_steps, found.dim) == (0.1, 9, 8)
    with pytest.raises(ValueError) as caught:
        train(config(tmp_path / "a", max_train_steps=6, class_labels="label", dim=16))
    assert "--continue_from" not in str(caught.value)


def initialised(place, folder, **options):
    small = {"report_to": ["none"], "num_cpu_threads": 1, "ddpm_num_inference_steps": 3, "num_samples": 4,
             "train_batch_size": 4, "max_train_steps": 2, "logging_steps": 1, "dataset_name": "digits"}  # fmt: skip
    return TrainConfig(init_from=str(place), output_dir=str(folder), **{**small, **options})


def test_a_pipeline_begins_a_run_of_other_size_and_classes(tmp_path, capsys):
    pipe = make("images")
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "p")
    train(initialised(tmp_path / "p", tmp_path / "b", class_labels="label", resolution=[16], checkpoints_total_limit=0))
    out = capsys.readouterr().out
    assert "beginning with the weights of" in out and "the embeddings of 10 classes, which begin at zero" in out
    options = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert (options["dim"], options["dim_mults"], options["attn_heads"]) == (8, [1, 2], [2])
    first = DDPMPipeline.from_pretrained(tmp_path / "b" / "pipeline")
    assert first.unet.config.sample_size == 16 and first.unet.config.num_class_embeds == 10
    begun = load_file(tmp_path / "b" / "checkpoints" / "step-000000" / "model.safetensors")
    for name, value in pipe.unet.float().state_dict().items():
        assert torch.equal(begun[name], value), name
    assert not begun["class_embedding.weight"].any()
    shutil.rmtree(tmp_path / "p")  # a resumed run does not need it
    again = initialised(tmp_path / "p", tmp_path / "b", class_labels="label", resolution=[16],
                        checkpoints_total_limit=0)  # fmt: skip
    assert train(again).already_complete


def of_size(kind, place, size):
    pipe = make(kind)
    pipe.unet.register_to_config(sample_size=size)
    pipe.save_pretrained(place)


@pytest.mark.parametrize("size", [16, (8, 16)])
def test_the_size_is_the_pipelines(size, tmp_path):
    """Unless one is given; what is taken over is no difference for the card, and a resumed run keeps it."""
    of_size("images", tmp_path / "p", size)
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b"))
    height, width = size if isinstance(size, tuple) else (size, size)
    assert trainer.feed.shape == (1, height, width)
    shown = "16" if size == 16 else "8 16"
    assert f"resolution is {shown}, the size that the pipeline was trained at" in "\n".join(trainer.origin.lines)
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b", resolution=[8]))
    assert trainer.feed.shape == (1, 8, 8) and not trainer.origin.size_line
    given = Trainer(initialised(tmp_path / "p", tmp_path / "c", dataset_name=None), torch.zeros(8, 1, 12, 12))
    assert given.feed.shape == (1, 12, 12)  # a dataset from Python has its own size
    if size == 16:
        (tmp_path / "p" / "training.json").write_text(json.dumps({"options": {"resolution": None, "dim": 9}}))
        train(initialised(tmp_path / "p", tmp_path / "b"))
        changed = json.loads((tmp_path / "b" / "lineage.json").read_text())["changed"]
        assert "dim: 9 -> 8" in changed and "resolution" not in str(changed)
        shutil.rmtree(tmp_path / "p")
        assert train(initialised(tmp_path / "p", tmp_path / "b")).already_complete


def test_the_length_is_the_pipelines(tmp_path):
    """For whole sequences and for windows; data that is too short for it is refused with the reason."""
    of_size("sequences", tmp_path / "p", 16)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(8, 2, 40)))
    np.save(tmp_path / "short.npy", np.random.default_rng(0).normal(size=(8, 2, 12)))
    data = {"dataset_name": None, "train_data_file": str(tmp_path / "x.npy")}
    for options, items in (({}, 8), ({"stride": 24}, 16)):
        trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b", **data, **options))
        assert (trainer.feed.shape, trainer.feed.items) == ((2, 16), items)
        assert "sequence_length is 16, the size that" in trainer.origin.size_line
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b", **data, sequence_length=20))
    assert trainer.feed.shape == (2, 20)
    data["train_data_file"] = str(tmp_path / "short.npy")
    with pytest.raises(ValueError, match=r"length 12, got 16 \(sequence_length is 16, the size that"):
        Trainer(initialised(tmp_path / "p", tmp_path / "b", **data))
    of_size("sequences", tmp_path / "q", None)
    with pytest.raises(ValueError, match="stride needs sequence_length"):
        Trainer(initialised(tmp_path / "q", tmp_path / "b", **data, stride=24))


def test_classes_are_matched_by_name_and_can_be_left_out(source, tmp_path, capsys):
    place = source / "pipeline"
    trainer = Trainer(initialised(place, tmp_path / "b"))
    pipe = DDPMPipeline.from_pretrained(place)
    x = torch.randn(2, 1, 8, 8)
    pipe.unet.eval(), trainer.model.eval()
    with torch.no_grad():
        ours, theirs = trainer.model(x, 5).sample, pipe.unet(x, 5).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    trainer = Trainer(initialised(place, tmp_path / "b", class_labels="label"))
    trainer.model.eval()
    with torch.no_grad():
        labels = torch.tensor([3, 7])
        torch.testing.assert_close(trainer.model(x, 5, class_labels=labels).sample,
                                   pipe.unet(x, 5, class_labels=labels).sample)  # fmt: skip
    rows = trainer.origin._class_rows(torch.arange(4.0)[:, None], torch.zeros(4, 1), ["2", "cat", "0"])
    assert rows[:, 0].tolist() == [2, 3, 0, 3]
    assert "classes cat, which begin as that of no class" in trainer.origin.lineage.made_new[-1]


def test_what_a_run_cannot_begin_with(source, tmp_path):
    make("sequences").save_pretrained(tmp_path / "sequences")

    def refused(match, place=source / "pipeline", **options):
        with pytest.raises(ValueError, match=match):
            train(initialised(place, tmp_path / "b", **options))
        assert not (tmp_path / "b").exists()

    refused("dim must be that of the pipeline in init_from, 8, got 16", dim=16)
    refused("data's 3 channels, got one of 1", image_channels=3)
    refused("a pipeline of images, as the data, got one of sequences", tmp_path / "sequences")
    refused("no model_index.json", source)
    refused("there is no", tmp_path / "nowhere" / "at" / "all")
    refused(r"nofile\.pt is not a file", "nofile.pt")


def test_schedule_and_target_are_the_pipelines(tmp_path, capsys):
    pipe = make("images")
    betas = np.linspace(0.001, 0.3, 20).tolist()
    pipe = DDPMPipeline(pipe.unet, GaussianScheduler(trained_betas=betas, prediction_type="epsilon"), 3)
    pipe.save_pretrained(tmp_path / "p")
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b"))
    assert trainer.scheduler.config["trained_betas"] == betas and trainer.config.prediction_type == "epsilon"
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b", ddpm_beta_schedule="cosine",
                                  prediction_type="v_prediction"))  # fmt: skip
    assert trainer.scheduler.config["beta_schedule"] == "cosine"
    assert any("the pipeline predicts epsilon" in line for line in trainer.origin.lines)


@pytest.mark.parametrize("given", [{}, {"snr_shift": 1.5}, {"ddpm_num_steps": 30}, {"ddpm_beta_schedule": "linear"}])
def test_an_option_of_the_schedule_changes_this_one_alone(given, tmp_path, capsys):
    """The others are those of the pipeline, with its shift."""
    own = {"ddpm_num_steps": 40, "ddpm_beta_schedule": "cosine", "snr_shift": -0.5}
    scheduler = GaussianScheduler(40, "cosine", snr_shift=-0.5, prediction_type="v_prediction")
    DDPMPipeline(make("images").unet, scheduler, 3).save_pretrained(tmp_path / "p")
    trainer = Trainer(initialised(tmp_path / "p", tmp_path / "b", **given))
    assert {name: getattr(trainer.config, name) for name in own} == {**own, **given}
    expected = GaussianScheduler(*({**own, **given}[name] for name in list(own)[:2]), prediction_type="v_prediction",
                                 snr_shift={**own, **given}["snr_shift"])  # fmt: skip
    assert trainer.scheduler.config["trained_betas"] == expected.config["trained_betas"]


HOLD = """
import sys, time
from pathlib import Path
from ddpm_hf.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
assert lock.take() is None
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_and_sigkill_leaves_no_lock(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"another run \(process {holder.pid} on .*\) is training in it"):
                train(config(tmp_path, max_train_steps=1))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert train(config(tmp_path, max_train_steps=1)).steps == 1
    assert RunLock(tmp_path).take() is None


def test_a_file_system_without_locks_gets_none(tmp_path, monkeypatch, capsys):
    """No marker file is left in the place of the lock, which would refuse the next run after SIGKILL."""

    def missing(*_):
        raise OSError(errno.ENOSYS, "flock is not there")

    monkeypatch.setattr("fcntl.flock", missing)
    locks = [RunLock(tmp_path), RunLock(tmp_path)]
    assert [lock.take() for lock in locks] == [None, None]
    assert capsys.readouterr().out.count("cannot be locked against a second run") == 2
    for lock in locks:
        lock.release()
    monkeypatch.undo()
    assert RunLock(tmp_path).take() is None


@pytest.mark.slow
@pytest.mark.parametrize("seed_given", [0, 1])
def test_a_stream_is_continued(tmp_path, capsys, seed_given):
    """Three steps and three more of streamed images are six; with another seed the order begins anew."""
    pictures = [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in range(20)]
    datasets.Dataset.from_dict({"image": pictures}).save_to_disk(str(tmp_path / "table"))
    options = {"dataset_name": None, "train_data_dir": str(tmp_path / "table"), "streaming": True, "resolution": [8],
               "image_channels": 1, "shuffle_buffer": 6, "train_batch_size": 4}  # fmt: skip
    train(config(tmp_path / "a", max_train_steps=3, **options))
    seed = {"seed": seed_given} if seed_given else {}
    train(continued(tmp_path / "a", tmp_path / "b", max_train_steps=6, **seed))
    out = capsys.readouterr().out
    if seed:
        assert "the order of the data begins anew: seed is 1 in the place of 0" in out
        return
    assert "the order of the data goes on" in out
    train(config(tmp_path / "whole", max_train_steps=6, **options))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "b")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_checkpoint_of_the_peer_begins_a_run(tmp_path, capsys):
    """The weights, heads, schedule and target are those that the conversion finds; the size is the data's."""
    state = GaussianDiffusion(Unet(dim=8, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=4), image_size=8,
                              timesteps=20, objective="pred_noise", beta_schedule="cosine").state_dict()  # fmt: skip
    torch.save(state, tmp_path / "model-1.pt")
    trainer = Trainer(initialised(tmp_path / "model-1.pt", tmp_path / "b", max_train_steps=1))
    peer = from_denoising_diffusion_pytorch(tmp_path / "model-1.pt")
    assert trainer.model.config.sample_size == 8 and trainer.config.prediction_type == "epsilon"
    assert torch.allclose(trainer.scheduler.betas, peer.scheduler.betas)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.state_dict().values(), peer.unet.state_dict().values(),
                                                 strict=True))  # fmt: skip
    assert trainer.run().steps == 1
    card = (tmp_path / "b" / "pipeline" / "README.md").read_text()
    assert "weights of model-1.pt." in card and str(tmp_path) not in card
    (tmp_path / "model-2.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="model-2.pt"):
        Trainer(initialised(tmp_path / "model-2.pt", tmp_path / "c"))


@pytest.mark.slow
def test_two_processes_continue_a_run(source, tmp_path):
    """Two processes of four continue what one of eight began, and a folder that is in use is refused on both."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "training" / "train.py"]
    options = [f"--continue_from={source}", "--output_dir=b", "--max_train_steps=8", "--train_batch_size=4"]
    done = run_program(*launcher, *options, cwd=tmp_path, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0 and "the order of the data goes on" in done.stdout, done.stderr
    train(continued(source, tmp_path / "c", max_train_steps=8))
    two, one = weights(tmp_path / "b"), weights(tmp_path / "c")
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
    lock = RunLock(tmp_path / "b")
    assert lock.take() is None
    done = run_program(*launcher, *options, cwd=tmp_path, ACCELERATE_USE_CPU="1")
    lock.release()
    assert done.returncode != 0 and "is training in it" in done.stderr
