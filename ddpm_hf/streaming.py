"""Pictures that are streamed instead of stored: spread over processes, shuffled in a buffer, resumed exactly.

The shards of the data are dealt to lanes, whose number follows from the global batch alone. A lane is an endless row of
pictures: its shards in an order drawn anew each epoch, shuffled in blocks. Sample i of a step is always the next of the
same lane, so the order does not depend on processes or workers, and the place of every lane is all there is to resume.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.data import IMAGE_MODES, BadImageError, ImageDataset, decode
from ddpm_hf.seeding import Stream, derive_seed
from ddpm_hf.sources import undecoded


class Row(NamedTuple):
    """A picture, undecoded, and where it is from."""

    epoch: int
    position: int  # of the shard in the epoch's order
    shard: int
    row: int  # in the shard
    source: Any


class ImageStream:
    """The pictures of a column of a `datasets.IterableDataset`.

    Args:
        images: how they are resized, cropped and flipped (its own sources are not used).
        buffer: pictures in memory to shuffle, per whole run.

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
        self.first = next(self.read(0, 0), None)
        if self.first is None:
            raise ValueError(f"{name} holds no pictures")

    def read(self, shard: int, skip: int) -> Iterator[Any]:
        """The sources of one shard, from row `skip` on."""
        table = self.table.shard(num_shards=self.num_shards, index=shard)
        for row in table.skip(skip) if skip else table:
            yield row[self.column]

    def load(self, row: Row, rng: np.random.Generator | None) -> Tensor:
        """uint8 (C, H, W).

        Raises:
            BadImageError: the picture cannot be read.
        """
        images, name = self.images, f"number {row.row} of shard {row.shard}"
        image = decode(row.source, IMAGE_MODES[images.channels], images.resolution, name)
        return images.finish(np.asarray(image).reshape(image.height, image.width, images.channels), rng)

    def fingerprint(self, shape: tuple) -> dict:
        """What tells other data from the same: shards, shape, and a digest of the first picture as it is stored."""
        digest = hashlib.sha256(repr(self.first).encode())
        return {"items": self.num_shards, "shape": list(shape), "digest": digest.hexdigest()}


class StreamingView(Dataset):
    """`Row`s -> tensors, in workers: augmentation follows from (seed, epoch, shard, row)."""

    def __init__(self, stream: ImageStream, seed: int, on_bad: str):
        self.stream, self.seed, self.on_bad = stream, seed, on_bad

    def __getitem__(self, row: Row) -> tuple[Tensor | None, list[str], str | None]:
        rng = np.random.default_rng(derive_seed(self.seed, Stream.AUGMENTATION, row.epoch, row.shard, row.row))
        try:
            return self.stream.load(row, rng), [], None
        except BadImageError as error:
            if self.on_bad == "stop":
                return None, [], f"{error}. To leave such pictures out: --on_bad_image skip"
            return None, [str(error)], None


