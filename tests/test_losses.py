"""The objective: targets, weights, draws, immiscible noise, self-conditioning."""

import itertools
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cards import tolerance
from conftest import exact_abar
from diffusers.models.unets.unet_2d import UNet2DOutput
from helpers import OnDevice
from scipy.special import logit
from scipy.stats import norm
from torch import nn

from ddpm_hf import DDPMPipeline1D, TrainConfig, UNet1D
from ddpm_hf.losses import diffusion_loss, drop_labels, first_step_warning, immiscible_assignment, training_draws
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.scheduler import PREDICTION_TYPES, GaussianScheduler


class Spy:
    """A model that gives a fixed output and remembers its inputs."""

    def __init__(self, output):
        self.output, self.calls = output, []

    def __call__(self, x_t, t, x_self_cond=None, class_labels=None, condition=None):
        call = {"x_t": x_t, "t": t, "x_self_cond": x_self_cond, "class_labels": class_labels, "condition": condition}
        self.calls.append(SimpleNamespace(**call, grad=torch.is_grad_enabled()))
        return SimpleNamespace(sample=self.output)


@pytest.fixture
def batch():
    return SimpleNamespace(
        x0=torch.rand(6, 2, 4, dtype=torch.float64) * 2 - 1,
        noise=torch.randn(6, 2, 4, dtype=torch.float64),
        t=torch.tensor([0, 10, 200, 500, 900, 999]),
        out=torch.randn(6, 2, 4, dtype=torch.float64),
    )


@pytest.mark.parametrize("target,gamma", list(itertools.product(PREDICTION_TYPES, [None, 5.0])))
def test_loss_by_hand(batch, target, gamma, device):
    """weight(t) * mean((output - target)^2), written out sample by sample."""
    s = GaussianScheduler(prediction_type=target)
    batch = SimpleNamespace(**{name: value.to(device) for name, value in vars(batch).items()})
    kept = {name: value.clone() for name, value in vars(batch).items()}
    model = Spy(batch.out)
    got = diffusion_loss(model, s, batch.x0, batch.t, batch.noise, min_snr_gamma=gamma).loss
    for i, t in enumerate(batch.t.tolist()):
        abar = exact_abar(s)[t].item()
        a, b = abar**0.5, (1 - abar) ** 0.5
        snr = abar / (1 - abar)
        x0, eps = batch.x0[i], batch.noise[i]
        wanted = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[target]
        clipped = min(snr, gamma) if gamma else snr
        weight = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[target]
        assert got[i].item() == pytest.approx(weight * ((batch.out[i] - wanted) ** 2).mean().item(), rel=1e-10)
        torch.testing.assert_close(model.calls[0].x_t[i], a * x0 + b * eps, **tolerance(device, 1e-12, 1e-12))
    for name, value in kept.items():
        assert torch.equal(getattr(batch, name), value), f"{name} was changed"


def test_uniform_weights_are_one(batch):
    """A model that is wrong by 2 everywhere has a loss of 4 at every timestep, whatever gamma."""
    s = GaussianScheduler(1000, prediction_type="v_prediction")
    wrong = s.target(batch.x0, batch.noise, batch.t) + 2

    def model(x, t):
        return SimpleNamespace(sample=wrong)

    loss = diffusion_loss(model, s, batch.x0, batch.t, batch.noise, weighting="uniform", min_snr_gamma=5.0).loss
    torch.testing.assert_close(loss, torch.full_like(loss, 4.0), rtol=1e-5, atol=0)  # a sum of float32 at most
    with pytest.raises(ValueError, match="one of snr, uniform, got 'v'"):
        diffusion_loss(model, s, batch.x0, batch.t, batch.noise, weighting="v")


def test_immiscible_assignment_is_the_best_of_all():
    """Against all 720 permutations of 6 samples."""
    x0, noise = torch.randn(2, 6, 3, dtype=torch.float64)
    cost = torch.cdist(x0, noise)
    best = min(itertools.permutations(range(6)), key=lambda p: sum(cost[i, j].item() for i, j in enumerate(p)))
    assert immiscible_assignment(x0, noise).tolist() == list(best)


