"""Checkpoints of denoising-diffusion-pytorch -> pipelines.

Its `model-*.pt` files carry weights and buffers but no configuration, so all of it is read off names, shapes and
values: both forms of the U-Net (group norm, 2023; RMS norm and memory key-values, today), in 2D and in 1D.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.pipeline import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.scheduler import GaussianScheduler, cosine_betas, linear_betas
from ddpm_hf.unet import UNet1D, UNet2D

FILE_KEYS = ("model", "ema", "step")
DEFAULT_SIZE = 128  # image_size and seq_length of its README; its constructors have no default
HOW = {True: "given", False: "not in the file: its default"}


@dataclass
class Findings:
    """The content of a checkpoint: options of the three parts, weights by our names, and a line for each inference."""

    ndim: int
    unet: dict
    scheduler: dict
    pipeline: dict
    weights: dict
    lines: list = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def from_denoising_diffusion_pytorch(
    source: str | Path | Mapping[str, Any], **overrides: Any
) -> DDPMPipeline | DDPMPipeline1D:
    """A pipeline of `UNet2D` or `UNet1D` and `GaussianScheduler` that samples as the original.

    Args:
        source: a `model-*.pt` file, its contents, or the state dict of a `GaussianDiffusion` / `GaussianDiffusion1D`.
        **overrides: what the file cannot tell, see `read_checkpoint`.

    Raises:
        ValueError: the file cannot be read safely, or is of another model; the first tensors at fault are named.
    """
    return build(read_checkpoint(source, **overrides))


def build(findings: Findings) -> DDPMPipeline | DDPMPipeline1D:
    """The pipeline of `read_checkpoint`'s findings."""
    unet_class, pipeline_class = {1: (UNet1D, DDPMPipeline1D), 2: (UNet2D, DDPMPipeline)}[findings.ndim]
    unet = unet_class(**findings.unet)
    unet.load_state_dict(findings.weights)
    return pipeline_class(unet.eval(), GaussianScheduler(**findings.scheduler), **findings.pipeline)


