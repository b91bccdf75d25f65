"""Conversion of denoising-diffusion-pytorch's checkpoints into pipelines.

Its `model-*.pt` files hold weights and buffers but no configuration. The configuration is inferred from the names,
shapes and values of the tensors, for both forms of its U-Net (that of 2023 with group norm, today's with RMS norm and
memory key-values), in 2D and in 1D.
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
DEFAULT_SIZE = 128  # image_size and seq_length in the README of the library, whose constructors have no default
CONVERTED = "Unet or Unet1D in GaussianDiffusion, GaussianDiffusion1D or LearnedGaussianDiffusion"
HOW = {True: "given", False: "not in the file: the library's default"}


@dataclass
class Findings:
    """The content of a checkpoint: options of the three parts, weights by our names, a line for each inference."""

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
    """Convert a checkpoint into a pipeline of our U-Net and `GaussianScheduler` that samples as the original.

    Args:
        source: a `model-*.pt` file, its contents, or the state dict of a `GaussianDiffusion` or `GaussianDiffusion1D`,
            with its tensors on any device.
        **overrides: the options that the file cannot tell; see `read_checkpoint`.

    Returns:
        The pipeline, on the CPU, its weights copied.

    Raises:
        ValueError: if the file cannot be read safely, or holds another model; the message names the first tensors at
            fault.
    """
    return build(read_checkpoint(source, **overrides))


def build(findings: Findings) -> DDPMPipeline | DDPMPipeline1D:
    """Build the pipeline that `read_checkpoint` has found."""
    unet_class, pipeline_class = {1: (UNet1D, DDPMPipeline1D), 2: (UNet2D, DDPMPipeline)}[findings.ndim]
    unet = unet_class(**findings.unet)
    unet.load_state_dict(findings.weights)
    return pipeline_class(unet.eval(), GaussianScheduler(**findings.scheduler), **findings.pipeline)


# This function is longer than 60 lines because it documents every option that a checkpoint cannot tell.
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
    """Read a checkpoint and infer its configuration. The keyword arguments are options that shapes cannot tell.

    Args:
        source: as for `from_denoising_diffusion_pytorch`.
        weights: the weights to take from a checkpoint file, "ema" or "model".
        image_size, seq_length: the size of a sample by default; None means 128.
        attn_heads: the number of heads, one for all (in 1D for the attention in the middle) or one per stage. Memory
            key-values tell it; without them it defaults to 4.
        norm_groups: the number of groups of the group norm in the form of 2023.
        theta: the longest period of the sinusoidal time embedding.
        self_condition, learned_variance: needed only for a model that has both.
        sampling_timesteps: the default number of sampling steps (DDIM if it is below T); None means all T.
        ddim_sampling_eta: the share of noise in DDIM's steps.
        auto_normalize: True if the data was given in [0, 1]; in 1D the samples then come in [0, 1] too.

    Raises:
        ValueError: for the reasons that `from_denoising_diffusion_pytorch` names.
    """
    state, trained = _state_of(source, weights)
    unet_state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    buffers = {name: value for name, value in state.items() if not name.startswith("model.")}
    _check_names(unet_state, buffers)
    ndim = unet_state["init_conv.weight"].ndim - 2
    if ndim not in (1, 2):
        raise ValueError(f"model.init_conv.weight must be of a 1D or 2D convolution, got {ndim} dimensions")
    size = image_size if ndim == 2 else seq_length
    options = _unet_options(unet_state, ndim, attn_heads, self_condition, learned_variance, trained)
    options.update(norm_groups=norm_groups, theta=theta, sample_size=DEFAULT_SIZE if size is None else size)
    our_weights = _convert_weights(unet_state, options, ndim)

    betas, loss_weight = _per_timestep(buffers)
    if sampling_timesteps is not None and not 1 <= sampling_timesteps <= len(betas):
        raise ValueError(f"sampling_timesteps must be from 1 to {len(betas)}, got {sampling_timesteps}")
    if (seq_length if ndim == 2 else image_size) is not None:
        raise ValueError(f"the checkpoint is of {'images' if ndim == 2 else 'sequences'}: give "
                         f"{'image_size, not seq_length' if ndim == 2 else 'seq_length, not image_size'}")  # fmt: skip
    without_effect = {
        "attn_heads": attn_heads is not None
        and options["num_mem_kv"] > 0
        and "memory key-values, which tell the heads",
        "norm_groups": norm_groups != 8 and options["norm"] != "group" and "a norm without groups",
        "theta": theta != 10000 and options["time_embedding"] != "sinusoidal" and "a Fourier time embedding",
        "auto_normalize": not auto_normalize and ndim == 2 and "images, which always come in [0, 1]",
    }
    for name, has in without_effect.items():
        if has:
            raise ValueError(f"{name} has no effect on this checkpoint, which has {has}: leave it out")
    broken = [name for name, value in unet_state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"the weights must be finite; NaN or infinity in: {', '.join(broken[:3])}")

    scheduler, objective_lines = _scheduler_options(betas, loss_weight, options, ndim, ddim_sampling_eta)
    pipeline: dict[str, Any] = {"num_inference_steps": sampling_timesteps}
    if ndim == 1 and auto_normalize:
        pipeline.update(data_shift=[0.5] * options["in_channels"], data_scale=[0.5] * options["in_channels"])
    lines = [
        *_unet_lines(options, ndim, heads_given=attn_heads is not None, size_given=bool(size)),
        *objective_lines,
        f"sampling_timesteps: {sampling_timesteps or len(betas)} ({HOW[sampling_timesteps is not None]})",
        f"ddim_sampling_eta: {ddim_sampling_eta} ({HOW[ddim_sampling_eta != 0]})",
        f"auto_normalize: {auto_normalize} ({HOW[not auto_normalize]})",
    ]
    return Findings(ndim, options, scheduler, pipeline, our_weights, lines)


def _unet_lines(options: dict, ndim: int, heads_given: bool, size_given: bool) -> list[str]:
    """Return a line for each option of the U-Net, with where its value comes from."""
    lines = [f"form: {'Unet' if ndim == 2 else 'Unet1D'}, {options['norm']} norm, num_mem_kv {options['num_mem_kv']}"]
    said_otherwise = ("norm", "num_mem_kv", "norm_groups", "theta", "sample_size", "attn_heads")
    lines += [f"{name}: {value}" for name, value in options.items() if name not in said_otherwise]
    heads_source = "memory key-values" if options["num_mem_kv"] > 0 else HOW[heads_given]
    lines.append(f"attn_heads: {options['attn_heads']} ({heads_source})")
    if options["norm"] == "group":
        lines.append(f"norm_groups: {options['norm_groups']} ({HOW[options['norm_groups'] != 8]})")
    size_source = HOW[True] if size_given else "not in the file: the one in the library's README; give yours"
    return [*lines, f"sample_size: {options['sample_size']} ({size_source})"]


# ---------------------------------------------------------------------------------------------
# Reading


def _state_of(source, weights: str) -> tuple[dict[str, Tensor], set[str] | None]:
    """Return the diffusion's state dict ("model.init_conv.weight", "betas", ...), and the names that were trained."""
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
            raise ValueError(
                "the checkpoint has no EMA weights (no tensor ema_model.*): use weights='model', from the command line "
                "`training/convert.py --weights model`"
            )
        state = _tensors(ema, "ema")
    return state, trained


