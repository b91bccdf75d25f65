"""Recordings: files of sound and signals, single long arrays, windows of differing recordings, and missing values."""

import json
import pickle

import numpy as np
import pytest
import torch
from helpers import config

from ddpm_hf import TrainConfig
from ddpm_hf.data import open_data, recordings, sequences
from ddpm_hf.data.loading import hold_out, underlying
from ddpm_hf.data.mapped import mapped_files
from ddpm_hf.data.opening import build_dataset, kind_of_source
from ddpm_hf.data.recordings import RecordingDataset, rows_as_recordings
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.run_data import READING
from ddpm_hf.trainer.loop import Trainer


def in_data_units(data, index):
    scaling = data.scaling
    return data[index].double().numpy() * np.array(scaling.scale)[:, None] + np.array(scaling.shift)[:, None]


def write(folder, suffix, lengths=(40, 25, 9), rate=100, channels=2):
    """Write recordings of these lengths; return them as (channels, length)."""
    rng, found = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths):
        x = rng.uniform(-0.9, 0.9, (channels, length))
        name = f"{'abcdef'[number]}{suffix}"
        if suffix in (".wav", ".flac"):
            soundfile = pytest.importorskip("soundfile")
            soundfile.write(folder / name, x.T, rate, subtype="PCM_24")
        elif suffix == ".edf":
            pyedflib = pytest.importorskip("pyedflib")
            with pyedflib.EdfWriter(str(folder / name), channels) as file:
                file.setDatarecordDuration(1 / rate * length)
                for channel in range(channels):
                    file.setSignalHeader(channel, {
                        "label": f"c{channel}", "dimension": "mV", "sample_frequency": rate, "physical_max": 1,
                        "physical_min": -1, "digital_max": 32767, "digital_min": -32768, "transducer": "",
                        "prefilter": "",
                    })  # fmt: skip
                file.writeSamples(list(x))
        else:
            wfdb = pytest.importorskip("wfdb")
            wfdb.wrsamp(name[:-4], fs=rate, units=["mV"] * channels, sig_name=[f"c{i}" for i in range(channels)],
                        p_signal=x.T, fmt=["16"] * channels, write_dir=str(folder))  # fmt: skip
        found.append(x)
    return found


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".hea"])
def test_folders_of_recordings(suffix, tmp_path):
    arrays = write(tmp_path / "r", suffix)
    (tmp_path / "r" / f"._a{suffix}").write_bytes(b"no sound")  # macOS leaves such files
    options = {"sequence_length": 10, "stride": 5}
    by_dir = TrainConfig(train_data_dir=str(tmp_path / "r"), **options)
    feed = open_data(TrainConfig(train_data_file=str(tmp_path / "r"), **options))
    assert feed.kind == "recordings" and feed.items == 7 + 4 == open_data(by_dir).items
    expected = [x[:, s : s + 10] for x in arrays[:2] for s in range(0, x.shape[1] - 9, 5)]
    for index, window in enumerate(expected):
        np.testing.assert_allclose(in_data_units(feed.dataset, index), window, atol=1e-4)
    low, high = (np.array([f(w[c]) for c in range(2)]) for f, w in
                 ((np.min, np.concatenate(expected, 1)), (np.max, np.concatenate(expected, 1))))  # fmt: skip
    np.testing.assert_allclose(feed.scaling.shift, (low + high) / 2, atol=1e-4)
    assert f"recordings of {tmp_path / 'r'} shorter than 10 samples, which are left out: 1 of 3" in feed.notes
    assert str(tmp_path / "r" / f"a{suffix}") in mapped_files(feed.dataset)
    one = build_dataset(TrainConfig(train_data_file=str(tmp_path / "r" / f"b{suffix}")))
    assert len(one) == 1 and one[0].shape == (2, 25)
    assert torch.equal(pickle.loads(pickle.dumps(one))[0], one[0])  # workers that are no forks need it


def test_edf(tmp_path):
    (x,) = write(tmp_path / "r", ".edf", (100,))
    data = build_dataset(TrainConfig(train_data_file=str(tmp_path / "r"), sequence_length=32, stride=16))
    assert len(data) == 5
    np.testing.assert_allclose(in_data_units(data, 3), x[:, 48:80], atol=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(data))[3], data[3])


def test_rows_of_an_array_are_pickled():
    rows = RecordingDataset(rows_as_recordings(np.arange(16.0).reshape(2, 1, 8), "x"), "x")
    assert torch.equal(pickle.loads(pickle.dumps(rows))[1], rows[1])


