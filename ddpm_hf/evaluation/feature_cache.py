"""Statistics of real pictures kept on disk, in files named by a digest of everything that they follow from.

Every picture's content is in the digest (sizes and times of files are the same for other contents now and then), so a
moved folder finds its file again. Reading and hashing takes a small part of the time that features take.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Part, fingerprint
from ddpm_hf.version import __version__

NAMES = ("mean", "root", "features", "bad")  # of the arrays in a file
THREADS = 8  # that read files


def content_digests(part: Part, numbers: range) -> Tensor | None:
    """Digests of the pictures of `part` with these numbers as they are before decoding, uint8 (n, 32).

    None where the data set is none of ours, or holds pictures in another form than files, bytes and arrays.
    """
    indices = part.indices[numbers.start : numbers.stop]
    dataset = part.dataset
    while isinstance(dataset, Part):
        indices, dataset = dataset.indices[indices], dataset.dataset
    if type(dataset) is not ImageDataset:
        return None
    sources = (dataset.sources[int(index)] for index in indices)
    if isinstance(dataset.sources, list):  # tables are not read by several threads
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(_digest, sources))
    else:
        digests = [_digest(source) for source in sources]
    if None in digests:
        return None
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).reshape(-1, 32)


def _digest(source: Any) -> bytes | None:
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    digest = hashlib.blake2b(digest_size=32)
    if isinstance(source, str):
        try:
            with open(source, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:  # a picture that cannot be read
            digest.update(f"{type(error).__name__} {source}".encode())
    elif isinstance(source, bytes):
        digest.update(source)
    elif isinstance(source, Image.Image):
        digest.update(repr((source.mode, source.size, source.getpalette(), source.info)).encode())
        digest.update(source.tobytes())
    elif isinstance(source, (list, np.ndarray)):
        array = np.ascontiguousarray(source)
        if array.dtype.kind not in "iufb":
            return None
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    else:
        return None
    return digest.digest()


def file_name(data: ImageDataset, shape: tuple, digests: Tensor, *more: Any) -> str:
    """The name for pictures with these contents, decoded as `data` decodes them, and whatever else counts."""
    key = hashlib.sha256(digests.numpy().tobytes())
    # versions stand for how pictures are decoded; the fingerprint decodes some
    key.update(repr((fingerprint(data, shape), __version__, PIL.__version__, *more)).encode())
    return f"{key.hexdigest()[:32]}.npz"


def load(file: Path, say: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where there is none or it is damaged, which is said."""
    try:
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in NAMES}
    except Exception as error:  # NumPy raises many kinds for damaged files
        say(f"{file} cannot be read ({error}); computing it again")
        return None


def save(file: Path, arrays: dict[str, np.ndarray], say: Callable[[str], None]) -> None:
    """Write a file whole; where that cannot be done it is said, and the run goes on without."""
    aside = file.with_name(f"{file.stem}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **arrays)
        os.replace(aside, file)
    except OSError as error:
        say(
            f"warning: statistics of the real pictures cannot be kept in {file.parent} ({error}); the next evaluation "
            "computes them again. eval_cache_dir names another folder"
        )
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
