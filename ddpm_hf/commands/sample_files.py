"""Files of generated samples, written a block at a time: each file has its own name only once it is whole.

A block is the samples that one call of the pipeline makes. Pictures are written one file a sample. The other formats
are first written as one part for each block, and joined into one file when all parts are there.
"""

import csv
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_hf.commands.sample_conditions import Conditions
from ddpm_hf.run.checkpoint import ASIDE, write_text

FOLDER = 1000  # the largest number of pictures in one folder
ROW_GROUP = 64  # the number of pictures in a row group of a .parquet file


def picture_bytes(image: np.ndarray, form: str) -> bytes:
    """Return an 8-bit picture (H, W, C) as the bytes of a lossless PNG or WebP file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, form, lossless=True)
    return buffer.getvalue()


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file under a temporary name, and give it its own name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    write(aside)
    os.replace(aside, path)


def open_folder(folder: Path, settings: dict, option: str = "output_dir", content: str = "samples") -> None:
    """Make a folder with settings.json, or check that it was made with these settings.

    Args:
        folder: the folder.
        settings: everything that its content depends on.
        option: the option that chooses the folder, for messages.
        content: what the folder holds, for messages.

    Raises:
        ValueError: the folder holds content of other settings, or other files, or it cannot be written.
    """
    file, other = folder / "settings.json", f"choose another --{option}"
    try:
        if file.is_file():
            check_settings(json.loads(file.read_text()), settings, f"{option} {folder}", option, content)
            return
        if folder.exists() and (not folder.is_dir() or any(not p.name.endswith(ASIDE) for p in folder.iterdir())):
            raise ValueError(f"{option} must be a new or empty folder, or one of {content}: {folder}; {other}")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1))
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{option} {folder} cannot be used: {error}; {other}") from error


def check_settings(found: dict, settings: dict, place: str, option: str, content: str) -> None:
    """Check that settings that were found at a place are those of this run.

    Raises:
        ValueError: they differ; the message lists the differences.
    """
    wrong = [
        f"{name}: {found.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)
    ]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{place} holds {content} of other settings; choose another --{option}, or give the same settings to go "
            "on. They differ in:\n  " + "\n  ".join(wrong)
        )


class SampleFiles:
    """The files of `count` samples in a folder.

    Args:
        folder: the folder.
        form: one of `IMAGE_FORMATS` for images, or of `SEQUENCE_FORMATS` for sequences (`ddpm_hf.choices`).
        count: the number of samples.
        block: the number of samples in a block; the last one may have fewer.
        labels: the class of each sample, a name or a number; None for a model without classes.
        conditions: the conditions of the samples, by which pictures are named; None for a model without them.
    """

    def __init__(self, folder: Path, form: str, count: int, block: int, labels: list | None = None,
                 conditions: Conditions | None = None):  # fmt: skip
        self.folder, self.form, self.count, self.block, self.labels = folder, form, count, block, labels
        self.conditions = conditions
        self._names = None if conditions is None else conditions.sample_names()
        self.parts = folder / "parts"
        self.file = folder / f"samples.{form}"
        self.as_pictures = form in ("png", "webp")

    def open(self, settings: dict) -> None:
        """Make the folder, or check that it holds samples of these settings.

        Raises:
            ValueError: the folder holds samples of other settings, or other files, or it cannot be written.
        """
        open_folder(self.folder, settings)

    def numbers(self, block: int) -> range:
        """Return the numbers of the samples of a block."""
        return range(block * self.block, min(self.count, (block + 1) * self.block))

    def picture(self, number: int) -> Path:
        """Return the place of the picture of a sample."""
        if self._names is not None:  # in a folder of their own, since a name may be that of another file here
            return self.folder / "samples" / f"{self._names[number]}.{self.form}"
        folder = self.folder if self.count <= FOLDER else self.folder / f"{number // FOLDER:05d}"
        return folder / f"{number:06d}.{self.form}"

    def _part(self, block: int) -> Path:
        return self.parts / f"{block:08d}.npy"

    def missing(self) -> list[int]:
        """Return the blocks that are not whole."""
        if self.file.exists():
            return []
        blocks = range(-(-self.count // self.block))
        if self.as_pictures:
            return [b for b in blocks if not all(self.picture(n).exists() for n in self.numbers(b))]
        return [b for b in blocks if not self._part(b).exists()]

    def write(self, block: int, samples: np.ndarray) -> None:
        """Write the samples of a block: images (B, H, W, C), of 8 bits but for npy, or sequences (B, C, length)."""
        if not self.as_pictures:
            write_aside(self._part(block), lambda path: _save(path, samples))
            return
        for number, image in zip(self.numbers(block), samples):
            data = picture_bytes(image, self.form)
            write_aside(self.picture(number), lambda path, data=data: path.write_bytes(data))

    def read(self, numbers: range) -> Iterator[np.ndarray]:
        """Yield samples whose blocks are whole, before `join`."""
        for number in numbers:
            if self.as_pictures:
                with Image.open(self.picture(number)) as image:
                    array = np.asarray(image)
                yield array[..., None] if array.ndim == 2 else array
            else:
                yield np.load(self._part(number // self.block), mmap_mode="r")[number % self.block]

    def join(self) -> Path:
        """Write what belongs to all samples, once every block is whole, and return the place of the samples."""
        if self.labels is not None:
            write_aside(self.folder / "labels.csv", lambda path: _write_column(path, "label", self.labels))
        if self.conditions is not None:
            named = self.conditions.sample_conditions()
            write_aside(self.folder / "conditions.csv", lambda path: _write_column(path, "condition", named))
        if self.as_pictures:
            return self.folder if self.conditions is None else self.folder / "samples"
        if not self.file.exists():
            write_aside(
                self.file, {"npy": self._npy, "npz": self._npz, "csv": self._csv, "parquet": self._parquet}[self.form]
            )
        shutil.rmtree(self.parts, ignore_errors=True)
        return self.file

    def _blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        for block in range(-(-self.count // self.block)):
            yield self.numbers(block), np.load(self._part(block))

    def _labels(self, numbers: range) -> list:
        return [self.labels[n] for n in numbers]

    def _npy(self, path: Path) -> None:
        first = np.load(self._part(0), mmap_mode="r")
        whole = np.lib.format.open_memmap(path, "w+", first.dtype, (self.count, *first.shape[1:]))
        for numbers, samples in self._blocks():
            whole[numbers.start : numbers.stop] = samples
        whole.flush()

    def _npz(self, path: Path) -> None:
        array = self.parts / f"arr_0{ASIDE}"
        self._npy(array)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.write(array, "arr_0.npy")

    def _csv(self, path: Path) -> None:
        label = [] if self.labels is None else ["label"]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            for numbers, samples in self._blocks():
                if numbers.start == 0:
                    writer.writerow([f"x{i}" for i in range(samples.shape[-1])] + label)
                ends = [[each] for each in self._labels(numbers)] if label else [[]] * len(numbers)
                digits = 9 if samples.dtype == np.float32 else 17
                writer.writerows([f"{x:.{digits}g}" for x in row[0]] + end for row, end in zip(samples, ends))

    def _parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Features, Sequence, Value
        from datasets import Image as ImageFeature

        first = np.load(self._part(0), mmap_mode="r")
        images = first.ndim == 4
        names = ["image"] if images else [f"channel_{c}" for c in range(first.shape[1])]
        kinds = {name: ImageFeature() if images else Sequence(Value(str(first.dtype))) for name in names}
        if self.labels is not None:
            kinds["label"] = Value("string" if any(isinstance(each, str) for each in self.labels) else "int64")
        schema = Features(kinds).arrow_schema
        with pq.ParquetWriter(path, schema) as writer:
            for numbers, samples in self._blocks():
                if images:
                    columns = {"image": [{"bytes": picture_bytes(x, "png"), "path": None} for x in samples]}
                else:
                    columns = {name: list(samples[:, c]) for c, name in enumerate(names)}
                if self.labels is not None:
                    columns["label"] = self._labels(numbers)
                writer.write_table(pa.Table.from_pydict(columns, schema=schema), row_group_size=ROW_GROUP)


def _write_column(path: Path, name: str, values: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[name], *([value] for value in values)])


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would add .npy to the temporary name
        np.save(file, array)