def test_immiscible_noise_is_in_x_t_and_in_the_target(batch):
    """A model that reads the assigned noise off x_t has no loss: both use the same assignment."""
    s = GaussianScheduler(prediction_type="epsilon")

    def oracle(x_t, t, x_self_cond=None):
        return SimpleNamespace(sample=s.epsilon_from_x0(x_t, t, batch.x0))

    loss = diffusion_loss(oracle, s, batch.x0, batch.t, batch.noise, immiscible=True).loss
    # sqrt(1 - abar_0) = 0.015 magnifies rounding
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-24)
    assert immiscible_assignment(batch.x0, batch.noise).tolist() != list(range(6))


def test_self_conditioning_shows_the_models_own_estimate(batch):
    s = GaussianScheduler(prediction_type="v_prediction")
    model = Spy(batch.out)
    diffusion_loss(model, s, batch.x0, batch.t, batch.noise, self_condition=True)
    first, second = model.calls
    assert first.x_self_cond is None and not first.grad and second.grad
    expected = s.x0_from_v(first.x_t, batch.t, batch.out)
    torch.testing.assert_close(second.x_self_cond, expected, rtol=1e-12, atol=1e-12)


def test_the_model_and_its_estimate_are_told_the_classes(batch):
    s, model, labels = GaussianScheduler(), Spy(batch.out), torch.tensor([0, 1, 2, 3, 3, 0])
    arguments = (s, batch.x0, batch.t, batch.noise)
    told = diffusion_loss(model, *arguments, self_condition=True, class_labels=labels).loss
    assert [call.class_labels is labels for call in model.calls] == [True, True]
    assert torch.equal(told, diffusion_loss(model, *arguments, self_condition=True).loss)
    assert model.calls[-1].class_labels is None
    with pytest.raises(ValueError, match=r"class_labels must have the shape \(6,\), got \(5,\)"):
        diffusion_loss(model, *arguments, class_labels=labels[:5])


def test_the_loss_of_the_unknown_part(batch):
    """The mean over the values that count, by hand; a value that does not count is in neither loss nor gradient, and a
    sample of which all values count has the ordinary loss."""
    s = GaussianScheduler()
    counted = torch.rand(6, 2, 4) < 0.5
    counted[0], counted[1] = True, False
    out = batch.out.requires_grad_()
    target, arguments = s.target(batch.x0, batch.noise, batch.t), (s, batch.x0, batch.t, batch.noise)
    found = diffusion_loss(Spy(out), *arguments, weighting="uniform", counted=counted).loss
    for i in range(6):
        errors = ((out[i] - target[i]) ** 2)[counted[i]]
        assert found[i].item() == pytest.approx(errors.mean().item() if len(errors) else 0.0, rel=1e-12)
    found.sum().backward()
    assert torch.equal(out.grad != 0, counted)
    ordinary = diffusion_loss(Spy(out), *arguments).loss
    torch.testing.assert_close(diffusion_loss(Spy(out), *arguments, counted=counted).loss[0], ordinary[0])
    torch.testing.assert_close(
        diffusion_loss(Spy(out), *arguments, counted=torch.ones_like(counted)).loss, ordinary, rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match="counted must be shaped as x0"):
        diffusion_loss(Spy(out), *arguments, counted=counted[:, 0])


def test_the_model_and_its_estimate_are_given_the_condition(batch):
    """Where a value is known, the model sees the condition alone: x_t and its own estimate are 0 there."""
    model, plain, condition = Spy(batch.out), Spy(batch.out), torch.zeros(6, 4, 4)
    known, arguments = torch.rand(6, 2, 4) < 0.5, (GaussianScheduler(), batch.x0, batch.t, batch.noise)
    diffusion_loss(model, *arguments, self_condition=True, condition=condition, known=known)
    diffusion_loss(plain, *arguments, self_condition=True)
    assert [call.condition is condition for call in model.calls] == [True, True]
    for call, ordinary in zip(model.calls, plain.calls):
        assert torch.equal(call.x_t, ordinary.x_t.masked_fill(known, 0))
    assert torch.equal(model.calls[1].x_self_cond, plain.calls[1].x_self_cond.masked_fill(known, 0))


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_labels_are_dropped_with_their_probability(probability):
    """Of 100,000 labels, in each of four classes alike: binomial numbers, 5 deviations allowed."""
    labels = torch.arange(100_000) % 4
    dropped = drop_labels(labels, torch.arange(100_000), probability, 4, key=7)
    assert dropped.dtype == torch.int64 and torch.equal(dropped[dropped != 4], labels[dropped != 4])
    for k in range(4):
        count = (dropped[labels == k] == 4).sum().item()
        assert abs(count - 25_000 * probability) <= 5 * np.sqrt(25_000 * probability * (1 - probability))
    part = drop_labels(labels[70:80], torch.arange(70, 80), probability, 4, key=7)
    assert torch.equal(part, dropped[70:80])


