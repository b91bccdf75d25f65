"""Images that are streamed instead of stored: each comes once an epoch, shuffled in a buffer; a resume is exact.

The order of the stream follows from the seed and the data alone, not from the batch, processes or workers. Each epoch
reads the shards in a new order, some of them at a time, and shuffles the rows in blocks. The number of rows in a shard
is known only when it was read, so every process reads the whole stream, undecoded, and decodes its own samples.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddpm_hf.data.conditions import image_conditions, same_factor
from ddpm_hf.data.images import IMAGE_MODES, BadImageError, ImageDataset, decode, image_form
from ddpm_hf.data.labels import Labels, check_column, feature_names
from ddpm_hf.data.loading import Item
from ddpm_hf.data.scaling import EIGHT_BIT
from ddpm_hf.data.tables import features, undecoded
from ddpm_hf.randomness import Stream, derive_seed

OPEN_SHARDS = 16  # shards that are read side by side
CHUNK = 16  # rows of a shard that are read at once
LOOKED_AT = 100  # first rows of which one must be readable


class Labelled(NamedTuple):
    """An undecoded image with the number of its class, as the stream gives it; None where it has none."""

    image: Any
    label: int | None


class Paired(NamedTuple):
    """An undecoded image, `Labelled` if the stream has classes, and its undecoded condition."""

    source: Any
    condition: Any


class Row(NamedTuple):
    """An undecoded image, `Labelled` or `Paired` if the stream has classes or conditions, and its place."""

    epoch: int
    shard: int
    row: int  # number in the shard
    source: Any


@dataclass(frozen=True)
class Place:
    """A place in the stream, from which it can be read on. A checkpoint holds it as a dict.

    Attributes:
        epoch: the epoch that is read.
        number: the next block of the epoch.
        opened: number of shards that the epoch has opened before that block.
        turn: which of the open shards gives the next row.
        open: (shard, next row) of each open shard.
        taken: number of samples that were already taken from the block.
    """

    epoch: int = 0
    number: int = 0
    opened: int = 0
    turn: int = 0
    open: tuple[tuple[int, int], ...] = ()
    taken: int = 0

    def to_json(self) -> dict:
        """Return the form that checkpoints hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, state: dict | None) -> "Place":
        """Read the form that checkpoints hold; an empty one is the start of the stream.

        Raises:
            ValueError: a version that read the stream in another order wrote it.
        """
        if not state:
            return cls()
        if state.keys() != {f.name for f in dataclasses.fields(cls)}:
            raise ValueError(
                "the checkpoint's place in the streamed data is one of ddpm_hf 0.2.0 or earlier, whose order was "
                "another (it drew small shards too often): finish the run with that version, or choose another "
                "output_dir"
            )
        return cls(**{**state, "open": tuple((shard, row) for shard, row in state["open"])})


