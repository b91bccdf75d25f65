"""Files that are mapped into memory while training reads them: a change is noticed, and ends the run with its reason.

A process that reads past the end of a mapped file that was cut short is ended by the system (SIGBUS), without a word.
So sizes and times are compared where the run stands still: at the start, on resuming and with each checkpoint.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_hf.data.sequences import ListColumns, SequenceDataset
from ddpm_hf.data.tables import ImageColumn


def mapped_files(dataset: Any) -> list[str]:
    """The files behind a data set of ours, a table of `datasets`, or an array; as far as it tells them."""
    return sorted({os.path.abspath(path) for path in _paths(dataset)})


def _paths(source: Any) -> Iterator[str]:
    if isinstance(source, SequenceDataset):
        yield from _paths(source.array)
    elif isinstance(source, (ListColumns, ImageColumn)):
        yield from _paths(source.table)
    elif isinstance(source, np.ndarray):
        while source is not None:  # a view of it is mapped too
            if isinstance(source, np.memmap) and source.filename:
                yield str(source.filename)
            source = getattr(source, "base", None)
    elif isinstance(source, (list, tuple)):
        yield from _paths(source[0]) if source and isinstance(source[0], np.ndarray) else ()
    elif isinstance(getattr(source, "cache_files", None), list):  # a table of `datasets`
        yield from (file["filename"] for file in source.cache_files)
    elif hasattr(source, "sources"):  # pictures
        yield from _paths(source.sources)


class MappedFiles:
    """Files with the size and the time that they had when this was made."""

    def __init__(self, paths: list[str]):
        self.paths, self.marks = paths, [_mark(path) for path in paths]

    def changed(self) -> str | None:
        """The first file that is not as it was, with what differs; None: all are."""
        return self.differing([_mark(path) for path in self.paths])

    def differing(self, marks: list[list[int] | None]) -> str | None:
        """The first file whose mark is not the one of `marks`, with what differs."""
        for path, before, now in zip(self.paths, self.marks, marks):
            if before != now:
                return f"{Path(path).name} ({_difference(before, now)})"
        return None


def _mark(path: str) -> list[int] | None:
    """[size in bytes, time of the last change in nanoseconds], or None for a file that is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _difference(before: list[int] | None, now: list[int] | None) -> str:
    if before is None or now is None:
        return "it is gone" if now is None else "it is new"
    if before[0] != now[0]:
        return f"{before[0]:,} bytes before, {now[0]:,} now"
    return "written to at another time"
