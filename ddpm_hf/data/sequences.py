"""Sequences from arrays and tables: scaled by channel in one pass over the data, cut into windows where asked.

What is held out of training shares no data with the rest, and the scaling is that of the rest (a second pass).
Arrays are read in parts and indexed lazily, so a memory-mapped file may be larger than the memory.
"""

import copy
import csv
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddpm_hf.options import SEQUENCE_NORMS
from ddpm_hf.randomness import Stream, derive_seed

FILE_ENDINGS = (".npy", ".npz", ".csv", ".parquet")
PART = 1 << 22  # numbers looked at together, 32 MiB of float64


class SequenceDataset(Dataset):
    """Sequences scaled channel by channel.

    Args:
        array: (N, C, length) finite numbers, or (N, length) for one channel; an array, or what has `shape` and `dtype`
            and gives arrays for `[a:b]` (memory-mapped files, `ListColumns`).
        name: what to call the array in messages.
        norm: "minmax": to [-1, 1] by the channel's range; "meanstd": to mean 0 and standard deviation 1.
        length, stride: make items of every `stride`-th window of `length` samples of each sequence; a recording may
            then also be one-dimensional. None: whole sequences.

    Attributes:
        data_shift, data_scale: per channel, data = x * scale + shift for the x that items are; a channel that never
            changes has the scale 0, and its x is 0.
        data_range: largest |x|: 1 for "minmax" (up to rounding), measured for "meanstd".
        rows, ranges: the sequences and the (first, last + 1) windows of each that items are of; all, but in the parts
            that `hold_out` makes.

    Raises:
        ValueError: another number of dimensions, no sequences, not numbers, NaN or infinity (the rows are named), or
            sequences shorter than a window.
    """

    def __init__(
        self,
        array: Any,
        name: str = "the array",
        norm: str = "minmax",
        length: int | None = None,
        stride: int | None = None,
    ):
        if norm not in SEQUENCE_NORMS:
            raise ValueError(f"sequence_norm must be one of {', '.join(SEQUENCE_NORMS)}, got {norm!r}")
        if (length is None) != (stride is None):
            raise ValueError(f"length and stride of windows go together, got {length} and {stride}")
        array = array if hasattr(array, "shape") and hasattr(array, "dtype") else np.asarray(array)
        if array.dtype.kind not in "iufb":
            raise ValueError(f"{name} must hold real numbers, got the type {array.dtype}")
        if len(array.shape) == 1 and stride is not None:
            array = array[None, None, :]
        elif len(array.shape) == 2:
            array = array[:, None, :]
        if len(array.shape) != 3 or 0 in array.shape:
            raise ValueError(f"{name} must have the shape (N, channels, length), got {tuple(array.shape)}")
        self.array, self.name = array, name
        self.length, self.stride = length or array.shape[2], stride or 1
        if self.length > array.shape[2]:
            raise ValueError(f"{name} must have at least {self.length} samples a sequence, got {array.shape[2]}")
        self.windows = (array.shape[2] - self.length) // self.stride + 1 if stride else 1
        self.norm, self.rows, self.ranges = norm, range(array.shape[0]), [(0, self.windows)]
        self._scale()

    def _scale(self) -> None:
        """Take the scaling from the items of this data set."""
        low, high, mean, deviation = self._measure()
        spread = (high - low) / 2 if self.norm == "minmax" else deviation
        # the mean of equal numbers is off by rounding
        shift = np.where(high > low, (high + low) / 2 if self.norm == "minmax" else mean, low)
        scale = np.where(high > low, np.where(spread > 0, spread, 1.0), 0.0)
        self.data_shift, self.data_scale = shift.tolist(), scale.tolist()
        self.data_range = 1.0 if self.norm == "minmax" else self._largest(low, high)

    def _largest(self, low: np.ndarray, high: np.ndarray) -> float:
        """The largest |x| of channels between `low` and `high`."""
        x = [self.scaled(limit[:, None]) for limit in (low, high)]
        return float(np.abs(x).max()) or 1.0

    def scaled(self, part: np.ndarray) -> np.ndarray:
        """Data (C, samples) -> x, float64."""
        shift, scale = (np.array(values)[:, None] for values in (self.data_shift, self.data_scale))
        return np.where(scale > 0, part - shift, 0.0) / np.where(scale > 0, scale, 1.0)

    def constants(self) -> dict[int, float]:
        """The channels that never change, with their values."""
        return {channel: self.data_shift[channel] for channel, scale in enumerate(self.data_scale) if scale == 0}

    def _measure(self) -> tuple:
        """Low, high, mean and deviation of each channel in one pass (moments joined as Chan, Golub, LeVeque 1983)."""
        channels = self.array.shape[1]
        low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
        count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        bad: set[int] = set()
        for rows, part in self._parts():
            wrong = ~np.isfinite(part).all(axis=(1, 2))
            bad.update(rows[wrong].tolist())
            if wrong.any():
                continue
            low, high = np.minimum(low, part.min(axis=(0, 2))), np.maximum(high, part.max(axis=(0, 2)))
            n, part_mean = part.shape[0] * part.shape[2], part.mean(axis=(0, 2))
            delta = part_mean - mean
            squares += ((part - part_mean[:, None]) ** 2).sum(axis=(0, 2)) + delta**2 * count * n / (count + n)
            mean, count = mean + delta * n / (count + n), count + n
        if bad:
            listed = sorted(bad)
            more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
            raise ValueError(f"{self.name} has NaN or infinity in rows {', '.join(map(str, listed[:10]))}{more}")
        return low, high, mean, np.sqrt(squares / count)

    def _parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of n sequences, float64 (n, C, samples)) over all that the windows can reach."""
        count, channels, _ = self.array.shape
        reached = [(a * self.stride, (b - 1) * self.stride + self.length) for a, b in self.ranges]
        longest = max(stop - start for start, stop in reached)
        rows = max(1, PART // (channels * longest))
        samples = longest if rows > 1 else max(1, PART // channels)
        for first in range(0, count, rows):
            own = np.arange(first, min(first + rows, count))
            if not isinstance(self.rows, range):  # a part of them
                own = self.rows[slice(*np.searchsorted(self.rows, (first, first + rows)))]
            if not len(own):
                continue
            among = slice(None) if len(own) == own[-1] + 1 - own[0] else own - own[0]
            for start, stop in reached:
                for sample in range(start, stop, samples):
                    part = self.array[own[0] : own[-1] + 1][:, :, sample : min(sample + samples, stop)]
                    yield own, np.asarray(part[among], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.rows) * sum(b - a for a, b in self.ranges)

    def __getitem__(self, index: int) -> Tensor:
        """Float32 (C, length), scaled."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} sequences")
        row, window = self.place(int(index) % len(self))
        start = window * self.stride
        part = np.asarray(self.array[row : row + 1][0, :, start : start + self.length], dtype=np.float64)
        return torch.from_numpy(self.scaled(part).astype(np.float32))

    def place(self, index: int) -> tuple[int, int]:
        """(number of the sequence in the array, number of the window in it) of an item."""
        row, window = divmod(index, sum(b - a for a, b in self.ranges))
        for first, stop in self.ranges:
            if window < stop - first:
                break
            window -= stop - first
        return int(self.rows[row]), first + window

    def hold_out(self, count: int, seed: int) -> tuple["SequenceDataset", "SequenceDataset"]:
        """Split into (a part to train on, a part of at least `count` items that shares no data with it).

        Whole sequences are held out, with all their windows, where there are several. Of a single one stretches are,
        and a window's length before and after each of them is left out of both parts. Both are scaled as the
        first one needs.

        Raises:
            ValueError: nothing would be left to train on, or the array's rows overlap each other.
        """
        total = self.array.shape[0]
        if total == 1:
            held = held_out_stretches(self.windows, self.length, self.stride, count, seed, self.name)
            apart = _apart(held, self.windows, self.length, self.stride)
            parts = self._part(self.rows, apart), self._part(self.rows, held)
        else:
            if isinstance(self.array, np.ndarray) and np.shares_memory(self.array[0], self.array[1]):
                raise ValueError(
                    f"the rows of {self.name} overlap in memory, as those of a sliding window: what is held out would "
                    "be trained on. Give the recording itself, with the length and stride of its windows"
                )
            number = -(-count // self.windows)
            if number >= total:
                raise ValueError(
                    f"holdout takes whole sequences of {self.name}, {total} of {self.windows} windows each, and must "
                    f"leave one to train on: at most {(total - 1) * self.windows}, got {count}"
                )
            order = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT)).permutation(total)
            parts = self._part(np.sort(order[number:]), self.ranges), self._part(np.sort(order[:number]), self.ranges)
        rest, held = parts
        rest._scale()
        held.data_shift, held.data_scale = rest.data_shift, rest.data_scale
        held.data_range = held._largest(*held._measure()[:2])
        return parts

    def extent(self) -> str:
        """The sequences, or stretches of the one, that items are of, in words."""
        total = self.array.shape[0]
        if total > 1:
            return f"{len(self.rows):,} of the {total:,} sequences of {self.name}"
        stretches = f"{len(self.ranges):,} stretch{'es' if len(self.ranges) > 1 else ''} of {self.name}"
        return f"{stretches} (and the length of a window before and after is left out of training)"

    def _part(self, rows: np.ndarray, ranges: list[tuple[int, int]]) -> "SequenceDataset":
        part = copy.copy(self)
        part.rows, part.ranges = rows, ranges
        return part