def test_dropped_labels_have_draws_of_their_own():
    """Keys of two streams: a sample's dropped label says nothing about its timestep and its first noise. The means of
    those dropped and of all differ by 5 deviations at most."""
    numbers = torch.arange(40_000)
    keys = [derive_seed(0, stream) for stream in (Stream.NOISE, Stream.CLASS_DROPOUT)]
    t, noise = training_draws(GaussianScheduler(1000), torch.zeros(40_000, 1, 2), numbers, key=keys[0])
    dropped = drop_labels(torch.zeros_like(numbers), numbers, 0.5, 1, key=keys[1]) == 1
    for values, deviation in ((t, 1000 / np.sqrt(12)), (noise[:, 0, 0], 1), (noise[:, 0, 1], 1)):
        difference = values[dropped].double().mean() - values[~dropped].double().mean()
        assert abs(difference) < 5 * deviation / np.sqrt(10_000)


@contextmanager
def no_cache():
    """Autocast without a cache, also where a model's own autocast turns it on."""
    turn = torch.set_autocast_cache_enabled
    turn(False)
    torch.set_autocast_cache_enabled = lambda enabled: turn(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled = turn


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("before", ["estimate", "sampling"])
def test_all_gradients_after_a_call_without_them_under_autocast(wrapped, before):
    """To the bit those of a step that casts each weight anew: after the estimate of self-conditioning, and after a
    pipeline has sampled in the middle of a step; alone, and in the autocast in which accelerate wraps a model."""
    s, net = GaussianScheduler(), UNet1D(16, 1, dim=8, dim_mults=(1, 2), self_condition=before == "estimate")
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(net) if wrapped else net
    pipe = DDPMPipeline1D(model, GaussianScheduler(), num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    x0, noise, t = torch.rand(4, 1, 16) * 2 - 1, torch.randn(4, 1, 16), torch.tensor([10, 200, 500, 900])
    gradients = []
    for fresh in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), no_cache() if fresh else nullcontext():
            if before == "sampling":
                pipe(batch_size=1, generator=torch.Generator().manual_seed(0))
            loss = diffusion_loss(model, s, x0, t, noise, self_condition=before == "estimate").loss.mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    kept, anew = gradients
    assert [name for name, gradient in kept.items() if gradient is None] == []
    for name, gradient in anew.items():
        assert torch.equal(kept[name], gradient), name


def test_autocast_keeps_nothing_of_the_estimate(batch, monkeypatch):
    """On every torch: its cache is emptied between the call without gradients and the one with them."""
    order, empty = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (order.append("emptied"), empty()))

    def model(x, t, x_self_cond=None):
        order.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=torch.zeros_like(x))

    diffusion_loss(model, GaussianScheduler(), batch.x0, batch.t, batch.noise, self_condition=True)
    assert order == [False, "emptied", True]


