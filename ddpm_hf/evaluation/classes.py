"""The classes of generated samples: which class each sample is asked for, and the classes of the real items."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_hf.data.labels import Labels
from ddpm_hf.data.loading import item_labels
from ddpm_hf.randomness import Stream, derive_seed

RULE = "frequencies of the data, shuffled by the seed"  # how samples get their classes, for records
SHOWN = 10  # the number of classes that a message names


@dataclass(frozen=True, eq=False)
class DataClasses:
    """The classes of a set of real items.

    Attributes:
        names: the name of each class.
        counts: the number of items of each class.
        numbers: the class (N,) of each item; None if it is not known.
        held_out: the class of each held-out item; None if there are none, or it is not known.
    """

    names: Sequence[str]
    counts: Sequence[int]
    numbers: np.ndarray | None = None
    held_out: np.ndarray | None = None

    @classmethod
    def of(cls, labels: Labels | None, dataset: Any, held_out: Any = None) -> "DataClasses | None":
        """Return the classes of a dataset and of its held-out items, or None for data without classes.

        Args:
            labels: the classes of the rows of the dataset that both select from.
            dataset: the items to compare with, map-style.
            held_out: the items that training does not see, or None.
        """
        if labels is None:
            return None
        numbers = item_labels(dataset, labels)
        held = None if held_out is None else item_labels(held_out, labels)
        return cls(labels.names, labels.counts(numbers), numbers, held)


def class_quota(counts: Sequence[int], num_samples: int) -> np.ndarray:
    """Share samples among classes by the frequencies of the data, as (classes,) whole numbers.

    Each class gets the whole part of its expected number, `num_samples * count / sum(counts)`. The samples that are
    left go, one each, to the classes with the largest rests, the earlier one of equal rests. So every number is within
    1 of the expected one, and a class without items gets none.

    Args:
        counts: the number of real items of each class.
        num_samples: the number of samples.

    Raises:
        ValueError: if no class has an item.
    """
    counts = np.asarray(counts, dtype=np.int64)
    total = int(counts.sum())
    if total < 1:
        raise ValueError("the data has classes, but none of them has an item")
    # whole numbers, so that no machine rounds otherwise
    quota, rest = counts * num_samples // total, counts * num_samples % total
    left = num_samples - int(quota.sum())
    quota[np.argsort(-rest, kind="stable")[:left]] += 1
    return quota


def sample_classes(counts: Sequence[int], num_samples: int, seed: int) -> np.ndarray:
    """Return the class of each sample, int64 (num_samples,).

    `class_quota` says how many samples each class gets; `seed` shuffles them. The class of sample number i depends on
    nothing else, so neither on the number of processes nor on the batch size.
    """
    classes = np.repeat(np.arange(len(counts)), class_quota(counts, num_samples))
    return np.random.default_rng(derive_seed(seed, Stream.EVALUATION, 3)).permutation(classes)


def has_classes(pipeline) -> bool:
    """Return True if a pipeline's model takes classes."""
    return bool(getattr(pipeline.unet.config, "num_class_embeds", None))


def model_classes(pipeline, names: Sequence[str]) -> list[int]:
    """Return the model's number for each class of the data, which may be in another order or be fewer.

    Classes are matched by their names if the pipeline has names (`id2label`), and by their numbers otherwise.

    Args:
        pipeline: a pipeline whose model takes classes.
        names: the names of the data's classes.

    Raises:
        ValueError: if the model does not have a class of the data.
    """
    known, total = getattr(pipeline.config, "id2label", None), pipeline.unet.config.num_class_embeds
    if not known:
        if len(names) > total:
            raise ValueError(f"the data has {len(names)} classes, and the pipeline's model knows {total}")
        return list(range(len(names)))
    numbers = {name: int(number) for number, name in known.items()}
    missing = [name for name in names if name not in numbers]
    if missing:
        raise ValueError(
            f"the data has the class {', '.join(missing[:SHOWN])}, which the pipeline's model does not know; its "
            f"classes are {', '.join(list(numbers)[:SHOWN])}{', ...' if len(numbers) > SHOWN else ''}"
        )
    return [numbers[name] for name in names]
