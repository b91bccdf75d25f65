"""Sequences from arrays and tables: scaled by channel in one pass over the data, cut into windows where asked.

Arrays are read in parts and indexed lazily, so a memory-mapped file may be larger than the memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

NORMS = ("minmax", "meanstd")
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
        data_shift, data_scale: per channel, data = x * scale + shift for the x that items are.
        data_range: largest |x|: 1 for "minmax" (up to rounding), measured for "meanstd".

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
        if norm not in NORMS:
            raise ValueError(f"sequence_norm must be one of {', '.join(NORMS)}, got {norm!r}")
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
        self._measure(norm)

    def _measure(self, norm: str) -> None:
        """Range, mean and deviation of each channel in one pass (moments joined as Chan, Golub, LeVeque 1983)."""
        channels = self.array.shape[1]
        low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
        count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        bad: set[int] = set()
        for first, part in self._parts():
            rows = np.flatnonzero(~np.isfinite(part).all(axis=(1, 2)))
            bad.update(first + int(row) for row in rows)
            if len(rows):
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
        # A channel that never changes is mapped to 0: there the mean of equal numbers is off by rounding.
        middle = (high + low) / 2
        spread = (high - low) / 2 if norm == "minmax" else np.sqrt(squares / count)
        shift = np.where(high > low, middle if norm == "minmax" else mean, low)
        scale = np.where((high > low) & (spread > 0), spread, 1.0)
        self.data_shift, self.data_scale = shift.tolist(), scale.tolist()
        self.data_range = 1.0
        if norm == "meanstd":
            self.data_range = float((np.maximum(high - shift, shift - low) / scale).max()) or 1.0

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first sequence, float64 (n, C, samples)) over all that windows can reach."""
        count, channels, _ = self.array.shape
        reached = (self.windows - 1) * self.stride + self.length
        rows = max(1, PART // (channels * reached))
        samples = reached if rows > 1 else max(1, PART // channels)
        for row in range(0, count, rows):
            for start in range(0, reached, samples):
                part = self.array[row : row + rows][:, :, start : min(start + samples, reached)]
                yield row, np.asarray(part, dtype=np.float64)

    def __len__(self) -> int:
        return self.array.shape[0] * self.windows

    def __getitem__(self, index: int) -> Tensor:
        """Float32 (C, length), scaled."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} sequences")
        row, window = divmod(int(index) % len(self), self.windows)
        start = window * self.stride
        part = np.asarray(self.array[row : row + 1][0, :, start : start + self.length], dtype=np.float64)
        scaled = (part - np.array(self.data_shift)[:, None]) / np.array(self.data_scale)[:, None]
        return torch.from_numpy(scaled.astype(np.float32))


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
    if columns and suffix in (".npy", ".npz"):
        raise ValueError(f"sequence_columns are columns of a table; {path} holds an array")
    if suffix == ".csv":
        return _arrange(_read_csv(path, columns), as_recording)
    if suffix == ".parquet":
        from ddpm_hf.sources import open_files

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
    """(rows, columns) float64. The first line is a header if one of its cells is not a number; the separator is the
    one of comma, semicolon and tab that it has most of."""
    import pandas

    try:
        with open(path, encoding="utf-8-sig") as file:
            first = file.readline()
        separator = max(",;\t", key=first.count)
        cells = pandas.to_numeric(pandas.Series(first.strip().split(separator)), errors="coerce")
        header = bool(cells.isna().any())
        table = pandas.read_csv(
            path, sep=separator, header=0 if header else None, index_col=False, encoding="utf-8-sig", low_memory=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"cannot read the table {path}: {error}") from error
    table.columns = [str(column).strip() for column in table.columns]
    if not len(table):
        raise ValueError(f"{path} has no rows")
    table = table[_choose(columns, list(table.columns), path)]
    numbers = table.apply(pandas.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = np.argwhere(~np.isfinite(numbers))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise ValueError(
            f"{path} must hold a finite number in every cell (rows all of one length): row {row} has "
            f"{str(table.iat[row, column])!r} in column {table.columns[column]!r}, one of {len(wrong)} such cells. "
            "To leave columns out, name the others: --sequence_columns"
        )
    return numbers


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
