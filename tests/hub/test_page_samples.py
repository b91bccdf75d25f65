"""What the page draws: samples, their frames, classes and conditions, interpolation, and longer series."""

import io
import tracemalloc
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from helpers import MODEL, make, paired
from PIL import Image

from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D
from ddpm_hf.hub.page import build_page
from ddpm_hf.hub.page_model import (
    EVERY_CLASS,
    FAST,
    MOST_BYTES,
    MOST_SAMPLES,
    NO_CLASS,
    OWN,
    STOCK,
    Page,
    between,
    generator_of,
)


@pytest.mark.parametrize("sampler", [OWN, FAST, *STOCK])
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_every_sampler(kind, sampler):
    pipe = make(kind)
    own, page = pipe.scheduler, Page(pipe)
    with pytest.raises(gr.Error):
        page.generate(3, 4, FAST, 5, eta=0.5)  # a mistake leaves nothing behind
    picture, trajectory, slider, frame = page.generate(3, 4, sampler, 5, 0)
    again = page.generate(3, 4, sampler, 5, 0)
    assert np.array_equal(picture, again[0]) and np.array_equal(picture, frame)
    assert len(trajectory) == 3 and slider.maximum == trajectory.shape[1] - 1 and pipe.scheduler is own
    assert np.array_equal(page.look_back(trajectory, slider.maximum), picture)
    # the first sample does not depend on how many there are
    fewer = page.generate(1, 4, sampler, 5, 0)[1]
    # but for float32's rounding of the largest values on the way: Heun's first ones are thousands here
    rounding = 1.01 if kind == "images" else 1e-4 + 1e-5 * np.abs(trajectory[0]).max()
    assert np.allclose(fewer[0].astype(float), trajectory[0].astype(float), atol=rounding)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_frames_are_kept_as_far_as_memory_is_allowed(kind, monkeypatch):
    """All of them are the pipeline's own trajectory; fewer are spread evenly over it, from noise to samples."""
    pipe = make(kind)
    page = Page(pipe)
    _, all_frames, slider, _ = page.generate(3, 9, OWN, 5, 0)
    generators = [generator_of(5, i) for i in range(3)]
    _, expected = pipe(3, num_inference_steps=9, generator=generators, output_type="np", return_all_timesteps=True,
                       return_dict=False)  # fmt: skip
    expected = (expected * 255).round().astype(np.uint8) if kind == "images" else expected
    assert np.array_equal(all_frames, expected) and slider.label == "Steps done"
    monkeypatch.setattr("ddpm_hf.hub.page_model.MOST_BYTES", 4 * all_frames[:, 0].nbytes)
    picture, frames, slider, _ = page.generate(3, 9, OWN, 5, 0)
    assert np.array_equal(frames, expected[:, [0, 3, 6, 9]]) and slider.label == "Frame (4 kept of 9 steps)"
    assert np.array_equal(page.look_back(frames, slider.maximum), picture)


class Still(torch.nn.Module):
    """A model of no cost, for samples of any size."""

    def __init__(self, channels, size):
        super().__init__()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = FrozenDict(in_channels=channels, sample_size=size)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_memory_is_bounded():
    """64 samples of 64 x 64 pixels: frames of all 120 steps would have 95 MB in 8 bits, four times that in floats."""
    pipe = make("images")
    pipe.register_modules(unet=Still(3, 64))
    page = Page(pipe)
    tracemalloc.start()
    try:
        picture, frames, slider, _ = page.generate(64, 120, "DDIMScheduler", 0, 0)
        most = tracemalloc.get_traced_memory()[1]  # of arrays; tensors are not counted
    finally:
        tracemalloc.stop()
    assert frames.shape == (64, 63, 64, 64, 3) and slider.maximum == 62
    assert frames.nbytes <= MOST_BYTES and most < 2 * MOST_BYTES + 20e6
    file = io.BytesIO()
    picture.save(file, "png")
    assert file.tell() < 3e6