class Lane:
    """An endless row of pictures.

    Args:
        number, lanes: this lane has the shards `number`, `number + lanes`, ...
        block: pictures that are shuffled together; a block ends with the epoch.
        state: as `state()` gave it, to go on from there.
    """

    def __init__(self, stream: ImageStream, seed: int, number: int, lanes: int, block: int, pool: ThreadPoolExecutor,
                 state: list[int] | None = None):  # fmt: skip
        self.stream, self.seed, self.number, self.block = stream, seed, number, max(1, block)
        self.shards, self.pool = np.arange(number, stream.num_shards, lanes), pool
        self.blocks, *self.start, self.offset = state or [0, 0, 0, 0, 0]
        self._rows = self._endless(*self.start)
        self._next: Future = pool.submit(self._read)
        self._shuffled: list[Row] = []
        if self.offset:
            self._open(self.blocks)

    def state(self) -> list[int]:
        """[blocks before, epoch, position, row of the first of the block, pictures taken of it]."""
        return [self.blocks, *self.start, self.offset]

    def _endless(self, epoch: int, position: int, skip: int) -> Iterator[Row | None]:
        """All rows from a place on, and None at the end of each epoch."""
        while True:
            order = np.random.default_rng(derive_seed(self.seed, Stream.SHARDS, self.number, 0, epoch))
            order = order.permutation(self.shards)
            while position < len(order):
                shard = int(order[position])
                for row, source in enumerate(self.stream.read(shard, skip), start=skip):
                    yield Row(epoch, position, shard, row, source)
                position, skip = position + 1, 0
            yield None
            epoch, position = epoch + 1, 0

    def _read(self) -> list[Row]:
        """The next block, in the order of the data; empty at an epoch's end."""
        block = []
        for row in islice(self._rows, self.block):
            if row is None:
                break
            block.append(row)
        return block

    def _open(self, number: int) -> None:
        """Take the block that was read ahead, shuffled as block `number`, and have the next one read."""
        for _ in range(3):  # the end of an epoch, and one without rows, are empty
            block = self._next.result()
            self._next = self.pool.submit(self._read)
            if block:
                break
        else:
            raise ValueError(f"shards {self.shards.tolist()} of {self.stream.name} hold no pictures")
        self.blocks, self.start = number, [block[0].epoch, block[0].position, block[0].row]
        order = np.random.default_rng(derive_seed(self.seed, Stream.SHARDS, self.number, 1, number))
        self._shuffled = [block[i] for i in order.permutation(len(block))]

    def __next__(self) -> Row:
        if self.offset >= len(self._shuffled):
            self._open(self.blocks + bool(self._shuffled))
            self.offset = 0
        self.offset += 1
        return self._shuffled[self.offset - 1]


class StreamingSampler(Sampler):
    """Batches of `Row`s for one process, with the place of each of its lanes after every step.

    Args:
        batch_size, parts: samples of one forward pass of a process, and passes of a step.
        step: steps done before.
        states: of the lanes, by number, after that step; None: from the start.
        ahead: batches that a loader asks for in advance.
    """

    def __init__(self, stream: ImageStream, batch_size: int, parts: int, seed: int, process: int = 0,
                 processes: int = 1, step: int = 0, states: dict | None = None, ahead: int = 0):  # fmt: skip
        self.stream, self.batch_size, self.parts, self.seed = stream, batch_size, parts, seed
        self.process, self.processes, self.step, self.ahead = process, processes, step, ahead
        total = batch_size * parts * processes
        self.lanes = lane_count(total, stream.num_shards)
        self.each = total // self.lanes
        self.firsts = [(part * processes + process) * batch_size for part in range(parts)]
        self.own = sorted({i // self.each for first in self.firsts for i in range(first, first + batch_size)})
        self._initial = states or {}
        self._states: dict[int, dict[str, list[int]]] = {step: self._initial}

    def state(self, step: int) -> dict[str, list[int]]:
        """The places of this process' lanes after a step that was just done."""
        return self._states[step]

    def __iter__(self) -> Iterator[list[Row]]:
        pool = ThreadPoolExecutor(max_workers=min(8, len(self.own)), thread_name_prefix="lane")
        block = self.stream.buffer // self.lanes
        lanes = {
            n: Lane(self.stream, self.seed, n, self.lanes, block, pool, self._initial.get(str(n))) for n in self.own
        }
        step = self.step
        while True:
            rows = {n: [next(lane) for _ in range(self.each)] for n, lane in lanes.items()}
            step += 1
            self._states[step] = {str(n): lane.state() for n, lane in lanes.items()}
            self._states.pop(step - self.ahead - 8, None)  # steps further back are done and saved
            for first in self.firsts:
                yield [rows[i // self.each][i % self.each] for i in range(first, first + self.batch_size)]


def lane_count(total: int, shards: int) -> int:
    """The most lanes that share a global batch of `total` evenly, of `shards` at most."""
    return max(n for n in range(1, min(total, shards) + 1) if total % n == 0)


def probe(stream: ImageStream) -> tuple:
    """The shape of an item, from the first picture that can be read.

    Raises:
        ValueError: none of the first 100 can be read.
    """
    for number, source in enumerate(islice(stream.read(0, 0), 100)):
        try:
            return tuple(stream.load(Row(0, 0, 0, number, source), None).shape)
        except BadImageError as error:
            last = error
    raise ValueError(f"none of the first pictures of {stream.name} can be read: {last}")
