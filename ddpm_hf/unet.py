"""The denoising U-Net of images and of sequences: one dimension-generic body, `UNet2D` and `UNet1D`.

Architecture: the U-Net of Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), in the form of
denoising-diffusion-pytorch: residual blocks with a time-dependent scale and shift, linear attention (Shen et al.,
arXiv:1812.01243) where full attention is off, RMS norms (Zhang & Sennrich, arXiv:1910.07467), memory key-values
(Sukhbaatar et al., arXiv:1907.01470) and two skips a stage.

The sections follow each other as building blocks, fast forms, stages, options, body. The dimension matters in the
builders and in the constructors' defaults only. `forward` is the same for both: inside, a sequence is an image of
height 1, (B, C, 1, length), because convolutions are faster there with the channels last in memory.

This file is longer than 600 lines because it ships inside saved pipelines as the one file that rebuilds the model: it
imports nothing from ddpm_hf.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from einops import rearrange, repeat
from torch import Tensor, nn

NORMS = ("rms", "group")
TIME_EMBEDDINGS = ("sinusoidal", "learned_fourier", "random_fourier")


@dataclass
class UNetOutput(BaseOutput):
    """`sample`: the model's prediction, `(B, out_channels, *spatial)`."""

    sample: Tensor


# ---------------------------------------------------------------------------------------------
# Building blocks. `x` is (B, C, H, W) everywhere, with H = 1 for sequences and the channels last in memory.
# `temb` is the time embedding after SiLU, (B or 1, 4 * dim).


def _conv(ndim: int, channels_in: int, channels: int, kernel: int, padding: int = 0) -> nn.Module:
    """Build a convolution of stride 1 whose kernel is a square for images and a row for sequences."""
    kind = Conv if ndim == 2 else RowConv
    return kind(channels_in, channels, kernel, padding=padding)


# Compiled with torch 2.11, `_NormalizeCPU` passes no gradients on; with 2.14 it does.
COMPILES_FUNCTIONS = torch.__version__ >= (2, 14)


