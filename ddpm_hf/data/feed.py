"""The feed: stored or streamed data behind one interface, from which the trainer takes its batches.

A feed gives a `torch` loader of batches from any step on, and says what must be kept to go on from there.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader

from ddpm_hf.data.checking import check_items, check_shared_memory, worker_memory
from ddpm_hf.data.conditions import GivenConditions, matching
from ddpm_hf.data.given import GivenUnits, range_warning
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.labels import Labels, class_notes, given_labels
from ddpm_hf.data.loading import (
    Batch,
    StreamSampler,
    TrainingView,
    collate,
    fingerprint,
    hold_out,
    item_labels,
    split_record,
    underlying,
)
from ddpm_hf.data.mapped import MappedFiles, mapped_files
from ddpm_hf.data.mapped_array import as_mapped
from ddpm_hf.data.resident import IMAGES, LEAST_EPOCHS, ResidentData, ResidentView, make_resident, resident_bytes
from ddpm_hf.data.scaling import scaling_of
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.streaming import ImageStream, Place, StreamingSampler, StreamingView, probe
from ddpm_hf.data.tables import saved_to_disk


def is_map_style(dataset) -> bool:
    """Return True if a dataset has a length and is indexed by numbers."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)


class StoredFeed:
    """The feed of a map-style dataset, some of whose items may be held out.

    Args:
        kind: the kind of data, of `scope.KINDS`; None for a dataset given from Python, whose kind is told here.

    Attributes:
        dataset, held_out: the items that training sees, and those that it does not see (or None).
        units: the dataset that `dataset` selects from.
        scaling: the map between data units and model units, a `Scaling`.
        items: number of items that training sees; None where it is not known.
        shape: shape of an item, (C, *spatial).
        split: fingerprint of the held-out items, by which an evaluation finds the same (`split_record`), or None.
        notes: lines to print about the data before training.
        files: the files that are mapped into memory.
        shared_memory: bytes of shared memory that the loader's workers need.
        kind: the kind of data, of `scope.KINDS`.
        labels: the classes of the rows of `units`, a `Labels` (see `item_labels`), or None without class_labels.
        item_labels: int64 (items,), the class number of each item to train on; None without class_labels.
        class_names: the names of the classes, whose place is the class number; None without class_labels.
        class_counts: the number of items to train on in each class; None where it is not known.
        paired: the items whose conditions `condition` holds: `dataset`, or the first items of a stream.
        condition, held_out_condition: the conditions of `paired` and of the held-out items, as `load_pair` takes them;
            None without condition_column and condition_dir.
        condition_shape: shape of a condition, or None.
        condition_scaling: the map between data units and model units of conditions, or None.

    Raises:
        ValueError: the dataset is not map-style or is empty, or its first item cannot be loaded.
    """

    def __init__(self, dataset, config, kind: str | None = None):
        if not is_map_style(dataset):
            raise ValueError(
                "dataset must be map-style (len, and indexing by numbers; of several splits one, as "
                f"dataset['train']), got {type(dataset).__name__}"
            )
        if len(dataset) == 0:
            raise ValueError("the data is empty: at least one item is needed")
        dataset = as_mapped(dataset)
        self.config, self.dataset, self.held_out, self.split = config, dataset, None, None
        self.files = MappedFiles(mapped_files(underlying(dataset)))
        self.labels = _labels(underlying(dataset), config, kind)
        if config.holdout:
            self.dataset, self.held_out = hold_out(dataset, config.holdout, config.seed)
            self.split = split_record(self.held_out)
        self.units, self.items, self.paired = underlying(self.dataset), len(self.dataset), self.dataset
        self.scaling = scaling_of(self.units)
        if getattr(self.units, "missing", False) and config.condition != "known":
            raise ValueError(
                "a SequenceDataset whose values may be missing needs condition 'known', which leaves them out of the "
                f"loss; got condition {config.condition!r}"
            )
        self._find_conditions(kind)
        self.item_labels = item_labels(self.dataset, self.labels)
        self.class_names = None if self.labels is None else list(self.labels.names)
        self.class_counts = None if self.labels is None else self.labels.counts(self.item_labels)
        first = self._first()
        self.shape = tuple(first.x0.shape[1:])
        self.condition_shape = None if first.conditions is None else tuple(first.conditions.shape[1:])
        self.kind = kind or _given_kind(self.units, self.shape)
        self.shared_memory = _shared_memory(config, self.shape, first)
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
                    raise SystemExit(0) from None  # an error here would have the launcher end the main process' list
                self.check_items()  # lists all such items, then raises
            raise
        return first

    def _find_conditions(self, kind: str | None) -> None:
        self.condition = self.held_out_condition = self.condition_scaling = None
        column = self.config.condition_column
        if kind is None and column is not None:
            whole = GivenConditions(column, place=1 if self.config.class_labels is None else 2)
        else:
            whole = None if kind is None else getattr(self.units, "condition", None)
        if whole is None:
            return
        self.condition = matching(self.units, whole)
        self.condition_scaling = self.condition.scaling
        if self.held_out is not None:
            self.held_out_condition = matching(underlying(self.held_out), whole, self.condition_scaling)

    def _notes(self) -> list[str]:
        notes, held = list(getattr(self.units, "notes", ())), self.held_out
        if held is not None:
            where = underlying(held)
            extent = f", in {where.extent()}" if isinstance(where, SequenceDataset) else ""
            notes.append(f"held out: {len(held):,} items{extent}")
        if isinstance(self.units, SequenceDataset):
            if self.units.gaps:
                notes.append(f"missing values (NaN), which are never known and never in the loss: {self.units.gaps:,}")
            notes += [
                f"channel {channel} of {self.units.name} never changes: samples will have its value, {value:g}"
                for channel, value in self.scaling.constants().items()
            ]
        if not isinstance(self.units, (ImageDataset, SequenceDataset, ScientificImages, GivenUnits)):
            notes += [warning for warning in [range_warning(self.units)] if warning]
        notes += getattr(self.condition, "notes", ())
        if self.condition_shape is not None:
            notes.append(f"conditions of shape {self.condition_shape}")
        return notes + (class_notes(self.class_names, self.class_counts) if self.class_names else [])

    def _view(self) -> TrainingView:
        return TrainingView(self.dataset, self.config.seed, self.config.on_bad_image, labels=self.item_labels,
                            condition=self.condition)  # fmt: skip

    def check_items(self) -> None:
        """Read every item, held-out items too, and print a line for each that cannot be used.

        Raises:
            ValueError: an item would end the training.
        """
        datasets = [dataset for dataset in (self.dataset, self.held_out) if dataset is not None]
        check_items(datasets, self.config, self.condition)

    def check(self, state: dict) -> None:
        """Check that training can go on from a `state`.

        Raises:
            ValueError: the state is that of another version.
        """

    def loader(
        self, step: int, process: int, processes: int, state: dict, pin_memory: bool,
        resident: ResidentData | None = None,
    ) -> DataLoader:  # fmt: skip
        """Return a loader of the batches of one process after `step` optimizer steps; `state(step)` gave `state`.

        For data that is `resident` on a device, the batches hold the numbers by which `resident.gather` makes them.
        """
        c = self.config
        start = step * c.train_batch_size * c.gradient_accumulation_steps * processes
        sampler = StreamSampler(len(self.dataset), c.train_batch_size, c.seed, start, process, processes)
        return _loader(self._view() if resident is None else resident.view, sampler, c, pin_memory)

    def resident(self, device: torch.device, most: int, draws: int) -> ResidentData | None:
        """Put the items to train on on a device, if they can stay there; return None if they cannot.

        Args:
            most: bytes of the device's memory that they may take.
            draws: number of items that training still draws. Images are put there if that is several times their
                number, because all are decoded first.
        """
        c, size = self.config, resident_bytes(self.dataset, self.condition)
        few = isinstance(self.units, IMAGES) and draws < LEAST_EPOCHS * len(self.dataset)
        if size is None or size > most or few:
            return None
        return make_resident(
            self.dataset, c.seed, c.on_bad_image, self.item_labels, self.condition, device,
            c.dataloader_num_workers or 0, c.train_batch_size,
        )  # fmt: skip

    def state(self, step: int) -> dict:
        """Return what must be kept to go on after `step`: nothing here, because the order follows from the step."""
        return {}

    @cached_property
    def _fingerprint(self) -> dict:
        return fingerprint(self.units, self.shape, self.labels, self.condition)

    def fingerprint(self) -> dict:
        """Return the fingerprint that tells this data from other data.

        It is computed once a run. A run that is resumed computes it anew, and so notices changed data; a change of
        mapped files while the run lasts is noticed by `files`.
        """
        return self._fingerprint


