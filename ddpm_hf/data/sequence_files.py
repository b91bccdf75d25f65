"""Files of sequences: arrays .npy and .npz, and tables .csv and .parquet; and the classes of the sequences."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_hf.data.csv_files import csv_column, csv_columns, is_number, read_csv
from ddpm_hf.data.labels import Labels, check_column, table_labels
from ddpm_hf.data.tables import arrange, open_parquet, table_condition, table_sequences

FILE_ENDINGS = (".npy", ".npz", ".csv", ".parquet")
LABEL_ENDINGS = (".npy", ".csv", ".txt")


def read_sequences(
    path: str,
    columns: Sequence[str] | None = None,
    as_recording: bool = False,
    leave_out: Mapping[str, str] | None = None,
    missing: bool = False,
    decimal: str | None = None,
    notes: list[str] | None = None,
    names: list[str] | None = None,
) -> Any:
    """Read the array of a file, (N, length) or (N, C, length).

    Args:
        path: file .npy (memory-mapped), .npz (one array, or one named 'data'), .csv or .parquet.
        columns: columns of a table to read; None: all.
        as_recording: each row of a table of numbers is one point in time and each column a channel, and the array is
            (1, C, samples). Otherwise each row is one sequence.
        leave_out: columns, or arrays of a .npz file, that hold no sequences, by the option that names each.
        missing: cells of a .csv file may be missing (empty, or one of `csv_files.MISSING`); they become NaN.
        decimal: "." or ",", the decimal mark of a .csv file; None: it is found.
        notes: lines about columns that were left out and a decimal comma that was found are appended to it.
        names: the names of the columns of a table whose columns are channels are appended to it.

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
        names = names if as_recording else None
        return arrange(read_csv(path, columns, leave_out, missing, decimal, notes, as_recording, names), as_recording)
    if suffix == ".parquet":
        return table_sequences(open_parquet(path), columns, as_recording, path, leave_out, names)
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if name not in (leave_out or {}).values()]
            if len(names) != 1 and "data" not in names:
                raise ValueError(f"it must hold one array, or one named 'data'; it has {', '.join(names) or 'none'}")
            return archive[names[0] if len(names) == 1 else "data"]
    except Exception as error:  # NumPy raises many kinds: OSError, ValueError, EOFError, BadZipFile, ...
        raise ValueError(f"cannot read the arrays of {path}: {error}") from error


def read_condition(
    path: str, column: str, as_recording: bool = False, missing: bool = False, decimal: str | None = None
) -> Any:
    """Read the conditions of the items of a file, an array (N, C, length) or (N, length); (N, C, H, W) for images.

    Args:
        path: the file of the items.
        column: columns of a table, separated by commas; the name of an array in a .npz file; or a .npy file beside an
            array (memory-mapped).
        as_recording, missing, decimal: as for `read_sequences`.

    Raises:
        ValueError: the file cannot be read, or has no such array or column.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return table_condition(open_parquet(path), column, as_recording, path)
    if suffix == ".csv":
        names = csv_columns(path, column, "condition_column")
        return arrange(read_csv(path, names, None, missing, decimal, by_column=as_recording), as_recording)
    if column.lower().endswith(".npy"):
        if not Path(column).is_file():
            raise ValueError(f"condition_column must be a file on disk, got {column}: No such file")
        try:
            return np.load(column, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises many kinds
            raise ValueError(f"condition_column: cannot read the array of {column}: {error}") from error
    if suffix != ".npz":
        raise ValueError(f"condition_column must be a .npy file of conditions for {path}, got {column!r}")
    with np.load(path, allow_pickle=False) as archive:
        check_column(column, archive.files, path, "an array", "condition_column")
        return archive[column]


def read_labels(path: str, class_labels: str, count: int) -> Labels:
    """Read the classes of the sequences of a file.

    Args:
        path: file of sequences.
        class_labels: the column of a table; the name of an array in a .npz file; or the path of a file of classes
            beside an array: .npy (one array), .txt (a class in each line) or .csv (one column, with or without a name).
        count: the number of sequences.

    Raises:
        ValueError: there is no such column, array or file, or it holds something that `Labels.read` refuses.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return _of_texts(csv_column(path, class_labels), f"the column {class_labels!r} of {path}")
    if suffix == ".parquet":
        return table_labels(open_parquet(path), class_labels, path)
    if Path(class_labels).suffix.lower() in LABEL_ENDINGS:
        return read_label_file(class_labels, count)
    if suffix == ".npy":
        raise ValueError(f"class_labels must be a file ({', '.join(LABEL_ENDINGS)}) for {path}, got {class_labels!r}")
    with np.load(path, allow_pickle=False) as archive:
        check_column(class_labels, archive.files, path, "an array")
        try:
            values = archive[class_labels]
        except Exception as error:  # NumPy raises many kinds
            raise ValueError(f"cannot read the array {class_labels!r} of {path}: {error}") from error
    return Labels.read(values, f"the array {class_labels!r} of {path}")


def read_label_file(path: str, *counts: int) -> Labels:
    """Read a file of classes.

    Args:
        path: a file .npy (one array), .txt (a class in each line) or .csv (one column).
        counts: the numbers of classes that the file may have; if a .csv file has one more, its first row is a name.

    Raises:
        ValueError: the file cannot be read, or holds something that `Labels.read` refuses.
    """
    try:
        if path.lower().endswith(".npy"):
            return Labels.read(np.load(path, allow_pickle=False), path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.lower().endswith(".txt"):
                values = [line.strip() for line in file]
                while values and not values[-1]:
                    values.pop()
                return _of_texts(values, path)
            rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    except (OSError, EOFError, csv.Error) as error:
        raise ValueError(f"cannot read the classes of {path}: {error}") from error
    wide = [number for number, row in enumerate(rows) if len(row) > 1]
    if wide:
        raise ValueError(f"{path} must have one column, the class of each row; row {wide[0]} has {rows[wide[0]]}")
    values = [row[0].strip() for row in rows]
    has_name = len(values) not in counts and len(values) - 1 in counts
    return _of_texts(values[has_name:], path)


def _of_texts(texts: Sequence[str], where: str) -> Labels:
    """Read classes from the cells of a text file, as numbers if all of them are."""
    return Labels.read(np.array(texts, np.float64) if all(map(is_number, texts)) else texts, where)
