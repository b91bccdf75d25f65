"""Tables in .csv files: decimal commas, dates, columns of texts, missing values, and large files."""

from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest

from ddpm_hf import TrainConfig
from ddpm_hf.data import csv_files, open_data
from ddpm_hf.data.csv_files import read_csv
from ddpm_hf.data.opening import build_dataset

COMMAS = {
    "semicolons": "1,5;2;3\n4;-5,25;6,0\n",
    "more commas than semicolons": "1,5;2,0;3,0\n4,0;-5,25;6,0\n",
    "tabs": "a\tb\tc\n1,5\t2,0\t3\n4,0\t-5,25\t6,0\n",
    "names with commas": '"a, in mV";"b";"c"\n1,5;2;3\n4;-5,25;6\n',
    "day-first dates": "date;a;b;c\n31.12.2024 10:00;1,5;2;3\n01.01.2025 10:00;4;-5,25;6\n",
    "no header": "31.12.2024;1,5;2;3\n01.01.2025;4;-5,25;6\n",
    "spaces": "1,5 2,0 3,0\n4,0 -5,25 6,0\n",
    "a month's name, no header": "31-Dec-2024;1,5;2;3\n01-Jan-2025;4;-5,25;6\n",
}


@pytest.mark.parametrize("form", COMMAS)
@pytest.mark.parametrize("big", [False, True])
def test_decimal_commas_are_found(form, big, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "BIG", 0 if big else 1 << 26)
    path = tmp_path / "x.csv"
    path.write_text(COMMAS[form])
    notes = []
    np.testing.assert_array_equal(read_csv(str(path), notes=notes), [[1.5, 2, 3], [4, -5.25, 6]])
    assert notes[0] == f"decimal commas were found in {path}; to read it otherwise: --csv_decimal ."
    dates = "date" in form or "no header" in form
    assert len(notes) == 1 + dates
    if dates:
        name = "date" if "date" in form else "0"
        assert notes[1] == f"columns of {path} that hold no numbers are left out: {name}"