def test_draws_follow_from_the_numbers():
    """A sample's draws are those of its number, whatever the batch, and other ones for another key; timesteps are
    uniform."""
    s = GaussianScheduler(10)
    x0 = torch.zeros(2000, 1, 2)
    t, noise = training_draws(s, x0, range(2000), 0.1, key=5)
    assert training_draws(s, x0[:0], [], 0.1)[1].shape == x0[:0].shape
    t_part, noise_part = training_draws(s, x0[:3], torch.tensor([7, 8, 9]), 0.1, key=5)
    assert torch.equal(t[7:10], t_part) and torch.equal(noise[7:10], noise_part)
    other, other_noise = training_draws(s, x0, range(2000), 0.1, key=6)
    assert abs((other == t).float().mean() - 0.1) < 0.05 and not torch.isin(other_noise, noise).any()
    counts = torch.bincount(t, minlength=10)
    # binomial: 200 expected, deviation sqrt(2000 * 0.1 * 0.9) = 13.4
    assert counts.shape == (10,) and (counts - 200).abs().max() < 5 * 13.4
    with pytest.raises(ValueError, match="3 samples, 2 numbers"):
        training_draws(s, x0[:3], [1, 2])


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3), (1, 1)])
def test_noise_offsets_and_timesteps_are_independent(sampling, shape):
    """The covariance of the noise is the unit matrix plus strength^2 within a channel, and that with the timestep 0:
    entries of 20,000 samples deviate by sqrt(2) * variance / sqrt(20,000) at most, 5 deviations allowed. Noise and
    offsets have no word in common with the timestep, also in odd numbers of values."""
    x0 = torch.zeros(20_000, *shape, dtype=torch.float64)
    t, noise = training_draws(GaussianScheduler(1000), x0, range(20_000), 0.5, sampling)
    assert noise.dtype == torch.float64 and noise.shape == x0.shape and t.dtype == torch.int64
    values = torch.cat((noise.flatten(1), (t[:, None] - 499.5) / t.double().std()), 1)
    channel = torch.arange(shape[0]).repeat_interleave(x0[0, 0].numel())
    expected = torch.eye(len(channel) + 1, dtype=torch.float64)
    expected[:-1, :-1] += 0.25 * (channel[:, None] == channel)
    assert (values.T.cov() - expected).abs().max() < 5 * 2**0.5 * 1.25 / 20_000**0.5
    squares = values[:, :-1] ** 2
    assert np.abs(np.corrcoef(squares.T, values[:, -1] ** 2)[-1, :-1]).max() < 5 / 20_000**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_has_the_type_of_the_data(dtype):
    """That of float64, rounded: once to float32 (see test_randomness) and once to the type."""
    s = GaussianScheduler(10)
    found = training_draws(s, torch.zeros(4, 2, 64, dtype=dtype), range(4))[1]
    expected = training_draws(s, torch.zeros(4, 2, 64, dtype=torch.float64), range(4))[1]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 2.0), (-1.0, 0.3)])
def test_logit_normal_timesteps(mean, std):
    """P(t < k) is the normal distribution function at logit(k / T), for every k: the largest difference of 50,000
    samples is that of Kolmogorov and Smirnov, above 2.3 / sqrt(50,000) with a probability of 5e-5."""
    s = GaussianScheduler(1000)
    named = {"timestep_sampling": "logit_normal", "logit_mean": mean, "logit_std": std}
    t, _ = training_draws(s, torch.zeros(50_000, 1, 2), range(50_000), **named)
    assert torch.equal(t[7:10], training_draws(s, torch.zeros(3, 1, 2), [7, 8, 9], **named)[0])
    below = torch.bincount(t, minlength=1000).cumsum(0)[:-1].double().numpy() / 50_000
    assert np.abs(below - norm.cdf(logit(np.arange(1, 1000) / 1000), mean, std)).max() < 2.3 / np.sqrt(50_000)


def test_the_ends_of_logit_normal_timesteps():
    s, x0 = GaussianScheduler(1000), torch.zeros(100, 1, 2)
    t, _ = training_draws(s, x0, range(100), timestep_sampling="logit_normal", logit_mean=40.0)
    assert (t == 999).all()  # the sigmoid is 1
    with pytest.raises(ValueError, match="one of uniform, logit_normal, got 'cosine'"):
        training_draws(s, x0[:1], [1], timestep_sampling="cosine")


