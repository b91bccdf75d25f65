"""Longer series and larger images: windows that are denoised together, and windows one after the other.

On a Gaussian series the exact denoiser is linear, so the samples of windows are a linear map of the noise, which is
computed here beside the pipeline.
"""

import itertools
import weakref

import diffusers
import pytest
import torch
from conftest import exact_abar
from diffusers import ModelMixin  # loading looks for it among this module's names
from test_pipeline import images, seeds, sequences
from test_pipeline_pieces import counted

from ddpm_hf import DDPMPipeline1D, GaussianScheduler, UNet1D
from ddpm_hf.pipeline.windows import cover, over_windows, window_starts

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}
WINDOW, OVERLAP = 16, 8


def covariance(length, correlation=0.8):
    """The covariance of an autoregressive series, with variance 1 and of which neighbours correlate."""
    place = torch.arange(length)
    return (correlation ** (place[:, None] - place).abs()).double()


class Series(ModelMixin, diffusers.ConfigMixin):
    """The exact epsilon of windows of the series, and given what is known in them if `condition_channels` is 2."""

    config_name, ndim = "config.json", 1

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=WINDOW, in_channels=1, condition_channels=0):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.abar, self.calls, self.outputs = None, [], []

    def forward(self, sample, timestep, condition=None):
        n = sample.shape[-1]
        self.calls.append(tuple(sample.shape))
        a, total, known = self.abar[int(timestep)], covariance(n), torch.zeros(n, dtype=torch.bool)
        mean = torch.zeros_like(sample)
        if condition is not None:
            values, where = condition.chunk(2, dim=1)
            known = where[0, 0] > 0
            gain = total[:, known] @ torch.linalg.inv(total[known][:, known])
            mean = values[..., known] @ gain.T
            total = total - gain @ total[known]
        noised = a * total + (1 - a) * torch.eye(n)
        epsilon = (1 - a).sqrt() * (sample - a.sqrt() * mean) @ torch.linalg.inv(noised)
        self.outputs.append(weakref.ref(epsilon))
        return diffusers.utils.BaseOutput(sample=epsilon)


def series(condition=None, steps=100):
    own = GaussianScheduler(1000, prediction_type="epsilon", clip_sample=False)
    pipe = DDPMPipeline1D(Series(condition_channels=2 if condition else 0), own, steps, condition=condition)
    pipe.unet.abar = exact_abar(own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def joint_map(own, steps, length, correlation=0.8, equal=False):
    """The matrix that takes noise to samples, for DDIM steps with averaged predictions, written out anew."""
    own.set_timesteps(steps)
    abar = [*exact_abar(own)[own.timesteps].tolist(), 1.0]
    places = [slice(s, s + WINDOW) for s in range(0, length - WINDOW + 1, WINDOW - OVERLAP)]
    weight = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, 3, 2, 1], dtype=torch.float64) ** (0 if equal else 4)
    whole = torch.eye(length, dtype=torch.float64)
    result, one = whole, torch.eye(WINDOW, dtype=torch.float64)
    for a, b in itertools.pairwise(abar):
        epsilon = (1 - a) ** 0.5 * torch.linalg.inv(a * covariance(WINDOW, correlation) + (1 - a) * one)
        average, total = torch.zeros_like(whole), torch.zeros(length, 1, dtype=torch.float64)
        for place in places:
            average[place, place] += weight[:, None] * epsilon
            total[place] += weight[:, None]
        average = average / total
        x0 = (whole - (1 - a) ** 0.5 * average) / a**0.5
        result = (b**0.5 * x0 + (1 - b) ** 0.5 * average) @ result
    return result


# ---------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("length,overlap", [(16, 8), (17, 1), (40, 8), (41, 15), (100, 3)])
def test_windows_cover_a_length(length, overlap):
    starts = window_starts(length, WINDOW, overlap)
    assert starts[0] == 0 and starts[-1] == length - WINDOW
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(gap == WINDOW - overlap for gap in gaps[:-1]) and all(0 < gap <= WINDOW - overlap for gap in gaps)


