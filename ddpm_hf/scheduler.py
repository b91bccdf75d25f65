"""Beta schedules, the forward process, conversions between targets, and DDPM / DDIM sampling.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (DDPM, arXiv:2006.11239); Song et al., "Denoising
Diffusion Implicit Models" (DDIM, arXiv:2010.02502); Nichol & Dhariwal (cosine schedule, learned variance,
arXiv:2102.09672); Jabri et al. (sigmoid schedule, arXiv:2212.11972); Salimans & Ho (v, arXiv:2202.00512);
Hang et al. (min-SNR, arXiv:2303.09556); Saharia et al. (dynamic thresholding, arXiv:2205.11487);
Lin et al. (zero terminal SNR, arXiv:2305.08891); Hoogeboom et al. (shifted SNR, arXiv:2301.11093).

Notation: t runs from 0 to T - 1, abar_t = alphas_cumprod[t], x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon, and
v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x0. The papers count from 1, so that their x_T is our x at t = T - 1.
Coefficients are computed in float64 and cast where they are used; stock diffusers code reads them as float32.

This file is longer than 600 lines because it ships inside saved pipelines as one self-contained file, without imports
from ddpm_hf. Its sections: records, beta schedules, rules of the options, timesteps, configurations (of our own and of
stock schedulers), and the scheduler.
"""

import contextlib
import inspect
import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

BETA_SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
PREDICTION_ALIASES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
DECODERS = ("discretized", "density")  # of the variational bound
VARIANCE_ALIASES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}  # the same variances
SAMPLERS = ("auto", "ddpm", "ddim")
SPACINGS = ("trailing", "leading", "linspace")
MOST_STEPS = 1_000_000  # the configuration lists every beta
# The betas follow from these options. If one of them changes, betas that a configuration lists are out of date.
SCHEDULE_OPTIONS = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "cosine_s",
    "sigmoid_start", "sigmoid_end", "sigmoid_tau", "snr_shift", "rescale_betas_zero_snr",
)  # fmt: skip
# Stock schedulers with the same steps as ours, and the sampler that takes them here.
STOCK_SAMPLERS = {
    "DDPMScheduler": "ddpm", "DDPMParallelScheduler": "ddpm", "DDIMScheduler": "ddim", "DDIMParallelScheduler": "ddim",
}  # fmt: skip
# Stock solvers of the same process with other steps. Their schedule and target can be read if a sampler is named.
STOCK_SOLVERS = {kind.name for kind in KarrasDiffusionSchedulers} - set(STOCK_SAMPLERS) - {"EDMEulerScheduler"}
# Options that no stock scheduler has.
OWN_OPTIONS = (
    "cosine_s", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "snr_shift", "sampler", "eta",
    "use_clipped_model_output",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Records


@dataclass
class GaussianSchedulerOutput(BaseOutput):
    """Result of one sampling step.

    Attributes:
        prev_sample: x at the next timestep of the chain, shaped as x_t.
        pred_original_sample: the estimate of x0, clipped as configured, shaped as x_t.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class GaussianPosterior(BaseOutput):
    """The normal distribution q(x_{t-1} | x_t, x0).

    Attributes:
        mean: shaped as x_t.
        variance, log_variance: `(B, 1, ...)`, with as many axes as x_t.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


# ---------------------------------------------------------------------------------------------
# Beta schedules: float64 betas of shape (T,)


def linear_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return the linear schedule of DDPM (section 4), (T,) float64.

    The betas are multiplied by 1000 / T, so that every T ends at about the same noise.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: first and last beta at T = 1000.

    Raises:
        ValueError: unless 0 < beta_start <= beta_end < 1, or if the last beta would reach 1 (fewer than about 20 steps
            at the defaults).
    """
    scale = 1000 / num_train_timesteps
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"a linear schedule needs 0 < beta_start <= beta_end < 1; got beta_start={beta_start}, beta_end={beta_end}"
        )
    if scale * beta_end >= 1:
        raise ValueError(
            "a linear schedule needs 0 < beta_start <= beta_end and beta_end * 1000 / num_train_timesteps < 1; got "
            f"beta_start={beta_start}, beta_end={beta_end}, num_train_timesteps={num_train_timesteps} (which gives "
            f"{scale * beta_end:.4g}): use at least {math.floor(1000 * beta_end) + 1} steps, a smaller beta_end, or "
            "another schedule"
        )
    return torch.linspace(scale * beta_start, scale * beta_end, num_train_timesteps, dtype=torch.float64)


def _betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """Return (T,) betas, at most 0.999, from (T + 1,) values that begin at 1 (Nichol & Dhariwal, section 3.2)."""
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


def cosine_betas(num_train_timesteps: int, s: float = 0.008) -> Tensor:
    """Return the cosine schedule of Nichol & Dhariwal (equation 17), (T,) float64.

    Args:
        num_train_timesteps: T.
        s: offset that keeps the first betas from being too small; at least 0.
    """
    t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    f = torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** 2
    return _betas_from_alphas_cumprod(f / f[0])


def sigmoid_betas(num_train_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Return the sigmoid schedule of Jabri et al. (algorithm 1), (T,) float64.

    Args:
        num_train_timesteps: T.
        start, end: part of the sigmoid that abar follows; start < end.
        tau: temperature, above 0; a smaller one makes the middle of the schedule steeper.

    Raises:
        ValueError: unless start < end and tau > 0.
    """
    if not (start < end and tau > 0):
        raise ValueError(
            f"a sigmoid schedule needs sigmoid_start < sigmoid_end and sigmoid_tau > 0; got {start}, {end}, {tau}"
        )
    t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    g = torch.sigmoid((t * (end - start) + start) / tau)
    return _betas_from_alphas_cumprod((g[-1] - g) / (g[-1] - g[0]))


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it ends at 0 (Lin et al., algorithm 1); the last beta is then exactly 1."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - abar / torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))


def shift_log_snr(betas: Tensor, shift: float) -> Tensor:
    """Add `shift` to the log-SNR, log(abar / (1 - abar)), at every timestep (Hoogeboom et al., section 3.1)."""
    abar = torch.cumprod(1 - betas, 0)
    abar = torch.sigmoid(torch.logit(abar) + shift)
    return 1 - abar / torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))


def check_betas(betas: Tensor, source: str, zero_snr: bool) -> None:
    """Check that there are signal and noise at each timestep.

    Args:
        betas: (T,) float64.
        source: the options that made them, and their values; for the message.
        zero_snr: allow the last beta to be 1.

    Raises:
        ValueError: names `source` and the first beta that breaks the rule.
    """
    abar = torch.cumprod(1 - betas, 0)
    good = (betas > 0) & (betas < 1) & (abar > 0) & (abar < 1)  # False for NaN
    if zero_snr and len(betas):
        good[-1] |= betas[-1] == 1
    if len(betas) == 0 or not good.all():
        found = "no betas"
        if len(betas):
            t = (~good).nonzero()[0].item()
            found = f"{(~good).sum().item()} of {len(betas)} that do not, the first {betas[t].item():.4g} at t={t}"
        raise ValueError(
            "every beta must lie strictly between 0 and 1 (the last may be 1 with rescale_betas_zero_snr), and so must "
            f"the product of 1 - beta; got {found}, from {source}"
        )


