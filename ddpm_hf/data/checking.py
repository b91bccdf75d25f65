"""Checks before training: that every item can be read, and that the workers have enough shared memory.

`--dry_run` reads all items in parallel and lists those that training would stop at or leave out.
"""

import math
import mmap
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ddpm_hf.data.images import BadImageError, ImageDataset, printable
from ddpm_hf.data.loading import Part, load_pair, underlying
from ddpm_hf.data.sequences import SequenceDataset

SMALL = 1000  # number of images up to which one process reads them all, unless workers are asked for
PREFETCH = 2  # batches that torch loads ahead in each worker


class Seen(NamedTuple):
    """The outcome of reading an item: its shape, or the message that says why it cannot be read."""

    shape: tuple | None
    message: str | None = None
    bad: bool = False  # it is an image that cannot be decoded


class _Reading(Dataset):
    """The items of several datasets, one dataset after another; reading an item gives a `Seen`."""

    def __init__(self, datasets, condition=None):
        self.datasets, self.condition = datasets, condition

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def place(self, number: int) -> tuple[Dataset, int]:
        """Return the dataset that holds an item and the item's index in it; parts are resolved."""
        for dataset in self.datasets:
            if number < len(dataset):
                break
            number -= len(dataset)
        while isinstance(dataset, Part):
            dataset, number = dataset.dataset, int(dataset.indices[number])
        return dataset, number

    def __getitem__(self, number: int) -> Seen:
        dataset, index = self.place(number)
        try:
            return Seen(tuple(load_pair(dataset, self.condition, index)[0].shape))
        except BadImageError as error:
            return Seen(None, str(error), bad=True)
        except ValueError as error:
            return Seen(None, f"item {index} of the data: {error}")
        except Exception as error:  # a user's own dataset may raise anything
            return Seen(None, f"item {index} of the data: {type(error).__name__}: {error}")


def check_items(datasets: Sequence[Dataset], config, condition=None) -> None:
    """Read every item of some datasets, with its condition, and print a line for each that cannot be used.

    Sequences were read completely when they were opened, so they are not read again. The main process alone works.

    Raises:
        ValueError: an item would end the training.
    """
    source = underlying(datasets[0])
    if not PartialState().is_main_process or isinstance(source, SequenceDataset):
        return
    reading = _Reading(datasets, condition)
    bad, wrong, first, alike = 0, 0, None, True
    for number, seen in enumerate(_read_all(reading, *_workers(source, config))):
        message = seen.message
        first = first or seen.shape
        if alike and message is None and seen.shape != first:
            alike = False
            index = reading.place(number)[1]
            message = f"item {index} of the data has the shape {seen.shape}, but those before it have {first}"
        if message is not None:
            tqdm.write(printable(message))
            bad, wrong = bad + seen.bad, wrong + (not seen.bad)
    total = len(reading)
    if wrong:
        raise ValueError(f"{wrong + bad:,} of the {total:,} items of the data, listed above, cannot be used")
    if bad == total:
        raise ValueError(f"none of the {total:,} images can be read")
    if bad and config.on_bad_image == "stop":
        raise ValueError(
            f"{bad:,} of the {total:,} images, listed above, cannot be read. To leave such images out: "
            "--on_bad_image skip"
        )
    left_out = f"{bad:,} of the {total:,} images cannot be read and will be left out (on_bad_image: skip)"
    print(left_out if bad else f"all {total:,} items can be read")


def _read_all(reading: _Reading, workers: int, context: str | None) -> Iterator[Seen]:
    """Yield the outcome for each item, in order, and show a progress bar."""
    loader = DataLoader(
        reading, batch_size=16 if workers else 1, collate_fn=list, num_workers=workers, generator=torch.Generator(),
        multiprocessing_context=context,
    )  # fmt: skip
    with tqdm(total=len(reading), desc="reading all items", unit="item") as bar:
        try:
            for batch in loader:
                yield from batch
                bar.update(len(batch))
        except RuntimeError as error:  # torch raises it where a worker was killed
            raise ValueError(f"the data cannot be read to its end: {error}") from error


def usable_cores() -> int:
    """Return the number of cores that this process may use, where the system tells it, or else those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(source, config) -> tuple[int, str | None]:
    """Return the number of workers, and the multiprocessing context that starts them.

    Unless workers are asked for, many images get one worker for each core. The workers are forks, which need no guarded
    main module. A user's own dataset gets none, because it may not be made for them.
    """
    automatic = sys.platform == "linux" and isinstance(source, ImageDataset) and len(source) > SMALL
    if config.dataloader_num_workers or not automatic:
        return config.dataloader_num_workers, None
    workers = min(8, usable_cores())
    try:
        check_shared_memory(worker_memory(workers, 1, (), 1), workers)
    except ValueError:
        return 0, None
    return workers, "fork"


# ---------------------------------------------------------------------------------------------
# Shared memory


def worker_memory(workers: int, batch_size: int, shape: tuple, item_size: int, more: Sequence[int] = ()) -> int:
    """Return the most bytes of shared memory that the workers' batches fill, for all processes of this machine.

    Args:
        item_size: bytes of one value: 1 for images, which are handed over as uint8, and 4 for other items.
        more: bytes of what an item has besides: its class number, its condition.
    """
    if not workers:
        return 0
    sizes = (math.prod((item_size, *shape)), *more)
    batch = sum(-(-batch_size * size // mmap.PAGESIZE) for size in sizes) * mmap.PAGESIZE
    locks = (4 * workers + 16) * mmap.PAGESIZE  # the queues' semaphores take a page each
    return (batch * (workers * PREFETCH + 1) + locks) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_shared_memory(needed: int, workers: int, folder: str = "/dev/shm") -> None:
    """Check that /dev/shm has `needed` bytes free, as `worker_memory` counts them (Linux only).

    Raises:
        ValueError: it has less.
    """
    if not needed or sys.platform != "linux":
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"dataloader_num_workers {workers} needs about {needed / 1e6:,.1f} MB of shared memory for batches, and "
            f"{folder} has {free / 1e6:,.1f} MB free. Choose --dataloader_num_workers 0, fewer workers, a smaller "
            "batch, or a larger /dev/shm (in Docker: --shm-size 1g)"
        )
