"""Files that are mapped into memory while training reads them; a change to one ends the run with the reason.

If a mapped file is cut short, the system ends a process that reads past its end (SIGBUS), without a message. So sizes
and times are compared where the run stands still: at the start, at a resume and at each checkpoint.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_hf.data.given import GivenUnits
from ddpm_hf.data.recordings import RecordingDataset
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.tables import ImageColumn, ListColumns


def mapped_files(dataset: Any) -> list[str]:
    """Return the mapped files behind a dataset of this library, a table of `datasets` or an array, as far as known.

    Those of paired conditions are among them.
    """
    sources = (dataset, getattr(dataset, "condition", None))
    return sorted({os.path.abspath(path) for source in sources for path in _paths(source)})


def _paths(source: Any) -> Iterator[str]:
    if isinstance(source, RecordingDataset):
        for recording in source.array.recordings:
            yield from recording.files
    elif isinstance(source, SequenceDataset):
        yield from _paths(source.array)
    elif isinstance(source, (ListColumns, ImageColumn)):
        yield from _paths(source.table)
    elif isinstance(source, GivenUnits):
        yield from _paths(source.given)
    elif isinstance(source, np.ndarray):
        while source is not None:  # a view of a mapped array is mapped too
            if isinstance(source, np.memmap) and source.filename:
                yield str(source.filename)
            source = getattr(source, "base", None)
    elif isinstance(source, (list, tuple)):
        yield from _paths(source[0]) if source and isinstance(source[0], np.ndarray) else ()
    elif isinstance(getattr(source, "cache_files", None), list):  # a table of the datasets library
        yield from (file["filename"] for file in source.cache_files)
    elif hasattr(source, "sources"):  # images
        yield from _paths(source.sources)


class MappedFiles:
    """Files, with the size and modification time that each had when this object was made."""

    def __init__(self, paths: list[str]):
        self.paths, self.marks = paths, [_mark(path) for path in paths]

    def changed(self) -> str | None:
        """Return the name of the first file that has changed, and the difference; None where none has."""
        return self.differing([_mark(path) for path in self.paths])

    def differing(self, marks: list[list[int] | None]) -> str | None:
        """Return the name of the first file that does not match its mark in `marks`, and the difference.

        Marks of another number of files, as earlier versions kept them, cannot be compared.
        """
        for path, before, now in zip(self.paths, self.marks, marks) if len(marks) == len(self.marks) else ():
            if before != now:
                return f"{Path(path).name} ({_difference(before, now)})"
        return None


def _mark(path: str) -> list[int] | None:
    """Return [size in bytes, modification time in nanoseconds], or None for a file that is gone."""
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