def read_checkpoint(
    source: str | Path | Mapping[str, Any],
    *,
    weights: str = "ema",
    image_size: int | tuple[int, int] | None = None,
    seq_length: int | None = None,
    attn_heads: int | tuple[int, ...] | None = None,
    norm_groups: int = 8,
    theta: float = 10000,
    self_condition: bool | None = None,
    learned_variance: bool | None = None,
    sampling_timesteps: int | None = None,
    ddim_sampling_eta: float = 0.0,
    auto_normalize: bool = True,
) -> Findings:
    """Read a checkpoint and infer its configuration; keyword arguments are for what shapes cannot tell.

    Args:
        weights: "ema" or "model", of a checkpoint file.
        image_size, seq_length: what to sample by default; None: 128.
        attn_heads: heads of each attention, one number (in 1D: of the one in the middle) or one per stage; read off
            memory key-values where there are any, else 4.
        norm_groups: of the 2023 form.
        theta: of the sinusoidal time embedding.
        self_condition, learned_variance: needed only for a model that has both.
        sampling_timesteps: default number of sampling steps (DDIM where fewer than T); None: T.
        ddim_sampling_eta: DDIM's noise.
        auto_normalize: whether the data was given in [0, 1] (1D: the samples then come in [0, 1] too).
    """
    state, trained = _state_of(source, weights)
    lines: list[str] = []
    unet_state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    buffers = {name: value for name, value in state.items() if not name.startswith("model.")}
    for name in ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight", "downs.0.0.block1.proj.weight"):
        if name not in unet_state:
            raise ValueError(f"not a checkpoint of its Unet or Unet1D: there is no tensor model.{name}")
    for name in ("betas", "alphas_cumprod", "loss_weight"):
        if name not in buffers:
            raise ValueError(f"not a checkpoint of GaussianDiffusion or GaussianDiffusion1D: there is no tensor {name}")

    ndim = unet_state["init_conv.weight"].ndim - 2
    if ndim not in (1, 2):
        raise ValueError(f"model.init_conv.weight must be of a 1D or 2D convolution, got {ndim} dimensions")
    size = image_size if ndim == 2 else seq_length
    options = _unet_options(unet_state, ndim, attn_heads, self_condition, learned_variance, trained)
    options.update(norm_groups=norm_groups, theta=theta, sample_size=DEFAULT_SIZE if size is None else size)
    our_weights = _convert_weights(unet_state, options, ndim)

    betas, loss_weight = buffers["betas"], buffers["loss_weight"]
    if betas.ndim != 1 or len(betas) == 0 or loss_weight.shape != betas.shape:
        raise ValueError(
            "betas and loss_weight must have one number for each timestep, got the shapes "
            f"{tuple(betas.shape)} and {tuple(loss_weight.shape)}"
        )
    if sampling_timesteps is not None and not 1 <= sampling_timesteps <= len(betas):
        raise ValueError(f"sampling_timesteps must be from 1 to {len(betas)}, got {sampling_timesteps}")
    if (seq_length if ndim == 2 else image_size) is not None:
        raise ValueError(f"the checkpoint is of {'images' if ndim == 2 else 'sequences'}: give "
                         f"{'image_size, not seq_length' if ndim == 2 else 'seq_length, not image_size'}")  # fmt: skip
    broken = [name for name, value in unet_state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"the weights must be finite; NaN or infinity in: {', '.join(broken[:3])}")
    schedule, betas = _schedule(betas)
    target, gamma = _objective(betas, loss_weight)
    scheduler = {
        "num_train_timesteps": len(betas),
        "prediction_type": target,
        "eta": ddim_sampling_eta,
        "variance_type": "learned_range" if options["learned_variance"] else "fixed_small",
        # its 1D DDIM keeps the predicted noise where x0 was clipped
        "use_clipped_model_output": not (ndim == 1 and target == "epsilon"),
        **({"trained_betas": betas.tolist()} if schedule is None else {"beta_schedule": schedule}),
    }
    pipeline: dict[str, Any] = {"num_inference_steps": sampling_timesteps}
    if ndim == 1 and auto_normalize:
        pipeline.update(data_shift=[0.5] * options["in_channels"], data_scale=[0.5] * options["in_channels"])

    lines.append(
        f"form: {'Unet' if ndim == 2 else 'Unet1D'}, {options['norm']} norm, num_mem_kv {options['num_mem_kv']}"
    )
    for name, value in options.items():
        if name not in ("norm", "num_mem_kv", "norm_groups", "theta", "sample_size", "attn_heads"):
            lines.append(f"{name}: {value}")
    known_heads = options["num_mem_kv"] > 0
    heads_source = "memory key-values" if known_heads else HOW[attn_heads is not None]
    lines.append(f"attn_heads: {options['attn_heads']} ({heads_source})")
    if options["norm"] == "group":
        lines.append(f"norm_groups: {norm_groups} ({HOW[norm_groups != 8]})")
    lines.append(
        f"sample_size: {options['sample_size']} ({HOW[True] if size else 'not in the file: that of its README'})"
    )
    lines.append(f"timesteps: {len(betas)}, schedule: {schedule or 'none of the named ones: the betas are kept'}")
    lines.append(f"objective: {target}, min-SNR: {'off' if gamma is None else f'gamma {gamma:.6g}'}")
    lines.append(f"sampling_timesteps: {sampling_timesteps or len(betas)} ({HOW[sampling_timesteps is not None]})")
    lines.append(f"ddim_sampling_eta: {ddim_sampling_eta} ({HOW[ddim_sampling_eta != 0]})")
    lines.append(f"auto_normalize: {auto_normalize} ({HOW[not auto_normalize]})")
    return Findings(ndim, options, scheduler, pipeline, our_weights, lines)


# ---------------------------------------------------------------------------------------------
# Reading


def _state_of(source, weights: str) -> tuple[dict[str, Tensor], set[str] | None]:
    """The diffusion's state dict ("model.init_conv.weight", ..., "betas", ...), and what the optimizer has trained."""
    if weights not in ("ema", "model"):
        raise ValueError(f"weights must be 'ema' or 'model', got {weights!r}")
    if not isinstance(source, Mapping):
        source = _load(Path(source))
    if not isinstance(source.get("model"), Mapping) and not all(key in source for key in FILE_KEYS):
        return _tensors(source, "state dict"), None
    state = _tensors(source["model"], "model")
    trained = _trained_names(source.get("opt"), state)
    if weights == "ema":
        prefix = "ema_model."
        content = source.get("ema")
        content = content if isinstance(content, Mapping) else {}
        ema = {name.removeprefix(prefix): v for name, v in content.items() if str(name).startswith(prefix)}
        if not ema:
            raise ValueError("the checkpoint has no EMA weights (no tensor ema_model.*): use weights='model'")
        state = _tensors(ema, "ema")
    return state, trained


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle's faults are of many kinds
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise ValueError(
                f"{path} is refused: it holds more than tensors and plain values, and loading it would run its code"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, truncated or of another kind"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(content).__name__}")
    return content


