"""Sequences: scaling in one pass, windows, and each format of file with what can be wrong in it."""

import itertools
import json
import os
import time

import datasets
import numpy as np
import pandas
import pytest
import torch
from helpers import config

from ddpm_hf import DDPMPipeline1D, TrainConfig
from ddpm_hf.data import open_data, sequences
from ddpm_hf.data.loading import hold_out, load_item, split_record, underlying
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.scaling import Scaling
from ddpm_hf.data.sequence_files import read_sequences
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.trainer.loop import Trainer


def test_sequences_are_scaled_by_channel_and_back(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 3, 8)) * np.array([1, 100, 0])[:, None] + 7
    np.save(tmp_path / "x.npy", array)
    mapped = read_sequences(str(tmp_path / "x.npy"))
    assert isinstance(mapped, np.memmap)
    data = SequenceDataset(mapped)
    x = torch.stack(list(data)).double().numpy()
    assert x[:, :2].min(axis=(0, 2)).tolist() == [-1, -1] and x[:, :2].max(axis=(0, 2)).tolist() == [1, 1]
    assert (x[:, 2] == 0).all()
    back = x * np.array(data.scaling.scale)[:, None] + np.array(data.scaling.shift)[:, None]
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
        np.testing.assert_allclose(data.scaling.shift, array.mean(axis=(0, 2)), rtol=1e-12)
        np.testing.assert_allclose(data.scaling.scale[:2], array.std(axis=(0, 2))[:2], rtol=1e-7)
        x = torch.stack(list(data))
        assert data.scaling.scale[2] == 0 and (x[:, 2] == 0).all()
        assert data.scaling.limit == pytest.approx(x.abs().max().item(), rel=1e-6)
    with pytest.raises(ValueError, match="minmax, meanstd, got 'max'"):
        SequenceDataset(array, norm="max")


def test_windows_are_slices():
    array = np.arange(3 * 2 * 10.0).reshape(3, 2, 10)
    data = SequenceDataset(array, length=4, stride=3)
    assert len(data) == 3 * 3 and data.windows == 3
    back = np.array(data.scaling.scale)[:, None] * data[4].double().numpy() + np.array(data.scaling.shift)[:, None]
    np.testing.assert_allclose(back, array[1, :, 3:7], atol=1e-5)
    one = SequenceDataset(np.arange(10.0), length=4, stride=3)  # a recording
    assert len(one) == 3 and one[2].shape == (1, 4) and one[2][0, -1] == 1
    with pytest.raises(IndexError):
        data[9]
    with pytest.raises(ValueError, match="go together"):
        SequenceDataset(array, length=4)
    for length, stride in ((4, 0), (4, -1), (0, 4)):
        with pytest.raises(ValueError, match=f"must be at least 1, got {length} and {stride}"):
            SequenceDataset(array, length=length, stride=stride)
    tensor = torch.from_numpy(array).requires_grad_()
    assert torch.equal(SequenceDataset(tensor, length=4, stride=3)[4], data[4])
    with pytest.raises(ValueError, match="stride needs sequence_length.*stride 2"):
        TrainConfig(train_data_file="x.npy", stride=2)


def points(part):
    """The values of each item, in the data's units: where each point has its own, the points that it is of."""
    scale, shift = underlying(part).scaling.scale[0], underlying(part).scaling.shift[0]
    return [tuple((part[i][0].double() * scale + shift).round().int().tolist()) for i in range(len(part))]


@pytest.mark.parametrize(
    ("count", "samples", "length", "stride", "held"),
    [
        (1, 1024, 256, 2, 10), (1, 1024, 256, 2, 129), (1, 1200, 8, 1, 7), (1, 1200, 8, 1, 300), (1, 100, 4, 3, 5),
        (1, 100, 4, 6, 5), (1, 80, 1, 10, 3), (1, 100, 10, 10, 6), (9, 50, 10, 3, 5), (9, 50, 10, 3, 40),
        (30, 6, 6, 1, 4),
    ],
)  # fmt: skip
def test_no_point_of_a_held_out_window_is_trained_on(count, samples, length, stride, held):
    """Nor, of a single recording, any point that is nearer than a window's length to it."""
    array = np.arange(count * samples, dtype=float).reshape(count, samples)
    data = SequenceDataset(array, length=length, stride=stride)
    windows = set(points(data))
    for seed in range(2):
        rest, test = hold_out(data, held, seed)
        assert len(set(points(test))) == len(test) == held and len(set(points(rest))) == len(rest) >= 1
        assert windows.issuperset(points(rest)) and windows.issuperset(points(test))
        trained, tested = (np.array(sorted({p for item in points(part) for p in item})) for part in (rest, test))
        distance = np.abs(trained[:, None] - tested).min()
        assert distance >= 1 if count > 1 else distance > length
        assert rest.scaling == Scaling((trained[[0, -1]].mean(),), ((trained[-1] - trained[0]) / 2,))
    seeds = {split_record(hold_out(data, held, seed)[1])["digest"] for seed in range(8)}
    assert len(seeds) > 1 and split_record(test) == split_record(hold_out(data, held, seed)[1])


