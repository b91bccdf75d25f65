"""The training objective: draws, targets and weights, and one loss for each sample.

Sources: the objective is equation 14 of Ho et al. (arXiv:2006.11239). The weights are those of
denoising-diffusion-pytorch, or min-SNR (Hang et al., arXiv:2303.09556). Offset noise adds one number to a channel;
immiscible diffusion is that of Li et al. (arXiv:2406.12303) and self-conditioning that of Chen et al.
(arXiv:2208.04202). Dropping labels prepares a model for classifier-free guidance (Ho & Salimans, arXiv:2207.12598).
The loss on the unknown part of partly known items is that of CSDI (Tashiro et al., arXiv:2107.03502). A learned
variance is trained by L_hybrid of Nichol & Dhariwal (arXiv:2102.09672, equation 16).

Nothing here reads a number back from the device, except immiscible diffusion, which assigns the noise on the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ddpm_hf.choices import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS
from ddpm_hf.randomness import happens, normal_numbers, random_words, uniform_integers


@dataclass
class DiffusionLoss:
    """The loss of a batch.

    Attributes:
        loss: (B,) weighted squared error of each sample, the mean over channels and positions; with `vlb_weight`, plus
            the weighted bound.
        timesteps: (B,) the timesteps of the samples.
    """

    loss: Tensor
    timesteps: Tensor


def training_draws(
    scheduler,
    x0: Tensor,
    numbers: Tensor | Sequence[int],
    offset_strength: float = 0.0,
    timestep_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    key: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Draw a timestep and noise for each sample.

    A sample's draws follow from its number and the key alone, so they do not depend on the batch that it is in. For one
    key, samples with different numbers never share a random word (see `ddpm_hf.randomness.random_words`), and the words
    of the generator behave as independent ones.

    Args:
        scheduler: a `GaussianScheduler`; T is its number of training timesteps.
        x0: (B, C, *spatial); the noise takes its shape, dtype and device.
        numbers: (B,) whole numbers from 0 to 2^36 - 1, for instance the sample's number in the run. An int64 tensor on
            the device of x0 is used without a copy.
        offset_strength: standard deviation of one more normal number, which is added to a whole channel (offset noise).
        timestep_sampling: "uniform" on [0, T); or "logit_normal", T * sigmoid(z) for normal z with `logit_mean` and
            `logit_std`, which trains the middle of the schedule more often (Esser et al., arXiv:2403.03206, section
            3.1).
        logit_mean: mean of z.
        logit_std: standard deviation of z.
        key: an int64 number; runs with different keys draw unrelated numbers.

    Returns:
        timesteps (B,) int64 in [0, T) and noise shaped as x0.

    Raises:
        ValueError: there is not one number for each sample, or `timestep_sampling` is unknown.
    """
    if timestep_sampling not in TIMESTEP_SAMPLINGS:
        raise ValueError(f"timestep_sampling must be one of {', '.join(TIMESTEP_SAMPLINGS)}, got {timestep_sampling!r}")
    if len(numbers) != len(x0):
        raise ValueError(f"there must be one number per sample: {len(x0)} samples, {len(numbers)} numbers")
    numbers = torch.as_tensor(numbers, dtype=torch.int64, device=x0.device)
    steps, size, channels = scheduler.config.num_train_timesteps, math.prod(x0.shape[1:]), x0.shape[1]
    # words for the noise, then for the offsets of the channels; the last one is the timestep's
    words = random_words(key, numbers, (size + channels + 1) // 2 + 1)
    normal = normal_numbers(words, torch.promote_types(x0.dtype, torch.float32))
    if timestep_sampling == "uniform":
        timesteps = uniform_integers(words[:, -1], steps)
    else:
        share = torch.sigmoid(logit_mean + logit_std * normal[:, -1])
        timesteps = (share * steps).long().clamp(max=steps - 1)  # the sigmoid may round to 1
    noise = normal[:, :size].reshape(x0.shape)
    if offset_strength:
        offset = normal[:, size : size + channels].reshape(*x0.shape[:2], *(1,) * (x0.ndim - 2))
        noise = noise + offset_strength * offset
    return timesteps, noise.to(x0.dtype)


def drop_labels(labels: Tensor, numbers: Tensor, probability: float, no_class: int, key: int | Tensor = 0) -> Tensor:
    """Replace labels by "no class" at random (Ho & Salimans, algorithm 1), so that a model learns both.

    Whether a label is replaced follows from the sample's number and the key alone, as in `training_draws`.

    Args:
        labels: (B,) int64, the classes of the samples.
        numbers: (B,) int64, the numbers of the samples; without a copy if they are on the device of the labels.
        probability: probability of a replacement, from 0 to 1.
        no_class: the number that stands for "no class".
        key: an int64 number of its own: with the key of `training_draws` the draws would depend on each other.

    Returns:
        (B,) int64.
    """
    return labels.masked_fill(happens(random_words(key, numbers.to(labels.device), 1)[:, 0], probability), no_class)


def first_step_warning(config) -> str | None:
    """Return a sentence of warning if sampling begins at a timestep that training will hardly see; None otherwise.

    With zero terminal SNR, no other timestep shows the model what to answer to pure noise. (The loss weights, which
    would be 0 there, are dealt with in `GaussianScheduler.loss_weights`.)
    """
    c = config
    if not c.rescale_betas_zero_snr or c.timestep_sampling != "logit_normal" or c.ddpm_num_steps < 2:
        return None
    share = NormalDist(-c.logit_mean, c.logit_std).cdf(-math.log(c.ddpm_num_steps - 1))
    items = c.max_train_steps * c.train_batch_size * c.gradient_accumulation_steps
    if share * items >= 1:
        return None
    return (
        f"with rescale_betas_zero_snr, sampling begins at t={c.ddpm_num_steps - 1}, which timestep_sampling "
        f"logit_normal draws with probability {share:.2g}, in {items:,} draws of a process hardly once: use "
        "timestep_sampling uniform, or a greater logit_mean or logit_std"
    )


def immiscible_assignment(x0: Tensor, noise: Tensor) -> Tensor:
    """Assign the noise of a batch to its samples so that the sum of their distances is least (Li et al., algorithm 1).

    The assignment is computed on the host, so a step that uses it cannot be captured as a CUDA graph.

    Args:
        x0: (B, C, *spatial).
        noise: shaped as x0.

    Returns:
        (B,) indices i on the device of the noise: sample k takes noise[i[k]].
    """
    distance = torch.cdist(x0.to(noise.device).flatten(1).float(), noise.flatten(1).float())
    from scipy.optimize import linear_sum_assignment  # slow to import, and for immiscible diffusion alone

    _, columns = linear_sum_assignment(distance.cpu().numpy())
    return torch.from_numpy(columns).to(noise.device)


def _check_inputs(x0: Tensor, timesteps: Tensor, noise: Tensor, class_labels, known, counted, weighting) -> None:
    """Check what is given to `diffusion_loss`."""
    if noise.shape != x0.shape or timesteps.shape != x0.shape[:1]:
        raise ValueError(
            f"noise must be shaped as x0, {tuple(x0.shape)}, and timesteps ({len(x0)},); "
            f"got {tuple(noise.shape)} and {tuple(timesteps.shape)}"
        )
    for name, mask in (("known", known), ("counted", counted)):
        if mask is not None and mask.shape != x0.shape:
            raise ValueError(f"{name} must be shaped as x0, {tuple(x0.shape)}, got {tuple(mask.shape)}")
    places = [x.device for x in (noise, known, counted) if x is not None]
    if any(place != x0.device for place in places):
        got = ", ".join(map(str, places))
        raise ValueError(f"noise, known and counted must be on the device of x0, {x0.device}; got {got}")
    if class_labels is not None and class_labels.shape != timesteps.shape:
        raise ValueError(f"class_labels must have the shape ({len(x0)},), got {tuple(class_labels.shape)}")
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(LOSS_WEIGHTINGS)}, got {weighting!r}")


