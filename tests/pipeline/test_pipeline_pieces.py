"""Large batches in pieces: the same samples, and at most as many samples in each call of the model."""

import pytest
import torch
from test_pipeline import seeds

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline.pieces import ROOM, suggested_batch

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 1, "attn_dim_head": 4}


def counted(pipe):
    """The sizes of the batches that a pipeline's model is called on, as a list that fills."""
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("kind", ["classes", "self_condition", "known", "one generator a sample"])
def test_pieces_give_the_same_samples(kind):
    """With noise in each step, from one generator; labels, estimates and conditions are split as the samples are."""
    torch.manual_seed(0)
    options = {"classes": {"num_class_embeds": 3}, "self_condition": {"self_condition": True}}.get(kind, {})
    if kind == "known":
        unet = UNet1D(16, in_channels=2, condition_channels=4, **SMALL)
        pipe = DDPMPipeline1D(unet, GaussianScheduler(), 3, condition="known")
    else:
        pipe = DDPMPipeline(UNet2D(8, in_channels=1, **options, **SMALL), GaussianScheduler(), 3)
    pipe.set_progress_bar_config(disable=True)
    sizes = counted(pipe)

    def draw():
        generator = seeds(*range(7)) if kind == "one generator a sample" else torch.Generator().manual_seed(1)
        shared = {"generator": generator, "output_type": "pt", "return_dict": False, "eta": 1.0}
        if kind == "known":
            data = torch.linspace(-1, 1, 7 * 32).reshape(7, 2, 16)
            return pipe.inpaint(data, torch.arange(16) > 4, **shared)[0]
        more = {"class_labels": [0, 1, 2, None, 0, 1, 2], "guidance_scale": 2.0} if kind == "classes" else {}
        return pipe(7, **shared, **more)[0]

    whole = draw()
    each = [14 if kind == "classes" else 7] * 3
    assert sizes == each
    pipe.max_batch_size, sizes[:] = 3, []
    pieces = draw()
    assert sizes == ([3, 3, 3, 3, 2] if kind == "classes" else [3, 2, 2]) * 3
    # convolutions of other sizes may sum in another order: an ulp of float32 in each of a few hundred sums
    assert (pieces - whole).abs().max() < 2e-5


def test_the_suggested_size_bounds_the_activations():
    """At 32 px and width 16 it is 64, and it falls with the size, the width and the bytes of a number."""
    unet = UNet2D(32, in_channels=3, dim=16, dim_mults=(1, 2))
    x = torch.zeros(1, 3, 32, 32)
    assert suggested_batch(unet, x) == 64 and ROOM["cpu"] == 2**27
    assert suggested_batch(unet, torch.zeros(1, 3, 64, 64)) == 16
    assert suggested_batch(unet, torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)) == 128
    assert suggested_batch(unet, torch.zeros(1).expand(1, 3, 4096, 4096)) == 1
    assert suggested_batch(torch.nn.Linear(1, 1), x) is None  # a model of another kind
    unet._hf_hook = None  # its weights move between calls
    assert suggested_batch(unet, x) is None


def test_a_large_batch_is_split_by_itself(monkeypatch):
    pipe = DDPMPipeline(UNet2D(8, in_channels=1, **SMALL), GaussianScheduler(), 2)
    sizes = counted(pipe)
    monkeypatch.setitem(ROOM, "cpu", 32 * 8 * 64 * 4 * 4)  # four samples of 8 x 8 at width 8
    assert len(pipe(10).images) == 10 and sizes == [4, 3, 3] * 2


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"])
def test_a_wrong_size_is_refused(value):
    pipe = DDPMPipeline(UNet2D(8, in_channels=1, **SMALL), GaussianScheduler())
    with pytest.raises(ValueError, match="max_batch_size must be a whole number of at least 1, or None; got"):
        pipe.max_batch_size = value
