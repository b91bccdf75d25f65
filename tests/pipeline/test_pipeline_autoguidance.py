"""Autoguidance in the pipelines, and guided interpolation, on models whose predictions are known in closed form."""

import diffusers
import pytest
import torch
from conftest import optimal_prediction
from diffusers import ModelMixin  # loading looks for it among this module's names
from tape import Tape
from test_pipeline_guidance import MEANS, STD, mixture, predictions, sample

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet2D
from ddpm_hf.pipeline import GraphedModel

DATA, GUIDE = (0.2, 0.3), (-0.1, 0.5)  # mean and deviation of the data, and of what the guide has learned
SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}


class Gaussian(ModelMixin, diffusers.ConfigMixin):
    """The optimal model of N(mean, std^2) data."""

    config_name, ndim = "config.json", 1

    @diffusers.configuration_utils.register_to_config
    def __init__(self, mean=0.2, std=0.3, sample_size=4, in_channels=1, kind="epsilon", self_condition=False,
                 condition_channels=None, learned_variance=False):  # fmt: skip
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.scheduler, self.calls = scheduler(kind), 0

    def forward(self, sample, timestep, x_self_cond=None, condition=None):
        self.calls += 1
        c = self.config
        prediction = optimal_prediction(self.scheduler, sample, int(timestep), c.mean, c.std)
        if x_self_cond is not None:
            prediction = prediction + 0.1 * x_self_cond
        if c.learned_variance:
            prediction = torch.cat((prediction, torch.full_like(prediction, c.mean)), dim=1)
        return diffusers.utils.BaseOutput(sample=prediction)


def scheduler(kind="epsilon", **options):
    return GaussianScheduler(40, prediction_type=kind, clip_sample=False, **options)


def gaussian(data=DATA, kind="epsilon", steps=8, **options):
    variance = {"variance_type": "learned_range"} if options.get("learned_variance") else {}
    pipe = DDPMPipeline1D(Gaussian(*data, kind=kind, **options), scheduler(kind, **variance), steps)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(3, generator=generator, output_type="pt", return_dict=False, **options)[0]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_autoguidance_follows_its_equation(kind, scale):
    """D_w = w D_1 + (1 - w) D_0 for the denoised estimates of model and guide, whatever is predicted."""
    pipe, guide = gaussian(kind=kind), gaussian(GUIDE, kind=kind)
    steps = predictions(pipe)
    seeded(pipe, guide=guide, guidance_scale=scale)
    assert len(steps) == 8 and pipe.unet.calls == guide.unet.calls == 8
    own = pipe.scheduler
    for prediction, t, x in steps:
        d1, d0 = (own.predict_x0(optimal_prediction(own, x, int(t), *data), int(t), x) for data in (DATA, GUIDE))
        torch.testing.assert_close(own.predict_x0(prediction, int(t), x), scale * d1 + (1 - scale) * d0)


def test_autoguidance_leads_away_from_the_guide():
    """The guide knows the data too far to the left and too wide: the samples lie further right, and closer together."""
    pipe, guide = gaussian(steps=20), Gaussian(*GUIDE)
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "return_dict": False}
    plain, guided = (pipe(2000, guide=guide, guidance_scale=scale, **options)[0] for scale in (1.0, 2.0))
    assert guided.mean() > plain.mean() + 0.1 and guided.std() < 0.9 * plain.std()