class ImageStream:
    """The images in a column of a `datasets.IterableDataset`.

    Args:
        images: an `ImageDataset` whose options say how images are resized, cropped and flipped; its sources are not
            used.
        buffer: number of images that are shuffled together.
        name: name of the data in messages.
        class_column: column of the classes, a ClassLabel feature; None: no classes.
        condition_column: column of the images that are the conditions; None: no conditions.
        kept: number of pairs to keep in memory, undecoded, for the pictures of samples.

    Attributes:
        scaling: the map between 8-bit levels and model units.
        length: number of images, or None where the dataset does not tell it.
        class_names: the names of the classes, or None.
        pairs: images of several shards that can be read, with their classes and conditions, or None. Other conditions
            have the form of the first one.

    Raises:
        ValueError: the data holds no images, the column of the classes does not name them, or an image and its
            condition do not fit.
    """

    scaling = EIGHT_BIT

    def __init__(self, table: Any, column: str, images: ImageDataset, buffer: int, name: str,
                 class_column: str | None = None, condition_column: str | None = None, kept: int = 1):  # fmt: skip
        self.class_column, self.condition_column = class_column, condition_column
        self.class_names = None if class_column is None else stream_classes(features(table), class_column, name)
        if condition_column is not None:
            check_column(condition_column, list(features(table)), name, option="condition_column")
        others = [other for other in (class_column, condition_column) if other is not None]
        self.table, self.column, self.images, self.buffer = undecoded(table, column, *others), column, images, buffer
        self.name, self.num_shards = name, table.num_shards
        splits, split = getattr(table.info, "splits", None) or {}, str(table.split or "")
        self.length = splits[split].num_examples if split in splits else None
        self.first = next((source for _, _, source in self.sources()), None)
        if self.first is None:
            raise ValueError(f"{name} holds no images")
        self._conditions = f"the column {condition_column!r} of {name}"
        self.pairs: ImageDataset | None = None
        if condition_column is not None:
            self._keep_pairs(kept)

    def _keep_pairs(self, count: int) -> None:
        """Keep the first `count` pairs that can be read, or fewer; the first one tells the form of all conditions.

        Shards take turns, because each of them may hold one class alone.
        """
        form, classes, last = self.images, [], None
        for place in islice(self._in_turn(), max(count, LOOKED_AT)):
            row, (image, _, condition) = Row(0, *place), _parts(place[-1])
            try:
                self.load(row, None)
                decode(condition, IMAGE_MODES[form.channels], form.resolution, self._name_of_condition(row))
            except BadImageError as error:
                last = error
                continue
            self._check_size(row)
            if self.pairs is None:
                self.pairs = ImageDataset([image], form.resolution, form.channels, form.center_crop, form.random_flip)
                self.pairs.condition = image_conditions([condition], self.pairs, self._conditions)
            else:
                self.pairs.sources.append(image)
                self.pairs.condition.sources.append(condition)
            classes.append(self.label(row))
            if len(classes) == count:
                break
        if self.pairs is None:
            raise ValueError(f"none of the first pairs of {self.name} can be read: {last}")
        if self.class_names is not None:
            self.pairs.labels = Labels(np.array(classes, np.int64), tuple(self.class_names))

    def read(self, shard: int, skip: int) -> Iterator[Any]:
        """Yield the undecoded images of one shard, from row `skip` on."""
        table = self.table.shard(num_shards=self.num_shards, index=shard)
        for row in table.skip(skip) if skip else table:
            image = row[self.column]
            source = image if self.class_column is None else Labelled(image, row[self.class_column])
            yield source if self.condition_column is None else Paired(source, row[self.condition_column])

    def sources(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (shard, row, undecoded image) of all images, shard by shard."""
        for shard in range(self.num_shards):
            for row, source in enumerate(self.read(shard, 0)):
                yield shard, row, source

    def _in_turn(self) -> Iterator[tuple[int, int, Any]]:
        """Yield what `sources` yields, a row of `OPEN_SHARDS` evenly spaced shards in turn; then the others."""

        def rows(shard: int) -> Iterator[tuple[int, int, Any]]:
            return ((shard, row, source) for row, source in enumerate(self.read(shard, 0)))

        first = list(dict.fromkeys(place * self.num_shards // OPEN_SHARDS for place in range(OPEN_SHARDS)))
        for turn in zip_longest(*map(rows, first)):
            yield from (place for place in turn if place is not None)
        for shard in range(self.num_shards):
            if shard not in first:
                yield from rows(shard)

    def load(self, row: Row, rng: np.random.Generator | None) -> Tensor:
        """Decode a row's image, augmented by `rng` if given, as uint8 (C, H, W).

        Raises:
            BadImageError: the image cannot be read.
        """
        return _load(self.images, _parts(row.source)[0], _name(row), rng)

    def load_condition(self, row: Row, rng: np.random.Generator | None) -> Tensor:
        """Decode a row's condition, augmented by `rng` if given, as uint8 (C', H', W').

        Raises:
            BadImageError: the image or its condition cannot be read.
            ValueError: the condition is smaller than the image by another number than the first one.
        """
        self._check_size(row)
        return _load(self.pairs.condition, _parts(row.source)[2], self._name_of_condition(row), rng)

    def _check_size(self, row: Row) -> None:
        """Check that a row's condition is smaller than its image by the number of the first pair.

        Raises:
            BadImageError: one of both cannot be read.
            ValueError: it is smaller by another number, or by none.
        """
        (image, _, condition), name, own_name = _parts(row.source), _name(row), self._name_of_condition(row)
        first = None if self.pairs is None else self.images.resolution[0] // self.pairs.condition.resolution[0]
        size, own = image_form(image, name)[0], image_form(condition, own_name)[0]
        same_factor(size, own, first, self._conditions, name, own_name)

    def _name_of_condition(self, row: Row) -> str:
        return f"{_name(row)} in {self._conditions}"

    def label(self, row: Row) -> int | None:
        """Return the number of a row's class; None where the stream has no classes.

        Raises:
            ValueError: the row has no class.
        """
        if self.class_names is None:
            return None
        label = _parts(row.source)[1]
        if label is None or not 0 <= label < len(self.class_names):
            raise ValueError(
                f"the column {self.class_column!r} of {self.name} must hold the number of a class, at least 0 and less "
                f"than {len(self.class_names)}; row {row.row} of shard {row.shard} has "
                f"{'no value' if label is None else label}"
            )
        return label

    def fingerprint(self, shape: tuple) -> dict:
        """Return a fingerprint of the data: number of shards, shape, and digests of the first row as it is stored."""
        first = self.first if isinstance(self.first, Paired) else Paired(self.first, None)
        digest, conditions = (hashlib.sha256(repr(each).encode()).hexdigest() for each in first)
        found = {"items": self.num_shards, "shape": list(shape), "digest": digest}
        return found if self.pairs is None else {**found, "conditions": conditions}


def _parts(source: Any) -> tuple[Any, int | None, Any]:
    """Return the undecoded image of a row, its class and its undecoded condition; None for what it does not have."""
    source, condition = source if isinstance(source, Paired) else (source, None)
    image, label = source if isinstance(source, Labelled) else (source, None)
    return image, label, condition


def _name(row: Row) -> str:
    """Return the name of a row's image in messages."""
    return f"number {row.row} of shard {row.shard}"


