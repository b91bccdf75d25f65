"""A dry run names every item that cannot be used; workers without enough shared memory are refused."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import STREAMED as PICTURES
from helpers import config, gradient, save_tars, table
from PIL import Image

from ddpm_hf import train
from ddpm_hf.data import checking, feed
from ddpm_hf.data.checking import check_shared_memory, worker_memory
from ddpm_hf.trainer.build import make_evaluator
from ddpm_hf.trainer.loop import Trainer


@pytest.fixture
def folder(tmp_path):
    """Six pictures, of which the first and the fifth are damaged."""
    path = tmp_path / "photos"
    path.mkdir()
    for name in "abcdef":
        Image.fromarray(gradient()).save(path / f"{name}.png")
    for name in "ae":
        whole = (path / f"{name}.png").read_bytes()
        (path / f"{name}.png").write_bytes(whole[: len(whole) // 2])
    return path


def dry_run(tmp_path, dataset=None, **options):
    own = {"dataset_name": None, "dry_run": True, "train_batch_size": 2}
    return train(config(tmp_path / "run", **{**own, **options}), dataset=dataset)


def named(capsys):
    """The lines that begin as the messages of items do."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(("cannot read the image", "item "))]


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"holdout": 2}], ids=["", "workers", "holdout"])
def test_a_dry_run_lists_every_damaged_picture(options, folder, tmp_path, capsys):
    options = {"train_data_dir": str(folder), "resolution": [8], **options}
    with pytest.raises(ValueError, match="2 of the 6 images, listed above.*--on_bad_image skip"):
        dry_run(tmp_path, **options)
    lines = sorted(named(capsys))
    assert len(lines) == 2 and "a.png" in lines[0] and "e.png" in lines[1]

    assert dry_run(tmp_path, on_bad_image="skip", **options) is None
    out = capsys.readouterr().out
    assert "a.png" in out and "e.png" in out and "2 of the 6 images cannot be read and will be left out" in out
    assert not (tmp_path / "run").exists()


def test_other_processes_leave_the_list_to_the_main_one(folder, tmp_path, capsys, monkeypatch):
    """A launcher ends all processes when one of them fails."""
    monkeypatch.setattr(feed, "Accelerator", lambda: SimpleNamespace(is_main_process=False))
    with pytest.raises(SystemExit) as ended:
        dry_run(tmp_path, train_data_dir=str(folder), resolution=[8])
    assert ended.value.code == 0 and not named(capsys)


def test_nothing_to_train_on(folder, tmp_path, capsys):
    for name in "bcdf":
        (folder / f"{name}.png").write_bytes(b"")
    for choice in ("stop", "skip"):
        with pytest.raises(ValueError, match="none of the 6 images can be read"):
            dry_run(tmp_path, train_data_dir=str(folder), resolution=[8], on_bad_image=choice)
        assert len(named(capsys)) == 6


def test_a_folder_without_faults(folder, tmp_path, capsys, monkeypatch):
    """Many pictures are read by a worker for each core."""
    monkeypatch.setattr(checking, "SMALL", 3)
    for name in "ae":
        Image.fromarray(gradient()).save(folder / f"{name}.png")
    dry_run(tmp_path, train_data_dir=str(folder), resolution=[8])
    assert "all 6 items can be read" in capsys.readouterr().out
    many = checking.ImageDataset([gradient()] * 4, (8, 8))
    given = SimpleNamespace(dataloader_num_workers=0)
    if sys.platform == "linux":
        assert checking._workers(many, given)[0] >= 1
        monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
        assert checking._workers(many, given)[0] == 0
    assert checking._workers([1] * 4, given)[0] == 0


class Given(torch.utils.data.Dataset):
    """Someone's own data set; some items are an error, of another shape or out of range."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in (0, 5):
            raise KeyError(f"row {index}")
        return torch.full((1, 8, 16 if index in (3, 6) else 8), 3.0 if index == 7 else 0.0)


def test_a_data_set_from_python(tmp_path, capsys):
    with pytest.raises(ValueError, match="4 of the 8 items of the data, listed above, cannot be used"):
        dry_run(tmp_path, dataset=Given(), holdout=2)
    lines = sorted(named(capsys))
    assert {0, 5, 7} < {int(line.split()[1]) for line in lines}
    assert "KeyError: 'row 0'" in lines[0] and "[-1, 1]" in lines[3]
    shapes = [line for line in lines if "has the shape" in line]
    assert len(shapes) == 1 and "(1, 8, 8)" in shapes[0] and "(1, 8, 16)" in shapes[0]


def test_tables_streams_and_sequences(tmp_path, capsys):
    rows = [{"bytes": b"no", "path": None}, {"bytes": b"", "path": None}]
    broken = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    datasets.concatenate_datasets([table(PICTURES[:3]), broken]).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(ValueError, match="2 of the 5 images"):
        dry_run(tmp_path, train_data_dir=str(tmp_path / "table"), resolution=[8])
    lines = named(capsys)
    assert len(lines) == 2 and "number 3" in lines[0] and "number 4" in lines[1]

    save_tars(tmp_path / "tars")
    dry_run(tmp_path, train_data_dir=str(tmp_path / "tars"), streaming=True, resolution=[8])
    assert "only the first one was read" in capsys.readouterr().out

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(9, 16)))
    dry_run(tmp_path, train_data_file=str(tmp_path / "x.npy"))
    assert "can be read" not in capsys.readouterr().out


# -- shared memory ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_too_little_shared_memory_is_refused_before_training(tmp_path, monkeypatch):
    """4 workers at batch 64: 9 batches of 4 MiB."""
    needed = worker_memory(4, 64, (1, 256, 256), 1)
    assert 9 * 64 * 256 * 256 < needed < 1.01 * 9 * 64 * 256 * 256
    assert worker_memory(0, 64, (1, 256, 256), 1) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert worker_memory(4, 64, (1, 256, 256), 1) == 3 * needed
    monkeypatch.delenv("LOCAL_WORLD_SIZE")

    asked = []
    free = lambda path: asked.append(path) or SimpleNamespace(free=1_000_000)  # noqa: E731
    monkeypatch.setattr(checking.shutil, "disk_usage", free)
    message = r"dataloader_num_workers 2 needs about 2\.\d MB .*/dev/shm has 1.0 MB free.*--shm-size 1g"
    with pytest.raises(ValueError, match=message):  # 5 batches of 100 x 64 x 64
        train(config(tmp_path, resolution=[64], train_batch_size=100, dataloader_num_workers=2, max_train_steps=1))
    assert asked == ["/dev/shm"] and not list(tmp_path.iterdir())
    check_shared_memory(1_000_000, 2)
    # an evaluation's batches come on top of training's
    options = {"resolution": [64], "train_batch_size": 20, "dataloader_num_workers": 2, "eval_steps": 1}
    evaluated = {"eval_metrics": ["memorization"], "eval_batch_size": 20, "eval_num_samples": 4}
    trainer = Trainer(config(tmp_path, **options, **evaluated))
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    with pytest.raises(ValueError, match="dataloader_num_workers 2 needs about"):
        make_evaluator(trainer.config, accelerator, trainer.feed)


def test_other_systems_have_no_such_limit(monkeypatch):
    monkeypatch.setattr(checking.sys, "platform", "darwin")
    check_shared_memory(10**15, 8)
