"""docs/samplers.md against diffusers: every scheduler, set as the page says, on data with a known distribution."""

import re
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import DummyObject
from test_stock_diffusers import MEAN, STD, GaussianModel

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet2D
from ddpm_hf.scheduler import PREDICTION_TYPES

PAGE = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text(encoding="utf-8")
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)}
NAMED = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
CLASSES = {
    name: kind for name, kind in NAMED.items() if isinstance(kind, DummyObject) or issubclass(kind, SchedulerMixin)
}


def known_model(**options):
    own = GaussianScheduler(clip_sample=False, **options)
    model = GaussianModel()
    model.scheduler = own
    pipe = DDPMPipeline1D(model, own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outcome(kind, prediction_type, schedule, **options):
    """ "refused", "warned", "wrong" or "right"."""
    pipe = known_model(prediction_type=prediction_type, beta_schedule=schedule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
        except (ValueError, TypeError, NotImplementedError):
            return "refused"
    if any("will hardly be right" in str(warning.message) for warning in caught):
        return "warned"
    x = pipe(1000, 40, generator=torch.Generator().manual_seed(0), output_type="pt").sequences
    right = abs(x.mean().item() - MEAN) < 0.03 and abs(x.std().item() / STD - 1) < 0.15
    return "right" if right else "wrong"


@pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42),
    reason="the page has the schedulers of diffusers 0.42",
)
def test_the_page_has_every_scheduler():
    assert sorted(ROWS) == sorted(CLASSES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(ROWS.keys() & CLASSES.keys()))
def test_each_scheduler_does_what_the_page_says(name):
    works, option, _ = ROWS[name]
    kind = CLASSES[name]
    if isinstance(kind, DummyObject):
        pytest.skip(f"{name} needs a package that is not installed")
    named = {"all": PREDICTION_TYPES, "no": ()}.get(works, works.split(", "))
    options = eval(f"dict({option.strip('`')})")
    for target in PREDICTION_TYPES:
        if f"{target}*" in named:
            assert outcome(kind, target, "sigmoid", **options) == "warned"
            assert outcome(kind, target, "linear", **options) == "right"
        else:
            assert outcome(kind, target, "sigmoid", **options) == ("right" if target in named else "refused"), target


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row[0] == "no" and name in CLASSES])
def test_what_does_not_work_is_refused_in_the_constructor_too(name):
    """Made with its own defaults: a `ValueError` names it, before any call of the model."""
    try:
        scheduler = CLASSES[name]()
    except (TypeError, ImportError):
        pytest.skip(f"{name} cannot be made without arguments or another package")
    pipe = known_model()
    for refused in (lambda: DDPMPipeline1D(pipe.unet, scheduler), lambda: setattr(pipe, "scheduler", scheduler)):
        with pytest.raises(ValueError, match=f"{name} cannot be the scheduler of this pipeline: it"):
            refused()
    assert isinstance(pipe.scheduler, GaussianScheduler)


def test_a_scheduler_that_does_not_fit_the_model():
    pipe = known_model()
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', the model was trained with 'v_prediction'"):
        pipe.scheduler = diffusers.DDIMScheduler()
    for wrong in (None, "ddim", diffusers.DDIMScheduler):
        with pytest.raises(ValueError, match="must be a scheduler, such as those of diffusers; got"):
            pipe.scheduler = wrong
    with pytest.raises(ValueError, match="another process"):
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True)
    with pytest.warns(UserWarning, match=r"betas are not those of the model: alphas_cumprod differs by up to 0\.\d+"):
        pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    with pytest.warns(UserWarning, match="it has 20 timesteps, the model was trained with 1000"):
        pipe.scheduler = GaussianScheduler(20)


def test_learned_variance_fits_the_scheduler_or_is_refused():
    small = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}
    own = GaussianScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="needs a model with 2 output channels .*, got one with 1"):
        DDPMPipeline1D(GaussianModel(), own)
    pipe = DDPMPipeline(UNet2D(sample_size=8, in_channels=4, learned_variance=True, **small), own)
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.SASolverScheduler):
        with pytest.raises(ValueError, match="keeps 3 of 4 channels: give from_config variance_type=None"):
            pipe.scheduler = kind.from_config(own.config)
        pipe.scheduler = kind.from_config(own.config, variance_type=None)
        assert pipe(2, 3, output_type="pt").images.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("rederive", [False, True])
def test_ddim_differs_from_stock_by_epsilon_after_clipping(rederive):
    """As the page says: with `use_clipped_model_output=False` each step is that of stock `DDIMScheduler`."""
    pipe = known_model()
    samples = []
    for scheduler in (
        GaussianScheduler(clip_sample_range=0.4, use_clipped_model_output=rederive),
        diffusers.DDIMScheduler.from_config(GaussianScheduler(clip_sample_range=0.4).config),
    ):
        pipe.scheduler = scheduler
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "return_all_timesteps": True}
        samples.append(pipe(100, 20, **options).trajectory)
    difference = (samples[0] - samples[1]).abs().max().item()
    assert difference > 0.1 if rederive else difference < 1e-3


def test_a_scheduler_given_to_from_pretrained_is_checked(tmp_path):
    """The saved scheduler says what the model was trained with, not the one that is given."""
    unet = UNet2D(8, in_channels=1, dim=8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=4)
    DDPMPipeline(unet, GaussianScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'epsilon', the model was trained with 'v_prediction'"):
        DDPMPipeline.from_pretrained(tmp_path, scheduler=diffusers.EulerDiscreteScheduler())
    fitting = diffusers.EulerDiscreteScheduler.from_config(GaussianScheduler().config)
    assert DDPMPipeline.from_pretrained(tmp_path, scheduler=fitting).scheduler is fitting
