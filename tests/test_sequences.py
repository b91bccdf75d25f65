"""Sequences: scaling in one pass, windows, and each format of file with what can be wrong in it."""

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf import sequences
from ddpm_hf.config import TrainConfig
from ddpm_hf.data import build_dataset
from ddpm_hf.sequences import SequenceDataset, read_sequences


def test_sequences_are_scaled_by_channel_and_back(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 3, 8)) * np.array([1, 100, 0])[:, None] + 7
    np.save(tmp_path / "x.npy", array)
    mapped = read_sequences(str(tmp_path / "x.npy"))
    assert isinstance(mapped, np.memmap)
    data = SequenceDataset(mapped)
    x = torch.stack(list(data)).double().numpy()
    assert x[:, :2].min(axis=(0, 2)).tolist() == [-1, -1] and x[:, :2].max(axis=(0, 2)).tolist() == [1, 1]
    assert (x[:, 2] == 0).all()
    back = x * np.array(data.data_scale)[:, None] + np.array(data.data_shift)[:, None]
    np.testing.assert_allclose(back, array, atol=1e-4)  # float32 of values up to 400


def test_array_files(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "two.npz", data=x, other=x)
    np.savez(tmp_path / "unclear.npz", a=x, b=x)
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "text.txt").write_text("1,2")
    assert SequenceDataset(read_sequences(str(tmp_path / "one.npz")))[0].shape == (1, 4)
    assert read_sequences(str(tmp_path / "two.npz")).shape == (3, 4)
    for name, message in [("unclear.npz", "a, b"), ("objects.npy", "[Oo]bject"), ("cut.npy", "cut.npy"),
                          ("text.txt", "must end in"), ("none.npy", "No such file")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_sequences(str(tmp_path / name))


def test_bad_sequences():
    x = np.zeros((2000, 1, 4))
    x[3, 0, 1], x[1500, 0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="rows 3, 1500"):
        SequenceDataset(x)
    for wrong in (np.zeros(3), np.zeros((0, 1, 4)), np.zeros((2, 2, 2, 2))):
        with pytest.raises(ValueError, match=r"\(N, channels, length\)"):
            SequenceDataset(wrong)
    with pytest.raises(ValueError, match="real numbers"):
        SequenceDataset(np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="at least 5 samples"):
        SequenceDataset(np.zeros(4), length=5, stride=1)


def test_mean_and_deviation_in_one_pass(monkeypatch):
    """In parts of any size, the moments are NumPy's of the whole to rounding; the data's range is the largest |x|."""
    array = np.random.default_rng(0).normal(size=(37, 3, 11)) * np.array([1e-3, 100, 0])[:, None] + 1e3
    for part in (1, 50, 1 << 22):
        monkeypatch.setattr(sequences, "PART", part)
        data = SequenceDataset(array, norm="meanstd")
        # a sum of 407 terms of 1e3 is exact to 407 x 1e3 x 2^-53, deviations of 1e-3 to some 1e-10 of themselves
        np.testing.assert_allclose(data.data_shift, array.mean(axis=(0, 2)), rtol=1e-12)
        np.testing.assert_allclose(data.data_scale[:2], array.std(axis=(0, 2))[:2], rtol=1e-7)
        x = torch.stack(list(data))
        assert data.data_scale[2] == 1 and (x[:, 2] == 0).all()
        assert data.data_range == pytest.approx(x.abs().max().item(), rel=1e-6)
    with pytest.raises(ValueError, match="minmax, meanstd, got 'max'"):
        SequenceDataset(array, norm="max")


def test_windows_are_slices():
    array = np.arange(3 * 2 * 10.0).reshape(3, 2, 10)
    data = SequenceDataset(array, length=4, stride=3)
    assert len(data) == 3 * 3 and data.windows == 3
    back = np.array(data.data_scale)[:, None] * data[4].double().numpy() + np.array(data.data_shift)[:, None]
    np.testing.assert_allclose(back, array[1, :, 3:7], atol=1e-5)
    one = SequenceDataset(np.arange(10.0), length=4, stride=3)  # a recording
    assert len(one) == 3 and one[2].shape == (1, 4) and one[2][0, -1] == 1
    with pytest.raises(IndexError):
        data[9]
    with pytest.raises(ValueError, match="go together"):
        SequenceDataset(array, length=4)
    with pytest.raises(ValueError, match="stride needs sequence_length.*stride 2"):
        TrainConfig(train_data_file="x.npy", stride=2)


def test_a_file_larger_than_memory_is_not_read(tmp_path):
    """Windows of a memory-mapped file are views of the map."""
    np.save(tmp_path / "x.npy", np.zeros((4, 1000), np.float32))
    options = {"train_data_file": str(tmp_path / "x.npy"), "sequence_length": 10}
    for stride in (None, 5):
        assert isinstance(build_dataset(TrainConfig(**options, stride=stride)).array, np.memmap)


CSV = {
    "rows": "1,2,3\n4,5,6\n",
    "header": "a,b,c\n1,2,3\n4,5,6\n",
    "semicolons": "1;2;3\n4;5;6\n",
    "bom": "\ufeff1,2,3\n4,5,6\n",
    "tabs": "x\ty\tz\n1\t2\t3\n4\t5\t6",
}


@pytest.mark.parametrize("form", CSV)
def test_csv(form, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(CSV[form], encoding="utf-8")
    np.testing.assert_array_equal(read_sequences(str(path)), [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(read_sequences(str(path), as_recording=True), [[[1, 4], [2, 5], [3, 6]]])
    rows = build_dataset(TrainConfig(train_data_file=str(path)))
    assert len(rows) == 2 and rows[0].shape == (1, 3)
    long = build_dataset(TrainConfig(train_data_file=str(path), sequence_length=1, stride=1))
    assert len(long) == 2 and long[0].shape == (3, 1) and long.data_scale == [1.5] * 3
    with pytest.raises(ValueError, match="must be columns of .*got q"):
        read_sequences(str(path), ["q"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n4,5\n", "row 1 has 'nan' in column '2'"),
        ("1,2\n4,5,6\n", "cannot read the table"),
        ("t,a\n2024-01-01,1\n2024-01-02,2\n", "row 0 has '2024-01-01' in column 't', one of 2.*--sequence_columns"),
        ("1,2\n3,inf\n", "'inf'"),
        ("a,b\n", "no rows"),
        ("", "cannot read the table"),
    ],
)
def test_bad_csv(text, message, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sequences(str(path))


def test_csv_columns_by_name(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("t,a,b\nmon,1,2\ntue,3,4\nwed,5,6\n")
    data = build_dataset(
        TrainConfig(train_data_file=str(path), sequence_columns=["b", "a"], sequence_length=2, stride=1)
    )
    assert len(data) == 2 and data[0].tolist() == [[-1, 0], [-1, 0]] and data.data_shift == [4, 3]


def test_parquet_columns(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 8))
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"a": a.tolist(), "b": b.tolist(), "name": ["n"] * 30}).to_parquet(path)
    monkeypatch.setattr(sequences, "PART", 50)
    data = build_dataset(TrainConfig(train_data_file=path, sequence_columns=["a", "b"]))
    assert len(data) == 30
    back = np.array(data.data_scale)[:, None] * data[7].double().numpy() + np.array(data.data_shift)[:, None]
    np.testing.assert_allclose(back, [a[7], b[7]], atol=1e-6)
    cut = build_dataset(TrainConfig(train_data_file=path, sequence_columns=["b"], sequence_length=5))
    assert len(cut) == 30 and cut[0].shape == (1, 5)
    with pytest.raises(ValueError, match=r"name \(string\).*--sequence_columns"):
        read_sequences(path)
    datasets.Dataset.from_dict({"u": a[:, 0].tolist(), "v": b[:, 0].tolist()}).to_parquet(path)
    assert read_sequences(path, as_recording=True).shape == (1, 2, 30) and read_sequences(path).shape == (30, 2)
    datasets.Dataset.from_dict({"a": [[1.0, 2.0], [1.0]]}).to_parquet(path)
    with pytest.raises(ValueError, match="one length, got 1, 2 in column 'a'"):
        SequenceDataset(read_sequences(path))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="bad.parquet as parquet"):
        read_sequences(str(tmp_path / "bad.parquet"))


def test_sequences_by_dataset_name(tmp_path):
    table = datasets.Dataset.from_dict(
        {"wave": np.random.default_rng(0).normal(size=(9, 4)).tolist(), "label": [0] * 9}
    )
    table.save_to_disk(str(tmp_path / "saved"))
    data = build_dataset(TrainConfig(dataset_name=str(tmp_path / "saved"), sequence_columns=["wave"]))
    assert len(data) == 9 and data[0].shape == (1, 4)