def test_the_weights_sum_to_one(double):
    """In two dimensions too: windows that predict what they are given predict it for the whole."""
    windows, x = cover((13, 22), (8, 6), (3, 4)), torch.randn(3, 2, 13, 22)
    asked = []

    def call(sample, t, class_labels=None):
        asked.append((sample, class_labels))
        return torch.cat((sample, sample * class_labels[:, None, None, None]), dim=1)  # as with a learned variance

    labels = torch.tensor([1, 2, 3])
    out = over_windows(call, windows)(x, torch.tensor(5), class_labels=labels)
    assert torch.allclose(out[:, :2], x) and torch.allclose(out[:, 2:], x * labels[:, None, None, None])
    assert len(asked) == 1 and asked[0][0].shape == (3 * len(windows.places), 2, 8, 6)


def test_the_weights_have_the_digits_of_float64():
    """With an overlap of 3, whose thirds no float32 holds."""
    shares = torch.tensor([1, 2, 3, 3, 3, 3, 2, 1], dtype=torch.float64) / 3
    assert torch.allclose(cover((19,), (8,), (3,)).weights, shares**4, rtol=1e-14, atol=0)


def test_windows_in_half_precision_have_no_empty_edge():
    """The weight at an edge is too small for float16, but its share at the edge of the whole is 1."""
    windows = cover((600,), (256,), (128,))
    x = torch.randn(1, 1, 600).half()
    assert torch.allclose(over_windows(lambda x, t: x, windows)(x, 0), x, atol=2e-3)


# ---------------------------------------------------------------------------------------------
# Windows together


def test_joint_samples_are_the_map_of_the_algorithm(double):
    pipe, length = series(), 64
    x = torch.randn(2, 1, length)
    out = pipe(2, latents=x, length=length, output_type="pt").sequences
    assert torch.allclose(out, x @ joint_map(pipe.scheduler, 100, length).T, atol=1e-9)
    assert pipe.unet.calls == [(2 * 7, 1, WINDOW)] * 100


@pytest.mark.parametrize("correlation,slack,bound", [(0.8, 0.02, 0.08), (0.95, 0.1, 0.22)])
def test_jumps_at_the_seams_are_those_inside_of_windows(double, correlation, slack, bound):
    """And the covariance across the seams is near the true one; with equal weights neither is so.

    The law of the samples is computed, not sampled. At 250 steps one window alone has the covariance to 0.02 or 0.031.
    """
    own, length = GaussianScheduler(1000), 64
    true, starts = covariance(length, correlation), window_starts(length, WINDOW, OVERLAP)
    seams = torch.tensor(sorted({*starts[1:], *(s + WINDOW for s in starts[:-1])})) - 1

    def law(equal):
        m = joint_map(own, 250, length, correlation, equal)
        c = m @ m.T
        jumps = c.diagonal()[1:] + c.diagonal()[:-1] - 2 * c.diagonal(1)
        inside = torch.ones(length - 1, dtype=torch.bool)
        inside[seams] = False
        near = torch.cat([(c - true).diagonal(lag) for lag in range(5)]).abs().max()
        return jumps[seams].max() / jumps[inside].max(), near

    ratio, near = law(equal=False)
    equal_ratio, equal_near = law(equal=True)
    assert ratio < 1 + slack and equal_ratio > 1.5
    # A window knows nothing of what lies outside of it, so the longer the correlations are the larger is the error.
    assert near < bound < equal_near