def held_out_stretches(
    windows: int, length: int, stride: int, count: int, seed: int, name: str = "the recording"
) -> list[tuple[int, int]]:
    """The (first, last + 1) windows of stretches of a recording, `count` windows in all, drawn by `seed`.

    There is one for every forty window lengths that are left, at most, so that the gaps take a tenth of the recording.
    Of a short recording it is a single one, at the start or the end, where only one gap is lost.

    Raises:
        ValueError: no window would be left to train on.
    """
    reach = _reach(length, stride)
    left = windows - count - reach
    if left < 1:
        most = windows - reach - 1
        raise ValueError(
            f"holdout must leave windows to train on that are a window's length apart from what is held out: of the "
            f"{windows} windows of {name} at most {max(most, 0)} can be held out, got {count}"
        )
    rng = np.random.default_rng(derive_seed(seed, Stream.HOLDOUT))
    number = max(1, min(count, (windows - count) // max(2, -(-40 * length // stride))))
    if number == 1 and left - reach < 0.9 * left:
        first = int(rng.integers(2)) * (windows - count)
        return [(first, first + count)]
    held = []
    for i in range(number):
        size = (i + 1) * count // number - i * count // number
        start, stop = i * windows // number, (i + 1) * windows // number
        first = int(rng.integers(start, stop - size + 1))
        held.append((first, first + size))
    return held


def _reach(length: int, stride: int) -> int:
    """Windows on each side of one that begin less than two lengths from it: those without a gap of one length."""
    return -(-2 * length // stride) - 1


def _apart(held: list[tuple[int, int]], windows: int, length: int, stride: int) -> list[tuple[int, int]]:
    """The ranges of windows that are a window's length or more apart from all that are held out."""
    reach, ranges, start = _reach(length, stride), [], 0
    for first, stop in [*held, (windows + reach, windows)]:
        if first - reach > start:
            ranges.append((start, first - reach))
        start = max(start, stop + reach)
    return ranges


def ecg(length: int = 256, stride: int = 2, norm: str = "minmax") -> SequenceDataset:
    """Overlapping windows of PyWavelets' electrocardiogram (1,024 samples, one channel), bundled with it."""
    import pywt

    return SequenceDataset(pywt.data.ecg().astype(np.float64), "the ECG recording", norm, length, stride)


# ---------------------------------------------------------------------------------------------
# Files and tables


def read_sequences(path: str, columns: Sequence[str] | None = None, as_recording: bool = False) -> Any:
    """The array of a file: (N, length) or (N, C, length), or (1, C, samples) where a table is read as a recording.

    Args:
        path: .npy (memory-mapped), .npz (one array, or one named 'data'), .csv or .parquet.
        columns: of a table; None: all.
        as_recording: a table of numbers holds one point in time a row and one channel a column, else one sequence a
            row.

    Raises:
        ValueError: the file cannot be read, is of another kind, or does not hold what was asked for.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_ENDINGS:
        raise ValueError(f"train_data_file must end in {', '.join(FILE_ENDINGS)}, got {path}")
    if not Path(path).is_file():
        kind = "it is a pipe, a folder or a device" if Path(path).exists() else "No such file"
        raise ValueError(f"train_data_file must be a file on disk, got {path}: {kind}")
    if columns and suffix in (".npy", ".npz"):
        raise ValueError(f"sequence_columns are columns of a table; {path} holds an array")
    if suffix == ".csv":
        return _arrange(_read_csv(path, columns), as_recording)
    if suffix == ".parquet":
        from ddpm_hf.data.tables import open_files

        return table_sequences(open_files("parquet", [path]), columns, as_recording, path)
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if len(names) != 1 and "data" not in names:
                raise ValueError(f"it must hold one array, or one named 'data'; it has {', '.join(names) or 'none'}")
            return archive[names[0] if len(names) == 1 else "data"]
    except Exception as error:  # NumPy raises many kinds: OSError, ValueError, EOFError, BadZipFile, ...
        raise ValueError(f"cannot read the arrays of {path}: {error}") from error


def _arrange(table: np.ndarray, as_recording: bool) -> np.ndarray:
    """(rows, columns) -> (N, length), or the one recording (1, C, samples)."""
    return np.ascontiguousarray(table.T)[None] if as_recording else table


def _choose(columns: Sequence[str] | None, present: Sequence[str], name: str) -> list[str]:
    missing = [column for column in columns or () if column not in present]
    if missing:
        raise ValueError(f"sequence_columns must be columns of {name}: {', '.join(present)}; got {', '.join(missing)}")
    return list(columns or present)


def _read_csv(path: str, columns: Sequence[str] | None) -> np.ndarray:
    """Return the numbers of a table, (rows, columns) float64.

    Lines that are blank or begin with # are skipped. The first of the others is a header if one of its cells has a
    letter. The separator is the one of comma, semicolon and tab that it has most of, or spaces between numbers.
    """
    import pandas

    try:
        separator, header = _csv_form(path)
        options = {"sep": separator, "header": 0 if header else None, "index_col": False, "comment": "#",
                   "skipinitialspace": True, "encoding": "utf-8-sig"}  # fmt: skip
        if columns:
            first = pandas.read_csv(path, nrows=0 if header else 1, **options)
            present = [str(name).strip() for name in first.columns]
            options["usecols"] = [present.index(name) for name in _choose(columns, present, path)]

        def read(**more):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows of more values than names
                table = pandas.read_csv(path, **options, **more)
            table.columns = [str(name).strip() for name in table.columns]
            return table[list(columns)] if columns else table

        try:
            numbers = read(dtype=np.float64).to_numpy()
        except ValueError:
            numbers = np.full((1, 1), np.nan)  # a cell is no number
        if not np.isfinite(numbers).all():
            table = read(dtype=str, keep_default_na=False)
            cells = pandas.to_numeric(pandas.Series(table.to_numpy().ravel()), errors="coerce").to_numpy(np.float64)
            numbers = cells.reshape(table.shape)
    except (OSError, ValueError, Warning) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"cannot read the table {path}: {error}") from error
    if not len(numbers):
        raise ValueError(f"{path} has no rows")
    wrong = np.argwhere(~np.isfinite(numbers))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise ValueError(
            f"{path} must hold a finite number in every cell (rows all of one length): row {row} has "
            f"{str(table.iat[row, column])!r} in column {table.columns[column]!r}, one of {len(wrong)} such cells. "
            "To leave columns out, name the others: --sequence_columns"
        )
    return numbers


def _csv_form(path: str) -> tuple[str, bool]:
    """Return (the separator of a table's cells, True if its first line is a header).

    Raises:
        ValueError: there is no line but comments, or the first row has another number of cells than the header.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = (line for line in file if line.strip() and not line.lstrip().startswith("#"))
        first, second = next(lines, None), next(lines, None)
    if first is None:
        raise ValueError("it has no rows")
    unquoted = re.sub('"[^"]*"', "", first)
    separator = max(",;\t", key=unquoted.count)
    if separator not in unquoted and len(first.split()) > 1 and all(map(_is_number, first.split())):
        return r"\s+", False

    def cells(line: str) -> list[str]:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True))

    # a date or a decimal comma is a wrong cell of the first row, not a name
    header = any(any(map(str.isalpha, cell)) and not _is_number(cell) for cell in cells(first))
    if header and second is not None and len(cells(first)) != len(cells(second)):
        raise ValueError(
            f"the header must have a name for each value of a row, got {len(cells(first))} names and "
            f"{len(cells(second))} values"
        )
    return separator, header


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class ListColumns:
    """Columns of lists of a `datasets.Dataset`, each a channel, as an array (N, C, length) that is read when indexed.

    Raises:
        ValueError: lists of different lengths, or not of numbers.
    """

    def __init__(self, table: Any, columns: Sequence[str], name: str):
        self.table, self.columns, self.name = table.with_format("arrow"), list(columns), name
        self.dtype = np.dtype(np.float64)
        length = self.table[:1][self.columns[0]].combine_chunks()[0].values
        self.shape = (len(table), len(self.columns), 0 if length is None else len(length))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        import pyarrow.compute as compute

        part = self.table[rows]
        channels = []
        for column in self.columns:
            lists = part[column].combine_chunks()
            lengths = set(compute.list_value_length(lists).to_pylist())
            if lengths != {self.shape[2]}:
                got = ", ".join(sorted(map(str, lengths | {self.shape[2]})))
                raise ValueError(
                    f"{self.name}: all lists must have one length, got {got} in column {column!r} and before"
                )
            values = lists.flatten().to_numpy(zero_copy_only=False)
            channels.append(np.asarray(values, dtype=np.float64).reshape(len(lists), -1))
        return np.stack(channels, axis=1)


def table_sequences(table: Any, columns: Sequence[str] | None, as_recording: bool, name: str) -> Any:
    """The sequences of a `datasets.Dataset`: columns of lists are channels; columns of numbers are as in a CSV file.

    Raises:
        ValueError: no such column, no rows, or columns of something else.
    """
    import pyarrow

    columns = _choose(columns, table.column_names, name)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    types = {column: table.data.schema.field(column).type for column in columns}

    def is_number(kind) -> bool:
        return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)

    def is_list(kind) -> bool:
        lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
        return any(check(kind) for check in lists) and is_number(kind.value_type)

    if all(map(is_list, types.values())):
        return ListColumns(table, columns, name)
    if all(map(is_number, types.values())):
        arrow = table.with_format("arrow")[:]
        numbers = np.stack([arrow[column].to_numpy().astype(np.float64) for column in columns], axis=1)
        return _arrange(numbers, as_recording)
    listed = ", ".join(f"{column} ({kind})" for column, kind in types.items())
    raise ValueError(
        f"sequence_columns must all be columns of numbers, or all of lists of numbers; {name} has {listed}. "
        "Name those that are: --sequence_columns"
    )