def test_recordings_that_do_not_fit(tmp_path):
    write(tmp_path / "r", ".wav")
    with pytest.raises(ValueError, match="need --sequence_length, .*got 40 samples in .*a.wav and 25 in .*b.wav"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path / "r")))
    with pytest.raises(ValueError, match="at most the longest recording's 40 samples .*a.wav.*got 50"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path / "r"), sequence_length=50))
    write(tmp_path / "r" / "s", ".wav", rate=50)
    with pytest.raises(ValueError, match="one sample rate, got 100 in .*a.wav and 50 in .*s/a.wav"):
        build_dataset(TrainConfig(train_data_dir=str(tmp_path / "r"), sequence_length=5, stride=1))
    (tmp_path / "bad.wav").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the recording .*bad.wav"):
        build_dataset(TrainConfig(train_data_file=str(tmp_path / "bad.wav")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold recordings"):
        build_dataset(TrainConfig(train_data_file=str(tmp_path / "empty")))
    (tmp_path / "r" / "cover.png").write_bytes(b"")
    assert kind_of_source(TrainConfig(train_data_dir=str(tmp_path / "r"))) == "folder"


def test_classes_of_recordings_are_their_folders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "r").mkdir(exist_ok=True)
        write(tmp_path / "r" / name, ".wav", (20, 10))
    feed = open_data(TrainConfig(train_data_dir=str(tmp_path / "r"), sequence_length=10, stride=5,
                                 class_labels="folder"))  # fmt: skip
    assert feed.class_names == ["cat", "dog"] and feed.item_labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("lengths", [(200,), (60, 80, 40, 30)])
def test_no_sample_of_a_held_out_window_of_a_recording_is_trained_on(lengths):
    ends = np.cumsum(lengths)
    arrays = [np.arange(b - a, dtype=float) + a for a, b in zip([0, *ends], ends)]
    recordings = [rows_as_recordings(x[None, None], "x")[0] for x in arrays]
    for seed in range(3):
        data = RecordingDataset(recordings, "x", length=8, stride=3)
        rest, held = hold_out(data, 5, seed)
        assert len(held) == 5 and underlying(held).scaling.shift == rest.scaling.shift
        seen, unseen = (
            {int(v) for i in range(len(part)) for v in np.rint(in_data_units(underlying(part), i)[0])} for part in
            (rest, underlying(held))
        )  # fmt: skip
        assert seen and not seen & unseen
    with pytest.raises(ValueError, match="holdout must leave|holdout takes whole recordings"):
        hold_out(data, len(data) - 1, 0)


def test_windows_with_missing_values_are_left_out_of_arrays(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(5, 2, 30))
    array[1, 0, 13] = array[1, 1, 29] = array[4, 0, :] = np.nan
    np.save(tmp_path / "x.npy", array)
    for windows in ({"sequence_length": 6, "stride": 4}, {"sequence_length": 12}, {}):
        feed = open_data(TrainConfig(train_data_file=str(tmp_path / "x.npy"), on_missing="drop", **windows))
        length, stride = windows.get("sequence_length", 30), windows.get("stride")
        starts = range(0, 31 - length, stride) if stride else (0,)
        expected = [w for x in array for s in starts if np.isfinite(w := x[:, s : s + length]).all()]
        assert feed.items == len(expected)
        for index, window in enumerate(expected):
            np.testing.assert_allclose(in_data_units(feed.dataset, index), window, atol=1e-6)
    with pytest.raises(ValueError, match="row 1 has nan in channel 0, sample 13. For missing values: --on_mis"):
        open_data(TrainConfig(train_data_file=str(tmp_path / "x.npy")))
    with pytest.raises(ValueError, match="row 4 of .* has NaN alone in channel 0"):
        open_data(TrainConfig(train_data_file=str(tmp_path / "x.npy"), on_missing="interpolate"))
    for wrong in (np.zeros(9), np.zeros((2, 2, 2, 2, 2)), np.zeros((3, 4), complex)):
        np.save(tmp_path / "x.npy", wrong)
        with pytest.raises(ValueError, match="must have the shape|must hold real numbers"):
            open_data(TrainConfig(train_data_file=str(tmp_path / "x.npy"), on_missing="drop"))


def test_interpolation_in_parts_of_any_size(tmp_path, monkeypatch):
    array = np.random.default_rng(0).normal(size=(6, 2, 40))
    for row, channel, a, b in ((0, 0, 3, 9), (2, 1, 0, 4), (2, 0, 38, 40), (5, 1, 7, 8)):
        array[row, channel, a:b] = np.nan
    expected = array.copy()
    for x, y in zip(array.reshape(-1, 40), expected.reshape(-1, 40)):
        gap = np.isnan(x)
        y[gap] = np.interp(np.flatnonzero(gap), np.flatnonzero(~gap), x[~gap])
    np.save(tmp_path / "x.npy", array)
    for part in (1 << 22, 50):
        monkeypatch.setattr(sequences, "PART", part)
        options = {"train_data_file": str(tmp_path / "x.npy"), "on_missing": "interpolate"}
        data = build_dataset(TrainConfig(**options, sequence_length=10, stride=7))
        alone = SequenceDataset(expected, length=10, stride=7)
        np.testing.assert_allclose(data.scaling.scale, alone.scaling.scale, rtol=1e-12)
        assert all((a == b).all() for a, b in zip(data, alone))


def test_one_long_recording_in_an_array(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 50))
    np.save(tmp_path / "x.npy", array)
    np.save(tmp_path / "t.npy", array.T)
    windows = {"sequence_length": 8, "stride": 4}
    path = str(tmp_path / "x.npy")
    one = build_dataset(TrainConfig(train_data_file=path, recording=True, **windows))
    last = build_dataset(
        TrainConfig(train_data_file=str(tmp_path / "t.npy"), recording=True, channels_last=True, **windows)
    )
    assert len(one) == len(last) == 11 and one[2].shape == (3, 8) and (one[2] == last[2]).all()
    np.testing.assert_allclose(in_data_units(one, 2), array[:, 8:16], atol=1e-6)
    with pytest.warns(UserWarning, match="3 sequences of one channel. If it is one recording of 3 channels: --record"):
        assert len(build_dataset(TrainConfig(train_data_file=path, **windows))) == 33
    np.save(tmp_path / "t1.npy", array[0])
    assert len(build_dataset(TrainConfig(train_data_file=str(tmp_path / "t1.npy"), **windows))) == 11
    with pytest.raises(ValueError, match=r"recording needs an array \(channels, points\), and stride"):
        build_dataset(TrainConfig(train_data_file=path, recording=True))


