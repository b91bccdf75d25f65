"""The device work of one optimizer step: draws, noise, loss, gradients, clipping, update and average of the weights.

The host's part of a step (reading batches, seeds, the learning rate's schedule, looking at the results) is in
`loop.py`. Nothing here reads a number back from the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_hf.losses import diffusion_loss, training_draws
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.trainer.ema import WeightAverage


@dataclass(frozen=True)
class SampleNumbers:
    """The numbers that identify the samples of one optimizer step, whose draws follow from them.

    Attributes:
        step: optimizer steps done before this one.
        first: for each part of the batch, the number in the whole run of its first sample on this process; the other
            samples of the part have the numbers that follow.
    """

    step: int
    first: Sequence[int]


class TrainingStep:
    """One optimizer step on batches that are on the device already.

    Args:
        model: the model as accelerate has prepared it, in training mode when it is called.
        scheduler: `GaussianScheduler`, which gives noise, targets and loss weights.
        optimizer: the optimizer as accelerate has prepared it; its learning rates are those of this step.
        average: the average of the weights, which takes in the new weights.
        config: the `TrainConfig`.
        accelerator: runs the backward pass, accumulation and clipping on one process or several.
    """

    def __init__(self, model, scheduler, optimizer, average: WeightAverage, config, accelerator):
        self.model, self.scheduler, self.optimizer = model, scheduler, optimizer
        self.average, self.config, self.accelerator = average, config, accelerator
        self.noise_key = derive_seed(config.seed, Stream.NOISE)

    def __call__(self, parts: Sequence[Tensor], numbers: SampleNumbers, self_condition: bool = False) -> Tensor:
        """Train on the parts of one batch, whose gradients are accumulated.

        Args:
            parts: `gradient_accumulation_steps` tensors of data in [-1, 1], each `(B, C, *spatial)`.
            numbers: the numbers of their samples.
            self_condition: let the model see its own estimate of x0 in this step.

        Returns:
            (2,) float32 on the device: the mean loss of this process, and the gradient's norm before clipping.
        """
        acc = self.accelerator
        loss = torch.zeros((), device=acc.device)
        for x0, first in zip(parts, numbers.first, strict=True):
            with acc.accumulate(self.model):
                part_loss = self._loss(x0, first, self_condition)
                acc.backward(part_loss)
                loss += part_loss.detach() / len(parts)
                if acc.sync_gradients:
                    norm = acc.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        share = self.average.share(numbers.step)
        if share is not None:
            self.average.update(share)
        if hasattr(norm, "full_tensor"):  # the weights are spread over processes
            norm = norm.full_tensor()
        return torch.stack((loss, torch.as_tensor(norm, device=acc.device).detach().float()))

    def _loss(self, x0: Tensor, first: int, self_condition: bool) -> Tensor:
        """Return the mean loss of samples that have the numbers from `first` on."""
        c = self.config
        timesteps, noise = training_draws(
            self.scheduler, x0, first + torch.arange(len(x0), device=x0.device), c.noise_offset,
            c.timestep_sampling, c.logit_mean, c.logit_std, self.noise_key,
        )  # fmt: skip
        with self.accelerator.autocast():
            losses = diffusion_loss(
                self.model, self.scheduler, x0, timesteps, noise, min_snr_gamma=c.min_snr_gamma or None,
                weighting=c.loss_weighting, immiscible=c.immiscible, self_condition=self_condition,
            ).loss  # fmt: skip
        return losses.mean()
