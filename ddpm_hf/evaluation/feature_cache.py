"""Statistics of real pictures are kept on disk, in files named by a digest of everything that they depend on.

The digest covers the content of every picture. Sizes and modification times would not do: different contents can share
them, and a folder that is moved would lose its file. Hashing takes a small part of the time that the features take.
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

NAMES = ("mean", "root", "features", "bad")  # the arrays in a file
THREADS = 8  # the number of threads that read pictures


def folder_of(cache_dir: str | None) -> Path:
    """Return the folder of the cache: the one that is given, or ddpm_hf/ in the Hugging Face cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "ddpm_hf"


def content_digests(part: Part, numbers: range) -> Tensor | None:
    """Return digests of the pictures of `part` with these numbers as they are before decoding, uint8 (n, 32).

    It is None if the dataset is not an `ImageDataset`, or holds pictures in another form than files, bytes and arrays.
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
    """Return the digest of one picture before decoding, or None for a form whose content cannot be read."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    digest = hashlib.blake2b(digest_size=32)
    if isinstance(source, str):
        try:
            with open(source, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:  # the picture cannot be read
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
    """Return the name of the file for pictures.

    Args:
        data: the dataset that decodes the pictures.
        shape: the shape (C, H, W) of a decoded picture.
        digests: the digests of the pictures, in order.
        more: everything else that the statistics depend on.
    """
    key = hashlib.sha256(digests.numpy().tobytes())
    # the versions stand for the way of decoding, and the fingerprint contains some decoded pictures
    key.update(repr((fingerprint(data, shape), __version__, PIL.__version__, *more)).encode())
    return f"{key.hexdigest()[:32]}.npz"


def load(file: Path, say: Callable[[str], None], names: tuple = NAMES) -> dict[str, np.ndarray] | None:
    """Return the arrays with these names from a file, or None if there is no file.

    It is None for a damaged file too, and `say` is then told why.
    """
    try:
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # NumPy raises many kinds of errors for damaged files
        say(f"{file} cannot be read ({error}): the statistics are computed again")
        return None


def save(file: Path, arrays: dict[str, np.ndarray], say: Callable[[str], None]) -> None:
    """Write the arrays to a file, whole or not at all. If that fails, `say` gets a warning and the run goes on."""
    aside = file.with_name(f"{file.stem}.{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **arrays)
        os.replace(aside, file)
    except OSError as error:
        say(
            f"warning: statistics of the real images cannot be kept in {file.parent} ({error}); the next evaluation "
            "computes them again. eval_cache_dir names another folder"
        )
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
