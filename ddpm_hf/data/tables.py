"""Tables of the `datasets` library, opened by name, folder or file, and the images or sequences in their columns.

The library is imported where it is used, because sampling, and training on plain folders and arrays, do without it.
"""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_hf.config import BUNDLED
from ddpm_hf.data.labels import check_column
from ddpm_hf.data.listing import Listing, list_folder

# Builders of the datasets library for the files of a folder, by their ending.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp")


def open_named(name: str, config_name: str | None, split: str, streaming: bool = False) -> Any:
    """Open a dataset of the Hub, or a local folder that the datasets library can read.

    Args:
        streaming: rows are read as they are needed, without a local copy.

    Raises:
        ValueError: it cannot be opened; the message has the library's reason.
    """
    import datasets

    if saved_to_disk(Path(name)):
        if config_name is not None:
            raise ValueError(f"dataset_config_name does not apply to {name}, saved to disk; got {config_name!r}")
        return open_folder(name, split, streaming)
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # the library raises many kinds: missing, gated, offline, no such split, bad files
        what = f"{name!r}" + (f" ({config_name})" if config_name else "")
        raise ValueError(
            f"dataset_name {what}, split {split!r}, cannot be loaded: {_reason(error)}{_near(name)}"
        ) from error


def _near(name: str) -> str:
    """Return "; did you mean ...?" with the bundled data of a similar name, or an empty text."""
    near = get_close_matches(name, BUNDLED, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def open_parquet(path: str) -> Any:
    """Open a .parquet file as a table.

    Raises:
        ValueError: it cannot be read.
    """
    import datasets

    try:
        return datasets.load_dataset("parquet", data_files=[path], split="train")
    except Exception as error:
        raise ValueError(f"cannot read {path} as parquet: {_reason(error)}") from error


def table_folder(folder: str, listing: Listing | None = None) -> bool:
    """Return True if a folder holds tables (saved to disk, parquet, arrow, webdataset tars) rather than images.

    Args:
        listing: the content of the folder, if it has been listed already.
    """
    return saved_to_disk(Path(folder)) or bool(_table_files(listing or list_folder(folder)))


def open_folder(folder: str, split: str, streaming: bool = False) -> Any:
    """Open the table in a folder: one saved with `save_to_disk` (with or without splits), or files of one kind.

    Raises:
        ValueError: the folder has no table, files of several kinds or no such split, or the files cannot be read.
    """
    import datasets

    root = Path(folder)
    if saved_to_disk(root):
        try:
            table = datasets.load_from_disk(folder)
        except Exception as error:
            raise ValueError(f"cannot read the data set saved in {folder}: {_reason(error)}") from error
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"dataset_split must be one of {', '.join(table)} in {folder}, got {split!r}")
            table = table[split]
        elif split != "train":
            raise ValueError(f"dataset_split applies where several splits are; {folder} holds one, got {split!r}")
        shards = len(table.cache_files) or 1
        return table.to_iterable_dataset(num_shards=min(shards, max(1, len(table)))) if streaming else table
    kinds = sorted({os.path.splitext(path)[1].lower() for path in _table_files(list_folder(folder))})
    if len(kinds) != 1:
        found = f"files of {', '.join(kinds)}" if kinds else "no tables"
        raise ValueError(f"train_data_dir must hold tables of one kind ({', '.join(BUILDERS)}); {folder} has {found}")
    try:
        # the library finds the split in the files' names
        return datasets.load_dataset(BUILDERS[kinds[0]], data_dir=folder, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(f"cannot read the {kinds[0]} files of {folder}, split {split!r}: {_reason(error)}") from error


def saved_to_disk(folder: Path) -> bool:
    """Return True if the folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _table_files(listing: Listing) -> list[str]:
    return [path for path in listing.files if path.lower().endswith(tuple(BUILDERS)) and path not in listing.broken]


def _reason(error: Exception) -> str:
    """Return the first line of the error that caused all others of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------
# Images in tables


def image_column(features: Any, asked: str | None, name: str) -> str:
    """Return the column of the images: the one asked for, the only one of images, or the only one with a usual name.

    Raises:
        ValueError: there is no such column, or it is not clear which column is meant.
    """
    import datasets

    columns = list(features or {})
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"image_column must be a column of {name}: {', '.join(columns)}; got {asked!r}")
        return asked
    images = [column for column in columns if isinstance(features[column], datasets.Image)]
    named = [column for column in images or columns if column.lower() in IMAGE_COLUMNS]
    for found in (images, named):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}, and it is not clear which holds the images: --image_column"
    )


def features(table: Any) -> Any:
    """Return the columns of a table with their types; a stream that does not tell them is asked for its first rows."""
    if table.features is not None or not hasattr(table, "_resolve_features"):
        return table.features
    return table._resolve_features().features


def undecoded(table: Any, column: str, *others: str) -> Any:
    """Return a table of that column (and others), whose images stay files or bytes; workers decode them."""
    import datasets

    kinds, columns = features(table) or {}, list(dict.fromkeys((column, *others)))
    table = table.select_columns(columns)
    for each in columns:
        if isinstance(kinds.get(each), datasets.Image):
            table = table.cast_column(each, datasets.Image(decode=False))
    return table


