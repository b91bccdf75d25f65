"""The device work of one optimizer step: draws, noise, loss, gradients, clipping, update and average of the weights.

The host's part of a step (reading batches, seeds, the learning rate's schedule, looking at the results) is in
`loop.py`. Nothing here reads a number back from the device, and every number that changes from step to step may be a
tensor on the device, so that a step can be captured as a CUDA graph.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from ddpm_hf.data.loading import Batch
from ddpm_hf.losses import diffusion_loss, drop_labels, training_draws
from ddpm_hf.masks import condition_of, draw_known
from ddpm_hf.pipeline.pairs import enlarged
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.trainer.ema import WeightAverage
from ddpm_hf.trainer.optimizer import rates_from


@dataclass(frozen=True)
class StepNumbers:
    """The numbers that change from step to step, as numbers of Python or as 0-d tensors on the device.

    Attributes:
        first: for each part of the batch, the number in the whole run of its first sample on this process; the other
            samples of the part have the numbers that follow. The draws of a sample follow from its number.
        share: the share of the new weights in the average; None if the step leaves the average alone.
        rates: (groups,) the learning rates of the optimizer's groups on the device; None: those that the groups have.
    """

    first: Sequence[int | Tensor]
    share: float | Tensor | None
    rates: Tensor | None = None


class TrainingStep:
    """One optimizer step on batches that are on the device already.

    Args:
        model: the model as accelerate has prepared it, in training mode when it is called.
        scheduler: `GaussianScheduler`, which gives noise, targets and loss weights.
        optimizer: the optimizer as accelerate has prepared it; its learning rates are those of this step.
        average: the average of the weights, which takes in the new weights.
        config: the `TrainConfig`.
        accelerator: runs the backward pass, accumulation and clipping on one process or several.
        classes: the number of classes, for batches with labels.
        levels: for each channel of images, or for all, the number of values that it can have, for the bound of a model
            with learned variance; None: the bound is that of a density.

    Attributes:
        network: the model as the loss calls it; may be set to a compiled form of it.
    """

    def __init__(
        self, model, scheduler, optimizer, average: WeightAverage, config, accelerator, classes: int | None = None,
        levels: Sequence[int] | None = (256,),
    ):  # fmt: skip
        self.model, self.scheduler, self.optimizer = model, scheduler, optimizer
        self.average, self.config, self.accelerator = average, config, accelerator
        self.network, self.classes = model, classes
        self.levels = None if levels is None else levels[0]
        if levels is not None and len(set(levels)) > 1:
            self.levels = torch.tensor(levels, dtype=torch.float32, device=accelerator.device).view(-1, 1, 1)
        # One process without a loss scaler needs nothing of accelerate after the backward pass. Its optimizer looks for
        # other libraries in every step, and listing the model's parameters takes a tenth of a small model's step.
        self._plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
        self._parameters = list(model.parameters()) if self._plain else None
        streams = (Stream.NOISE, Stream.CLASS_DROPOUT, Stream.MASKS)
        self.noise_key, self.label_key, self.mask_key = (derive_seed(config.seed, stream) for stream in streams)

    def numbers(self, step: int) -> StepNumbers:
        """Return the numbers of the step that follows `step` optimizer steps."""
        c, acc = self.config, self.accelerator
        parts = c.gradient_accumulation_steps
        start = step * parts * acc.num_processes + acc.process_index
        first = [(start + part * acc.num_processes) * c.train_batch_size for part in range(parts)]
        return StepNumbers(first, self.average.share(step))

    def __call__(self, parts: Sequence[Batch], numbers: StepNumbers, self_condition: bool = False) -> Tensor:
        """Train on the parts of one batch, whose gradients are accumulated.

        Args:
            parts: `gradient_accumulation_steps` batches, whose tensors are on the device.
            numbers: the numbers of the step.
            self_condition: let the model see its own estimate of x0 in this step.

        Returns:
            (2,) float32 on the device: the mean loss of this process, and the gradient's norm before clipping.
        """
        acc = self.accelerator
        loss = torch.zeros((), device=acc.device)
        rates = contextlib.nullcontext() if numbers.rates is None else rates_from(self.optimizer, numbers.rates)
        acc.step = 0  # a step that failed, in a capture or a compiler, may have counted some of its parts
        with rates:
            for part, first in zip(parts, numbers.first, strict=True):
                with acc.accumulate(self.model):
                    part_loss = self._loss(part, first, self_condition)
                    acc.backward(part_loss)
                    loss += part_loss.detach() / len(parts)
                    if acc.sync_gradients:
                        norm = self._update()
        if numbers.share is not None:
            self.average.update(numbers.share)
        if hasattr(norm, "full_tensor"):  # the weights are spread over processes
            norm = norm.full_tensor()
        return torch.stack((loss, torch.as_tensor(norm, device=acc.device).detach().float()))

    def _update(self) -> Tensor:
        """Clip the gradients, change the weights and forget the gradients; return the norm before clipping."""
        most = self.config.max_grad_norm
        if self._plain:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, most)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        else:
            norm, optimizer = self.accelerator.clip_grad_norm_(self.model.parameters(), most), self.optimizer
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def state(self) -> Iterator[Tensor]:
        """Yield the tensors that a step changes or reads, besides its inputs: a captured step has their addresses."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for values in self.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))
        if self.average.ema is not None:
            yield from self.average.ema.shadow_params

    def drop_gradients(self) -> None:
        """Forget gradients of a step that was not finished."""
        for p in self.model.parameters():
            p.grad = None

    def _loss(self, batch: Batch, first: int | Tensor, self_condition: bool) -> Tensor:
        """Return the mean loss of samples that have the numbers from `first` on."""
        c, x0, labels = self.config, batch.x0, batch.labels
        numbers = first + torch.arange(len(x0), device=x0.device)
        told: dict[str, Tensor] = {}
        if c.condition == "known":
            missing = x0.isnan()
            x0 = x0.masked_fill(missing, 0.0)
            known = draw_known(c.mask_strategy, tuple(x0.shape[1:]), numbers, self.mask_key) & ~missing
            told = {"condition": condition_of(x0, known), "known": known, "counted": ~(known | missing)}
        elif batch.conditions is not None:
            told = {"condition": enlarged(batch.condition, tuple(x0.shape[2:]))}
        timesteps, noise = training_draws(
            self.scheduler, x0, numbers, c.noise_offset, c.timestep_sampling, c.logit_mean, c.logit_std, self.noise_key
        )
        if labels is not None:
            labels = drop_labels(labels, numbers, c.class_dropout_prob, self.classes, self.label_key)
        with self.accelerator.autocast():
            losses = diffusion_loss(
                self.network, self.scheduler, x0, timesteps, noise, min_snr_gamma=c.min_snr_gamma or None,
                weighting=c.loss_weighting, immiscible=c.immiscible, self_condition=self_condition,
                class_labels=labels, vlb_weight=c.vlb_weight if c.learned_variance else 0.0,
                levels=self.levels, **told,
            ).loss  # fmt: skip
        return losses.mean()