def _split(output: Tensor, x0: Tensor, scheduler) -> Tensor:
    """Return the prediction in a model's output, which with a learned variance is the first half of the channels.

    Raises:
        ValueError: the output does not have the channels that x0 and the scheduler's `variance_type` ask for.
    """
    learned = scheduler.config.variance_type == "learned_range"
    shape = (len(x0), x0.shape[1] * (2 if learned else 1), *x0.shape[2:])
    if output.shape != shape:
        raise ValueError(
            f"the model must predict the shape {shape} with variance_type {scheduler.config.variance_type!r}, got "
            f"{tuple(output.shape)} (a model with learned variance has twice the channels, and needs a scheduler with "
            "variance_type 'learned_range')"
        )
    return output[:, : x0.shape[1]]


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean (B,) over all values of a sample, or over those that `counted` marks (0 if there is none)."""
    values = values.flatten(1)
    if counted is None:
        return values.mean(dim=1)
    counted = counted.flatten(1)
    return values.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _bound(scheduler, output: Tensor, x0: Tensor, x_t: Tensor, timesteps: Tensor, levels) -> Tensor:
    """Return an estimate of the variational bound for each value, in bits: T times the term at the sample's timestep.

    Its gradient goes to the variance alone: the prediction of the mean is detached (Nichol & Dhariwal, section 3.1).
    The estimate of x0 is not clipped, as in the authors' code; the metric `bits_per_dim` clips it as sampling does.
    """
    output = output.to(torch.promote_types(x0.dtype, torch.float32))
    channels = x0.shape[1]
    output = torch.cat((output[:, :channels].detach(), output[:, channels:]), dim=1)
    kind = {"decoder": "density"} if x0.ndim == 3 or levels is None else {"levels": levels}
    term = scheduler.bound_term(output, x0, x_t, timesteps, clip=False, **kind)
    return term * (scheduler.config.num_train_timesteps / math.log(2))


# This function is longer than 60 lines because it documents every part of the objective.
def diffusion_loss(
    model,
    scheduler,
    x0: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    *,
    min_snr_gamma: float | None = None,
    weighting: str = "snr",
    immiscible: bool = False,
    self_condition: bool = False,
    class_labels: Tensor | None = None,
    condition: Tensor | None = None,
    known: Tensor | None = None,
    counted: Tensor | None = None,
    vlb_weight: float = 0.0,
    levels: int | Tensor | None = 256,
) -> DiffusionLoss:
    """Compute the loss of each sample. None of the given tensors is changed.

    Args:
        model: called as model(x_t, t), with x_self_cond if `self_condition`, and with class_labels and condition if
            they are given; returns its prediction in `.sample`.
        scheduler: a `GaussianScheduler`, whose `prediction_type` says what the target is.
        x0: data in [-1, 1], `(B, C, *spatial)`.
        timesteps: (B,) integers in [0, T); without a copy if they are on the device of x0.
        noise: standard normal noise, shaped as x0.
        min_snr_gamma: upper bound of the SNR in the weight; None: no bound.
        weighting: "snr" for the weights of `GaussianScheduler.loss_weights`; "uniform" for 1 at every timestep, for any
            target and `min_snr_gamma`. For v, "uniform" favours noisy timesteps: in units of the error of x0 its weight
            is SNR + 1.
        immiscible: assign the noise anew within the batch; x_t and the target both use the assigned noise.
        self_condition: give the model its own estimate of x0 in this step (the paper does so in half of the steps).
        class_labels: (B,) int64, the class that the model is told for each sample, for a model with classes; the
            estimate of `self_condition` is made with it too. None: the model is told none.
        condition: (B, channels, *spatial), further input of a model with `condition_channels`, for the estimate too;
            None: the model is given none.
        known: bool, shaped as x0: the model sees 0 for x_t and for its own estimate where this is True, because the
            condition has the value itself (Tashiro et al., arXiv:2107.03502, section 4.2); None: nothing is known.
        counted: bool, shaped as x0: the loss of a sample is the mean over the values where this is True, and 0 if
            there is none; None: over all.
        vlb_weight: weight of the variational bound in the loss of a model with learned variance, L_hybrid = L_simple +
            weight * L_vlb (Nichol & Dhariwal, equation 16, which has 0.001); the bound is in bits per dimension, as in
            the authors' code, and T times the term at the sample's timestep estimates it. Its gradient goes to the
            variance alone. 0: the variance is not trained.
        levels: the number of evenly spaced values from -1 to 1 that images have, for the bound's discretized decoder
            (256 for 8 bits), or a tensor of them that broadcasts against x0; None: the bound is that of a density, as
            it always is for sequences.

    Raises:
        ValueError: shapes or devices do not fit, `weighting` is unknown, `vlb_weight` is not 0 with a fixed variance,
            or the model's output is not shaped as the target (with twice the channels for a learned variance).
    """
    _check_inputs(x0, timesteps, noise, class_labels, known, counted, weighting)
    if vlb_weight and scheduler.config.variance_type != "learned_range":
        raise ValueError(
            f"vlb_weight must be 0 with variance_type {scheduler.config.variance_type!r}, whose variance is fixed; got "
            f"{vlb_weight!r}"
        )
    timesteps = timesteps.to(x0.device)
    if immiscible:
        noise = noise[immiscible_assignment(x0, noise)]
    x_t = scheduler.add_noise(x0, noise, timesteps)
    target = scheduler.target(x0, noise, timesteps)

    if known is not None:
        x_t = x_t.masked_fill(known, 0.0)
    optional = {"class_labels": class_labels, "condition": condition}
    extra = {name: value for name, value in optional.items() if value is not None}
    if self_condition:
        with torch.no_grad():
            estimate = _split(model(x_t, timesteps, **extra).sample, x0, scheduler)
            x0_estimate = scheduler.predict_x0(estimate.to(x_t.dtype), timesteps, x_t)
            extra["x_self_cond"] = x0_estimate if known is None else x0_estimate.masked_fill(known, 0.0)
    # Autocast keeps the weights that it has cast. Those of a call without gradients (the estimate above, or a sampler)
    # have no history, and the call below would take them, at least up to torch 2.9: most weights would get no gradient.
    # Turning the cache off around the estimate does not help: a model's own autocast (accelerate's) turns it on again.
    # torch.compile keeps no casts, and cannot follow the call up to torch 2.11.
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
    output = model(x_t, timesteps, **extra).sample
    wide = torch.promote_types(target.dtype, torch.float32)
    loss = _mean((_split(output, x0, scheduler).to(wide) - target.to(wide)).square(), counted)
    if weighting == "snr":
        loss = loss * scheduler.loss_weights(timesteps, min_snr_gamma).to(loss)
    if vlb_weight:
        loss = loss + vlb_weight * _mean(_bound(scheduler, output, x0, x_t, timesteps, levels), counted)
    return DiffusionLoss(loss=loss, timesteps=timesteps)