def _check_names(unet_state: dict, buffers: dict) -> None:
    """Check that the tensors from which the configuration is inferred exist.

    Raises:
        ValueError: if one is missing; the message names the first.
    """
    for name in ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight", "downs.0.0.block1.proj.weight"):
        if name not in unet_state:
            if name in buffers:  # without "model." before the names
                raise ValueError(
                    "the file holds a U-Net without the schedule and the objective of its training: save the state "
                    "dict of its GaussianDiffusion or GaussianDiffusion1D"
                )
            raise ValueError(
                f"not a checkpoint of denoising-diffusion-pytorch's {CONVERTED}: there is no tensor model.{name}"
            )
    for name in ("betas", "alphas_cumprod", "loss_weight"):
        if name not in buffers:
            raise ValueError(f"not a checkpoint of GaussianDiffusion or GaussianDiffusion1D: there is no tensor {name}")
    if any(name.startswith("classes_mlp.") for name in unet_state):
        raise ValueError(
            "a model of classifier_free_guidance.py cannot be converted, because its U-Net takes the class in another "
            f"way than ours: it must be a {CONVERTED}"
        )


def _per_timestep(buffers: dict) -> tuple[Tensor, Tensor]:
    """Return betas and loss_weight, `(T,)` each.

    Raises:
        ValueError: if they do not have one number for each timestep.
    """
    betas, loss_weight = buffers["betas"], buffers["loss_weight"]
    if betas.ndim != 1 or len(betas) == 0 or loss_weight.shape != betas.shape:
        raise ValueError(
            "betas and loss_weight must have one number for each timestep, got the shapes "
            f"{tuple(betas.shape)} and {tuple(loss_weight.shape)}"
        )
    return betas, loss_weight