def test_of_large_samples_fewer_are_allowed():
    pipe = make("images")
    pipe.register_modules(unet=Still(3, 512))
    page = Page(pipe)
    assert (page.most_samples, page.most_points) == (10, 10)
    with pytest.raises(gr.Error, match="samples must be a whole number from 1 to 10, got 11"):
        page.generate(11, 2, OWN, 0, 0)
    assert page.generate(1, 2, "DDIMScheduler", 0, 0)[0].size == (514, 514)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 0}, "samples must be a whole number from 1 to 64, got 0"),
        ({"count": 2.5}, "got 2.5"),
        ({"count": None}, "got nothing"),
        ({"count": "4"}, "got 4"),
        ({"steps": float("nan")}, "got nan"),
        ({"seed": float("inf")}, "got inf"),
        ({"eta": None}, "eta must lie in 0 to 1, got nothing"),
        ({"steps": 1001}, "steps must be a whole number from 1 to 1000"),
        ({"count": 64, "steps": 1000}, "samples x steps must be at most 16,000, got 64 x 1000"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"eta": 2}, "eta must lie in 0 to 1, got 2"),
        ({"eta": 0.5, "sampler": "UniPCMultistepScheduler"}, "eta is an option of DDIM"),
        ({"sampler": "Other"}, "sampler must be one of the list, got Other"),
    ],
)
def test_bad_values(change, says):
    fields = {"count": 1, "steps": 2, "sampler": OWN, "seed": 0, "eta": 0, **change}
    with pytest.raises(gr.Error, match=says):
        Page(make("images")).generate(**fields)
    with pytest.raises(gr.Error, match="generate samples first"):
        Page(make("images")).look_back(None, 0)


def conditional():
    """A pipeline of images with three classes, two of which look alike to a menu."""
    unet = UNet2D(sample_size=8, in_channels=1, num_class_embeds=3, **MODEL)
    names = {0: "owl", 1: EVERY_CLASS, 2: "7"}
    return DDPMPipeline(unet, GaussianScheduler(), num_inference_steps=3, id2label=names)


def test_classes_and_guidance():
    """What the page draws is what the pipeline draws for these classes and this scale."""
    pipe = conditional()
    page = Page(pipe)
    for chosen, scale, labels in ((EVERY_CLASS, 1, [0, 1, 2, 0]), (2, 2.5, [2] * 4), (NO_CLASS, 1, [None] * 4)):
        _, frames, _, _ = page.generate(4, 3, OWN, 5, 0, chosen, scale)
        generators = [generator_of(5, i) for i in range(4)]
        (expected,) = pipe(4, generator=generators, output_type="np", return_dict=False, class_labels=labels,
                           guidance_scale=scale)  # fmt: skip
        assert np.array_equal(frames[:, -1], (expected * 255).round().astype(np.uint8))
    walks = [page.interpolate(0, 1, 3, 3, OWN, chosen, 2.0) for chosen in (EVERY_CLASS, 0, 2)]
    assert np.array_equal(walks[0], walks[1]) and not np.array_equal(walks[0], walks[2])
    for chosen, scale, message in (
        (3, 1, "class must be a whole number from 0 to 2, got 3"),
        (0, -0.1, "guidance scale must lie in 0 to 10, got -0.1"),
        (0, None, "got nothing"),
    ):
        with pytest.raises(gr.Error, match=message):
            page.generate(4, 3, OWN, 5, 0, chosen, scale)
    with pytest.raises(gr.Error, match="at most 8,000 with guidance, got 64 x 126"):
        page.generate(64, 126, OWN, 5, 0, 0, 2.0)


def test_the_menu_of_classes():
    """It is shown for a model with classes; a class may have the name of another entry."""
    for pipe, visible in ((conditional(), True), (make("images"), False)):
        page = build_page(pipe, "x")
        assert not page.analytics_enabled
        parts = page.blocks.values()
        (menu,) = [part for part in parts if getattr(part, "elem_id", None) == "class"]
        assert menu.visible is visible
        if visible:
            assert menu.choices[2:] == [("owl", 0), (EVERY_CLASS, 1), ("7", 2)]


@pytest.mark.parametrize("kind", ["images", "own units", "csv", "npy"])
def test_samples_of_an_uploaded_condition(kind, tmp_path):
    """What the page draws is what the pipeline draws for this condition, brought to its size if it is an image."""
    pipe = paired("images" if kind in ("images", "own units") else "sequences", kind == "own units")
    page, columns = Page(pipe), ""
    if page.is_image:
        given = Image.new("RGBA", (40, 60), (51, 102, 204, 255))
        levels = np.array([0.2, 0.4, 0.8])
        condition = np.ones((1, 4, 4, 3)) * (levels if kind == "images" else (levels * 2 - 1) * 2 + [1, 2, 3])
    else:
        rows = np.random.default_rng(0).normal(size=(20, 3)) + 5
        condition, given, columns = rows[-8:, [2, 0]].T[None], str(tmp_path / f"x.{kind}"), "c,a"
        if kind == "csv":
            np.savetxt(given, rows, delimiter=",", header="a,b,c", comments="")
        else:
            np.save(given, condition[0])
    _, frames, _, picture = page.generate(3, 3, OWN, 5, 0, EVERY_CLASS, 1.0, given, columns)
    options = {"generator": [generator_of(5, i) for i in range(3)], "output_type": "np", "return_dict": False}
    (expected,) = pipe(3, condition=condition.astype(np.float32), **options)
    expected = (expected * 255).round().astype(np.uint8) if page.is_image else expected
    np.testing.assert_allclose(frames[:, -1].astype(float), expected, rtol=0, atol=1 if page.is_image else 1e-4)
    assert page.interpolate(0, 1, 3, 3, OWN, EVERY_CLASS, 1.0, given, columns).size[0] > 200
    with pytest.raises(gr.Error, match="upload it first"):
        page.generate(3, 3, OWN, 5, 0)
    if kind == "npy":
        for wrong, says in (
            (condition[0, :1], r"of the shape \(2, 8\), got float64 of the shape \(1, 8\)"),
            (condition[0] * np.nan, "finite"),
        ):
            np.save(given, wrong)
            with pytest.raises(gr.Error, match=says):
                page.generate(3, 3, OWN, 5, 0, EVERY_CLASS, 1.0, given)


