"""Bits per dimension: the variational bound on the likelihood of items, term by term.

The bound is that of Ho et al. (arXiv:2006.11239, equation 5), for the variance that the scheduler or the model gives
(Nichol & Dhariwal, arXiv:2102.09672). `GaussianScheduler.bound_term` has its terms.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.data.scaling import levels_of
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.pairs import Pairs, is_paired
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.randomness import Stream, derive_seed

NEEDED = "bits_per_dim needs the bound of a GaussianScheduler (GaussianScheduler.from_config makes one), got {kind}"


class BoundTerm(NamedTuple):
    """The bound's term in bits per dimension, as the mean over items and over the timesteps `low` to `high` - 1."""

    low: int
    high: int
    value: float


def stratum_edges(steps: int, timesteps: int) -> list[int]:
    """Divide the timesteps from 0 to `steps` - 1 into `timesteps` strata, of which one timestep each is measured.

    The first stratum is t = 0 alone, the decoder. The others grow linearly in width, because the terms are larger and
    differ more at small t. From `timesteps` = `steps` on, each timestep is a stratum.

    Returns:
        The first timestep of each stratum, and at the end `steps`.
    """
    count = min(timesteps, steps) - 1
    if count < 1:
        return [0, steps]
    places = np.arange(count + 1)
    edges = np.maximum(1 + places, np.rint(1 + (steps - 1) * (places / count) ** 2).astype(int))
    return [0, *edges.tolist()]


