"""Arrays in memory-mapped files, which pickle as their place in the file.

A DataLoader's workers that are not forks (macOS, and Linux since Python 3.14) get the dataset as a pickle. NumPy
pickles a mapped array with all its numbers, so each worker would have a copy of the file in its memory.
"""

import os
from typing import Any

import numpy as np


class MappedArray(np.memmap):
    """A mapped array, or a view of one, that pickles as its place in the file; unpickling maps the file again."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        whole = self
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        file = getattr(whole, "filename", None)
        # mode "c" has changes in memory that the file does not have; results of operations have no file
        if file is None or whole.mode == "c" or not os.path.exists(file):
            return np.asarray(self).__reduce_ex__(protocol)
        start = whole.offset + self.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        return _map_again, (str(file), start, self.dtype, self.shape, self.strides)


def _map_again(file: str, start: int, dtype: np.dtype, shape: tuple, strides: tuple) -> MappedArray:
    """Map a file for reading, and return the array whose first number is `start` bytes behind the file's beginning."""
    content = np.memmap(file, np.uint8, "r")
    return np.ndarray(shape, dtype, content, start, strides).view(MappedArray)


def as_mapped(array: Any) -> Any:
    """Return a mapped array of NumPy as a `MappedArray` of the same memory, and anything else as it is."""
    return array.view(MappedArray) if type(array) is np.memmap else array


def mapped_file(array: Any) -> str | None:
    """Return the path of the mapped file behind an array or a view of one, or None."""
    while isinstance(array, np.ndarray):
        if getattr(array, "filename", None):
            return str(array.filename)
        array = array.base
    return None
