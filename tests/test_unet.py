"""The U-Net: shapes, options, equivalent formulas, and what diffusers' ModelMixin promises."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.unet import (
    FullAttention,
    LinearAttention,
    RMSNorm,
    TimeEmbedding,
    UNet1D,
    UNet2D,
    Upsample,
    _attend_merged,
    _can_merge,
    _conv,
    _convolve_as_product,
    _NormalizeCPU,
)

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}


def small(ndim=2, **options):
    return (UNet2D if ndim == 2 else UNet1D)(**{**SMALL, **options})


def test_rms_norm_is_unit_length_times_root_channels():
    norm = RMSNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = F.normalize(x, dim=1) * 6**0.5 * norm.weight[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=0)
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


def attention_parts(layer):
    """An input of six positions, its q, k and v of (position, head, feature), and zeros of their shape."""
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    tokens = layer.norm(x).flatten(2)[0].T
    q, k, v = layer.to_qkv(tokens).reshape(6, 3, 2, 4).unbind(1)
    return x, q, k, v, torch.zeros_like(q)


@pytest.mark.parametrize("memory", [0, 3])
def test_full_attention_formula(memory):
    """out = softmax(q k^T / sqrt(d)) v over positions and memories, one query at a time."""
    layer = FullAttention(5, heads=2, dim_head=4, num_mem_kv=memory).double()
    x, q, k, v, out = attention_parts(layer)
    for head in range(2):
        keys, values = k[:, head], v[:, head]
        if memory:
            keys = torch.cat((layer.mem_kv[0, head], keys))
            values = torch.cat((layer.mem_kv[1, head], values))
        for i in range(6):
            weights = torch.exp(keys @ q[i, head] / 2)
            out[i, head] = (weights / weights.sum()) @ values
    expected = x + layer.to_out(out.reshape(6, 8)).T.reshape(1, 5, 2, 3)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_sinusoidal_features():
    embed = TimeEmbedding(8, "sinusoidal", 16, theta=10000).double()
    captured = {}
    embed.linear_1.register_forward_pre_hook(lambda module, args: captured.update(features=args[0]))
    embed(torch.tensor([0, 3]))
    frequencies = [10000 ** (-i / 3) for i in range(4)]
    expected = [[math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies] for t in (0, 3)]
    torch.testing.assert_close(
        captured["features"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 1, "init_dim": 12, "norm": "group", "norm_groups": 4, "num_mem_kv": 0},
        {"self_condition": True, "learned_variance": True, "dim_mults": (1, 2, 3), "full_attn": (False, True, False)},
        {"time_embedding": "learned_fourier", "full_attn": True, "attn_dim_head": (4, 6), "attn_heads": (1, 2)},
        {"time_embedding": "random_fourier", "out_channels": 5, "full_attn": False, "mid_attn_heads": 3},
        {"mid_full_attn": False, "mid_attn_heads": 3, "mid_attn_dim_head": 5, "num_mem_kv": 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("ndim", [1, 2])
def test_options_give_the_right_shapes_and_survive_saving(options, ndim, tmp_path):
    model = small(ndim, **options).eval()
    channels = model.config.in_channels
    x = torch.randn(3, channels, *(8, 12)[:ndim])
    self_cond = {"x_self_cond": torch.randn_like(x)} if model.config.self_condition else {}
    with torch.no_grad():
        out = model(x, torch.tensor([0, 5, 999]), **self_cond).sample
        assert out.shape == (
            3,
            options.get("out_channels") or channels * (1 + model.config.learned_variance),
            *x.shape[2:],
        )
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(x, torch.tensor([0, 5, 999]), **self_cond, return_dict=False)[0], out)


@pytest.mark.parametrize("ndim", [1, 2])
def test_the_middle_attends_linearly_where_asked(ndim):
    """Then no layer attends fully, and the cost is linear in positions. By default the middle does, in all models."""
    assert isinstance(small(ndim).mid_stage.attention, FullAttention)
    model = small(ndim, full_attn=False, mid_full_attn=False).eval()
    assert isinstance(model.mid_stage.attention, LinearAttention)
    assert not any(isinstance(module, FullAttention) for module in model.modules())


def test_forms_of_timesteps_agree():
    model = small().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        outputs = [model(x, t).sample for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0]))]
    assert all(torch.equal(out, outputs[0]) for out in outputs[:-1])
    # embedded once for each sample, the same in other products of matrices
    torch.testing.assert_close(outputs[-1], outputs[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ndim", [1, 2])
def test_upsampling_doubles_every_position(ndim, double):
    layer, x = Upsample(ndim, 3, 5), torch.randn(2, 3, *((1, 6) if ndim == 1 else (4, 6)))
    doubled = x.repeat_interleave(2, dim=3)
    if ndim == 1:
        expected = F.conv1d(doubled.squeeze(2), layer.conv.weight, layer.conv.bias, padding=1).unsqueeze(2)
    else:
        expected = F.conv2d(doubled.repeat_interleave(2, dim=2), layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3)])
def test_a_convolution_as_one_product(kernel, double):
    x, weight, bias = torch.randn(2, 7, 4, 5), torch.randn(6, 7, *kernel), torch.randn(6)
    inputs = [v.requires_grad_() for v in (x, weight, bias)]
    padding = tuple(k // 2 for k in kernel)
    expected, got = F.conv2d(*inputs, padding=padding), _convolve_as_product(*inputs, padding)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(got)
    pairs = [torch.autograd.grad(out, inputs, direction) for out in (got, expected)]
    for mine, plain in zip(*pairs):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_mem_kv", [0, 3])
def test_merged_projections_of_linear_attention(num_mem_kv, double):
    layer = LinearAttention(6, 2, 4, num_mem_kv)
    tokens = torch.randn(3, 7, 6, requires_grad=True)
    assert _can_merge(layer, tokens) and not _can_merge(layer, tokens[:, :6])
    inputs = [tokens, layer.to_qkv.weight, *layer.to_out.parameters(), *([] if num_mem_kv == 0 else [layer.mem_kv])]
    expected, got = layer._attend(tokens), _attend_merged(layer, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(got)
    pairs = [torch.autograd.grad(out, inputs, direction) for out in (got, expected)]
    for mine, plain in zip(*pairs):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)
    layer.to_out = torch.nn.Sequential(layer.to_out)  # wrapped, as by an adapter
    assert not _can_merge(layer, tokens)


@pytest.mark.parametrize("ndim, few, many", [(2, (4, 8), (5, 8)), (1, (1, 32), (1, 33))])
def test_few_positions_in_bfloat16_need_no_convolution(ndim, few, many, monkeypatch):
    """32 channels: a product of matrices up to 32 positions of the batch, PyTorch's convolution above."""
    layer = _conv(ndim, 32, 16, 3, padding=1)
    x = [torch.randn(1, 32, *size) for size in (few, many)]
    expected = [layer(v) for v in x]
    layer.bfloat16()
    calls = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *arguments: calls.append(arguments) or convolve(*arguments))
    for v, e, count in zip(x, expected, (0, 1)):
        got = layer(v.bfloat16())
        assert len(calls) == count
        # inputs, weights and sums are rounded to 8 bits
        assert (got.float() - e).norm() < 2**-7 * e.norm()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_norms_gradient_is_its_derivative(silu, scaled, double):
    x, gain, shift = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 1, 1), torch.randn(2, 5, 1, 1)
    inputs = [v.requires_grad_() for v in (x, gain, shift if scaled else None) if v is not None]
    assert torch.autograd.gradcheck(
        lambda *v: _NormalizeCPU.apply(v[0], v[1], v[2] if scaled else None, silu), inputs, eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("size", [(2, 3), (6, 7)])  # fewer positions than the 12 channels, and more
def test_linear_attention_by_its_definition(size, memory, double):
    layer = LinearAttention(12, heads=2, dim_head=5, num_mem_kv=memory)
    x = torch.randn(3, 12, *size)
    normal = layer.norm(x).flatten(2)
    q, k, v = (layer.to_qkv.weight @ normal).reshape(3, 3, 2, 5, -1).unbind(1)  # (B, heads, dim_head, N)
    if memory:
        k, v = (torch.cat((m.expand(3, -1, -1, -1), w), dim=-1) for m, w in zip(layer.mem_kv, (k, v)))
    # out_i = sum_j (softmax_features(q_i) . softmax_positions(k)_j) v_j / sqrt(d)
    out = torch.einsum("bhdn,bhen,bhdm->bhem", k.softmax(-1), v, q.softmax(2) / 5**0.5)
    out = (layer.to_out.weight @ out.flatten(1, 2) + layer.to_out.bias[:, None]).unflatten(2, size)
    torch.testing.assert_close(layer(x), layer.norm_out(out) + x, rtol=1e-10, atol=1e-12)


def test_a_sample_does_not_depend_on_its_batch():
    model = small().double().eval()
    x, t = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 400, 900])
    with torch.no_grad():
        together = model(x, t).sample
        alone = torch.cat([model(x[i : i + 1], t[i]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ndim", [1, 2])
def test_gradient_checkpointing_keeps_the_gradients(ndim):
    model = small(ndim, dropout=0.2).double()
    x = torch.randn(2, 3, *(8, 8)[:ndim], dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        model(x, 5).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bfloat16_loading_keeps_the_time_embedding(tmp_path):
    model = small(time_embedding="random_fourier").eval()
    model.save_pretrained(tmp_path)
    half = UNet2D.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.time_embed.frequencies, model.time_embed.frequencies)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        exact, out = model(x, 500).sample, half(x.bfloat16(), 500).sample
        cast = model.to(torch.bfloat16)(x.bfloat16(), 500).sample
    assert out.dtype == cast.dtype == torch.bfloat16
    # some thirty layers, each rounding to 8 bits
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_sharded_saving(tmp_path):
    model = small().eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = UNet2D.from_pretrained(tmp_path)
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_device_map_auto(tmp_path):
    """With too little memory, stages are kept on disk and brought in one at a time."""
    model = small(dim_mults=(1, 2, 4)).eval()
    model.save_pretrained(tmp_path / "model")
    x = torch.randn(1, 3, 8, 8)
    whole = UNet2D.from_pretrained(tmp_path / "model", device_map="auto")
    split = UNet2D.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in split.hf_device_map.values() and "cpu" in split.hf_device_map.values()
    with torch.no_grad():
        expected = model(x, 5).sample
        for placed in (whole, split):
            # weights from a mapped file are aligned differently, and kernels differ by alignment: float32 rounding
            torch.testing.assert_close(placed(x, 5).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dim": 7}, "dim must be even"), ({"dim": 0}, "dim must be"), ({"dim_mults": ()}, "dim_mults"),
        ({"dim_mults": (1, 0)}, "dim_mults"), ({"norm": "layer"}, "'layer'"),
        ({"norm": "group", "norm_groups": 3}, "norm_groups=3"),
        ({"time_embedding": "none"}, "'none'"), ({"dropout": 1.0}, "1.0"), ({"attn_heads": (1, 2, 3)}, "one per stage"),
        ({"full_attn": "yes"}, "full_attn"), ({"full_attn": 1}, "full_attn"), ({"num_mem_kv": -1}, "-1"),
        ({"mid_full_attn": "no"}, "mid_full_attn must be true or false, got 'no'"), ({"mid_full_attn": None}, "None"),
        ({"sample_size": 0}, r"at least 1, got \(0, 0\)"), ({"sample_size": (8, -1)}, r"at least 1, got \(8, -1\)"),
        ({"sample_size": (8,)}, "sample_size"),
        ({"dropout": "a"}, "dropout must be a number"),
        ({"fourier_dim": 16.0, "time_embedding": "learned_fourier"}, "fourier_dim must be an even whole number"),
        ({"num_mem_kv": 2.0}, "num_mem_kv must be a whole number"), ({"condition_channels": True}, "got True"),
        ({"fourier_dim": 3}, "fourier_dim"), ({"in_channels": 0}, "in_channels"), ({"theta": 0}, "theta"),
        ({"condition_channels": -1}, "condition_channels must be a whole number of at least 0, got -1"),
        ({"num_class_embeds": 0}, "num_class_embeds must be a whole number of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


ODD = {1: (13,), 2: (5, 13)}  # 2 x 2 downsamplings: 13 needs one zero before and two after, 5 the same


@pytest.mark.parametrize("ndim", [1, 2])
def test_other_sizes_are_padded_by_zeros_and_cropped(ndim):
    """What the model predicts is the part inside of what it predicts for the sample with zeros around, bit for bit."""
    options = {"self_condition": True, "condition_channels": 2, "dim_mults": (1, 2, 2)}
    model, size = small(ndim, sample_size=ODD[ndim] if ndim == 2 else 13, **options).eval(), ODD[ndim]
    sample, x0, condition = torch.randn(2, 3, *size), torch.randn(2, 3, *size), torch.randn(2, 2, *size)
    around = {name: F.pad(x, (1, 2) * ndim) for name, x in (("x", sample), ("x0", x0), ("c", condition))}
    with torch.no_grad():
        out = model(sample, 5, x0, condition=condition).sample
        whole = model(around["x"], 5, around["x0"], condition=around["c"]).sample
    assert out.shape == sample.shape and whole.shape[2:] == tuple(n + 3 for n in size)
    assert torch.equal(out, whole[(..., *(slice(1, 1 + n) for n in size))])
    assert model.config.sample_size == (size if ndim == 2 else 13)
    tiny = (1,) * ndim
    assert model(torch.randn(1, 3, *tiny), 5).sample.shape == (1, 3, *tiny)


@pytest.mark.parametrize("ndim", [1, 2])
def test_padding_is_compiled_whole_and_absent_where_sizes_fit(ndim):
    """An odd size is one graph, and works on the meta device; a size that fits has no operation more."""
    operations = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    model, odd = small(ndim, dim_mults=(1, 2, 2)).channels_last(), torch.randn(1, 3, *ODD[ndim])
    seen = []
    for x in (torch.randn(1, 3, *(16,) * ndim), odd):
        operations.clear()
        with torch.no_grad(), Seen():
            expected = model(x, 5).sample
        seen.append([name for name in operations if "pad" in name])
    assert seen == [[], ["aten.constant_pad_nd.default"]]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(odd, torch.tensor(5)).sample, expected)
    torch._dynamo.reset()
    assert model.to("meta")(odd.to("meta"), torch.tensor(5)).sample.shape == odd.shape


def test_bad_inputs():
    model = small()
    x = torch.randn(2, 3, 8, 8)
    for arguments, message in [
        ((torch.randn(2, 1, 8, 8), 1), r"\(batch, 3, height, width\).*\(2, 1, 8, 8\)"),
        ((torch.randn(2, 3, 8), 1), "shape"),
        ((torch.randn(2, 3, 8, 0), 1), r"every spatial size must be at least 1, got \(8, 0\)"),
        ((x, torch.arange(3)), r"\(2,\).*\(3,\)"),
        ((x, 1, x), "self_condition=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="x_self_cond"):
        small(self_condition=True)(x, 1, x[:1])


@pytest.mark.parametrize("ndim", [1, 2])
def test_classes_add_one_embedding(ndim, tmp_path):
    """Where the class embeddings are zero, a model with classes is the model without; each class changes its sample."""
    start = torch.random.get_rng_state()
    plain = small(ndim).eval()
    plain_start = torch.random.get_rng_state()
    torch.random.set_rng_state(start)
    model = small(ndim, num_class_embeds=3).eval()
    assert not torch.equal(torch.random.get_rng_state(), plain_start)  # the embedding was drawn, after the rest
    states = plain.state_dict(), model.state_dict()
    assert set(states[1]) - set(states[0]) == {"class_embedding.weight"}
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert model.class_embedding.weight.shape == (4, 4 * SMALL["dim"])

    x, t = torch.randn(4, 3, *(8, 8)[:ndim]), torch.tensor([1, 2, 3, 4])
    labels = torch.arange(4)
    with torch.no_grad():
        out = model(x, t, class_labels=labels).sample
        assert torch.equal(model(x, t).sample, model(x, t, class_labels=torch.full((4,), 3)).sample)
        torch.testing.assert_close(model(x, t).sample[3], out[3])
        assert all((model(x, t).sample[i] - out[i]).norm() > 1e-3 * out[i].norm() for i in range(3))
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(x, t, class_labels=labels).sample, out)
        model.class_embedding.weight.zero_()
        assert torch.equal(model(x, t, class_labels=labels).sample, plain(x, t).sample)


@pytest.mark.parametrize(("ndim", "options"), [(1, {}), (2, {"self_condition": True, "num_class_embeds": 2})])
def test_a_condition_is_further_input(ndim, options, tmp_path):
    """None is a condition of zeros; where its weights are zero, the model is the one without. Saving keeps it."""
    plain, model = small(ndim, **options).eval(), small(ndim, condition_channels=4, **options).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in plain.named_parameters():
            (weights[name][:, : value.shape[1]] if name == "conv_in.weight" else weights[name]).copy_(value)
        x, t, condition = torch.randn(2, 3, *(8, 8)[:ndim]), torch.tensor([1, 2]), torch.randn(2, 4, *(8, 8)[:ndim])
        out = model(x, t, condition=condition).sample
        assert torch.equal(model(x, t).sample, model(x, t, condition=torch.zeros_like(condition)).sample)
        assert (out - model(x, t).sample).norm() > 1e-3 * out.norm()
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(x, t, condition=condition).sample, out)
        model.conv_in.weight[:, -4:] = 0
        torch.testing.assert_close(model(x, t, condition=condition).sample, plain(x, t).sample)
    for wrong in (condition[:, :2], condition[:1]):
        with pytest.raises(ValueError, match=rf"condition must have the shape .*, got \({len(wrong)}, "):
            model(x, t, condition=wrong)
    with pytest.raises(ValueError, match="condition_channels=0"):
        plain(x, t, condition=condition)


def test_labels_that_do_not_fit():
    model, x = small(num_class_embeds=3), torch.randn(2, 3, 8, 8)
    for labels, message in [
        (torch.tensor([0, 4]), r"\[0, 3\].*got 4"),
        (torch.tensor([-1, 0]), "got -1"),
        (torch.tensor([0, 1, 2]), r"\(2,\), got \(3,\)"),
        (torch.tensor([0.0, 1.0]), "whole numbers.*float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(x, 1, class_labels=labels)
    with pytest.raises(ValueError, match="num_class_embeds=None"):
        small()(x, 1, class_labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("ndim", [1, 2])
def test_channels_last_keeps_the_numbers_and_the_file(ndim, tmp_path, double):
    model = small(ndim).eval()
    x = torch.randn(2, 3, *(8, 8)[:ndim])
    with torch.no_grad():
        before = model(x, 5).sample
        assert model.channels_last() is model
        assert model.conv_in.weight.stride(1) == 1
        torch.testing.assert_close(model(x, 5).sample, before, rtol=1e-10, atol=1e-12)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="newer torch")
def test_every_block_is_compiled():
    """Of more widths than torch compiles of one class."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small(sample_size=16, dim=8, dim_mults=(1, 2, 3, 4, 5)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, 5).sample
        model.compile_repeated_blocks(backend=backend)
        torch.testing.assert_close(model(x, 5).sample, expected)
    blocks = [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]
    assert len(graphs) == len(blocks) > 8 * len(model._repeated_blocks)
    torch._dynamo.reset()
