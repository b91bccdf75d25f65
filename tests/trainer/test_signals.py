"""Signals: SIGTERM and Ctrl-C save and stop; SIGKILL anywhere costs nothing but time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from random import Random

import psutil
import pytest
from conftest import ROOT, run_program
from helpers import SMALL, config, save_tars, state
from helpers import STREAMED as PICTURES

from ddpm_hf import DDPMPipeline, train
from ddpm_hf.trainer.loop import Trainer, TrainingError
from ddpm_hf.trainer.saving import Saver
from ddpm_hf.trainer.signals import StopRequest, drop_broken_output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_goes_on(number, tmp_path, monkeypatch):
    """In the middle of step 3 of 6, with checkpoints every 4."""
    options = {"max_train_steps": 6, "checkpointing_steps": 4, "logging_steps": 4}
    train(config(tmp_path / "whole", **options))
    step = Trainer._train_step

    def interrupted(self, batches):
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(TrainingError, match=f"stopped by {number.name} after step 3; its checkpoint is saved"):
        train(config(tmp_path / "parts", **options))
    monkeypatch.undo()
    assert (tmp_path / "parts" / "checkpoints" / "step-000003").is_dir()
    train(config(tmp_path / "parts", **options))
    assert state(tmp_path / "whole") == state(tmp_path / "parts")


LOOKED_AT = {
    "max_train_steps": 4, "save_samples_steps": 2, "num_samples": 4, "eval_batch_size": 2, "eval_steps": 2,
    "eval_num_samples": 4, "feature_network": "pixels", "holdout": 20, "checkpointing_steps": 3, "learning_rate": 1e-2,
    "logging_steps": 2,
}  # fmt: skip
# Batches of samples while a signal comes, of 4 a look: two of the picture, two of the evaluation.
AT_BATCH = {
    1: "step 2.*samples and the evaluation of that step", 2: "step 2.*with the evaluation",
    3: "step 2.*with the evaluation", 4: "step 2.*with the evaluation",  # 4: before its held-out loss
    5: "step 4.*samples and the evaluation", 8: "step 4.*with the evaluation",
}  # fmt: skip


def stopped_at_batch(number, monkeypatch, folder, **options):
    """Train, with SIGTERM within the batch of samples of this number; return how many batches were sampled."""
    sample, calls = DDPMPipeline.__call__, []

    def signalled(self, *arguments, **named):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(DDPMPipeline, "__call__", signalled)
        train(config(folder, **LOOKED_AT, **options))
    return len(calls)


def test_a_signal_stops_samples_and_evaluations_between_batches(tmp_path, monkeypatch):
    """What was not made is made first when the run goes on, and all files are those of the run that was not stopped."""
    cache = {"eval_cache_dir": str(tmp_path / "cache")}
    assert stopped_at_batch(0, monkeypatch, tmp_path / "whole", **cache) == 8
    for number, message in AT_BATCH.items():
        folder = tmp_path / str(number)
        with pytest.raises(TrainingError, match=f"stopped by SIGTERM after {message}"):
            stopped_at_batch(number, monkeypatch, folder, **cache)
        train(config(folder, **LOOKED_AT, **cache))
        assert_same_runs(tmp_path / "whole", folder)


def test_a_run_that_is_stopped_again_and_again_while_it_looks(tmp_path, monkeypatch):
    """Three stops at the same step, and a kill after the pending evaluation, before it is saved."""
    cache = {"eval_cache_dir": str(tmp_path / "cache")}
    stopped_at_batch(0, monkeypatch, tmp_path / "whole", **cache)
    for number in (2, 1, 2):  # in the last batch of the picture, in the first and the last of the evaluation
        with pytest.raises(TrainingError, match="stopped by SIGTERM after step 2.*with the evaluation"):
            stopped_at_batch(number, monkeypatch, tmp_path / "parts", **cache)
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "parts", **LOOKED_AT, **cache))
    train(config(tmp_path / "parts", **LOOKED_AT, **cache))
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def killed(*_):
    raise KeyboardInterrupt


def assert_same_runs(whole, parts):
    a, b = state(whole), state(parts)
    assert a.keys() == b.keys() and {name for name in a if a[name] != b[name]} == set()


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
               "--dim=8", "--dim_mults", "1", "2", "--logging_steps=1", "--report_to=none",
               "--num_cpu_threads=1"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    metrics = tmp_path / "run" / "metrics.jsonl"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as run:
        while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "error: stopped by SIGINT after step" in err and "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_repeated_sigterm_is_one_request(monkeypatch):
    """A scheduler signals every process, and torch's launcher then passes on its own signal; its Ctrl-C likewise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM" and stop.asked()
            with pytest.raises(KeyboardInterrupt):  # a person who does not want to wait
                os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == "SIGINT"
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_end_of_the_launcher_is_a_request(tmp_path, monkeypatch):
    """The parent is another than the launcher was; without a launcher it may be any."""
    options = {"max_train_steps": 3, "checkpointing_steps": 3}
    train(config(tmp_path / "whole", **options))
    monkeypatch.setattr("ddpm_hf.trainer.launcher.parent_launcher", lambda: os.getpid())
    with pytest.raises(TrainingError, match="stopped by the end of its launcher after step 1; its checkpoint is saved"):
        train(config(tmp_path / "parts", **options))
    monkeypatch.setattr("ddpm_hf.trainer.launcher.parent_launcher", os.getppid)
    train(config(tmp_path / "parts", **options))
    assert state(tmp_path / "whole") == state(tmp_path / "parts")
    assert not StopRequest(None).asked()


