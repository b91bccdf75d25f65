"""Beta schedules, the forward process, conversions between targets, and DDPM / DDIM sampling.

Ho et al., "Denoising Diffusion Probabilistic Models" (DDPM, arXiv:2006.11239); Song et al., "Denoising
Diffusion Implicit Models" (DDIM, arXiv:2010.02502); Nichol & Dhariwal (cosine schedule, learned variance,
arXiv:2102.09672); Jabri et al. (sigmoid schedule, arXiv:2212.11972); Salimans & Ho (v, arXiv:2202.00512);
Hang et al. (min-SNR, arXiv:2303.09556); Saharia et al. (dynamic thresholding, arXiv:2205.11487);
Lin et al. (zero terminal SNR, arXiv:2305.08891).

Notation: abar_t = alphas_cumprod[t], x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon, and
v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x0. Coefficients are float64, cast where they are used; published as
float32.
This file imports nothing of ddpm_hf: it ships inside saved pipelines.
"""

import contextlib
import inspect
import itertools
import math
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
VARIANCE_ALIASES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}  # the same variances
SAMPLERS = ("auto", "ddpm", "ddim")
SPACINGS = ("trailing", "leading", "linspace")
MOST_STEPS = 1_000_000  # the betas are published, one by one
# Options that the betas follow from: a change of one of them makes published betas stale.
SCHEDULE_OPTIONS = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "cosine_s",
    "sigmoid_start", "sigmoid_end", "sigmoid_tau", "rescale_betas_zero_snr",
)  # fmt: skip
# Stock schedulers whose steps are ours, by our name for them.
STOCK_SAMPLERS = {
    "DDPMScheduler": "ddpm", "DDPMParallelScheduler": "ddpm", "DDIMScheduler": "ddim", "DDIMParallelScheduler": "ddim",
}  # fmt: skip
# Stock solvers of the same process: their schedule and target are taken where a sampler is named.
STOCK_SOLVERS = {kind.name for kind in KarrasDiffusionSchedulers} - set(STOCK_SAMPLERS) - {"EDMEulerScheduler"}
# Options that no stock scheduler knows.
OWN_OPTIONS = (
    "cosine_s", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "sampler", "eta", "use_clipped_model_output",
)  # fmt: skip


@dataclass
class GaussianSchedulerOutput(BaseOutput):
    """One step: `prev_sample` x_{t-1} and `pred_original_sample`, the (clipped) estimate of x0; shaped as x_t."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass
class GaussianPosterior(BaseOutput):
    """q(x_{t-1} | x_t, x0): `mean` shaped as x_t; `variance` and `log_variance` `(B, 1, ...)`."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


# ---------------------------------------------------------------------------------------------
# Schedules: float64 betas of shape (T,).


