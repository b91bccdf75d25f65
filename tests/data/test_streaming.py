"""Streamed pictures: every one once an epoch, one order for any number of processes, exact places to resume from."""

import itertools
import json

import datasets
import numpy as np
import pytest
import torch
from helpers import STREAMED as PICTURES
from helpers import config, save_tars, state, table
from PIL import Image

from ddpm_hf import DDPMPipeline, TrainConfig, train
from ddpm_hf.data import streaming
from ddpm_hf.data.loading import Item, collate
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.streaming import StreamingSampler, StreamingView, probe
from ddpm_hf.trainer.batches import Batches


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """22 pictures in six tars of four or two."""
    folder = tmp_path_factory.mktemp("streamed") / "tars"
    save_tars(folder, PICTURES, per_tar=4)
    return str(folder)


def stream(folder, **options):
    return build_dataset(TrainConfig(train_data_dir=folder, streaming=True, resolution=[8], **options))


class Shards:
    """A stream of numbers in place of pictures, shards of any sizes."""

    name = "the stream"

    def __init__(self, sizes, buffer):
        self.sizes, self.num_shards, self.buffer = sizes, len(sizes), buffer

    def read(self, shard, skip):
        return iter(range(100 * shard + skip, 100 * shard + self.sizes[shard]))


def places(batches, count):
    return [[(row.epoch, row.shard, row.row) for row in batch] for batch in itertools.islice(batches, count)]


def order(data, count, **options):
    """The first samples of a stream, in steps of one."""
    return [place for batch in places(StreamingSampler(data, 1, 1, **{"seed": 0, **options}), count) for place in batch]


SIZES = {
    "equal": [20] * 5, "unequal": [90, 10], "empty shards": [3, 0, 7, 0], "one shard": [13], "one item each": [1] * 40,
    "many": [5, 0, 1, 17, 2, 30, 1, 1, 9, 4, 4, 0, 8, 3, 2, 6, 11, 5, 7, 12], "two items": [0, 1, 1],
}  # fmt: skip


