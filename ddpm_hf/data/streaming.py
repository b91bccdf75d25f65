"""Pictures that are streamed instead of stored: each one once an epoch, shuffled in a buffer, resumed exactly.

The order of the stream follows from the seed and the data alone, not from the batch, processes or workers: each epoch
reads the shards in a new order, some of them at a time, and shuffles the rows in blocks. How many rows a shard holds
is known only when it was read, so every process reads the whole stream, undecoded, and decodes its own samples.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.data.images import IMAGE_MODES, BadImageError, ImageDataset, decode
from ddpm_hf.data.tables import undecoded
from ddpm_hf.randomness import Stream, derive_seed

OPEN_SHARDS = 16  # that are read side by side
CHUNK = 16  # rows of each that are read at once


class Row(NamedTuple):
    """A picture, undecoded, and where it is from."""

    epoch: int
    shard: int
    row: int  # in the shard
    source: Any


class ImageStream:
    """The pictures of a column of a `datasets.IterableDataset`.

    Args:
        images: how they are resized, cropped and flipped (its own sources are not used).
        buffer: pictures that are shuffled together.

    Attributes:
        length: number of pictures, where the data set says it; else None.

    Raises:
        ValueError: it holds no picture, or none of the first that can be read.
    """

    def __init__(self, table: Any, column: str, images: ImageDataset, buffer: int, name: str):
        self.table, self.column, self.images, self.buffer = undecoded(table, column), column, images, buffer
        self.name, self.num_shards = name, table.num_shards
        splits, split = getattr(table.info, "splits", None) or {}, str(table.split or "")
        self.length = splits[split].num_examples if split in splits else None
        self.first = next((source for _, _, source in self.sources()), None)
        if self.first is None:
            raise ValueError(f"{name} holds no pictures")

    def read(self, shard: int, skip: int) -> Iterator[Any]:
        """The sources of one shard, from row `skip` on."""
        table = self.table.shard(num_shards=self.num_shards, index=shard)
        for row in table.skip(skip) if skip else table:
            yield row[self.column]

    def sources(self) -> Iterator[tuple[int, int, Any]]:
        """(shard, row, source) of all pictures, shard by shard."""
        for shard in range(self.num_shards):
            for row, source in enumerate(self.read(shard, 0)):
                yield shard, row, source

    def load(self, row: Row, rng: np.random.Generator | None) -> Tensor:
        """uint8 (C, H, W).

        Raises:
            BadImageError: the picture cannot be read.
        """
        images, name = self.images, f"number {row.row} of shard {row.shard}"
        image = decode(row.source, IMAGE_MODES[images.channels], images.resolution, name)
        return images.finish(np.asarray(image).reshape(image.height, image.width, images.channels), rng)

    def fingerprint(self, shape: tuple) -> dict:
        """Return a fingerprint of the data: shards, shape, and a digest of the first picture as it is stored."""
        digest = hashlib.sha256(repr(self.first).encode())
        return {"items": self.num_shards, "shape": list(shape), "digest": digest.hexdigest()}


class StreamingView(Dataset):
    """`Row`s -> tensors, in workers: augmentation follows from (seed, epoch, shard, row).

    A picture that cannot be read is an error (`on_bad="stop"`), or a number that follows from the same and draws the
    picture of its batch that stands in for it (see `collate`).
    """

    def __init__(self, stream: ImageStream, seed: int, on_bad: str):
        self.stream, self.seed, self.on_bad = stream, seed, on_bad

    def __getitem__(self, row: Row) -> tuple[Tensor | int | None, list[str], str | None]:
        place = (row.epoch, row.shard, row.row)
        rng = np.random.default_rng(derive_seed(self.seed, Stream.AUGMENTATION, *place))
        try:
            return self.stream.load(row, rng), [], None
        except BadImageError as error:
            if self.on_bad == "stop":
                return None, [], f"{error}. To leave such pictures out: --on_bad_image skip"
            return derive_seed(self.seed, Stream.STAND_IN, *place), [str(error)], None


class OpenShard:
    """The rows of one shard from a row on, read ahead in small chunks by a pool of threads.

    Attributes:
        row: the number of the next row that `take` gives.
    """

    def __init__(self, stream: ImageStream, number: int, row: int, pool: ThreadPoolExecutor):
        self.number, self.row, self.pool = number, row, pool
        self._sources = stream.read(number, row)
        self._chunk: list[Any] = []
        self._next: Future = pool.submit(self._read)

    def _read(self) -> list[Any]:
        return list(islice(self._sources, CHUNK))[::-1]

    def take(self, epoch: int) -> Row | None:
        """The next row, or None at the end of the shard."""
        if not self._chunk:
            self._chunk = self._next.result()
            if not self._chunk:
                return None
            self._next = self.pool.submit(self._read)
        self.row += 1
        return Row(epoch, self.number, self.row - 1, self._chunk.pop())


class Blocks:
    """The endless row of blocks: each epoch's rows, up to `block` of them in each, in the order in which they are read.

    An epoch reads its shards in an order drawn anew. `OPEN_SHARDS` of them are open at a time and give one row each in
    turn; one that is at its end hands over to the next unread shard.

    Args:
        place: as `place()` gave it, to go on from there.

    Raises:
        ValueError: an epoch has no rows (when the next block is read).
    """

    def __init__(self, stream: ImageStream, seed: int, block: int, pool: ThreadPoolExecutor, place: dict):
        self.stream, self.seed, self.block, self.pool = stream, seed, block, pool
        self.epoch, self.number, self.opened, self.turn = (
            place[name] for name in ("epoch", "number", "opened", "turn")
        )
        self.open = [OpenShard(stream, shard, row, pool) for shard, row in place["open"]]

    def place(self) -> dict:
        """The place between two blocks: block `number` of the epoch is the next, `opened` shards of the epoch were
        opened, those in `open` ([shard, next row]) are not at their end, number `turn` of them is the next to give."""
        return {
            "epoch": self.epoch, "number": self.number, "opened": self.opened, "turn": self.turn,
            "open": [[shard.number, shard.row] for shard in self.open],
        }  # fmt: skip

    def __next__(self) -> tuple[dict, list[Row]]:
        """(the place before the block, its rows shuffled)."""
        while True:
            place, rows = self.place(), self._read()
            if rows:
                order = derive_seed(self.seed, Stream.SHARDS, 1, self.epoch, self.number)
                self.number += 1
                return place, [rows[i] for i in np.random.default_rng(order).permutation(len(rows))]
            if self.number == 0:
                raise ValueError(f"{self.stream.name} holds no pictures")
            self.epoch, self.number, self.opened, self.turn = self.epoch + 1, 0, 0, 0

    def _read(self) -> list[Row]:
        """The rows of the next block; none at the end of the epoch."""
        order = np.random.default_rng(derive_seed(self.seed, Stream.SHARDS, 0, self.epoch))
        order = order.permutation(self.stream.num_shards)
        rows: list[Row] = []
        while len(rows) < self.block:
            while len(self.open) < OPEN_SHARDS and self.opened < len(order):
                # in the place of the one that ended, whose turn it was
                self.open.insert(self.turn, OpenShard(self.stream, int(order[self.opened]), 0, self.pool))
                self.opened += 1
            if not self.open:
                break
            row = self.open[self.turn].take(self.epoch)
            if row is None:
                self.open.pop(self.turn)
            else:
                rows.append(row)
                self.turn += 1
            if self.turn >= len(self.open):
                self.turn = 0
        return rows


START = {"epoch": 0, "number": 0, "opened": 0, "turn": 0, "open": [], "taken": 0}


class StreamingSampler(Sampler):
    """Batches of `Row`s for one process, with the place in the stream after every step.

    The order is one for all processes: each reads all rows of it, undecoded, and gives those of its own samples.

    Args:
        batch_size, parts: samples of one forward pass of a process, and passes of a step.
        step: steps done before.
        state: as `state(step)` gave it on any process; empty: from the start.
        ahead: batches that a loader asks for in advance.

    Raises:
        ValueError: the state is of another version.
    """

    def __init__(self, stream: ImageStream, batch_size: int, parts: int, seed: int, process: int = 0,
                 processes: int = 1, step: int = 0, state: dict | None = None, ahead: int = 0):  # fmt: skip
        self.stream, self.batch_size, self.parts, self.seed = stream, batch_size, parts, seed
        self.step, self.ahead, self.total = step, ahead, batch_size * parts * processes
        self.firsts = [(part * processes + process) * batch_size for part in range(parts)]
        check_state(state)
        self._states: dict[int, dict] = {step: state or START}

    def state(self, step: int) -> dict:
        """The place in the stream after a step that was just done: that of `Blocks` before the block of the next
        sample, and the samples `taken` of that block. It is the same on all processes."""
        return self._states[step]

    def __iter__(self) -> Iterator[list[Row]]:
        own = {first + i for first in self.firsts for i in range(self.batch_size)}
        step, rows = self.step, {}
        samples = self._samples(self._states[step], own)
        while True:
            for i in range(self.total):
                place, taken, row = next(samples)
                if i in own:
                    rows[i] = row
            step += 1
            self._states[step] = {**place, "taken": taken}
            self._states.pop(step - self.ahead - 8, None)  # steps further back are done and saved
            for first in self.firsts:
                yield [rows.pop(i) for i in range(first, first + self.batch_size)]

    def _samples(self, state: dict, own: set[int]) -> Iterator[tuple[dict, int, Row]]:
        """All samples from a state on, each with the place of its block and the number taken of it with this one."""
        readers = min(8, OPEN_SHARDS, self.stream.num_shards)
        shards = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="shard")
        ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block")
        blocks = Blocks(self.stream, self.seed, self.stream.buffer, shards, state)
        taken, number = state["taken"], 0  # number: of the sample since the state, which is one between steps
        following = ahead.submit(next, blocks)
        try:
            while True:
                place, rows = following.result()
                following = ahead.submit(next, blocks)
                # pictures of other processes' samples need no memory
                rows = [row if (number + i) % self.total in own else row._replace(source=None)
                        for i, row in enumerate(rows[taken:])][::-1]  # fmt: skip
                while rows:
                    taken, number = taken + 1, number + 1
                    yield place, taken, rows.pop()
                taken = 0
        finally:
            for pool in (ahead, shards):
                pool.shutdown(wait=False, cancel_futures=True)


def check_state(state: dict | None) -> None:
    """Refuse the state of a version that read the stream in another order.

    Raises:
        ValueError: it is one.
    """
    if state and state.keys() != START.keys():
        raise ValueError(
            "the checkpoint's place in the streamed data is one of ddpm_hf 0.2.0 or earlier, whose order was another "
            "(it drew small shards too often): finish the run with that version, or choose another output_dir"
        )


def probe(stream: ImageStream) -> tuple:
    """The shape of an item, from the first picture that can be read.

    Raises:
        ValueError: none of the first 100 can be read.
    """
    for shard, number, source in islice(stream.sources(), 100):
        try:
            return tuple(stream.load(Row(0, shard, number, source), None).shape)
        except BadImageError as error:
            last = error
    raise ValueError(f"none of the first pictures of {stream.name} can be read: {last}")