def _tensors(state, part: str) -> dict[str, Tensor]:
    """Check that a part of the checkpoint is a dict of dense floating-point tensors by name, and return it."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint's {part} must be a dict of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"the names of the checkpoint's {part} must be text, got {name!r}")
        if not isinstance(value, Tensor):
            raise ValueError(f"the checkpoint's {part} must hold tensors alone, {name} is a {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            kind = "meta" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise ValueError(f"the checkpoint's tensors must be dense and of floating point, {name} is {kind}")
    # saved from a distributed run
    return {name.removeprefix("module."): value for name, value in state.items()}


def _trained_names(opt, state) -> set[str] | None:
    """The U-Net's parameters that the optimizer has a state for, or None where it says nothing."""
    names = [name.removeprefix("model.") for name in state if name.startswith("model.")]
    try:
        order, done = opt["param_groups"][0]["params"], opt["state"]
    except (TypeError, KeyError, IndexError):
        return None
    if not done or len(order) != len(names):
        return None
    return {name for name, number in zip(names, order) if number in done}


# ---------------------------------------------------------------------------------------------
# The U-Net


def _unet_options(state, ndim: int, attn_heads, self_condition, learned_variance, trained) -> dict:
    stages = 1 + max(int(match.group(1)) for name in state if (match := re.match(r"downs\.(\d+)\.", name)))
    dim = _shape(state, 2, "time_mlp.1.weight")[0] // 4
    outputs = [_shape(state, ndim + 2, f"downs.{i}.3.weight", f"downs.{i}.3.1.weight")[0] for i in range(stages)]
    if dim < 1 or any(width % dim for width in outputs):
        raise ValueError(f"the stages' widths {outputs} must be multiples of the width {dim} of time_mlp.1.weight / 4")

    channels_in = _shape(state, ndim + 2, "init_conv.weight")[1]
    channels_out = _shape(state, ndim + 2, "final_conv.weight")[0]
    if self_condition is None:
        self_condition = channels_in == 2 * channels_out
    channels = channels_in // 2 if self_condition else channels_in
    if learned_variance is None:
        learned_variance = channels_out == 2 * channels
    plain = channels * (2 if learned_variance else 1)

    full, heads, dim_heads, memories = [], [], [], []
    for prefix in [f"downs.{i}.2" for i in range(stages)] + ["mid_attn"]:
        inner = prefix if f"{prefix}.to_qkv.weight" in state else f"{prefix}.fn.fn"  # 1D: Residual(PreNorm(...))
        hidden = _shape(state, ndim + 2, f"{inner}.to_qkv.weight")[0] // 3
        is_full, memory = f"{inner}.to_out.weight" in state, state.get(f"{inner}.mem_kv")
        number = len(heads)
        if memory is not None:
            if memory.ndim != 4:
                raise ValueError(f"model.{inner}.mem_kv must have 4 dimensions, got the shape {tuple(memory.shape)}")
            head_count, memories = memory.shape[1], [*memories, memory.shape[2 if is_full else 3]]
        elif isinstance(attn_heads, (list, tuple)):
            head_count = attn_heads[min(number, len(attn_heads) - 1)]
        elif ndim == 1 and prefix != "mid_attn":
            head_count = 4  # its Unet1D gives the option to the attention in the middle alone
        else:
            head_count = attn_heads or 4
        if head_count < 1 or hidden % head_count:
            raise ValueError(f"attn_heads must divide {hidden}, the width of model.{prefix}; got {head_count}")
        full.append(is_full)
        heads.append(head_count)
        dim_heads.append(hidden // head_count)
    if not full[-1] or len(set(memories)) > 1:
        raise ValueError("the attention in the middle must be full, and all must have as many memory key-values")

    kind, fourier_dim = "sinusoidal", 16
    if "time_mlp.0.weights" in state:
        fourier_dim = 2 * _shape(state, 1, "time_mlp.0.weights")[0]
        untrained = trained is not None and "time_mlp.0.weights" not in trained
        kind = "random_fourier" if untrained else "learned_fourier"
    init_dim = state["init_conv.weight"].shape[0]
    return {
        "in_channels": channels,
        "out_channels": None if channels_out == plain else channels_out,
        "dim": dim,
        "init_dim": None if init_dim == dim else init_dim,
        "dim_mults": [width // dim for width in outputs],
        "self_condition": bool(self_condition),
        "learned_variance": bool(learned_variance),
        "norm": "rms" if "downs.0.0.block1.norm.g" in state else "group",
        "attn_heads": heads[:-1],
        "attn_dim_head": dim_heads[:-1],
        "mid_attn_heads": heads[-1],
        "mid_attn_dim_head": dim_heads[-1],
        "full_attn": full[:-1],
        "num_mem_kv": memories[0] if memories else 0,
        "time_embedding": kind,
        "fourier_dim": fourier_dim,
    }


def _shape(state, ndim: int, *names: str) -> torch.Size:
    """Return the shape of the first of these tensors that is there, which must have `ndim` dimensions."""
    name = next((name for name in names if name in state), None)
    if name is None:
        raise ValueError(f"there is no tensor model.{names[0]}")
    if state[name].ndim != ndim:
        raise ValueError(f"model.{name} must have {ndim} dimensions, got the shape {tuple(state[name].shape)}")
    return state[name].shape


BLOCK = {
    "time_proj": "mlp.1", "skip": "res_conv",
    "block1.conv": "block1.proj", "block1.norm": "block1.norm",
    "block2.conv": "block2.proj", "block2.norm": "block2.norm",
}  # fmt: skip
STAGE_PARTS = {"block1": "0", "block2": "1", "attention": "2", "resize": "3"}
OUTER = {"conv_in": "init_conv", "time_embed.linear_1": "time_mlp.1", "time_embed.linear_2": "time_mlp.3",
         "out_stage.conv": "final_conv"}  # fmt: skip


def original_name(name: str, ndim: int, norm: str, full_attn: list, stages: int) -> str:
    """The name, in its state dict below "model.", of our parameter `name`."""
    module, kind = name.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    if name == "time_embed.frequencies":
        return "time_mlp.0.weights"
    stage, part, rest = 0, "", ""
    if match := re.fullmatch(r"(down|up)_stages\.(\d+)\.(block1|block2|attention|resize)(?:\.(.+))?", module):
        side, stage, part, rest = match.group(1), int(match.group(2)), match.group(3), match.group(4) or ""
        prefix = f"{side}s.{stage}.{STAGE_PARTS[part]}"
        full = full_attn[stage if side == "down" else stages - 1 - stage]
        if part == "resize":
            resizes = stage < stages - 1
            nested = resizes and (side == "up" or ndim == 2)  # Sequential(resampling, convolution)
            return f"{prefix}.1.{kind}" if nested else f"{prefix}.{kind}"
    elif match := re.fullmatch(r"mid_stage\.(block1|block2|attention)(?:\.(.+))?", module):
        part, rest, full = match.group(1), match.group(2) or "", True
        prefix = {"block1": "mid_block1", "block2": "mid_block2", "attention": "mid_attn"}[part]
    else:
        rest, part, prefix = module.removeprefix("out_stage.block."), "block1", "final_res_block"
    if part != "attention":
        gain = "g" if norm == "rms" and rest.endswith("norm") else kind
        return f"{prefix}.{BLOCK[rest]}.{gain}"
    inner, outer = (f"{prefix}.fn.fn", f"{prefix}.fn") if ndim == 1 else (prefix, prefix)
    if not rest:
        return f"{inner}.mem_kv"
    return {
        "norm": f"{outer}.norm.g",
        "to_qkv": f"{inner}.to_qkv.{kind}",
        "to_out": f"{inner}.to_out.{kind}" if full else f"{inner}.to_out.0.{kind}",
        "norm_out": f"{inner}.to_out.1.g",
    }[rest]


def _convert_weights(state, options: dict, ndim: int) -> dict[str, Tensor]:
    """Weights by our names. Every tensor is taken exactly once, or the first at fault are named."""
    with torch.device("meta"):
        empty = (UNet2D if ndim == 2 else UNet1D)(**{**options, "sample_size": None})
    stages = len(options["dim_mults"])
    converted, missing, misfit, taken = {}, [], [], set()
    for name, parameter in empty.state_dict().items():
        theirs = original_name(name, ndim, options["norm"], options["full_attn"], stages)
        value = state.get(theirs)
        if value is None:
            missing.append(f"model.{theirs}")
            continue
        taken.add(theirs)
        if not _fits(value.shape, parameter.shape):
            misfit.append(f"model.{theirs} of shape {tuple(value.shape)}")
            continue
        # 1x1 convolutions are linear layers here, space-to-depth and 1x1 a 2x2 convolution, and gains are vectors:
        # the numbers are the same in the same order.
        converted[name] = value.detach().reshape(parameter.shape).clone()
    extra = [f"model.{name}" for name in state if name not in taken]
    for what, names in (("missing", missing), ("unknown", extra), ("of another shape than the rest asks for", misfit)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"not a whole checkpoint of this model: {what}: {', '.join(names[:3])}{more}")
    return converted


def _fits(theirs: torch.Size, ours: torch.Size) -> bool:
    """Compare a shape of theirs with ours: dimensions of size 1 do not count, nor how a 2x2 convolution is written."""
    significant = [[size for size in shape if size != 1] for shape in (theirs, ours)]
    space_to_depth = len(theirs) == 4 and ours == (theirs[0], theirs[1] // 4, 2, 2) and theirs[2:] == (1, 1)
    return significant[0] == significant[1] or space_to_depth


# ---------------------------------------------------------------------------------------------
# The diffusion


def _peer_sigmoid(steps: int) -> Tensor:
    """Its sigmoid schedule at the defaults, whose two end values are rounded to float32."""
    ends = torch.tensor([-3.0, 3.0]).sigmoid().double()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = (ends[1] - (6 * t - 3).sigmoid()) / (ends[1] - ends[0])
    abar = abar / abar[0]
    return (1 - abar[1:] / abar[:-1]).clamp(0, 0.999)


def _schedule(betas: Tensor) -> tuple[str | None, Tensor]:
    """Return the named schedule that the betas are of, or None, and the betas in float64.

    A named schedule gives its exact betas, so that a checkpoint in half precision loses nothing of it.

    Raises:
        ValueError: the betas are not in (0, 1), or of half precision and of no named schedule.
    """
    candidates = {"cosine": cosine_betas, "sigmoid": _peer_sigmoid}
    if len(betas) > 20:
        candidates["linear"] = linear_betas
    precision = torch.finfo(betas.dtype)
    # rounding is relative, and absolute below the smallest normal number; in float32, 1 - ratio loses up to 1e-7 of 1
    # to another order of operations
    tolerance = {"rtol": max(1e-6, precision.eps), "atol": max(1e-9, precision.smallest_normal * precision.eps)}
    for name, schedule in candidates.items():
        exact = schedule(len(betas))
        if torch.allclose(exact, betas.double(), **tolerance):
            return name, betas.double() if precision.bits >= 32 else exact
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            "its betas must lie strictly between 0 and 1 (a linear schedule of fewer than 20 steps does not)"
        )
    if precision.bits < 32:
        raise ValueError(
            f"its betas are rounded to {betas.dtype} and are of none of the named schedules (linear, cosine, sigmoid "
            "at their defaults), so the exact ones are lost: convert the checkpoint as it was before it was halved, or "
            "put its float32 betas back"
        )
    return None, betas.double()


def _objective(betas: Tensor, loss_weight: Tensor) -> tuple[str, float | None]:
    """The target, and min-SNR's gamma, whose weights `loss_weight` are."""
    if not (torch.isfinite(betas).all() and (loss_weight >= 0).all() and (loss_weight > 0).any()):
        raise ValueError(
            "its loss_weight must be one number for each timestep, none negative or NaN, not all of them 0"
        )
    # not from its float32 alphas_cumprod, which near 1 leave few digits to 1 - abar
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    precision = torch.finfo(loss_weight.dtype)
    # float32 betas: a last beta of 0.999 keeps 6e-5 of 1 - beta
    rtol = max(1e-3, 2 * precision.eps)
    weight = loss_weight.double().clamp(max=precision.max)
    for target, per_snr in (("epsilon", 1 / snr), ("sample", torch.ones_like(snr)), ("v_prediction", 1 / (snr + 1))):
        gamma = (weight / per_snr).max()
        expected = (snr.clamp(max=gamma) * per_snr).clamp(max=precision.max)
        if torch.allclose(expected, weight, rtol=rtol, atol=precision.smallest_normal * precision.eps):
            unclipped = gamma >= (1 - rtol) * min(snr.max().item(), precision.max)
            return target, None if unclipped else gamma.item()
    raise ValueError("its loss_weight is of no known objective (pred_noise, pred_x0, pred_v, with or without min-SNR)")