class StreamedFeed:
    """The feed of an `ImageStream`; attributes and methods are those of `StoredFeed`.

    With conditions, `labels` has the classes of the items in `paired`.
    """

    held_out = split = labels = class_counts = None
    paired = condition = held_out_condition = condition_shape = condition_scaling = None

    def __init__(self, stream: ImageStream, config, kind: str | None = None):
        self.config, self.dataset, self.units, self.kind = config, stream, stream, kind or "given ImageDataset"
        self.scaling = scaling_of(stream)
        self.class_names = stream.class_names
        self.notes = class_notes(self.class_names, None) if self.class_names else []
        self.items, self.shape = stream.length, probe(stream)
        conditions = None
        if stream.pairs is not None:
            self.paired, self.labels, self.condition = stream.pairs, stream.pairs.labels, stream.pairs.condition
            conditions = self.condition.load_8bit(0)[None]
            self.condition_scaling, self.condition_shape = self.condition.scaling, tuple(conditions.shape[1:])
            self.notes += [*self.condition.notes, f"conditions of shape {self.condition_shape}"]
        labels = torch.zeros(1, dtype=torch.int64) if self.class_names else None
        first = Batch(torch.zeros(1, dtype=torch.uint8), [], labels=labels, conditions=conditions)
        self.shared_memory = _shared_memory(config, self.shape, first)
        folder = Path(config.train_data_dir or config.dataset_name or "")
        self.files = MappedFiles(sorted(map(str, folder.rglob("*.arrow"))) if saved_to_disk(folder) else [])

    def check_items(self) -> None:
        if PartialState().is_main_process:
            read = "one was" if self.condition is None else "pairs were"
            print(f"note: the images are streamed, so that only the first {read} read")

    def check(self, state: dict) -> None:
        Place.from_json(state)

    def loader(
        self, step: int, process: int, processes: int, state: dict, pin_memory: bool, resident: None = None
    ) -> DataLoader:
        c = self.config
        self.sampler = StreamingSampler(
            self.dataset, c.train_batch_size, c.gradient_accumulation_steps, c.seed, process, processes, step, state,
            ahead=2 * (c.dataloader_num_workers or 0),
        )  # fmt: skip
        return _loader(StreamingView(self.dataset, c.seed, c.on_bad_image), self.sampler, c, pin_memory)

    def resident(self, device: torch.device, most: int, draws: int) -> None:
        return None

    def state(self, step: int) -> dict:
        return self.sampler.state(step)

    def fingerprint(self) -> dict:
        return self.dataset.fingerprint(self.shape)


