"""The U-Net is denoising-diffusion-pytorch's, number for number: outputs and gradients of all parameters in float64."""

import pytest
import torch
from cards import tolerance
from conftest import ROOT
from denoising_diffusion_pytorch import Unet, Unet1D
from safetensors.torch import load_file

from ddpm_hf.convert import _convert_weights, _unet_options, from_denoising_diffusion_pytorch, original_name
from ddpm_hf.unet import UNet1D as OurUNet1D
from ddpm_hf.unet import UNet2D as OurUNet2D

# Together they cover each option at least once: init_dim, out_dim, channels 1/3/4/32, self-conditioning, learned
# variance, heads and head sizes, patterns of full attention, time embeddings, sizes that are not square, odd batches.
GRID_2D = [
    ({"dim": 8}, (2, 3, 8, 8)),
    ({"dim": 8, "dim_mults": (1, 2), "channels": 1, "init_dim": 12}, (3, 1, 6, 10)),
    (
        {"dim": 16, "dim_mults": (1, 2, 3), "channels": 4, "self_condition": True, "full_attn": (True, False, True)},
        (1, 4, 4, 8),
    ),
    ({"dim": 8, "dim_mults": (1, 2), "channels": 32, "learned_variance": True, "attn_heads": 2}, (3, 32, 4, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "out_dim": 6, "attn_dim_head": (8, 16), "attn_heads": (1, 3)}, (2, 3, 4, 6)),
    ({"dim": 8, "dim_mults": (2,), "full_attn": True, "dropout": 0.0}, (2, 3, 5, 3)),
    ({"dim": 8, "dim_mults": (1, 2), "learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 8}, (3, 3, 4, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "random_fourier_features": True}, (3, 3, 4, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "sinusoidal_pos_emb_theta": 500}, (3, 3, 4, 4)),
]  # fmt: skip
GRID_1D = [
    ({"dim": 8}, (2, 3, 16)),
    ({"dim": 8, "dim_mults": (1, 2), "channels": 1, "init_dim": 12}, (3, 1, 6)),
    ({"dim": 16, "dim_mults": (1, 2, 3), "channels": 4, "self_condition": True}, (1, 4, 12)),
    ({"dim": 8, "dim_mults": (1, 2), "channels": 32, "learned_variance": True}, (3, 32, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "out_dim": 6, "attn_dim_head": 16, "attn_heads": 2}, (2, 3, 10)),
    ({"dim": 8, "dim_mults": (1, 2), "learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 8}, (3, 3, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "random_fourier_features": True}, (3, 3, 4)),
    ({"dim": 8, "dim_mults": (1, 2), "sinusoidal_pos_emb_theta": 500}, (3, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("ndim,options,shape", [(2, *row) for row in GRID_2D] + [(1, *row) for row in GRID_1D], ids=str)
def test_outputs_and_gradients(ndim, options, shape, device, double):
    peer = (Unet if ndim == 2 else Unet1D)(**options).to(device)
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # fresh gains are all ones
    state = peer.state_dict()
    found = _unet_options(state, ndim, options.get("attn_heads"), None, options.get("learned_variance"), None)
    found["theta"] = options.get("sinusoidal_pos_emb_theta", 10000)
    if options.get("random_fourier_features"):
        found["time_embedding"] = "random_fourier"
    ours = (OurUNet2D if ndim == 2 else OurUNet1D)(**found).to(device)
    ours.load_state_dict(_convert_weights(state, found, ndim))

    x, t = torch.randn(shape).to(device), torch.tensor([3, 0, 999])[: shape[0]].to(device)
    conditions = [None, torch.randn(shape).to(device)] if options.get("self_condition") else [None]
    for condition in conditions:
        extra = {} if condition is None else {"x_self_cond": condition}
        expected, got = peer(x, t, **extra), ours(x, t, **extra).sample
        torch.testing.assert_close(got, expected, **tolerance(device, 1e-10, 1e-12))

    direction = torch.randn_like(expected)
    for out in (expected, got):
        (out * direction).sum().backward()
    theirs = dict(peer.named_parameters())
    stages = len(found["dim_mults"])
    for name, parameter in ours.named_parameters():
        gradient = theirs[original_name(name, ndim, found["norm"], found["full_attn"], stages)].grad
        if gradient is None:
            assert not parameter.requires_grad and parameter.grad is None
            continue
        scale = gradient.abs().max().item()  # relative to the parameter's largest gradient
        torch.testing.assert_close(
            parameter.grad.flatten(),
            gradient.flatten(),
            **tolerance(device, 1e-10, 1e-10 * scale),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", ["2d", "1d"])
def test_the_2023_form(name, device):
    """Group norm, no memory key-values; outputs of version 1.8.0, see fixtures/make_peer_2023.py."""
    data = load_file(ROOT / "tests" / "fixtures" / f"peer_2023_{name}.safetensors", device=str(device))
    state = {key.removeprefix("state."): value for key, value in data.items() if key.startswith("state.")}
    pipe = from_denoising_diffusion_pytorch(state)
    config = pipe.unet.config
    assert (config.norm, config.num_mem_kv) == ("group", 0)
    expected = ("sigmoid", "v_prediction", 20) if name == "2d" else ("cosine", "v_prediction", 50)
    scheduler = pipe.scheduler.config
    assert (scheduler.beta_schedule, scheduler.prediction_type, scheduler.num_train_timesteps) == expected
    with torch.no_grad():
        out = pipe.unet.to(device).double()(data["x"], data["t"], data.get("x_self_cond")).sample
    torch.testing.assert_close(out, data["out"], **tolerance(device, 1e-10, 1e-12))
