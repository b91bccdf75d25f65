"""Classes of items: every source of them, their names and counts, and what is no class."""

import io
import itertools
import json
import math

import datasets
import numpy as np
import pytest
import torch
from helpers import SMALL, gradient
from PIL import Image

from ddpm_hf import TrainConfig, train
from ddpm_hf.data import open_data
from ddpm_hf.data.images import ImageDataset, image_folder
from ddpm_hf.data.labels import Labels, as_labels, class_notes
from ddpm_hf.data.loading import Item, StreamSampler, collate, fingerprint, item_labels, load_item
from ddpm_hf.data.sequence_files import read_label_file
from ddpm_hf.data.sequences import SequenceDataset

NAMES = ["bird", "cat", "dog"]
CLASSES = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 1, 2]  # of twelve items, whose values tell them apart


def picture(number):
    """An image whose colour is 20 times its number."""
    return Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8))


def wave(number):
    return np.sin(np.arange(16) / (number + 1)) + number


PICTURES = [picture(number) for number in range(12)]
WAVES = np.stack([wave(number) for number in range(12)])


def image_table(labels=None):
    features = {"image": datasets.Image(), "label": labels or datasets.ClassLabel(names=NAMES),
                "kind": datasets.Value("string")}  # fmt: skip
    rows = {"image": PICTURES, "label": CLASSES, "kind": [NAMES[c] for c in CLASSES]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The options, and the data from Python, of every source of classes; all have the twelve items above."""
    folder = tmp_path_factory.mktemp("classes")
    for number, (image, label) in enumerate(zip(PICTURES, CLASSES)):
        place = folder / "photos" / NAMES[label] / ("deep" if number % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:02d}.png")
    image_table().save_to_disk(str(folder / "table"))
    texts = [NAMES[label] for label in CLASSES]
    np.save(folder / "waves.npy", WAVES)
    np.save(folder / "classes.npy", CLASSES)
    (folder / "classes.txt").write_text("\n".join(texts) + "\n")
    (folder / "classes.csv").write_text("\n".join(["class", *texts]) + "\n")
    (folder / "bare.csv").write_text("\n".join(map(str, CLASSES)) + "\n")
    np.savez(folder / "waves.npz", data=WAVES, classes=np.array(texts))
    np.savez(folder / "two.npz", waves=WAVES, classes=CLASSES)
    cells = [",".join([text, *(f"{v!r}" for v in row.tolist())]) for text, row in zip(texts, WAVES)]
    (folder / "waves.csv").write_text("\n".join(["kind," + ",".join(f"x{i}" for i in range(16)), *cells]) + "\n")
    rows = {"wave": WAVES.tolist(), "kind": texts, "label": CLASSES}
    waves = datasets.Dataset.from_dict(rows)
    waves.to_parquet(str(folder / "waves.parquet"))
    waves.save_to_disk(str(folder / "waves"))
    file = str(folder / "waves.npy")
    table = {"train_data_dir": str(folder / "table"), "resolution": [8]}
    x = [torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1 for image in PICTURES]
    return {
        "folder": ({"train_data_dir": str(folder / "photos"), "resolution": [8], "class_labels": "folder"}, None),
        "table": ({**table, "class_labels": "label"}, None),
        "texts of a table": ({**table, "class_labels": "kind"}, None),
        "stream": ({**table, "class_labels": "label", "streaming": True, "shuffle_buffer": 5}, None),
        "npz": ({"train_data_file": str(folder / "waves.npz"), "class_labels": "classes"}, None),
        "npz without data": ({"train_data_file": str(folder / "two.npz"), "class_labels": "classes"}, None),
        "npy": ({"train_data_file": file, "class_labels": str(folder / "classes.npy")}, None),
        "txt": ({"train_data_file": file, "class_labels": str(folder / "classes.txt")}, None),
        "csv beside npy": ({"train_data_file": file, "class_labels": str(folder / "classes.csv")}, None),
        "csv without a name": ({"train_data_file": file, "class_labels": str(folder / "bare.csv")}, None),
        "csv": ({"train_data_file": str(folder / "waves.csv"), "class_labels": "kind"}, None),
        "parquet": ({"train_data_file": str(folder / "waves.parquet"), "class_labels": "kind",
                     "sequence_columns": ["wave"]}, None),
        "saved sequences": ({"train_data_dir": str(folder / "waves"), "class_labels": "label",
                             "sequence_columns": ["wave"]}, None),
        "windows": ({"train_data_file": file, "class_labels": str(folder / "classes.npy"), "sequence_length": 8,
                     "stride": 3}, None),
        "pairs": ({"class_labels": "y"}, list(zip(x, CLASSES))),
        "named pairs": ({"class_labels": "y"}, list(zip(x, texts))),
        "dicts": ({"class_labels": "y"}, [{"image": a, "y": torch.tensor(b)} for a, b in zip(x, CLASSES)]),
        "a table from Python": ({"class_labels": "label"}, image_table()),
        "ImageDataset": ({"class_labels": "y"}, ImageDataset(PICTURES, (8, 8), labels=texts)),
        "SequenceDataset": ({"class_labels": "y"}, SequenceDataset(WAVES, labels=CLASSES)),
    }  # fmt: skip


ALL = ["folder", "table", "texts of a table", "stream", "npz", "npz without data", "npy", "txt", "csv beside npy",
       "csv without a name", "csv", "parquet", "saved sequences", "windows", "pairs", "named pairs", "dicts",
       "a table from Python", "ImageDataset", "SequenceDataset"]  # fmt: skip
NUMBERED = {"npy", "npz without data", "csv without a name", "saved sequences", "windows", "pairs", "dicts",
            "SequenceDataset"}  # fmt: skip


def numbers_of(batch, scaling):
    """The numbers of a batch's items, from their values."""
    if batch.items.dtype == torch.uint8:
        return (batch.items[:, 0, 0, 0] / 20).round().int().tolist()
    if batch.items.ndim == 4:
        return (((batch.items[:, 0, 0, 0] + 1) * 127.5) / 20).round().int().tolist()
    x = scaling.to_data(batch.items.double()).numpy()[:, 0]
    starts = range(0, 16 - x.shape[1] + 1)
    distances = [min(np.abs(wave(n)[s : s + len(row)] - row).max() for s in starts) for row in x for n in range(12)]
    return np.reshape(distances, (-1, 12)).argmin(axis=1).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ALL)