@pytest.mark.parametrize("guided", [False, True])
def test_each_series_has_its_own_class_and_estimates(guided):
    """One generator a sample: a series does not depend on the others, with classes, self-conditioning and a guide."""
    torch.manual_seed(0)
    unet = UNet1D(16, in_channels=1, num_class_embeds=3, self_condition=True, **SMALL)
    weaker = UNet1D(16, in_channels=1, num_class_embeds=3, self_condition=True, **SMALL)
    pipe = DDPMPipeline1D(unet, GaussianScheduler(), 3)
    pipe.set_progress_bar_config(disable=True)
    options = {"length": 40, "guidance_scale": 2.0, "output_type": "pt", "guide": weaker if guided else None}
    both = pipe(class_labels=[0, 2], generator=seeds(1, 2), **options).sequences
    for i, label in enumerate((0, 2)):
        alone = pipe(class_labels=label, generator=seeds(i + 1), **options).sequences
        assert torch.allclose(both[i], alone[0], atol=1e-4)
    assert not torch.allclose(both[0], pipe(class_labels=1, generator=seeds(1), **options).sequences[0], atol=1e-3)


# ---------------------------------------------------------------------------------------------
# Window after window


def test_sequential_windows_have_the_law_of_the_series(double):
    """The series is Markov, so what follows a window is exact with the exact model, but for the steps' own error.

    The covariance, of 4,000 series, lies within five standard errors and the 0.05 that one window has at 100 steps.
    """
    x = series("known")(4000, length=40, method="sequential", generator=seeds(0)[0], output_type="pt").sequences[:, 0]
    error = (torch.cov(x.T) - covariance(40)).abs()
    assert error.max() < 5 * (2 / 4000) ** 0.5 + 0.05
    jumps = (x[:, 1:] - x[:, :-1]).var(dim=0) / (2 - 2 * 0.8)
    assert (jumps - 1).abs().max() < 5 * (2 / 4000) ** 0.5 + 0.1


def test_a_stream_goes_on_in_the_same_memory():
    """Blocks come for as long as they are taken; the model sees one window at a time, and nothing of before is kept."""
    pipe = series("known", steps=2)
    alive = []
    stream = pipe.stream(batch_size=3, overlap=4, output_type="pt")
    for number, block in enumerate(itertools.islice(stream, 30)):
        assert block.shape == (3, 1, 12 if number else WINDOW) and block.isfinite().all()
        alive.append(weakref.ref(block))
        held = sum(each() is not None for each in [*alive[:-1], *pipe.unet.outputs])
        assert held <= 3
    assert set(pipe.unet.calls) == {(3, 1, WINDOW)} and len(pipe.unet.calls) == 60


def test_a_stream_is_the_sequential_call():
    pipe = sequences()
    whole = pipe(2, 2, length=37, method="sequential", overlap=5, generator=seeds(1)[0]).sequences
    blocks = list(pipe.stream(37, 2, 2, overlap=5, generator=seeds(1)[0]))
    assert [block.shape[-1] for block in blocks] == [16, 11, 10]
    assert (torch.cat([torch.from_numpy(block) for block in blocks], dim=-1).numpy() == whole).all()


@pytest.mark.parametrize("method", ["sequential", "joint"])
@pytest.mark.parametrize("n,length", [(3, 9), (3, 40), (50, 90)])
def test_a_recording_is_continued(method, n, length):
    """It is in the result as it was given, and each continuation follows from it and from its own generator."""
    pipe, known = sequences(), 3 + 2 * torch.randn(2, 2, n, dtype=torch.float64)
    options = {"num_inference_steps": 2, "method": method, "jump_n_sample": 2}
    out = pipe.extend(known, length, num_samples=2, generator=seeds(1, 2, 3, 4), **options).sequences
    assert out.shape == (4, 2, length) and (out[..., :n] == known.repeat_interleave(2, dim=0).numpy()).all()
    alone = pipe.extend(known[1:], length, generator=seeds(4), output_type="pt", **options).sequences
    assert (alone[0] - torch.from_numpy(out[3])).abs().max() < 1e-3
    assert abs(out[0] - out[1])[:, n:].max() > 0.01


