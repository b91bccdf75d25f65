"""Recordings of differing length, in files of sound and signals or in the rows of an array, cut into windows.

Samples are read where a window asks for them: a window of a sound file costs one seek, and memory holds no recording.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_hf.data import sequences
from ddpm_hf.data.labels import Labels
from ddpm_hf.data.listing import list_folder
from ddpm_hf.data.mapped_array import mapped_file
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.randomness import Stream, derive_seed

SOUND = (".wav", ".flac")
SIGNALS = (".edf", ".hea")
ENDINGS = (*SOUND, *SIGNALS)
EXTRAS = {".wav": ("soundfile", "audio"), ".flac": ("soundfile", "audio"), ".edf": ("pyedflib", "signals"),
          ".hea": ("wfdb", "signals")}  # fmt: skip


class Recording(NamedTuple):
    """One recording.

    Attributes:
        name: its name in messages.
        channels, length: the numbers of its channels and of its samples.
        rate: samples a second, or None.
        read: called with the first sample and the last + 1; returns numbers (channels, samples).
        files: the files that it is read from.
        signals: names and units of its channels, where the file has them.
    """

    name: str
    channels: int
    length: int
    rate: float | None
    read: Callable[[int, int], np.ndarray]
    files: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()


def open_recordings(files: Sequence[str]) -> list[Recording]:
    """Open files of sound and signals: .wav, .flac, .edf, or the header .hea of a WFDB record.

    Raises:
        ValueError: a file cannot be read, the package for it is not installed, or two files differ in sample rate or
            number of channels.
    """
    found = []
    for path in files:
        suffix = Path(path).suffix.lower()
        package, extra = EXTRAS[suffix]
        opened = _open_sound if suffix in SOUND else _open_edf if suffix == ".edf" else _open_wfdb
        try:
            recording = opened(path)
            found.append(recording._replace(read=partial(_read_checked, recording)))
        except ImportError as error:
            raise ValueError(f'{path} needs the package {package}: pip install "ddpm_hf[{extra}]" ({error})') from error
        except Exception as error:  # each library raises its own kinds
            raise ValueError(f"cannot read the recording {path}: {error}") from error
        first, last = found[0], found[-1]
        for what in ("rate", "channels"):
            if getattr(first, what) != getattr(last, what):
                raise ValueError(
                    f"recordings must all have one {'sample rate' if what == 'rate' else 'number of channels'}, got "
                    f"{getattr(first, what):g} in {first.name} and {getattr(last, what):g} in {last.name}"
                )
    return found


# ---------------------------------------------------------------------------------------------
# Reading. What reads a recording is pickled with it where workers are not forks, so it is no function in a function


def _read_checked(recording: Recording, start: int, stop: int) -> np.ndarray:
    """Read samples of a recording; an error names it, also if it is shorter than its header says."""
    try:
        values = recording.read(start, stop)
    except Exception as error:  # each library raises its own kinds
        raise ValueError(f"cannot read the recording {recording.name} from sample {start:,} on: {error}") from error
    if values.shape != (recording.channels, stop - start):
        raise ValueError(
            f"the recording {recording.name} must have {recording.length:,} samples, as its header says; from "
            f"sample {start:,} on it has {values.shape[-1]:,}"
        )
    return values


def _open_sound(path: str) -> Recording:
    import soundfile

    facts = soundfile.info(path)
    return Recording(path, facts.channels, facts.frames, facts.samplerate, partial(_read_sound, path), (path,))


def _read_sound(path: str, start: int, stop: int) -> np.ndarray:
    import soundfile

    return soundfile.read(path, stop - start, start, dtype="float64", always_2d=True)[0].T


def _open_edf(path: str) -> Recording:
    import pyedflib

    with pyedflib.EdfReader(path) as file:
        channels, lengths = file.signals_in_file, file.getNSamples().tolist()
        rates = [file.getSampleFrequency(channel) for channel in range(channels)]
        names = file.getSignalLabels()
        units = [file.getPhysicalDimension(channel) for channel in range(channels)]
    if not channels:
        raise ValueError("it must have a signal, and has none")
    other = next((channel for channel in range(channels) if rates[channel] != rates[0]), None)
    if other is not None:
        raise ValueError(
            f"its channels must have one sample rate, got {rates[0]:g} in {names[0]!r} and {rates[other]:g} in "
            f"{names[other]!r}"
        )
    read = partial(_read_edf, path, channels)
    return Recording(path, channels, lengths[0], float(rates[0]), read, (path,), _signals(names, units))


def _read_edf(path: str, channels: int, start: int, stop: int) -> np.ndarray:
    import pyedflib

    with pyedflib.EdfReader(path) as file:
        return np.stack([file.readSignal(channel, start, stop - start) for channel in range(channels)])


def _open_wfdb(path: str) -> Recording:
    import wfdb

    record = str(Path(path).with_suffix(""))
    facts = wfdb.rdheader(record)
    beside = dict.fromkeys(str(Path(path).parent / name) for name in facts.file_name or ())
    signals, read = _signals(facts.sig_name or (), facts.units or ()), partial(_read_wfdb, record)
    return Recording(path, facts.n_sig, facts.sig_len, float(facts.fs), read, (path, *beside), signals)


def _read_wfdb(record: str, start: int, stop: int) -> np.ndarray:
    import wfdb

    return wfdb.rdrecord(record, sampfrom=start, sampto=stop).p_signal.T


def _read_row(array: Any, row: int, start: int, stop: int) -> np.ndarray:
    return np.asarray(array[row : row + 1][0, :, start:stop], dtype=np.float64)


def _signals(names: Sequence[str], units: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name} ({unit})" for name, unit in zip(names, units))


def rows_as_recordings(array: Any, name: str) -> list[Recording]:
    """Return the sequences of an array (N, C, length) as recordings, which are read when they are asked for."""
    file = mapped_file(array)
    files = (file,) if file else ()
    count, channels, length = array.shape
    return [
        Recording(f"row {row} of {name}", channels, length, None, partial(_read_row, array, row), files)
        for row in range(count)
    ]


class _Windows:
    """The windows of recordings as an array (windows, C, length) that is read when indexed."""

    dtype = np.dtype(np.float64)

    def __init__(self, recordings: Sequence[Recording], length: int, stride: int | None):
        self.recordings, self.length, self.stride = recordings, length, stride or 1
        counts = [((r.length - length) // self.stride + 1 if stride else 1) if r.length >= length else 0
                  for r in recordings]  # fmt: skip
        self.ends = np.cumsum(counts)  # the number of windows up to the end of each recording
        self.shape = (int(self.ends[-1]), recordings[0].channels, length)

    def __len__(self) -> int:
        return self.shape[0]

    def windows(self, number: int) -> tuple[int, int]:
        """Return the first window of a recording and the last + 1."""
        return int(self.ends[number - 1]) if number else 0, int(self.ends[number])

    def owner(self, windows: Any) -> np.ndarray:
        """Return the numbers of the recordings that windows lie in."""
        return np.searchsorted(self.ends, windows, side="right")

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = []
        for window in range(*rows.indices(len(self))):
            number = int(self.owner(window))
            start = (window - self.windows(number)[0]) * self.stride
            found.append(self.recordings[number].read(start, start + self.length))
        return np.stack(found)


class RecordingDataset(SequenceDataset):
    """Windows of recordings whose lengths may differ, in model units.

    Args:
        recordings: the recordings, with one number of channels.
        name: name of the data in messages.
        norm: as in `SequenceDataset`.
        length, stride: items are windows of `length` samples that begin every `stride` samples of each recording. With
            a length alone, each recording gives the window at its start; with neither, all must have one length.
        labels: the class of each recording; None: no classes.
        drop: windows with a missing value (NaN) are left out.
        missing: as in `SequenceDataset`.

    Raises:
        ValueError: lengths differ and no length is given, no window is left, or as in `SequenceDataset`.
    """

    def __init__(
        self, recordings: Sequence[Recording], name: str, norm: str = "minmax", length: int | None = None,
        stride: int | None = None, labels: Labels | None = None, drop: bool = False, missing: bool = False,
    ):  # fmt: skip
        if length is None:
            first = recordings[0]
            other = next((r for r in recordings if r.length != first.length), None)
            if other is not None:
                raise ValueError(
                    f"recordings of differing length need --sequence_length, and --stride for windows, got "
                    f"{first.length:,} samples in {first.name} and {other.length:,} in {other.name}"
                )
            length = first.length
        array = _Windows(recordings, length, stride)
        short = [r for r in recordings if r.length < length]
        if len(short) == len(recordings):
            longest = max(recordings, key=lambda r: r.length)
            raise ValueError(
                f"sequence_length must be at most the longest recording's {longest.length:,} samples "
                f"({longest.name}), got {length:,}"
            )
        self.rate = recordings[0].rate
        super().__init__(array, name, norm, missing=missing or drop)
        self.missing = missing
        if labels is not None:
            self.labels = labels
        if drop:
            self._drop()
        if short:
            self.notes.append(
                f"recordings of {name} shorter than {length:,} samples, which are left out: {len(short):,} of "
                f"{len(recordings):,}"
            )
        if self.rate:
            kind = "recordings" if len(recordings) > 1 else "recording"
            self.notes.append(f"{len(recordings):,} {kind} of {name}, {self.rate:g} samples a second")
        other = next((r for r in recordings if r.signals != recordings[0].signals), None)
        if other is None:
            self.channel_names = recordings[0].signals or None
        else:
            self.notes.append(
                f"warning: recordings have different channels, {', '.join(recordings[0].signals)} in "
                f"{recordings[0].name} and {', '.join(other.signals)} in {other.name}: they are taken for the same "
                "ones in the same order"
            )

    def _drop(self) -> None:
        """Leave out the windows with a missing value, and fit the scaling to the others."""
        kept = np.ones(len(self.array), dtype=bool)
        length, stride = self.array.length, self.array.stride
        for number, start, part in self._stretches(self.rows):
            first, stop = self.array.windows(number)
            for sample in start + np.flatnonzero(np.isnan(part).any(axis=0)):
                a = max(0, -(-(sample - length + 1) // stride))
                kept[first + a : min(stop, first + sample // stride + 1)] = False
        left = int(len(kept) - kept.sum())
        if left == len(kept):
            raise ValueError(
                f"--on_missing drop must leave an item, and all {left:,} of {self.name} have a missing value: "
                "--on_missing interpolate"
            )
        if left:
            self.rows = np.flatnonzero(kept)
            self.scaling = self.fit()
            self.notes.append(
                f"items of {self.name} with a missing value, which are left out: {left:,} of {len(kept):,}"
            )

    def _stretches(self, rows: Any) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (recording, first sample, float64 (C, samples)) over the samples that windows reach, each once."""
        rows = np.asarray(rows)
        owners, length = self.array.owner(rows), self.array.length
        most = max(1, sequences.PART // self.array.shape[1])
        starts = (rows - np.concatenate(([0], self.array.ends))[owners]) * self.array.stride
        breaks = np.flatnonzero((np.diff(owners) > 0) | (np.diff(starts) > length)) + 1
        # the windows between two breaks touch each other
        for a, b in zip(np.concatenate(([0], breaks)).tolist(), np.append(breaks, len(rows)).tolist()):
            number, last = int(owners[a]), int(starts[b - 1]) + length
            for start in range(int(starts[a]), last, most):
                yield number, start, self.array.recordings[number].read(start, min(start + most, last))

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, _, part in self._stretches(self.rows):
            yield np.array([number]), np.asarray(part, dtype=np.float64)[None]

    def _complaint(self, rows: list[int]) -> str:
        names = ", ".join(self.array.recordings[row].name for row in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return (
            f"recordings must hold finite numbers; NaN or infinity is in {names}{more}. For missing values: "
            "--on_missing drop leaves such windows out, and --condition known trains on what is known"
        )

    def per_item(self, values: np.ndarray) -> np.ndarray:
        return values[self.array.owner(np.asarray(self.rows))]

    @property
    def sequences(self) -> int:
        """The number of recordings, with those of which no item is left."""
        return len(self.array.recordings)

    def origin(self, index: int) -> tuple[int | str, int]:
        """Return the file of an item's recording, or its number in an array, and the item's first sample in it."""
        window = int(self.rows[index])
        number = int(self.array.owner(window))
        recording, start = self.array.recordings[number], (window - self.array.windows(number)[0]) * self.array.stride
        return number if recording.rate is None else recording.name, start

    def hold_out(self, count: int, seed: int) -> tuple["RecordingDataset", "RecordingDataset"]:
        """Split as `SequenceDataset.hold_out` does: whole recordings, or stretches of a single one."""
        rows, owners = np.asarray(self.rows), self.array.owner(np.asarray(self.rows))
        numbers = np.unique(owners)
        if len(numbers) == 1:
            first, stop = self.array.windows(int(numbers[0]))
            length, stride = self.array.length, self.array.stride
            held = sequences.held_out_stretches(stop - first, length, stride, count, seed, self.name)
            apart = sequences._apart(held, stop - first, length, stride)
            parts = [
                self.part(rows[np.isin(rows, np.concatenate([np.arange(first + a, first + b) for a, b in ranges]))],
                          self.ranges)
                for ranges in (apart, held)
            ]  # fmt: skip
        else:
            order = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT)).permutation(numbers)
            sizes = np.cumsum([int((owners == number).sum()) for number in order])
            chosen = int(np.searchsorted(sizes, count)) + 1
            if chosen >= len(order):
                raise ValueError(
                    f"holdout takes whole recordings of {self.name} and must leave one to train on: at most "
                    f"{int(sizes[-2]):,} windows, got {count:,}"
                )
            is_held = np.isin(owners, order[:chosen])
            parts = [self.part(rows[~is_held], self.ranges), self.part(rows[is_held], self.ranges)]
        rest, held_part = parts
        if not len(rest) or not len(held_part):
            raise ValueError(f"holdout must leave windows of {self.name} in both parts, got {count:,}")
        rest.scaling = rest.fit()
        held_part.use(rest.scaling)
        return rest, held_part

    def extent(self) -> str:
        owners = np.unique(self.array.owner(np.asarray(self.rows)))
        if len(self.array.recordings) > 1:
            return f"{len(owners):,} of the {len(self.array.recordings):,} recordings of {self.name}"
        return f"stretches of {self.name} (and the length of a window before and after is left out of training)"


def recording_files(path: str, listed: Sequence[str] | None = None) -> list[str]:
    """Return the recordings of a folder and its subfolders, or the file itself.

    Args:
        listed: the files of the folder, if they have been listed already.

    Raises:
        ValueError: there are none.
    """
    if not os.path.isdir(path):
        return [path]
    if listed is None:
        listed = list_folder(path).files
    found = [file for file in listed if Path(file).suffix.lower() in ENDINGS]
    if not found:
        raise ValueError(f"the folder {path} must hold recordings ({', '.join(ENDINGS)}); it has none")
    return found