class RMSNorm(nn.Module):
    """Divide each position's channels by their root mean square, and multiply them by a learned weight."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        """Normalize x, (B, C, H, W).

        Where `scale` and `shift`, (B or 1, C), are given, the result is norm(x) * (scale + 1) + shift. `silu` applies
        SiLU at the end.
        """
        weight = self.weight.to(x.dtype)  # under autocast activations are narrower than weights
        if scale is not None:
            scale, shift = (scale + 1)[..., None, None], shift[..., None, None]
        lost = torch.compiler.is_compiling() and not COMPILES_FUNCTIONS
        # the range of float16 is too small for 1 / rms
        if x.device.type == "cpu" and x.dtype != torch.float16 and not lost:
            gain = weight[:, None, None].unsqueeze(0)
            return _NormalizeCPU.apply(x, gain if scale is None else gain * scale, shift, silu)
        # autocast, under which x is narrower than the weight, would compute all of this in float32, with copies around
        # it; the sums inside `rms_norm` are float32 anyway
        narrow = x.dtype != self.weight.dtype
        with torch.autocast(x.device.type, enabled=False) if narrow else nullcontext():
            # eps makes 0 of x = 0; elsewhere it is far below the mean square
            out = F.rms_norm(x.movedim(1, -1), weight.shape, weight, 1e-24 / len(weight)).movedim(-1, 1)
            if scale is not None:
                out = torch.addcmul(shift, out, scale)
            return F.silu(out) if silu else out


class ConvBlock(nn.Module):
    """3-wide convolution, norm, optional scale and shift, SiLU, dropout."""

    def __init__(self, ndim: int, channels_in: int, channels: int, norm: str, norm_groups: int, dropout: float = 0.0):
        super().__init__()
        self.conv = _conv(ndim, channels_in, channels, 3, padding=1)
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
    """Two `ConvBlock`s and a skip around them; the time embedding gives the scale and shift of the first."""

    def __init__(
        self, ndim: int, channels_in: int, channels: int, time_dim: int, norm: str, norm_groups: int, dropout: float
    ):
        super().__init__()
        self.time_proj = nn.Linear(time_dim, 2 * channels)
        self.block1 = ConvBlock(ndim, channels_in, channels, norm, norm_groups, dropout)
        self.block2 = ConvBlock(ndim, channels, channels, norm, norm_groups)
        self.skip = nn.Identity() if channels_in == channels else _conv(ndim, channels_in, channels, 1)

    def forward(self, x: Tensor, temb: Tensor, joined: Tensor | None = None) -> Tensor:
        """Transform x, (B, C, H, W); `joined` holds further channels, put after those of x.

        They are put together here so that gradient checkpointing does not keep the result.
        """
        if joined is not None:
            x = torch.cat((x, joined), dim=1)
        scale, shift = self.time_proj(temb).chunk(2, dim=1)
        return self.block2(self.block1(x, scale, shift)) + self.skip(x)


class FullAttention(nn.Module):
    """Softmax attention over all positions and `num_mem_kv` learned key-values; adds its input."""

    def __init__(self, channels: int, heads: int, dim_head: int, num_mem_kv: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head)) if num_mem_kv else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.to_qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        if self.mem_kv is not None:
            mem_k, mem_v = repeat(self.mem_kv.to(k.dtype), "kv heads m d -> kv b heads m d", b=len(x))
            k, v = torch.cat((mem_k, k), dim=2), torch.cat((mem_v, v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))
        return rearrange(out, "b (h w) c -> b c h w", w=x.shape[3]) + x


class LinearAttention(nn.Module):
    """softmax(q over features) · (softmax(k over positions)ᵀ v), whose cost is linear in positions; adds its input.

    Shen et al., "Efficient Attention" (arXiv:1812.01243), with `num_mem_kv` learned key-values.
    """

    def __init__(self, channels: int, heads: int, dim_head: int, num_mem_kv: int):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.norm = RMSNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, channels)
        # (d, m) here and (m, d) in FullAttention, as in the checkpoints of denoising-diffusion-pytorch
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv)) if num_mem_kv else None
        self.norm_out = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        out = _attend_merged(self, tokens) if _can_merge(self, tokens) else self._attend(tokens)
        return self.norm_out(rearrange(out, "b (h w) c -> b c h w", w=x.shape[3])) + x

    def _attend(self, tokens: Tensor) -> Tensor:
        """Attend among tokens, (B, N, C)."""
        q, k, v = rearrange(self.to_qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        if self.mem_kv is not None:
            mem_k, mem_v = repeat(self.mem_kv.to(k.dtype), "kv heads d m -> kv b heads m d", b=len(tokens))
            k, v = torch.cat((mem_k, k), dim=2), torch.cat((mem_v, v), dim=2)
        # the type is named because autocast would otherwise make these float32, and narrow them again below
        q, k = q.softmax(dim=3, dtype=q.dtype), k.softmax(dim=2, dtype=k.dtype)
        context = k.transpose(2, 3) @ v * self.scale  # (b, heads, d, d)
        return self.to_out(rearrange(q @ context, "b heads n d -> b n (heads d)"))


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
    """Build a layer that halves each spatial size."""
    if ndim == 2:
        # equal to moving each 2 x 2 square into the channels, followed by a 1 x 1 convolution
        return nn.Conv2d(channels_in, channels, 2, stride=2)
    return RowConv(channels_in, channels, 4, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3-wide convolution."""

    def __init__(self, ndim: int, channels_in: int, channels: int):
        super().__init__()
        self.factor = (1.0, 2.0) if ndim == 1 else (2.0, 2.0)
        self.conv = _conv(ndim, channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


# ---------------------------------------------------------------------------------------------
# Fast forms. Each says which plain form it equals, when it is chosen, what it gains and which test compares them.


def _can_merge(attention: LinearAttention, tokens: Tensor) -> bool:
    """Return True where `_attend_merged` is chosen: on CPU, with more positions than channels.

    Layers that something has wrapped (an adapter), or whose weights are elsewhere (offloaded), must be called.
    """
    plain = all(type(layer) is nn.Linear for layer in (attention.to_qkv, attention.to_out))
    return tokens.device.type == "cpu" and tokens.shape[1] > tokens.shape[2] and plain and (
        attention.to_qkv.weight.device == attention.to_out.weight.device == tokens.device
    )  # fmt: skip


def _attend_merged(attention: LinearAttention, tokens: Tensor) -> Tensor:
    """Compute `LinearAttention._attend` without v and without the heads' outputs, both (B, N, heads * d).

    The plain form is context = softmax(k)ᵀ v with v = n w_vᵀ for tokens n, and out = (q context) w_outᵀ. Here
        context = (softmax(k)ᵀ n) w_vᵀ  and  out = q (context w_outᵀ),
    so that the projections are multiplied into the small context of each head. In float32 a call is 4 to 7% faster and
    a step 4 to 5%; in bfloat16 neither differs by more than 3%. A step keeps 5% (1D, 16 x 32 x 128, dim 32) to 13% less
    for the backward pass (2D, 2 x 3 x 64 x 64, dim 64; PyTorch 2.14, AVX-512). Tested against the plain form, gradients
    too.
    """
    heads = attention.heads
    # cast here, because autocast would cast the expanded w_k as often as it is repeated
    w_q, w_k, w_v = attention.to_qkv.weight.to(tokens.dtype).chunk(3)  # (heads * d, C) each
    w_v = rearrange(w_v, "(heads d) c -> heads c d", heads=heads)
    w_out = rearrange(attention.to_out.weight.to(tokens.dtype), "c (heads d) -> heads d c", heads=heads)
    # as a product of batches: (B, heads * d, N), without a copy to another layout
    k = torch.bmm(w_k.expand(len(tokens), -1, -1), tokens.transpose(1, 2))
    positions = k.shape[2]
    if attention.mem_kv is not None:
        mem_k, mem_v = attention.mem_kv.to(k.dtype)  # (heads, d, m) each
        k = torch.cat((k, repeat(mem_k, "heads d m -> b (heads d) m", b=len(tokens))), dim=2)
    k = k.softmax(dim=2, dtype=k.dtype)
    context = rearrange(torch.bmm(k[..., :positions], tokens), "b (heads d) c -> b heads d c", heads=heads) @ w_v
    if attention.mem_kv is not None:
        k_of_memory = rearrange(k[..., positions:], "b (heads d) m -> b heads d m", heads=heads)
        context = context + k_of_memory @ mem_v.transpose(1, 2)
    q = rearrange(F.linear(tokens, w_q), "b n (heads d) -> b n heads d", heads=heads)
    q = rearrange(q.softmax(dim=3, dtype=q.dtype), "b n heads d -> b n (heads d)")
    merged = rearrange(context * attention.scale @ w_out, "b heads d c -> b (heads d) c")
    return torch.bmm(q, merged) + attention.to_out.bias.to(q.dtype)


class Conv(nn.Conv2d):
    """A `Conv2d` that also runs as one product of matrices, see `_convolve`."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, self.stride, self.padding)


class RowConv(nn.Conv1d):
    """A `Conv1d` over (B, C, 1, length), computed as a 2D convolution with a kernel of one row.

    The plain form is `nn.Conv1d` over (B, C, length). This one is chosen for all sequences, because PyTorch has no 1D
    convolution with the channels last in memory: on CPU a call and a step of `UNet1D` (dim 32, at 16 x 32 x 128) are
    14 to 18% faster in float32 and 19 to 31% in bfloat16. Tested against `F.conv1d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight.unsqueeze(2), self.bias, (1, *self.stride), (0, *self.padding))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple, padding: tuple) -> Tensor:
    """Compute `F.conv2d`, or for few positions in bfloat16 on CPU the same as one product of matrices.

    The product is chosen where the batch has at most as many positions as channels, because PyTorch's convolution
    rearranges all weights at each call: in bfloat16 a call of the default model at 8 x 3 x 32 x 32 is 8% faster and a
    step 5 to 10% (AVX-512 with bf16 instructions, PyTorch 2.14). Tested against `F.conv2d`, gradients too.
    """
    positions, channels = x.shape[0] * x.shape[2:].numel(), x.shape[1]
    narrow = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if narrow and positions <= channels and max(stride) == 1 < max(weight.shape[2:]):
        return _convolve_as_product(x, weight, bias, padding)
    return F.conv2d(x, weight, bias, stride, padding)


def _convolve_as_product(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple) -> Tensor:
    """Compute `F.conv2d` of stride 1 as patches times weights."""
    kernel = weight.shape[2:]
    rows = rearrange(F.pad(x, (padding[1], padding[1], padding[0], padding[0])), "b c h w -> b h w c")
    height, width = (size - k + 1 for size, k in zip(rows.shape[1:3], kernel))
    patches = [rows[:, i : i + height, j : j + width] for i in range(kernel[0]) for j in range(kernel[1])]
    out = F.linear(torch.cat(patches, dim=-1), rearrange(weight, "out c i j -> out (i j c)"), bias)
    return rearrange(out, "b h w c -> b c h w")


class _NormalizeCPU(torch.autograd.Function):
    """Compute SiLU(z) for z = x r gain + shift, where 1 / r = rms(x) over the C channels.

    The plain form is the rest of `RMSNorm.forward`, which on CPU is a chain of operations that each keep a tensor for
    the backward pass. This one keeps x and r alone, so that the layer keeps 51 to 68% less memory; a step is 2 to 3%
    faster too. It is chosen on CPU, except in float16. It has no second derivatives. Tested by `gradcheck`.

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
        """Return the resized features of x, (B, C, H, W), and the two skips, which have the size of x."""
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
        """Return the resized features of x and the skips of the mirrored `DownStage`, whose later skip comes first."""
        x = self._run(self.block1, x, temb, skip2)
        x = self._run(self.block2, x, temb, skip1)
        return self.resize(self._run(self.attention, x))


class OutStage(_Stage):
    def __init__(self, block, ndim: int, channels: int, out_channels: int):
        super().__init__()
        self.block = block(2 * channels, channels)
        self.conv = _conv(ndim, channels, out_channels, 1)

    def forward(self, x: Tensor, first: Tensor, temb: Tensor) -> Tensor:
        return self.conv(self._run(self.block, x, temb, first))


# ---------------------------------------------------------------------------------------------
# Options: the rules of their values.


def _is_count(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_optional_count(value) -> bool:
    return value is None or _is_count(value)


def _is_zero_or_count(value) -> bool:
    return _is_count(value, 0)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_COUNT = "be a whole number of at least 1"
# An option's name, the test that its value must pass, and the rule that the error names: "<name> must <rule>".
_RULES = (
    ("in_channels", _is_count, _COUNT),
    ("dim", _is_count, _COUNT),
    ("norm_groups", _is_count, _COUNT),
    ("out_channels", _is_optional_count, _COUNT),
    ("init_dim", _is_optional_count, _COUNT),
    ("mid_attn_heads", _is_optional_count, _COUNT),
    ("mid_attn_dim_head", _is_optional_count, _COUNT),
    ("num_class_embeds", _is_optional_count, _COUNT),
    ("dim_mults", lambda v: isinstance(v, (list, tuple)) and len(v) > 0, "be a list of at least one whole number"),
    ("norm", lambda v: v in NORMS, f"be one of {NORMS}"),
    ("time_embedding", lambda v: v in TIME_EMBEDDINGS, f"be one of {TIME_EMBEDDINGS}"),
    ("theta", _is_number, "be a number"),
    ("theta", lambda v: v > 0, "be greater than 0"),
    ("dropout", _is_number, "be a number"),
    ("dropout", lambda v: 0.0 <= v < 1.0, "lie in [0, 1)"),
    ("fourier_dim", lambda v: _is_count(v) and v % 2 == 0, "be an even whole number of at least 2"),
    ("num_mem_kv", _is_zero_or_count, "be a whole number of at least 0"),
    ("mid_full_attn", lambda v: isinstance(v, bool), "be true or false"),
    ("condition_channels", _is_zero_or_count, "be a whole number of at least 0"),
)


def _check_options(ndim: int, options) -> None:
    """Raise ValueError, with the rule and the value, if an option of the constructor breaks a rule of its own."""
    for name, test, rule in _RULES:
        if not test(options[name]):
            raise ValueError(f"{name} must {rule}, got {options[name]!r}")
    dim, size = options["dim"], options["sample_size"]
    if options["time_embedding"] == "sinusoidal" and (dim % 2 or dim < 4):
        raise ValueError(f"dim must be even and at least 4 with a sinusoidal time embedding, got {dim}")
    if size is not None:
        sizes = size if isinstance(size, (list, tuple)) else (size,) * ndim
        if len(sizes) != ndim or not all(isinstance(n, int) for n in sizes):
            expected = "an int or (height, width)" if ndim == 2 else "an int"
            raise ValueError(f"sample_size must be {expected}, got {size!r}")
        check_size(sizes)


def _per_stage(name: str, value, stages: int, kind: type) -> tuple:
    """Return a value for each stage: the one that is given for all, or those that are given one each."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * stages
    if len(values) != stages:
        raise ValueError(f"{name} must be one value or one per stage ({stages}, as dim_mults has), got {value!r}")
    for item in values:
        if not isinstance(item, kind) or (kind is int and (isinstance(item, bool) or item < 1)):
            expected = "true or false" if kind is bool else "a whole number of at least 1"
            raise ValueError(f"{name} must hold {expected} for every stage, got {value!r}")
    return values


def check_size(size: Sequence[int]) -> None:
    """Raise ValueError where a spatial size is less than 1."""
    if any(length < 1 for length in size):
        raise ValueError(f"every spatial size must be at least 1, got {tuple(size)}")


def edge_padding(size: int, factor: int) -> tuple[int, int]:
    """Return the fewest zeros before and after `size` values that make their number a multiple of `factor`.

    Both numbers are equal if their sum is even; otherwise there is one more after the values.
    """
    extra = -size % factor
    return extra // 2, extra - extra // 2


def _pad(x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    """Put zeros around x, (B, C, *spatial), as many as `padding` says for each spatial axis; x itself if it says 0."""
    numbers = [number for pair in reversed(padding) for number in pair]
    return F.pad(x, numbers) if any(numbers) else x


def _crop(x: Tensor, padding: list[tuple[int, int]], size: Sequence[int]) -> Tensor:
    """Undo `_pad` for a sample of the spatial size `size`."""
    for axis, (pair, length) in enumerate(zip(padding, size), start=2):
        if any(pair):
            x = x.narrow(axis, pair[0], length)
    return x


# ---------------------------------------------------------------------------------------------
# The body and its two faces.


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

    def _build(self, ndim: int) -> None:
        """Check the options in `self.config`, and make the layers."""
        o = self.config
        _check_options(ndim, o)
        stages = len(o.dim_mults)
        mults = _per_stage("dim_mults", o.dim_mults, stages, int)
        heads = _per_stage("attn_heads", o.attn_heads, stages, int)
        dim_heads = _per_stage("attn_dim_head", o.attn_dim_head, stages, int)
        last_only = [ndim == 2 and stage == stages - 1 for stage in range(stages)]
        full = _per_stage("full_attn", last_only if o.full_attn is None else o.full_attn, stages, bool)
        widths = [o.init_dim or o.dim, *(o.dim * mult for mult in mults)]
        if o.norm == "group" and any(width % o.norm_groups for width in widths):
            raise ValueError(f"every stage's width must be a multiple of norm_groups={o.norm_groups}, got {widths}")
        self.ndim, self.downsample_factor = ndim, 2 ** (stages - 1)

        conv = functools.partial(_conv, ndim)

        def block(channels_in, channels):
            return ResidualBlock(ndim, channels_in, channels, 4 * o.dim, o.norm, o.norm_groups, o.dropout)

        def attention(stage):
            kind = FullAttention if full[stage] else LinearAttention
            return lambda channels: kind(channels, heads[stage], dim_heads[stage], o.num_mem_kv)

        def mid_attention(channels):
            kind = FullAttention if o.mid_full_attn else LinearAttention
            return kind(channels, o.mid_attn_heads or heads[-1], o.mid_attn_dim_head or dim_heads[-1], o.num_mem_kv)

        channels_in = o.in_channels * (2 if o.self_condition else 1) + o.condition_channels
        self.conv_in = conv(channels_in, widths[0], 7, padding=3)
        self.time_embed = TimeEmbedding(o.dim, o.time_embedding, o.fourier_dim, o.theta)
        self.down_stages, self.up_stages = nn.ModuleList(), nn.ModuleList()
        for stage, (inner, outer) in enumerate(zip(widths[:-1], widths[1:])):
            last = stage == stages - 1
            resize = conv(inner, outer, 3, padding=1) if last else _downsample(ndim, inner, outer)
            self.down_stages.append(DownStage(block, attention(stage), inner, resize))
        self.mid_stage = MidStage(block, mid_attention, widths[-1])
        for stage in reversed(range(stages)):
            inner, outer = widths[stage], widths[stage + 1]
            resize = conv(outer, inner, 3, padding=1) if stage == 0 else Upsample(ndim, outer, inner)
            self.up_stages.append(UpStage(block, attention(stage), inner, outer, resize))
        out_channels = o.out_channels or o.in_channels * (2 if o.learned_variance else 1)
        self.out_stage = OutStage(block, ndim, widths[0], out_channels)
        # last, so that the other weights begin with the same random numbers as without classes
        self.class_embedding = None
        if o.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(o.num_class_embeds + 1, 4 * o.dim)

    def channels_last(self):
        """Put the convolutions' weights into the layout of the activations, for speed; numbers stay. Returns self."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):  # PyTorch's own conversion leaves these out
                module.weight.data = module.weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        return self.to(memory_format=torch.channels_last)

    def _with_self_condition(self, sample: Tensor, x_self_cond: Tensor | None) -> Tensor:
        """Put the previous estimate of x0, or zeros, before the channels of the sample if the model takes it."""
        if not self.config.self_condition:
            if x_self_cond is not None:
                raise ValueError("x_self_cond was given to a model whose configuration has self_condition=False")
            return sample
        x_self_cond = torch.zeros_like(sample) if x_self_cond is None else x_self_cond
        if x_self_cond.shape != sample.shape:
            raise ValueError(
                f"x_self_cond must have sample's shape {tuple(sample.shape)}, got {tuple(x_self_cond.shape)}"
            )
        return torch.cat((x_self_cond.to(sample.device), sample), dim=1)

    def _with_condition(self, sample: Tensor, condition: Tensor | None, like: Tensor) -> Tensor:
        """Put the condition, or zeros, after the channels of the sample if the model takes it; `like` is x_t."""
        channels = self.config.condition_channels
        if not channels:
            if condition is not None:
                raise ValueError("condition was given to a model whose configuration has condition_channels=0")
            return sample
        shape = (len(like), channels, *like.shape[2:])
        if condition is None:
            condition = like.new_zeros(shape)
        if condition.shape != shape:
            raise ValueError(f"condition must have the shape {tuple(shape)}, got {tuple(condition.shape)}")
        return torch.cat((sample, condition.to(sample.device, sample.dtype)), dim=1)

    def _checked_labels(self, labels: Tensor | None, sample: Tensor) -> Tensor | None:
        """Return the labels on the sample's device, (1,) "no class" for None; None for a model without classes."""
        none = self.config.num_class_embeds
        if none is None:
            if labels is not None:
                raise ValueError("class_labels was given to a model whose configuration has num_class_embeds=None")
            return None
        if labels is None:
            return torch.full((1,), none, device=sample.device)
        labels = torch.as_tensor(labels)
        if labels.shape != sample.shape[:1] or labels.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise ValueError(
                f"class_labels must be whole numbers of the shape ({len(sample)},), got {tuple(labels.shape)} of "
                f"{labels.dtype}"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = labels[(labels < 0) | (labels > none)]
            if len(outside):
                raise ValueError(
                    f'class_labels must lie in [0, {none}], where {none} means "no class", got {outside[0].item()}'
                )
        return labels.to(sample.device, torch.int64)

    @staticmethod
    def _checked_timestep(timestep: Tensor | int | float, sample: Tensor) -> Tensor:
        """Return the timestep, checked, as (B,), or as (1,) for all: its embedding is then made once."""
        if isinstance(timestep, (int, float)):
            timestep = torch.full((), timestep, device=sample.device)  # nothing is copied to a card
        timestep = torch.as_tensor(timestep, device=sample.device)
        if timestep.ndim > 1 or timestep.numel() not in (1, len(sample)):
            raise ValueError(
                f"timestep must be a number or have the shape ({len(sample)},), got {tuple(timestep.shape)}"
            )
        return timestep.reshape(-1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int | float,
        x_self_cond: Tensor | None = None,
        return_dict: bool = True,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> UNetOutput | tuple:
        """Predict epsilon, x0 or v, as trained. Other tensors are moved to the device of `sample`, the model's.

        Args:
            sample: x_t, `(B, in_channels, *spatial)`, of any spatial size.
            timestep: t, a number, a 0-d tensor or `(B,)`; integer or float, in [0, num_train_timesteps).
            x_self_cond: the previous estimate of x0, shaped as `sample` (zeros if None); self-conditioned models only.
            return_dict: a `UNetOutput` if true, else a tuple of one tensor.
            class_labels: the class of each sample, `(B,)` whole numbers in [0, num_class_embeds], where
                num_class_embeds means "no class", as None does for all; models with `num_class_embeds` only.
            condition: what the model is told of the sample, `(B, condition_channels, *spatial)` (zeros if None);
                models with `condition_channels` only.

        Raises:
            ValueError: a wrong number of dimensions or channels, a spatial size of 0, a timestep of another length,
                `x_self_cond` for a model without self-conditioning, `class_labels` for a model without classes, of
                another shape or type, or outside their range (checked on CPU only: on a card PyTorch's embedding stops
                with an assertion, because checking would wait for the card), a `condition` of another shape or for a
                model without one.
        """
        if sample.ndim != self.ndim + 2 or sample.shape[1] != self.config.in_channels:
            shape = f"(batch, {self.config.in_channels}, {'height, width' if self.ndim == 2 else 'length'})"
            raise ValueError(f"sample must have the shape {shape}, got {tuple(sample.shape)}")
        check_size(sample.shape[2:])
        timestep = self._checked_timestep(timestep, sample)
        class_labels = self._checked_labels(class_labels, sample)
        sample = self._with_condition(self._with_self_condition(sample, x_self_cond), condition, sample)

        size = sample.shape[2:]
        padding = [edge_padding(length, self.downsample_factor) for length in size]
        sample = _pad(sample, padding)
        if self.ndim == 1:
            sample = sample.unsqueeze(2)
        # every norm and attention works on the last axis in memory; convolutions keep the format
        sample = sample.contiguous(memory_format=torch.channels_last)
        x = first = self.conv_in(sample)
        temb = self.time_embed(timestep)  # in float32 when loaded in half precision
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        temb = F.silu(temb).to(x.dtype)
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
        x = _crop(x, padding, size)
        return UNetOutput(sample=x) if return_dict else (x,)


_OPTIONS_DOC = """

    Any size can be given. Every stage but the last halves the size, so that a size must be a multiple of
    2 ** (len(dim_mults) - 1) inside the model, and others are padded there: zeros are put before and after the values,
    equally many or one more after them, and the prediction is cropped to the size of x_t. They are zeros because every
    convolution continues a sample by zeros at its edges, and because the mask of a condition is 0 (unknown) there. A
    loss does not see them.

    Args:
        sample_size: {size}; what pipelines sample by default. None: given at each call.
        in_channels: number of channels of x_t.
        out_channels: number of channels predicted; None: `in_channels`, twice that with `learned_variance`.
        dim: width that the multipliers multiply; the time embedding has 4 * dim.
        init_dim: width after the first convolution; None: dim.
        dim_mults: width of each stage over dim; its length is the number of stages (one fewer downsamplings).
        self_condition: take the previous x0 estimate as input too (Chen et al., arXiv:2208.04202).
        learned_variance: predict an interpolation between the variances too (Nichol & Dhariwal, arXiv:2102.09672).
        norm: "rms", or "group" with `norm_groups` groups, in the residual blocks.
        dropout: the probability of dropout in the first half of each residual block, in [0, 1).
        attn_heads, attn_dim_head: heads of each attention, and width of a head; one value or one per stage.
        mid_attn_heads, mid_attn_dim_head: the same for the attention in the middle; None: the last stage's.
        full_attn: full attention instead of linear, one bool or one per stage; None: {full}.
        num_mem_kv: number of learned key-values in every attention.
        time_embedding: "sinusoidal" (with `theta`), "learned_fourier" or "random_fourier" (`fourier_dim` features).
        num_class_embeds: number of classes, for models that are told the class of each sample; one further learned
            embedding stands for "no class" (Ho & Salimans, arXiv:2207.12598). None: a model without classes.
        condition_channels: number of further input channels, for models that are told more about a sample, such as the
            part of it that is known (Tashiro et al., arXiv:2107.03502).
        mid_full_attn: full attention in the middle; False: linear attention, whose cost is linear in positions, for
            long sequences and large images.

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
        num_class_embeds: int | None = None,
        condition_channels: int = 0,
        mid_full_attn: bool = True,
    ):
        super().__init__()
        self._build(2)


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
        num_class_embeds: int | None = None,
        condition_channels: int = 0,
        mid_full_attn: bool = True,
    ):
        super().__init__()
        self._build(1)
