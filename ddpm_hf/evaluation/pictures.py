"""Metrics that compare features of samples with those of real pictures, whose statistics are kept on disk."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.data.scaling import scaling_of
from ddpm_hf.evaluation import feature_cache
from ddpm_hf.evaluation.features import FeatureNetwork
from ddpm_hf.evaluation.fidelity import Fidelity
from ddpm_hf.evaluation.metrics import Gaussian, frechet_distance
from ddpm_hf.evaluation.settings import FIDELITY, EvalSettings
from ddpm_hf.evaluation.shares import Shares

KID_FEATURES = 10_000  # the number of real features that are kept for KID, which compares subsets of 1,000


class PictureDistances:
    """FID, KID and the metrics of `Fidelity` against one set of pictures.

    Args:
        real: the pictures to compare with.
        shape: the shape (C, H, W) of one picture.
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        network: the network of the features; None means the one that the settings name.

    Attributes:
        bad: messages of the pictures that were left out of the statistics, once they are there.

    Raises:
        ValueError: if the pictures have other than 1, 3 or 4 channels, or the network cannot be loaded.
    """

    def __init__(
        self, real: Part, shape: tuple, settings: EvalSettings, shares: Shares, network: FeatureNetwork | None = None
    ):
        if shape[0] not in (1, 3, 4):
            raise ValueError(
                f"features need images of 1, 3 or 4 channels, the data has {shape[0]}: name the other metrics"
            )
        self.real, self.shape, self.settings, self.shares = real, shape, settings, shares
        self.fidelity: Fidelity | None = None
        self.needs_all = bool(set(settings.metrics or ()) & set(FIDELITY))  # all features, beside those for KID
        self.accelerator = shares.accelerator
        if network is not None:
            self.network = network
            return
        with self.accelerator.local_main_process_first():  # one process downloads the network if need be
            self.network = FeatureNetwork(
                settings.feature_network, settings.feature_resolution, self.accelerator.device
            )

    # -- real pictures -------------------------------------------------------------------------

    def load(self) -> bool:
        """Take the statistics from the cache, and return True if they are there; otherwise `fit` must follow."""
        self.file = self.cache_file()
        # each node of a cluster may have its own cache, so the statistics count only if all nodes have them
        self.accelerator.wait_for_everyone()
        stored = None if self.file is None else feature_cache.load(self.file, self.accelerator.print)
        every = None
        if stored is not None and self.needs_all:
            every = stored["features"]
            if len(self.real) - len(stored["bad"]) > KID_FEATURES:
                found = feature_cache.load(self.beside("all"), self.accelerator.print, ("features",))
                every = None if found is None else found["features"]
        complete = stored is not None and not (self.needs_all and every is None)
        if all(self.shares.gather_objects([complete])):
            self._compare_with(every)
            self.gaussian, self.features = Gaussian(stored["mean"], stored["root"]), stored["features"]
            self.bad = stored["bad"].tolist()
            return True
        return False

    def of_real(self, x0: Tensor) -> Tensor:
        """Return the features (B, D) of real pictures (B, C, H, W) in model units."""
        limit = scaling_of(underlying(self.real)).limit  # 1, but for pictures of mean 0 and deviation 1
        return self.network(eight_bit(x0 / limit if limit > 1 else x0))

    def fit(self, features: Tensor, bad: list[str]) -> None:
        """Keep the statistics of the features (N, D) of all real pictures, in memory and in the cache.

        Args:
            features: the features of all processes, in the order of the pictures.
            bad: messages of the pictures that could not be read.
        """
        array, self.bad = features.numpy(), bad
        self.gaussian = Gaussian.fit(array)
        chosen = np.random.default_rng(0).permutation(len(array))[:KID_FEATURES]
        self.features = array[np.sort(chosen)]
        if self.file is not None and self.accelerator.is_local_main_process:
            arrays = dict(zip(("mean", "root"), self.gaussian), features=self.features, bad=np.array(bad, str))
            feature_cache.save(self.file, arrays, print)
            if self.needs_all and len(array) > KID_FEATURES:
                feature_cache.save(self.beside("all"), {"features": array}, print)
        self.accelerator.wait_for_everyone()
        self._compare_with(array)

    def beside(self, name: str) -> Path:
        """Return the file of the cache for further statistics of the same pictures."""
        return self.file.with_name(f"{self.file.stem}-{name}.npz")

    def _compare_with(self, features: np.ndarray | None) -> None:
        """Make the metrics of `Fidelity` if they are asked for, from the features (N, D) of all real pictures."""
        if self.needs_all:
            self.fidelity = Fidelity(features, self.shares, self.settings.num_neighbours, self._kept)

    def _kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of this name from the cache of all nodes; otherwise compute it, and keep it there."""
        if self.file is None:
            return compute()
        file = self.beside(name)
        self.accelerator.wait_for_everyone()
        stored = feature_cache.load(file, self.accelerator.print, (name,))
        if all(self.shares.gather_objects([stored is not None])):
            return stored[name]
        found = compute()
        if self.accelerator.is_local_main_process:
            feature_cache.save(file, {name: found}, print)
        self.accelerator.wait_for_everyone()
        return found

    def cache_file(self) -> Path | None:
        """Return the file of the cache, named by everything that the statistics depend on.

        It is None for data whose content cannot be digested.
        """
        digests = feature_cache.content_digests(self.real, self.shares.of(len(self.real)))
        if not all(self.shares.gather_objects([digests is not None])):
            return None
        digests = self.shares.gather(digests)
        more = (self.network.digest, self.settings.on_bad_image)
        return feature_cache.folder_of(self.settings.cache_dir) / feature_cache.file_name(
            underlying(self.real), self.shape, digests, *more
        )

    def announce(self) -> None:
        """Say that the features of the real pictures are computed, and where their statistics are kept."""
        self.accelerator.print(
            f"features of {len(self.real):,} real images by {self.settings.feature_network}: computed once"
            + (f", kept in {self.file}" if self.file else "")
        )

    # -- samples -------------------------------------------------------------------------------

    def of_samples(self, images: np.ndarray) -> Tensor:
        """Return the features (B, D) of samples (B, H, W, C) in [0, 1], rounded to 8 bits as saved pictures are."""
        return self.network((images * 255).round().astype(np.uint8))

    def values(self, features: Tensor, metrics: list[str]) -> dict[str, float]:
        """Return the values of those of the metrics that `metrics` names, for the samples' features (n, D)."""
        from cleanfid.fid import kernel_distance

        values = {}
        if "fid" in metrics:
            values["fid"] = frechet_distance(self.gaussian, features.numpy())
        if "kid" in metrics:
            with numpy_seed(self.settings.seed):
                values["kid"] = kernel_distance(self.features.astype(np.float64), features.double().numpy())
        if self.fidelity is not None:
            values.update(self.fidelity.values(features.numpy(), metrics))
        return values


def eight_bit(x: Tensor) -> np.ndarray:
    """Turn pictures (B, C, H, W) in [-1, 1] into 8 bits (B, H, W, C)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()


@contextlib.contextmanager
def numpy_seed(seed: int):
    """Seed NumPy's global generator, from which clean-fid draws, and put its state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
