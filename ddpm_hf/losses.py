"""The training objective: draws, targets, weights; one loss a sample.

Ho et al. (arXiv:2006.11239), equation 14; the weights of denoising-diffusion-pytorch and min-SNR (Hang et al.,
arXiv:2303.09556); offset noise; immiscible diffusion (Li et al., arXiv:2406.12303); self-conditioning (Chen et al.,
arXiv:2208.04202).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass
class DiffusionLoss:
    """`loss`: (B,), weighted squared error, mean over channels and positions; `timesteps`: (B,)."""

    loss: Tensor
    timesteps: Tensor


LOSS_WEIGHTINGS = ("snr", "uniform")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


def training_draws(
    scheduler,
    x0: Tensor,
    seeds: Sequence[int],
    offset_strength: float = 0.0,
    timestep_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> tuple:
    """Timesteps (B,) in [0, T) and noise shaped as x0, each sample's from its own seed.

    Args:
        timestep_sampling: "uniform"; or "logit_normal", T * sigmoid(z) for normal z of `logit_mean` and `logit_std`,
            which trains the middle of the schedule more often (Esser et al., arXiv:2403.03206, section 3.1).

    Raises:
        ValueError: not one seed a sample, or an unknown timestep_sampling.
    """
    if timestep_sampling not in TIMESTEP_SAMPLINGS:
        raise ValueError(f"timestep_sampling must be one of {', '.join(TIMESTEP_SAMPLINGS)}, got {timestep_sampling!r}")
    if len(seeds) != len(x0):
        raise ValueError(f"there must be one seed per sample: {len(x0)} samples, {len(seeds)} seeds")
    generators = [torch.Generator(x0.device).manual_seed(seed) for seed in seeds]
    steps = scheduler.config.num_train_timesteps
    if timestep_sampling == "uniform":
        drawn = [torch.randint(steps, (1,), generator=g, device=x0.device) for g in generators]
    else:
        named = {"logit_mean": logit_mean, "logit_std": logit_std, "device": x0.device}
        u = [compute_density_for_timestep_sampling("logit_normal", 1, generator=g, **named) for g in generators]
        drawn = [(x * steps).long().clamp_(max=steps - 1) for x in u]  # a sigmoid may round to 1
    timesteps = torch.cat(drawn)
    return timesteps, scheduler.sample_noise(x0, offset_strength, generators)


def first_step_warning(config) -> str | None:
    """A sentence where sampling begins at a timestep that training will hardly see; None elsewhere.

    With zero terminal SNR no other timestep shows the model what to answer to pure noise. (Weights that would be 0
    there are dealt with in `GaussianScheduler.loss_weights`.)
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
    """(B,) indices i of the noise for each x0, so that noise[i] is nearest in total (Li et al., algorithm 1)."""
    distance = torch.cdist(x0.flatten(1).float(), noise.flatten(1).float())
    _, columns = linear_sum_assignment(distance.cpu().numpy())
    return torch.from_numpy(columns).to(noise.device)


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
) -> DiffusionLoss:
    """The loss of each sample; none of the given tensors is changed.

    Args:
        model: called as model(x_t, t) (and x_self_cond), gives `.sample`.
        scheduler: `GaussianScheduler`; its `prediction_type` is the target.
        x0: data in [-1, 1], `(B, C, *spatial)`.
        timesteps: (B,) integers in [0, T).
        noise: standard normal, shaped as x0.
        min_snr_gamma: clip the weight's SNR at gamma; None: not.
        weighting: "snr": as `GaussianScheduler.loss_weights` says; "uniform": 1 at every timestep, whatever the target
            and `min_snr_gamma` (of v that is more of the noisy timesteps: SNR + 1 in units of the error of x0).
        immiscible: re-assign the noise within the batch; x_t and the target both use the assigned one.
        self_condition: let the model see its own estimate of x0 in this step (half of the steps, by the paper).

    Raises:
        ValueError: shapes that do not fit, or a model output that is not shaped as the target.
    """
    if noise.shape != x0.shape or timesteps.shape != x0.shape[:1]:
        raise ValueError(
            f"noise must be shaped as x0, {tuple(x0.shape)}, and timesteps ({len(x0)},); "
            f"got {tuple(noise.shape)} and {tuple(timesteps.shape)}"
        )
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(LOSS_WEIGHTINGS)}, got {weighting!r}")
    if immiscible:
        noise = noise[immiscible_assignment(x0, noise)]
    x_t = scheduler.add_noise(x0, noise, timesteps)
    target = scheduler.target(x0, noise, timesteps)

    extra = {}
    if self_condition:
        with torch.no_grad():
            estimate = model(x_t, timesteps).sample
            extra["x_self_cond"] = scheduler.predict_x0(estimate.to(x_t.dtype), timesteps, x_t)
    # Autocast keeps the weights that it has cast. Those of a call without gradients (the estimate, or a sampler before)
    # have no history, and until torch 2.9 at least the call below took them: most weights got no gradient. With the
    # cache off around the estimate, a model's own autocast (accelerate's) would turn it on again.
    torch.clear_autocast_cache()
    prediction = model(x_t, timesteps, **extra).sample
    if prediction.shape != target.shape:
        raise ValueError(
            f"the model must predict the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)} "
            "(a model with learned variance cannot be trained with this loss)"
        )
    wide = torch.promote_types(target.dtype, torch.float32)
    loss = (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)
    if weighting == "snr":
        loss = loss * scheduler.loss_weights(timesteps, min_snr_gamma).to(loss)
    return DiffusionLoss(loss=loss, timesteps=timesteps)