def test_batches_carry_the_class_of_each_item(source, sources, workers):
    """Two epochs on two processes; names and counts are those of the source."""
    if workers and source not in ("folder", "stream", "windows"):
        pytest.skip("one source of each kind is enough")
    options, dataset = sources[source]
    feed = open_data(TrainConfig(train_batch_size=3, dataloader_num_workers=workers, **options), dataset)
    seen = []
    for process in range(2):
        for batch in itertools.islice(feed.loader(0, process, 2, {}, False), 4):
            assert batch.labels.dtype == torch.int64 and batch.labels.shape == (3,)
            seen += zip(numbers_of(batch, feed.scaling), batch.labels.tolist())
    assert len(seen) == 24 and all(CLASSES[number] == label for number, label in seen)
    assert feed.class_names == (["0", "1", "2"] if source in NUMBERED else NAMES)
    if source == "stream":
        assert feed.class_counts is None and feed.notes == ["3 classes: bird, cat, dog"]
    else:
        windows = 3 if source == "windows" else 1
        assert feed.class_counts == [4 * windows] * 3 and len({number for number, _ in seen}) == 12
        assert f"3 classes: {feed.class_names[0]} ({4 * windows})" in feed.notes[-1]


@pytest.mark.parametrize("source", [*ALL, "digits"])
def test_without_the_option_nothing_changes(source, sources):
    """Order, items, fingerprint and split are the same bits with classes as without; without, batches have none."""
    options, dataset = sources.get(source, ({"dataset_name": "digits", "class_labels": "label"}, None))
    without = {name: value for name, value in options.items() if name != "class_labels"}
    if source in ("npz without data", "csv"):
        return  # they cannot be read without it
    if source == "parquet":
        without["sequence_columns"] = ["wave"]
    feeds = [open_data(TrainConfig(train_batch_size=4, seed=3, **o), dataset) for o in (options, without)]
    batches = [list(itertools.islice(feed.loader(1, 0, 1, {}, False), 5)) for feed in feeds]
    assert all(torch.equal(a.items, b.items) and b.labels is None for a, b in zip(*batches))
    prints = [feed.fingerprint() for feed in feeds]
    assert "labels" not in prints[1]
    assert {k: v for k, v in prints[0].items() if k != "labels" and source != "stream"}.items() <= prints[1].items()
    assert feeds[1].class_names is feeds[1].class_counts is feeds[1].labels is None


