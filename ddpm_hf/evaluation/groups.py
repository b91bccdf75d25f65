"""The metrics of each class of the data: its samples against its real items."""

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.loading import Part
from ddpm_hf.evaluation.classes import SHOWN, DataClasses
from ddpm_hf.evaluation.networks import SequenceFeatures
from ddpm_hf.evaluation.pictures import PictureDistances
from ddpm_hf.evaluation.sequences import SequenceDistances
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Shares

LEAST_REAL, LEAST_SAMPLES = 4, 2  # the smallest numbers of real items and of samples of a class


class ClassGroups:
    """Real items and samples by their classes, and distances within each class that has real items.

    A class has the value that an evaluation against its real items alone would have with its samples.

    Args:
        classes: the classes of the data.
        indices: the index (N,) in the data of each real item that samples are compared with.
        asked: the class (n,) of each sample.
        least: the smallest number of real items and of samples of a class that the metrics need; 4 real items and 2
            samples are always needed.

    Attributes:
        distances: for each class, by its name, the distances to its real items.

    Raises:
        ValueError: if the data has no classes, or a class has too few real items or samples.
    """

    def __init__(self, classes: DataClasses | None, indices: np.ndarray, asked: np.ndarray | None, least: int = 1):
        if classes is None or classes.numbers is None:
            raise ValueError("per_class needs data with classes: class_labels must name them; got True")
        least_real, least_samples = max(LEAST_REAL, least), max(LEAST_SAMPLES, least)
        self.least_read = max(2, least)
        real = classes.numbers[indices]
        present = [number for number, count in enumerate(classes.counts) if count]
        self.rows = {classes.names[number]: np.flatnonzero(asked == number) for number in present}
        self.real = {classes.names[number]: np.flatnonzero(real == number) for number in present}
        self.distances: dict[str, PictureDistances | SequenceDistances] = {}
        few = [name for name, own in self.real.items() if len(own) < least_real]
        if few:
            raise ValueError(
                f"per_class needs at least {least_real} real items of each class; "
                f"{self._listed(few, self.real)}: num_real may be too low"
            )
        few = [name for name, own in self.rows.items() if len(own) < least_samples]
        if few:
            needed = max(-(-least_samples * sum(classes.counts) // classes.counts[number]) for number in present)
            raise ValueError(
                f"per_class needs at least {least_samples} samples of each class, and samples have the frequencies of "
                f"the data; {self._listed(few, self.rows)} of {len(asked):,} samples: num_samples must be about "
                f"{needed:,} or more"
            )

    @staticmethod
    def _listed(names: list[str], rows: dict[str, np.ndarray]) -> str:
        more = f" and {len(names) - SHOWN} more classes" if len(names) > SHOWN else ""
        return "got " + ", ".join(f"{len(rows[name])} of class {name}" for name in names[:SHOWN]) + more

    def sizes(self, name: str) -> dict[str, int]:
        """Return the numbers of samples and of real items of a class, for its record."""
        return {"num_samples": len(self.rows[name]), "num_real": len(self.real[name])}

    # -- images --------------------------------------------------------------------------------

    def make_pictures(self, whole: PictureDistances) -> None:
        """Make the distances of each class of images, with the network of all images.

        Args:
            whole: the distances to all real images, as many as the classes were given for.
        """
        for name, own in self.real.items():
            part = Part(whole.real, own)
            self.distances[name] = PictureDistances(part, whole.shape, whole.settings, whole.shares, whole.network)

    def fit_pictures(self, features: Tensor, numbers: Tensor) -> None:
        """Keep the statistics of each class, in memory and in the cache.

        Args:
            features: the features (m, D) of the real images that could be read.
            numbers: their numbers (m,) among the real images.

        Raises:
            ValueError: if too few images of a class could be read.
        """
        for name, distances in self.distances.items():
            read = np.isin(numbers.numpy(), self.real[name])
            if read.sum() < self.least_read:
                raise ValueError(
                    f"per_class needs {self.least_read} real images that can be read; class {name} has {read.sum()}"
                )
            missing = np.setdiff1d(self.real[name], numbers.numpy())
            distances.fit(features[torch.from_numpy(read)], [f"image {number}" for number in missing])

    def leave_out(self) -> None:
        """Count only those real images of each class that could be read, after the statistics are there."""
        for name, distances in self.distances.items():
            self.real[name] = self.real[name][: len(self.real[name]) - len(distances.bad)]

    # -- sequences -----------------------------------------------------------------------------

    def fit_sequences(
        self, natural: Tensor, metrics: list[str], settings: EvalSettings, shares: Shares,
        network: SequenceFeatures | None = None,
    ) -> None:  # fmt: skip
        """Make the distances of each class of sequences.

        Args:
            natural: all real sequences (N, C, length) in the data's own units, float64.
            metrics: the metrics that will be asked for.
            settings, shares, network: as in `SequenceDistances`.
        """
        for name, own in self.real.items():
            rows = natural[torch.from_numpy(own)]
            self.distances[name] = SequenceDistances(rows, metrics, settings, shares, network)

    # -- samples -------------------------------------------------------------------------------

    def values(self, found: Tensor, metrics: list[str]) -> dict[str, float]:
        """Return the values of all classes, named "metric/class".

        Args:
            found: the features (n, D) of all samples, or for sequences the samples (n, C, length).
            metrics: the metrics that are asked for.
        """
        values = {}
        for name, distances in self.distances.items():
            own = found[torch.from_numpy(self.rows[name])]
            if isinstance(distances, PictureDistances):
                of_class = distances.values(own, metrics)
            else:
                of_class = distances.values(distances.standardized(own))
            values |= {f"{metric}/{name}": value for metric, value in of_class.items()}
        return values
