"""Memory-mapped files: which ones there are, and that a change ends the run with its reason before it does harm."""

import os

import numpy as np
import pytest
from helpers import PICTURES, config, state, table

from ddpm_hf import TrainConfig, train
from ddpm_hf.data import open_data
from ddpm_hf.data.images import ImageDataset, digits
from ddpm_hf.data.mapped import MappedFiles, mapped_files
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.trainer.loop import Trainer, TrainingError


def test_what_is_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(8, 40)))
    np.save(tmp_path / "pictures.npy", np.zeros((8, 6, 6), np.uint8))
    saved = tmp_path / "saved"
    table().save_to_disk(str(saved), num_shards=2)
    arrow = sorted(map(str, saved.glob("*.arrow")))
    file = str(tmp_path / "x.npy")
    windows = build_dataset(TrainConfig(train_data_file=file, sequence_length=8, stride=2))
    pictures = ImageDataset(list(np.load(tmp_path / "pictures.npy", mmap_mode="r")), (6, 6), 1)
    assert mapped_files(windows) == mapped_files(windows.hold_out(2, 0)[0]) == [file]
    with_gaps = build_dataset(TrainConfig(train_data_file=file, on_missing="drop"))
    assert mapped_files(with_gaps) == [file]
    assert mapped_files(SequenceDataset(np.load(file, mmap_mode="r")[2:])) == [file]
    assert mapped_files(pictures) == [str(tmp_path / "pictures.npy")]
    assert mapped_files(build_dataset(TrainConfig(train_data_dir=str(saved)))) == arrow and len(arrow) == 2
    np.save(tmp_path / "y.npy", np.zeros((8, 20)))
    paired = build_dataset(TrainConfig(train_data_file=file, condition_column=str(tmp_path / "y.npy")))
    assert mapped_files(paired) == [file, str(tmp_path / "y.npy")]
    given = np.load(tmp_path / "pictures.npy", mmap_mode="r")
    assert open_data(TrainConfig(image_range=(0, 255)), given).files.paths == [str(tmp_path / "pictures.npy")]
    assert mapped_files(digits()) == mapped_files([1, 2]) == mapped_files(PICTURES) == []
    options = {"train_data_dir": str(saved), "resolution": [6]}
    for streaming in (False, True):
        assert open_data(TrainConfig(streaming=streaming, **options)).files.paths == arrow


def test_every_change_is_told(tmp_path):
    (tmp_path / "x").write_bytes(b"1234")
    files = MappedFiles([str(tmp_path / "x")])
    assert files.changed() is None
    os.utime(tmp_path / "x", ns=(0, 0))
    assert files.changed() == "x (written to at another time)"
    (tmp_path / "x").write_bytes(b"12345")
    assert files.changed() == "x (4 bytes before, 5 now)"
    (tmp_path / "x").unlink()
    assert files.changed() == "x (it is gone)"
    assert files.differing([None, None]) is None


def test_a_run_whose_data_is_cut_ends_with_the_reason(tmp_path, monkeypatch):
    """Before the data is read again for a checkpoint or a picture; when it is restored the run goes on."""
    file = tmp_path / "x.npy"
    np.save(file, np.random.default_rng(0).normal(size=(16, 1024)).astype(np.float32))
    content, times = file.read_bytes(), os.stat(file)
    options = {"dataset_name": None, "train_data_file": str(file), "sequence_length": 32, "checkpointing_steps": 2}
    options.update(max_train_steps=4)
    step = Trainer._train_step

    def changing(self, batches):
        result = step(self, batches)
        if self.progress.step == 3:  # after the fourth step
            os.truncate(file, 4096)
        return result

    monkeypatch.setattr(Trainer, "_train_step", changing)
    reason = r"step 4: the data was written to.*x.npy \(65,664 bytes before, 4,096 now\).*step-000002"
    with pytest.raises(TrainingError, match=reason):
        train(config(tmp_path / "run", **options))
    monkeypatch.undo()
    file.write_bytes(content)
    os.utime(file, ns=(0, times.st_mtime_ns))
    train(config(tmp_path / "run", **options))
    train(config(tmp_path / "whole", **options))
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_resuming_says_that_the_data_was_written_to(tmp_path, capsys):
    """A copy of the same content goes on, with a note; another content does not."""
    file = tmp_path / "x.npy"
    array = np.random.default_rng(0).normal(size=(16, 32))
    np.save(file, array)
    options = {"dataset_name": None, "train_data_file": str(file)}
    train(config(tmp_path / "run", max_train_steps=1, **options))
    assert "note:" not in capsys.readouterr().out
    os.utime(file, ns=(0, 0))
    train(config(tmp_path / "run", max_train_steps=2, **options))
    assert "note: since the checkpoint of step 1 the data was written to: x.npy (written to" in capsys.readouterr().out
    np.save(file, array * 2)
    with pytest.raises(ValueError, match="is not that of the run"):
        train(config(tmp_path / "run", max_train_steps=3, **options))


def test_a_file_that_is_written_to_at_the_start(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(16, 32)))
    data = build_dataset(TrainConfig(train_data_file=str(tmp_path / "x.npy")))
    held_out = SequenceDataset.hold_out

    def meanwhile(self, *arguments):
        os.utime(tmp_path / "x.npy", ns=(0, 0))
        return held_out(self, *arguments)

    monkeypatch.setattr(SequenceDataset, "hold_out", meanwhile)
    with pytest.raises(ValueError, match="written to while it is read: x.npy"):
        open_data(TrainConfig(holdout=2), data)