class Scale(nn.Module):
    """A small model that takes gradients and an estimate of x0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, x_self_cond=None, class_labels=None):
        x = x if x_self_cond is None else x + x_self_cond
        x = x if class_labels is None else x + class_labels.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=self.weight * x)


def draws_and_loss(scheduler, model, x0, numbers, key, sampling, weighting, self_condition):
    t, noise = training_draws(scheduler, x0, numbers, 0.1, sampling, key=key)
    labels = drop_labels(numbers % 3, numbers, 0.1, 3, key + 1) if self_condition else None
    options = {"class_labels": labels, "weighting": weighting, "min_snr_gamma": 5.0, "self_condition": self_condition}
    return diffusion_loss(model, scheduler, x0, t, noise, **options).loss


CASES = [
    pytest.param(target, sampling, weighting, own, id=f"{target}-{sampling}-{weighting}-{own}")
    for target, sampling, weighting, own in (
        ("epsilon", "uniform", "snr", False), ("sample", "logit_normal", "snr", False),
        ("v_prediction", "uniform", "uniform", True), ("v_prediction", "logit_normal", "snr", True),
    )
]  # fmt: skip


@pytest.mark.parametrize(("target", "sampling", "weighting", "own"), CASES)
def test_draws_and_loss_stay_on_their_device(target, sampling, weighting, own):
    """On the meta device no number is read by the host and no tensor of the host takes part, from the second step on:
    the first one copies the schedule's tables there."""
    s, model = GaussianScheduler(prediction_type=target), Scale().to("meta")
    x0 = torch.zeros(4, 3, 8, 8, device="meta")
    numbers, key = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros((), dtype=torch.int64, device="meta")
    draws_and_loss(s, model, x0, numbers, key, sampling, weighting, own)
    with OnDevice("meta") as seen:
        draws_and_loss(s, model, x0, numbers, key, sampling, weighting, own).mean().backward()
    assert seen.operations < 120


@pytest.mark.parametrize(("target", "sampling", "weighting", "own"), CASES)
def test_draws_and_loss_compile_whole(target, sampling, weighting, own):
    s, model = GaussianScheduler(prediction_type=target), Scale()
    x0, numbers, key = torch.rand(4, 3, 8, 8) * 2 - 1, torch.arange(4), torch.tensor(12345)
    torch._dynamo.reset()
    compiled = torch.compile(draws_and_loss, fullgraph=True, backend="aot_eager")
    expected = draws_and_loss(s, model, x0, numbers, key, sampling, weighting, own)
    found = compiled(s, model, x0, numbers, key, sampling, weighting, own)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_compiled_loss_keeps_the_gradients_under_autocast():
    """Though nothing empties autocast's cache between the estimate of x0 and the call with gradients."""
    model, noise = nn.Conv2d(1, 1, 1), torch.randn(2, 1, 4, 4)
    x0, t = torch.rand(2, 1, 4, 4), torch.tensor([5, 900])

    def loss():
        def predict(x, t, x_self_cond=None):
            return UNet2DOutput(sample=model(x if x_self_cond is None else x + x_self_cond))

        with torch.autocast("cpu", torch.bfloat16):
            return diffusion_loss(predict, GaussianScheduler(), x0, t, noise, self_condition=True).loss.mean()

    torch._dynamo.reset()
    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        model.zero_grad()
        function().backward()
        gradients.append(model.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0)


def test_bad_shapes(batch):
    s = GaussianScheduler()
    with pytest.raises(ValueError, match="shaped as x0"):
        diffusion_loss(Spy(batch.out), s, batch.x0, batch.t, batch.noise[:2])
    with pytest.raises(ValueError, match="learned variance"):
        diffusion_loss(Spy(torch.cat((batch.out, batch.out), 1)), s, batch.x0, batch.t, batch.noise)


def test_what_sampling_begins_with_is_trained():
    """With zero SNR: min-SNR and "snr" have a loss there, and logit-normal timesteps that miss it a warning."""
    s = GaussianScheduler(rescale_betas_zero_snr=True)
    x0, noise = torch.randn(2, 3, 1, 8)
    last = torch.full((3,), 999)
    for gamma in (None, 5.0):
        loss = diffusion_loss(Spy(torch.zeros(3, 1, 8)), s, x0, last, noise, min_snr_gamma=gamma).loss
        torch.testing.assert_close(loss, x0.square().flatten(1).mean(1))  # the target is -x0; before: 0

    def warned(**options):
        return first_step_warning(TrainConfig(**{"rescale_betas_zero_snr": True, **options}))

    assert warned() is None
    logit = {"timestep_sampling": "logit_normal"}
    # P(z >= log 999): of a normal number 2.5e-12, with the mean 5 and deviation 2 it is 0.17
    assert f"probability {norm.sf(np.log(999)):.2g}" in warned(**logit) and "t=999" in warned(**logit)
    assert warned(**logit, logit_mean=5.0, logit_std=2.0) is None
    assert first_step_warning(TrainConfig(**logit)) is None
