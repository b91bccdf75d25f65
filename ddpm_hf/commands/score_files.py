"""Files of scores: parts, one for each block of items, and the table and maps that they are joined into."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddpm_hf.commands.sample_files import write_aside
from ddpm_hf.pipeline.outputs import ScoreOutput

ENDINGS = (".csv", ".parquet")


class ScoreParts:
    """Scores, and maps if they are kept, of `count` items in a folder, one file for each block of items.

    Args:
        folder: the folder.
        count: the number of items.
        block: the number of items in a block; the last one may have fewer.
        has_maps: True to keep the maps.
    """

    def __init__(self, folder: Path, count: int, block: int, has_maps: bool):
        self.folder, self.count, self.block, self.has_maps = folder, count, block, has_maps
        self.blocks = range(-(-count // block))

    def numbers(self, block: int) -> range:
        """Return the numbers of the items of a block."""
        return range(block * self.block, min(self.count, (block + 1) * self.block))

    def _part(self, block: int) -> Path:
        return self.folder / f"{block:08d}.npz"

    def missing(self) -> list[int]:
        """Return the blocks that are not whole."""
        return [block for block in self.blocks if not self._part(block).exists()]

    def write(self, block: int, scores: np.ndarray, maps: np.ndarray, found: ScoreOutput | None) -> None:
        """Write a block.

        Args:
            block: its number.
            scores, maps: the scores (n,) and the maps (n, C, *spatial), NaN for an item that could not be read.
            found: the record of `pipe.score`, for its options and percentiles; None if no item could be read.
        """
        flat, places = maps.reshape(len(maps), -1), np.full(len(scores), np.nan)
        if found is not None and found.percentiles is not None:
            places[np.isfinite(scores)] = found.percentiles
        values = {
            "scores": scores, "percentiles": places, "lowest": flat.min(axis=1), "highest": flat.max(axis=1),
            "options": json.dumps(None if found is None else found.options),
        }  # fmt: skip
        kept = {"maps": maps.astype(np.float32)} if self.has_maps else {}

        def save(path: Path) -> None:
            with open(path, "wb") as file:  # np.savez would add .npz to the temporary name
                np.savez(file, **values, **kept)

        write_aside(self._part(block), save)

    def joined(self, name: str) -> np.ndarray:
        """Return an array of all items, once every block is whole.

        Args:
            name: "scores", "percentiles", or "lowest" or "highest", the extreme values of each map.
        """
        return np.concatenate([self._read(block, name) for block in self.blocks])

    def options(self) -> dict:
        """Return the options that the scores depend on, as `pipe.score` tells them."""
        found = [json.loads(str(self._read(block, "options"))) for block in self.blocks]
        return next(each for each in found if each is not None)

    def _read(self, block: int, name: str) -> np.ndarray:
        with np.load(self._part(block)) as part:
            return part[name]

    def maps(self) -> Iterator[tuple[range, np.ndarray]]:
        """Yield the numbers of the items of each block and their maps, once every block is whole."""
        for block in self.blocks:
            yield self.numbers(block), self._read(block, "maps")

    def maps_of(self, block: int) -> np.ndarray:
        """Return the maps of a block that is whole."""
        return self._read(block, "maps")

    def write_maps(self, path: Path) -> None:
        """Write the maps of all items as one array, float32 (N, C, *spatial)."""

        def save(aside: Path) -> None:
            shape = self.maps_of(0).shape[1:]
            whole = np.lib.format.open_memmap(aside, "w+", np.float32, (self.count, *shape))
            for numbers, maps in self.maps():
                whole[numbers.start : numbers.stop] = maps
            whole.flush()

        write_aside(path, save)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write rows as .csv or .parquet, by the ending; NaN is an empty cell of a .csv file."""

    def save_csv(aside: Path) -> None:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([["" if each != each else _text(each) for each in row] for row in rows])

    def save_parquet(aside: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(dict(zip(columns, map(list, zip(*rows))))), aside)

    write_aside(path, save_csv if path.suffix.lower() == ".csv" else save_parquet)


def _text(value) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)


def read_scores(path: Path) -> np.ndarray:
    """Read the scores (N,) of a table that `write_table` wrote."""
    import pandas as pd

    table = pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    return table["score"].to_numpy(dtype=np.float64)
