"""Beta schedules, the forward process, conversions between targets, and DDPM / DDIM sampling.

Ho et al., "Denoising Diffusion Probabilistic Models" (DDPM, arXiv:2006.11239); Song et al., "Denoising
Diffusion Implicit Models" (DDIM, arXiv:2010.02502); Nichol & Dhariwal (cosine schedule, learned variance,
arXiv:2102.09672); Jabri et al. (sigmoid schedule, arXiv:2212.11972); Salimans & Ho (v, arXiv:2202.00512);
Hang et al. (min-SNR, arXiv:2303.09556); Saharia et al. (dynamic thresholding, arXiv:2205.11487);
Lin et al. (zero terminal SNR, arXiv:2305.08891).

Notation: abar_t = alphas_cumprod[t], x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon, and
v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x0. Coefficients are float64, cast where they are used.
This file imports nothing of ddpm_hf: it ships inside saved pipelines.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
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
# Options that the betas follow from: a change of one of them makes published betas stale.
SCHEDULE_OPTIONS = (
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "cosine_s",
    "sigmoid_start", "sigmoid_end", "sigmoid_tau", "rescale_betas_zero_snr",
)  # fmt: skip
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
    if not 0 < beta_start <= beta_end or scale * beta_end >= 1:
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


def _one_of(name: str, value, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


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
        prediction_type = _one_of(
            "prediction_type",
            PREDICTION_ALIASES.get(prediction_type, prediction_type),
            PREDICTION_TYPES,
        )
        variance_type = _one_of("variance_type", VARIANCE_ALIASES.get(variance_type, variance_type), VARIANCE_TYPES)
        _one_of("sampler", sampler, SAMPLERS)
        _one_of("timestep_spacing", timestep_spacing, SPACINGS)
        numbers = ("beta_start", "beta_end", "cosine_s", "sigmoid_start", "sigmoid_end", "sigmoid_tau", "eta",
                   "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "steps_offset")  # fmt: skip
        for name in numbers:
            value = self.config[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if cosine_s < 0:
            raise ValueError(f"cosine_s must be at least 0, got {cosine_s}")
        if eta < 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be greater than 0, got {clip_sample_range}")
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
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self._abar = [*self.alphas_cumprod.tolist(), 1.0]  # host copy; [-1] is abar before the first step
        self._tables = {
            "sqrt_abar": self.alphas_cumprod.sqrt(),
            "sqrt_one_minus_abar": (1 - self.alphas_cumprod).sqrt(),
            "snr": self.alphas_cumprod / (1 - self.alphas_cumprod),
        }
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
        c = self.config
        if trained_betas is not None:
            try:
                betas = torch.as_tensor(trained_betas, dtype=torch.float64).flatten().clone()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"trained_betas must be a list of numbers, got {trained_betas!r}") from error
            if num_train_timesteps is not None and len(betas) != num_train_timesteps:
                raise ValueError(
                    f"trained_betas must have num_train_timesteps values; got {len(betas)} and {num_train_timesteps}"
                )
            last_may_be_one = 1.0 if c.rescale_betas_zero_snr else math.nan
            inside = (betas > 0) & (betas < 1)
            if len(betas) and betas[-1] == last_may_be_one:
                inside[-1] = True
            if len(betas) == 0 or not inside.all():
                wrong = betas[~inside].tolist()[:3]
                raise ValueError(f"trained_betas must lie strictly between 0 and 1; got {wrong or 'no values'}")
        steps = (
            len(betas) if trained_betas is not None else (1000 if num_train_timesteps is None else num_train_timesteps)
        )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_train_timesteps must be a whole number of at least 1, got {steps!r}")

        if beta_schedule == "trained" and trained_betas is None:
            raise ValueError("beta_schedule is 'trained' but trained_betas were not given")
        if beta_schedule != "trained" and trained_betas is None:
            _one_of("beta_schedule", beta_schedule, BETA_SCHEDULES)
        named = None
        if beta_schedule in BETA_SCHEDULES:
            try:
                named = {
                    "linear": lambda: linear_betas(steps, c.beta_start, c.beta_end),
                    "cosine": lambda: cosine_betas(steps, c.cosine_s),
                    "sigmoid": lambda: sigmoid_betas(steps, c.sigmoid_start, c.sigmoid_end, c.sigmoid_tau),
                }[beta_schedule]()
            except ValueError:
                if trained_betas is None:
                    raise
        if named is not None and c.rescale_betas_zero_snr:
            named = rescale_to_zero_terminal_snr(named)
        if trained_betas is None:
            return named, beta_schedule
        if c.rescale_betas_zero_snr and betas[-1] != 1:
            betas = rescale_to_zero_terminal_snr(betas)
        return betas, beta_schedule if named is not None and torch.equal(named, betas) else "trained"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """As diffusers, which only warns of keys that it does not know.

        Raises:
            ValueError: keys that neither this class nor a stock scheduler knows; named.
        """
        config, kwargs = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        known = cls._get_init_keys(cls).union(*(cls._get_init_keys(kind) for kind in cls._get_compatibles()))
        unknown = sorted(name for name in config if name not in known and not name.startswith("_"))
        if unknown:
            raise ValueError(
                f"the configuration of {pretrained_model_name_or_path} has keys that {cls.__name__} does not know: "
                f"{', '.join(unknown)}"
            )
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """From our own configuration or a stock scheduler's, keeping the mathematics; `kwargs` override.

        A stock configuration's named schedule becomes `trained_betas`, computed by the stock library: its "linear" is
        not scaled by 1000 / T, and its "sigmoid" is another function.
        """
        if isinstance(config, dict):
            # Stock defaults are values too: dropping them would put ours, which differ, in their place.
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
            config = {**config.pop("_gaussian", {}), **config}
            foreign = "sigmoid_tau" not in config and "beta_schedule" in config and "beta_start" in config
            if foreign and config.get("trained_betas") is None and not set(SCHEDULE_OPTIONS) & set(kwargs):
                keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
                stock = DDPMScheduler(**{key: config[key] for key in keys if key in config})
                config["trained_betas"] = stock.betas.double().tolist()
            if foreign:
                # what stock schedulers without these keys do
                config.setdefault("clip_sample", False)
                config.setdefault("use_clipped_model_output", False)
                config.setdefault("timestep_spacing", "leading")
            if "trained_betas" not in kwargs and set(SCHEDULE_OPTIONS) & set(kwargs):
                config.pop("trained_betas", None)
            if kwargs.get("clip_sample") is False and "thresholding" not in kwargs:
                config.pop("thresholding", None)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

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
        """What the model is to predict, by `prediction_type`; shaped as x0."""
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
        abar = self.alphas_cumprod[t]
        prev = torch.tensor(self._abar, dtype=torch.float64)[t - 1]
        beta = self.betas[t]
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
        """
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be greater than 0, got {min_snr_gamma}")
        snr = self.snr(t)
        clipped = snr if min_snr_gamma is None else snr.clamp(max=min_snr_gamma)
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
            chain = [int(t) for t in timesteps]
            descending = all(a > b for a, b in itertools.pairwise(chain))
            if not chain or not descending or chain[0] >= total or chain[-1] < 0:
                raise ValueError(f"timesteps must be descending whole numbers from {total - 1} to 0; got {chain}")
        else:
            steps = num_inference_steps
            whole = isinstance(steps, (int, float)) and not isinstance(steps, bool) and int(steps) == steps
            if not whole or not 1 <= steps <= total:
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
        if c.clip_sample:
            return x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        return x0.clamp(-1, 1) if c.thresholding else x0

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