def _named_betas(name: str, steps: int, options: dict) -> Tensor:
    """Return the betas of the schedule `name` with its options, rescaled if they say so, and checked."""
    make, names = {
        "linear": (linear_betas, ("beta_start", "beta_end")),
        "cosine": (cosine_betas, ("cosine_s",)),
        "sigmoid": (sigmoid_betas, ("sigmoid_start", "sigmoid_end", "sigmoid_tau")),
    }[name]
    betas = make(steps, *(options[name] for name in names))
    zero_snr, shift = options["rescale_betas_zero_snr"], options["snr_shift"]
    if shift:
        betas = shift_log_snr(betas, shift)
    if zero_snr:
        betas = rescale_to_zero_terminal_snr(betas)
    shown = ("beta_schedule", *names, *(["snr_shift"] if shift else []), "rescale_betas_zero_snr")
    used = {name: options[name] for name in shown}
    source = ", ".join(f"{name}={value!r}" for name, value in {**used, "num_train_timesteps": steps}.items())
    check_betas(betas, source, zero_snr)
    return betas


def _given_betas(trained_betas, zero_snr: bool) -> Tensor:
    """Return the option `trained_betas` as a float64 tensor, checked; it may be rescaled already."""
    try:
        betas = torch.as_tensor(trained_betas, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"trained_betas must be a list of numbers, got {trained_betas!r}") from error
    if betas.ndim != 1:
        raise ValueError(f"trained_betas must be a list of numbers, got the shape {tuple(betas.shape)}")
    check_betas(betas, "trained_betas", zero_snr)
    return betas


def _name_of_betas(betas: Tensor, beta_schedule, options: dict) -> str:
    """Return `beta_schedule` if it is the schedule of exactly these betas, else "trained"."""
    if beta_schedule in BETA_SCHEDULES:
        with contextlib.suppress(ValueError):  # the options of a schedule that is not used may be unusable
            if torch.equal(betas, _named_betas(beta_schedule, len(betas), options)):
                return beta_schedule
    return "trained"


def _schedule(options: dict) -> tuple[Tensor, str]:
    """Return the betas that the options ask for, (T,) float64, and the name of their schedule."""
    steps, schedule, zero_snr = (
        options[name] for name in ("num_train_timesteps", "beta_schedule", "rescale_betas_zero_snr")
    )
    betas = None
    if options["trained_betas"] is not None:
        betas = _given_betas(options["trained_betas"], zero_snr)
    if steps is None:
        steps = 1000 if betas is None else len(betas)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_STEPS:,}, got {steps!r}")
    if betas is None:
        if schedule == "trained":
            raise ValueError("beta_schedule is 'trained' but trained_betas were not given")
        if not _is_one_of(schedule, BETA_SCHEDULES):
            raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}; got {schedule!r}")
        return _named_betas(schedule, steps, options), schedule
    if len(betas) != steps:
        raise ValueError(f"trained_betas must have num_train_timesteps values; got {len(betas)} and {steps}")
    if zero_snr and betas[-1] != 1:
        betas = rescale_to_zero_terminal_snr(betas)
        check_betas(betas, "trained_betas with rescale_betas_zero_snr", zero_snr=True)
    name = _name_of_betas(betas, schedule, options)
    if name == "trained" and options["snr_shift"]:
        raise ValueError(
            "snr_shift must be 0 with trained_betas that are not those of beta_schedule with the shift: they are used "
            f"as they are; got {options['snr_shift']!r}"
        )
    return betas, name


# ---------------------------------------------------------------------------------------------
# Rules of the options


