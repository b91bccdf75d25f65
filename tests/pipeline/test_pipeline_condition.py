"""Pipelines with paired conditions: what the model is given, units, saved form, graphs, guidance, errors."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from helpers import MODEL, make
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline.pairs import enlarged

UNITS = {"condition_shift": [1.0, 2.0, 3.0], "condition_scale": [2.0, 4.0, 0.5]}
GENERATOR = torch.Generator()


def images(channels=1, classes=None, **options):
    torch.manual_seed(0)
    unet = UNet2D(8, in_channels=1, condition_channels=channels, num_class_embeds=classes, **MODEL)
    return DDPMPipeline(unet, GaussianScheduler(), 3, condition="paired", **{"condition_size": [4, 4], **options})


def sequences(**options):
    torch.manual_seed(0)
    unet = UNet1D(16, in_channels=2, condition_channels=3, self_condition=True, **MODEL)
    given = {"data_shift": [1.0, 2.0], "data_scale": [3.0, 4.0], "condition_size": [8], **UNITS, **options}
    return DDPMPipeline1D(unet, GaussianScheduler(), 3, condition="paired", **given)


def sample(pipe, **options):
    options = {"output_type": "np", "return_dict": False, "generator": GENERATOR.manual_seed(0), **options}
    return pipe(**options)[0]


def seen_by(pipe, **options):
    """Return the conditions that the model is given in a call."""
    seen, forward = [], pipe.unet.forward

    def spy(*args, **kwargs):
        seen.append((args[0].clone(), kwargs["condition"].clone()))
        return forward(*args, **kwargs)

    pipe.unet.forward = spy
    sample(pipe, **options)
    del pipe.unet.forward
    return seen


def test_each_value_is_repeated_along_every_axis():
    x = torch.arange(24.0).reshape(2, 1, 3, 4)
    np.testing.assert_array_equal(enlarged(x, (6, 8)), x.numpy().repeat(2, 2).repeat(2, 3))
    assert torch.equal(enlarged(x, (3, 4)), x)
    assert torch.equal(enlarged(x[0], (12,))[..., ::3], x[0])


def test_images_in_every_form_give_the_model_the_same():
    """8-bit levels, whose values in [-1, 1] are known; x_t is not changed where the condition is positive."""
    pipe, levels = images(), np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
    expected = enlarged(torch.from_numpy(levels / 127.5 - 1).float().movedim(-1, 1), (8, 8))
    forms = [
        [Image.fromarray(level[..., 0]) for level in levels], levels / 255, (levels / 255).astype(np.float32),
        torch.from_numpy(levels / 255).movedim(-1, 1),
    ]  # fmt: skip
    for form in forms:
        seen = seen_by(pipe, condition=form)
        assert len(seen) == 3
        for x_t, condition in seen:
            torch.testing.assert_close(condition, expected, rtol=0, atol=1e-6)
            assert (x_t != 0).all()
    colours = Image.fromarray(np.zeros((4, 4, 3), np.uint8))  # read in the channels of the condition
    assert (seen_by(pipe, condition=colours, batch_size=3)[0][1] == -1).all()
    one = sample(pipe, condition=levels[:1] / 255, batch_size=2)
    twice = sample(pipe, condition=np.concatenate([levels[:1]] * 2) / 255)
    assert np.array_equal(one, twice) and not np.array_equal(one, sample(pipe, condition=levels / 255))


def test_sequences_have_the_units_of_the_condition():
    pipe = sequences()
    x = torch.randn(2, 3, 8, generator=GENERATOR.manual_seed(1), dtype=torch.float64)
    shift, scale = (torch.tensor(UNITS[name])[:, None] for name in ("condition_shift", "condition_scale"))
    for form in (x * scale + shift, (x * scale + shift).numpy(), (x * scale + shift).tolist()):
        for _, condition in seen_by(pipe, condition=form):
            torch.testing.assert_close(condition, enlarged(x.float(), (16,)), rtol=0, atol=1e-6)
    own = images(3, **UNITS)  # images in units of their own, and PIL, which shows the model's [-1, 1]
    own_units = (x[:, :, :4, None] * torch.ones(4) * scale[:, :, None] + shift[:, :, None]).numpy()
    assert seen_by(own, condition=np.moveaxis(own_units, 1, -1))[0][1].min() < -1
    white = Image.fromarray(np.full((4, 4, 3), 255, np.uint8))
    assert (seen_by(own, condition=white)[0][1] == 1).all()


@pytest.mark.parametrize("kind", [images, sequences])
def test_saved_and_loaded_in_every_way(kind, tmp_path):
    pipe = kind()
    condition = torch.rand(2, pipe.unet.config.condition_channels, *pipe.config.condition_size)
    fresh = sample(pipe, condition=condition)
    latents = pipe.encode(fresh, 2, condition=condition)
    pipe.save_pretrained(tmp_path / "a")
    type(pipe).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = [
        type(pipe).from_pretrained(tmp_path / "a"), type(pipe).from_pretrained(tmp_path / "b"),
        DiffusionPipeline.from_pretrained(tmp_path / "b", trust_remote_code=True),
        DiffusionPipeline.from_pretrained(
            tmp_path / "a", custom_pipeline=str(next((tmp_path / "a").glob("pipeline_ddpm_hf_*.py"))),
            trust_remote_code=True,
        ),
    ]  # fmt: skip
    for other in loaded:
        other.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(sample(other, condition=condition), fresh, atol=1e-5)
        torch.testing.assert_close(other.encode(fresh, 2, condition=condition), latents, atol=1e-4, rtol=1e-4)
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert index["condition"] == "paired" and index["condition_size"] == list(pipe.config.condition_size)
    make("images").save_pretrained(tmp_path / "plain")  # others are saved as they were
    assert not any("condition" in key for key in json.loads((tmp_path / "plain" / "model_index.json").read_text()))


def test_schedulers_graphs_and_guidance():
    """A replayed call is the same to the bit, scale 1 too; both halves of a guided call see the condition."""
    pipe, condition = images(classes=3), torch.rand(2, 1, 4, 4)
    plain = sample(pipe, condition=condition, class_labels=[0, 2])
    assert np.array_equal(plain, sample(pipe.use_cuda_graphs(), condition=condition, class_labels=[0, 2]))
    assert np.array_equal(plain, sample(pipe, condition=condition, class_labels=[0, 2], guidance_scale=1.0))
    for x_t, seen in seen_by(pipe.use_cuda_graphs(False), condition=condition, class_labels=[0, 2], guidance_scale=2):
        assert len(x_t) == 4 and torch.equal(seen[:2], seen[2:])
    rescaled = sample(pipe, condition=condition, class_labels=1, guidance_scale=3, guidance_rescale=0.7)
    assert np.isfinite(rescaled).all() and len(rescaled) == 2
    torch.manual_seed(1)
    guide = UNet2D(8, in_channels=1, condition_channels=1, **MODEL)
    guided = sample(pipe, condition=condition, class_labels=1, guide=guide, guidance_scale=2)
    assert not np.array_equal(guided, sample(pipe, condition=condition, class_labels=1))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert sample(pipe, condition=condition, return_all_timesteps=True).shape == (2, 8, 8, 1)
    assert sample(pipe.use_fast_sampler(2), condition=condition, num_inference_steps=2).shape == (2, 8, 8, 1)


def test_variations_of_given_images_have_the_condition_of_each():
    pipe, condition = images(), torch.rand(2, 1, 4, 4)
    given = {"image": torch.rand(2, 1, 8, 8), "strength": 0.9, "num_samples": 2}
    expected = enlarged(condition.repeat_interleave(2, dim=0) * 2 - 1, (8, 8))
    for form in (condition, condition.repeat_interleave(2, dim=0)):
        torch.testing.assert_close(seen_by(pipe, condition=form, **given)[0][1], expected, rtol=0, atol=1e-6)


def test_calls_that_do_not_fit():
    def refused(message, pipe, **options):
        with pytest.raises(ValueError, match=message):
            sample(pipe, **options)

    pipe, c = images(), torch.rand(2, 1, 4, 4)
    refused(r"condition must be given to this model, 1 channels of the size \(4, 4\); got None", pipe)
    refused(r"of the size \(4, 4\).* for each of 3; got 2 of the size \(4, 4\)", pipe, condition=c, batch_size=3)
    refused(r"got 1 of the size \(8, 8\)", pipe, condition=torch.rand(1, 1, 8, 8))
    refused(r"with 1 channels; got \(1, 2, 4, 4\)", pipe, condition=torch.rand(1, 2, 4, 4))
    refused("with 1 channels; got str", pipe, condition="x.png")
    refused("condition must be finite", pipe, condition=c * torch.nan)
    refused(r"condition must lie in \[0, 1\], got -1 to -1", pipe, condition=0 * c - 1)
    refused(r"images of one size, got \[\(4, 4\), \(5, 4\)\]", pipe, condition=[Image.new("L", (n, 4)) for n in (4, 5)])
    refused(r"shape \(B, 3, length\), got \(2, 2, 8\)", sequences(), condition=np.zeros((2, 2, 8)))
    refused("condition must be an array or tensor, got str", sequences(), condition="x")
    refused("condition needs a model that was trained with paired conditions", make("images"), condition=c)


def test_constructors_that_do_not_fit():
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            images(3, **options)

    for size in ([3, 4], [4], [5, 5], [0, 0], [8, 4], [4.0, 4.0]):
        refused(r"condition_size must be the model's sample_size, \[8, 8\], or", condition_size=size)
    assert images(condition_size=None).config.condition_size == [8, 8]
    refused(r"condition_scale must be one finite number per channel \(3\), got \[1.0\]", condition_scale=[1.0])
    refused("condition_scale must be at least 0", condition_scale=[1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="condition must be 'known', 'paired' or None, got 'half'"):
        DDPMPipeline(make("images").unet, GaussianScheduler(), condition="half")
    with pytest.raises(ValueError, match="condition='paired' needs a model with condition_channels, got 0"):
        DDPMPipeline(make("images").unet, GaussianScheduler(), condition="paired")
    with pytest.raises(ValueError, match=r"condition_size must be None without condition='paired', got \[4, 4\]"):
        DDPMPipeline(make("images").unet, GaussianScheduler(), condition_size=[4, 4])
