"""Tables of the `datasets` library: found by name, folder or file, and the column of pictures in them.

The library is imported where it is used: sampling and training on plain folders and arrays do without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# How the files of a folder are read, by their ending.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp")


def open_named(name: str, config_name: str | None, split: str, streaming: bool = False) -> Any:
    """A data set of the Hub, or a local folder that `datasets` knows how to read; `streaming`: without a copy.

    Raises:
        ValueError: it cannot be had; the library's reason is given.
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
        raise ValueError(f"dataset_name {what}, split {split!r}, cannot be loaded: {_reason(error)}") from error


def open_files(builder: str, files: Sequence[str], streaming: bool = False) -> Any:
    """A table of files of one kind.

    Raises:
        ValueError: they cannot be read.
    """
    import datasets

    try:
        return datasets.load_dataset(builder, data_files=list(files), split="train", streaming=streaming)
    except Exception as error:
        raise ValueError(f"cannot read {', '.join(files[:3])} as {builder}: {_reason(error)}") from error


def table_folder(folder: str) -> bool:
    """Return True if a folder holds tables (saved to disk, parquet, arrow, webdataset tars) rather than pictures."""
    return saved_to_disk(Path(folder)) or bool(_table_files(folder))


def open_folder(folder: str, split: str, streaming: bool = False) -> Any:
    """The table in a folder: one saved with `save_to_disk` (of one split, or several), or files of one kind.

    Raises:
        ValueError: no table in it, files of several kinds, no such split, or files that cannot be read.
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
    files = _table_files(folder)
    kinds = sorted({path.suffix for path in files})
    if len(kinds) != 1:
        found = f"files of {', '.join(kinds)}" if kinds else "no tables"
        raise ValueError(f"train_data_dir must hold tables of one kind ({', '.join(BUILDERS)}); {folder} has {found}")
    try:
        return datasets.load_dataset(
            BUILDERS[kinds[0]], data_dir=folder, split=split, streaming=streaming
        )  # the library's rules find the split in the names
    except Exception as error:
        raise ValueError(f"cannot read the {kinds[0]} files of {folder}, split {split!r}: {_reason(error)}") from error


def saved_to_disk(folder: Path) -> bool:
    """Return True if the folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _table_files(folder: str) -> list[Path]:
    return sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix in BUILDERS and path.is_file() and not path.name.startswith(".")
    )


def _reason(error: Exception) -> str:
    """The first line of the error at the bottom of a chain, where the cause is."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------
# Pictures in tables


def image_column(features: Any, asked: str | None, name: str) -> str:
    """The column that holds the pictures: the one asked for, the only one of pictures, or one with a usual name.

    Raises:
        ValueError: no such column, or none or several that could be meant.
    """
    import datasets

    columns = list(features or {})
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"image_column must be a column of {name}: {', '.join(columns)}; got {asked!r}")
        return asked
    pictures = [column for column in columns if isinstance(features[column], datasets.Image)]
    named = [column for column in pictures or columns if column.lower() in IMAGE_COLUMNS]
    for found in (pictures, named):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"{name} has the columns {', '.join(columns)}, and it is not clear which holds the pictures: --image_column"
    )


def features(table: Any) -> Any:
    """The columns and their types; of a stream that does not say them, from its first rows."""
    if table.features is not None or not hasattr(table, "_resolve_features"):
        return table.features
    return table._resolve_features().features


def undecoded(table: Any, column: str) -> Any:
    """A table of that column alone, its pictures as files or bytes: workers decode them."""
    import datasets

    is_image = isinstance((features(table) or {}).get(column), datasets.Image)
    table = table.select_columns([column])
    if is_image:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


class ImageColumn:
    """The pictures of a `datasets.Dataset`, undecoded, as sources of an `ImageDataset`."""

    def __init__(self, table: Any, column: str):
        self.table, self.column = undecoded(table, column), column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        return self.table[int(index)][self.column]