def _is_one_of(value, allowed: Sequence[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _is_number(value) -> bool:
    # compared with the largest float: an integer above it has no float; `math.isfinite` would end a compiled graph
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= torch.finfo(float).max


def _is_whole(value) -> bool:
    return _is_number(value) and int(value) == value


def _is_eta(value) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _choice(name: str, allowed: Sequence[str]) -> tuple:
    return lambda o: _is_one_of(o[name], allowed), f"{name} must be one of {', '.join(allowed)}; got {{{name}!r}}"


def _number(name: str) -> tuple:
    return lambda o: _is_number(o[name]), f"{name} must be a finite number, got {{{name}!r}}"


def _switch(name: str) -> tuple:
    return lambda o: isinstance(o[name], bool), f"{name} must be True or False, got {{{name}!r}}"


ETA_RULE = "eta must be a number from 0 to 1 (above it there is more noise than x_t has), got {eta!r}"

# Each rule is a test that the options must pass, and the message if they do not. The first broken rule is reported, so
# that a later rule may rely on the types that an earlier one has checked. `_schedule` checks the options of the betas.
OPTION_RULES = (
    _choice("prediction_type", PREDICTION_TYPES),
    _choice("variance_type", VARIANCE_TYPES),
    _choice("sampler", SAMPLERS),
    _choice("timestep_spacing", SPACINGS),
    *map(_number, ("beta_start", "beta_end", "cosine_s", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "snr_shift",
                   "eta", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")),
    *map(_switch, ("clip_sample", "use_clipped_model_output", "thresholding", "rescale_betas_zero_snr")),
    (lambda o: o["cosine_s"] >= 0, "cosine_s must be at least 0, got {cosine_s}"),
    (lambda o: _is_eta(o["eta"]), ETA_RULE),
    (
        lambda o: _is_whole(o["steps_offset"]) and isinstance(o["steps_offset"], int) and o["steps_offset"] >= 0,
        "steps_offset must be a whole number of at least 0, got {steps_offset!r}",
    ),
    (
        lambda o: 0 < o["clip_sample_range"] <= torch.finfo(torch.float32).max,
        "clip_sample_range must be greater than 0, and a float32, got {clip_sample_range}",
    ),
    (
        lambda o: 0 < o["dynamic_thresholding_ratio"] <= 1 and o["sample_max_value"] >= 1,
        "dynamic thresholding needs a ratio in (0, 1] and sample_max_value of at least 1; got "
        "dynamic_thresholding_ratio={dynamic_thresholding_ratio}, sample_max_value={sample_max_value}",
    ),
    (
        lambda o: not o["rescale_betas_zero_snr"] or o["prediction_type"] != "epsilon",
        "with rescale_betas_zero_snr the last x_t is pure noise, from which epsilon says nothing of x0: "
        "prediction_type must be v_prediction or sample, got {prediction_type}",
    ),
)  # fmt: skip


def _check_options(options: dict) -> None:
    """Raise ValueError with the first rule of `OPTION_RULES` that the options break."""
    for holds, message in OPTION_RULES:
        if not holds(options):
            raise ValueError(message.format(**options))


# ---------------------------------------------------------------------------------------------
# Timesteps of a chain


def _spaced_timesteps(steps: int, total: int, spacing: str, offset: int) -> list[int]:
    """Return `steps` of the timesteps 0 to `total` - 1, descending (Lin et al., table 2)."""
    if spacing == "trailing":
        return [i * total // steps - 1 for i in range(steps, 0, -1)]
    if spacing == "linspace":
        return [round(i * (total - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
    chain = [i * (total // steps) + offset for i in reversed(range(steps))]
    if chain[0] >= total:
        raise ValueError(
            f"steps_offset={offset} puts the first of {steps} timesteps at {chain[0]}; it must be below {total}"
        )
    return chain


def _checked_timesteps(timesteps, total: int) -> list[int]:
    """Return timesteps that a user gives, as a list of integers.

    Raises:
        ValueError: unless they are descending whole numbers from `total` - 1 to 0.
    """
    given = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    chain = [int(t) for t in given] if isinstance(given, (list, tuple)) and all(map(_is_whole, given)) else []
    descending = all(a > b for a, b in itertools.pairwise(chain))
    if not chain or not descending or chain[0] >= total or chain[-1] < 0:
        raise ValueError(f"timesteps must be descending whole numbers from {total - 1} to 0; got {given!r}")
    return chain


def _one_timestep(timestep) -> int:
    """Return the timestep of a sampling step as an integer.

    Raises:
        ValueError: it is no whole number, or a tensor of another number of values than one.
    """
    is_tensor = isinstance(timestep, Tensor)
    if is_tensor and timestep.numel() == 1 or isinstance(timestep, (int, numbers.Integral)) or _is_whole(timestep):
        return int(timestep)
    got = f"a tensor of the shape {tuple(timestep.shape)}" if is_tensor else repr(timestep)
    raise ValueError(f"a sampling step has one timestep for all samples, a whole number; got {got}")


# ---------------------------------------------------------------------------------------------
# Configurations. Stock schedulers can be made from ours, ours from a stock scheduler's, and ours again from what has
# passed through a stock scheduler.


def _published(options: dict, betas: Tensor, beta_schedule: str) -> dict:
    """Return the configuration's entries that differ from the constructor's arguments or are added to them.

    With them a stock scheduler that is made from the configuration has our schedule, target and clipping.
    """
    published = {
        "num_train_timesteps": len(betas),
        "beta_schedule": beta_schedule,
        "trained_betas": betas.tolist(),  # stock schedulers let them win over beta_schedule
        "prediction_type": options["prediction_type"],
        "variance_type": options["variance_type"],
        # Stock schedulers drop the keys of this list silently, and warn of other keys that they do not know.
        "_use_default_values": list(OWN_OPTIONS),
        # This copy of the dropped options passes through stock schedulers, and `from_config` reads it.
        "_gaussian": {name: options[name] for name in OWN_OPTIONS},
    }
    # Stock multistep solvers ignore clip_sample. Dynamic thresholding with a maximum of 1 is clipping to [-1, 1].
    if options["clip_sample"] and options["clip_sample_range"] == 1 and not options["thresholding"]:
        published.update(thresholding=True, sample_max_value=1.0)
    return published


def _without_published_clipping(config: dict) -> dict:
    """Drop the thresholding by which `_published` expresses clipping; then a change of `clip_sample` takes effect."""
    clips = config.get("clip_sample", True) and config.get("clip_sample_range", 1) == 1
    if clips and config.get("thresholding") and config.get("sample_max_value", 1) == 1:
        return {name: value for name, value in config.items() if name != "thresholding"}
    return config


def _with_own_options(config: dict) -> dict:
    """Restore the options that `_published` and the fast sampler keep in `_gaussian`, if the configuration has any."""
    if config.get("variance_type", "") is None:  # set by the fast sampler, which keeps the model's in `_gaussian`
        config = {name: value for name, value in config.items() if name != "variance_type"}
    if "_gaussian" not in config:
        return config
    own = config["_gaussian"]
    config = {**own, **{name: value for name, value in config.items() if name != "_gaussian"}}
    if "timestep_spacing" in own:  # the fast sampler has changed the public one
        config["timestep_spacing"] = own["timestep_spacing"]
    if config.get("trained_betas") is None and config.get("beta_schedule") != "trained":
        config["trained_betas"] = _stock_betas(config)  # the schedule was changed in a stock scheduler
        config["snr_shift"] = 0.0
    return config


_MISSING = object()


def _without_stale_betas(config: dict, keywords: dict) -> dict:
    """Drop `trained_betas` if keywords change an option that the betas follow from."""
    changed = {name for name in keywords if name in SCHEDULE_OPTIONS and keywords[name] != config.get(name, _MISSING)}
    # betas of no named schedule can be rescaled, and stay
    rescaled = changed == {"rescale_betas_zero_snr"} and config.get("beta_schedule") == "trained"
    if "trained_betas" in keywords or not changed or rescaled:
        return config
    return {name: value for name, value in config.items() if name != "trained_betas"}


def _read_own_configuration(config: dict, keywords: dict) -> dict:
    """Return the constructor's arguments for a configuration of ours, which `keywords` will change."""
    return _without_published_clipping(_without_stale_betas(_with_own_options(config), keywords))


def _defaults(kind: type) -> dict:
    """Return the constructor's options with their defaults, in order."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}


def _stock_class(name: str) -> type | None:
    """Return the scheduler class of diffusers with that name, if there is one."""
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    return kind if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None


def _stock_class_that_wrote(config: dict, own: type) -> type | None:
    """Return the stock class that wrote a configuration, or None if it is one of ours (class `own`).

    A saved configuration has the name of its class. The configuration of a scheduler in memory has none, but begins
    with all options of its class in their order (options of classes that it passed through come after them). Any other
    dictionary without a name is one of ours.

    Raises:
        ValueError: the configuration names a class that diffusers does not have, or no class has its options.
    """
    names, name = [key for key in config if not key.startswith("_")], config.get("_class_name")
    name = name[-1] if isinstance(name, (list, tuple)) and name else name
    if "_gaussian" in config or set(OWN_OPTIONS) <= set(names) or name == own.__name__:
        return None
    if name is not None:
        if kind := _stock_class(name):
            return kind
        raise ValueError(f"the configuration is of {name!r}, which is no scheduler that diffusers has here")
    # Looking at every class of diffusers imports all of it: do so only for options that are not all ours.
    written_by_hand = not isinstance(config, FrozenDict) and set(names) <= own._get_init_keys(own)
    others = [] if written_by_hand else dir(diffusers)

    def begin(kind: type | None) -> int:
        """Return the number of options of a class if the configuration begins with all of them, else 0."""
        options = list(_defaults(kind)) if kind else []
        return len(options) if names[: len(options)] == options else 0

    # some classes have the first options of others: it is the one with the most
    found = next(filter(begin, map(_stock_class, [*STOCK_SAMPLERS, *sorted(STOCK_SOLVERS)])), None)
    found = found or max(map(_stock_class, others), key=begin, default=None)
    if begin(found):
        return found
    if isinstance(config, FrozenDict):
        raise ValueError(f"the configuration is of no known scheduler; it has the options {', '.join(names)}")
    return None


def _check_names(config: dict, keywords: dict, own: type, kind: type | None) -> None:
    """Check that every key is an option of ours or of the stock class `kind`.

    A configuration may also have options of other schedulers that it passed through.

    Raises:
        ValueError: names the unknown keys.
    """
    known = own._get_init_keys(own) | (own._get_init_keys(kind) if kind else set())
    unknown = {name for name in set(config) - known if not name.startswith("_")}
    others = (*STOCK_SAMPLERS, *STOCK_SOLVERS, *(dir(diffusers) if unknown else ()))
    for other in map(_stock_class, others):
        if not unknown:
            break
        unknown -= own._get_init_keys(other) if other else set()
    for what, names in (("configuration", unknown), ("call", set(keywords) - known)):
        if names:
            raise ValueError(f"the {what} has keys that {own.__name__} does not know: {', '.join(sorted(names))}")


def _stock_betas(config: dict) -> list[float]:
    """Return the betas that stock schedulers make of these options."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    options = {name: config[name] for name in names if name in config}
    try:
        return DDPMScheduler(**options).betas.double().tolist()
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"no stock betas can be made of {options}: {error}") from error


def _check_stock_steps(kind: type, config: dict, keywords: dict, own: type) -> None:
    """Check that our steps are those of the stock class `kind`, or that the caller names a sampler instead.

    Raises:
        ValueError: the class has other steps, or its options ask for steps that we do not have.
    """
    sampler = STOCK_SAMPLERS.get(kind.__name__)
    if sampler is None and (kind.__name__ not in STOCK_SOLVERS or "sampler" not in keywords):
        lacks = f"the options are those of {kind.__name__}, and {own.__name__} has neither its steps nor its schedule"
        if kind.__name__ in STOCK_SOLVERS:
            lacks = (
                f"the options are those of {kind.__name__}, whose steps {own.__name__} does not have: give "
                "sampler='ddim' or 'ddpm' to take its schedule and target alone"
            )
        raise ValueError(lacks)
    ends = config.get("set_alpha_to_one", True)
    if sampler and ends is not True:
        raise ValueError(
            f"set_alpha_to_one must be True (the last step gives x0), got {ends!r}: give set_alpha_to_one=True"
        )
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas must be False (flow matching is another process), got True")


def _with_stock_betas(kind: type, config: dict, keywords: dict) -> dict:
    """Set `trained_betas` to the stock schedule, unless keywords ask for betas or for a schedule of ours.

    Raises:
        ValueError: names keywords that would have no effect.
    """
    given = {name: keywords[name] for name in SCHEDULE_OPTIONS if name in keywords}
    has_own_schedule = given.get("beta_schedule") in BETA_SCHEDULES
    useless = [] if has_own_schedule else sorted(set(given) & set(OWN_OPTIONS))
    if config.get("trained_betas") is not None and "beta_schedule" not in given and "trained_betas" not in keywords:
        useless += sorted(set(given) & {"beta_start", "beta_end"})
    if useless:
        raise ValueError(
            f"{', '.join(useless)} would change nothing: the betas are those of the {kind.__name__}'s "
            "configuration; give beta_schedule too"
        )
    if "trained_betas" in keywords:
        return config
    if has_own_schedule:
        return {**config, "trained_betas": None}
    if config.get("trained_betas") is None or "beta_schedule" in given:
        return {**config, "trained_betas": _stock_betas({**config, **given})}
    return config


def _read_stock_configuration(kind: type, config: dict, keywords: dict, own: type) -> tuple[dict, dict]:
    """Return our constructor's arguments for a configuration of the stock class `kind`, and the keywords left for it.

    Keywords that only stock schedulers have change the configuration. Stock defaults are filled in, since ours differ.

    Raises:
        ValueError: steps or options that cannot be kept, by name.
    """
    of_ours = own._get_init_keys(own)
    config = {**_defaults(kind), **config, **{name: keywords[name] for name in keywords if name not in of_ours}}
    keywords = {name: keywords[name] for name in keywords if name in of_ours}
    _check_stock_steps(kind, config, keywords, own)
    if config.get("variance_type", "") is None:
        config.pop("variance_type")
    config.setdefault("sampler", STOCK_SAMPLERS.get(kind.__name__) or keywords["sampler"])
    config.setdefault("clip_sample", False)
    config.setdefault("use_clipped_model_output", False)
    return _with_stock_betas(kind, config, keywords), keywords


# ---------------------------------------------------------------------------------------------
# The variational bound: its variances, and the decoder of 8-bit data


def _variances_of_bound(betas: Tensor, posterior_variance: Tensor, is_large: bool) -> dict[str, Tensor]:
    """Return the logarithms (T,) of the smaller, the larger and the fixed variance that the bound's terms have.

    At t = 0, where the posterior's variance is 0, the smaller one and the fixed one are the posterior's at t = 1, as in
    the code of Ho et al. and of Nichol & Dhariwal.
    """
    small = (torch.cat((posterior_variance[1:2], posterior_variance[1:])) if len(betas) > 1 else betas).log()
    large = betas.log()
    fixed = torch.cat((small[:1], large[1:])) if is_large else small
    return {"bound_log_small": small, "bound_log_large": large, "bound_log_fixed": fixed}


def _log_bin_probability(distance: Tensor, deviation: Tensor, x0: Tensor, half: float | Tensor) -> Tensor:
    """Return the logarithm of the probability that a normal distribution gives the bins of whole numbers around x0.

    The bins of -1 and 1 extend to infinity, so that all of them sum to 1 (DDPM, equation 13). Both tails are computed
    by `log_ndtr`, in which they do not underflow.

    Args:
        distance: x0 minus the mean, shaped as x0.
        deviation: the standard deviation, broadcasting against x0.
        x0: data in [-1, 1].
        half: half the width of a bin, broadcasting against x0.
    """
    low, high = x0 < half - 1, x0 > 1 - half
    near = torch.where(low, distance, torch.where(high, -distance, -distance.abs()))
    upper = torch.special.log_ndtr((near + half) / deviation)
    lower = torch.special.log_ndtr((near - half) / deviation)
    # log(exp(upper) - exp(lower)); the bound keeps the gradient finite where both are equal by rounding
    between = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-1e-30)))
    return torch.where(low | high, upper, between)


# ---------------------------------------------------------------------------------------------
# The scheduler


# This class is longer than 250 lines because diffusers saves, loads and calls a scheduler as one object: the forward
# process, the targets and the sampling steps are its methods, and most of the lines are their docstrings.
class GaussianScheduler(SchedulerMixin, ConfigMixin):
    """Gaussian diffusion in discrete time: forward process, targets, loss weights, DDPM and DDIM sampling.

    The configuration lists the betas (`trained_betas`) and has the keys that stock schedulers know, so
    `DDIMScheduler.from_config(scheduler.config)` and the like keep schedule, target and clipping.

    Timesteps may be integers or integer tensors. With tensors on the device of the data nothing is read back from that
    device, and nothing is copied to it after the first call there (see `load_tables`); with integers, never.

    Args:
        num_train_timesteps: T, 1 to 1,000,000. Defaults to the length of `trained_betas`, or 1000 without them.
        beta_schedule: "sigmoid", "cosine" or "linear" as in denoising-diffusion-pytorch, in float64. The configuration
            says "trained" if `trained_betas` are of no named schedule.
        beta_start, beta_end: ends of the linear schedule at T = 1000, with 0 < beta_start <= beta_end < 1; they are
            multiplied by 1000 / T.
        cosine_s: offset of the cosine schedule, at least 0.
        sigmoid_start, sigmoid_end, sigmoid_tau: ends and temperature of the sigmoid schedule, with
            sigmoid_start < sigmoid_end and sigmoid_tau > 0.
        trained_betas: (T,) explicit betas in (0, 1), used instead of `beta_schedule`.
        prediction_type: the target of the model: "epsilon", "sample" (x0) or "v_prediction". The names "pred_noise",
            "pred_x0" and "pred_v" are accepted too.
        variance_type: variance of DDPM steps: "fixed_small" (the posterior's variance), "fixed_large" (beta), or
            "learned_range" (the model has twice the channels; Nichol & Dhariwal, equation 15).
        sampler: "ddpm", "ddim", or "auto" (DDPM if every training step is used, DDIM for shorter chains).
        eta: amount of noise in DDIM steps, from 0 (deterministic) to 1 (the variance of DDPM); `step` may override it.
        clip_sample, clip_sample_range: clamp the estimate of x0 to [-range, range]; range > 0.
        use_clipped_model_output: compute epsilon again from the clipped x0 in DDIM steps.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0 instead of clipping
            (Saharia et al., section 2.3), with a ratio in (0, 1] and a maximum of at least 1. With a maximum of 1 it
            clamps to [-1, 1]; the configuration says clipping to [-1, 1] in that form, the only one that stock
            multistep solvers follow.
        timestep_spacing: position of the timesteps of a shorter chain: "trailing" (includes T-1; floor(i T / S) - 1 as
            in denoising-diffusion-pytorch), "leading" (includes `steps_offset`) or "linspace" (both ends).
        steps_offset: added to "leading" timesteps; at least 0.
        rescale_betas_zero_snr: rescale the schedule to abar = 0 at its end (Lin et al.). The last beta is then 1, and
            the target cannot be epsilon.
        snr_shift: added to the log-SNR of the named schedule at every timestep, before it is rescaled (Hoogeboom et
            al., section 3.1). Negative values add noise; 2 log(base / size) keeps the noise of `base` pixels a side at
            `size` pixels: -1.386 for 128 with base 64.

    Raises:
        ValueError: an unknown name, or a value outside its range; the message has the rule and the value.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int | None = None,
        beta_schedule: str = "sigmoid",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        cosine_s: float = 0.008,
        sigmoid_start: float = -3.0,
        sigmoid_end: float = 3.0,
        sigmoid_tau: float = 1.0,
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "v_prediction",
        variance_type: str = "fixed_small",
        sampler: str = "auto",
        eta: float = 0.0,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        use_clipped_model_output: bool = True,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        snr_shift: float = 0.0,
    ):
        options = dict(self.config)
        for name, aliases in (("prediction_type", PREDICTION_ALIASES), ("variance_type", VARIANCE_ALIASES)):
            if isinstance(options[name], str):
                options[name] = aliases.get(options[name], options[name])
        _check_options(options)
        betas, beta_schedule = _schedule(options)
        self.register_to_config(**_published(options, betas, beta_schedule))

        self.num_train_timesteps = len(betas)
        abar = torch.cumprod(1 - betas, 0)
        self._ends_at_zero_snr = betas[-1].item() == 1
        previous = torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
        variance = betas * (1 - previous) / (1 - abar)  # DDPM, equation 7, as the means below
        self._tables = {  # for tensors of timesteps
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "snr": abar / (1 - abar),
            "posterior_of_x0": previous.sqrt() * betas / (1 - abar),
            "posterior_of_x_t": (1 - betas).sqrt() * (1 - previous) / (1 - abar),
            "posterior_variance": variance,
            "posterior_log_variance": variance.log(),
            **_variances_of_bound(betas, variance, self.config.variance_type == "fixed_large"),
        }
        self._loaded_tables = {}  # by name, device and dtype
        # for integer timesteps
        self._abar = abar.tolist()
        self._host_rates = list(zip(abar.sqrt().tolist(), (1 - abar).sqrt().tolist()))
        # Code written for stock schedulers reads these as float32, so that `alphas_cumprod[t].sqrt() * x` is float32.
        self.betas, self.alphas, self.alphas_cumprod = (x.float() for x in (betas, 1 - betas, abar))
        self.init_noise_sigma = 1.0  # standard deviation of the first x_t; stock pipelines multiply by it
        self.num_inference_steps = None
        self._use_timesteps(list(reversed(range(self.num_train_timesteps))), device=None)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Make a scheduler from our own configuration or a stock scheduler's, keeping the mathematics and the sampler.

        A keyword changes only what it names. `beta_schedule` as a keyword is the constructor's (our "linear" and
        "sigmoid" differ from stock's); every other keyword beside a stock configuration is read as stock reads it. A
        stock schedule becomes `trained_betas`, computed by the stock library.

        A stock DDIM or DDPM configuration keeps its kind of step at every number of steps. Each step leads to the next
        timestep of the chain, where stock DDIM goes to t - T // S; this is the same with "leading" spacing, and with
        "trailing" if S divides T. Other stock solvers of the same process (DPM-Solver, Euler, ...) have other steps:
        name a `sampler` beside their configuration to read its schedule and target. A stock configuration that was made
        from one of ours has our options, and gives our scheduler back.

        Args:
            config: a configuration of ours or of a stock scheduler, as a dictionary or from a scheduler in memory.
            return_unused_kwargs: return the unknown keywords beside the scheduler instead of raising an error.
            **kwargs: options that replace those of the configuration.

        Raises:
            ValueError: names the scheduler, option or value that cannot be kept or is not known.
        """
        if isinstance(config, dict):
            kind = _stock_class_that_wrote(config, cls)
            # diffusers drops the values that are listed under this key: the stock defaults, which differ from ours.
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
            _check_names(config, {} if return_unused_kwargs else kwargs, cls, kind)
            if kind is None:
                config = _read_own_configuration(config, kwargs)
            else:
                config, kwargs = _read_stock_configuration(kind, config, kwargs, cls)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.num_train_timesteps

    def __getstate__(self) -> dict:
        """Leave the loaded tables out of copies and pickles, which may be read where there is no such device."""
        return {**self.__dict__, "_loaded_tables": {}}

    # -----------------------------------------------------------------------------------------
    # Coefficients

    def load_tables(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Copy the coefficients to a device ahead of their use there, which would copy them once.

        Compiled and captured code is then free of copies from the host.

        Args:
            device: device of the timesteps and data.
            dtype: float32 (also for data of half precision) or float64.
        """
        device = torch.empty(0, device=device).device  # with its index
        for name in self._tables:
            self._table(name, device, dtype)
        self._table("snr", device, torch.float64)

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return a (T,) table on a device; it is copied there at most once."""
        table = self._loaded_tables.get((name, device, dtype))
        if table is None:
            table = self._tables[name].to(dtype).to(device)
            if type(table) is Tensor:  # tensors of a tracer end with it
                self._loaded_tables[name, device, dtype] = table
        return table

    def _checked(self, t: int | Tensor, like: Tensor | None = None) -> int | Tensor:
        """Return timesteps, checked as far as that needs no read from their device: the values of tensors are not.

        Args:
            t: an integer, or a 0-d or one-dimensional tensor of integers.
            like: the batch that the timesteps are for; one sample goes with any number of timesteps.

        Raises:
            ValueError: they are something else.
        """
        if isinstance(t, Tensor):
            samples = 1 if like is None or like.ndim == 0 else like.shape[0]
            fits = t.ndim == 0 or (t.ndim == 1 and (t.shape[0] == samples or 1 in (samples, t.shape[0])))
            if fits and t.dtype in (torch.int64, torch.int32):
                return t
            got = f"a tensor of the shape {tuple(t.shape)} and {t.dtype} for {samples} sample(s)"
        else:
            if not isinstance(t, int) and isinstance(t, numbers.Integral):
                t = int(t)  # NumPy's
            if isinstance(t, int) and 0 <= t < self.num_train_timesteps:
                return t
            got = repr(t)
        raise ValueError(
            f"a timestep must be an integer from 0 to {self.num_train_timesteps - 1}, or a tensor of such integers "
            f"(int64 or int32), 0-d or with one for each sample; got {got}"
        )

    def _at(self, name: str, t: int | Tensor, like: Tensor) -> Tensor:
        """Return table `name` at `t` (an integer, 0-d or (B,)) on `like`'s device, broadcasting against `like`."""
        t = self._checked(t, like)
        table = self._table(name, like.device, like.dtype)
        if isinstance(t, int):
            return table[t].reshape((1,) * like.ndim)
        values = table[t.to(like.device).reshape(-1)]  # indexing with a 0-d tensor would read it back
        return values.reshape(t.shape + (1,) * (like.ndim - t.ndim))

    def _rates(self, t: int | Tensor, like: Tensor) -> tuple:
        """Return sqrt(abar_t) and sqrt(1 - abar_t): numbers for an integer t, else tensors as `_at` gives them."""
        t = self._checked(t, like)
        if isinstance(t, int):
            return self._host_rates[t]
        return self._at("sqrt_abar", t, like), self._at("sqrt_one_minus_abar", t, like)

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        """Return half-precision tensors as float32, in which they are computed with; others as they are."""
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    @classmethod
    def _pair(cls, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return both tensors as `_wide` does.

        Raises:
            ValueError: they are on different devices.
        """
        if x.device != y.device:
            raise ValueError(f"the tensors must be on one device, got {x.device} and {y.device}")
        return cls._wide(x), cls._wide(y)

    # -----------------------------------------------------------------------------------------
    # Forward process and targets
    #
    # Shapes in this section: x_t, x0, epsilon (`noise`) and v are `(B, C, *spatial)`; t is an integer, or a 0-d or (B,)
    # tensor of integers in [0, T), on any device. Results have the dtype of the first tensor. Tensors of data on
    # different devices raise a ValueError, and so do timesteps that are wrong as far as no device is read for it.

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_t for x0 and epsilon (DDPM, equation 4).

        Args:
            original_samples: x0, `(B, C, *spatial)`.
            noise: epsilon, shaped as x0.
            timesteps: t in [0, T); an integer, or a 0-d or (B,) tensor of integers.

        Raises:
            ValueError: the tensors are on different devices, t is an integer outside its range or no integer, or its
                shape is another. The values of a tensor are not checked, which would be a read from its device.
        """
        x0, epsilon = self._pair(original_samples, noise)
        signal, spread = self._rates(timesteps, x0)
        return (signal * x0 + spread * epsilon).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return v for x0 (`sample`) and epsilon (`noise`) (Salimans & Ho, appendix D); arguments as in `add_noise`."""
        x0, epsilon = self._pair(sample, noise)
        signal, spread = self._rates(timesteps, epsilon)
        return (signal * epsilon - spread * x0).to(noise.dtype)

    def x0_from_epsilon(self, x_t: Tensor, t: int | Tensor, epsilon: Tensor) -> Tensor:
        """Return x0 = (x_t - sqrt(1 - abar) epsilon) / sqrt(abar), equation 4 of DDPM solved for x0."""
        x, epsilon = self._pair(x_t, epsilon)
        signal, spread = self._rates(t, x)
        return ((x - spread * epsilon) / signal).to(x_t.dtype)

    def x0_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """Return x0 = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans & Ho, appendix D)."""
        x, v = self._pair(x_t, v)
        signal, spread = self._rates(t, x)
        return (signal * x - spread * v).to(x_t.dtype)

    def epsilon_from_x0(self, x_t: Tensor, t: int | Tensor, x0: Tensor) -> Tensor:
        """Return epsilon = (x_t - sqrt(abar) x0) / sqrt(1 - abar), equation 4 of DDPM solved for epsilon."""
        x, x0 = self._pair(x_t, x0)
        signal, spread = self._rates(t, x)
        return ((x - signal * x0) / spread).to(x_t.dtype)

    def epsilon_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """Return epsilon = sqrt(1 - abar) x_t + sqrt(abar) v (Salimans & Ho, appendix D)."""
        x, v = self._pair(x_t, v)
        signal, spread = self._rates(t, x)
        return (spread * x + signal * v).to(x_t.dtype)

    def target(self, x0: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return the tensor that the model is trained to predict, by `prediction_type`; arguments as in `add_noise`."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        return self.get_velocity(x0, noise, timesteps)

    def predict_x0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """Return the x0 that a prediction of `prediction_type` implies at x_t, not clipped; shaped as x_t."""
        kind = self.config.prediction_type
        if kind == "sample":
            return model_output
        if kind == "epsilon":
            return self.x0_from_epsilon(x_t, t, model_output)
        return self.x0_from_v(x_t, t, model_output)

    def posterior(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> GaussianPosterior:
        """Return q(x_{t-1} | x_t, x0) (DDPM, equations 6 and 7).

        At t = 0 the mean is x0, the variance 0 and its logarithm minus infinity. Half-precision tensors give a float32
        distribution.
        """
        x0, x_t = self._pair(x0, x_t)
        mean = self._at("posterior_of_x0", t, x_t) * x0 + self._at("posterior_of_x_t", t, x_t) * x_t
        return GaussianPosterior(
            mean=mean,
            variance=self._at("posterior_variance", t, x_t),
            log_variance=self._at("posterior_log_variance", t, x_t),
        )

    def snr(self, t: int | Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar / (1 - abar) at t, float64, shaped as t, on t's device."""
        t = self._checked(t)
        if isinstance(t, int):
            return self._tables["snr"][t]
        return self._table("snr", t.device, torch.float64)[t.reshape(-1)].reshape(t.shape)

    def loss_weights(self, t: int | Tensor, min_snr_gamma: float | None = None) -> Tensor:
        """Return the weight of the squared error at t, float64, shaped as t, on t's device.

        In units of the error of x0 the weight is SNR for every target (1 for epsilon, SNR for x0, SNR / (SNR + 1) for
        v), or min(SNR, gamma) with `min_snr_gamma` (Hang et al., equation 7).

        If the schedule ends at SNR 0, SNR counts as at least 1 (or gamma, if that is less): the truncated SNR of
        Salimans & Ho, section 4. Otherwise the timestep that sampling begins with would have the weight 0.

        Args:
            t: integer, or a tensor of integers in [0, T).
            min_snr_gamma: gamma, above 0; None does not clip.

        Raises:
            ValueError: min_snr_gamma is not a finite number above 0.
        """
        if min_snr_gamma is not None and not (_is_number(min_snr_gamma) and min_snr_gamma > 0):
            raise ValueError(f"min_snr_gamma must be a finite number greater than 0, got {min_snr_gamma!r}")
        snr = self.snr(t)
        least = 1.0 if self._ends_at_zero_snr else 0.0
        clipped = snr.clamp(min=least, max=min_snr_gamma)  # if least is above gamma, the result is gamma
        kind = self.config.prediction_type
        if kind == "epsilon":
            return clipped / snr
        if kind == "sample":
            return clipped
        return clipped / (snr + 1)

    # -----------------------------------------------------------------------------------------
    # The variational bound

    def bound_term(
        self,
        model_output: Tensor,
        x0: Tensor,
        x_t: Tensor,
        timesteps: int | Tensor,
        decoder: str = "discretized",
        clip: bool = True,
        levels: int | Tensor = 256,
    ) -> Tensor:
        """Return the term of the variational bound at t for each value of x0, in nats, shaped as x0.

        The terms of all t from 0 to T - 1 and `prior_term`, summed over the values of x0, are in the mean over x_t an
        upper bound of -log p(x0) (DDPM, equation 5). At t >= 1 the term is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} |
        x_t)); at t = 0 it is the negative log-likelihood of the decoder, -log p(x0 | x_t). p is the normal distribution
        of a DDPM step, with the variance that `variance_type` says (learned: Nichol & Dhariwal, equation 15). At t = 0,
        where the posterior's variance is 0, the smaller variance is the posterior's at t = 1; so is the larger one of
        "fixed_large" with the discretized decoder, as in the authors' code. A density with a fixed variance has beta_0,
        that of the noise in x_t. The term is differentiable in the model's output. Half-precision tensors give float32.

        Args:
            model_output: prediction of `prediction_type`, shaped as x0 (twice the channels for learned_range).
            x0: data, `(B, C, *spatial)`.
            x_t: x at t, shaped as x0.
            timesteps: t, an integer, or a 0-d or (B,) tensor of integers in [0, T).
            decoder: "discretized" for `levels` evenly spaced values from -1 to 1, whose bins touch, with those at both
                ends going to infinity (DDPM, equation 13); "density" for continuous data, in the units of x0.
            clip: clip the estimate of x0 as sampling does (`clip_x0`).
            levels: number of values, at least 2 (256 for 8 bits), or a tensor of them that broadcasts against x0.

        Raises:
            ValueError: an unknown decoder, or a model output of another shape or on another device.
        """
        if not _is_one_of(decoder, DECODERS):
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")
        x0, x_t = self._pair(x0, x_t)
        output, fraction = self._split_output(model_output, x_t)
        estimate = self.predict_x0(output, timesteps, x_t)
        if clip:
            estimate = self.clip_x0(estimate)
        # the means of q and p differ by this; at t = 0 it is the distance of x0 to the decoder's mean
        distance = self._at("posterior_of_x0", timesteps, x_t) * (x0 - estimate)
        log_small = self._at("bound_log_small", timesteps, x_t)
        log_large = self._at("bound_log_large", timesteps, x_t)
        if fraction is None:
            log_variance = self._at("bound_log_fixed", timesteps, x_t)
        else:
            share = (fraction + 1) / 2  # Nichol & Dhariwal, equation 15
            log_variance = share * log_large + (1 - share) * log_small
        ratio = log_small - log_variance
        divergence = 0.5 * (torch.exp(ratio) - 1 - ratio + distance.square() * torch.exp(-log_variance))
        if decoder == "discretized":
            first = -_log_bin_probability(distance, torch.exp(0.5 * log_variance), x0, 1 / (levels - 1))
        else:
            log_width = log_large if fraction is None else log_variance
            first = 0.5 * (math.log(2 * math.pi) + log_width + distance.square() * torch.exp(-log_width))
        if isinstance(timesteps, int):
            return divergence if timesteps else first
        t = timesteps.to(x_t.device)
        return torch.where((t == 0).reshape(t.shape + (1,) * (x_t.ndim - t.ndim)), first, divergence)

    def prior_term(self, x0: Tensor) -> Tensor:
        """Return KL(q(x_T | x0) || N(0, I)), the bound's term without a model, for each value of x0 in nats."""
        abar = self._abar[-1]
        return 0.5 * (abar * (self._wide(x0).square() - 1) - math.log1p(-abar))

    def sample_noise(
        self,
        like: Tensor,
        offset_strength: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw standard normal noise, and add `offset_strength` times one normal number for each channel.

        Args:
            like: `(B, C, *spatial)`; gives the shape, dtype and device of the noise.
            offset_strength: standard deviation of the number that the positions of a channel share.
            generator: one for the batch, or a list with one for each sample.
        """
        noise = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        if offset_strength:
            offset_shape = like.shape[:2] + (1,) * (like.ndim - 2)
            offset = randn_tensor(offset_shape, generator=generator, device=like.device, dtype=like.dtype)
            noise = noise + offset_strength * offset
        return noise

    # -----------------------------------------------------------------------------------------
    # Sampling

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of the chain.

        Args:
            num_inference_steps: number of steps, 1 to T; their position follows from `timestep_spacing`.
            device: device of the attribute `timesteps`.
            timesteps: the timesteps themselves, descending, instead of their number.

        Raises:
            ValueError: both or neither of number and timesteps are given, or one is outside its range.
        """
        total = self.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            chain = _checked_timesteps(timesteps, total)
        else:
            steps = num_inference_steps
            if not _is_whole(steps) or not 1 <= steps <= total:
                raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}; got {steps!r}")
            chain = _spaced_timesteps(int(steps), total, self.config.timestep_spacing, self.config.steps_offset)
        self.num_inference_steps = len(chain)
        self._use_timesteps(chain, device)

    def _use_timesteps(self, chain: list[int], device) -> None:
        self.timesteps = torch.tensor(chain, dtype=torch.int64, device=device)
        self._previous = dict(zip(chain, [*chain[1:], -1]))

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep that a step from `timestep` leads to, in the form of `timestep`; -1 after the last.

        Raises:
            ValueError: `timestep` is not one of the chosen timesteps, or not a single one.
        """
        t = _one_timestep(timestep)
        if t not in self._previous:
            raise ValueError(f"timestep {t} is not one of the chosen timesteps")
        previous = self._previous[t]
        return torch.full_like(timestep, previous) if isinstance(timestep, Tensor) else previous

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return `sample` unchanged; stock pipelines call this, since some schedulers scale the model's input."""
        return sample

    def clip_x0(self, x0: Tensor) -> Tensor:
        """Return the estimate of x0, clipped or thresholded as configured; same shape."""
        c = self.config
        if c.thresholding and c.sample_max_value > 1:
            # Saharia et al., section 2.3: s is the percentile of |x0|; clamp to [-s, s] and divide by s.
            magnitudes = x0.flatten(1).abs().float().sort(dim=1).values
            last = magnitudes.shape[1] - 1
            rank = c.dynamic_thresholding_ratio * last  # interpolated between ranks; torch.quantile limits the size
            low = int(rank)
            s = torch.lerp(magnitudes[:, low], magnitudes[:, min(low + 1, last)], rank - low)
            s = s.clamp(1, c.sample_max_value).to(x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1))
            return torch.minimum(torch.maximum(x0, -s), s) / s
        if c.thresholding:  # before clip_sample, as in stock schedulers
            return x0.clamp(-1, 1)
        return x0.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> GaussianSchedulerOutput | tuple:
        """Go from x_t to x_s, where s is the next of the chosen timesteps after t.

        Args:
            model_output: prediction of `prediction_type`, shaped as `sample` (twice the channels for learned_range).
            timestep: t, one of `timesteps`. An integer or a CPU tensor costs no read from the device of `sample`.
            sample: x_t, `(B, C, *spatial)`.
            generator: for the added noise; one for the batch, or a list with one for each sample.
            eta: amount of noise in a DDIM step, 0 to 1. Defaults to the configuration's.
            use_clipped_model_output: compute epsilon again from the clipped x0. Defaults to the configuration's.
            variance_noise: standard normal noise to use instead of drawing it, shaped as `sample`.
            return_dict: return a record; otherwise the tuple (x_s, estimate of x0).

        Raises:
            ValueError: a timestep that was not chosen or several of them, an eta outside its range, or a model output
                of another shape or on another device.
        """
        t = _one_timestep(timestep)
        s = self.previous_timestep(t)
        if eta is not None and not _is_eta(eta):
            raise ValueError(ETA_RULE.format(eta=eta))
        x_t = self._wide(sample)
        output, fraction = self._split_output(model_output, sample)
        x0 = self.clip_x0(self.predict_x0(output, t, x_t))
        if self._takes_ddpm_steps():
            mean, deviation = self._ddpm_step(x_t, x0, fraction, t, s)
        else:
            rederive = use_clipped_model_output
            if rederive is None:
                rederive = self.config.use_clipped_model_output
            epsilon = self._epsilon(x_t, output, t, x0 if rederive else None)
            mean, deviation = self._ddim_step(x0, epsilon, t, s, self.config.eta if eta is None else eta)
        prev_sample = mean
        if isinstance(deviation, Tensor) or deviation > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            prev_sample = mean + deviation * variance_noise.to(x_t.device)
        prev_sample, x0 = prev_sample.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return (prev_sample, x0)
        return GaussianSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _takes_ddpm_steps(self) -> bool:
        """Return True for DDPM steps and False for DDIM steps, by the option `sampler` and the length of the chain."""
        if self.config.sampler == "auto":
            return len(self._previous) == self.num_train_timesteps
        return self.config.sampler == "ddpm"

    def _split_output(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the prediction, and the model's fraction for the variance in [-1, 1] if it has learned one.

        Raises:
            ValueError: the output has another shape than `sample` and the option `variance_type` ask for.
        """
        learned = self.config.variance_type == "learned_range"
        channels = sample.shape[1] * (2 if learned else 1)
        if model_output.shape != (len(sample), channels, *sample.shape[2:]):
            raise ValueError(
                f"model_output must have {channels} channels and else the shape of sample, {tuple(sample.shape)}, with "
                f"variance_type={self.config.variance_type}; got {tuple(model_output.shape)}"
            )
        output, _ = self._pair(model_output, sample)
        return output.chunk(2, dim=1) if learned else (output, None)

    def _step_coefficients(self, t: int, s: int) -> tuple[float, float, float, float]:
        """Return abar_t, abar_s (1 after the last step), and the smaller and larger variance of a step from t to s.

        If no timestep lies between, these are the posterior's variance (DDPM, equation 7) and beta_t; otherwise those
        of the chain without the timesteps between. The last step has the smaller variance 0.
        """
        abar_t, abar_s = self._abar[t], self._abar[s] if s >= 0 else 1.0
        large = 1 - abar_t / abar_s
        small = (1 - abar_s) / (1 - abar_t) * large
        return abar_t, abar_s, small, large

    def _ddpm_step(self, x_t: Tensor, x0: Tensor, fraction: Tensor | None, t: int, s: int) -> tuple:
        """Return mean and standard deviation (0 in the last step) of x_s in a DDPM step.

        Args:
            x_t: x at timestep t.
            x0: its estimate of x0, clipped.
            fraction: the model's fraction for the variance, in [-1, 1], with variance_type "learned_range".
            t, s: timesteps before and after the step; s is -1 in the last one.
        """
        abar_t, abar_s, small, large = self._step_coefficients(t, s)
        # DDPM, equation 7, with alpha = abar_t / abar_s
        x0_weight = math.sqrt(abar_s) * large / (1 - abar_t)
        mean = x0_weight * x0 + math.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t) * x_t
        if s < 0:
            return mean, 0.0
        if fraction is not None:
            share = (fraction + 1) / 2  # Nichol & Dhariwal, equation 15
            return mean, torch.exp(0.5 * (share * math.log(large) + (1 - share) * math.log(small)))
        return mean, math.sqrt(large if self.config.variance_type == "fixed_large" else small)

    def _ddim_step(self, x0: Tensor, epsilon: Tensor, t: int, s: int, eta: float) -> tuple:
        """Return mean and standard deviation (0 in the last step) of x_s in a DDIM step, from estimates at t."""
        if s < 0:
            return x0, 0.0
        _, abar_s, small, _ = self._step_coefficients(t, s)
        deviation = eta * math.sqrt(small)  # DDIM, equation 16
        mean = math.sqrt(abar_s) * x0 + math.sqrt(max(1 - abar_s - deviation**2, 0.0)) * epsilon  # equation 12
        return mean, deviation

    def _epsilon(self, x_t: Tensor, output: Tensor, t: int, clipped_x0: Tensor | None) -> Tensor:
        """Return the epsilon of a DDIM step: that of the clipped x0, or without one that of the model's output."""
        kind = self.config.prediction_type
        if clipped_x0 is not None:
            return self.epsilon_from_x0(x_t, t, clipped_x0)
        if kind == "sample":
            return self.epsilon_from_x0(x_t, t, output)
        if kind == "epsilon":
            return output
        return self.epsilon_from_v(x_t, t, output)
