"""Schedulers of diffusers: which of them can sample from a model, the fast sampler, and options of their steps."""

import inspect
import math
import warnings
from typing import NamedTuple

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor

from ddpm_hf.pipeline.rules import Generators

FAST = {"solver_order": 2, "algorithm_type": "dpmsolver++", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
# The fast sampler spreads its steps below this ratio of noise to signal.
HIGHEST_NOISE = 500.0
# Stock schedulers of the process that our models are trained in, which still cannot sample from them.
UNFIT = {
    "DDIMInverseScheduler": "it goes from data to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from data to noise",
    "LCMScheduler": "it needs a model that was distilled into a consistency model",
    "UnCLIPScheduler": "it must be told the next timestep in each step, which the pipelines here do not do",
}
# Schedulers that take no prediction of x0, and those whose first steps are wrong for epsilon at very high noise.
NOT_OF_SAMPLE = ("DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                 "KDPM2DiscreteScheduler", "PNDMScheduler")  # fmt: skip
POOR_WITH_EPSILON, SMALL_ABAR = ("KDPM2DiscreteScheduler", "PNDMScheduler"), 3e-5
CUTS_AT_THREE = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler")
LEARNED = ("learned", "learned_range")  # variance types with twice the channels
SEE_SAMPLERS = "docs/samplers.md has all schedulers of diffusers and which of them work"


def log_snr_timesteps(alphas_cumprod: Tensor, steps: int) -> list[int]:
    """Return the timesteps of a short chain, descending from T-1 and even in log(abar / (1 - abar)).

    Steps that are even in t cross the highest noise in the first of them. But that is where large images take their
    brightness and layout: what all n pixels share is seen through n times the noise. The place of t = 0 is left out,
    as the last step goes from the one before to x0.

    Noise above `HIGHEST_NOISE` times the signal says nothing about x0, so the steps are spread below it. Where the last
    beta is a jump from far lower noise, so that the second step would lie inside it, they are spread from T-2 on.

    Args:
        alphas_cumprod: `(T,)`, descending.
        steps: 1 to T.
    """
    smallest = 2.0**-24  # keeps log-SNR finite where abar is 0, or 1 in float32
    abar = alphas_cumprod.double().cpu().clamp(smallest, 1 - smallest)
    last = len(abar) - 1
    if steps == 1 or last == 0:
        return [last]
    log_snr = (abar / (1 - abar)).log()
    first = log_snr[last].clamp(min=-2 * math.log(HIGHEST_NOISE))
    wanted = torch.lerp(first, log_snr[0], torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1])
    if wanted[0] < log_snr[last - 1]:
        wanted = torch.lerp(log_snr[last - 1], log_snr[0], torch.linspace(0, 1, steps, dtype=torch.float64)[:-1])
    nearest = (log_snr[:last, None] - wanted).abs().argmin(dim=0).tolist()
    chain = [last]
    for t in nearest:
        chain.append(min(t, chain[-1] - 1))
    # where there are too few timesteps for distinct ones, the last steps go down by one each
    return [max(t, steps - 1 - i) for i, t in enumerate(chain)]


def fast_scheduler(scheduler) -> DPMSolverMultistepScheduler:
    """Make the scheduler of the fast sampler. What it changes is kept in its configuration, for the way back."""
    config = scheduler.config
    fast = DPMSolverMultistepScheduler.from_config(config, **FAST)
    own = {"timestep_spacing": config.get("timestep_spacing", "trailing"), **config.get("_gaussian", {})}
    fast.register_to_config(_gaussian=own)
    if config.get("variance_type") in LEARNED:
        # stock solvers keep the first three channels of a model with learned variance, whatever the data has: the loop
        # drops the half that predicts the variance instead
        fast.register_to_config(variance_type=None, _gaussian={**own, "variance_type": config.variance_type})
    return fast


class Trained(NamedTuple):
    """The target and schedule that the model was trained with, from the first scheduler of its pipeline."""

    prediction_type: str | None
    alphas_cumprod: Tensor  # (T,), float64 on the CPU


def _scheduler_fault(scheduler) -> str | None:
    """Return the reason why a scheduler cannot sample from any model that was trained on betas; None if it can."""
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    config = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type")
    if reasons := [reason for name, reason in UNFIT.items() if name in names]:
        return reasons[0]
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or config.get("use_flow_sigmas"):
        return (
            "it is of another process than the one that the model was trained in, which has betas: schedulers of flow "
            "matching, VE, EDM, consistency models and discrete data have none"
        )
    arguments = list(inspect.signature(scheduler.step).parameters.values())[3:]
    if needs := [a.name for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]:
        return f"its steps need {', '.join(needs)}, which the pipelines here do not have"
    if prediction == "sample" and names & set(NOT_OF_SAMPLE):
        return "it cannot use a model that predicts x0 (prediction_type='sample')"
    return None


def training_of(scheduler) -> Trained:
    """Return what a scheduler says that a model was trained with."""
    return Trained(scheduler.config.get("prediction_type"), scheduler.alphas_cumprod.double().cpu())


def check_scheduler(scheduler, unet, trained: Trained | None) -> Trained:
    """Raise ValueError for a scheduler that cannot sample here, and warn about one whose samples will hardly be right.

    Args:
        trained: what the model was trained with; None: what this scheduler says, as the first one of its pipeline.

    Returns:
        What the model was trained with.
    """
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if not isinstance(scheduler, SchedulerMixin) and (isinstance(scheduler, type) or not hasattr(scheduler, "step")):
        raise ValueError(f"a pipeline's scheduler must be a scheduler, such as those of diffusers; got {scheduler!r}")
    if fault := _scheduler_fault(scheduler):
        raise ValueError(f"{kind} cannot be the scheduler of this pipeline: {fault}. {SEE_SAMPLERS}")
    prediction, abar = own = training_of(scheduler)
    trained = trained or own
    keep = f"{kind}.from_config(pipe.scheduler.config) keeps what the model was trained with"
    if prediction != trained.prediction_type:
        raise ValueError(
            f"{kind} cannot be the scheduler of this pipeline: its prediction_type is {prediction!r}, the model "
            f"was trained with {trained.prediction_type!r}. {keep}; for another model, make another pipeline"
        )
    if unet is not None and config.get("variance_type") in LEARNED:
        _check_variance(scheduler, unet.config)
    warned = None
    if len(abar) != len(trained.alphas_cumprod):
        warned = f"it has {len(abar)} timesteps, the model was trained with {len(trained.alphas_cumprod)}. {keep}"
    elif (difference := (abar - trained.alphas_cumprod).abs().max().item()) > 1e-3:
        warned = f"its betas are not those of the model: alphas_cumprod differs by up to {difference:.2g}. {keep}"
    elif prediction == "epsilon" and kind in POOR_WITH_EPSILON and abar[-1] < SMALL_ABAR:
        warned = f"its error is large for epsilon where alphas_cumprod ends below {SMALL_ABAR}. {SEE_SAMPLERS}"
    if warned:
        warnings.warn(f"samples of {kind} will hardly be right: {warned}", stacklevel=3)
    return trained


def _check_variance(scheduler, unet) -> None:
    """Check a scheduler of a learned variance against the channels in the configuration of the model, `unet`."""
    kind, variance, channels = type(scheduler).__name__, scheduler.config.variance_type, unet.in_channels
    if kind in CUTS_AT_THREE and channels > 3:
        raise ValueError(
            f"{kind} with variance_type={variance!r} keeps 3 of {channels} channels: "
            "give from_config variance_type=None"
        )
    predicted = unet.get("out_channels") or channels * (2 if unet.get("learned_variance") else 1)
    if is_own_scheduler(scheduler) and predicted != 2 * channels:
        raise ValueError(
            f"variance_type={variance!r} needs a model with {2 * channels} output channels "
            f"(learned_variance=True), got one with {predicted}"
        )


def is_own_scheduler(scheduler) -> bool:
    """Return True for `GaussianScheduler`, which this file cannot import."""
    return hasattr(scheduler, "clip_x0")


def takes_variance(scheduler) -> bool:
    """Return True if the scheduler's step reads the half of the channels in which a model predicts its variance."""
    known = is_own_scheduler(scheduler) or isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
    return known and scheduler.config.get("variance_type") in LEARNED


def step_options(scheduler, generator: Generators, eta: float | None) -> dict:
    """Return those of `generator` and `eta` that the scheduler's step takes.

    Raises:
        ValueError: `eta` is given and the step takes none, or it does not lie in [0, 1].
    """
    parameters = inspect.signature(scheduler.step).parameters
    options = {}
    if "generator" in parameters:
        options["generator"] = generator
    if eta is not None:
        if "eta" not in parameters:
            raise ValueError(f"eta was given, but {type(scheduler).__name__} has no eta")
        if not isinstance(eta, (int, float)) or isinstance(eta, bool) or not 0 <= eta <= 1:
            raise ValueError(f"eta must be a number from 0 to 1, got {eta!r}")
        options["eta"] = eta
    return options


def begin_at(scheduler, strength: float, by_timestep: bool) -> int:
    """Let a scheduler begin at the share `strength` of its chain, and return the index of that timestep.

    Args:
        by_timestep: take the share of the training timesteps instead of the steps, for steps of unequal length.
    """
    chain = scheduler.timesteps
    # schedulers of order n take n entries a step, and start at whole steps only
    order = scheduler.order
    steps = -(-len(chain) // order)
    if by_timestep:
        aim = strength * scheduler.config.num_train_timesteps - 1
        start = (chain - aim).abs().argmin().item()
    else:
        start = (steps - max(1, round(steps * strength))) * order
    if start and isinstance(scheduler, PNDMScheduler):
        raise ValueError("PNDMScheduler cannot start in the middle of its chain: strength must be 1, "
                         f"or the scheduler another; got {strength}")  # fmt: skip
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return start
