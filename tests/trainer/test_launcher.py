"""Launchers: which one started a process, and starts that are not what accelerate's configuration asks for."""

import os
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, run_program
from helpers import config

from ddpm_hf import train
from ddpm_hf.trainer import launcher

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x"}
PARENTS = [
    # environment, the parent's command line, whether it is a launcher
    ({}, ["python", "/bin/accelerate", "launch", "train.py"], False),
    (ACCELERATE, ["python", "/bin/accelerate", "launch", "train.py"], True),
    (ACCELERATE, ["python", "-m", "accelerate.commands.launch", "--cpu", "train.py"], True),
    ({**ACCELERATE, **TORCHRUN}, ["/bin/accelerate-launch", "--multi_gpu", "train.py"], True),
    (TORCHRUN, ["python", "/bin/torchrun", "--nproc_per_node=2", "train.py"], True),
    (TORCHRUN, ["python", "-u", "-m", "torch.distributed.run", "train.py"], True),
    # what a launched shell starts in the background has the environment too
    (ACCELERATE, ["bash", "run-in-the-background.sh"], False),
    (ACCELERATE, ["python", "mine.py", "x", "y", "accelerate"], False),
    (TORCHRUN, [], False),
]


def as_started(monkeypatch, environment, command, parent=None):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "_parent_command", lambda: command)
    monkeypatch.setattr(launcher, "first_parent", os.getppid() if parent is None else parent)


@pytest.mark.parametrize(("environment", "command", "launched"), PARENTS)
def test_the_launcher_is_known(environment, command, launched, monkeypatch):
    as_started(monkeypatch, environment, command)
    assert launcher.parent_launcher() == (os.getppid() if launched else None)


def test_a_launcher_that_ended_during_the_imports(monkeypatch):
    as_started(monkeypatch, ACCELERATE, ["systemd"], parent=99999999)
    assert launcher.parent_launcher() == 99999999
    as_started(monkeypatch, {}, ["systemd"], parent=99999999)  # a shell's nohup
    assert launcher.parent_launcher() is None


@pytest.mark.parametrize(
    ("environment", "processes", "threads"),
    [
        ({}, 1, 8), ({}, 2, 4), ({}, 16, 1), ({"OMP_NUM_THREADS": "1"}, 1, 1), ({"OMP_NUM_THREADS": "3"}, 2, 3),
        # a launcher sets it to 1 by itself, and to nothing else
        ({**ACCELERATE, "OMP_NUM_THREADS": "1"}, 1, 8), ({**TORCHRUN, "OMP_NUM_THREADS": "1"}, 2, 4),
        ({**ACCELERATE, "OMP_NUM_THREADS": "3"}, 1, 3), ({"OMP_NUM_THREADS": "4,2"}, 1, 8),
    ],
)  # fmt: skip
def test_threads_are_those_that_the_user_asks_for(environment, processes, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    as_started(monkeypatch, environment, [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert launcher.threads(processes) == threads


def test_the_first_process_of_a_container_is_warned_of(monkeypatch):
    command = ["python", "/bin/accelerate", "launch", "train.py"]
    as_started(monkeypatch, ACCELERATE, command, parent=1)
    assert "will not hear of its stop" in launcher.start_warning()
    as_started(monkeypatch, {**ACCELERATE, **TORCHRUN}, command, parent=1)
    assert launcher.start_warning() is None


def test_how_many_processes_were_asked_for(tmp_path, monkeypatch):
    file = tmp_path / "two.yaml"
    options = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2,
               "mixed_precision": "no", "use_cpu": True}  # fmt: skip
    file.write_text(yaml.safe_dump(options))
    begin = ["python", "/bin/accelerate", "launch"]
    for arguments, count in [
        ([f"--config_file={file}"], 2),
        ([f"--config_file={file}", "--num_processes=3"], 3),
        (["--cpu", "--num_processes", "2"], 2),
        (["--cpu"], 1),
    ]:
        as_started(monkeypatch, ACCELERATE, [*begin, *arguments, "train.py", "--num_processes=7"])
        assert launcher.asked_processes() == count
    as_started(monkeypatch, TORCHRUN, ["torchrun", "--nproc_per_node=4", "train.py"])
    assert launcher.asked_processes() == 1  # torchrun starts as many as it says


@pytest.mark.parametrize("variable", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_kinds_that_cannot_train_here(variable, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    started = SimpleNamespace(
        device=SimpleNamespace(type="cpu"), num_processes=1, distributed_type="NO", mixed_precision="no"
    )
    with pytest.raises(ValueError) as caught:
        launcher.check_started(started)
    assert str(caught.value).lower().replace("-", "_").startswith(f"accelerate is configured for {variable.lower()},")
    assert "distributed_type: MULTI_GPU" in str(caught.value)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("asked", ["option", "accelerate"])
def test_fp16_on_cpu_is_refused(asked, dry_run, tmp_path, monkeypatch):
    """There accelerate trains in float32, to the bit."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = {"mixed_precision": "fp16"} if asked == "option" else {}
    if asked == "accelerate":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision must be 'bf16' or 'no' on CPU.*got 'fp16'"):
        train(config(tmp_path / "run", max_train_steps=1, dry_run=dry_run, **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_configuration_of_several_cpu_processes(tmp_path):
    """accelerate's launcher starts one, by the real program."""
    file = tmp_path / "two.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\n"
                    "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n")  # fmt: skip
    done = run_program(
        "-m", "accelerate.commands.launch", f"--config_file={file}", ROOT / "training" / "train.py",
        "--dataset_name=digits", "--dim=8", "--dim_mults", "1", "2", "--max_train_steps=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()
    assert "error: accelerate's launcher was asked for 2 processes and has started 1" in done.stderr
    assert "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2" in done.stderr


@pytest.mark.parametrize(("variable", "kind"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_a_kind_whose_package_is_missing(variable, kind, monkeypatch):
    def missing(**options):
        raise ImportError(f"{kind} is not installed.")

    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    monkeypatch.setattr(launcher, "Accelerator", missing)
    with pytest.raises(
        ValueError, match=f"configured for {kind}, which cannot train here: {kind} is not installed; or"
    ):
        launcher.start()
