"""Classes and classifier-free guidance in the pipelines, on models whose predictions are known in closed form."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import exact_abar
from diffusers import ModelMixin  # loading looks for it among this module's names
from tape import Tape

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet2D
from ddpm_hf.pipeline import GraphedModel

MEANS, STD = (-0.6, 0.1, 0.7), 0.2
NAMES = {0: "zero", 1: "one", 2: "two"}


class Mixture(ModelMixin, diffusers.ConfigMixin):
    """The exact epsilon of x0 = mean of the class + STD * noise; without a class, of the mixture of all."""

    config_name, ndim = "config.json", 1

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=2, in_channels=1, num_class_embeds=3, self_condition=False, learned_variance=False):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor(MEANS, dtype=torch.float64))
        self.abar, self.calls = exact_abar(scheduler()), []

    def forward(self, sample, timestep, x_self_cond=None, class_labels=None):
        self.calls.append(class_labels.clone())
        abar = self.abar.index_select(0, timestep.reshape(1).round().long())
        total = STD**2 * abar + 1 - abar
        residual = sample - abar.sqrt() * self.means[:, None, None, None]  # (classes, B, C, length)
        mixture = torch.softmax(-(residual**2).sum((2, 3)) / (2 * total), dim=0)
        shares = torch.cat((torch.eye(3, dtype=torch.float64), torch.zeros(1, 3)))[class_labels].T
        shares = torch.where(class_labels == 3, mixture, shares)
        epsilon = (1 - abar).sqrt() / total * (shares[..., None, None] * residual).sum(0)
        if x_self_cond is not None:
            epsilon = epsilon + 0.1 * x_self_cond
        if self.config.learned_variance:
            epsilon = torch.cat((epsilon, torch.full_like(epsilon, 0.3) * class_labels[:, None, None]), dim=1)
        return diffusers.utils.BaseOutput(sample=epsilon)


def scheduler(**options):
    return GaussianScheduler(40, prediction_type="epsilon", clip_sample=False, **options)


def mixture(names=None, variance_type="fixed_small", **options):
    pipe = DDPMPipeline1D(Mixture(**options), scheduler(variance_type=variance_type), 8, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=labels, generator=generator, output_type="pt", return_dict=False, **options)[0]


def predictions(pipe):
    """What the scheduler's steps are given from now on: (prediction, t, x)."""
    steps, step = [], pipe.scheduler.step
    pipe.scheduler.step = lambda *given, **options: (steps.append(given), step(*given, **options))[1]
    return steps


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_follows_the_guided_score(scale):
    """The guided score is the gradient of (1 - scale) log p(x) + scale log p(x | class), here by autograd."""
    pipe, labels = mixture(), [0, 2, 1, None]
    steps = predictions(pipe)
    sample(pipe, labels, guidance_scale=scale)
    assert len(steps) == 8
    for prediction, t, x in steps:
        abar, x = exact_abar(pipe.scheduler)[int(t)], x.detach().requires_grad_()
        total = STD**2 * abar + 1 - abar
        means = abar.sqrt() * torch.tensor(MEANS, dtype=torch.float64)
        log_p = torch.stack([-((x - mean) ** 2).sum((1, 2)) / (2 * total) for mean in means])  # (classes, B)
        marginal = log_p.logsumexp(0)
        of_class = torch.stack([marginal[i] if k is None else log_p[k, i] for i, k in enumerate(labels)])
        (score,) = torch.autograd.grad(((1 - scale) * marginal + scale * of_class).sum(), x)
        torch.testing.assert_close(prediction, -((1 - abar) ** 0.5) * score, rtol=1e-9, atol=1e-9)


def test_scale_one_is_the_prediction_for_the_class():
    """One call a step, of the batch's size, and bit for bit the model's own prediction."""
    pipe = mixture()
    steps = predictions(pipe)
    sample(pipe, [2, None], guidance_rescale=0.7)
    assert [labels.tolist() for labels in pipe.unet.calls] == [[2, 3]] * 8
    for prediction, t, x in steps:
        assert torch.equal(prediction, pipe.unet(x, torch.tensor(int(t)), class_labels=torch.tensor([2, 3])).sample)