def test_the_digits():
    feed = open_data(TrainConfig(dataset_name="digits", class_labels="label", holdout=100))
    assert feed.class_names == list("0123456789") and sum(feed.class_counts) == 1697
    assert feed.notes[-1].startswith("10 classes: 0 (")


@pytest.mark.parametrize("source", ["table", "windows", "pairs"])
def test_held_out_items_keep_their_classes(source, sources):
    options, dataset = sources[source]
    feed = open_data(TrainConfig(holdout=3, train_batch_size=3, **options), dataset)
    for part in (feed.dataset, feed.held_out):
        labels = item_labels(part, feed.labels)
        batch = collate([Item(load_item(part, index), [], label=int(labels[index])) for index in range(len(part))])
        assert len(labels) == len(part)
        assert [CLASSES[number] for number in numbers_of(batch, feed.scaling)] == batch.labels.tolist()
    batch = next(iter(feed.loader(0, 0, 1, {}, False)))
    assert [CLASSES[number] for number in numbers_of(batch, feed.scaling)] == batch.labels.tolist()
    assert sum(feed.class_counts) == feed.items


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stand_in_brings_its_own_class(streaming, tmp_path):
    """Bad images are left out with their classes; the cache, which keeps images by number, changes nothing."""
    good = [{"bytes": png(image), "path": None} for image in PICTURES]
    rows = {"image": [{"bytes": b"no", "path": None} if n in (1, 6) else good[n] for n in range(12)], "label": CLASSES}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    table = datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "table"))
    options = {"train_data_dir": str(tmp_path / "table"), "resolution": [8], "class_labels": "label"}
    config = TrainConfig(on_bad_image="skip", train_batch_size=6, streaming=streaming, **options)
    feed, skipped = open_data(config), 0
    for batch in itertools.islice(feed.loader(0, 0, 1, {}, False), 8):
        assert [CLASSES[number] for number in numbers_of(batch, feed.scaling)] == batch.labels.tolist()
        skipped += len(batch.skipped)
    assert skipped >= 8


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_what_is_no_class():
    """The message has the source, the rule, the row and the value."""
    rule = "the column must hold a class for each row: a whole number of at least 0, or a text.*"
    for values, message in [
        ([0, None, 1, 0], rule + "; row 1 has no value, one of 1 such rows"),
        (["a", "", "a", None], rule + "; row 1 has no value, one of 2 such rows"),
        ([0, 1, -1, 0], rule + "; row 2 has -1"),
        (np.array([0.0, 0.5, 0.0]), rule + "; row 1 has 0.5"),
        (np.array([1.0, 1.0, math.nan]), rule + "; row 2 has no value"),
        (["a", "b", 3, "a"], rule + r"\(not both in one source\); row 2 has 3"),
        ([[0, 1], [1, 0]], rule + r"; row 0 has \[0, 1\], one of 2 such rows"),
        (np.zeros((3, 2), int), r"one-dimensional, with one class for each item, got \(3, 2\)"),
        (["a", "b", "c"], "another value in each of its 3 rows, so that it names rows"),
        ([5, 3, 4], "another value in each of its 3 rows"),
        (np.array([0, 1, 2**63, 2**63], np.uint64), "less than the number of items, 4; row 2 has 9223372036854775808"),
        (np.array([0, 1, 1e300, 1e300]), "less than the number of items, 4; row 2 has 1e\\+300"),
        ([0, 0, 1000], "less than the number of items, 3; row 2 has 1000"),
    ]:
        with pytest.raises(ValueError, match=message):
            Labels.read(values, "the column")
    with pytest.raises(ValueError, match="less than 2; row 1 has 2"):
        Labels.read([0, 2, 0], "the column", names=["a", "b"])
    with pytest.raises(ValueError, match="must have one class for each of the 5 rows of the data, got 2"):
        as_labels([0, 0], 5, "the column")