def _given_kind(dataset, shape: tuple) -> str:
    """Return the kind, of `scope.KINDS`, of a dataset given from Python whose items have this shape."""
    if len(shape) != 3:
        return "given sequences"
    return "given ImageDataset" if isinstance(dataset, ImageDataset) else "given images"


def _labels(dataset, config, kind: str | None) -> Labels | None:
    """Return the classes of a dataset that `open_data` built (`kind` is known) or that comes from Python."""
    if config.class_labels is None:
        return None
    if kind is not None:
        return dataset.labels
    return given_labels(dataset.given if isinstance(dataset, GivenUnits) else dataset, config.class_labels)


def _shared_memory(config, shape: tuple, first: Batch) -> int:
    """Return the bytes of shared memory that the loader's workers need for batches like `first`.

    Raises:
        ValueError: there is less.
    """
    workers = config.dataloader_num_workers or 0
    more = [each[0].nbytes for each in (first.labels, first.conditions) if each is not None]
    needed = worker_memory(workers, config.train_batch_size, shape, first.items.element_size(), more)
    check_shared_memory(needed, workers)
    return needed


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(view, sampler, config, pin_memory: bool) -> DataLoader:
    resident = isinstance(view, ResidentView)
    # numbers are quick to find, but for those that the flips of images are drawn by
    workers = 0 if resident and not view.random_flip else config.dataloader_num_workers or 0
    return DataLoader(
        view,
        batch_sampler=sampler,
        collate_fn=_as_it_is if resident else collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # its own generator, so that workers take nothing from the global one
        generator=torch.Generator(),
    )