def test_channels_last(tmp_path):
    array = np.random.default_rng(0).normal(size=(40, 32, 2))
    path = str(tmp_path / "x.npy")
    np.save(path, array)
    with pytest.warns(UserWarning, match="taken for 32 channels of length 2, .*last axis is time.*--channels_last"):
        assert build_dataset(TrainConfig(train_data_file=path))[0].shape == (32, 2)
    data = build_dataset(TrainConfig(train_data_file=path, channels_last=True))
    assert data[0].shape == (2, 32) and isinstance(data.array, np.memmap)
    np.testing.assert_allclose(in_data_units(data, 7), array[7].T, atol=1e-6)
    np.save(path, array[0])
    with pytest.raises(ValueError, match=r"channels_last needs an array \(N, length, channels\)"):
        build_dataset(TrainConfig(train_data_file=path, channels_last=True))
    assert {"channels_last", "recording", "on_missing", "csv_decimal"} <= set(READING)


def test_the_scan_of_a_large_file_is_kept_beside_the_run(tmp_path, monkeypatch):
    """The second start reads nothing of it but its items; a changed file is read again."""
    passes = []
    plain = SequenceDataset._pass
    monkeypatch.setattr(SequenceDataset, "_pass", lambda self: passes.append(1) or plain(self))
    monkeypatch.setattr(sequences, "KEPT_FROM", 0)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 2, 16)))
    options = config(
        tmp_path / "run", dataset_name=None, train_data_file=str(tmp_path / "x.npy"), max_train_steps=1, holdout=3,
        sequence_norm="meanstd",
    )  # fmt: skip
    first = Trainer(options)
    assert len(passes) == 3 and not (tmp_path / "run").exists()
    first.run()
    assert len(json.loads((tmp_path / "run" / sequences.SCANS).read_text())) == 3
    second = Trainer(options)
    assert len(passes) == 3 and second.feed.scaling == first.feed.scaling
    (tmp_path / "run" / sequences.SCANS).write_text("no")
    Trainer(options)
    assert len(passes) == 6