def _load(images: ImageDataset, source: Any, name: str, rng: np.random.Generator | None) -> Tensor:
    """Decode an image in the form that `images` has, augmented by `rng` if given, as uint8 (C, H, W)."""
    image = decode(source, IMAGE_MODES[images.channels], images.resolution, name)
    return images.finish(np.asarray(image).reshape(image.height, image.width, images.channels), rng)


class StreamingView(Dataset):
    """Decodes `Row`s in the loader's workers; augmentation follows from (seed, epoch, shard, row).

    Args:
        on_bad: an image that cannot be read makes the item an error ("stop"), or a number that follows from the same
            place and draws the image of its batch that stands in for it ("skip", see `collate`).
    """

    def __init__(self, stream: ImageStream, seed: int, on_bad: str):
        self.stream, self.seed, self.on_bad = stream, seed, on_bad

    def __getitem__(self, row: Row) -> Item:
        place = (row.epoch, row.shard, row.row)

        def rng():  # both images of a pair are mirrored alike
            augments = self.stream.images.augments  # making a generator takes a while
            return np.random.default_rng(derive_seed(self.seed, Stream.AUGMENTATION, *place)) if augments else None

        try:
            x = self.stream.load(row, rng())
            condition = None if self.stream.pairs is None else self.stream.load_condition(row, rng())
            return Item(x, [], label=self.stream.label(row), condition=condition)
        except BadImageError as error:
            if self.on_bad == "stop":
                return Item(None, [], f"{error}. To leave such images out: --on_bad_image skip")
            return Item(derive_seed(self.seed, Stream.STAND_IN, *place), [str(error)])
        except ValueError as error:  # it has no class, or a condition that does not fit
            return Item(None, [], str(error))


class OpenShard:
    """The rows of one shard from a given row on; a pool of threads reads small chunks of them ahead.

    Attributes:
        number: the number of the shard.
        row: the number of the row that `take` returns next.
    """

    def __init__(self, stream: ImageStream, number: int, row: int, pool: ThreadPoolExecutor):
        self.number, self.row, self.pool = number, row, pool
        self._sources = stream.read(number, row)
        self._chunk: list[Any] = []
        self._next: Future = pool.submit(self._read)

    def _read(self) -> list[Any]:
        return list(islice(self._sources, CHUNK))[::-1]

    def take(self, epoch: int) -> Row | None:
        """Return the next row, or None at the end of the shard."""
        if not self._chunk:
            self._chunk = self._next.result()
            if not self._chunk:
                return None
            self._next = self.pool.submit(self._read)
        self.row += 1
        return Row(epoch, self.number, self.row - 1, self._chunk.pop())


class Blocks:
    """The endless sequence of shuffled blocks; each holds up to `block` rows of an epoch, as they are read.

    Each epoch draws a new order of its shards. `OPEN_SHARDS` of them are open at a time and give one row each in turn;
    when one ends, the next unread shard takes its place.

    Args:
        place: the place to go on from, between two blocks (`taken` is not used).

    Raises:
        ValueError: an epoch has no rows (when the next block is read).
    """

    def __init__(self, stream: ImageStream, seed: int, block: int, pool: ThreadPoolExecutor, place: Place):
        self.stream, self.seed, self.block, self.pool = stream, seed, block, pool
        self.epoch, self.number, self.opened, self.turn = place.epoch, place.number, place.opened, place.turn
        self.open = [OpenShard(stream, shard, row, pool) for shard, row in place.open]

    def place(self) -> Place:
        """Return the place before the next block."""
        shards = tuple((shard.number, shard.row) for shard in self.open)
        return Place(self.epoch, self.number, self.opened, self.turn, shards)

    def __next__(self) -> tuple[Place, list[Row]]:
        """Return the place before the block, and its rows, shuffled."""
        while True:
            place, rows = self.place(), self._read()
            if rows:
                order = derive_seed(self.seed, Stream.SHARDS, 1, self.epoch, self.number)
                self.number += 1
                return place, [rows[i] for i in np.random.default_rng(order).permutation(len(rows))]
            if self.number == 0:
                raise ValueError(f"{self.stream.name} holds no images")
            self.epoch, self.number, self.opened, self.turn = self.epoch + 1, 0, 0, 0

    def _read(self) -> list[Row]:
        """Return the rows of the next block, unshuffled; none at the end of the epoch."""
        order = np.random.default_rng(derive_seed(self.seed, Stream.SHARDS, 0, self.epoch))
        order = order.permutation(self.stream.num_shards)
        rows: list[Row] = []
        while len(rows) < self.block:
            while len(self.open) < OPEN_SHARDS and self.opened < len(order):
                # it takes the place of the shard that ended, whose turn it was
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


