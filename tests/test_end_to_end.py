"""What a user does, by the real programs: train, load in a fresh process, sample."""

import json

import numpy as np
import pytest
from conftest import ROOT, load_program, run_program

TRAIN = ROOT / "training" / "train.py"
SHORT = [
    "--dim=16", "--max_train_steps=120", "--lr_warmup_steps=5", "--learning_rate=2e-3", "--train_batch_size=16",
    "--logging_steps=10", "--num_samples=4", "--ddpm_num_inference_steps=5", "--report_to=none",
    "--num_cpu_threads=1",
]  # fmt: skip
SAMPLE = """
import sys, hashlib, numpy as np, torch, ddpm_hf
pipe = getattr(ddpm_hf, sys.argv[1]).from_pretrained(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
assert np.isfinite(out).all()
print(out.shape, hashlib.sha256(out.tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    "config,name,shape", [("digits", "DDPMPipeline", (2, 8, 8, 1)), ("ecg", "DDPMPipeline1D", (2, 1, 64))]
)
def test_train_load_and_sample(config, name, shape, tmp_path):
    own = {"digits": [f"--eval_cache_dir={tmp_path}/cache"], "ecg": ["--sequence_length=64", "--dim_mults", "1", "2"]}
    extra = ["--eval_num_samples=32", *own[config]]
    file = ROOT / "training" / "configs" / f"{config}.yaml"
    done = run_program(
        "-m", "accelerate.commands.launch", "--cpu", TRAIN, f"--config={file}", *SHORT, *extra, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / config
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert records[-1]["step"] == 120 and records[-1]["eval/num_samples"] == 32
    assert losses[-1] < 0.8 * losses[0]
    assert "loss" in done.stderr and "step/s" in done.stderr
    assert (folder / "samples" / "step-000120.png").exists()

    # the last three lines printed are a program that loads and samples
    lines = done.stdout.strip().splitlines()[-3:]
    printed = "\n".join(lines).replace("batch_size=16", "batch_size=1") + "\n"
    first, second = (
        run_program("-c", code, name, folder / "pipeline", cwd=tmp_path) for code in (printed + SAMPLE, SAMPLE)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.startswith(str(shape))


def test_errors_are_one_clear_line(tmp_path, monkeypatch, capsys):
    """The first in a process of its own; the others by its main function, without the time that imports take."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "nan.npy", np.full((4, 1, 8), np.nan))
    for arguments, message in [
        (["--train_data_dir=empty"], "no images found in empty"),
        (["--train_data_file=nan.npy"], "rows 0, 1, 2, 3"),
        (["--norm=batch"], "norm must be one of rms, group, got 'batch'"),
    ]:
        if message.startswith("no images"):
            done = run_program(TRAIN, *arguments, cwd=tmp_path)
            status, said = done.returncode, done.stderr
        else:
            status, said = load_program("train").main(arguments), capsys.readouterr().err
        assert status == 2 and message in said and "Traceback" not in said
        assert not (tmp_path / "runs").exists()
