"""The loss on items that training does not see, over buckets of timesteps."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.loading import underlying
from ddpm_hf.evaluation.pairs import Pairs, is_paired
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.randomness import Stream, derive_seed

BUCKETS = 10  # the number of buckets of timesteps


class HeldOutLoss:
    """The mean squared error of a model's output on every held-out item, at one timestep of each bucket.

    Timesteps and noise follow from (seed, item, bucket). The loss is plain in one metric, and weighted in the other,
    by the weights of `GaussianScheduler.loss_weights`.

    Args:
        held_out: the items, map-style.
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        classes: the class (N,) of each item, for a model with classes; None if there are none.
        pairs: the items with their conditions, for a model with paired conditions; None if they have none.

    Attributes:
        count: the number of items; after a call, the number of those that could be read.
    """

    def __init__(
        self, held_out, settings: EvalSettings, shares: Shares, classes: np.ndarray | None = None,
        pairs: Pairs | None = None,
    ):  # fmt: skip
        self.pairs = pairs
        self.held_out, self.settings, self.shares, self.classes = held_out, settings, shares, classes
        self.count = len(held_out)

    @torch.no_grad()
    def __call__(
        self, pipeline, scheduler, metrics: list[str], encode: Callable[[Tensor], Tensor],
        between: Callable[[], None] = lambda: None, model_classes: list[int] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Measure a pipeline.

        Args:
            pipeline: the pipeline whose model is measured.
            scheduler: the `GaussianScheduler` whose timesteps, target and weights are used.
            metrics: the metrics that are asked for.
            encode: a function from items of the dataset to the model's units.
            between: a function that is called before each batch, equally often on every process.
            model_classes: the model's number for each class of the data; None for a model without classes.

        Returns:
            The values by name, with one value for each bucket of timesteps: `held_out_loss_t0-99` and so on.
        """
        steps = scheduler.config.num_train_timesteps
        edges = np.linspace(0, steps, min(BUCKETS, steps) + 1).astype(int)
        items = Items(self.held_out, self.settings.on_bad_image, self.settings.batch_size, self.settings.workers)

        def losses(numbers: range) -> Iterator[Tensor]:
            batches = items.read(numbers)
            for _ in range(0, self.shares.largest(len(self.held_out)), self.settings.batch_size):
                between()
                batch = next(batches, None)
                if batch is None:  # another process has more
                    continue
                x0, counted = batch.x0, None
                if getattr(underlying(self.held_out), "missing", False):
                    counted = ~x0.isnan().to(pipeline.device)
                    x0 = x0.nan_to_num(0.0)
                x0 = encode(x0).to(pipeline.device, torch.float32)
                model, columns = self._model(pipeline.unet, batch.numbers, model_classes, x0.device), []
                if is_paired(pipeline):
                    model = self.pairs.model(pipeline, model, batch.numbers)
                for bucket, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
                    t, noise = self._draws(batch.numbers, bucket, low, high, x0)
                    each = diffusion_loss(model, scheduler, x0, t, noise, weighting="uniform", counted=counted)
                    plain = each.loss.double()
                    columns.append(torch.stack((plain, plain * scheduler.loss_weights(t).to(plain))).cpu())
                yield torch.stack(columns, dim=2).movedim(1, 0)  # (B, 2, buckets)

        (found,) = self.shares.collect(losses(self.shares.of(len(self.held_out))), lambda x: x)
        self.count = len(found)
        plain, weighted = found.mean(dim=0)
        values = {}
        if "held_out_loss" in metrics:
            values["held_out_loss"] = plain.mean().item()
            names = [f"held_out_loss_t{low}-{high - 1}" for low, high in zip(edges[:-1], edges[1:])]
            values.update(zip(names, plain.tolist()))
        if "held_out_weighted_loss" in metrics:
            values["held_out_weighted_loss"] = weighted.mean().item()
        return values

    def _model(self, unet, numbers: list[int], model_classes: list[int] | None, device) -> Callable:
        """Return the model, told the classes of the items with these numbers if it takes classes."""
        if model_classes is None or self.classes is None:
            return unet
        labels = torch.tensor(np.asarray(model_classes)[self.classes[numbers]], device=device)
        return partial(unet, class_labels=labels)

    def _draws(self, numbers: list[int], bucket: int, low: int, high: int, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Draw timesteps (B,) in [low, high) and noise shaped as x0 for the items with these numbers."""
        seeds = [derive_seed(self.settings.seed, Stream.EVALUATION, 1, number, bucket) for number in numbers]
        draws = [np.random.default_rng(seed) for seed in seeds]
        t = torch.tensor([int(draw.integers(low, high)) for draw in draws], device=x0.device)
        noise = np.stack([draw.standard_normal(x0.shape[1:], dtype=np.float32) for draw in draws])
        return t, torch.from_numpy(noise).to(x0.device)