def test_a_continuation_has_the_conditional_law(double):
    """Given the last value v, the one h later has the mean 0.8^h v and the variance 1 - 0.8^(2h)."""
    known = torch.full((1, 1, 20), 2.0)
    out = series("known").extend(known, 40, num_samples=4000, generator=seeds(0)[0], output_type="pt").sequences[:, 0]
    for lag in (1, 4, 12, 20):
        mean, variance = 2 * 0.8**lag, 1 - 0.8 ** (2 * lag)
        assert abs(out[:, 19 + lag].mean() - mean) < 5 * (variance / 4000) ** 0.5 + 0.05
        assert abs(out[:, 19 + lag].var() / variance - 1) < 5 * (2 / 4000) ** 0.5 + 0.1


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda p: p(length=0), "length must be a whole number of at least 1, got"),
        (lambda p: p(length=40.0), "length must be a whole number"),
        (lambda p: p(length=15), r"length must be at least the size that the model was trained on, \(16,\)"),
        (lambda p: p(length=40, overlap=16), r"overlap must be .* less than the window, \(16,\); got 16"),
        (lambda p: p(length=40, overlap=0), "overlap must be"),
        (lambda p: p(length=40, overlap="8"), "overlap must be"),
        (lambda p: p(length=40, method="windows"), "method must be one of .*sequential"),
        (lambda p: p(length=40, method="single", overlap=8), "overlap is of windows"),
        (lambda p: p(method="joint"), "method and overlap need length"),
        (lambda p: p(length=40, latents=torch.zeros(1, 2, 16)), r"latents must be a tensor of the shape \(1, 2, 40\)"),
        (lambda p: p(length=40, method="sequential", latents=torch.zeros(1, 2, 40)), "latents need one chain"),
        (lambda p: p(length=40, sequence=torch.zeros(1, 2, 16)), "sequence has a size of its own"),
        (lambda p: p.stream(0), "length must be a whole number of at least 1, or None; got 0"),
        (lambda p: p.stream(overlap=16), "overlap must be .* less than the window, 16; got 16"),
        (lambda p: p.stream(jump_n_sample=0), "jump_n_sample must be"),
        (lambda p: p.stream(num_inference_steps=0), "num_inference_steps must be"),
        (lambda p: p.extend(torch.zeros(1, 2, 20), 20), "more than the length of known, 20; got 20"),
        (lambda p: p.extend(torch.zeros(1, 2, 0), 20), "known must have at least one value"),
        (lambda p: p.extend(torch.full((1, 2, 20), torch.nan), 30), "known must be finite"),
        (lambda p: p.extend(torch.zeros(2, 20), 30), "known must have the shape"),
        (lambda p: p.extend(torch.zeros(1, 2, 20), 30, method="single"), "method must be 'sequential' or 'joint'"),
        (lambda p: p.extend(torch.zeros(1, 2, 20), 30, num_samples=0), "num_samples must be"),
    ],
)
def test_wrong_sizes_are_refused_before_the_model_is_called(call, message):
    pipe = sequences()
    calls = counted(pipe)
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert not calls


def test_images_and_models_without_a_size_are_refused_what_they_lack():
    with pytest.raises(ValueError, match=r"method must be one of \('single', 'joint'\)"):
        images(1)(height=20, method="sequential")
    with pytest.raises(ValueError, match="height and width must be at least"):
        images(1)(height=20, width=7)
    free = DDPMPipeline1D(UNet1D(in_channels=2, **SMALL), GaussianScheduler(), 2)
    assert free(length=12).sequences.shape == (1, 2, 12)
    for call in (lambda: free(length=40, method="joint"), lambda: free.stream()):
        with pytest.raises(ValueError, match="windows need the model's sample_size"):
            call()
    stock = sequences()
    stock.scheduler = diffusers.DDIMScheduler.from_config(stock.scheduler.config)
    with pytest.raises(ValueError, match="RePaint, whose jumps need GaussianScheduler"):
        stock.stream()
    assert stock(length=40).sequences.shape == (1, 2, 40)