def test_output_whose_reader_has_ended(monkeypatch):
    """As of `train.py | tee log`, where the scheduler has ended the tee: printing goes on, to nowhere."""
    read, write = os.pipe()
    kept = os.dup(2)
    try:
        os.dup2(write, 2)
        os.close(write)
        drop_broken_output()
        os.write(2, b"heard")
        assert os.read(read, 9) == b"heard"
        os.close(read)
        with pytest.raises(BrokenPipeError):
            os.write(2, b"lost")
        drop_broken_output()
        os.write(2, b"lost")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


RUN = ["--dataset_name=digits", "--output_dir=run", "--dim=8", "--dim_mults", "1", "2", "--logging_steps=1",
       "--report_to=none", "--num_cpu_threads=1", "--train_batch_size=4", "--holdout=2"]  # fmt: skip


def stopped(launcher, how, folder):
    """(the launcher's exit status, its output) of a run that is ended at its first metrics; all its processes have
    ended. `how`: called with the launcher's process number."""
    command = [*launcher, str(ROOT / "training" / "train.py"), *RUN]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    metrics, log = folder / "run" / "metrics.jsonl", folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=file, start_new_session=True) as run,
    ):
        family = []
        try:
            while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
                time.sleep(0.05)
            family = psutil.Process(run.pid).children(recursive=True)
            how(run.pid)
            status = run.wait(timeout=60)
            assert psutil.wait_procs(family, timeout=60)[1] == [], log.read_text()
        finally:
            for process in [*family, run]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    return status, log.read_text()


def terminate(number):
    os.kill(number, signal.SIGTERM)


def terminate_group(number):
    os.killpg(number, signal.SIGTERM)


def kill(number):
    os.kill(number, signal.SIGKILL)


def terminate_trainer(number):
    psutil.Process(number).children()[0].terminate()


PYTHON, ACCELERATE = [sys.executable], [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
TEE = ["bash", "-c", '"$0" "$@" 2>&1 | tee tee.log', sys.executable]
CONTAINER = ["unshare", "-Urpf", "--mount-proc"]
# docs/clusters.md has the statuses
ENDED = {
    "accelerate": (ACCELERATE, terminate, -signal.SIGTERM, "the end of its launcher"),
    "torchrun, its group": (TORCHRUN, terminate_group, 1, "SIGTERM"),  # as Slurm does
    "python, its group": (PYTHON, terminate_group, 2, "SIGTERM"),
    "accelerate, its group": (ACCELERATE, terminate_group, -signal.SIGTERM, "SIGTERM"),
    "accelerate, the trainer": (ACCELERATE, terminate_trainer, 1, "SIGTERM"),
    "accelerate, killed": (ACCELERATE, kill, -signal.SIGKILL, "the end of its launcher"),
    "torchrun": (TORCHRUN, terminate, 1, "SIGTERM"),
    "torchrun, killed": (TORCHRUN, kill, -signal.SIGKILL, "the end of its launcher"),
    "a tee behind it": (TEE, terminate_group, -signal.SIGTERM, None),
}
QUICK = ("accelerate", "torchrun, its group")


@pytest.mark.skipif(sys.platform != "linux", reason="process groups and orphans are tested on Linux")
@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENDED]
)
def test_how_jobs_are_ended(case, tmp_path):
    """A checkpoint of the step it was in, no process that runs on, and the launcher's exit status."""
    launcher, how, status, reason = ENDED[case]
    found, log = stopped(launcher, how, tmp_path)
    assert found == status, log
    assert reason is None or f"error: stopped by {reason} after step" in log
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert saved.name == f"step-{step:06d}" and step < 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs PID namespaces")
@pytest.mark.parametrize(
    ("launcher", "status", "saves"), [(PYTHON, 2, True), (TORCHRUN, 1, True), (ACCELERATE, 1, False)]
)
def test_how_containers_are_ended(launcher, status, saves, tmp_path):
    """SIGTERM to the first process alone, SIGKILL after the grace time, as Kubernetes does. accelerate's launcher of
    one process does not hear SIGTERM there, which the run says at its start."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("PID namespaces are not allowed here")

    def end(number):
        first = psutil.Process(number).children()[0]
        first.terminate()
        if psutil.wait_procs([first], timeout=30 if saves else 5)[1]:
            first.kill()

    found, log = stopped([*CONTAINER, *launcher], end, tmp_path)
    assert (found, (tmp_path / "run" / "checkpoints").exists()) == (status, saves), log
    assert ("will not hear of its stop" in log) == (not saves)


# Kills itself, the hard way, at the place named by its first argument.
KILLED = """
import accelerate, os, signal, sys, json
from ddpm_hf import TrainConfig, train
from ddpm_hf.run import checkpoint
from ddpm_hf.trainer import batches, looking
from ddpm_hf.trainer import loop as trainer

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
    batches.Batches.__next__ = after(batches.Batches.__next__, 4)
