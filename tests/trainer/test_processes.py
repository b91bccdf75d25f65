"""Two processes give what one gives: the same losses, the same samples, from the same global batch (without dropout and
immiscible noise, which are each process's own)."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, run_program

from ddpm_hf import TrainConfig

TRAIN = ROOT / "training" / "train.py"
OPTIONS = [
    "--dataset_name=digits", "--max_train_steps=50", "--dim=8", "--dim_mults", "1", "2", "--logging_steps=1",
    "--ddpm_num_inference_steps=5", "--num_samples=5", "--report_to=none", "--lr_warmup_steps=5", "--random_flip",
    "--noise_offset=0.1", "--self_condition", "--num_cpu_threads=1", "--class_labels=label",
]  # fmt: skip


def launch(processes, *options, cwd):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = run_program(*launcher, TRAIN, *OPTIONS, *options, cwd=cwd, ACCELERATE_USE_CPU="1")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_two_processes_are_one(tmp_path):
    done = launch(2, "--train_batch_size=8", "--output_dir=two", cwd=tmp_path)
    assert done.stdout.count("from ddpm_hf import") == 1
    launch(1, "--train_batch_size=16", "--output_dir=one", cwd=tmp_path)
    launch(2, "--train_batch_size=4", "--gradient_accumulation_steps=2", "--output_dir=parts", cwd=tmp_path)
    one, two, parts = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two", "parts")
    )
    assert len(one) == 50
    np.testing.assert_allclose(two, one, rtol=1e-5)
    np.testing.assert_allclose(parts, one, rtol=1e-5)
    grids = [(tmp_path / run / "samples" / "step-000050.png").read_bytes() for run in ("one", "two")]
    assert grids[0] == grids[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_every_process_hears_why_the_folder_is_refused(tmp_path):
    """None of them waits for the others meanwhile, which would bury the message under that of a broken connection."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(TrainConfig(dataset_name="digits", seed=5).to_yaml())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = run_program(*launcher, TRAIN, *OPTIONS, "--output_dir=run", cwd=tmp_path, ACCELERATE_USE_CPU="1")
    assert done.returncode != 0 and done.stderr.count("run holds a run with other options") == 2
    assert "Traceback" not in done.stderr.split("holds a run")[0] and "Connection closed" not in done.stderr
