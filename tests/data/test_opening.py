"""The door of the data: each kind of source is told from the options, and opened."""

import numpy as np
import pyarrow.parquet
import pytest

from ddpm_hf import TrainConfig
from ddpm_hf.data.opening import OPENERS, build_dataset, kind_of_source, open_data
from ddpm_hf.scope import KINDS


def test_every_kind_of_source_has_an_opener():
    assert set(OPENERS) == {kind for kind in KINDS if not kind.startswith("given")}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("digits", {"dataset_name": "digits"}),
        ("ecg", {"dataset_name": "ecg"}),
        ("array", {"train_data_file": "x.NPY"}),
        ("sequence file", {"train_data_file": "x.csv"}),
        ("image table", {"dataset_name": "me/photos"}),
        ("image stream", {"dataset_name": "me/photos", "streaming": True}),
        ("sequence table", {"dataset_name": "me/waves", "sequence_columns": ["a"]}),
    ],
)
def test_the_kind_follows_from_the_options(kind, options):
    assert kind_of_source(TrainConfig(**options)) == kind


@pytest.mark.parametrize("options", [{}, {"image_norm": "minmax"}])
def test_what_is_not_map_style_is_refused(options):
    """A dict of splits, as the datasets library gives it without a split, is no dataset."""
    for wrong in (iter([1]), {"train": [np.zeros((1, 8, 8))]}):
        with pytest.raises(ValueError, match=r"must be map-style .*dataset\['train'\].*, got (list_iterator|dict)"):
            open_data(TrainConfig(**options), wrong)
    with pytest.raises(ValueError, match="the data is empty"):
        open_data(TrainConfig(**options), [])


WINDOWS = {"stride": 4, "sequence_length": 4}


@pytest.mark.parametrize(
    ("text", "options", "names"),
    [
        ("a,b\n1,5\n", WINDOWS, ["a", "b"]),
        ("a,b,note\n1,5,x\n", WINDOWS, ["a", "b"]),
        (",a,b\n{},1,5\n", WINDOWS, ["a", "b"]),
        ("a,b\n1,5\n", {**WINDOWS, "sequence_columns": ["b", "a"]}, ["b", "a"]),
        ("a,b\n1,5\n", {**WINDOWS, "on_missing": "drop"}, ["a", "b"]),
        ("1,5\n1,5\n", WINDOWS, None),  # no header
        ("a,b\n1,5\n", {}, None),  # the columns are points in time
    ],
)
def test_channels_have_the_names_of_columns(text, options, names, tmp_path):
    """A column that counts the rows or holds texts is no channel."""
    head, row = text.splitlines()
    (tmp_path / "x.csv").write_text("\n".join([head, *(row.format(i) for i in range(9))]))
    data = build_dataset(TrainConfig(train_data_file=str(tmp_path / "x.csv"), **options))
    assert data.channel_names == names


def test_channels_have_the_names_of_columns_of_lists(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"u": [[1.0, 2.0]] * 3, "v": [[3.0, 4.0]] * 3}), tmp_path / "x.parquet")
    assert build_dataset(TrainConfig(train_data_file=str(tmp_path / "x.parquet"))).channel_names == ["u", "v"]
    table = {"train_data_dir": str(tmp_path), "sequence_columns": ["v", "u"]}
    assert build_dataset(TrainConfig(**table)).channel_names == ["v", "u"]