elif place == "between best and checkpoint":
    looking.Looks.evaluate = after(looking.Looks.evaluate, 1)
elif place == "while a checkpoint is written":
    accelerate.Accelerator.save_state = after(accelerate.Accelerator.save_state, 1)
elif place == "before a checkpoint has its name":
    checkpoint.finish = die
elif place == "between checkpoint and rotation":
    checkpoint.list_checkpoints = die
elif place == "between the names of the pipeline":
    replace = os.replace
    def first_name_only(source, target):
        replace(source, target)
        if str(source).endswith("pipeline"):
            die()
    checkpoint.os.replace = first_name_only
elif place == "in a line of metrics":
    checkpoint.MetricsFile.append = half_a_line
elif place == "after the samples":
    looking.Looks.save_samples = after(looking.Looks.save_samples, 1)
train(TrainConfig(**json.loads(sys.argv[2])))
"""
# A process for each (place, options), forked where the imports are done and nothing has been computed: they take longer
# than the runs. Prints the statuses.
FORKED = """
import json, os, sys, traceback
from ddpm_hf import TrainConfig, train
from ddpm_hf.run import checkpoint
from ddpm_hf.trainer import loop as trainer
code, calls = sys.argv[1], json.loads(sys.argv[2])
statuses = []
for place, options in calls:
    child = os.fork()
    if child == 0:
        sys.argv, status = ["", place, json.dumps(options)], 1
        try:
            exec(code)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
PLACES = [
    "in a step", "between best and checkpoint", "while a checkpoint is written", "in a line of metrics",
    "before a checkpoint has its name", "between the names of the pipeline", "after the samples", "nowhere",
]  # fmt: skip


@pytest.mark.slow
def test_killed_at_many_places(tmp_path):
    """One run that is killed seven times, at another place each, and started again: the bits of the run left alone."""
    options = {**SMALL, "dataset_name": "digits", "max_train_steps": 8, "logging_steps": 3, "random_flip": True}
    options.update(eval_steps=1, eval_num_samples=4, feature_network="pixels", holdout=20, learning_rate=1e-2)
    options.update(eval_cache_dir=str(tmp_path / "cache"))
    options.update(checkpointing_steps=2, save_samples_steps=2, checkpoints_total_limit=2)
    calls = [(place, {**options, "output_dir": str(tmp_path / "parts")}) for place in PLACES]
    calls.append(("nowhere", {**options, "output_dir": str(tmp_path / "whole")}))
    done = run_program("-c", FORKED, KILLED, json.dumps(calls), cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL] * 7 + [0, 0], done.stderr
    assert_same(tmp_path)


def assert_same(folder):
    """The run in parts/ has left the bits of the one in whole/."""
    assert_same_runs(folder / "whole", folder / "parts")


STREAMED = {
    **SMALL, "train_data_dir": "tars", "streaming": True, "shuffle_buffer": 20, "resolution": [8], "random_flip": True,
    "image_channels": 1, "train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2,
    "max_train_steps": 8, "logging_steps": 3, "checkpointing_steps": 3, "num_cpu_threads": 1,
}  # fmt: skip


