"""The sampling loop on a device: it reads nothing back, and calls of the model are replayed as graphs.

Neither needs a graphics card. On the device `meta`, a read by the host raises an error; tape.py stands in for graphs.
"""

import warnings

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from tape import Tape
from test_samplers import ROWS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D
from ddpm_hf.pipeline import GraphedModel, step_options

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
STOCK = sorted(name for name, row in ROWS.items() if row[0] != "no")


class DeviceWork(TorchDispatchMode):
    """Refuses operations on tensors of the CPU and of the device together, and counts copies to the device.

    `scalars` allows tensors of the CPU without dimensions, which a graphics card is given as numbers.
    """

    def __init__(self, scalars=False):
        super().__init__()
        self.scalars, self.copies = scalars, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        host = [x for x in given if x.device.type == "cpu"]
        if host and any(x.device.type == "meta" for x in given + made):
            self.copies += func in COPIES
            allowed = func in COPIES or (self.scalars and not any(x.ndim for x in host))
            assert allowed, f"{func} takes tensors of the CPU together with the device's"
        return result


class Model(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Predicts something that depends on all inputs. It has the signature of our models."""

    config_name, ndim = "config.json", 2

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=8, in_channels=3, self_condition=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3, 1, 1), 0.5))

    def forward(self, sample, timestep, x_self_cond=None):
        x = self.weight * sample + torch.sin(timestep.float())
        return diffusers.utils.BaseOutput(sample=x if x_self_cond is None else x - 0.3 * x_self_cond)


def pipeline(unet, scheduler=None):
    kind = DDPMPipeline1D if unet.ndim == 1 else DDPMPipeline
    pipe = kind(unet, scheduler or GaussianScheduler(5))
    pipe.set_progress_bar_config(disable=True)
    if unet.device.type == "meta":  # where nothing can be read, not even after the loop
        pipe._check_finite = lambda *arguments: None
    return pipe


def chain_on_meta(pipe, steps, mode, **options):
    pipe._set_timesteps(steps, None)
    size = (8,) * pipe.unet.ndim
    x = torch.randn(2, pipe.unet.config.in_channels, *size, device="meta")
    with mode:
        out = pipe._denoise(x, pipe.scheduler.timesteps, step_options(pipe.scheduler, None, None), **options)
    assert out.device.type == "meta" and out.shape == x.shape


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("kind", [UNet2D, UNet1D])
def test_the_loop_reads_nothing_back(kind, steps, self_condition):
    """DDIM and DDPM steps, with our models: one copy to the device for all steps, of the timesteps."""
    with torch.device("meta"):
        unet = kind(8, in_channels=3, self_condition=self_condition, **SMALL)
    mode = DeviceWork()
    chain_on_meta(pipeline(unet), steps, mode, trajectory=[])
    assert mode.copies == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("name", ["fast", *STOCK])
def test_stock_schedulers_read_nothing_back(name, self_condition):
    """They compute with tensors of the CPU without dimensions. UniPC alone copies such numbers to the device."""
    pipe = pipeline(Model(self_condition=self_condition).to("meta"), GaussianScheduler(100))
    if name == "fast":
        pipe.use_fast_sampler()
    else:
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        except ImportError:
            pytest.skip(f"{name} needs a package that is not installed")
    mode = DeviceWork(scalars=True)
    chain_on_meta(pipe, 6, mode)
    assert mode.copies > 1 if name == "UniPCMultistepScheduler" else mode.copies == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GaussianScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_interpolation_reads_nothing_back(name, monkeypatch):
    """Its noising too. Only the ends are looked at, before it."""
    pipe = pipeline(Model().to("meta"), GaussianScheduler(100))
    if name != "GaussianScheduler":
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "_encode", lambda x, name: x)
    monkeypatch.setattr(pipe, "_decode", lambda x, output_type: x)
    x = torch.randn(2, 3, 8, 8, device="meta")
    with DeviceWork(scalars=True):
        out = pipe.interpolate(x, x, 0.5, 6, weights=[0.2, 0.7], output_type="pt").images
    assert out.device.type == "meta" and len(out) == 4


# ---------------------------------------------------------------------------------------------
# Graphs


def graphed(unet, most=8):
    """A pipeline whose model is recorded and replayed by a stand-in, and the stand-in."""
    pipe, tape = pipeline(unet), Tape()
    pipe._graphs = GraphedModel(lambda device: tape, most)
    return pipe, tape


def sample(pipe, batch=2, steps=3):
    generator = torch.Generator().manual_seed(0)
    return pipe(batch, steps, generator=generator, output_type="pt", return_dict=False)[0]


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("kind", [UNet2D, UNet1D])
def test_replayed_samples_are_those_of_calls(kind, self_condition):
    """Every input reaches the graph, and no output is written over: both would change the samples."""
    unet = kind(8, in_channels=3, self_condition=self_condition, **SMALL)
    pipe, tape = graphed(unet)
    plain = pipeline(unet)
    for batch, steps in ((2, 3), (3, 5), (2, 5)):
        assert torch.equal(sample(pipe, batch, steps), sample(plain, batch, steps))
    # sizes 2 and 3; the first step of a chain has no x0 estimate
    assert tape.events.count("capture") == (4 if self_condition else 2)
    assert tape.events.count("replay") == 13


def test_interpolation_is_replayed():
    pipe, tape = graphed(Model())
    x = torch.rand(2, 3, 8, 8)
    ends = {"x1": x[:1], "x2": x[1:], "weights": [0.2, 0.8], "output_type": "pt"}
    got = pipe.interpolate(**ends, generator=torch.Generator().manual_seed(1)).images
    expected = pipeline(pipe.unet).interpolate(**ends, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(got, expected) and tape.events.count("capture") == 1


def test_graphs_follow_the_model():
    """New values are seen by the graph that is there. It is captured again after whatever it has fixed has changed."""
    pipe, tape = graphed(Model())
    captures = 0

    def check(again):
        nonlocal captures
        assert torch.equal(sample(pipe), sample(pipeline(pipe.unet)))
        captures += again
        assert tape.events.count("capture") == captures

    check(again=True)
    check(again=False)
    with torch.no_grad():
        pipe.unet.weight.copy_(torch.rand(3, 1, 1))
    check(again=False)
    pipe.unet.weight.data = torch.rand(3, 1, 1)
    check(again=True)
    pipe.unet.eval()
    check(again=True)
    pipe.unet = Model()
    check(again=True)
    pipe.unet.weight.data = pipe.unet.weight.data.to(torch.bfloat16)
    check(again=True)
    assert tape.events.count("free") == 4


def test_the_number_of_graphs_is_bounded():
    """The size that was used longest ago is captured again when it returns."""
    pipe, tape = graphed(Model(), most=2)
    for batch, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        sample(pipe, batch)
        assert tape.events.count("capture") == captures and len(pipe._graphs.graphs) <= 2


def test_autocast_has_graphs_of_its_own():
    """Casts of weights are part of the graph: it must not read one that autocast keeps elsewhere and frees."""
    unet = UNet2D(8, **SMALL)
    pipe, tape = graphed(unet)
    single = sample(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(pipe), sample(pipeline(unet)))
    assert torch.equal(sample(pipe), single)
    assert tape.events.count("capture") == 2


def test_inference_mode_has_graphs_of_its_own():
    """The inputs of a graph that was captured in inference mode could not be written to outside of it."""
    pipe, tape = graphed(Model())
    tape.capture = lambda work: work  # recording works outside of inference mode only
    with torch.inference_mode():
        inside = sample(pipe)
    assert torch.equal(sample(pipe), inside) and torch.equal(inside, sample(pipeline(pipe.unet)))
    assert len(pipe._graphs.graphs) == 2 and pipe._graphs.reason is None


class Reading(Model):
    """A model that reads a number back, so that no graph can be captured."""

    def forward(self, sample, timestep):
        return super().forward(sample * (1.0 if timestep.item() < 500 else 0.5), timestep)


def test_a_model_that_cannot_be_captured_is_called_as_usual():
    pipe, tape = graphed(Reading())
    with pytest.warns(UserWarning, match="without CUDA graphs: RuntimeError: operation not permitted") as caught:
        assert torch.equal(sample(pipe), sample(pipeline(pipe.unet)))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipe, batch=3)
    assert tape.events.count("capture") == 1 and "replay" not in tape.events
    pipe.unet = Model()
    sample(pipe)
    assert "replay" in tape.events


def test_offloaded_weights_are_called_as_usual():
    pipe, tape = graphed(cpu_offload(UNet2D(8, **SMALL), torch.device("cpu")))
    with pytest.warns(UserWarning, match="without CUDA graphs: its weights are offloaded"):
        sample(pipe)
    assert tape.events == []


def test_graphs_are_for_graphics_cards():
    """On a CPU the setting changes nothing, and warns of nothing."""
    pipe = pipeline(UNet2D(8, **SMALL))
    before = sample(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.use_cuda_graphs() is pipe and torch.equal(sample(pipe), before)
    assert pipe._graphs.reason == "the model runs on cpu"
    assert pipe.use_cuda_graphs(False) is pipe and pipe._graphs is None


def test_ending_graphs_frees_their_memory():
    pipe, tape = graphed(Model())
    sample(pipe)
    graphs = pipe._graphs
    assert pipe.use_cuda_graphs()._graphs is graphs  # once more changes nothing
    pipe.use_cuda_graphs(False)
    assert tape.events[-1] == "free" and not graphs.graphs