def test_numbers_and_names():
    for values in ([1, 0, 1], np.array([1.0, 0.0, 1.0]), torch.tensor([1, 0, 1]), [True, False, True],
                   [torch.tensor(1), np.int8(0), 1]):  # fmt: skip
        labels = Labels.read(values, "x")
        assert labels.numbers.tolist() == [1, 0, 1] and labels.numbers.dtype == np.int64 and labels.names == ("0", "1")
    labels = Labels.read(["b", "a", "b"], "x")
    assert labels.numbers.tolist() == [1, 0, 1] and labels.names == ("a", "b") and labels.counts() == [1, 2]
    gap = Labels.read([0, 2, 2, 0], "x")
    assert gap.counts() == [2, 0, 2]
    assert class_notes(gap.names, gap.counts()) == ["3 classes: 0 (2), 1 (0), 2 (2)",
                                                    "warning: no item to train on has the class 1"]  # fmt: skip
    many = class_notes([str(n) for n in range(30)], [0] * 30)
    assert "19 (0) and 10 more" in many[0] and "19 and 10 more" in many[1]


def test_texts_are_numbers_or_names(tmp_path):
    """Names with underscores are no numbers, as they are for Python."""
    for texts, names in ((["1", "0", "1.0"], ("0", "1")), (["0_1", "1_0", "0_1"], ("0_1", "1_0"))):
        (tmp_path / "labels.txt").write_text("\n".join(texts))
        assert read_label_file(str(tmp_path / "labels.txt"), 3).names == names
    with pytest.raises(ValueError, match="row 1 has no value"):
        (tmp_path / "labels.txt").write_text("1\n\n0\n1")
        read_label_file(str(tmp_path / "labels.txt"), 4)


def refused(message, dataset=None, **options):
    with pytest.raises(ValueError, match=message):
        open_data(TrainConfig(**options), dataset)


def test_sources_without_such_classes(sources, tmp_path):
    photos = sources["folder"][0]["train_data_dir"]
    refused("class_labels of a folder of images must be 'folder'.*got 'label'", train_data_dir=photos,
            class_labels="label")  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    refused("needs each image in a subfolder.*alone.png is in none", train_data_dir=str(tmp_path),
            class_labels="folder")  # fmt: skip
    refused("class_labels of the digits must be 'label', got 'y'", dataset_name="digits", class_labels="y")
    refused("class_labels applies to all data but", dataset_name="ecg", class_labels="y")
    table = sources["table"][0]
    refused("class_labels must be a column of .*: image, label, kind; got 'y'", **{**table, "class_labels": "y"})
    refused("ClassLabel column.*'kind' of .*class_encode_column", **{**table, "class_labels": "kind"}, streaming=True)
    npy, npz = (sources[name][0]["train_data_file"] for name in ("npy", "npz"))
    refused(r"class_labels must be a file \(.npy, .csv, .txt\)", train_data_file=npy, class_labels="label")
    refused("class_labels must be an array of .*data, classes; got 'y'", train_data_file=npz, class_labels="y")
    refused("cannot read the classes of .*no.txt", train_data_file=npy, class_labels=str(tmp_path / "no.txt"))
    (tmp_path / "short.txt").write_text("a\na\nb\n")
    refused("one class for each of the 12 rows of the data, got 3", train_data_file=npy,
            class_labels=str(tmp_path / "short.txt"))  # fmt: skip
    (tmp_path / "wide.csv").write_text("a,b\nc,d\n")
    refused("must have one column", train_data_file=npy, class_labels=str(tmp_path / "wide.csv"))
    csv = sources["csv"][0]
    refused("points in time of one recording", **csv, sequence_length=4, stride=2)
    refused("class_labels must be a column of .*kind, x0", **{**csv, "class_labels": "y"})
    refused(r"items \(x, y\) or dicts with 'y'; item 0 of .* is Tensor", [torch.zeros(1, 8, 8)] * 4, class_labels="y")
    refused("is a dict with image", [{"image": torch.zeros(1, 8, 8)}] * 4, class_labels="y")
    with pytest.raises(ValueError, match="class_labels must be a name or a file, got ''"):
        TrainConfig(class_labels="")