def _load(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file without running code from it."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises many kinds of errors
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
            raise ValueError(
                "the checkpoint's tensors must be dense and of floating point, as all of denoising-diffusion-pytorch's "
                f"are; {name} is {kind}"
            )
    # "module." comes from a distributed run; schedules are compared on the CPU, and tensors may come from any device
    return {name.removeprefix("module."): value.detach().cpu() for name, value in state.items()}


def _trained_names(opt, state) -> set[str] | None:
    """Return the U-Net's parameters that the optimizer has a state for, or None if the file does not tell."""
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
    """Infer the options of `UNet2D` or `UNet1D` from names and shapes."""
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
    if channels_out != channels * (2 if learned_variance else 1):
        raise ValueError(
            f"the model must predict as many channels as it is given ({channels}), or twice as many for a learned "
            f"variance, got {channels_out}: it must be a {CONVERTED}"
        )

    if isinstance(attn_heads, (list, tuple)) and len(attn_heads) != stages:
        raise ValueError(f"attn_heads must be one number or one per stage ({stages}), got {attn_heads}")
    places = [f"downs.{i}.2" for i in range(stages)] + ["mid_attn"]
    attentions = [_attention(state, ndim, number, place, attn_heads) for number, place in enumerate(places)]
    *outer, middle = attentions
    memories = {attention.memories for attention in attentions if attention.memories is not None}
    if not middle.full or len(memories) > 1:
        raise ValueError("the attention in the middle must be full, and all must have as many memory key-values")

    kind, fourier_dim = "sinusoidal", 16
    if "time_mlp.0.weights" in state:
        fourier_dim = 2 * _shape(state, 1, "time_mlp.0.weights")[0]
        untrained = trained is not None and "time_mlp.0.weights" not in trained
        kind = "random_fourier" if untrained else "learned_fourier"
    init_dim = state["init_conv.weight"].shape[0]
    return {
        "in_channels": channels,
        "out_channels": None,
        "dim": dim,
        "init_dim": None if init_dim == dim else init_dim,
        "dim_mults": [width // dim for width in outputs],
        "self_condition": bool(self_condition),
        "learned_variance": bool(learned_variance),
        "norm": "rms" if "downs.0.0.block1.norm.g" in state else "group",
        "attn_heads": [attention.heads for attention in outer],
        "attn_dim_head": [attention.dim_head for attention in outer],
        "mid_attn_heads": middle.heads,
        "mid_attn_dim_head": middle.dim_head,
        "full_attn": [attention.full for attention in outer],
        "num_mem_kv": max(memories, default=0),
        "time_embedding": kind,
        "fourier_dim": fourier_dim,
    }


@dataclass
class _Attention:
    """The form of one attention; `memories` is its number of memory key-values, None where it has no such tensor."""

    full: bool
    heads: int
    dim_head: int
    memories: int | None


def _attention(state, ndim: int, number: int, place: str, attn_heads) -> _Attention:
    """Infer the form of the `number`-th attention, at `place`; `attn_heads` is used where no tensor tells the heads."""
    inner = place if f"{place}.to_qkv.weight" in state else f"{place}.fn.fn"  # in 1D: Residual(PreNorm(...))
    hidden = _shape(state, ndim + 2, f"{inner}.to_qkv.weight")[0] // 3
    full, memory, memories = f"{inner}.to_out.weight" in state, state.get(f"{inner}.mem_kv"), None
    if memory is not None:
        if memory.ndim != 4:
            raise ValueError(f"model.{inner}.mem_kv must have 4 dimensions, got the shape {tuple(memory.shape)}")
        heads, memories = memory.shape[1], memory.shape[2 if full else 3]
    elif isinstance(attn_heads, (list, tuple)):
        heads = attn_heads[min(number, len(attn_heads) - 1)]
    elif attn_heads is None or (ndim == 1 and place != "mid_attn"):
        heads = 4  # its Unet1D gives the option to the attention in the middle alone
    else:
        heads = attn_heads
    if heads < 1 or hidden % heads:
        raise ValueError(f"attn_heads must divide {hidden}, the width of model.{place}; got {heads}")
    return _Attention(full, heads, hidden // heads, memories)


def _shape(state, ndim: int, *names: str) -> torch.Size:
    """Return the shape of the first of these tensors that is there, which must have `ndim` dimensions."""
    name = next((name for name in names if name in state), None)
    if name is None:
        raise ValueError(f"there is no tensor model.{names[0]}")
    if state[name].ndim != ndim:
        raise ValueError(f"model.{name} must have {ndim} dimensions, got the shape {tuple(state[name].shape)}")
    return state[name].shape


# Our names -> theirs, as substitutions that are made one after another. `original_name` replaces the words in capitals,
# which depend on the options of the model.
PATTERNS = (
    (r"^conv_in\b", "init_conv"),
    (r"^time_embed\.frequencies", "time_mlp.0.weights"),
    (r"^time_embed\.linear_1", "time_mlp.1"),
    (r"^time_embed\.linear_2", "time_mlp.3"),
    (r"^out_stage\.block", "final_res_block"),
    (r"^out_stage\.conv", "final_conv"),
    # the parts of a stage are numbered, except in the middle
    (r"^mid_stage\.attention", "mid_attn"),
    (r"^mid_stage\.", "mid_"),
    (r"^(down|up)_stages\.(\d+)\.block1", r"\1s.\2.0"),
    (r"^(down|up)_stages\.(\d+)\.block2", r"\1s.\2.1"),
    (r"^(down|up)_stages\.(\d+)\.attention", r"\1s.\2.2"),
    (r"^(down|up)_stages\.(\d+)\.resize(\.conv)?", r"\1s.\2.3"),
    # where resampling is a layer of its own, the convolution is the second one
    (r"^(NESTED)\.3", r"\1.3.1"),
    # residual blocks
    (r"\.time_proj\.", ".mlp.1."),
    (r"\.skip\.", ".res_conv."),
    (r"\.(block\d)\.conv\.", r".\1.proj."),
    (r"\.(block\d)\.norm\.weight", r".\1.norm.GAIN"),
    # attentions; in 1D each is Residual(PreNorm(attention))
    (r"\.norm_out\.weight", ".to_out.1.g"),
    (r"^(LINEAR)\.to_out\.(weight|bias)", r"\1.to_out.0.\2"),
    (r"^(\w+\.\d+\.2|mid_attn)\.norm\.weight", r"\1.OUTERnorm.g"),
    (r"^(\w+\.\d+\.2|mid_attn)\.(mem_kv|to_)", r"\1.INNER\2"),
)


def original_name(name: str, ndim: int, norm: str, full_attn: list, stages: int) -> str:
    """Return the original's name, below "model." in its state dict, of our parameter `name`.

    Args:
        name: a key of the state dict of `UNet2D` or `UNet1D`.
        ndim: 2 for `UNet2D`, 1 for `UNet1D`.
        norm: "rms" or "group".
        full_attn: for each stage, True if its attention is full.
        stages: the number of stages.
    """
    last = stages - 1
    linear = [i for i in range(stages) if not full_attn[i]]
    resized = [rf"ups\.{i}" for i in range(last)] + [rf"downs\.{i}" for i in range(last) if ndim == 2]
    words = {
        "NESTED": "|".join(resized) or "none",
        "LINEAR": "|".join(rf"downs\.{i}\.2|ups\.{last - i}\.2" for i in linear) or "none",
        "GAIN": "g" if norm == "rms" else "weight",
        "OUTER": "fn." if ndim == 1 else "",
        "INNER": "fn.fn." if ndim == 1 else "",
    }
    for pattern, replacement in PATTERNS:
        for word, value in words.items():
            pattern, replacement = pattern.replace(word, value), replacement.replace(word, value)
        name = re.sub(pattern, replacement, name)
    return name


def _convert_weights(state, options: dict, ndim: int) -> dict[str, Tensor]:
    """Return the weights by our names.

    Raises:
        ValueError: if a tensor is missing, left over, or misshapen; the message names the first ones.
    """
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
        converted[name] = value.reshape(parameter.shape).clone()
    extra = [f"model.{name}" for name in state if name not in taken]
    for what, names in (("missing", missing), ("unknown", extra), ("of another shape than the rest asks for", misfit)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"not a whole checkpoint of this model: {what}: {', '.join(names[:3])}{more}")
    return converted


def _fits(theirs: torch.Size, ours: torch.Size) -> bool:
    """Return True if a shape of theirs is ours, but for dimensions of size 1 and the form of a 2x2 convolution."""
    significant = [[size for size in shape if size != 1] for shape in (theirs, ours)]
    space_to_depth = len(theirs) == 4 and ours == (theirs[0], theirs[1] // 4, 2, 2) and theirs[2:] == (1, 1)
    return significant[0] == significant[1] or space_to_depth


# ---------------------------------------------------------------------------------------------
# The diffusion


def _scheduler_options(betas, loss_weight, unet_options: dict, ndim: int, eta: float) -> tuple[dict, list[str]]:
    """Infer the options of `GaussianScheduler`, with a line for each inference."""
    schedule, betas = _schedule(betas)
    target, gamma = _objective(betas, loss_weight)
    options = {
        "num_train_timesteps": len(betas),
        "prediction_type": target,
        "eta": eta,
        "variance_type": "learned_range" if unet_options["learned_variance"] else "fixed_small",
        # the original's 1D DDIM keeps the predicted noise where x0 was clipped
        "use_clipped_model_output": not (ndim == 1 and target == "epsilon"),
        **({"trained_betas": betas.tolist()} if schedule is None else {"beta_schedule": schedule}),
    }
    lines = [
        f"timesteps: {len(betas)}, schedule: {schedule or 'none of the named ones: the betas are kept'}",
        f"objective: {target}, min-SNR: {'off' if gamma is None else f'gamma {gamma:.6g}'}",
    ]
    return options, lines


def _peer_sigmoid(steps: int) -> Tensor:
    """Return the float64 betas of the original's default sigmoid schedule, whose end values are rounded to float32."""
    ends = torch.tensor([-3.0, 3.0]).sigmoid().double()
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    abar = (ends[1] - (6 * t - 3).sigmoid()) / (ends[1] - ends[0])
    abar = abar / abar[0]
    return (1 - abar[1:] / abar[:-1]).clamp(0, 0.999)


def _schedule(betas: Tensor) -> tuple[str | None, Tensor]:
    """Return the name of the schedule that has these betas, or None, and the betas in float64.

    For a named schedule the exact betas are returned, so that a checkpoint in half precision loses nothing of it.

    Raises:
        ValueError: if the betas are not in (0, 1), or are in half precision and belong to no named schedule.
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
            "the checkpoint's betas must lie strictly between 0 and 1 (a linear schedule of fewer than 20 steps does "
            "not)"
        )
    if precision.bits < 32:
        raise ValueError(
            f"the checkpoint's betas are rounded to {betas.dtype} and fit none of the named schedules (linear, cosine, "
            "sigmoid at their defaults), so the exact ones are lost: convert the checkpoint from before it was "
            "halved, or put its float32 betas back"
        )
    return None, betas.double()


def _objective(betas: Tensor, loss_weight: Tensor) -> tuple[str, float | None]:
    """Return the prediction type, and min-SNR's gamma (None for no clipping), that give these loss weights.

    Raises:
        ValueError: if no known objective gives them.
    """
    if not (torch.isfinite(betas).all() and (loss_weight >= 0).all() and (loss_weight > 0).any()):
        raise ValueError(
            "the checkpoint's loss_weight must be one number for each timestep, none negative or NaN, not all of them 0"
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
    raise ValueError(
        "the checkpoint's loss_weight fits no known objective (pred_noise, pred_x0, pred_v, with or without min-SNR)"
    )