class ImageColumn:
    """The images of a column of a `datasets.Dataset`, undecoded, as sources of an `ImageDataset`."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = undecoded(table, column), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[int(index)][self.column]


# ---------------------------------------------------------------------------------------------
# Sequences in tables


def arrange(table: np.ndarray, as_recording: bool) -> np.ndarray:
    """Take a table (rows, columns) as sequences (N, length), or as one recording (1, C, samples)."""
    return np.ascontiguousarray(table.T)[None] if as_recording else table


def choose_columns(
    columns: Sequence[str] | None, present: Sequence[str], name: str, leave_out: Mapping[str, str] | None = None
) -> list[str]:
    """Return the columns asked for, or all that are present but those to leave out.

    Args:
        leave_out: columns that hold no sequences, as `named_columns` takes them, by the option that names them.

    Raises:
        ValueError: a column that was asked for, or one to leave out, is not there.
    """
    others = [(option, column) for option, text in (leave_out or {}).items() for column in named_columns(text, present)]
    for option, column in others:
        check_column(column, present, name, option=option)
    missing = [column for column in columns or () if column not in present]
    if missing:
        raise ValueError(f"sequence_columns must be columns of {name}: {', '.join(present)}; got {', '.join(missing)}")
    left_out = {column for _, column in others}
    return list(columns or [column for column in present if column not in left_out])


def named_columns(text: str, present: Sequence[str]) -> list[str]:
    """Return the columns that a text names: one that is present, or several that commas separate."""
    return [text] if text in present else [name.strip() for name in text.split(",") if name.strip()]


class ListColumns:
    """Columns of lists of a `datasets.Dataset` as an array (N, C, length), each a channel, that is read when indexed.

    Raises:
        ValueError: the lists have different lengths (when they are read).
    """

    def __init__(self, table: Any, columns: Sequence[str], name: str):
        self.table, self.columns, self.name = table.with_format("arrow"), list(columns), name
        self.dtype = np.dtype(np.float64)
        places = {column: place for place, column in enumerate(table.column_names)}
        self._places = [places[column] for column in self.columns]
        self._alike = len({table.data.schema.field(place).type for place in self._places}) == 1
        length = self.table[:1][self.columns[0]].combine_chunks()[0].values
        self.shape = (len(table), len(self.columns), 0 if length is None else len(length))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self.table[rows].columns
        columns = [found[place] for place in self._places]
        # pyarrow's calls take longer than the numbers: columns of one type are converted together
        groups = [columns] if self._alike else [[column] for column in columns]
        values = [self._values(group, first) for first, group in enumerate(groups)]
        return np.array(np.concatenate(values).swapaxes(0, 1), dtype=np.float64, order="C")

    def _values(self, columns: list, first: int) -> np.ndarray:
        """Return the numbers of columns of one type, (columns, rows, length); `first` is the place of the first one."""
        import pyarrow
        import pyarrow.compute as compute

        lists = pyarrow.concat_arrays([chunk for column in columns for chunk in column.chunks])
        lengths = compute.fill_null(compute.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != self.shape[2])
        if len(wrong):
            place = int(wrong[0]) * len(columns) // len(lists)
            found = set(compute.list_value_length(columns[place]).to_pylist())
            got = ", ".join(sorted(map(str, found | {self.shape[2]})))
            name = self.columns[first + place]
            raise ValueError(f"{self.name}: all lists must have one length, got {got} in column {name!r} and before")
        values = lists.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(columns), len(lists) // len(columns), self.shape[2])


def table_sequences(
    table: Any, columns: Sequence[str] | None, as_recording: bool, name: str,
    leave_out: Mapping[str, str] | None = None, names: list[str] | None = None,
) -> Any:  # fmt: skip
    """Return the sequences of a `datasets.Dataset`, an array (N, length), or an array or `ListColumns` (N, C, length).

    Columns of lists are channels; columns of numbers are read as those of a CSV file (see `arrange`). The names of
    columns that are channels are appended to `names`.

    Raises:
        ValueError: there is no such column, there are no rows, or the columns hold something else.
    """
    import pyarrow

    columns = choose_columns(columns, table.column_names, name, leave_out)
    if not len(table):
        raise ValueError(f"{name} has no rows")
    types = {column: table.data.schema.field(column).type for column in columns}

    def is_number(kind) -> bool:
        return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)

    def is_list(kind) -> bool:
        lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
        return any(check(kind) for check in lists) and is_number(kind.value_type)

    are_lists = all(map(is_list, types.values()))
    if names is not None and (are_lists or as_recording):
        names += columns
    if are_lists:
        return ListColumns(table, columns, name)
    if all(map(is_number, types.values())):
        arrow = table.with_format("arrow")[:]
        numbers = np.stack([arrow[column].to_numpy().astype(np.float64) for column in columns], axis=1)
        return arrange(numbers, as_recording)
    listed = ", ".join(f"{column} ({kind})" for column, kind in types.items())
    raise ValueError(
        f"sequence_columns must all be columns of numbers, or all of lists of numbers; {name} has {listed}. "
        "Name those that are: --sequence_columns"
    )


def table_condition(table: Any, column: str, as_recording: bool, name: str) -> Any:
    """Return columns of a `datasets.Dataset`, which `named_columns` takes, as conditions; see `table_sequences`.

    Raises:
        ValueError: there is no such column, or the columns hold something else.
    """
    names = named_columns(column, table.column_names)
    for each in names:
        check_column(each, table.column_names, name, option="condition_column")
    try:
        return table_sequences(table, names, as_recording, name)
    except ValueError as error:
        raise ValueError(f"condition_column {column!r}: {error}") from error