def linear_betas(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """DDPM, section 4, rescaled by 1000 / T so that every T ends at about the same noise.

    Raises:
        ValueError: where the last beta would reach 1 (fewer than about 20 steps at the defaults).
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


def _betas_of(alphas_cumprod: Tensor) -> Tensor:
    """(T + 1,) values of abar from t = 0 on -> betas, at most 0.999 (Nichol & Dhariwal, section 3.2)."""
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


def cosine_betas(num_train_timesteps: int, s: float = 0.008) -> Tensor:
    """Nichol & Dhariwal, equation 17."""
    t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    f = torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** 2
    return _betas_of(f / f[0])


def sigmoid_betas(num_train_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """Jabri et al., algorithm 1."""
    if not (start < end and tau > 0):
        raise ValueError(
            f"a sigmoid schedule needs sigmoid_start < sigmoid_end and sigmoid_tau > 0; got {start}, {end}, {tau}"
        )
    t = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    g = torch.sigmoid((t * (end - start) + start) / tau)
    return _betas_of((g[-1] - g) / (g[-1] - g[0]))


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Lin et al., algorithm 1: shift and scale sqrt(abar) so that abar_T = 0; the last beta is then exactly 1."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - abar / torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))


def check_betas(betas: Tensor, source: str, zero_snr: bool) -> None:
    """Betas of every origin: there must be signal and noise at each timestep, but for the last with zero SNR.

    Args:
        betas: (T,) float64.
        source: the options that made them, and their values.
        zero_snr: the last beta may be 1.

    Raises:
        ValueError: `source`, and the first beta that breaks the rule.
    """
    abar = torch.cumprod(1 - betas, 0)
    good = (betas > 0) & (betas < 1) & (abar > 0) & (abar < 1)  # false of NaN
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


def _one_of(name: str, value, allowed: Sequence[str], aliases: dict | None = None) -> str:
    name_of = (aliases or {}).get(value, value) if isinstance(value, str) else value
    if not isinstance(name_of, str) or name_of not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return name_of


def _is_number(value) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_whole(value) -> bool:
    return _is_number(value) and int(value) == value


def _check_eta(eta) -> None:
    if not _is_number(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number from 0 to 1 (above it there is more noise than x_t has), got {eta!r}")


_MISSING = object()


def _stock_class_of(config: dict, own: type) -> type | None:
    """The stock class that a configuration is of; None: ours.

    The configuration of a scheduler in memory has no name. It begins with its class's options, all and in their order;
    those of other classes that it passed through come after them. Any other dictionary without a name is ours.
    """
    names, name = [key for key in config if not key.startswith("_")], config.get("_class_name")
    ours = "_gaussian" in config or set(OWN_OPTIONS) <= set(names)
    name = name[-1] if isinstance(name, (list, tuple)) and name else name
    if ours or name == own.__name__:
        return None
    if name is not None:
        if kind := _stock_class(name):
            return kind
        raise ValueError(f"the configuration is of {name!r}, which is no scheduler that diffusers has here")
    # all of diffusers only where it must be: it is imported for that
    written = not isinstance(config, FrozenDict) and set(names) <= own._get_init_keys(own)
    for kind in map(_stock_class, [*STOCK_SAMPLERS, *sorted(STOCK_SOLVERS), *([] if written else dir(diffusers))]):
        options = _defaults(kind) if kind else {}
        if options and names[: len(options)] == list(options):
            return kind
    if isinstance(config, FrozenDict):
        raise ValueError(f"the configuration is of no known scheduler; it has the options {', '.join(names)}")
    return None


def _defaults(kind: type) -> dict:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}


def _stock_class(name: str) -> type | None:
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    return kind if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else None


def _stock_betas(config: dict) -> list[float]:
    """The betas that stock schedulers make of these options."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    options = {name: config[name] for name in names if name in config}
    try:
        return DDPMScheduler(**options).betas.double().tolist()
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"no stock betas can be made of {options}: {error}") from error


