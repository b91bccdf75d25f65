"""Classes of items: numbers and names, from whole numbers, texts or features of a table, checked before training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LISTED = 20  # classes that a note lists one by one


@dataclass(frozen=True, eq=False)
class Labels:
    """The class of each row of a source: of each image, or of each sequence with all its windows.

    Attributes:
        numbers: int64 (N,), from 0 to the number of classes - 1.
        names: the name of each class.
    """

    numbers: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def read(cls, values: Any, where: str, names: Sequence[str] | None = None) -> "Labels":
        """Read the classes of N rows.

        Args:
            values: whole numbers, which are the numbers of the classes, or texts, which are their names (numbered in
                sorted order); an array (N,), or a sequence of Python's, NumPy's or torch's scalars.
            where: what the values are, for messages ("the column 'label' of photos/").
            names: names of the classes, where the source has them; the values are whole numbers then.

        Raises:
            ValueError: a value is missing, negative, fractional or something else, is no class of `names`, or each row
                has another value.
        """
        array = values if isinstance(values, np.ndarray) else _objects(values)
        if array.ndim != 1:
            raise ValueError(f"{where} must be one-dimensional, with one class for each item, got {array.shape}")
        if array.dtype.kind in "US":
            array = array.astype(str).astype(object)
        if array.dtype.kind == "O":
            texts = np.array([isinstance(value, str) for value in array], bool)
            if texts.any():
                _check(where, array, texts & (array != ""))
                return cls._of_texts(array.astype(str), where, names)
            _check(where, array, np.array([value is None or isinstance(value, (int, float)) for value in array], bool))
            array = np.array([np.nan if value is None else value for value in array])
        array = array.astype(np.int64) if array.dtype.kind == "b" else array
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{where} must hold whole numbers or texts, got the type {array.dtype}")
        _check(where, array, np.isfinite(array) & (array >= 0) & (array == np.floor(array)))
        return cls._of_numbers(array, where, names)

    @classmethod
    def _of_texts(cls, texts: np.ndarray, where: str, names: Sequence[str] | None) -> "Labels":
        found, numbers = np.unique(texts, return_inverse=True)
        if names is None:
            _check_shared(where, len(found), len(texts))
            return cls(numbers.astype(np.int64), tuple(found.tolist()))
        _check(where, texts, np.isin(texts, names), f"one of the classes {', '.join(names)}")
        place = {name: number for number, name in enumerate(names)}
        return cls(np.array([place[text] for text in found], np.int64)[numbers], tuple(names))

    @classmethod
    def _of_numbers(cls, numbers: np.ndarray, where: str, names: Sequence[str] | None) -> "Labels":
        if names is not None:
            _check(where, numbers, numbers < len(names), f"the number of a class, less than {len(names)}")
            return cls(numbers.astype(np.int64), tuple(names))
        _check_shared(where, len(np.unique(numbers)), len(numbers))
        rule = f"the number of a class, counted from 0, and so less than the number of items, {len(numbers):,}"
        _check(where, numbers, numbers < max(2, len(numbers)), rule)
        numbers = numbers.astype(np.int64)  # which larger ones would not fit into
        return cls(numbers, tuple(map(str, range(int(numbers.max(initial=0)) + 1))))

    def digest(self) -> str:
        """Return a digest of all numbers and names."""
        return hashlib.sha256(self.numbers.tobytes() + repr(self.names).encode()).hexdigest()

    def counts(self, numbers: np.ndarray | None = None) -> list[int]:
        """Return the number of items in each class, of the items with these class numbers (None: of all rows)."""
        return np.bincount(self.numbers if numbers is None else numbers, minlength=len(self.names)).tolist()


def class_notes(names: Sequence[str], counts: Sequence[int] | None) -> list[str]:
    """Return the lines about classes to print before training; `counts` are the items of each, None if not known."""
    shown = list(names) if counts is None else [f"{name} ({count:,})" for name, count in zip(names, counts)]
    more = f" and {len(shown) - LISTED:,} more" if len(shown) > LISTED else ""
    notes = [f"{len(names):,} class{'es' if len(names) > 1 else ''}: {', '.join(shown[:LISTED])}{more}"]
    empty = [name for name, count in zip(names, counts or ()) if count == 0]
    if empty:
        more = f" and {len(empty) - LISTED:,} more" if len(empty) > LISTED else ""
        notes.append(f"warning: no item to train on has the class {', '.join(empty[:LISTED])}{more}")
    return notes


def as_labels(labels: Any, count: int, where: str) -> Labels | None:
    """Return `Labels` of `count` rows from themselves or from values that `Labels.read` takes; None stays None.

    Raises:
        ValueError: the values are no classes, or of another number of rows.
    """
    if labels is None:
        return None
    labels = labels if isinstance(labels, Labels) else Labels.read(labels, where)
    if len(labels) != count:
        raise ValueError(f"{where} must have one class for each of the {count:,} rows of the data, got {len(labels):,}")
    return labels


def given_labels(dataset: Any, column: str) -> Labels:
    """Read the classes of a map-style dataset given from Python.

    They are, in this order: the `labels` of an `ImageDataset` or a `SequenceDataset`; the column of a
    `datasets.Dataset`; `targets`, as torchvision's datasets have them (with names in `classes`); the second of each
    item (x, y), or the entry `column` of each item that is a dict. For the last two, every item is read once.

    Raises:
        ValueError: the dataset has no classes, or some that `Labels.read` refuses.
    """
    name = f"the dataset given from Python ({type(dataset).__name__})"
    if isinstance(getattr(dataset, "labels", None), Labels):
        return dataset.labels
    if hasattr(dataset, "column_names") and hasattr(dataset, "features"):
        return table_labels(dataset, column, name)
    names = getattr(dataset, "classes", None)
    names = names if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        return Labels.read(targets, f"`targets` of {name}", names)
    values = [_label_in(dataset[index], column, index, name) for index in range(len(dataset))]
    return Labels.read(values, f"the classes of {name}", names)


def _label_in(item: Any, column: str, index: int, name: str) -> Any:
    if isinstance(item, dict) and column in item:
        return item[column]
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return item[1]
    got = f"a dict with {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"class_labels needs items (x, y) or dicts with {column!r}; item {index} of {name} is {got}")


def table_labels(table: Any, column: str, name: str) -> Labels:
    """Read the classes in a column of a `datasets.Dataset`: ClassLabel, whole numbers or texts.

    Raises:
        ValueError: there is no such column, or it holds something that `Labels.read` refuses.
    """
    check_column(column, table.column_names, name)
    values = table.select_columns([column]).with_format("arrow")[:][column].to_pandas().to_numpy()
    return Labels.read(values, f"the column {column!r} of {name}", feature_names(table.features[column]))


def check_column(
    column: str, present: Sequence[str], name: str, what: str = "a column", option: str = "class_labels"
) -> None:
    """Check that an option names a column (or an array) that is there.

    Raises:
        ValueError: it does not.
    """
    if column not in present:
        raise ValueError(f"{option} must be {what} of {name}: {', '.join(present)}; got {column!r}")


def feature_names(feature: Any) -> list[str] | None:
    """Return the names of the classes that a ClassLabel feature of the datasets library has; None for another one."""
    import datasets

    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _objects(values: Any) -> np.ndarray:
    """Return values as an array of Python objects; NumPy would turn numbers beside texts into texts."""
    if isinstance(values, torch.Tensor):
        return values.numpy(force=True)
    values = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value for value in values]
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _check(where: str, values: np.ndarray, good: np.ndarray, rule: str = "") -> None:
    if good.all():
        return
    row = int(np.argmin(good))
    value = values[row]
    value = value.item() if isinstance(value, np.generic) else value
    missing = value is None or isinstance(value, (str, float)) and (value == "" or value != value)
    rule = rule or "a class for each row: a whole number of at least 0, or a text (not both in one source)"
    raise ValueError(
        f"{where} must hold {rule}; row {row} has {'no value' if missing else repr(value)}, one of "
        f"{int((~good).sum()):,} such rows"
    )


def _check_shared(where: str, different: int, rows: int) -> None:
    if rows > 1 and different == rows:
        raise ValueError(
            f"{where} has another value in each of its {rows:,} rows, so that it names rows and not classes: choose "
            "another one, or leave class_labels out"
        )
