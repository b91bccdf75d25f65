"""Work that processes share: each measures its share of numbered items, and all get the rows of all items.

The rows are in the order of the numbers, so results depend neither on the number of processes nor on the batch size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddpm_hf.data.images import BadImageError
from ddpm_hf.data.loading import Batch, load_item


class Shares:
    """The share of this process, and the exchange between processes.

    Args:
        accelerator: accelerate's `Accelerator`; all of its processes must call the methods that gather.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def of(self, count: int) -> range:
        """Return this process' share of the numbers 0 ... count - 1; it may be empty."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        return range(count * index // processes, count * (index + 1) // processes)

    def largest(self, count: int) -> int:
        """Return the size of the largest part of any process, so that all can take the same number of rounds."""
        return -(-count // self.accelerator.num_processes)

    def gather_objects(self, objects: list) -> list:
        """Join the lists of all processes."""
        if self.accelerator.num_processes == 1:
            return objects
        return self.accelerator.gather_for_metrics(objects, use_gather_object=True)

    def gather(self, rows: Tensor | None) -> Tensor:
        """Return the rows of all processes, in order, on every process.

        Args:
            rows: the rows (n, ...) of this process, where n may differ between processes; None means no rows, whose
                type and shape are then those of a process that has some.

        Raises:
            ValueError: if no process has any.
        """
        found = self.gather_objects([None if rows is None else (len(rows), tuple(rows.shape[1:]), rows.dtype)])
        known = next((each for each in found if each is not None), None)
        if known is None:
            raise ValueError("there is nothing to measure: no item can be read")
        if self.accelerator.num_processes == 1:
            return rows
        counts = [0 if each is None else each[0] for each in found]
        padded = torch.zeros(max(counts), *known[1], dtype=known[2])
        if rows is not None:
            padded[: len(rows)] = rows
        everyone = self.accelerator.gather(padded.to(self.accelerator.device)).cpu()
        parts = everyone.split(max(counts)) if max(counts) else [everyone]
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def collect(self, batches: Iterator, *looks: Callable[[Any], Tensor]) -> list[Tensor]:
        """Apply each function of `looks` to this process' batches, and gather the rows that each of them makes.

        A function that collects several batches has a method `rest`, which makes the rows of the last ones.
        """
        parts: list[list[Tensor]] = [[] for _ in looks]
        for batch in batches:
            for rows, look in zip(parts, looks):
                rows.append(look(batch))
        for rows, look in zip(parts, looks):
            if hasattr(look, "rest"):
                rows.append(look.rest())
        return [self.gather(torch.cat(rows) if rows else None) for rows in parts]


@dataclass
class Loaded(Batch):
    """Items for measuring; `numbers` are those of the items that could be read, and `skipped` names bad images."""

    numbers: Sequence[int] = ()


class Items:
    """The items of a data set for measuring: without augmentation, each once.

    Args:
        on_bad: "stop": a picture that cannot be read is an error; "skip": it is left out, and `bad` names it.

    Attributes:
        bad: messages of the pictures that the last `read` left out.
    """

    def __init__(self, dataset, on_bad: str, batch_size: int, workers: int):
        self.dataset, self.on_bad, self.batch_size, self.workers = dataset, on_bad, batch_size, workers
        self.bad: list[str] = []

    def read(self, numbers: range) -> Iterator[Loaded]:
        """Yield batches of the items with these numbers.

        Raises:
            ValueError: an item that cannot be read, or is of another shape than others.
        """
        loader = DataLoader(
            _Once(self.dataset), batch_size=self.batch_size, sampler=numbers, collate_fn=_join,
            num_workers=self.workers, generator=torch.Generator(),
        )  # fmt: skip
        self.bad = []
        for batch in loader:
            if batch.skipped and self.on_bad == "stop":
                batch.error = f"{batch.skipped[0]}. To leave such images out: --on_bad_image skip"
            if batch.error:
                raise ValueError(f"evaluation: {batch.error}")
            self.bad += batch.skipped
            if batch.items is not None:
                yield batch


class _Once(Dataset):
    """Gives (number, item, None) for each item, or (number, None, error) for one that cannot be loaded."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[int, Tensor | None, ValueError | None]:
        try:
            return number, load_item(self.dataset, number, raw=True), None
        except ValueError as error:
            return number, None, error


def _join(batch: list[tuple[int, Tensor | None, ValueError | None]]) -> Loaded:
    good = [(number, x) for number, x, error in batch if error is None]
    bad = [str(error) for _, _, error in batch if isinstance(error, BadImageError)]
    wrong = [f"item {n} of the data: {e}" for n, _, e in batch if e is not None and not isinstance(e, BadImageError)]
    shapes = sorted({tuple(x.shape) for _, x in good})
    if len(shapes) > 1 and not wrong:
        wrong = [f"items must all have one shape, got {shapes}"]
    items = torch.stack([x for _, x in good]) if good and not wrong else None
    return Loaded(items, bad, wrong[0] if wrong else None, numbers=[number for number, _ in good])