class GaussianScheduler(SchedulerMixin, ConfigMixin):
    """Gaussian diffusion in discrete time: forward process, targets, loss weights, DDPM and DDIM sampling.

    The configuration publishes the betas (`trained_betas`) and the keys stock schedulers know, so
    `DDIMScheduler.from_config(scheduler.config)` and the like keep schedule, target and clipping.

    Args:
        num_train_timesteps: T. None: the length of `trained_betas`, else 1000.
        beta_schedule: "sigmoid", "cosine" or "linear" as in denoising-diffusion-pytorch, in float64. "trained" stands
            in the configuration where `trained_betas` are of no named schedule.
        beta_start, beta_end: of the linear schedule, at T = 1000 (they are multiplied by 1000 / T).
        cosine_s: offset of the cosine schedule.
        sigmoid_start, sigmoid_end, sigmoid_tau: of the sigmoid schedule.
        trained_betas: (T,) explicit betas in (0, 1); they win over `beta_schedule`.
        prediction_type: what the model predicts: "epsilon", "sample" (x0) or "v_prediction"; the names "pred_noise",
            "pred_x0" and "pred_v" are taken too.
        variance_type: of DDPM steps: "fixed_small" (the posterior's variance), "fixed_large" (beta), or "learned_range"
            (the model has twice the channels; Nichol & Dhariwal, equation 15).
        sampler: "auto" (DDPM where every training step is used, DDIM where fewer are), "ddpm" or "ddim".
        eta: DDIM's noise, 0 (deterministic) to 1 (the variance of DDPM), where `step` is not given one.
        clip_sample, clip_sample_range: clamp the x0 estimate to [-range, range].
        use_clipped_model_output: re-derive epsilon from the clipped x0 in DDIM steps.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0, instead of clipping.
            With `sample_max_value=1` it is clamping to [-1, 1]; with clipping to [-1, 1] the configuration publishes it
            in that form, the only one that stock multistep solvers follow.
        timestep_spacing: where the steps of a shorter chain lie: "trailing" (includes T-1; floor(i T / S) - 1 as in
            denoising-diffusion-pytorch), "leading" (includes `steps_offset`) or "linspace" (both ends).
        steps_offset: added to "leading" timesteps.
        rescale_betas_zero_snr: rescale the schedule to abar_T = 0 (then beta_T = 1; not for epsilon prediction).

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
    ):
        prediction_type = _one_of("prediction_type", prediction_type, PREDICTION_TYPES, PREDICTION_ALIASES)
        variance_type = _one_of("variance_type", variance_type, VARIANCE_TYPES, VARIANCE_ALIASES)
        _one_of("sampler", sampler, SAMPLERS)
        _one_of("timestep_spacing", timestep_spacing, SPACINGS)
        numbers = ("beta_start", "beta_end", "cosine_s", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "eta",
                   "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")  # fmt: skip
        for name in numbers:
            if not _is_number(self.config[name]):
                raise ValueError(f"{name} must be a finite number, got {self.config[name]!r}")
        for name in ("clip_sample", "use_clipped_model_output", "thresholding", "rescale_betas_zero_snr"):
            if not isinstance(self.config[name], bool):
                raise ValueError(f"{name} must be True or False, got {self.config[name]!r}")
        if cosine_s < 0:
            raise ValueError(f"cosine_s must be at least 0, got {cosine_s}")
        _check_eta(eta)
        if not _is_whole(steps_offset) or not isinstance(steps_offset, int) or steps_offset < 0:
            raise ValueError(f"steps_offset must be a whole number of at least 0, got {steps_offset!r}")
        if not 0 < clip_sample_range <= torch.finfo(torch.float32).max:
            raise ValueError(f"clip_sample_range must be greater than 0, and a float32, got {clip_sample_range}")
        if not 0 < dynamic_thresholding_ratio <= 1 or sample_max_value < 1:
            raise ValueError(
                "dynamic thresholding needs a ratio in (0, 1] and sample_max_value of at least 1; got "
                f"dynamic_thresholding_ratio={dynamic_thresholding_ratio}, sample_max_value={sample_max_value}"
            )
        betas, beta_schedule = self._make_betas(num_train_timesteps, beta_schedule, trained_betas)
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "with rescale_betas_zero_snr the last x_t is pure noise, from which epsilon says nothing of x0: "
                "prediction_type must be v_prediction or sample, got epsilon"
            )

        self.num_train_timesteps = len(betas)
        abar = torch.cumprod(1 - betas, 0)
        self._betas = betas
        self._abar = [*abar.tolist(), 1.0]  # host copy; [-1] is abar before the first step
        self._tables = {"sqrt_abar": abar.sqrt(), "sqrt_one_minus_abar": (1 - abar).sqrt(), "snr": abar / (1 - abar)}
        # What code written for stock schedulers reads: float32, so that `alphas_cumprod[t].sqrt() * x` stays float32.
        self.betas, self.alphas, self.alphas_cumprod = (x.float() for x in (betas, 1 - betas, abar))
        self._cast_tables = {}
        # Standard deviation of the first x_T; stock pipelines multiply by it.
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._use_timesteps(list(reversed(range(self.num_train_timesteps))), device=None)

        published = {
            "num_train_timesteps": self.num_train_timesteps,
            "beta_schedule": beta_schedule,
            "trained_betas": betas.tolist(),
            "prediction_type": prediction_type,
            "variance_type": variance_type,
            # Stock schedulers drop the keys listed here silently; of others they would warn. A private copy comes back
            # through them to `from_config`.
            "_use_default_values": list(OWN_OPTIONS),
            "_gaussian": {name: self.config[name] for name in OWN_OPTIONS},
        }
        if clip_sample and clip_sample_range == 1 and not thresholding:
            published.update(thresholding=True, sample_max_value=1.0)
        self.register_to_config(**published)

    def _make_betas(self, num_train_timesteps, beta_schedule, trained_betas) -> tuple:
        """-> float64 betas (T,), and the name of their schedule."""
        c, explicit = self.config, None
        if trained_betas is not None:
            try:
                explicit = torch.as_tensor(trained_betas, dtype=torch.float64).clone()
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(f"trained_betas must be a list of numbers, got {trained_betas!r}") from error
            if explicit.ndim != 1:
                raise ValueError(f"trained_betas must be a list of numbers, got the shape {tuple(explicit.shape)}")
            check_betas(explicit, "trained_betas", c.rescale_betas_zero_snr)
        steps = num_train_timesteps
        if steps is None:
            steps = 1000 if explicit is None else len(explicit)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"num_train_timesteps must be a whole number from 1 to {MOST_STEPS:,}, got {steps!r}")
        if explicit is not None and len(explicit) != steps:
            raise ValueError(f"trained_betas must have num_train_timesteps values; got {len(explicit)} and {steps}")
        if beta_schedule == "trained" and explicit is None:
            raise ValueError("beta_schedule is 'trained' but trained_betas were not given")
        if explicit is None:
            return self._named_betas(beta_schedule, steps), beta_schedule
        named = None
        if beta_schedule in BETA_SCHEDULES:
            with contextlib.suppress(ValueError):  # its options are not used
                named = self._named_betas(beta_schedule, steps)
        if c.rescale_betas_zero_snr and explicit[-1] != 1:
            explicit = rescale_to_zero_terminal_snr(explicit)
            check_betas(explicit, "trained_betas with rescale_betas_zero_snr", zero_snr=True)
        return explicit, beta_schedule if named is not None and torch.equal(named, explicit) else "trained"

    def _named_betas(self, beta_schedule: str, steps: int) -> Tensor:
        c = self.config
        make, names = {
            "linear": (linear_betas, ("beta_start", "beta_end")),
            "cosine": (cosine_betas, ("cosine_s",)),
            "sigmoid": (sigmoid_betas, ("sigmoid_start", "sigmoid_end", "sigmoid_tau")),
        }[_one_of("beta_schedule", beta_schedule, BETA_SCHEDULES)]
        betas = make(steps, *(c[name] for name in names))
        if c.rescale_betas_zero_snr:
            betas = rescale_to_zero_terminal_snr(betas)
        used = {name: c[name] for name in ("beta_schedule", *names, "rescale_betas_zero_snr")}
        source = ", ".join(f"{name}={value!r}" for name, value in {**used, "num_train_timesteps": steps}.items())
        check_betas(betas, source, c.rescale_betas_zero_snr)
        return betas

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Make a scheduler from our own configuration or a stock scheduler's, keeping the mathematics and the sampler.

        A keyword changes only what it names. `beta_schedule` as a keyword is the constructor's (our "linear" and
        "sigmoid", which differ from stock's); every other keyword beside a stock configuration is read as stock reads
        it. A stock schedule becomes `trained_betas`, computed by the stock library. A stock DDIM or DDPM configuration
        keeps its steps, whatever their number (each goes to the next timestep, where stock DDIM goes to t - T // S: the
        same with "leading", and with "trailing" where S divides T). Other stock solvers of the same process
        (DPM-Solver, Euler, ...) have steps that are none of ours: name a `sampler` beside their configuration. A
        configuration that was made from one of ours brings our sampler back with it.

        Raises:
            ValueError: what cannot be kept: another scheduler, an option or a value that is not known; named.
        """
        if isinstance(config, dict):
            # Stock defaults are values too: dropping them would put ours, which differ, in their place.
            kind = _stock_class_of(config, cls)
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            taken = cls._get_init_keys(cls) | (cls._get_init_keys(kind) if kind else set())
            given = set() if return_unused_kwargs else set(kwargs) - taken
            # other schedulers, which the configuration may have passed through, left theirs in it
            left = {name for name in set(config) - taken if not name.startswith("_")}
            for other in map(_stock_class, (*STOCK_SAMPLERS, *STOCK_SOLVERS, *(dir(diffusers) if left else ()))):
                if not left:
                    break
                left -= cls._get_init_keys(other) if other else set()
            for what, unknown in (("configuration", left), ("call", given)):
                if unknown:
                    unknown = ", ".join(sorted(unknown))
                    raise ValueError(f"the {what} has keys that {cls.__name__} does not know: {unknown}")
            if kind is None:
                config, kwargs = cls._own_config(config, kwargs)
            else:
                config, kwargs = cls._config_of_stock(kind, config, kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _own_config(cls, config: dict, kwargs: dict) -> tuple:
        """Published values that follow from others give way where the others are changed."""
        carried = "_gaussian" in config
        if config.get("variance_type", "") is None:  # the fast sampler's; the model's is in `_gaussian`
            config.pop("variance_type")
        own = config.pop("_gaussian", {})
        config = {**own, **config}
        if "timestep_spacing" in own:  # which the fast sampler changed
            config["timestep_spacing"] = own["timestep_spacing"]
        if carried and config.get("trained_betas") is None and config.get("beta_schedule") != "trained":
            config["trained_betas"] = _stock_betas(config)  # a stock scheduler's options were changed meanwhile
        changed = {name for name in kwargs if name in SCHEDULE_OPTIONS and kwargs[name] != config.get(name, _MISSING)}
        rescaled = changed == {"rescale_betas_zero_snr"} and config.get("beta_schedule") == "trained"
        if "trained_betas" not in kwargs and changed and not rescaled:
            config.pop("trained_betas", None)
        clips = config.get("clip_sample", True) and config.get("clip_sample_range", 1) == 1
        if clips and config.get("thresholding") and config.get("sample_max_value", 1) == 1:
            config.pop("thresholding")  # the form in which clipping is published
        return config, kwargs

    @classmethod
    def _config_of_stock(cls, kind: type, config: dict, kwargs: dict) -> tuple:
        sampler = STOCK_SAMPLERS.get(kind.__name__)
        if sampler is None and (kind.__name__ not in STOCK_SOLVERS or "sampler" not in kwargs):
            rest = "nor can its schedule be taken over"
            if kind.__name__ in STOCK_SOLVERS:
                rest = "with sampler='ddim' or 'ddpm' beside it, its schedule and target are taken"
            raise ValueError(
                f"the options are those of {kind.__name__}, whose steps {cls.__name__} does not have: {rest}"
            )
        config = {**_defaults(kind), **config}
        # what is no option of ours changes the configuration
        config.update({name: kwargs.pop(name) for name in list(kwargs) if name not in cls._get_init_keys(cls)})
        ends = config.get("set_alpha_to_one", True)
        if sampler and ends is not True:
            raise ValueError(
                f"set_alpha_to_one must be True (the last step gives x0), got {ends!r}: give set_alpha_to_one=True"
            )
        if config.get("use_flow_sigmas"):
            raise ValueError("use_flow_sigmas must be False (flow matching is another process), got True")
        config.setdefault("sampler", sampler or kwargs["sampler"])
        config.setdefault("clip_sample", False)
        config.setdefault("use_clipped_model_output", False)
        if config.get("variance_type", "") is None:
            config.pop("variance_type")

        given = {name: kwargs[name] for name in SCHEDULE_OPTIONS if name in kwargs}
        new = given.get("beta_schedule") in BETA_SCHEDULES
        useless = sorted(set(given) & set(OWN_OPTIONS)) if not new else []
        if config.get("trained_betas") is not None and "beta_schedule" not in given and "trained_betas" not in kwargs:
            useless += sorted(set(given) & {"beta_start", "beta_end"})
        if useless:
            raise ValueError(
                f"{', '.join(useless)} would change nothing: the betas are those of the {kind.__name__}'s "
                "configuration; give beta_schedule too"
            )
        if "trained_betas" not in kwargs:
            if new:
                config["trained_betas"] = None
            elif config.get("trained_betas") is None or "beta_schedule" in given:
                config["trained_betas"] = _stock_betas({**config, **given})
        return config, kwargs

    def __len__(self) -> int:
        return self.num_train_timesteps

    # -----------------------------------------------------------------------------------------
    # Coefficients

    def _at(self, name: str, t: int | Tensor, like: Tensor) -> float | Tensor:
        """Table `name` at `t`: a number for an int, else (0-d or (B,)) a tensor that broadcasts against `like`."""
        if isinstance(t, int):
            return self._tables[name][t].item()
        key = (name, like.device, like.dtype)
        if key not in self._cast_tables:
            self._cast_tables[key] = self._tables[name].to(like.dtype).to(like.device)
        values = self._cast_tables[key][t.to(like.device)]
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        """Half-precision tensors are computed with in float32."""
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def _mix(self, a_name: str, a: Tensor, sign: int, b_name: str, b: Tensor, t) -> Tensor:
        """a_t * a + sign * b_t * b, in a's dtype."""
        wide_a, wide_b = self._wide(a), self._wide(b)
        out = self._at(a_name, t, wide_a) * wide_a + sign * (self._at(b_name, t, wide_b) * wide_b)
        return out.to(a.dtype)

    # -----------------------------------------------------------------------------------------
    # Forward process and targets. x_t, x0, epsilon, v: (B, C, *spatial); t: int, 0-d or (B,) integers.

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """q(x_t | x0): x_t for x0 and epsilon (DDPM, equation 4)."""
        return self._mix("sqrt_abar", original_samples, 1, "sqrt_one_minus_abar", noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """v for x0 (`sample`) and epsilon (Salimans & Ho, appendix D)."""
        return self._mix("sqrt_abar", noise, -1, "sqrt_one_minus_abar", sample, timesteps)

    def x0_from_epsilon(self, x_t: Tensor, t: int | Tensor, epsilon: Tensor) -> Tensor:
        """(x_t - sqrt(1 - abar) epsilon) / sqrt(abar)"""
        x, e = self._wide(x_t), self._wide(epsilon)
        return ((x - self._at("sqrt_one_minus_abar", t, x) * e) / self._at("sqrt_abar", t, x)).to(x_t.dtype)

    def x0_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """sqrt(abar) x_t - sqrt(1 - abar) v"""
        return self._mix("sqrt_abar", x_t, -1, "sqrt_one_minus_abar", v, t)

    def epsilon_from_x0(self, x_t: Tensor, t: int | Tensor, x0: Tensor) -> Tensor:
        """(x_t - sqrt(abar) x0) / sqrt(1 - abar)"""
        x, x0 = self._wide(x_t), self._wide(x0)
        return ((x - self._at("sqrt_abar", t, x) * x0) / self._at("sqrt_one_minus_abar", t, x)).to(x_t.dtype)

    def epsilon_from_v(self, x_t: Tensor, t: int | Tensor, v: Tensor) -> Tensor:
        """sqrt(1 - abar) x_t + sqrt(abar) v"""
        return self._mix("sqrt_one_minus_abar", x_t, 1, "sqrt_abar", v, t)

    def target(self, x0: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return the target of the model, by `prediction_type`; shaped as x0."""
        kind = self.config.prediction_type
        return noise if kind == "epsilon" else x0 if kind == "sample" else self.get_velocity(x0, noise, timesteps)

    def predict_x0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """The x0 that `model_output` (of `prediction_type`) means at x_t, not clipped."""
        kind = self.config.prediction_type
        if kind == "sample":
            return model_output
        return (self.x0_from_epsilon if kind == "epsilon" else self.x0_from_v)(x_t, t, model_output)

    def posterior(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> GaussianPosterior:
        """q(x_{t-1} | x_t, x0) (DDPM, equations 6 and 7). At t = 0 it is x0 with variance 0 (log: -inf)."""
        x0, x_t = self._wide(x0), self._wide(x_t)
        t = torch.as_tensor(t, device="cpu")
        abar, prev = torch.tensor(self._abar, dtype=torch.float64)[torch.stack((t, t - 1))]
        beta = self._betas[t]
        shape = t.shape + (1,) * (x_t.ndim - t.ndim)

        def cast(value):
            return value.reshape(shape).to(dtype=x_t.dtype).to(x_t.device)

        mean = cast(prev.sqrt() * beta / (1 - abar)) * x0 + cast((1 - beta).sqrt() * (1 - prev) / (1 - abar)) * x_t
        variance = beta * (1 - prev) / (1 - abar)
        return GaussianPosterior(mean=mean, variance=cast(variance), log_variance=cast(variance.log()))

    def snr(self, t: int | Tensor) -> Tensor:
        """abar / (1 - abar) at t, float64, shaped as t."""
        return self._tables["snr"].to(t.device)[t] if isinstance(t, Tensor) else self._tables["snr"][t]

    def loss_weights(self, t: int | Tensor, min_snr_gamma: float | None = None) -> Tensor:
        """Weight of the squared error at t, float64, shaped as t.

        In units of the error of x0 it is SNR for every target (1 for epsilon, SNR for x0, SNR / (SNR + 1) for v), or
        min(SNR, gamma) with `min_snr_gamma` (Hang et al., equation 7).

        Where the schedule ends at SNR 0, SNR counts as at least 1 (or gamma, if that is less): the truncated SNR of
        Salimans & Ho, section 4. Else the timestep that sampling begins with would have the weight 0.
        """
        if min_snr_gamma is not None and not (_is_number(min_snr_gamma) and min_snr_gamma > 0):
            raise ValueError(f"min_snr_gamma must be a finite number greater than 0, got {min_snr_gamma!r}")
        snr = self.snr(t)
        least = 1.0 if self._betas[-1] == 1 else 0.0
        clipped = snr.clamp(min=least, max=min_snr_gamma)  # where min is above max, it is max
        kind = self.config.prediction_type
        return clipped / snr if kind == "epsilon" else clipped if kind == "sample" else clipped / (snr + 1)

    def sample_noise(
        self,
        like: Tensor,
        offset_strength: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Standard normal noise shaped as `like`, plus `offset_strength` times one normal number a channel.

        Args:
            like: (B, C, *spatial); its shape, dtype and device are taken.
            generator: one, or one per sample.
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
        """Choose the timesteps of the chain: a number of steps from 1 to T, or `timesteps` themselves, descending."""
        total = self.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps, and not both")
        if timesteps is not None:
            given = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
            chain = [int(t) for t in given] if isinstance(given, (list, tuple)) and all(map(_is_whole, given)) else []
            descending = all(a > b for a, b in itertools.pairwise(chain))
            if not chain or not descending or chain[0] >= total or chain[-1] < 0:
                raise ValueError(f"timesteps must be descending whole numbers from {total - 1} to 0; got {given!r}")
        else:
            steps = num_inference_steps
            if not _is_whole(steps) or not 1 <= steps <= total:
                raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}; got {steps!r}")
            steps, spacing = int(steps), self.config.timestep_spacing
            if spacing == "trailing":
                chain = [i * total // steps - 1 for i in range(steps, 0, -1)]
            elif spacing == "linspace":
                chain = [round(i * (total - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
            else:
                chain = [i * (total // steps) + self.config.steps_offset for i in reversed(range(steps))]
                if chain[0] >= total:
                    raise ValueError(
                        f"steps_offset={self.config.steps_offset} puts the first of {steps} timesteps at {chain[0]}; "
                        f"it must be below {total}"
                    )
        self.num_inference_steps = len(chain)
        self._use_timesteps(chain, device)

    def _use_timesteps(self, chain: list[int], device) -> None:
        self.timesteps = torch.tensor(chain, dtype=torch.int64, device=device)
        self._previous = dict(zip(chain, [*chain[1:], -1]))

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1 after the last."""
        try:
            return self._previous[int(timestep)]
        except KeyError:
            raise ValueError(f"timestep {int(timestep)} is not one of the chosen timesteps") from None

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The identity; other schedulers scale."""
        return sample

    def clip_x0(self, x0: Tensor) -> Tensor:
        """The estimate of x0 clipped or thresholded as configured; same shape."""
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
        if c.thresholding:  # as stock schedulers, which ask for it first
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
        """x_t -> x_s, s the next of the chosen timesteps.

        Args:
            model_output: prediction of `prediction_type`, shaped as `sample` (twice the channels for learned_range).
            timestep: t, one of `timesteps`.
            sample: x_t, `(B, C, *spatial)`.
            generator: of the added noise; one, or one per sample.
            eta: of a DDIM step; None: the configuration's.
            use_clipped_model_output: re-derive epsilon from the clipped x0; None: the configuration's.
            variance_noise: standard normal noise to use instead of drawing it, shaped as `sample`.

        Raises:
            ValueError: a timestep that was not chosen, or a model output of another shape.
        """
        t = int(timestep)
        s = self.previous_timestep(t)
        c = self.config
        if eta is not None:
            _check_eta(eta)
        every_step = len(self._previous) == self.num_train_timesteps
        ddpm = c.sampler == "ddpm" or (c.sampler == "auto" and every_step)

        channels = sample.shape[1] * (2 if c.variance_type == "learned_range" else 1)
        if model_output.shape != (len(sample), channels, *sample.shape[2:]):
            raise ValueError(
                f"model_output must have {channels} channels and else the shape of sample, {tuple(sample.shape)}, with "
                f"variance_type={c.variance_type}; got {tuple(model_output.shape)}"
            )
        x_t, output = self._wide(sample), self._wide(model_output)
        fraction = None
        if c.variance_type == "learned_range":
            output, fraction = output.chunk(2, dim=1)

        predicted_x0 = self.predict_x0(output, t, x_t)
        x0 = self.clip_x0(predicted_x0)
        abar_t, abar_s = self._abar[t], self._abar[s]
        alpha = abar_t / abar_s  # of the step t -> s; = alpha_t where no step is left out
        small = (1 - abar_s) / (1 - abar_t) * (1 - alpha)  # DDPM, equation 7

        if ddpm:
            x0_weight = math.sqrt(abar_s) * (1 - alpha) / (1 - abar_t)
            mean = x0_weight * x0 + math.sqrt(alpha) * (1 - abar_s) / (1 - abar_t) * x_t
            if fraction is not None and s >= 0:
                share = (fraction + 1) / 2  # Nichol & Dhariwal, equation 15
                deviation = torch.exp(0.5 * (share * math.log(1 - alpha) + (1 - share) * math.log(small)))
            else:
                deviation = math.sqrt(small if c.variance_type != "fixed_large" else 1 - alpha)
        else:
            rederive = c.use_clipped_model_output if use_clipped_model_output is None else use_clipped_model_output
            if rederive or c.prediction_type == "sample":
                epsilon = self.epsilon_from_x0(x_t, t, x0 if rederive else predicted_x0)
            else:
                epsilon = output if c.prediction_type == "epsilon" else self.epsilon_from_v(x_t, t, output)
            deviation = (c.eta if eta is None else eta) * math.sqrt(small)  # DDIM, equation 16
            mean = math.sqrt(abar_s) * x0 + math.sqrt(max(1 - abar_s - deviation**2, 0.0)) * epsilon  # equation 12
        if s < 0:
            prev_sample = x0 if not ddpm else mean  # no noise after the last step
        elif isinstance(deviation, Tensor) or deviation > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
            prev_sample = mean + deviation * variance_noise
        else:
            prev_sample = mean
        prev_sample, x0 = prev_sample.to(sample.dtype), x0.to(sample.dtype)
        if not return_dict:
            return (prev_sample, x0)
        return GaussianSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)
