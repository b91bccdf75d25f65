"""Paired conditions: every source of them, the same place and the same flip as their items, and what does not fit."""

import io
import itertools
import re

import datasets
import numpy as np
import pytest
import torch
from helpers import SMALL as SMALL_RUN
from PIL import Image

from ddpm_hf import TrainConfig, train
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import load_pair
from ddpm_hf.data.scaling import MODEL_UNITS

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, size=(10, 4, 4), dtype=np.uint8)
LARGE = np.repeat(np.repeat(SMALL, 2, axis=1), 2, axis=2)  # every pixel twice in each direction
SHORT = RNG.normal(5, 2, size=(10, 2, 16))
LONG = np.repeat(SHORT, 4, axis=2)[:, :1]  # the first channel, every point four times
CLASSES = [0, 1] * 5
CLASSES_OF_FOLDERS = "even", "odd"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Items whose conditions tell what they must be: the smaller image or sequence that they were made of."""
    folder = tmp_path_factory.mktemp("conditions")
    rows = {"image": [Image.fromarray(x).convert("RGB") for x in LARGE], "small": list(map(Image.fromarray, SMALL)),
            "label": CLASSES}  # fmt: skip
    features = {"image": datasets.Image(), "small": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(str(folder / "images"))
    lists = datasets.Dataset.from_dict({"x": LONG[:, 0].tolist(), "c": SHORT[:, 0].tolist(), "y": CLASSES})
    lists.save_to_disk(str(folder / "lists"))
    lists.to_parquet(str(folder / "lists.parquet"))
    np.savez(folder / "waves.npz", data=LONG, small=SHORT)
    np.save(folder / "long.npy", LONG)
    np.save(folder / "short.npy", SHORT)
    for name, values in (("x", LARGE), ("c", SMALL)):
        for number, each in enumerate(values):
            place = folder / "pictures" / name / CLASSES_OF_FOLDERS[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(each).save(place / f"{number}.{'bmp' if name == 'c' else 'png'}")
            (folder / "mixed" / place.name).mkdir(parents=True, exist_ok=True)
            np.save(folder / "mixed" / place.name / f"{number}.npy", SMALL[number])
            (folder / "bands" / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / "bands" / name / f"{number}.npy", each * (1.0 if name == "x" else 3.0) + 7)
    Image.fromarray(SMALL[0]).save(folder / "pictures" / "c" / "more.png")
    np.savez(folder / "images.npz", data=LARGE[:, None], small=SMALL[:, None].repeat(2, axis=1))
    leads = np.stack([LONG[0, 0], LONG[0, 0] ** 2, LONG[0, 0], np.arange(64.0)], axis=1)
    np.savetxt(folder / "leads.csv", leads, delimiter=",", header="a,b,c,t", comments="")
    rows = dict(zip("abct", leads.T.tolist()))
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "leads.parquet"))
    leads = {"condition_column": "a,b", "sequence_length": 16, "stride": 4}
    images = {"train_data_dir": str(folder / "images"), "image_column": "image", "condition_column": "small",
              "resolution": [8]}  # fmt: skip
    npz = {"train_data_file": str(folder / "waves.npz"), "condition_column": "small"}
    x, c = torch.from_numpy(LARGE / 127.5 - 1)[:, None], torch.from_numpy(SMALL / 127.5 - 1)[:, None]
    return {
        "image table": (images, None),
        "flipped": ({**images, "random_flip": True, "class_labels": "label"}, None),
        "stream": ({**images, "random_flip": True, "class_labels": "label", "streaming": True}, None),
        "npz": (npz, None),
        "windows": ({**npz, "sequence_length": 16, "stride": 4}, None),
        "meanstd": ({**npz, "sequence_norm": "meanstd"}, None),
        "saved lists": ({"train_data_dir": str(folder / "lists"), "sequence_columns": ["x"],
                         "condition_column": "c"}, None),
        "parquet": ({"train_data_file": str(folder / "lists.parquet"), "condition_column": "c",
                     "class_labels": "y"}, None),
        "npy": ({"train_data_file": str(folder / "long.npy"), "condition_column": str(folder / "short.npy")}, None),
        "csv": ({"train_data_file": str(folder / "leads.csv"), **leads, "sequence_columns": ["c"]}, None),
        "csv rest": ({"train_data_file": str(folder / "leads.csv"), **leads}, None),
        "numbers": ({"train_data_file": str(folder / "leads.parquet"), **leads}, None),
        "folder": ({"train_data_dir": str(folder / "pictures" / "x"), "condition_dir": str(folder / "pictures" / "c"),
                    "resolution": [8], "random_flip": True, "class_labels": "folder"}, None),
        "bands": ({"train_data_dir": str(folder / "bands" / "x"), "condition_dir": str(folder / "bands" / "c"),
                   "resolution": [8], "random_flip": True}, None),
        "mixed": ({"train_data_dir": str(folder / "pictures" / "x"), "condition_dir": str(folder / "mixed"),
                   "resolution": [8], "random_flip": True}, None),
        "image array": ({"train_data_file": str(folder / "images.npz"), "condition_column": "small",
                         "random_flip": True}, None),
        "pairs": ({"condition_column": "c"}, list(zip(x, c))),
        "triples": ({"condition_column": "c", "class_labels": "y"}, list(zip(x, CLASSES, c))),
        "dicts": ({"condition_column": "c"}, [{"image": a, "c": b} for a, b in zip(x, c)]),
    }  # fmt: skip


ALL = ["image table", "flipped", "stream", "npz", "windows", "meanstd", "saved lists", "parquet", "pairs", "triples",
       "dicts", "npy", "csv", "csv rest", "numbers", "folder", "bands", "mixed", "image array"]  # fmt: skip
FLIPPED = ("flipped", "stream", "folder", "bands", "mixed", "image array")


def belongs(x0, condition, feed):
    """Assert that each condition is the smaller form of its item, in the data's own units."""
    if x0.ndim == 4:
        assert condition.shape[2:] == (4, 4)
        torch.testing.assert_close(x0[:, :1, ::2, ::2], condition[:, :1], rtol=0, atol=1e-6)
        return
    x, c = feed.scaling.to_data(x0.double()), feed.condition_scaling.to_data(condition.double())
    torch.testing.assert_close(x[:, 0, :: x.shape[2] // c.shape[2]], c[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("holdout", [0, 3])
@pytest.mark.parametrize("source", ALL)
def test_batches_carry_the_condition_of_each_item(source, sources, holdout):
    """Held-out items have theirs too, in the units of those that are trained on."""
    options, dataset = sources[source]
    if source == "stream" and holdout:
        pytest.skip("streams hold nothing out")
    feed = open_data(TrainConfig(train_batch_size=4, holdout=holdout, **options), dataset)
    flips = set()
    for batch in itertools.islice(feed.loader(0, 0, 1, {}, False), 8):
        belongs(batch.x0, batch.condition, feed)
        assert (batch.labels is not None) == ("class_labels" in options)
        flips |= {tuple(row) for row in batch.x0.flatten(1)[:, :16].tolist()}
    assert f"conditions of shape {feed.condition_shape}" in feed.notes
    assert len(flips) > 10 or source not in FLIPPED  # some items were seen in both directions
    assert dataset is not None or sum(note.startswith("conditions: ") for note in feed.notes) == 1
    assert "conditions" in feed.fingerprint() and (dataset is None) == (feed.condition_scaling is not MODEL_UNITS)
    for index in range(len(feed.held_out or ())):
        x, c = load_pair(feed.held_out, feed.held_out_condition, index)
        x, c = (each.float() / 127.5 - 1 if each.dtype == torch.uint8 else each for each in (x, c))
        belongs(x[None], c[None], feed)


@pytest.mark.parametrize("source", ["flipped", "stream"])
def test_workers_and_the_batch_on_a_device(source, sources):
    options, _ = sources[source]
    config = TrainConfig(train_batch_size=4, dataloader_num_workers=2, **options)
    feed = open_data(config)
    batches = list(itertools.islice(feed.loader(0, 0, 1, {}, False), 4))
    alone = open_data(TrainConfig(train_batch_size=4, **options)).loader(0, 0, 1, {}, False)
    for batch, other in zip(batches, alone):
        moved = batch.on("cpu")
        assert moved.items.dtype == moved.conditions.dtype == torch.uint8
        assert torch.equal(moved.x0, other.x0) and torch.equal(moved.condition, other.condition)
        assert torch.equal(moved.labels, other.labels)


def rows_of(batches):
    """Each item with its condition and class, as bytes, sorted."""
    parts = [(b.items, b.conditions, b.labels) for b in batches]
    return sorted(b"".join(each.numpy().tobytes() for each in row) for batch in parts for row in zip(*batch))


def test_a_stream_gives_the_pairs_of_the_table(sources):
    """In an epoch that two processes share, of any form of images; the first pairs are kept for the pictures."""
    options = {**sources["stream"][0], "random_flip": False, "image_channels": 1, "resolution": [4], "num_samples": 3}
    feed, stored = (open_data(TrainConfig(**{**options, "streaming": s}, train_batch_size=5)) for s in (True, False))
    shares = [next(iter(feed.loader(0, process, 2, {}, False))) for process in range(2)]
    whole = list(itertools.islice(stored.loader(0, 0, 1, {}, False), 2))
    assert rows_of(shares) == rows_of(whole) and len(set(rows_of(whole))) == 10
    for name in ("shape", "condition_shape", "condition_scaling", "class_names"):
        assert getattr(feed, name) == getattr(stored, name)
    assert feed.condition_shape == (1, 2, 2) and len(feed.paired) == len(feed.labels) == 3
    for index in range(3):
        kept, same = load_pair(feed.paired, feed.condition, index), load_pair(stored.dataset, stored.condition, index)
        assert all(map(torch.equal, kept, same))
        assert feed.labels.numbers[index] == CLASSES[index]


def test_pictures_have_pairs_of_several_shards(tmp_path):
    """Each of 20 shards holds one class; 16 of them take turns, then come the others, and each row is there once."""
    count = 40
    kinds = {"image": datasets.Image(), "small": datasets.Image(), "k": datasets.ClassLabel(num_classes=20)}
    rows = {"image": [Image.new("L", (4, 4), n) for n in range(count)], "small": [Image.new("L", (2, 2))] * count,
            "k": [n // 2 for n in range(count)]}  # fmt: skip
    table = datasets.Dataset.from_dict(rows, datasets.Features(kinds))
    table.save_to_disk(str(tmp_path / "x"), num_shards=20)
    options = {"train_data_dir": str(tmp_path / "x"), "image_column": "image", "condition_column": "small",
               "class_labels": "k", "resolution": [4], "image_channels": 1, "streaming": True}  # fmt: skip
    turn = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    assert open_data(TrainConfig(**options, num_samples=18)).labels.numbers.tolist() == [*turn, 0, 1]
    feed = open_data(TrainConfig(**options, num_samples=count))
    assert feed.labels.numbers.tolist() == [*turn, *turn, 4, 4, 9, 9, 14, 14, 19, 19]
    seen = {int(load_pair(feed.paired, feed.condition, index)[0][0, 0, 0]) for index in range(count)}
    assert seen == set(range(count))


def test_pairs_of_a_stream_that_do_not_fit(sources, tmp_path):
    """The row is named: before training if it is one of the first pairs, and otherwise by the batch."""
    options = sources["stream"][0]
    refused(
        "condition_column must be a column of .*: image, small, label; got 'c'", **{**options, "condition_column": "c"}
    )
    refused("needs center_crop", **options, center_crop=False)
    refused("resolution must be divisible by 2", **{**options, "resolution": [7]})

    def saved(number, small, name):
        rows = {"image": list(map(Image.fromarray, LARGE)), "small": list(map(Image.fromarray, SMALL))}
        kinds = datasets.Features({"image": datasets.Image(), "small": datasets.Image(decode=False)})
        table = datasets.Dataset.from_dict(rows, datasets.Features({name: datasets.Image() for name in rows}))
        rows = table.cast(kinds).to_list()
        rows[number]["small"] = small
        table = datasets.Dataset.from_list(rows, kinds).cast_column("small", datasets.Image())
        table.save_to_disk(str(tmp_path / name))
        return {"train_data_dir": str(tmp_path / name), "image_column": "image", "condition_column": "small",
                "resolution": [8], "streaming": True, "train_batch_size": 10}  # fmt: skip

    def png(size):
        file = io.BytesIO()
        Image.new("L", (size, size)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    other = saved(6, png(8), "other")
    message = "2 in the first pair; got 1 for number 6 of shard 0 in the column 'small' of .* [(]8 x 8[)] with number 6"
    refused(message, **other)
    batch = next(iter(open_data(TrainConfig(**other, num_samples=4)).loader(0, 0, 1, {}, False)))
    assert batch.items is None and re.search(message, batch.error)
    refused(
        "number 0 of shard 0 in the column 'small' of .* 8 x 8, or that divided .*; got 3 x 3",
        **saved(0, png(3), "odd"),
    )
    bad = saved(0, {"bytes": b"no", "path": None}, "bad")
    batch = next(iter(open_data(TrainConfig(**bad)).loader(0, 0, 1, {}, False)))
    assert re.search(
        "cannot read the image number 0 of shard 0 in the column 'small'.*--on_bad_image skip", batch.error
    )
    feed = open_data(TrainConfig(**bad, on_bad_image="skip"))
    batch = next(iter(feed.loader(0, 0, 1, {}, False)))
    belongs(batch.x0, batch.condition, feed)
    assert len(batch.skipped) == 1 and len(feed.paired) == 9
    # a run that goes on tells other conditions, and a run without conditions has the fingerprint that it always had
    without = open_data(TrainConfig(**{**bad, "condition_column": None})).fingerprint()
    first, second = feed.fingerprint(), open_data(TrainConfig(**other, num_samples=4)).fingerprint()
    assert first.pop("conditions") != second.pop("conditions") and first == second == without


def refused(message, dataset=None, **options):
    with pytest.raises(ValueError, match=message):
        open_data(TrainConfig(**options), dataset)


def test_conditions_that_do_not_fit(sources, tmp_path):
    images, npz = sources["image table"][0], sources["npz"][0]
    refused("condition_column must be a column of .*: image, small, label; got 'c'",
            **{**images, "condition_column": "c"})  # fmt: skip
    refused("needs center_crop", **images, center_crop=False)
    refused("resolution must be divisible by 2", **{**images, "resolution": [7]})
    refused("condition_column must be an array of .*data, small; got 'c'", **{**npz, "condition_column": "c"})
    refused("stride must be divisible by 4.*got 6", **npz, sequence_length=16, stride=6)
    refused("sequence_length must be divisible by 4.*got 10", **npz, sequence_length=10)
    refused("condition_column applies to", dataset_name="digits", condition_column="c")
    np.savez(tmp_path / "wrong.npz", data=LONG, few=SHORT[:4], odd=SHORT[:, :, :5])
    wrong = {"train_data_file": str(tmp_path / "wrong.npz")}
    # the array of the items has the name 'data' among several
    refused("must have 10 rows, as the data has, got 4", **wrong, condition_column="few")
    refused("must have the size of the items, 64, or that divided by one whole number; got 5", **wrong,
            condition_column="odd")  # fmt: skip
    np.save(tmp_path / "x.npy", LONG)
    refused("must be a .npy file of conditions for .*x.npy, got 'c'", train_data_file=str(tmp_path / "x.npy"),
            condition_column="c")  # fmt: skip
    refused("must be a file on disk, got none.npy: No such file", train_data_file=str(tmp_path / "x.npy"),
            condition_column="none.npy")  # fmt: skip
    x = torch.zeros(1, 8, 8)
    for condition, message in [
        (torch.zeros(1, 3, 3), "8 x 8, or that divided by one whole number; got 3 x 3"),
        (torch.zeros(1, 4, 8), "got 4 x 8"),
        (3, "its condition: items must be float tensors"),
    ]:
        refused(message, [(x, condition)] * 4, condition_column="c")
    refused(r"needs items \(x, condition\) or dicts with 'c'; got Tensor", [x] * 4, condition_column="c")
    refused(r"needs items \(x, y, condition\)", [(x, 0), (x, 1)] * 2, condition_column="c", class_labels="y")


def test_pairs_of_folders_that_do_not_fit(tmp_path):
    """The message names the files, and comes before training."""
    (tmp_path / "x" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        Image.new("L", (8, 8), 9).save(tmp_path / "x" / f"{name}.png")
    options = {"train_data_dir": str(tmp_path / "x"), "condition_dir": str(tmp_path / "c"), "resolution": [8]}
    refused("condition_dir must be a folder of conditions, and .*c is not a folder", **options)
    (tmp_path / "c" / "sub").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "c" / "a.png")
    refused(r"but for its ending; 1 have none, such as .*x/sub/b.png", **options)
    for size, mode, message in (
        ((3, 3), "L", "c/sub/b.png must have the size of the items, 8 x 8, or that divided .*; got 3 x 3"),
        ((8, 8), "L", r"by one whole number, 2 in the first pair; got 1 for .*b.png \(8 x 8\) with .*b.png \(8 x 8\)"),
        ((4, 4), "RGB", "must have 1 channels, as the first one has; .*c/sub/b.png has 3"),
    ):
        Image.new(mode, size).save(tmp_path / "c" / "sub" / "b.png")
        refused(message, **options)
    (tmp_path / "c" / "a.png").write_bytes(b"no image")
    Image.new("L", (4, 4)).save(tmp_path / "c" / "sub" / "b.png")
    assert open_data(TrainConfig(**options, train_batch_size=1, on_bad_image="skip")).items == 2
    (tmp_path / "c" / "sub" / "b.png").write_bytes(b"no image")
    refused("must have a pair that can be read: cannot read the image .*a.png", **options)
    Image.new("L", (4, 4)).save(tmp_path / "c" / "a.png")
    Image.new("L", (4, 4)).save(tmp_path / "c" / "sub" / "b.bmp")
    refused("must have one condition for each image, got .*b.bmp.*b.png", **options)
    refused("another folder than that of the images", **{**options, "condition_dir": str(tmp_path / "x")})
    refused("not both; got condition 'known' and condition_dir", **options, condition="known")
    refused("condition_dir applies to folders of images", dataset_name="digits", condition_dir="c")
    for number, values in enumerate((np.zeros((4, 4)), np.full((4, 4), np.nan))):
        place = tmp_path / "c" / ("a", "sub/b")[number]
        place.with_suffix(".png").unlink()
        place.with_suffix(".bmp").unlink(missing_ok=True)
        np.save(place.with_suffix(".npy"), values)
    refused("c/sub/b.npy: all values must be finite; channel 0 has nan in row 0", **options)


def test_gaps_of_conditions_are_named_or_interpolated(tmp_path):
    rows = [[float(i), i / 2, -float(i)] for i in range(12)]
    rows[5][1] = ""
    (tmp_path / "x.csv").write_text("\n".join(["a,b,c", *(",".join(map(str, row)) for row in rows)]))
    options = {"train_data_file": str(tmp_path / "x.csv"), "condition_column": "b", "sequence_length": 4, "stride": 4}
    refused("row 5 has '' in column 'b'", **options)
    refused("condition_column must be a column of .*: a, b, c; got 'd'", **{**options, "condition_column": "b, d"})
    feed = open_data(TrainConfig(**options, on_missing="interpolate"))
    values = feed.condition_scaling.to_data(load_pair(feed.dataset, feed.condition, 1)[1].double())
    np.testing.assert_allclose(values, [[2, 2.5, 3, 3.5]], atol=1e-6)
    with pytest.raises(ValueError, match="must be divisible"):
        np.savez(tmp_path / "x.npz", data=LONG, small=np.where(SHORT > 7, np.nan, SHORT))
        open_data(TrainConfig(train_data_file=str(tmp_path / "x.npz"), condition_column="small", sequence_length=6))
    refused("'small' of .* has NaN or infinity in rows", train_data_file=str(tmp_path / "x.npz"),
            condition_column="small")  # fmt: skip


def test_a_run_does_not_go_on_with_other_conditions(tmp_path):
    """The items are the same; the checkpoint knows the conditions by their content."""
    np.savez(tmp_path / "waves.npz", data=LONG, small=SHORT)
    options = {**SMALL_RUN, "train_data_file": str(tmp_path / "waves.npz"), "condition_column": "small"}
    options.update(train_batch_size=2, output_dir=str(tmp_path / "run"), max_train_steps=1)
    train(TrainConfig(**options))
    np.savez(tmp_path / "waves.npz", data=LONG, small=-SHORT)
    with pytest.raises(ValueError, match=r"not that of the run in .* \(conditions\): choose another"):
        train(TrainConfig(**{**options, "max_train_steps": 2}))