def test_scale_one_does_not_call_the_guide():
    pipe, guide = gaussian(), Gaussian(*GUIDE)
    plain = seeded(pipe)
    assert torch.equal(seeded(pipe, guide=guide), plain) and guide.calls == 0
    assert torch.equal(seeded(pipe, guide=guide, guidance_scale=2.0, guidance_interval=(0.999, 0.999)), plain)
    assert guide.calls == 0
    seeded(pipe, guide=guide, guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    assert 0 < guide.calls < 8


@pytest.mark.parametrize("with_classes", [False, True])
def test_a_callback_may_begin_the_guidance(with_classes):
    """At scale 1 the guide is not called, but a later scale is still that of the guide."""
    pipe, guide, options = gaussian(), Gaussian(*GUIDE), {}
    if with_classes:
        pipe, guide, options = mixture(), Gaussian(*GUIDE, sample_size=2), {"class_labels": [0, 1, 2]}

    def change(pipe, i, t, tensors):
        pipe._guidance_scale = 2.0

    begun, guided = (
        seeded(pipe, guide=guide, guidance_scale=scale, callback_on_step_end=change, **options)
        for scale in (1.0, 1.0 + 1e-6)
    )
    torch.testing.assert_close(begun, guided, rtol=1e-3, atol=1e-4)
    assert (begun - seeded(pipe, **options)).abs().max() > 0.01


def test_rescaling_and_predicted_variance():
    """The deviation is put back to that of the model, and the predicted variance is the model's."""
    pipe, guide = gaussian(learned_variance=True), Gaussian(*GUIDE)
    steps = predictions(pipe)
    seeded(pipe, guide=guide, guidance_scale=3.0, guidance_rescale=1.0)
    for prediction, t, x in steps:
        c = optimal_prediction(pipe.scheduler, x, int(t), *DATA)
        torch.testing.assert_close(prediction[:, :1].std((1, 2)), c.std((1, 2)), rtol=1e-5, atol=1e-6)
        assert torch.equal(prediction[:, 1:], torch.full_like(x, 0.2))


def test_the_guide_sees_the_estimate_of_x0():
    pipe, guide = gaussian(self_condition=True), Gaussian(*GUIDE, self_condition=True)
    steps = predictions(pipe)
    seeded(pipe, guide=guide, guidance_scale=2.0)
    x0 = None
    for prediction, t, x in steps:
        strong, weak = (model(x, torch.tensor(int(t)), x0).sample for model in (pipe.unet, guide))
        torch.testing.assert_close(prediction, weak + 2.0 * (strong - weak))
        x0 = pipe.scheduler.predict_x0(prediction, int(t), x)


@pytest.mark.parametrize("with_classes", [True, False])
def test_the_guide_is_given_the_labels(with_classes):
    """The same for both models; a guide without classes is given none."""
    pipe = mixture()
    guide = mixture().unet if with_classes else Gaussian(0.0, 0.6, sample_size=2)
    steps = predictions(pipe)
    sample(pipe, [0, None, 2], guide=guide, guidance_scale=1.5)
    assert [labels.tolist() for labels in pipe.unet.calls] == [[0, 3, 2]] * 8
    if with_classes:
        assert [labels.tolist() for labels in guide.calls] == [[0, 3, 2]] * 8
    for prediction, t, x in steps:
        labels = torch.tensor([0, 3, 2])
        strong = pipe.unet(x, torch.tensor(int(t)), class_labels=labels).sample
        weak = guide(x, torch.tensor(int(t)), **({"class_labels": labels} if with_classes else {})).sample
        torch.testing.assert_close(prediction, weak + 1.5 * (strong - weak))


def test_stock_models_with_classes_have_guides():
    options = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet, guide = (diffusers.UNet2DModel(8, 1, 1, num_class_embeds=3, **options) for _ in range(2))
    pipe = DDPMPipeline(unet, GaussianScheduler(), 2)
    pipe.set_progress_bar_config(disable=True)
    plain, guided = (sample(pipe, 1, guide=guide, guidance_scale=scale) for scale in (1.0, 2.0))
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("name", ["fast", "HeunDiscreteScheduler", "DDPMScheduler"])
def test_guides_under_other_samplers(name):
    pipe, guide = gaussian(), gaussian(GUIDE)
    if name == "fast":
        pipe.use_fast_sampler(6)
        guide.use_fast_sampler(4)  # how the guide itself would sample does not matter
    else:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    plain, guided = (seeded(pipe, guide=guide, guidance_scale=scale) for scale in (1.0, 2.0))
    assert guide.unet.calls == pipe.unet.calls / 2 and guided.mean() > plain.mean()


def test_calls_of_the_guide_are_captured():
    """One graph of the model and one of the guide; other weights and the end are seen."""
    torch.manual_seed(0)
    unet, guide = (UNet2D(8, in_channels=1, **SMALL) for _ in range(2))
    pipe, tape = DDPMPipeline(unet, GaussianScheduler(), 3), Tape()
    pipe.set_progress_bar_config(disable=True)
    options = {"guide": guide, "guidance_scale": 2.0}
    expected = seeded(pipe, **options)
    pipe._graphs = GraphedModel(lambda device: tape)
    assert torch.equal(seeded(pipe, **options), expected)
    assert tape.events.count("capture") == 2 and tape.events.count("replay") == 6
    assert torch.equal(seeded(pipe, **options), expected)
    assert tape.events.count("capture") == 2
    pipe.use_cuda_graphs(False)
    assert pipe._guide_graphs is None and tape.events.count("free") == 2


@pytest.mark.parametrize(
    "guide,message",
    [
        (3, "a model or a pipeline, got int"),
        (lambda: Gaussian(*GUIDE, in_channels=2), "in_channels of the model, 1; got 2"),
        (lambda: Gaussian(*GUIDE, sample_size=8), "sample_size of the model, 4; got 8"),
        (lambda: Gaussian(*GUIDE, self_condition=True), "self_condition of the model, None; got True"),
        (lambda: Gaussian(*GUIDE, condition_channels=2), "condition_channels of the model, None; got 2"),
        (lambda: mixture(sample_size=4).unet, "num_class_embeds=None.* or none; got 3"),
        (lambda: gaussian(kind="sample"), "prediction_type of the model, 'epsilon'; got 'sample'"),
        (lambda: Gaussian(*GUIDE).float(), r"guide.to\('cpu', torch.float64\); got cpu, torch.float32"),
        (lambda: Gaussian(*GUIDE).to("meta"), "got meta, torch.float64"),
    ],
)  # fmt: skip
def test_guides_that_do_not_fit(guide, message):
    """Also at scale 1, before a call of any model."""
    pipe = gaussian()
    pipe.unet.forward = None
    for scale in (1.0, 2.0):
        with pytest.raises(ValueError, match=f"guide must .*{message}"):
            pipe(guide=guide() if callable(guide) else guide, guidance_scale=scale)


def test_guides_of_another_schedule():
    pipe = gaussian()
    for options, message in (
        ({"num_train_timesteps": 50}, "50 timesteps"),
        ({"beta_schedule": "cosine"}, "other betas"),
    ):
        own = GaussianScheduler(**{"num_train_timesteps": 40, "prediction_type": "epsilon", **options})
        with pytest.raises(ValueError, match=f"schedule of the model, of 40 timesteps; got {message}"):
            pipe(guide=DDPMPipeline1D(Gaussian(*GUIDE), own), guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale must be .* at least 0, got -1"):
        pipe(guide=Gaussian(*GUIDE), guidance_scale=-1)


def test_interpolation_with_classes_and_guidance():
    """One label for all, or one for each pair; from far enough back the classes are those asked for."""
    pipe = mixture()
    x1, x2 = torch.full((3, 1, 2), -0.2), torch.full((3, 1, 2), 0.2)
    options = {"strength": 1.0, "num_inference_steps": 20, "weights": [0.3, 0.5, 0.7], "output_type": "pt"}
    x = pipe.interpolate(x1, x2, class_labels=[0, 1, 2], guidance_scale=1.5, **options).sequences
    assert x.shape == (9, 1, 2) and pipe.unet.calls[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 9
    means = x.unflatten(0, (3, 3)).mean((1, 2, 3))
    assert (means - torch.tensor(MEANS)).abs().max() < 2 * STD
    pipe.unet.calls.clear()
    pipe.interpolate(x1, x2, class_labels=torch.tensor(1), **options)
    assert all(labels.tolist() == [1] * 9 for labels in pipe.unet.calls)
    with pytest.raises(ValueError, match="batch_size is 9, got 2 labels"):
        pipe.interpolate(x1, x2, class_labels=[0, 1], **options)


def test_interpolation_with_a_guide():
    pipe, guide = gaussian(), Gaussian(*GUIDE)
    x = torch.zeros(2, 1, 4, dtype=torch.float64)
    plain, guided = (
        pipe.interpolate(x, x, 1.0, generator=torch.Generator().manual_seed(0), guide=guide, guidance_scale=scale,
                         output_type="pt").sequences
        for scale in (1.0, 2.0)
    )  # fmt: skip
    assert guide.calls == 8 and guided.mean() > plain.mean()