@pytest.mark.parametrize("open_shards", [1, 3, 16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_item_comes_once_an_epoch(sizes, open_shards, monkeypatch):
    """The first N samples are the N items, and so are the next N in another order; whatever the shards, the buffer, the
    number of shards that are open, of processes and of parts of a step. Every process has its part of one order."""
    monkeypatch.setattr(streaming, "OPEN_SHARDS", open_shards)
    items = sorted((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    count = len(items)
    for buffer in (1, 7, 1000):
        data = Shards(sizes, buffer)
        whole = order(data, 3 * count)
        epochs = [whole[count * e : count * (e + 1)] for e in range(3)]
        for number, epoch in enumerate(epochs):
            assert {e for e, _, _ in epoch} == {number}
            assert sorted(place[1:] for place in epoch) == items
        if count > 10 and (buffer > 1 or len(sizes) > 3):
            assert len({tuple(place[1:] for place in epoch) for epoch in epochs} | {tuple(items)}) == 4
        for batch_size, parts, processes in ((5, 1, 1), (2, 1, 3), (1, 3, 2), (16, 1, 2)):
            steps = 2 * count // (batch_size * parts * processes) + 1
            shares = [
                places(StreamingSampler(data, batch_size, parts, 0, process, processes), steps * parts)
                for process in range(processes)
            ]
            joined = [place for batches in zip(*shares) for batch in batches for place in batch]
            assert joined[: 2 * count] == whole[: 2 * count]


@pytest.mark.parametrize("open_shards", [1, 3, 16])
def test_it_goes_on_from_every_step(open_shards, monkeypatch):
    """On one of two processes, with the state of the other one as JSON holds it."""
    monkeypatch.setattr(streaming, "OPEN_SHARDS", open_shards)
    for sizes in ([20, 0, 3, 7], [11], SIZES["many"]):
        for buffer in (1, 6, 1000):
            data, steps = Shards(sizes, buffer), 2 * sum(sizes) // 4 + 2
            first, second = (StreamingSampler(data, 2, 1, 0, process, 2, ahead=steps) for process in (0, 1))
            whole = places(first, steps)
            list(itertools.islice(second, steps))
            for step in range(0, steps, 1 if sum(sizes) < 60 else 7):
                state = json.loads(json.dumps(second.state(step)))
                again = StreamingSampler(data, 2, 1, 0, 0, 2, step=step, state=state)
                assert places(again, steps - step) == whole[step:]


def test_shuffling_is_as_good_as_the_buffer_allows():
    """Shards of one class each: in a buffer of them all, neighbours are of one class as often as by chance."""
    data = Shards([100] * 10, 1000)
    shards = [shard for _, shard, _ in order(data, 1000)]
    same = np.mean([a == b for a, b in itertools.pairwise(shards)])
    assert abs(same - 0.1) < 4 * (0.1 * 0.9 / 999) ** 0.5
    # of a small buffer each block holds the open shards in equal parts
    blocks = np.array([shard for _, shard, _ in order(Shards([100] * 10, 50), 1000)]).reshape(20, 50)
    assert all((np.bincount(block, minlength=10) == 5).all() for block in blocks)


def test_memory_holds_the_pictures_of_own_samples_only():
    rows = next(iter(StreamingSampler(Shards([50, 50], 100), 5, 1, 0, process=1, processes=2)))
    assert all(row.source == 100 * row.shard + row.row for row in rows)
    with pytest.raises(ValueError, match="the stream holds no images"):
        order(Shards([0, 0], 10), 1)
    with pytest.raises(ValueError, match="0.2.0 or earlier"):
        StreamingSampler(Shards([5], 5), 1, 1, 0, step=3, state={"0": [1, 0, 0, 0, 2]})


@pytest.mark.parametrize("form", ["tars", "saved to disk", "parquet with an empty file"])
def test_tables_are_read_from_any_place(form, tars, tmp_path):
    """Each picture once, and on from the middle, as the library reads each kind of table."""
    folder = tars
    if form == "saved to disk":
        folder = str(tmp_path / "saved")
        table(PICTURES).save_to_disk(folder, num_shards=3)
    elif form != "tars":
        folder = str(tmp_path)
        for number, part in enumerate((PICTURES[:0], PICTURES[:15], PICTURES[15:])):
            table(part).to_parquet(f"{folder}/train-{number:05d}.parquet")
    data = stream(folder, shuffle_buffer=9)
    sampler = StreamingSampler(data, 4, 1, seed=0, ahead=20)
    rows = [row for batch in itertools.islice(sampler, 11) for row in batch]
    assert data.num_shards == (6 if form == "tars" else 3) and probe(data) == (3, 8, 8)
    for epoch in (rows[:22], rows[22:]):
        views = [StreamingView(data, 0, "stop")[row].x for row in epoch]
        assert sorted(int(view.min()) for view in views) == list(range(0, 220, 10))
    again = StreamingSampler(data, 4, 1, 0, step=4, state=sampler.state(4))
    assert [row for batch in itertools.islice(again, 7) for row in batch] == rows[16:]


def test_pictures_and_augmentation(tars):
    data = stream(tars, random_flip=True)
    rows = next(iter(StreamingSampler(data, 6, 1, seed=0)))
    x = collate([StreamingView(data, 0, "stop")[row] for row in rows]).x0
    numbers = [4 * row.shard + row.row for row in rows]  # four pictures a tar
    np.testing.assert_array_equal(((x.amin(dim=(1, 2, 3)) + 1) * 127.5).round(), [10 * n for n in numbers])
    later = [row._replace(epoch=epoch) for row in rows[:1] for epoch in range(12)]
    views = [StreamingView(data, 0, "stop")[row].x for row in later]
    flipped = [bool(view[0, 0, 0] > view.min()) for view in views]
    assert 0 < sum(flipped) < 12


def test_a_bad_picture_is_replaced_within_its_batch():
    a, b = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    batch = collate([Item(a, []), Item(4, ["bad"]), Item(b, []), Item(7, ["worse"])])
    assert torch.equal(batch.x0, torch.stack((a, a, b, b))) and batch.skipped == ["bad", "worse"]
    assert "none of the images" in collate([Item(1, ["bad"])]).error


def test_the_stand_ins_are_spread_over_the_batch(tars):
    """In each of 600 epochs one batch of six pictures of which two are bad: the good ones are seen equally often."""
    view = StreamingView(stream(tars), 0, "skip")
    good = [row.source for row in next(iter(StreamingSampler(view.stream, 4, 1, seed=0)))]
    sources = [good[0], b"no", b"no", *good[1:]]
    rows = [[streaming.Row(epoch, 0, i, source) for i, source in enumerate(sources)] for epoch in range(600)]
    batches = [collate([view[row] for row in epoch]) for epoch in rows]
    numbers = np.array([batch.items.amin(dim=(1, 2, 3)).numpy() for batch in batches])
    drawn = [np.sum(numbers[:, 1:3] == number) for number in numbers[0, [0, 3, 4, 5]]]
    # 1,200 draws of four: binomial, standard deviation 15
    assert sum(drawn) == 1200 and np.abs(np.array(drawn) - 300).max() < 5 * 15
    again = collate([view[row] for row in rows[7]])
    assert torch.equal(again.items, batches[7].items) and len(again.skipped) == 2


@pytest.mark.parametrize("workers, paired", [(0, False), (2, False), (0, True)])
def test_a_stopped_run_goes_on_with_the_same_bits(workers, paired, tars, tmp_path, monkeypatch):
    """In the middle of an epoch, of a block and of an accumulated step; also with conditions and classes."""
    options = {
        "dataset_name": None, "train_data_dir": tars, "resolution": [8], "streaming": True, "shuffle_buffer": 9,
        "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 4,
        "dataloader_num_workers": workers, "random_flip": True, "image_channels": 1,
    }  # fmt: skip
    if paired:
        kinds = {"image": datasets.Image(), "small": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
        rows = {"image": PICTURES, "small": [p.resize((4, 4)) for p in PICTURES], "kind": [0, 1] * 11}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).save_to_disk(str(tmp_path / "pairs"), num_shards=3)
        options.update(train_data_dir=str(tmp_path / "pairs"), image_column="image", condition_column="small",
                       class_labels="kind", num_samples=2)  # fmt: skip
    result = train(config(tmp_path / "whole", **options))
    if paired:
        pipe = DDPMPipeline.from_pretrained(result.pipeline_dir)
        assert pipe.config.condition == "paired" and pipe.config.condition_size == [4, 4]
        picture = Image.open(tmp_path / "whole" / "samples" / "step-000006.png")
        assert picture.size == (3 * 66, 2 * 66)  # condition, sample and true item of two pairs
    next_batch, calls = Batches.__next__, []

    def stop(self):
        calls.append(1)
        if len(calls) == 10:  # the second part of step 5
            raise KeyboardInterrupt
        return next_batch(self)

    monkeypatch.setattr(Batches, "__next__", stop)
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
    with pytest.raises(ValueError, match="holds no images"):
        stream(str(tmp_path / "empty"))
    rows = {"image": [{"bytes": b"no", "path": None}] * 3}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="none of the first images of .*number 2 of shard 0"):
        train(config(tmp_path / "run", dataset_name=None, train_data_dir=str(tmp_path / "bad"), streaming=True))


def test_another_batch_is_not_resumed(tars, tmp_path):
    options = {"dataset_name": None, "train_data_dir": tars, "resolution": [8], "streaming": True, "max_train_steps": 2}
    train(config(tmp_path, **options))
    progress = tmp_path / "checkpoints" / "step-000002" / "progress.json"
    progress.write_text(progress.read_text().replace('"global_batch": 8', '"global_batch": 16'))
    sums = json.loads((progress.parent / "checksums.json").read_text())
    del sums["progress.json"]  # which is changed here
    (progress.parent / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="the same global batch, 16; got 8.*--continue_from /"):
        train(config(tmp_path, **{**options, "max_train_steps": 3}))
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps({**content, "global_batch": 8, "feed": {"0": [0, 0, 0, 0, 8]}}))
    with pytest.raises(ValueError, match="0.2.0 or earlier, whose order was another"):
        train(config(tmp_path, **{**options, "max_train_steps": 3}))
