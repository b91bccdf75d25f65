"""The source of training batches: stored or streamed data, behind one interface.

Both are a `torch` loader of batches from any step on, and what must be kept to go on from there.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ddpm_hf.data.checking import check_items, check_shared_memory, worker_memory
from ddpm_hf.data.loading import (
    Batch,
    StreamSampler,
    TrainingView,
    collate,
    fingerprint,
    hold_out,
    split_record,
    underlying,
)
from ddpm_hf.data.mapped import MappedFiles, mapped_files
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.streaming import ImageStream, StreamingSampler, StreamingView, check_state, probe
from ddpm_hf.data.tables import saved_to_disk


class StoredFeed:
    """A map-style data set, some of it held out.

    Attributes:
        dataset, held_out: what training sees, and what it does not (or None).
        units: the data set that knows the scaling of sequences.
        items: how many training sees; None where that is not known.
        shape: of an item, (C, *spatial).
        split: what an evaluation needs to hold out the same items (see `split_record`), or None.
        notes: what is to be said of the data at the start, in lines.
        files: those that are mapped into memory.
        shared_memory: bytes of it that the workers of the loader need.
        kind: the kind of data, of `scope.KINDS`; `open_data` sets it.

    Raises:
        ValueError: not map-style, empty, or a first item that cannot be had.
    """

    def __init__(self, dataset, config):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(f"dataset must be map-style (len and indexing), got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise ValueError("the data is empty: at least one item is needed")
        self.config, self.dataset, self.held_out, self.split = config, dataset, None, None
        self.files = MappedFiles(mapped_files(underlying(dataset)))
        if config.holdout:
            self.dataset, self.held_out = hold_out(dataset, config.holdout, config.seed)
            self.split = split_record(self.held_out)
        self.units, self.items = underlying(self.dataset), len(self.dataset)
        first = self._first()
        self.shape = tuple(first.x0.shape[1:])
        self.shared_memory = _shared_memory(config, self.shape, first.items.element_size())
        self.notes = self._notes()
        changed = self.files.changed()
        if changed:
            raise ValueError(f"the data is written to while it is read: {changed}. Start again when it is whole")

    def _first(self) -> Batch:
        try:
            first = collate([self._view()[0, 0]])
            if first.error:
                raise ValueError(first.error)
        except Exception:
            if self.config.dry_run:
                if not Accelerator().is_main_process:
                    raise SystemExit(0) from None  # a failure here would have the launcher end the main process' list
                check_items(self, self.config)  # a list of all such items, then its error
            raise
        return first

    def _notes(self) -> list[str]:
        notes, held = list(getattr(self.units, "notes", ())), self.held_out
        if held is not None:
            where = underlying(held)
            of = f", in {where.extent()}" if isinstance(where, SequenceDataset) else ""
            notes.append(f"held out: {len(held):,} items{of}")
        if isinstance(self.units, SequenceDataset):
            notes += [
                f"channel {channel} of {self.units.name} never changes: samples will have its value, {value:g}"
                for channel, value in self.units.constants().items()
            ]
        return notes

    def _view(self) -> TrainingView:
        return TrainingView(self.dataset, self.config.seed, self.config.on_bad_image)

    def check(self, state: dict) -> None:
        """Refuse to go on from a `state` that does not fit.

        Raises:
            ValueError: the state is of another version.
        """

    def loader(self, step: int, process: int, processes: int, state: dict, pin_memory: bool) -> DataLoader:
        """Batches of one process, from after `step` optimizer steps on; `state` as `state(step)` gave it."""
        c = self.config
        start = step * c.train_batch_size * c.gradient_accumulation_steps * processes
        sampler = StreamSampler(len(self.dataset), c.train_batch_size, c.seed, start, process, processes)
        return _loader(self._view(), sampler, c, pin_memory)

    def state(self, step: int) -> dict:
        """Return what must be kept to go on after `step`: nothing here, the order follows from the step."""
        return {}

    def fingerprint(self) -> dict:
        """Return the fingerprint that tells this data from other data."""
        return fingerprint(self.units, self.shape)


class StreamedFeed:
    """An `ImageStream`; the attributes and methods are those of `StoredFeed`."""

    held_out = split = None
    notes: tuple = ()

    def __init__(self, stream: ImageStream, config):
        self.config, self.dataset, self.units = config, stream, stream
        self.items, self.shape = stream.length, probe(stream)
        self.shared_memory = _shared_memory(config, self.shape, 1)
        folder = Path(config.train_data_dir or config.dataset_name or "")
        self.files = MappedFiles(sorted(map(str, folder.rglob("*.arrow"))) if saved_to_disk(folder) else [])

    def check(self, state: dict) -> None:
        check_state(state)

    def loader(self, step: int, process: int, processes: int, state: dict, pin_memory: bool) -> DataLoader:
        c = self.config
        self.sampler = StreamingSampler(
            self.dataset, c.train_batch_size, c.gradient_accumulation_steps, c.seed, process, processes, step, state,
            ahead=2 * c.dataloader_num_workers,
        )  # fmt: skip
        return _loader(StreamingView(self.dataset, c.seed, c.on_bad_image), self.sampler, c, pin_memory)

    def state(self, step: int) -> dict:
        return self.sampler.state(step)

    def fingerprint(self) -> dict:
        return self.dataset.fingerprint(self.shape)


def _shared_memory(config, shape: tuple, item_size: int) -> int:
    """Return what the loader's workers need.

    Raises:
        ValueError: there is less.
    """
    workers = config.dataloader_num_workers
    needed = worker_memory(workers, config.train_batch_size, shape, item_size)
    check_shared_memory(needed, workers)
    return needed


def _loader(view, sampler, config, pin_memory: bool) -> DataLoader:
    return DataLoader(
        view,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        pin_memory=pin_memory,
        # its own, so that workers take nothing from the global generator
        generator=torch.Generator(),
    )