def on_two_processes(place, options, folder):
    (folder / "killed.py").write_text(KILLED)
    return run_program(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "killed.py", place, json.dumps(options),
        cwd=folder, ACCELERATE_USE_CPU="1",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_two_processes_with_workers_killed_in_a_stream(tmp_path):
    """In the middle of an accumulated step and of a save, on two processes of two workers each, with streamed data."""
    save_tars(tmp_path / "tars", PICTURES, per_tar=4)
    options = {**STREAMED, "checkpointing_steps": 1}
    parts = {**options, "output_dir": "parts"}
    for place in ("in the middle of an accumulated step", "before a checkpoint has its name"):
        assert on_two_processes(place, parts, tmp_path).returncode != 0
    done = on_two_processes("nowhere", parts, tmp_path)
    assert done.returncode == 0, done.stderr
    assert on_two_processes("nowhere", {**options, "output_dir": "whole"}, tmp_path).returncode == 0
    assert_same(tmp_path)


# SIGTERM to the second process alone, in its first batch of samples or, given a number, in that one.
SIGNALLED = """
import json, os, signal, sys
from ddpm_hf import DDPMPipeline, TrainConfig, train
sample, number = DDPMPipeline.__call__, int(sys.argv[1])
def signalled(self, *arguments, **named):
    global number
    number -= 1
    if number == 0 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return sample(self, *arguments, **named)
DDPMPipeline.__call__ = signalled
train(TrainConfig(**json.loads(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_two_processes_stop_between_the_same_batches(tmp_path):
    """They sample different numbers of batches: three and two of the picture, two and two of the evaluation."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    options = {**SMALL, **LOOKED_AT, "dataset_name": "digits", "num_samples": 5, "eval_batch_size": 1}

    def start(number, name):
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "signalled.py", str(number)]
        return run_program(
            *launcher, json.dumps({**options, "output_dir": name, "eval_cache_dir": "cache"}), cwd=tmp_path,
            ACCELERATE_USE_CPU="1",
        )  # fmt: skip

    assert start(0, "whole").returncode == 0
    for number, message in ((1, "with the samples and the evaluation"), (3, "with the evaluation")):
        done = start(number, "parts")
        assert done.returncode != 0 and message in done.stderr, done.stderr
    done = start(0, "parts")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path)


EVALUATED = {
    **SMALL, "dataset_name": "digits", "random_flip": True, "logging_steps": 3, "checkpointing_steps": 5,
    "save_samples_steps": 7, "max_train_steps": 150, "eval_steps": 6, "eval_num_samples": 8,
    "feature_network": "pixels", "holdout": 20, "learning_rate": 1e-2, "num_cpu_threads": 1, "eval_cache_dir": "cache",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, {**EVALUATED, "gradient_accumulation_steps": 2}),
        (1, {**STREAMED, "max_train_steps": 150}),
        (2, {**EVALUATED, "dataloader_num_workers": 2, "train_batch_size": 4}),
    ],
)
def test_killed_at_random_instants(processes, options, tmp_path):
    """Ten times each, all processes at once, up to two seconds after the run shows signs of life."""
    save_tars(tmp_path / "tars", PICTURES, per_tar=4)
    (tmp_path / "killed.py").write_text(KILLED)
    random, kills = Random(processes), 0
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"] if processes == 2 else []

    def command(name):
        return [sys.executable, *launcher, "killed.py", "nowhere", json.dumps({**options, "output_dir": name})]

    while kills < 10:
        errors = tmp_path / "errors"
        with (
            errors.open("w") as err,
            subprocess.Popen(command("parts"), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=err) as run,
        ):
            run.stdout.readline()  # what the program prints when it begins
            time.sleep(random.uniform(0, 2))
            if run.poll() is None:
                family = psutil.Process(run.pid)
                for process in [*family.children(recursive=True), family]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                kills += 1
            else:  # it had ended: begin again, so that every kill is of a run at work
                assert run.returncode == 0, errors.read_text()
                shutil.rmtree(tmp_path / "parts")
    for name in ("parts", "whole"):
        done = subprocess.run(command(name), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path)


STANDS = {
    "srun": "exec bash -c \"trap 'exit $ENDS' TERM; touch started; for i in {1..100}; do sleep 0.1; done; exit 0\"",
    "scontrol": 'echo "$@" > requeued',
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("ends", "signalled", "requeued"), [(2, True, True), (0, True, False), (2, False, False)])
def test_the_job_script_that_submits_itself_again(ends, signalled, requeued, tmp_path):
    """The script of docs/clusters.md, with stand-ins for Slurm's programs: back into the queue where the time was up
    and the step has not ended well."""
    script = (ROOT / "docs" / "clusters.md").read_text().split("```bash\n")[1].split("```")[0]
    (tmp_path / "job.sh").write_text(script)
    for name, text in STANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "ENDS": str(ends)}
    with subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env, start_new_session=True) as job:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        if signalled:
            job.send_signal(signal.SIGUSR1)
        else:  # it fails by itself
            psutil.Process(job.pid).children()[0].terminate()
        assert job.wait(timeout=30) == ends
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"