class StreamingSampler(Sampler):
    """Batches of `Row`s for one process, with the place in the stream after every step.

    All processes share one order: each reads all rows, undecoded, and yields those of its own samples.

    Args:
        batch_size, parts: samples in one forward pass of a process, and forward passes in a step.
        step: optimizer steps that were done before.
        state: the result of `state(step)` on any process; empty: the stream begins at its start.
        ahead: number of batches that the loader asks for in advance.

    Raises:
        ValueError: the state is that of another version.
    """

    def __init__(self, stream: ImageStream, batch_size: int, parts: int, seed: int, process: int = 0,
                 processes: int = 1, step: int = 0, state: dict | None = None, ahead: int = 0):  # fmt: skip
        self.stream, self.batch_size, self.parts, self.seed = stream, batch_size, parts, seed
        self.step, self.ahead, self.total = step, ahead, batch_size * parts * processes
        self.firsts = [(part * processes + process) * batch_size for part in range(parts)]
        self._places: dict[int, Place] = {step: Place.from_json(state)}

    def state(self, step: int) -> dict:
        """Return the place in the stream after a step that was just done; it is the same on all processes."""
        return self._places[step].to_json()

    def __iter__(self) -> Iterator[list[Row]]:
        own = {first + i for first in self.firsts for i in range(self.batch_size)}
        step, rows = self.step, {}
        samples = self._samples(self._places[step], own)
        while True:
            for i in range(self.total):
                place, row = next(samples)
                if i in own:
                    rows[i] = row
            step += 1
            self._places[step] = place
            self._places.pop(step - self.ahead - 8, None)  # steps further back are done and saved
            for first in self.firsts:
                yield [rows.pop(i) for i in range(first, first + self.batch_size)]

    def _samples(self, place: Place, own: set[int]) -> Iterator[tuple[Place, Row]]:
        """Yield all samples from a place on, each after the place that follows it."""
        readers = min(8, OPEN_SHARDS, self.stream.num_shards)
        shards = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="shard")
        ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block")
        blocks = Blocks(self.stream, self.seed, self.stream.buffer, shards, place)
        taken, number = place.taken, 0  # `number` counts samples from the first place, which is between two steps
        following = ahead.submit(next, blocks)
        try:
            while True:
                place, rows = following.result()
                following = ahead.submit(next, blocks)
                # images of other processes' samples need no memory
                rows = [row if (number + i) % self.total in own else row._replace(source=None)
                        for i, row in enumerate(rows[taken:])][::-1]  # fmt: skip
                while rows:
                    taken, number = taken + 1, number + 1
                    yield dataclasses.replace(place, taken=taken), rows.pop()
                taken = 0
        finally:
            for pool in (ahead, shards):
                pool.shutdown(wait=False, cancel_futures=True)


def probe(stream: ImageStream) -> tuple:
    """Return the shape (C, H, W) of the first image that can be read.

    Raises:
        ValueError: none of the first 100 images can be read.
    """
    for place in islice(stream.sources(), LOOKED_AT):
        row = Row(0, *place)
        try:
            shape = tuple(stream.load(row, None).shape)
            stream.label(row)  # a first row without a class is told before training
            return shape
        except BadImageError as error:
            last = error
    raise ValueError(f"none of the first images of {stream.name} can be read: {last}")


def stream_classes(columns: Any, column: str, name: str) -> list[str]:
    """Return the names of the classes in a column of a stream.

    Raises:
        ValueError: there is no such column, or it is not a ClassLabel feature; others are known only at the end.
    """
    check_column(column, list(columns), name)
    names = feature_names(columns[column])
    if names is None:
        raise ValueError(
            f"class_labels of streamed data must be a ClassLabel column, whose classes are known beforehand; "
            f"{column!r} of {name} is {columns[column]}: train without --streaming, or save the table with "
            f"dataset.class_encode_column({column!r})"
        )
    return names
