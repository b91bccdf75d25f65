"""The denoising U-Net of images and of sequences: one dimension-generic body, two faces.

Architecture: the U-Net of Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239),
in the form of denoising-diffusion-pytorch: residual blocks with a time-dependent scale and shift,
linear attention (Shen et al., arXiv:1812.01243) where full attention is off, RMS norms, memory
key-values (Sukhbaatar et al., arXiv:1907.01470) and two skips a stage.

Dimensions differ only in the builders and in the constructors' defaults; `forward` is the same: inside, a sequence is
an image of height 1, (B, C, 1, length), because convolutions are faster there with the channels last in memory.
This file imports nothing of ddpm_hf: it ships inside saved pipelines.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

NORMS = ("rms", "group")
TIME_EMBEDDINGS = ("sinusoidal", "learned_fourier", "random_fourier")


@dataclass
class UNetOutput(BaseOutput):
    """`sample`: the model's prediction, `(B, out_channels, *spatial)`."""

    sample: Tensor


# ---------------------------------------------------------------------------------------------
# Building blocks. `x` is (B, C, H, W) everywhere, H = 1 for sequences, channels last in memory; `temb` is
# (B or 1, 4 * dim), SiLU already applied.


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple, padding: tuple) -> Tensor:
    """`F.conv2d`, in the form that is faster for the size."""
    positions, channels = x.shape[0] * x.shape[2:].numel(), x.shape[1]
    narrow = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if narrow and positions <= channels and max(stride) == 1 < max(weight.shape[2:]):
        return _convolve_as_product(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class Conv(nn.Conv2d):
    """A `Conv2d`, also fast for few positions."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, self.stride, self.padding)


class RowConv(nn.Conv1d):
    """A `Conv1d` of images of height 1."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight.unsqueeze(2), self.bias, (1, *self.stride), (0, *self.padding))


CONVS = {1: RowConv, 2: Conv}


class RMSNorm(nn.Module):
    """x / rms(x over channels) * weight, at every position; with scale and shift (B or 1, C) and SiLU if asked for."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False):
        # under autocast x is narrower than the weight
        gain = self.weight.to(x.dtype)[:, None, None].unsqueeze(0)
        if scale is not None:
            gain, shift = gain * (scale + 1)[..., None, None], shift[..., None, None]
        if x.device.type == "cpu" and x.dtype != torch.float16:  # whose range is too small for 1 / rms
            return _NormalizeCPU.apply(x, gain, shift, silu)
        # x / max(|x|, 1e-12) in the form x / sqrt(mean(x^2) + eps)
        out = F.rms_norm(x.movedim(1, -1), self.weight.shape, None, 1e-24 / x.shape[1]).movedim(-1, 1)
        out = out * gain if shift is None else torch.addcmul(shift, out, gain)
        return F.silu(out) if silu else out


class ConvBlock(nn.Module):
    """3-wide convolution, norm, optional scale and shift, SiLU, dropout."""

    def __init__(self, ndim: int, channels_in: int, channels: int, norm: str, norm_groups: int, dropout: float = 0.0):
        super().__init__()
        self.conv = CONVS[ndim](channels_in, channels, 3, padding=1)
        self.norm = RMSNorm(channels) if norm == "rms" else nn.GroupNorm(norm_groups, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, RMSNorm):
            return self.dropout(self.norm(x, scale, shift, silu=True))
        x = self.norm(x)
        if scale is not None:
            x = torch.addcmul(shift[..., None, None], x, (scale + 1)[..., None, None])
        return self.dropout(F.silu(x))


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s around a skip; the first is scaled and shifted by the time embedding."""

    def __init__(
        self, ndim: int, channels_in: int, channels: int, time_dim: int, norm: str, norm_groups: int, dropout: float
    ):
        super().__init__()
        self.time_proj = nn.Linear(time_dim, 2 * channels)
        self.block1 = ConvBlock(ndim, channels_in, channels, norm, norm_groups, dropout)
        self.block2 = ConvBlock(ndim, channels, channels, norm, norm_groups)
        self.skip = nn.Identity() if channels_in == channels else CONVS[ndim](channels_in, channels, 1)

    def forward(self, x: Tensor, temb: Tensor, joined: Tensor | None = None) -> Tensor:
        """`joined`: a skip that follows x's channels; here, so that checkpointing keeps no copy of what it has."""
        if joined is not None:
            x = torch.cat((x, joined), dim=1)
        scale, shift = self.time_proj(temb).chunk(2, dim=1)
        # in place: nothing keeps what the activation gave
        return self.block2(self.block1(x, scale, shift)).add_(self.skip(x))


class _AttentionBase(nn.Module):
    """The parts of both attentions: pre-norm, one projection to q, k and v, memory key-values."""

    linear: type = nn.Linear

    def __init__(self, channels: int, heads: int, dim_head: int, memory_shape: tuple):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.to_qkv = self.linear(channels, 3 * heads * dim_head, bias=False)
        self.to_out = self.linear(heads * dim_head, channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, *memory_shape)) if 0 not in memory_shape else None

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> normalized (B, N, C), N positions."""
        return self.norm(x).flatten(2).transpose(1, 2)


class FullAttention(_AttentionBase):
    """Softmax attention over all positions and `num_mem_kv` learned key-values; adds its input."""

    def __init__(self, channels: int, heads: int, dim_head: int, num_mem_kv: int):
        super().__init__(channels, heads, dim_head, (num_mem_kv, dim_head))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self._tokens(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, dim_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.mem_kv is not None:
            mem_k, mem_v = self.mem_kv.to(k.dtype).unsqueeze(1).expand(-1, len(x), -1, -1, -1)
            k, v = torch.cat((mem_k, k), dim=2), torch.cat((mem_v, v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, dim_head)
        out = self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, C)
        return out.transpose(1, 2).unflatten(2, x.shape[2:]).add_(x)


class _Weights(nn.Linear):
    """A linear layer whose caller multiplies the weights; called, not read, so that hooks bring offloaded ones."""

    def forward(self) -> tuple:
        return self.weight, self.bias


class LinearAttention(_AttentionBase):
    """softmax(q over features) · (softmax(k over positions)ᵀ v), linear in positions; adds its input.

    With more positions than channels, the projections to v and of the output are multiplied into the small matrix
    between them: neither v nor the heads' outputs are made, and nothing big is copied to another layout. (A wrapper
    of `to_qkv` or `to_out`, such as an adapter, must be merged into the weight to have an effect.)
    """

    linear = _Weights

    def __init__(self, channels: int, heads: int, dim_head: int, num_mem_kv: int):
        super().__init__(channels, heads, dim_head, (dim_head, num_mem_kv))
        self.norm_out = RMSNorm(channels)
        self.scale = dim_head**-0.5

    def forward(self, x: Tensor) -> Tensor:
        n = self._tokens(x)
        positions, channels = n.shape[1:]
        by_head = (self.heads, -1)
        w_q, w_k, w_v = self.to_qkv()[0].chunk(3)  # (heads * dim_head, C) each
        # (B, heads * dim_head, N); matmul would give it another layout, and copies after it
        k = torch.bmm(w_k.expand(len(x), -1, -1), n.transpose(1, 2))
        highest = k.detach().amax(dim=-1, keepdim=True)
        if self.mem_kv is not None:
            # (2, heads, dim_head, number), as in the checkpoints of denoising-diffusion-pytorch
            mem_k, mem_v = self.mem_kv.to(k.dtype)
            highest = torch.maximum(highest, mem_k.detach().flatten(0, 1).amax(dim=-1, keepdim=True))
        # every factor is 1 / sqrt(N) of what it would be: sums over positions then lie within the range of float16
        # whether k is flat or peaked
        highest = highest + 0.5 * math.log(positions)
        k = (k - highest).exp_()
        total = k.sum(dim=-1, keepdim=True, dtype=torch.promote_types(k.dtype, torch.float32))
        if positions > channels:
            context = torch.bmm(k, n).unflatten(1, by_head)  # (B, heads, dim_head, C)
            context = context @ w_v.unflatten(0, by_head).transpose(1, 2)
        else:
            v = F.linear(n, w_v).unflatten(2, by_head).transpose(1, 2)  # (B, heads, N, dim_head)
            context = k.unflatten(1, by_head) @ v
        if self.mem_kv is not None:
            memory = (mem_k - highest.unflatten(1, by_head)).exp()  # (B, heads, dim_head, number)
            context = context + memory @ mem_v.transpose(1, 2)
            total = total + memory.sum(dim=-1, dtype=total.dtype).flatten(1).unsqueeze(2)
        context = context * (self.scale / total).unflatten(1, by_head)  # (B, heads, dim_head, dim_head)
        # after k, so that backward is done with it before k's gradients take their memory
        q = F.linear(n, w_q).unflatten(2, by_head).softmax(dim=-1)  # (B, N, heads, dim_head)
        context, q = context.to(n.dtype), q.to(n.dtype)
        w_out, bias = self.to_out()
        if positions > channels:
            context = (context @ w_out.t().unflatten(0, by_head)).flatten(1, 2)
            out = torch.baddbmm(bias.to(n.dtype), q.flatten(2), context.to(n.dtype))
        else:
            out = F.linear((q.transpose(1, 2) @ context).transpose(1, 2).flatten(2), w_out, bias)
        return self.norm_out(out.transpose(1, 2).unflatten(2, x.shape[2:])).add_(x)


class TimeEmbedding(nn.Module):
    """Timesteps -> (B, 4 * dim): sinusoidal (Vaswani et al.) or Fourier features, then two linear layers."""

    def __init__(self, dim: int, kind: str, fourier_dim: int, theta: float):
        super().__init__()
        self.kind, self.dim, self.theta = kind, dim, theta
        features = dim
        if kind != "sinusoidal":
            features = fourier_dim + 1
            # A parameter also when it is not trained: it is then saved, converted and averaged like the rest.
            self.frequencies = nn.Parameter(torch.randn(fourier_dim // 2), requires_grad=kind == "learned_fourier")
        self.linear_1 = nn.Linear(features, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, timestep: Tensor) -> Tensor:
        # Phases reach 1000 radians: half precision would leave no digit of them.
        weight_dtype = self.linear_1.weight.dtype
        dtype = torch.promote_types(weight_dtype, torch.float32)
        t = timestep.to(dtype)[:, None]
        if self.kind == "sinusoidal":
            half = self.dim // 2
            index = torch.arange(half, device=t.device, dtype=dtype)
            phases = t * torch.exp(index * (-math.log(self.theta) / (half - 1)))
            features = torch.cat((phases.sin(), phases.cos()), dim=-1)
        else:
            phases = t * self.frequencies.to(dtype) * (2 * math.pi)
            features = torch.cat((t, phases.sin(), phases.cos()), dim=-1)
        return self.linear_2(F.gelu(self.linear_1(features.to(weight_dtype))))


def _downsample(ndim: int, channels_in: int, channels: int) -> nn.Module:
    # In 2D a 2x2 convolution of stride 2: space-to-depth followed by a 1x1 convolution, in one operation.
    if ndim == 2:
        return nn.Conv2d(channels_in, channels, 2, stride=2)
    return RowConv(channels_in, channels, 4, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3-wide convolution."""

    def __init__(self, ndim: int, channels_in: int, channels: int):
        super().__init__()
        self.factor = (1.0, 2.0) if ndim == 1 else (2.0, 2.0)
        self.conv = CONVS[ndim](channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


# ---------------------------------------------------------------------------------------------
# Fast forms. Each says which plain form it equals, when it is chosen, and what it gains.


def _convolve_as_product(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple) -> Tensor:
    """`F.conv2d` of stride 1 as one product of matrices.

    Chosen in bfloat16 on CPU where there are at most as many positions as channels, because PyTorch's convolution
    rearranges all weights at each call: a bf16 step of the default model at 8 x 3 x 32 x 32 is 10% faster, a call 5%
    (AVX-512 with bf16 instructions). Tested against `F.conv2d`, gradients too.
    """
    kernel = weight.shape[2:]
    rows = F.pad(x.movedim(1, -1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = (size - k + 1 for size, k in zip(rows.shape[1:3], kernel))
    patches = [rows[:, i : i + height, j : j + width] for i in range(kernel[0]) for j in range(kernel[1])]
    return F.linear(torch.cat(patches, dim=-1), weight.movedim(1, -1).flatten(1), bias).movedim(-1, 1)


class _NormalizeCPU(torch.autograd.Function):
    """SiLU(z) of z = x r gain + shift, 1 / r = rms(x) over the C channels; keeps x and r alone for the backward pass.

    The plain form is the rest of `RMSNorm.forward`, which on CPU is a chain of operations that each keep a tensor. This
    The plain form is the rest of `RMSNorm.forward`, which on CPU is a chain of operations that each keep a tensor. This
    one is chosen on CPU, except in float16: it keeps 51 to 68% less memory of the layer, and a step is 2 to 3% faster.
    It has no second derivatives. Tested by `gradcheck`.

    With g = dL/dz (dL/dSiLU(z) times SiLU's derivative) and n = x r:
        dL/dshift = Σ g,  dL/dgain = Σ g n,  dL/dx = r (g gain - n mean_C(g gain n)),
    because dn/dx = r (1 - n nᵀ / C) takes out the direction of x. The sums are over what was broadcast.

    x: (B, C, H, W); gain and shift: (B or 1, C, 1, 1), of x's type.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, shift: Tensor | None, silu: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).to(wide)
        inverse = norm.clamp_min_(1e-12).reciprocal_().mul_(math.sqrt(x.shape[1])).to(x.dtype)
        ctx.save_for_backward(x, inverse, gain, shift)
        ctx.silu = silu
        out = (x * inverse).mul_(gain)
        if shift is not None:
            out.add_(shift)
        return F.silu(out, inplace=True) if silu else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, inverse, gain, shift = ctx.saved_tensors
        normal = x * inverse
        if ctx.silu:
            before = normal * gain if shift is None else torch.addcmul(shift, normal, gain)
            grad = torch.ops.aten.silu_backward(grad, before)
            del before
        grad_shift = None if shift is None else grad.sum_to_size(shift.shape)
        product = grad * normal
        grad_gain = product.sum_to_size(gain.shape)
        along = (product * gain).mean(dim=1, keepdim=True)
        del product
        grad_x = (grad * gain).addcmul_(normal, along, value=-1).mul_(inverse)
        return grad_x, grad_gain, grad_shift, None


# ---------------------------------------------------------------------------------------------
# Stages: the units of gradient checkpointing (layer by layer) and of a device map.


class _Stage(nn.Module):
    gradient_checkpointing = False

    def _run(self, layer: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)


class DownStage(_Stage):
    def __init__(self, block, attention, channels_in: int, resize: nn.Module):
        super().__init__()
        self.block1, self.block2 = block(channels_in, channels_in), block(channels_in, channels_in)
        self.attention = attention(channels_in)
        self.resize = resize

    def forward(self, x: Tensor, temb: Tensor) -> tuple:
        """-> the resized features, and the two skips."""
        skip1 = self._run(self.block1, x, temb)
        skip2 = self._run(self.attention, self._run(self.block2, skip1, temb))
        return self.resize(skip2), skip1, skip2


class MidStage(_Stage):
    def __init__(self, block, attention, channels: int):
        super().__init__()
        self.block1, self.block2 = block(channels, channels), block(channels, channels)
        self.attention = attention(channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self._run(self.attention, self._run(self.block1, x, temb))
        return self._run(self.block2, x, temb)


class UpStage(_Stage):
    def __init__(self, block, attention, channels_skip: int, channels: int, resize: nn.Module):
        super().__init__()
        self.block1 = block(channels + channels_skip, channels)
        self.block2 = block(channels + channels_skip, channels)
        self.attention = attention(channels)
        self.resize = resize

    def forward(self, x: Tensor, skip1: Tensor, skip2: Tensor, temb: Tensor) -> Tensor:
        """skip1 and skip2 as the mirrored `DownStage` gave them: the later one is joined first."""
        x = self._run(self.block1, x, temb, skip2)
        x = self._run(self.block2, x, temb, skip1)
        return self.resize(self._run(self.attention, x))


class OutStage(_Stage):
    def __init__(self, block, ndim: int, channels: int, out_channels: int):
        super().__init__()
        self.block = block(2 * channels, channels)
        self.conv = CONVS[ndim](channels, out_channels, 1)

    def forward(self, x: Tensor, first: Tensor, temb: Tensor) -> Tensor:
        return self.conv(self._run(self.block, x, temb, first))


# ---------------------------------------------------------------------------------------------
# The body and its two faces.


def _per_stage(name: str, value, stages: int, kind: type) -> tuple:
    """One value for every stage, or one each."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} must be one value or one per stage ({stages}, as dim_mults has), got {value!r}")
    for item in values:
        if not isinstance(item, kind) or (kind is int and (isinstance(item, bool) or item < 1)):
            expected = "true or false" if kind is bool else "a whole number of at least 1"
            raise ValueError(f"{name} must hold {expected} for every stage, got {value!r}")
    return values


def check_size(size: Sequence[int], factor: int) -> None:
    """Raise ValueError where a spatial size is not a positive multiple of `factor`, naming the nearest that are."""
    for length in size:
        if length < 1 or length % factor:
            below, above = length // factor * factor, (length // factor + 1) * factor
            nearest = f"{below} and {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"every spatial size must be a positive multiple of {factor} (2 to the number of downsamplings); "
                f"got {tuple(size)}. The nearest sizes that work for {length} are: {nearest}"
            )


class UNetBody(ModelMixin, ConfigMixin):
    """The body that `UNet2D` and `UNet1D` share: construction from options, and `forward`."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TimeEmbedding", "DownStage", "MidStage", "UpStage", "OutStage"]
    _repeated_blocks = ["ResidualBlock", "LinearAttention", "FullAttention"]
    _keep_in_fp32_modules = ["time_embed"]

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compile each residual block and attention by `torch.compile`, which gets the arguments.

        Blocks of one class differ in width, and torch leaves uncompiled what comes after 8 versions of a class. So each
        is counted for itself, where torch offers that.
        """
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            kwargs.setdefault("isolate_recompiles", True)
        super().compile_repeated_blocks(*args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Read the options from a configuration. diffusers only warns of keys that it does not know.

        Keys of others are let through with that warning: `EMAModel` keeps its own there.

        Raises:
            ValueError: an unknown key is close to one of ours, so it is taken for misspelt.
        """
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in config_dict:
            if name not in known and not name.startswith("_") and (close := get_close_matches(name, known, 1, 0.75)):
                raise ValueError(
                    f"{cls.__name__} does not know: {name} (did you mean {close[0]}?), in the configuration"
                )
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, output_loading_info: bool = False, **kwargs):
        """Load a saved model, and refuse weights that do not fit, of which diffusers only warns.

        Raises:
            ValueError: tensors missing, left over or of another shape, or misspelt keys in the configuration; named.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = [
            f"{kind.replace('_keys', '')} {', '.join(map(str, sorted(info[kind])[:5]))}"
            + (f" and {len(info[kind]) - 5} more" if len(info[kind]) > 5 else "")
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)
        ]  # fmt: skip
        if wrong:
            raise ValueError(f"the weights of {pretrained_model_name_or_path} are not those of {cls.__name__}: "
                             f"{'; '.join(wrong)}")  # fmt: skip
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                # a file's tensors begin anywhere, and products of matrices round by where their operands begin: the
                # loaded model would not give the saved one's numbers to the last bit
                parameter.data = parameter.data.clone()
        return (model, info) if output_loading_info else model

    def _build(
        self, ndim, *, sample_size, in_channels, out_channels, dim, init_dim, dim_mults, self_condition,
        learned_variance, norm, norm_groups, dropout, attn_heads, attn_dim_head, mid_attn_heads, mid_attn_dim_head,
        full_attn, num_mem_kv, time_embedding, fourier_dim, theta,
    ):  # fmt: skip
        positive = {"in_channels": in_channels, "dim": dim, "norm_groups": norm_groups}
        optional = {"out_channels": out_channels, "init_dim": init_dim, "mid_attn_heads": mid_attn_heads,
                    "mid_attn_dim_head": mid_attn_dim_head}  # fmt: skip
        positive.update({name: value for name, value in optional.items() if value is not None})
        for name, value in positive.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(dim_mults, (list, tuple)) or not dim_mults:
            raise ValueError(f"dim_mults must be a list of at least one whole number, got {dim_mults!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if time_embedding not in TIME_EMBEDDINGS:
            raise ValueError(f"time_embedding must be one of {TIME_EMBEDDINGS}, got {time_embedding!r}")
        if time_embedding == "sinusoidal" and (dim % 2 or dim < 4):
            raise ValueError(f"dim must be even and at least 4 with a sinusoidal time embedding, got {dim}")
        for name, value in (
            ("theta", theta),
            ("dropout", dropout),
            ("fourier_dim", fourier_dim),
            ("num_mem_kv", num_mem_kv),
        ):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if fourier_dim < 2 or fourier_dim % 2:
            raise ValueError(f"fourier_dim must be even and at least 2, got {fourier_dim}")
        if not theta > 0:
            raise ValueError(f"theta must be greater than 0, got {theta}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if num_mem_kv < 0:
            raise ValueError(f"num_mem_kv must be at least 0, got {num_mem_kv}")

        stages = len(dim_mults)
        mults = _per_stage("dim_mults", dim_mults, stages, int)
        heads = _per_stage("attn_heads", attn_heads, stages, int)
        dim_heads = _per_stage("attn_dim_head", attn_dim_head, stages, int)
        if full_attn is None:
            full_attn = [ndim == 2 and stage == stages - 1 for stage in range(stages)]
        full = _per_stage("full_attn", full_attn, stages, bool)

        self.ndim = ndim
        self.downsample_factor = 2 ** (stages - 1)
        if sample_size is not None:
            size = sample_size if isinstance(sample_size, (list, tuple)) else (sample_size,) * ndim
            if len(size) != ndim or not all(isinstance(n, int) for n in size):
                raise ValueError(f"sample_size must be {'an int or (height, width)' if ndim == 2 else 'an int'}, "
                                 f"got {sample_size!r}")  # fmt: skip
            check_size(size, self.downsample_factor)

        widths = [init_dim or dim, *(dim * mult for mult in mults)]
        if norm == "group" and any(width % norm_groups for width in widths):
            raise ValueError(f"every stage's width must be a multiple of norm_groups={norm_groups}, got {widths}")
        time_dim = 4 * dim

        def block(channels_in, channels):
            return ResidualBlock(ndim, channels_in, channels, time_dim, norm, norm_groups, dropout)

        def attention(stage):
            kind = FullAttention if full[stage] else LinearAttention
            return lambda channels: kind(channels, heads[stage], dim_heads[stage], num_mem_kv)

        def mid_attention(channels):
            return FullAttention(channels, mid_attn_heads or heads[-1], mid_attn_dim_head or dim_heads[-1], num_mem_kv)

        conv = CONVS[ndim]
        last = stages - 1
        self.conv_in = conv(in_channels * (2 if self_condition else 1), widths[0], 7, padding=3)
        self.time_embed = TimeEmbedding(dim, time_embedding, fourier_dim, theta)
        self.down_stages, self.up_stages = nn.ModuleList(), nn.ModuleList()
        for stage, (inner, outer) in enumerate(zip(widths[:-1], widths[1:])):
            resize = _downsample(ndim, inner, outer) if stage < last else conv(inner, outer, 3, padding=1)
            self.down_stages.append(DownStage(block, attention(stage), inner, resize))
        self.mid_stage = MidStage(block, mid_attention, widths[-1])
        for stage in reversed(range(stages)):
            inner, outer = widths[stage], widths[stage + 1]
            resize = Upsample(ndim, outer, inner) if stage > 0 else conv(outer, inner, 3, padding=1)
            self.up_stages.append(UpStage(block, attention(stage), inner, outer, resize))
        out_channels = out_channels or in_channels * (2 if learned_variance else 1)
        self.out_stage = OutStage(block, ndim, widths[0], out_channels)

    def channels_last(self):
        """Put the convolutions' weights into the layout of the activations, for speed; numbers stay. Returns self."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):  # PyTorch's own conversion leaves these out
                module.weight.data = module.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        return self.to(memory_format=torch.channels_last)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int | float,
        x_self_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple:
        """Predict epsilon, x0 or v, as trained.

        Args:
            sample: x_t, `(B, in_channels, *spatial)`; each spatial size a multiple of `downsample_factor`.
            timestep: t, a number, a 0-d tensor or `(B,)`; integer or float, in [0, num_train_timesteps).
            x_self_cond: the previous estimate of x0, shaped as `sample` (zeros if None); self-conditioned models only.
            return_dict: a `UNetOutput` if true, else a tuple of one tensor.

        Raises:
            ValueError: a wrong number of dimensions or channels, a size that cannot be halved often enough,
                a timestep of another length, `x_self_cond` for a model without self-conditioning.
        """
        if sample.ndim != self.ndim + 2 or sample.shape[1] != self.config.in_channels:
            shape = f"(batch, {self.config.in_channels}, {'height, width' if self.ndim == 2 else 'length'})"
            raise ValueError(f"sample must have the shape {shape}, got {tuple(sample.shape)}")
        check_size(sample.shape[2:], self.downsample_factor)
        timestep = torch.as_tensor(timestep, device=sample.device)
        if timestep.ndim > 1 or timestep.numel() not in (1, len(sample)):
            raise ValueError(
                f"timestep must be a number or have the shape ({len(sample)},), got {tuple(timestep.shape)}"
            )
        timestep = timestep.reshape(-1)  # one for all: its embedding is made once
        if self.config.self_condition:
            x_self_cond = torch.zeros_like(sample) if x_self_cond is None else x_self_cond
            if x_self_cond.shape != sample.shape:
                raise ValueError(
                    f"x_self_cond must have sample's shape {tuple(sample.shape)}, got {tuple(x_self_cond.shape)}"
                )
            sample = torch.cat((x_self_cond, sample), dim=1)
        elif x_self_cond is not None:
            raise ValueError("x_self_cond was given to a model whose configuration has self_condition=False")

        if self.ndim == 1:
            sample = sample.unsqueeze(2)
        # every norm and attention works on the last axis in memory; convolutions keep the format
        sample = sample.contiguous(memory_format=torch.channels_last)
        x = first = self.conv_in(sample)
        temb = F.silu(self.time_embed(timestep)).to(x.dtype)  # in float32 when loaded in half precision
        skips = []
        for stage in self.down_stages:
            x, skip1, skip2 = stage(x, temb)
            skips.append((skip1, skip2))
        x = self.mid_stage(x, temb)
        for stage in self.up_stages:
            x = stage(x, *skips.pop(), temb)
        x = self.out_stage(x, first, temb)
        if self.ndim == 1:
            x = x.squeeze(2)
        return UNetOutput(sample=x) if return_dict else (x,)


def _options(config) -> dict:
    """The constructor's options, as registered (diffusers' private keys start with an underscore)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


_OPTIONS_DOC = """
    Args:
        sample_size: {size}; what pipelines sample by default. None: given at each call.
        in_channels: channels of x_t.
        out_channels: channels predicted; None: `in_channels`, twice that with `learned_variance`.
        dim: width that the multipliers multiply; the time embedding has 4 * dim.
        init_dim: width after the first convolution; None: dim.
        dim_mults: width of each stage over dim; its length is the number of stages (one fewer downsamplings).
        self_condition: take the previous x0 estimate as input too (Chen et al., arXiv:2208.04202).
        learned_variance: predict an interpolation between the variances too (Nichol & Dhariwal, arXiv:2102.09672).
        norm: "rms", or "group" with `norm_groups` groups, in the residual blocks.
        dropout: in the first half of each residual block, in [0, 1).
        attn_heads, attn_dim_head: of each attention, one value or one per stage.
        mid_attn_heads, mid_attn_dim_head: of the attention in the middle; None: the last stage's.
        full_attn: full attention instead of linear, one bool or one per stage; None: {full}.
        num_mem_kv: learned key-values in every attention.
        time_embedding: "sinusoidal" (with `theta`), "learned_fourier" or "random_fourier" (`fourier_dim` features).

    Raises:
        ValueError: an option outside its range; the message has the rule and the value.
    """


class UNet2D(UNetBody):
    __doc__ = "U-Net of images, `(B, C, H, W)`." + _OPTIONS_DOC.format(
        size="int (square) or (height, width)", full="the last stage only"
    )

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 64,
        init_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        self_condition: bool = False,
        learned_variance: bool = False,
        norm: str = "rms",
        norm_groups: int = 8,
        dropout: float = 0.0,
        attn_heads: int | Sequence[int] = 4,
        attn_dim_head: int | Sequence[int] = 32,
        mid_attn_heads: int | None = None,
        mid_attn_dim_head: int | None = None,
        full_attn: bool | Sequence[bool] | None = None,
        num_mem_kv: int = 4,
        time_embedding: str = "sinusoidal",
        fourier_dim: int = 16,
        theta: float = 10000,
    ):
        super().__init__()
        self._build(2, **_options(self.config))


class UNet1D(UNetBody):
    __doc__ = "U-Net of sequences, `(B, C, length)`." + _OPTIONS_DOC.format(size="length", full="no stage")

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 64,
        init_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        self_condition: bool = False,
        learned_variance: bool = False,
        norm: str = "rms",
        norm_groups: int = 8,
        dropout: float = 0.0,
        attn_heads: int | Sequence[int] = 4,
        attn_dim_head: int | Sequence[int] = 32,
        mid_attn_heads: int | None = None,
        mid_attn_dim_head: int | None = None,
        full_attn: bool | Sequence[bool] | None = None,
        num_mem_kv: int = 0,
        time_embedding: str = "sinusoidal",
        fourier_dim: int = 16,
        theta: float = 10000,
    ):
        super().__init__()
        self._build(1, **_options(self.config))