def test_between_two_noises():
    """The ends are the ends; every point has the norm of its place on the circle; halves are as far from either end."""
    a, b = (torch.randn(2, 40, generator=generator_of(s, 0), dtype=torch.float64) for s in (1, 2))
    b *= a.norm() / b.norm()
    line = between(a, b, 5)
    assert torch.allclose(line[0], a, atol=1e-12) and torch.allclose(line[-1], b, atol=1e-12)
    assert torch.allclose(line.flatten(1).norm(dim=1), a.norm().expand(5), rtol=1e-12)
    angles = [torch.nn.functional.cosine_similarity(x.flatten(), line[2].flatten(), dim=0) for x in (a, b)]
    assert torch.allclose(*angles, rtol=1e-12)


def test_seeds_share_no_noise():
    last, first = (torch.randn(4, generator=generator_of(*which)) for which in ((0, MOST_SAMPLES - 1), (1, 0)))
    assert not torch.equal(last, first)


def test_a_series_of_a_length(monkeypatch):
    """The length goes to the pipeline; a length, or more work than a click may ask for, is refused."""
    page = Page(make("sequences"))
    drawn_series = []
    monkeypatch.setattr("ddpm_hf.hub.page_model.plots", lambda samples, *_, **__: drawn_series.append(samples))
    for seed in (0, 0, 1):
        page.longer(40, 2, OWN, seed, 0)
    assert drawn_series[0].shape == (1, 2, 40)
    assert np.array_equal(*drawn_series[:2]) and not np.array_equal(drawn_series[0], drawn_series[2])
    for length, steps, says in ((15, 2, "from 16 to 320, got 15"), (321, 2, "got 321"), (320, 999, "at most 400")):
        with pytest.raises(gr.Error, match=says):
            page.longer(length, steps, OWN, 0, 0)
    found = {getattr(part, "elem_id", None) for part in build_page(make("images"), "x").blocks.values()}
    assert "length" not in found


def test_a_series_of_a_condition_that_is_longer_too(tmp_path, monkeypatch):
    """The condition has the share of the length that it had in training: 8 values for each 16 of the series."""
    pipe = paired("sequences")
    page, rows, calls = Page(pipe), np.random.default_rng(0).normal(size=(30, 2)), []
    np.savetxt(tmp_path / "x.csv", rows, delimiter=",")
    call = type(pipe).__call__

    def asked(self, *args, **options):
        calls.append(options)
        return call(self, *args, **options)

    monkeypatch.setattr(type(pipe), "__call__", asked)
    page.longer(40, 2, OWN, 0, 0, EVERY_CLASS, 1.0, str(tmp_path / "x.csv"))
    assert np.allclose(calls[0]["condition"], rows[-20:].T) and calls[0]["length"] == 40
    for length, says in ((64, "at least 32 rows, got 30"), (41, "a multiple of 2")):
        with pytest.raises(gr.Error, match=says):
            page.longer(length, 2, OWN, 0, 0, EVERY_CLASS, 1.0, str(tmp_path / "x.csv"))


def test_channels_have_axes_of_their_own(monkeypatch):
    """A channel of small values would be a flat line beside one of large values; many samples share axes, for speed."""
    kept = []
    monkeypatch.setattr("ddpm_hf.hub.page_model.drawn_figure", kept.append)
    page = Page(make("sequences"))
    for count, lines in ((3, 1), (19, 2)):
        samples = np.random.default_rng(0).normal(size=(count, 2, 16)) * [[1], [1000]]
        page.picture(samples)
        shown = [axis for axis in kept[-1].axes if axis.get_visible()]
        assert [len(axis.lines) for axis in shown] == [lines] * (count * 2 // lines)
    first = kept[0].axes
    assert first[0].get_ylim() == first[1].get_ylim() and first[0].get_ylim()[1] < 10 < first[2].get_ylim()[1]
