"""Files of sequences: arrays .npy and .npz, and tables .csv and .parquet."""

import csv
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_hf.data.tables import arrange, choose_columns, open_files, table_sequences

FILE_ENDINGS = (".npy", ".npz", ".csv", ".parquet")


def read_sequences(path: str, columns: Sequence[str] | None = None, as_recording: bool = False) -> Any:
    """Read the array of a file, (N, length) or (N, C, length).

    Args:
        path: file .npy (memory-mapped), .npz (one array, or one named 'data'), .csv or .parquet.
        columns: columns of a table to read; None: all.
        as_recording: each row of a table of numbers is one point in time and each column a channel, and the array is
            (1, C, samples). Otherwise each row is one sequence.

    Raises:
        ValueError: the file cannot be read, has another ending, or lacks what was asked for.
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
        return arrange(_read_csv(path, columns), as_recording)
    if suffix == ".parquet":
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


def _read_csv(path: str, columns: Sequence[str] | None) -> np.ndarray:
    """Return the numbers of a table, (rows, columns) float64.

    Lines that are blank or begin with # are skipped. The first line that is left is a header if one of its cells has a
    letter. The cells are separated by comma, semicolon or tab, whichever that line has most of, or by spaces.
    """
    import pandas

    try:
        separator, header = _csv_form(path)
        options = {"sep": separator, "header": 0 if header else None, "index_col": False, "comment": "#",
                   "skipinitialspace": True, "encoding": "utf-8-sig"}  # fmt: skip
        if columns:
            first = pandas.read_csv(path, nrows=0 if header else 1, **options)
            present = [str(name).strip() for name in first.columns]
            options["usecols"] = [present.index(name) for name in choose_columns(columns, present, path)]

        def read(**more):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows of more values than names
                table = pandas.read_csv(path, **options, **more)
            table.columns = [str(name).strip() for name in table.columns]
            return table[list(columns)] if columns else table

        try:
            numbers = read(dtype=np.float64).to_numpy()
        except ValueError:
            numbers = np.full((1, 1), np.nan)  # some cell is not a number
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
    """Return the separator of a table's cells, and True if its first line is a header.

    Raises:
        ValueError: there are only comments, or the first row has another number of cells than the header.
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
