"""Streamed pictures: every one once an epoch, one order for any number of processes, exact places to resume from."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import save_tars, table
from test_trainer import config, state

from ddpm_hf import TrainConfig, train
from ddpm_hf.data import build_dataset
from ddpm_hf.stream import collate
from ddpm_hf.streaming import Lane, StreamingSampler, StreamingView, lane_count
from ddpm_hf.trainer import Trainer

# the number of a picture in its darkest pixel; brighter to the right
PICTURES = [Image.fromarray((10 * i + np.zeros((8, 8, 3)) + np.arange(8)[:, None]).astype(np.uint8)) for i in range(22)]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """22 pictures in six tars of four or two."""
    folder = tmp_path_factory.mktemp("streamed") / "tars"
    save_tars(folder, PICTURES, per_tar=4)
    return str(folder)


def stream(folder, **options):
    return build_dataset(TrainConfig(train_data_dir=folder, streaming=True, resolution=[8], **options))


def places(batches, count):
    return [[(row.epoch, row.shard, row.row) for row in batch] for batch in itertools.islice(batches, count)]


def test_an_epoch_of_a_lane_is_each_picture_once(tars):
    data = stream(tars, shuffle_buffer=5)
    with ThreadPoolExecutor(1) as pool:
        lane = Lane(data, 0, 1, 2, 5, pool)  # shards 1, 3, 5: ten pictures
        rows = [next(lane) for _ in range(30)]
    order = [(row.shard, row.row) for row in rows]
    expected = sorted([(s, r) for s in (1, 3) for r in range(4)] + [(5, 0), (5, 1)])
    for epoch in range(3):
        part = order[10 * epoch : 10 * epoch + 10]
        assert sorted(part) == expected and {row.epoch for row in rows[10 * epoch : 10 * epoch + 10]} == {epoch}
        assert part != expected
    assert order[:10] != order[10:20]


def test_lanes_share_a_global_batch_evenly():
    assert [lane_count(*p) for p in ((16, 6), (16, 100), (16, 1), (12, 5), (7, 6))] == [4, 16, 1, 4, 1]


@pytest.mark.parametrize("shards", [6, 1])
def test_one_order_on_any_number_of_processes(shards, tars, tmp_path):
    """A step of 8 as 1 x 8, 2 x 4, and in two parts of 2 on two processes: the same rows at the same places."""
    data = stream(tars, shuffle_buffer=12)
    if shards == 1:
        table(PICTURES).save_to_disk(str(tmp_path / "one"))
        data = stream(str(tmp_path / "one"), shuffle_buffer=12)
    assert data.num_shards == shards
    whole = places(StreamingSampler(data, 8, 1, seed=3), 9)
    two = [places(StreamingSampler(data, 4, 1, 3, process=p, processes=2), 9) for p in (0, 1)]
    assert [a + b for a, b in zip(*two)] == whole
    parts = [places(StreamingSampler(data, 2, 2, 3, process=p, processes=2), 18) for p in (0, 1)]
    joined = [a + b for a, b in zip(*parts)]
    assert [joined[i] + joined[i + 1] for i in range(0, 18, 2)] == whole
    assert places(StreamingSampler(data, 8, 1, seed=4), 9) != whole


@pytest.mark.parametrize("buffer", [1, 12, 1000])
def test_it_goes_on_from_any_step(buffer, tars):
    data = stream(tars, shuffle_buffer=buffer)
    sampler = StreamingSampler(data, 4, 1, seed=0)
    whole = places(sampler, 15)
    for step in range(1, 15):
        sampler = StreamingSampler(data, 4, 1, seed=0)
        list(itertools.islice(sampler, step))
        again = StreamingSampler(data, 4, 1, 0, step=step, states=sampler.state(step))
        assert places(again, 15 - step) == whole[step:]


def test_pictures_and_augmentation(tars):
    data = stream(tars, random_flip=True)
    rows = next(iter(StreamingSampler(data, 6, 1, seed=0)))
    x = collate([StreamingView(data, 0, "stop")[row] for row in rows]).x0
    numbers = [4 * row.shard + row.row for row in rows]
    np.testing.assert_array_equal(((x.amin(dim=(1, 2, 3)) + 1) * 127.5).round(), [10 * n for n in numbers])
    later = [row._replace(epoch=epoch) for row in rows[:1] for epoch in range(12)]
    views = [StreamingView(data, 0, "stop")[row][0] for row in later]
    flipped = [bool(view[0, 0, 0] > view.min()) for view in views]
    assert 0 < sum(flipped) < 12


def test_a_bad_picture_is_replaced_within_its_batch():
    a, b = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    batch = collate([(a, [], None), (None, ["bad"], None), (b, [], None), (None, ["worse"], None)])
    assert torch.equal(batch.x0, torch.stack((a, b, b, a))) and batch.skipped == ["bad", "worse"]
    assert "none of the pictures" in collate([(None, ["bad"], None)]).error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_with_the_same_bits(workers, tars, tmp_path, monkeypatch):
    """In the middle of an epoch, of a block and of an accumulated step."""
    options = {
        "dataset_name": None, "train_data_dir": tars, "resolution": [8], "streaming": True, "shuffle_buffer": 9,
        "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 4,
        "dataloader_num_workers": workers, "random_flip": True, "image_channels": 1,
    }  # fmt: skip
    train(config(tmp_path / "whole", **options))
    next_batch, calls = Trainer._next_batch, []

    def stop(self, batches):
        calls.append(1)
        if len(calls) == 10:  # the second part of step 5
            raise KeyboardInterrupt
        return next_batch(self, batches)

    monkeypatch.setattr(Trainer, "_next_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "parts", **options))
    monkeypatch.undo()
    train(config(tmp_path / "parts", **options))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, content in whole.items():
        assert parts[name] == content, name


def test_what_cannot_be_streamed(tars, tmp_path):
    for options in ({"dataset_name": "digits"}, {"train_data_dir": tars, "holdout": 3}, {"train_data_file": "x.npy"},
                    {"train_data_dir": tars, "eval_steps": 3}):  # fmt: skip
        with pytest.raises(ValueError, match="streaming is for tables of images, and not with"):
            TrainConfig(streaming=True, **options)
    PICTURES[0].save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="are read as needed anyway"):
        stream(str(tmp_path))
    empty = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "empty").mkdir()
    empty.to_parquet(str(tmp_path / "empty" / "x.parquet"))
    with pytest.raises(ValueError, match="holds no pictures"):
        stream(str(tmp_path / "empty"))
    rows = {"image": [{"bytes": b"no", "path": None}] * 3}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="none of the first pictures of .*number 2 of shard 0"):
        train(config(tmp_path / "run", dataset_name=None, train_data_dir=str(tmp_path / "bad"), streaming=True))


def test_another_batch_is_not_resumed(tars, tmp_path):
    options = {"dataset_name": None, "train_data_dir": tars, "resolution": [8], "streaming": True, "max_train_steps": 2}
    train(config(tmp_path, **options))
    progress = tmp_path / "checkpoints" / "step-000002" / "progress.json"
    progress.write_text(progress.read_text().replace('"global_batch": 8', '"global_batch": 16'))
    (progress.parent / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match="the same global batch, 16; got 8"):
        train(config(tmp_path, **{**options, "max_train_steps": 3}))
