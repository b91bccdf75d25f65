"""The batches of a run: data that stays on the device gives the run that data of the host gives."""

import pytest
import torch
from helpers import config, state

from ddpm_hf import train
from ddpm_hf.trainer import batches


@pytest.fixture
def roomy(monkeypatch):
    """A device on which data may stay: the CPU."""
    monkeypatch.setattr(batches, "room_for_data", lambda device: 1 << 30)
    monkeypatch.setattr("ddpm_hf.data.feed.LEAST_EPOCHS", 0)


OPTIONS = {
    "random_flip": True, "class_labels": "label", "holdout": 100, "train_batch_size": 16, "dropout": 0.1,
    "gradient_accumulation_steps": 2, "max_train_steps": 8, "save_samples_steps": 8,
}  # fmt: skip


def test_a_run_is_the_same_bit_for_bit(tmp_path, capsys, roomy, monkeypatch):
    train(config(tmp_path / "device", **OPTIONS))
    assert "the data stays on cpu, where batches are gathered: 0.1 MB" in capsys.readouterr().out
    monkeypatch.undo()
    train(config(tmp_path / "host", **OPTIONS))
    assert "the data stays" not in capsys.readouterr().out
    ours, theirs = state(tmp_path / "device"), state(tmp_path / "host")
    assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours)


def test_a_run_may_change_places_when_it_is_resumed(tmp_path, roomy, monkeypatch):
    options = {"dataset_name": "ecg", "sequence_length": 16, "max_train_steps": 6, "save_samples_steps": 6}
    train(config(tmp_path / "mixed", **{**options, "max_train_steps": 3}))
    monkeypatch.undo()
    train(config(tmp_path / "mixed", **options))
    train(config(tmp_path / "host", **options))
    ours, theirs = state(tmp_path / "mixed"), state(tmp_path / "host")
    for name in ("pipeline/unet/diffusion_pytorch_model.safetensors", "samples/step-000006.npy"):
        assert ours[name] == theirs[name]


def test_data_that_finds_no_memory_is_read_by_the_host(tmp_path, capsys, roomy, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("ddpm_hf.data.feed.make_resident", full)
    done = train(config(tmp_path, dataset_name="ecg", sequence_length=16, max_train_steps=2))
    assert done.steps == 2
    expected = "the data does not stay on cpu, and is copied batch by batch: OutOfMemoryError: CUDA out of memory.\n"
    assert expected in capsys.readouterr().out