def test_the_decimal_mark_can_be_given(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("1,5\n2,5\n")  # two columns, or one
    assert build_dataset(TrainConfig(train_data_file=str(path)))[0].shape == (1, 2)
    one = build_dataset(TrainConfig(train_data_file=str(path), csv_decimal=","))
    assert one[0].shape == (1, 1) and one.scaling.shift == (2.0,)
    with pytest.raises(ValueError, match="csv_decimal must be '.' or ','"):
        TrainConfig(train_data_file=str(path), csv_decimal=";")
    for name in ("x.npy", "x.parquet"):
        with pytest.raises(ValueError, match="csv_decimal applies to"):
            build_dataset(TrainConfig(train_data_file=name, csv_decimal=","))


def test_columns_of_texts_are_named_or_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("t,a,who\nmon,1,x\ntue,3,y\nwed,5,z\n")
    feed = open_data(TrainConfig(train_data_file=str(path), sequence_length=2, stride=1))
    assert feed.shape == (1, 2)
    assert f"columns of {path} that hold no numbers are left out: t, who" in feed.notes
    with pytest.raises(ValueError, match="row 0 has 'mon' in column 't', one of 3"):
        read_csv(str(path), ["a", "t"])


@pytest.mark.parametrize("big", [False, True])
def test_row_numbers_are_left_out(big, tmp_path, monkeypatch):
    """As pandas writes them: a first column without a name that counts; not one with a name, or that is asked for."""
    monkeypatch.setattr(csv_files, "BIG", 0 if big else 1 << 26)
    path = tmp_path / "x.csv"
    path.write_text(",a,b\n0,1,2\n1,3,4\n")
    notes = []
    np.testing.assert_array_equal(read_csv(str(path), notes=notes), [[1, 2], [3, 4]])
    assert notes == [f"the first column of {path}, which has no name and counts the rows, is left out"]
    path.write_text("n,a,b\n0,1,2\n1,3,4\n")
    assert read_csv(str(path)).shape == (2, 3)
    path.write_text(",a,b\nx,0,2\ny,1,4\n")  # names of the rows, and a column that counts by chance
    np.testing.assert_array_equal(read_csv(str(path)), [[0, 2], [1, 4]])
    path.write_text("0,1,2\n1,3,4\n")
    assert read_csv(str(path)).shape == (2, 3)


GAPS = "a,b\n0,1\n,2\n4,NaN\n6,n/a\n8,7\n8,8\n"


@pytest.mark.parametrize("big", [False, True])
def test_missing_values(big, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "BIG", 0 if big else 1 << 26)
    path = tmp_path / "x.csv"
    path.write_text(GAPS)
    options = {"train_data_file": str(path), "sequence_length": 2, "stride": 1}
    with pytest.raises(ValueError, match="row 1 has '' in column 'a', one of 3 such cells. For missing values: --on_m"):
        open_data(TrainConfig(**options))
    filled = open_data(TrainConfig(**options, on_missing="interpolate"))
    assert f"missing values of {path}, which are interpolated: 3" in filled.notes
    found = np.stack([filled.dataset[i].double().numpy() for i in range(5)])
    found = found * np.array(filled.scaling.scale)[:, None] + np.array(filled.scaling.shift)[:, None]
    expected = np.array([[0, 2, 4, 6, 8, 8], [1, 2, 11 / 3, 16 / 3, 7, 8]])
    np.testing.assert_allclose(found, np.stack([expected[:, i : i + 2] for i in range(5)]), atol=1e-6)
    left = open_data(TrainConfig(**options, on_missing="drop"))
    assert left.items == 1 and f"items of {path} with a missing value, which are left out: 4 of 5" in left.notes
    assert left.scaling.shift == (8, 7.5) and left.scaling.scale == (0, 0.5)
    with pytest.raises(ValueError, match="on_missing 'mask' needs --condition known"):
        open_data(TrainConfig(**options, on_missing="mask"))
    assert np.isnan(open_data(TrainConfig(**options, on_missing="mask", condition="known")).dataset[1].numpy()).any()


@pytest.mark.parametrize("missing", [False, True])
def test_large_files_are_read_as_float32_where_that_is_enough(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "BIG", 0)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 3))
    path = tmp_path / "x.csv"
    np.savetxt(path, table, delimiter=",", fmt="%.17g", header="a,b,c", comments="")
    for by_column in (False, True):
        read = read_csv(str(path), missing=missing, by_column=by_column)
        assert read.dtype == np.float32 and read.T.flags.c_contiguous == by_column
        np.testing.assert_array_equal(read, table.astype(np.float32))
    np.testing.assert_array_equal(read_csv(str(path), ["c", "a"]), table[:, [2, 0]].astype(np.float32))
    table[:, 1] += 1.7e9  # time stamps: float32 has steps of 128 there
    np.savetxt(path, table, delimiter=",", fmt="%.17g")
    read = read_csv(str(path), missing=missing)
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, table)


@pytest.mark.parametrize("by_column", [False, True])
def test_a_large_file_takes_less_than_twice_its_array(by_column, tmp_path, monkeypatch):
    """The blocks of the file are freed while the array is filled from them."""
    monkeypatch.setattr(csv_files, "BIG", 0)
    path = tmp_path / "x.csv"
    path.write_text("".join(",".join([str(k)] * 8) + "\n" for k in range(1000)) * 300)
    usual, held = pyarrow.default_memory_pool(), []
    counted = pyarrow.proxy_memory_pool(usual)
    recorder = SimpleNamespace(release_unused=lambda: held.append(counted.bytes_allocated()))
    monkeypatch.setattr(pyarrow, "default_memory_pool", lambda: recorder)
    pyarrow.set_memory_pool(counted)
    try:
        size = read_csv(str(path), by_column=by_column).nbytes
    finally:
        pyarrow.set_memory_pool(usual)
    filled = size / len(held) * np.arange(1, len(held) + 1)  # the parts of the array that were written
    assert size == 300_000 * 8 * 4 and len(held) > 5 and held[-1] == 0
    assert counted.max_memory() < 1.7 * size and (np.array(held) + filled).max() < 1.3 * size


def test_large_files_with_comments_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "BIG", 0)
    path = tmp_path / "x.csv"
    path.write_text("# logger\n\na, b\n1, 2\n# pause\n3, 4\n")
    np.testing.assert_array_equal(read_csv(str(path)), [[1, 2], [3, 4]])