class Likelihood:
    """The variational bound of a model, on items that training does not see, or else on those that it sees.

    In each stratum of timesteps, the term is measured at one timestep of each item, and multiplied by the number of
    timesteps in the stratum: an unbiased estimate of their sum. Timesteps and noise follow from (seed, item, stratum).

    Args:
        dataset: the items that training sees, map-style.
        held_out: the items that it does not see, which are measured; None if there are none: those of `dataset` are.
        is_image: True for images, False for sequences, which have a density.
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        classes: the classes of the data; None if it has none.
        pairs: the measured items with their conditions, for a model with paired conditions; None if they have none.

    Attributes:
        seen: True if training sees the items.
        levels: the number of values that each channel of images of whole numbers can have, for the discretized decoder,
            or one number for all channels; None for a density.
        count: the number of items; after a call, the number of those that could be read.
        terms: after a call, the terms of the bound over the timesteps, a list of `BoundTerm`.
    """

    def __init__(
        self, dataset, held_out, is_image: bool, settings: EvalSettings, shares: Shares,
        classes: DataClasses | None = None, pairs: Pairs | None = None,
    ):  # fmt: skip
        self.pairs = pairs
        self.settings, self.shares, self.seen = settings, shares, held_out is None
        self.levels = levels_of(underlying(dataset)) if is_image else None
        measured = dataset if held_out is None else held_out
        self.classes = classes and (classes.numbers if held_out is None else classes.held_out)
        self.count = min(len(measured), settings.likelihood_items)
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 6)).permutation(len(measured))
        self.chosen = np.sort(order[: self.count])
        self.items = Part(measured, self.chosen)
        self.terms: list[BoundTerm] = []
        self.checked = False  # the levels of the items

    def check(self, scheduler) -> None:
        """Check the scheduler and read images once, so that what is wrong is found before samples are drawn.

        Args:
            scheduler: the `GaussianScheduler` whose chain will be measured.

        Raises:
            ValueError: the scheduler is not a `GaussianScheduler`, images of whole numbers have other values, or an
                item cannot be read.
        """
        check_bound(scheduler)
        if self.levels is not None and not self.checked:
            s = self.settings
            for batch in Items(self.items, s.on_bad_image, s.batch_size, s.workers).read(range(len(self.items))):
                self._check_levels(batch.x0)  # a dataset gives images in the model's units
            self.checked = True

    @torch.no_grad()
    def __call__(
        self, pipeline, scheduler, encode: Callable[[Tensor], Tensor], between: Callable[[], None] = lambda: None,
        model_classes: list[int] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Measure a pipeline, after `check`.

        Args:
            pipeline: the pipeline whose model is measured.
            scheduler: the `GaussianScheduler` whose chain is measured.
            encode: a function from items of the dataset to the model's units.
            between: a function that is called before each batch, equally often on every process.
            model_classes: the model's number for each class of the data; None for a model without classes.

        Returns:
            `bits_per_dim`, its parts `bits_per_dim_decoder` (t = 0) and `bits_per_dim_prior`, and
            `bits_per_dim_standard_error`, the standard error over the items.
        """
        edges = stratum_edges(scheduler.config.num_train_timesteps, self.settings.likelihood_timesteps)
        strata = list(zip(edges[:-1], edges[1:]))
        s = self.settings
        items = Items(self.items, s.on_bad_image, s.batch_size, s.workers)

        def terms(numbers: range) -> Iterator[Tensor]:
            batches = items.read(numbers)
            for _ in range(0, self.shares.largest(len(self.items)), s.batch_size):
                batch = next(batches, None)  # None: another process has more
                if batch is not None:
                    chosen = self.chosen[list(batch.numbers)].tolist()
                    x0 = encode(batch.x0).to(pipeline.device, torch.float32)
                    model = self._model(pipeline.unet, chosen, model_classes, x0.device)
                    if is_paired(pipeline):
                        model = self.pairs.model(pipeline, model, chosen)
                    columns = [self._per_dim(scheduler.prior_term(x0.double()), pipeline)]
                for stratum, (low, high) in enumerate(strata):
                    between()
                    if batch is not None:
                        t, noise = self._draws(chosen, stratum, low, high, x0)
                        columns.append(self._term(pipeline, model, scheduler, x0, t, noise) * (high - low))
                if batch is not None:
                    yield torch.stack(columns, dim=1).cpu()  # (B, 1 + strata)

        (found,) = self.shares.collect(terms(self.shares.of(len(self.items))), lambda x: x)
        self.count = len(found)
        prior, *means = found.mean(dim=0).tolist()
        self.terms = [BoundTerm(low, high, mean / (high - low)) for (low, high), mean in zip(strata, means)]
        values = {"bits_per_dim": prior + sum(means), "bits_per_dim_decoder": means[0], "bits_per_dim_prior": prior}
        if self.count > 1:
            values["bits_per_dim_standard_error"] = (found.sum(dim=1).std() / math.sqrt(self.count)).item()
        return values

    def _term(self, pipeline, model, scheduler, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the bound's term at the timesteps t (B,) in bits per dimension, (B,) float64."""
        x_t = scheduler.add_noise(x0, noise, t)
        output = model(x_t, t).sample.double()
        kind = {"decoder": "density"} if self.levels is None else {"levels": self._levels(x0)}
        term = scheduler.bound_term(output, x0.double(), x_t.double(), t, **kind)
        bits = self._per_dim(term, pipeline)
        if self.levels is None:
            scale = self._scale(pipeline, x0)
            # the density of data = x * scale + shift is that of x divided by the scale
            bits = torch.where(t == 0, bits + scale[scale > 0].log2().mean(), bits)
        return bits

    def _per_dim(self, nats: Tensor, pipeline) -> Tensor:
        """Return the mean of nats (B, C, *spatial) in bits (B,), without channels that never change in the data."""
        if self.levels is None:
            nats = nats[:, self._scale(pipeline, nats) > 0]
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def _scale(self, pipeline, like: Tensor) -> Tensor:
        """Return the scale (C,) of the data: data = x * scale + shift for the model's x."""
        scale = getattr(pipeline.config, "data_scale", None) or [1.0] * like.shape[1]
        scale = torch.tensor(scale, dtype=torch.float64, device=like.device)
        if not (scale > 0).any():
            raise ValueError("bits_per_dim needs a channel that changes; all channels of the data are constant")
        return scale

    def _check_levels(self, x0: Tensor) -> None:
        """Raise a ValueError if values of x0 (B, C, H, W), in the model's units, are no levels of the decoder."""
        most = self._levels(x0) - 1
        levels = (x0.double() + 1) * most / 2
        wrong = ((levels - levels.round()).abs() > 1e-2) | (levels < -0.5) | (levels > most + 0.5)
        if wrong.any():
            kind = "8-bit levels" if self.levels == (256,) else "whole numbers in the range of the data"
            raise ValueError(
                f"bits_per_dim of images needs {kind}, for whose bins the likelihood is computed; got the value "
                f"{x0[wrong][0].item():.6g}, which lies between two levels of the model's range -1 to 1, as resized "
                "images do, or outside"
            )

    def _levels(self, x0: Tensor) -> Tensor:
        """Return the numbers of levels, which broadcast against x0 (B, C, H, W), float64."""
        return torch.tensor(self.levels, dtype=torch.float64, device=x0.device).view(-1, 1, 1)

    def _model(self, unet, chosen: list[int], model_classes: list[int] | None, device) -> Callable:
        """Return the model, told the classes of the items with these numbers if it takes classes."""
        if model_classes is None or self.classes is None:
            return unet
        labels = torch.tensor(np.asarray(model_classes)[self.classes[chosen]], device=device)
        return partial(unet, class_labels=labels)

    def _draws(self, chosen: list[int], stratum: int, low: int, high: int, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Draw timesteps (B,) in [low, high) and noise shaped as x0 for the items with these numbers."""
        seeds = [derive_seed(self.settings.seed, Stream.EVALUATION, 7, item, stratum) for item in chosen]
        draws = [np.random.default_rng(seed) for seed in seeds]
        t = torch.tensor([int(draw.integers(low, high)) for draw in draws], device=x0.device)
        noise = np.stack([draw.standard_normal(x0.shape[1:], dtype=np.float32) for draw in draws])
        return t, torch.from_numpy(noise).to(x0.device)


def check_bound(scheduler) -> None:
    """Check that a scheduler has the terms of the bound.

    Raises:
        ValueError: it is a stock scheduler.
    """
    if not hasattr(scheduler, "bound_term"):
        raise ValueError(NEEDED.format(kind=type(scheduler).__name__))
