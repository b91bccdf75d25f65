"""Distances between generated and real sequences, both standardized by the real data's mean and deviation."""

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.scaling import has_own_units, scaling_of
from ddpm_hf.evaluation.fidelity import Fidelity
from ddpm_hf.evaluation.metrics import (
    Gaussian,
    autocorrelation,
    autocorrelation_error,
    frechet_distance,
    log_power_spectrum,
    sliced_wasserstein,
)
from ddpm_hf.evaluation.networks import SequenceFeatures
from ddpm_hf.evaluation.settings import FEATURE_FRECHET, FIDELITY, EvalSettings
from ddpm_hf.evaluation.shares import Shares


class SequenceDistances:
    """Distances to one set of sequences.

    Args:
        natural: the real sequences (N, C, length) in the data's own units, float64.
        metrics: the metrics that will be asked for.
        settings: the settings of the evaluation; their seed draws the projections of the sliced Wasserstein distance.
        shares: the exchange between processes.
        network: the network whose features `FEATURE_FRECHET` and the metrics of `FIDELITY` compare; None: the latter
            compare standardized sequences.

    Attributes:
        reference: the real sequences (N, C * length), each channel with mean 0 and deviation 1.
    """

    def __init__(
        self, natural: Tensor, metrics: list[str], settings: EvalSettings, shares: Shares,
        network: SequenceFeatures | None = None,
    ):  # fmt: skip
        self.shape, self.metrics, self.seed = tuple(natural.shape[1:]), metrics, settings.seed
        self.mean = natural.mean(dim=(0, 2), keepdim=True)
        spread = natural.std(dim=(0, 2), keepdim=True)
        self.spread = torch.where(spread > 0, spread, 1.0)
        self.reference = self.standardized(natural)
        values = self.reference.numpy()
        if "frechet" in metrics:
            self.gaussian = Gaussian.fit(values)
        if "spectral_frechet" in metrics:
            self.spectrum = Gaussian.fit(log_power_spectrum(values.reshape(-1, *self.shape)))
        if "autocorrelation_error" in metrics:
            self.autocorrelation = autocorrelation(values.reshape(-1, *self.shape))
        self.network, self.fidelity = network, None
        compared = values if network is None else self.features(self.reference)
        if FEATURE_FRECHET in metrics:
            self.of_features = Gaussian.fit(compared)
        if set(FIDELITY) & set(metrics):
            self.fidelity = Fidelity(compared, shares, settings.num_neighbours)

    def features(self, rows: Tensor) -> np.ndarray:
        """Return the network's features (n, D) of rows (n, C * length), as `standardized` gives them.

        Real sequences and samples both come from their rows, so that copies have equal features.
        """
        return self.network(rows.view(-1, *self.shape) * self.spread + self.mean).numpy()

    def standardized(self, natural: Tensor) -> Tensor:
        """Return sequences (n, C, length) in the data's own units as rows (n, C * length) in units of the real data."""
        return ((natural - self.mean) / self.spread).flatten(1)

    def values(self, samples: Tensor) -> dict[str, float]:
        """Return the distances of samples (n, C * length), as `standardized` gives them."""
        flat, real, values = samples.numpy(), self.reference.numpy(), {}
        x = flat.reshape(-1, *self.shape)
        if "frechet" in self.metrics:
            values["frechet"] = frechet_distance(self.gaussian, flat)
        if "spectral_frechet" in self.metrics:
            values["spectral_frechet"] = frechet_distance(self.spectrum, log_power_spectrum(x))
        if "sliced_wasserstein" in self.metrics:
            values["sliced_wasserstein"] = sliced_wasserstein(flat, real, seed=self.seed)
        if "autocorrelation_error" in self.metrics:
            values["autocorrelation_error"] = autocorrelation_error(self.autocorrelation, autocorrelation(x))
        compared = flat if self.network is None else self.features(samples)
        if FEATURE_FRECHET in self.metrics:
            values[FEATURE_FRECHET] = frechet_distance(self.of_features, compared)
        if self.fidelity is not None:
            values.update(self.fidelity.values(compared, self.metrics))
        return values


def natural_units(x: Tensor, data) -> Tensor:
    """Return items (B, C, length) of a dataset in the data's own units, float64.

    Args:
        x: items as the dataset gives them, scaled for the model.
        data: the dataset; where it has no `scaling`, its items are in their own units.
    """
    return scaling_of(data).to_data(x.double())


def sample_units(x: Tensor, data) -> Tensor:
    """Return items (B, C, *spatial) of a dataset in the units of samples, float64; pictures have levels from 0 to 1.

    Args:
        x: items as the dataset gives them, scaled for the model.
        data: the dataset.
    """
    if x.ndim == 4 and not has_own_units(scaling_of(data)):
        return (x.double() + 1) / 2
    return natural_units(x.flatten(2), data).view(x.shape)


def tensor_of(samples: np.ndarray) -> Tensor:
    """Return samples (B, C, length) as a float64 tensor."""
    return torch.from_numpy(samples).double()