def test_what_cannot_be_held_out():
    data = SequenceDataset(np.arange(1024.0), length=256, stride=2)
    with pytest.raises(ValueError, match="of the 385 windows of the array at most 129 can be held out, got 130"):
        hold_out(data, 130, 0)
    data = SequenceDataset(np.random.default_rng(0).normal(size=(3, 20)), length=5, stride=1)
    with pytest.raises(ValueError, match="3 of 16 windows each.* at most 32, got 33"):
        hold_out(data, 33, 0)
    sliding = np.lib.stride_tricks.sliding_window_view(np.arange(50.0), 10)
    with pytest.raises(ValueError, match="overlap in memory.*Give the recording itself"):
        hold_out(SequenceDataset(sliding), 3, 0)
    assert len(hold_out(SequenceDataset(sliding.copy(order="F")), 3, 0)[0]) == 38


def test_the_scale_is_of_the_training_part(tmp_path, monkeypatch):
    """Held-out values far outside of it change neither scale nor range, and are scaled like the others; as stored in
    files and tables, of whole sequences and of windows, in parts of any size."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(40, 2, 12))
    held = hold_out(SequenceDataset(array), 5, seed=3)[1].rows
    array[held[2], 1, 4] = 1e4
    np.save(tmp_path / "x.npy", array)
    lists = {name: array[:, channel].tolist() for channel, name in enumerate("ab")}
    datasets.Dataset.from_dict(lists).to_parquet(str(tmp_path / "x.parquet"))
    for name, part in (("x.npy", 1 << 22), ("x.npy", 50), ("x.parquet", 200)):
        monkeypatch.setattr(sequences, "PART", part)
        for norm, windows in itertools.product(("minmax", "meanstd"), ({}, {"sequence_length": 12, "stride": 1})):
            options = {"train_data_file": str(tmp_path / name), "sequence_norm": norm, **windows}
            feed = open_data(TrainConfig(holdout=5, seed=3, **options))
            alone = SequenceDataset(np.delete(array, held, axis=0), norm=norm)
            np.testing.assert_allclose(feed.scaling.scale, alone.scaling.scale, rtol=1e-12)
            np.testing.assert_allclose(feed.scaling.shift, alone.scaling.shift, rtol=1e-9, atol=1e-12)
            assert feed.scaling.limit == pytest.approx(alone.scaling.limit) and feed.items == 35
            outlier = load_item(feed.held_out, 2)[1, 4]  # evaluation reads it
            assert outlier == pytest.approx((1e4 - alone.scaling.shift[1]) / alone.scaling.scale[1])
            assert feed.notes == [f"held out: 5 items, in 5 of the 40 sequences of {tmp_path / name}"]


def test_a_constant_channel_is_named_and_comes_back(tmp_path):
    array = np.random.default_rng(0).normal(size=(16, 3, 16))
    array[:, 1], array[:, 2] = 3.0, 0.1
    np.save(tmp_path / "x.npy", array)
    options = {
        "dataset_name": None, "train_data_file": str(tmp_path / "x.npy"), "max_train_steps": 2, "learning_rate": 0.1,
        "holdout": 3, "eval_steps": 2, "eval_num_samples": 4, "ddpm_num_inference_steps": 2,
    }  # fmt: skip
    trainer = Trainer(config(tmp_path / "run", **options))
    told = trainer.description.splitlines()[-2:]
    assert [line.split(": ")[0].split(" of ")[0] for line in told] == ["channel 1", "channel 2"]
    assert all(line.endswith(end) for line, end in zip(told, ("its value, 3", "its value, 0.1")))
    trainer.run()
    pipe = DDPMPipeline1D.from_pretrained(tmp_path / "run" / "pipeline")
    samples = pipe(batch_size=4).sequences
    assert (samples[:, 1] == 3).all() and (samples[:, 2] == 0.1).all() and samples[:, 0].std() > 0
    values = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "eval/frechet" in r]
    assert all(np.isfinite(list(values[0].values())))
    encoded = pipe._encode(array, "the data").numpy()
    assert (encoded[:, 1:] == 0).all() and np.abs(encoded[:, 0]).max() > 0.5


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
    "comment": "# made by a logger, on Monday\na,b,c\n1,2,3\n4,5,6\n",
    "comment in front of numbers": "# a,b,c\n1,2,3\n# pause\n4,5,6\n",
    "quoted": '"1","2","3"\n"4","5","6"\n',
    "quoted names": '"a, in mV";"b";"c"\n1;2;3\n4;5;6\n',
    "blank lines first": "\n\n1,2,3\n4,5,6\n",
    "blank lines between": "a,b,c\n\n1,2,3\n\n4,5,6\n\n",
    "spaces": "1 2   3\n4 5 6\n",
    "spaces after separators": "a, b, c\n1, 2, 3\n4, 5, 6\n",
    "Windows": "1,2,3\r\n4,5,6\r\n",
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
    assert len(long) == 2 and long[0].shape == (3, 1) and long.scaling.scale == (1.5,) * 3
    with pytest.raises(ValueError, match="must be columns of .*got q"):
        read_sequences(str(path), ["q"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n4,5\n", "row 1 has '' in column '2'"),
        ("1,2\n4,5,6\n", "cannot read the table"),
        ("t,a\n2024-01-01,1\n2024-01-02,\n", "row 1 has '' in column 'a', one of 1.*--on_missing drop.*interpolate"),
        ("1,2\n3,inf\n", "'inf'"),
        ("a,b\n", "no rows"),
        ("", "no rows"),
        ("# nothing but this\n", "no rows"),
        ("a,b\n1,2,3\n4,5,6\n", "got 2 names and 3 values"),
        ("a,b,c\n1,2,3\n4,5,6,7\n", "cannot read the table"),
        ("a,b,c\n1,2\n", "got 3 names and 2 values"),
        ('1,"2,5"\n3,4\n', "row 0 has '2,5'"),
        ("1,2\n3,true\n", "row 1 has 'true'"),
        ("2024-01-01\n2024-01-02\n", "must have a column of numbers; 0 hold none"),
        ("a;b\n1,5;2\n2.5;3,5\n", "row 0 has '1,5' in column 'a', one of 2.*--csv_decimal ,"),
    ],
)
def test_bad_csv(text, message, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sequences(str(path))


def test_a_csv_of_many_columns_is_read_at_once(tmp_path):
    """Not column by column, which took nine times as long as pandas takes to read the file."""
    path = tmp_path / "x.csv"
    table = np.random.default_rng(0).normal(size=(2, 10_000))
    np.savetxt(path, table, delimiter=",", fmt="%.17g")

    def seconds(read):
        begun = time.process_time()
        table_read = np.asarray(read())
        return time.process_time() - begun, table_read

    plain = min(seconds(lambda: pandas.read_csv(path, header=None))[0] for _ in range(3))
    own, read = min((seconds(lambda: read_sequences(str(path))) for _ in range(3)), key=lambda pair: pair[0])
    np.testing.assert_allclose(read, table, rtol=0, atol=1e-15)  # pandas 2.2 rounds some numbers in their last digit
    assert own < 4 * plain


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
def test_what_is_no_file_is_refused(suffix, tmp_path):
    """A pipe, which would be waited for without end, a folder, and nothing."""
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("pipe", "folder", "none"):
        with pytest.raises(ValueError, match=f"must be a file on disk, got .*{name}"):
            read_sequences(str(tmp_path / f"{name}{suffix}"))


def test_csv_columns_by_name(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("t,a,b\nmon,1,2\ntue,3,4\nwed,5,6\n")
    data = build_dataset(
        TrainConfig(train_data_file=str(path), sequence_columns=["b", "a"], sequence_length=2, stride=1)
    )
    assert len(data) == 2 and data[0].tolist() == [[-1, 0], [-1, 0]] and data.scaling.shift == (4, 3)


def test_parquet_columns(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 8))
    path = str(tmp_path / "x.parquet")
    datasets.Dataset.from_dict({"a": a.tolist(), "b": b.tolist(), "name": ["n"] * 30}).to_parquet(path)
    monkeypatch.setattr(sequences, "PART", 50)
    data = build_dataset(TrainConfig(train_data_file=path, sequence_columns=["a", "b"]))
    assert len(data) == 30
    back = np.array(data.scaling.scale)[:, None] * data[7].double().numpy() + np.array(data.scaling.shift)[:, None]
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
