"""Tables of pictures: saved to disk, parquet, arrow, webdataset tars; found by folder or name."""

import re

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pytest
import torch
from helpers import PICTURES, save_tars, table
from PIL import Image

from ddpm_hf.config import TrainConfig
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.tables import ListColumns

FORMS = {
    "saved to disk": lambda folder: table(label=[0] * 6).save_to_disk(str(folder)),
    "saved with splits": lambda folder: datasets.DatasetDict(
        {"train": table(), "test": table(PICTURES[:1])}
    ).save_to_disk(str(folder)),
    "parquet": lambda folder: (folder.mkdir(), table().to_parquet(str(folder / "train-00000.parquet"))),
    "parquet in capitals": lambda folder: (folder.mkdir(), table().to_parquet(str(folder / "X.PARQUET"))),
    "arrow": lambda folder: (
        table().save_to_disk(str(folder.parent / "aside"))
        or (folder.parent / "aside").rename(folder)
        or (folder / "state.json").unlink()
    ),
    "tars": save_tars,
}


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_tables(form, tmp_path):
    FORMS[form](tmp_path / "data")
    data = build_dataset(TrainConfig(train_data_dir=str(tmp_path / "data"), resolution=[6]))
    assert len(data) == 6
    np.testing.assert_array_equal([((x[0, 0, 0] + 1) * 127.5).round() for x in data], [40 * i for i in range(6)])


def test_splits_names_and_columns(tmp_path):
    folder = str(tmp_path / "data")
    FORMS["saved with splits"](tmp_path / "data")
    assert len(build_dataset(TrainConfig(train_data_dir=folder, dataset_split="test"))) == 1
    assert len(build_dataset(TrainConfig(dataset_name=folder, dataset_split="test"))) == 1
    with pytest.raises(ValueError, match="one of train, test in .*got 'val'"):
        build_dataset(TrainConfig(train_data_dir=folder, dataset_split="val"))
    with pytest.raises(ValueError, match="image_column must be a column of .*: image; got 'picture'"):
        build_dataset(TrainConfig(train_data_dir=folder, image_column="picture"))
    two = table().add_column("mask", [b"x"] * 6).cast_column("mask", datasets.Image())
    two.save_to_disk(str(tmp_path / "two"))
    assert len(build_dataset(TrainConfig(train_data_dir=str(tmp_path / "two")))) == 6  # the one with a usual name
    two.rename_column("image", "photo").save_to_disk(str(tmp_path / "unclear"))
    with pytest.raises(ValueError, match="columns photo, mask.*--image_column"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path / "unclear")))


def test_pictures_in_a_folder_come_first(tmp_path):
    """A folder of images with a subfolder is read by ddpm_hf itself."""
    (tmp_path / "a").mkdir()
    PICTURES[1].save(tmp_path / "a" / "x.png")
    assert isinstance(build_dataset(TrainConfig(train_data_dir=str(tmp_path))).sources, list)


def test_tables_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the .parquet files of"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path)))
    (tmp_path / "x.tar").write_bytes(b"no")
    with pytest.raises(ValueError, match="files of .parquet, .tar"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path)))
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(ValueError, match="cannot read the .tar files"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path)))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # else it tries for a while
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="dataset_name 'no-such-data', split 'train', cannot be loaded"):
        build_dataset(TrainConfig(dataset_name="no-such-data"))


def test_a_bad_picture_in_a_table_is_named(tmp_path):
    bad = datasets.Dataset.from_dict({"image": [{"bytes": b"no", "path": None}] * 2}).cast_column(
        "image", datasets.Image()
    )
    bad.save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="cannot read the image number 1"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path / "bad")))[1]


def test_cached_pictures_are_the_same(tmp_path):
    """Crop and flip of a picture from memory: the bits of one decoded again; a full cache changes nothing."""
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 31, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    options = {"train_data_dir": str(tmp_path), "resolution": [8], "center_crop": False, "random_flip": True}
    plain = build_dataset(TrainConfig(**options, cache_gb=0))
    assert plain.cache is None
    for size in (1e-3, 3 * 8 * 12 * 3e-9):  # all, and three of six
        cached = build_dataset(TrainConfig(**options, cache_gb=size))
        for _ in range(2):
            for i in range(6):
                a, b = (d.load(i, np.random.default_rng(i)) for d in (plain, cached))
                assert torch.equal(a, b)
        assert (cached.cache.index[:-1, 0] > 0).sum() == (6 if size == 1e-3 else 3)
    assert len(build_dataset(TrainConfig(**{**options, "center_crop": True})).cache.memory) == 6 * 8 * 8 * 3
    for size in (1e9, 1e11):  # the second one is no number for the system
        with pytest.raises(ValueError, match=re.escape(f"cache_gb must be memory that there is, got {size}")):
            build_dataset(TrainConfig(**options, cache_gb=size))


LISTS = {
    "of float32": [pyarrow.list_(pyarrow.float32())] * 5,
    "of fixed size": [pyarrow.list_(pyarrow.float64(), 3)] * 5,
    "of whole numbers": [pyarrow.large_list(pyarrow.int16())] * 5,
    "of several types": [pyarrow.list_(kind) for kind in map(pyarrow.type_for_alias, ("f2", "f4", "f8", "i1", "i8"))],
}


@pytest.mark.parametrize("kind", LISTS)
def test_columns_of_lists_of_one_type_are_converted_together(kind, tmp_path, monkeypatch):
    """Any order of columns, rows in two files and a missing number: what pyarrow's lists say, by few of its calls."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-99, 99, (5, 7, 3)).tolist()  # column, row, place
    numbers[4][2][1] = None
    table = pyarrow.table({f"c{k}": pyarrow.array(numbers[k], type_) for k, type_ in enumerate(LISTS[kind])})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "data"), num_shards=2)
    lists = ListColumns(datasets.load_from_disk(str(tmp_path / "data")), ["c4", "c0", "c3", "c1", "c2"], "x")
    calls, lengths = [], pyarrow.compute.list_value_length
    monkeypatch.setattr(pyarrow.compute, "list_value_length", lambda *args: calls.append(1) or lengths(*args))
    expected = np.array([numbers[k] for k in (4, 0, 3, 1, 2)], np.float64).swapaxes(0, 1)
    for rows in (slice(2, 3), slice(0, 7), slice(3, 6)):
        found = lists[rows]
        np.testing.assert_array_equal(found, expected[rows])
        assert found.dtype == np.float64 and found.flags.c_contiguous and found.flags.writeable
    assert len(calls) == 3 * (5 if kind == "of several types" else 1)


@pytest.mark.parametrize("second", ["float32", "float64"])
@pytest.mark.parametrize("wrong", [[1.0], None])
def test_lists_of_another_length_are_named(second, wrong):
    columns = {"a": pyarrow.array([[1.0, 2], [3, 4]]), "b": pyarrow.array([[1.0, 2], wrong])}
    columns["b"] = columns["b"].cast(pyarrow.list_(getattr(pyarrow, second)()))
    lists = ListColumns(datasets.Dataset(pyarrow.table(columns)), ["a", "b"], "x")
    assert lists[:1].tolist() == [[[1, 2], [1, 2]]]
    with pytest.raises(ValueError, match=f"x: all lists must .* got {wrong and 1 or '2, None'}.* in column 'b' and"):
        lists[:2]
