"""Signals: SIGTERM and Ctrl-C save and stop; SIGKILL anywhere costs nothing but time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_program
from test_trainer import SMALL, config, state

from ddpm_hf import train
from ddpm_hf.interrupt import StopRequest
from ddpm_hf.trainer import Trainer, TrainingError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_goes_on(number, tmp_path, monkeypatch):
    """In the middle of step 3 of 6, with checkpoints every 4."""
    options = {"max_train_steps": 6, "checkpointing_steps": 4, "logging_steps": 4}
    train(config(tmp_path / "whole", **options))
    step = Trainer._train_step

    def interrupted(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(TrainingError, match=f"stopped by {number.name} after step 3; its checkpoint is saved"):
        train(config(tmp_path / "parts", **options))
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoints" / "step-000003").is_dir()
    train(config(tmp_path / "parts", **options))
    assert state(tmp_path / "whole") == state(tmp_path / "parts")


def test_a_second_signal_acts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts behind it
    try:
        second_signal()
    finally:
        signal.signal(signal.SIGINT, before)


def second_signal():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_program_ends_with_a_message_and_a_status(tmp_path):
    """Ctrl-C to the real program, once its first metrics are there."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--dataset_name=digits", "--output_dir=run",
               "--dim=8", "--dim_mults", "1", "2", "--logging_steps=1", "--report_to=none"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as run:
        while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "error: stopped by SIGINT after step" in err and "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


# Kills itself, the hard way, at the place named by its first argument.
KILLED = """
import os, signal, sys, json
from ddpm_hf import TrainConfig, checkpoint, train, trainer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_line(self, record):
    with open(self.path, "a") as file:
        file.write(json.dumps(record)[:20])
        file.flush()
    die()

def after(function, count):
    calls = []
    def wrapped(*a, **k):
        result = function(*a, **k)
        calls.append(1)
        if len(calls) == count:
            die()
        return result
    return wrapped

place = sys.argv[1]
if place == "in a step":
    trainer.Trainer._train_step = after(trainer.Trainer._train_step, 2)
elif place == "in the middle of an accumulated step":
    trainer.Trainer._next_batch = after(trainer.Trainer._next_batch, 4)
elif place == "between best and checkpoint":
    trainer.Trainer._evaluate = after(trainer.Trainer._evaluate, 1)
elif place == "while a checkpoint is written":
    trainer.Accelerator.save_state = after(trainer.Accelerator.save_state, 1)
elif place == "before a checkpoint has its name":
    checkpoint.finish = die
elif place == "between checkpoint and rotation":
    checkpoint.list_checkpoints = die
elif place == "between the names of the pipeline":
    checkpoint.os.replace = after(os.replace, 3)
elif place == "in a line of metrics":
    checkpoint.MetricsFile.append = half_a_line
elif place == "after the samples":
    trainer.Trainer._save_samples = after(trainer.Trainer._save_samples, 1)
train(TrainConfig(**json.loads(sys.argv[2])))
"""
PLACES = ["in a step", "between best and checkpoint", "while a checkpoint is written", "in a line of metrics", "before a checkpoint has its name",
          "between the names of the pipeline", "after the samples", "nowhere"]  # fmt: skip


def test_killed_at_many_places(tmp_path):
    """One run that is killed seven times, at another place each, and started again: the bits of the run left alone."""
    options = {**SMALL, "dataset_name": "digits", "max_train_steps": 8, "logging_steps": 3, "random_flip": True}
    options.update(eval_steps=1, eval_num_samples=4, feature_network="pixels", holdout=20, learning_rate=1e-2)
    options.update(eval_cache_dir=str(tmp_path / "cache"))
    options.update(checkpointing_steps=2, save_samples_steps=2, checkpoints_total_limit=2, num_cpu_threads=2)
    statuses = []
    for place in PLACES:
        text = json.dumps({**options, "output_dir": str(tmp_path / "parts")})
        done = run_program("-c", KILLED, place, text, cwd=tmp_path)
        statuses.append(done.returncode)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert statuses == [-signal.SIGKILL] * 7 + [0]
    text = json.dumps({**options, "output_dir": str(tmp_path / "whole")})
    assert run_program("-c", KILLED, "nowhere", text, cwd=tmp_path).returncode == 0
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, content in whole.items():
        assert parts[name] == content, name