def test_both_predictions_come_from_one_call_within_the_interval():
    pipe = mixture()
    steps = predictions(pipe)
    sample(pipe, [0, 1], guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    levels = [int(t) / 39 for _, t, _ in steps]
    guided = [0.2 <= level <= 0.8 for level in levels]
    assert any(guided) and not all(guided)
    assert [labels.tolist() for labels in pipe.unet.calls] == [[0, 1, 3, 3] if inside else [0, 1] for inside in guided]


def test_without_a_class_nothing_is_guided():
    pipe = mixture()
    plain = sample(pipe, None)
    assert torch.equal(sample(pipe, [None], guidance_scale=4.0), plain)
    assert all(labels.tolist() == [3] for labels in pipe.unet.calls)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_puts_the_deviation_back(rescale):
    """The deviation of each sample is (1 - rescale) of the guided one plus rescale of the class's own."""
    pipe = mixture(sample_size=16)
    steps = predictions(pipe)
    sample(pipe, [0, 2], guidance_scale=3.0, guidance_rescale=rescale)
    for prediction, t, x in steps:
        c, u = (pipe.unet(x, torch.tensor(int(t)), class_labels=torch.tensor(k)).sample for k in ([0, 2], [3, 3]))
        guided = u + 3.0 * (c - u)
        expected = rescale * c.std((1, 2)) + (1 - rescale) * guided.std((1, 2))
        torch.testing.assert_close(prediction.std((1, 2)), expected, rtol=1e-5, atol=1e-6)
        correlation = torch.cosine_similarity(prediction.flatten(1), guided.flatten(1))
        torch.testing.assert_close(correlation, torch.ones_like(correlation))


@pytest.mark.parametrize("name", ["fast", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler"])
def test_samples_move_to_their_class_under_every_sampler(name):
    pipe = mixture()
    if name == "fast":
        pipe.use_fast_sampler(12)
    else:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    x = sample(pipe, [k for k in range(3) for _ in range(40)], num_inference_steps=20, guidance_scale=1.5)
    means = x.unflatten(0, (3, 40)).mean((1, 2, 3))
    assert (means - torch.tensor(MEANS)).abs().max() < 0.15


def test_a_predicted_variance_is_that_of_the_class():
    pipe = mixture(learned_variance=True, variance_type="learned_range")
    steps = predictions(pipe)
    sample(pipe, [1, 2], guidance_scale=2.0)
    for prediction, _, _ in steps:
        assert prediction.shape == (2, 2, 2)
        torch.testing.assert_close(prediction[:, 1], torch.tensor([[0.3], [0.6]]).expand(2, 2).to(prediction))


def test_self_conditioning_is_guided_too():
    pipe = mixture(self_condition=True)
    steps = predictions(pipe)
    sample(pipe, [0, 1], guidance_scale=2.0)
    x0 = None
    for prediction, t, x in steps:
        c, u = (
            pipe.unet(x, torch.tensor(int(t)), x_self_cond=x0, class_labels=torch.tensor(k)).sample
            for k in ([0, 1], [3, 3])
        )
        torch.testing.assert_close(prediction, u + 2.0 * (c - u))
        x0 = pipe.scheduler.predict_x0(prediction, int(t), x)


def test_guided_calls_are_captured():
    """One graph for the steps within the interval, and one for the others."""
    pipe, tape = mixture(), Tape()
    options = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}
    expected = sample(pipe, [0, 1], **options)
    pipe._graphs = GraphedModel(lambda device: tape)
    assert torch.equal(sample(pipe, [0, 1], **options), expected)
    assert torch.equal(sample(pipe, [2, None], **options), sample(mixture(), [2, None], **options))
    assert tape.events.count("capture") == 2


def test_names_and_numbers_of_classes(tmp_path, monkeypatch):
    """Names, numbers and None are one language, also after saving; a list says how many samples there are.

    Loading a pipeline with names does not warn of their types.
    """
    pipe = mixture(NAMES)
    x = sample(pipe, ["two", 0, None])
    assert x.shape == (3, 1, 2)
    assert torch.equal(sample(pipe, (2, "zero", None)), x)
    for labels in (torch.tensor([1, 1]), np.array([1, 1])):
        assert torch.equal(sample(pipe, labels), sample(pipe, "one", batch_size=2))
    pipe.save_pretrained(tmp_path)
    warned = []
    monkeypatch.setattr(diffusers.pipelines.pipeline_utils.logger, "warning", lambda text, *rest: warned.append(text))
    for again in (DDPMPipeline1D.from_pretrained(tmp_path), DDPMPipeline1D.from_pipe(pipe)):
        again.set_progress_bar_config(disable=True)
        assert again.config.id2label == NAMES
        # loading gives float32
        torch.testing.assert_close(sample(again, ["two", "zero", None]), x, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert not [text for text in warned if "Expected types" in text]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"class_labels": 3}, "from 0 to 2; got 3"), ({"class_labels": -1}, "got -1"),
        ({"class_labels": 1.0}, "got 1.0"), ({"class_labels": True}, "got True"),
        ({"class_labels": "three"}, "'three'; the classes are zero, one, two"),
        ({"class_labels": [0, 1, 2]}, "batch_size is 2, got 3 labels"),
        ({"guidance_scale": -0.5}, "at least 0, got -0.5"), ({"guidance_scale": float("nan")}, "got nan"),
        ({"guidance_rescale": 1.5}, "from 0 to 1, got 1.5"), ({"guidance_interval": 0.5}, "two numbers, got 0.5"),
        ({"guidance_interval": (0.8, 0.2)}, r"ascend and lie in \[0, 1\]"), ({"guidance_interval": (0, 2)}, "ascend"),
    ],
)  # fmt: skip
def test_bad_labels_and_guidance(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(NAMES)(**{"batch_size": 2, "class_labels": 0, **options})


def test_models_without_classes():
    """They refuse labels, guidance and names, and their saved pipelines say nothing of classes."""
    unet = UNet2D(8, dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=4)
    pipe = DDPMPipeline(unet, GaussianScheduler(), 2)
    for options in ({"class_labels": 0}, {"class_labels": [None, 1]}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=f"{list(options)[0]} needs a model with classes"):
            pipe(**options)
    with pytest.raises(ValueError, match="id2label needs a model with classes"):
        DDPMPipeline(unet, GaussianScheduler(), id2label=NAMES)
    assert "id2label" not in pipe.config


def test_stock_models_have_classes_but_no_number_for_none():
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                 up_block_types=("UpBlock2D",), num_class_embeds=3)  # fmt: skip
    pipe = DDPMPipeline(unet, GaussianScheduler(), 2)
    pipe.set_progress_bar_config(disable=True)
    samples = [sample(pipe, k) for k in (0, 2)]
    assert samples[0].shape == (1, 1, 8, 8) and not torch.equal(*samples)
    for options in ({"class_labels": None}, {"class_labels": [0, None]}, {"class_labels": 0, "guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="UNet2DModel .* knows no prediction without a class"):
            pipe(**options)


@pytest.mark.parametrize("names", [{0: "a", 1: "b"}, {0: "a", 1: "b", 2: "b"}, {0: "a", 1: "b", "x": "c"}, 3])
def test_names_that_do_not_fit_the_classes(names):
    with pytest.raises(ValueError, match="id2label must"):
        mixture(names)
