"""The operations that the U-Net dispatches where a graphics card runs it: how many, none that reads, one graph.

The `meta` device stands for the card: it takes the same path through the model, and a read by the host raises there.
PyTorch's fused kernels of a card (RMS norm and attention) do not exist on `meta`, so each is replaced by one operation
in forward and one in backward.
"""

import collections

import pytest
import torch
import torch.nn.functional as F
from helpers import without_a_driver
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.unet import UNet1D, UNet2D


class CountOperations(TorchDispatchMode):
    """Counts the operations that compute: no views, no questions about types and devices."""

    # `_unsafe_view` and `detach` share memory without saying so in their schema
    FREE = ("detach", "_unsafe_view", "lift_fresh", "promote_types", "device")

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        returns = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if not is_view and name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


# The schemas are written out because PyTorch 2.6 does not read `list[torch.Tensor]` from the annotations.
@torch.library.custom_op("ddpm_hf_tests::fused", mutates_args=(), schema="(Tensor[] inputs) -> Tensor")
def fused(inputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(inputs[0])


@torch.library.custom_op(
    "ddpm_hf_tests::fused_backward", mutates_args=(), schema="(Tensor gradient, Tensor[] inputs) -> Tensor[]"
)
def fused_backward(gradient: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(each) for each in inputs]


fused.register_fake(lambda inputs: torch.empty_like(inputs[0]))
fused_backward.register_fake(lambda gradient, inputs: [torch.empty_like(each) for each in inputs])
fused.register_autograd(
    lambda ctx, gradient: fused_backward(gradient, list(ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
)


@pytest.fixture
def card_kernels(monkeypatch):
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: fused([x, weight]))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: fused([q, k, v]))


def on_meta(kind, dtype, **options):
    """A model of the default shape and its inputs, where nothing can be read."""
    with torch.device("meta"):
        model = kind(**options).channels_last()
        x = torch.randn(4, 3, *(64, 64)[: model.ndim], dtype=dtype)
        t = torch.zeros(4, dtype=torch.long)
    return model.to(dtype), x, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "call", "step"), [(UNet2D, 345, 905), (UNet1D, 348, 888)])
def test_few_operations(kind, call, step, dtype, card_kernels):
    """A call, and forward and backward of a step, of the default model.

    In version 0.2.0 these were 509 and 1370 in 2D and float32. What is left are the layers themselves: 57 convolutions,
    56 norms and products of attention, 39 SiLU, 39 linear layers, and 47 sums, of which 28 are skips. The backward pass
    of torch 2.11 has up to 67 more, and that of 2.6 up to 81: on `meta` it copies gradients of convolutions.
    """
    step += 0 if torch.__version__ >= (2, 14) else 67 if torch.__version__ >= (2, 11) else 81
    model, x, t = on_meta(kind, dtype)
    with torch.no_grad(), CountOperations() as counter:
        model(x, t)
    assert counter.count.total() <= call, counter.count
    with CountOperations() as counter:
        model(x, t).sample.sum().backward()
    assert counter.count.total() <= step, counter.count


@pytest.mark.parametrize("options", [
    {}, {"self_condition": True, "norm": "group", "time_embedding": "learned_fourier"},
    {"full_attn": True, "dropout": 0.1, "num_mem_kv": 2, "num_class_embeds": 5},
])  # fmt: skip
@pytest.mark.parametrize("kind", [UNet1D, UNet2D])
def test_nothing_is_read_by_the_host(kind, options):
    """And the gradients are there: the model runs on `meta`, where reading a value raises."""
    model, x, t = on_meta(kind, torch.float32, dim=8, **options)
    assert model(x, t).sample.device.type == "meta"
    model(x, t).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises((RuntimeError, NotImplementedError)):
        t.sum().item()


@without_a_driver
def test_under_autocast_norms_convert_nothing_but_weights():
    """Under bf16 autocast on a card (a fake one here), a norm converts nothing but its weight.

    Each of the default model's 57 convolutions and 30 of its 39 linear layers converts weight and bias, the other 9 a
    weight; 53 norms a weight; 9 attentions their memory; the rest is in the time embedding and at the input.
    """
    model = UNet2D().channels_last()
    fake = FakeTensorMode()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = fake.from_tensor(parameter.detach())
                with fake:
                    module._parameters[name] = torch.nn.Parameter(value.to("cuda"))
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        # `torch.autocast` would switch itself off where there is no card
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with fake, torch.no_grad(), CountOperations() as counter:
            model(torch.randn(4, 3, 64, 64, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda"))
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
    weights = 2 * 57 + 2 * 30 + 9 + 53 + 9
    assert counter.count["_to_copy"] <= weights + 25, counter.count


@pytest.mark.parametrize("kind", [UNet1D, UNet2D])
def test_one_graph_takes_the_whole_model(kind):
    """`torch.compile(fullgraph=True)` finds nothing that it must leave out, in forward and in backward."""
    model = kind(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4, num_mem_kv=2, num_class_embeds=5)
    x, t = torch.randn(2, 3, *(8, 8)[: model.ndim]), torch.tensor([3, 700])
    labels = torch.tensor([5, 0])
    expected = model(x, t, class_labels=labels).sample
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    try:
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, class_labels=labels).sample
        out.square().sum().backward()
    finally:
        torch._dynamo.reset()
    # the same operations in float32, of which some are put together in another order
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6