def test_what_a_recording_has_no_class_for_and_which_conditions_it_takes(tmp_path):
    """Conditions (points,), (channels, points) or, with the channels last, (points, channels); no classes."""
    array, condition = np.random.default_rng(0).normal(size=(3, 50)), np.random.default_rng(1).normal(size=(2, 50))
    file = str(tmp_path / "x.npz")
    windows = {"train_data_file": file, "sequence_length": 8, "stride": 4}
    np.savez(file, data=array, other=condition, one=condition[0], kind=np.zeros(1, int))
    first = build_dataset(TrainConfig(**windows, recording=True, condition_column="other"))
    np.testing.assert_allclose(in_data_units(first.condition, 2), condition[:, 8:16], atol=1e-6)
    one = build_dataset(TrainConfig(**windows, recording=True, condition_column="one"))
    np.testing.assert_allclose(in_data_units(one.condition, 2), condition[:1, 8:16], atol=1e-6)
    reason = "class_labels needs a class for each sequence, and .*x.npz holds one recording.*got 'kind'"
    with pytest.raises(ValueError, match=reason):
        build_dataset(TrainConfig(**windows, recording=True, class_labels="kind"))
    np.savez(file, data=array.T, other=condition.T)
    last = {"recording": True, "channels_last": True, "condition_column": "other"}
    last = build_dataset(TrainConfig(**windows, **last))
    assert torch.equal(last.condition[2], first.condition[2]) and torch.equal(last[2], first[2])
    np.savez(file, data=array[0], other=condition[0], kind=np.zeros(1, int))
    single = build_dataset(TrainConfig(**windows, condition_column="other"))
    assert torch.equal(single.condition[2], one.condition[2])
    with pytest.raises(ValueError, match=reason):
        build_dataset(TrainConfig(**windows, class_labels="kind"))
    np.save(tmp_path / "t.npy", array.T)
    with pytest.warns(UserWarning, match="one recording of 50 channels and 3 points.*with --channels_last"):
        build_dataset(TrainConfig(train_data_file=str(tmp_path / "t.npy"), recording=True, sequence_length=2, stride=1))


def test_damaged_recordings_are_named(tmp_path):
    """A file that ends before its header says, and signals that are gone."""
    folder = {"train_data_dir": str(tmp_path), "sequence_length": 64, "stride": 64}
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 20_000), 8000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"the recording .*a\.flac"):
        build_dataset(TrainConfig(**folder))
    (tmp_path / "a.flac").unlink()
    wfdb_record(tmp_path, "r", np.zeros((100, 2)) + np.arange(100)[:, None])
    (tmp_path / "r.dat").unlink()
    with pytest.raises(ValueError, match=r"cannot read the recording .*r\.hea from sample 0 on: .*r\.dat"):
        build_dataset(TrainConfig(**folder))
    short = recordings.Recording("x", 1, 9, None, lambda start, stop: np.zeros((1, 2)))
    with pytest.raises(ValueError, match="x must have 9 samples, as its header says; from sample 3 on it has 2"):
        recordings._read_checked(short, 3, 8)


def test_missing_samples_and_other_channels_of_recordings(tmp_path):
    values = np.random.default_rng(0).normal(size=(100, 2))
    values[5:20, 0] = np.nan
    wfdb_record(tmp_path, "r", values)
    folder = {"train_data_dir": str(tmp_path), "sequence_length": 16, "stride": 16}
    with pytest.raises(ValueError, match="NaN or infinity is in .*r.hea. For missing values: --on_missing drop"):
        build_dataset(TrainConfig(**folder))
    assert len(build_dataset(TrainConfig(**folder, on_missing="drop"))) == 4
    known = build_dataset(TrainConfig(**folder, on_missing="mask", condition="known"))
    assert len(known) == 6 and known.missing and known.gaps == 15
    for option, message in (
        ("interpolate", "on_missing must be stop, drop or mask"),
        ("mask", "needs --condition known"),
    ):
        with pytest.raises(ValueError, match=message):
            build_dataset(TrainConfig(**folder, on_missing=option))
    wfdb_record(tmp_path, "s", np.nan_to_num(values), names=("II", "I"))
    notes = build_dataset(TrainConfig(**folder, on_missing="drop")).notes
    assert any("different channels, I (mV), II (mV) in" in note and "same order" in note for note in notes)


def wfdb_record(folder, name, values, names=("I", "II")):
    wfdb = pytest.importorskip("wfdb")
    wfdb.wrsamp(name, fs=100, units=["mV"] * 2, sig_name=list(names), p_signal=values, fmt=["16"] * 2,
                write_dir=str(folder))  # fmt: skip