def test_torchvision_form():
    """`targets` and `classes` are read, and not the items, which have no classes here."""

    class Targets(list):
        targets, classes = CLASSES, NAMES

    feed = open_data(TrainConfig(class_labels="y"), Targets([torch.zeros(1, 8, 8)] * len(CLASSES)))
    assert feed.class_names == NAMES and feed.class_counts == [4, 4, 4]


def test_a_row_without_a_class_ends_a_stream(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": PICTURES, "label": [0] * 11 + [None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    options = {"train_data_dir": str(tmp_path / "table"), "resolution": [8], "class_labels": "label"}
    refused("row 11 has no value", **options)
    feed = open_data(TrainConfig(streaming=True, train_batch_size=12, **options))
    batch = next(iter(feed.loader(0, 0, 1, {}, False)))
    assert batch.items is None and "row 11 of shard 0 has no value" in batch.error


def test_the_fingerprint_covers_the_classes(sources):
    data = ImageDataset(PICTURES, (8, 8), labels=CLASSES)
    prints = [fingerprint(data, (3, 8, 8), Labels.read(values, "x"))
              for values in (CLASSES, CLASSES[::-1], [NAMES[c] for c in CLASSES])]  # fmt: skip
    assert len({p["labels"] for p in prints}) == 3 and len({p["digest"] for p in prints}) == 1
    assert prints[0]["digest"] == fingerprint(data, (3, 8, 8))["digest"]


def test_a_run_goes_on_with_the_same_classes_only(sources, tmp_path, capsys):
    """After step 2, as if it had not stopped; with other classes it is refused, and nothing is changed."""
    options, dataset = sources["pairs"]
    config = {**SMALL, **options, "train_batch_size": 5, "output_dir": str(tmp_path), "checkpointing_steps": 2}
    train(TrainConfig(**config, max_train_steps=2), dataset)
    assert "3 classes: 0 (4), 1 (4), 2 (4)" in capsys.readouterr().out
    progress = json.loads(next((tmp_path / "checkpoints").glob("*2/progress.json")).read_text())
    assert set(progress["data"]) == {"items", "shape", "digest", "labels"}
    others = [(x, 0 if y else 1) for x, y in dataset]
    with pytest.raises(ValueError, match=r"not that of the run in .* \(classes of the items\)"):
        train(TrainConfig(**config, max_train_steps=3), others)
    with pytest.raises(ValueError, match="class_labels: y -> None"):
        train(TrainConfig(**{**config, "class_labels": None}, max_train_steps=3), dataset)
    train(TrainConfig(**config, max_train_steps=3), dataset)
    feed = open_data(TrainConfig(**config), dataset)
    whole = [b.labels.tolist() for b in itertools.islice(feed.loader(0, 0, 1, {}, False), 6)]
    later = [b.labels.tolist() for b in itertools.islice(feed.loader(2, 0, 1, {}, False), 4)]
    assert later == whole[2:]


def test_a_stream_goes_on_with_the_same_classes(sources):
    feed = open_data(TrainConfig(train_batch_size=2, **sources["stream"][0]))
    whole = [(b.items, b.labels) for b in itertools.islice(feed.loader(0, 0, 1, {}, False), 8)]
    state = json.loads(json.dumps(feed.state(5)))
    later = [(b.items, b.labels) for b in itertools.islice(feed.loader(5, 0, 1, state, False), 3)]
    assert all(torch.equal(a, b) for one, two in zip(later, whole[5:]) for a, b in zip(one, two))


def test_dry_run_prints_the_classes(tmp_path, capsys):
    for label, name in enumerate(("a", "b")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2 + label):
            Image.fromarray(gradient()).save(tmp_path / "photos" / name / f"{number}.png")
    options = {"train_data_dir": str(tmp_path / "photos"), "class_labels": "folder", "resolution": [8], **SMALL}
    options.update(train_batch_size=2, output_dir=str(tmp_path / "run"))
    assert train(TrainConfig(dry_run=True, **options)) is None
    assert "2 classes: a (2), b (3)" in capsys.readouterr().out
    data = image_folder(str(tmp_path / "photos"), (8, 8), subfolder_classes=True)
    assert data.labels.names == ("a", "b") and len(StreamSampler(len(data), 2, 0)._permutation(0)) == 5
