"""What only a graphics card shows: training in each precision and form, its graphs, sampling, offloading, conversion.

`DDPM_HF_TEST_DEVICE=cpu pytest tests/test_cuda.py` tries these tests on a CPU, where a stand-in records and replays
the steps and the compiler is left out; what a CPU cannot do is skipped. `DDPM_HF_TEST_SECONDS` limits their time, so
those that matter most come first, and the compiler, which takes longest, last.
"""

import contextlib
import functools
import importlib
import time

import numpy as np
import pytest
import torch
from cards import CARD, DEVICE
from conftest import END
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D
from helpers import MODEL, config, metrics, state, weights
from tape import Tape

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, UNet2D, train
from ddpm_hf.convert import from_denoising_diffusion_pytorch
from ddpm_hf.trainer import graphs, loop
from ddpm_hf.trainer.compiling import Plan, Runner
from ddpm_hf.trainer.loop import Trainer

ON_CARD = DEVICE == "cuda"
pytestmark = [
    pytest.mark.card,
    pytest.mark.skipif(ON_CARD and not CARD.is_there, reason="this machine has no graphics card"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # of evaluations, where it only warns
]
card_only = pytest.mark.skipif(not ON_CARD, reason="a CPU has none of it")

# TF32 has ten bits, as float16 does; bfloat16 has seven. A few operations in a row lose a few of them.
PRECISION = {"no": 1e-2, "fp16": 1e-2, "bf16": 4e-2}
TRAINING = [
    {},
    {"gradient_accumulation_steps": 2, "ema_update_every": 2},
    {"self_condition": True, "random_flip": True},
    {"dropout": 0.2},
    {"gradient_checkpointing": True},
    {"use_ema": False, "noise_offset": 0.1, "timestep_sampling": "logit_normal"},
    {"optimizer": "muon", "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    {"dataset_name": "ecg", "sequence_length": 32, "train_batch_size": 4},
]


@contextlib.contextmanager
def exact():
    """Float32 products and convolutions in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def runners(monkeypatch):
    """The runners of steps that training makes, in order. On CPU a stand-in captures their steps."""
    made = []
    monkeypatch.setattr(loop, "Runner", lambda *args: made.append(Runner(*args)) or made[-1])
    if not ON_CARD:
        monkeypatch.setattr(loop, "StepBackend", lambda device: Tape())
        monkeypatch.setattr(loop.compiling, "make_plan", lambda c, acc: Plan(graphs=c.compile == "auto"))
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    return made


def losses(folder):
    """(steps, 2): loss and gradient norm."""
    return np.array([(line["loss"], line["grad_norm"]) for line in metrics(folder) if "loss" in line])


def run(folder, steps=20, **options):
    """Train; return losses and weights."""
    train(config(folder, max_train_steps=steps, save_samples_steps=1000, checkpointing_steps=1000, **options))
    return losses(folder), weights(folder)


def close(found, expected, tolerance):
    """Assert that losses, gradient norms and weights are equal within a relative tolerance."""
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert (found[1][name] - value).norm() <= tolerance * value.norm(), name


# -- training


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Losses and weights of eight steps on CPU in float32: a fixture of the module is made while the card is hidden."""
    return run(tmp_path_factory.mktemp("reference") / "run", 8)


@pytest.mark.parametrize("compiler", ["none", "auto"])
@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=card_only)])
def test_training_is_that_of_the_cpu(precision, compiler, on_cpu, runners, tmp_path, capsys):
    """Data, first weights, timesteps and noise are the same, so the losses are, within the precision."""
    found, _ = run(tmp_path, 8, mixed_precision=precision, compile=compiler)
    (runner,) = runners
    if compiler == "auto" and precision != "fp16":
        assert runner.graphs.enabled and runner.graphs.captures
    elif compiler == "auto":
        assert "not captured as a CUDA graph: the loss scaler of fp16" in capsys.readouterr().out
    # a scaled loss overflows in first steps, which are then skipped: only the first loss is of the same weights
    compared = 1 if precision == "fp16" else 8
    np.testing.assert_allclose(found[:compared, 0], on_cpu[0][:compared, 0], rtol=PRECISION[precision])
    assert np.isfinite(found[:, 0]).all()


def captured_and_eager(folder, runners, monkeypatch, **options):
    """Train with captured steps, and with the same work run eagerly: both are given numbers as tensors, and all
    algorithms are deterministic, so that nothing but the capture differs."""
    captured = run(folder / "graphs", deterministic=True, **options)
    monkeypatch.setattr(graphs, "WARM_UP_STEPS", 10**9)
    eager = run(folder / "eager", deterministic=True, **options)
    assert runners[0].graphs.enabled and runners[0].graphs.captures
    assert runners[1].graphs.enabled and not runners[1].graphs.captures
    return captured, eager


@pytest.mark.parametrize("options", TRAINING, ids=str)
def test_captured_steps_are_the_eager_ones(options, runners, tmp_path, monkeypatch):
    """To 1e-3 in bf16 after 20 steps."""
    close(*captured_and_eager(tmp_path, runners, monkeypatch, mixed_precision="bf16", **options), 1e-3)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2, "gradient_accumulation_steps": 2}], ids=str)
def test_captured_steps_are_the_eager_ones_in_float32(options, runners, tmp_path, monkeypatch):
    close(*captured_and_eager(tmp_path, runners, monkeypatch, mixed_precision="no", **options), 1e-6)


def test_steps_without_graphs_are_the_same_but_for_rounding(runners, tmp_path):
    """`--compile none` has numbers of Python where a captured step has tensors of float32; in bf16, roundings that
    differ spread."""
    options = {"mixed_precision": "bf16", "deterministic": True}
    found, expected = (run(tmp_path / name, compile=name, **options) for name in ("auto", "none"))
    np.testing.assert_allclose(found[0][:, 0], expected[0][:, 0], rtol=2e-2)
    assert runners[1].graphs is None


@card_only
@pytest.mark.parametrize("options", [{"immiscible": True}, {"gradient_checkpointing": True, "dropout": 0.2}], ids=str)
def test_what_cannot_be_captured_runs_eagerly(options, runners, tmp_path, capsys):
    found, _ = run(tmp_path, 6, mixed_precision="bf16", **options)
    assert np.isfinite(found).all()
    assert "steps are not captured as a CUDA graph: " in capsys.readouterr().out


# -- sampling


def pipeline(kind, **options):
    """A pipeline of a model with weights that are not those of the start, silent, on the CPU."""
    torch.manual_seed(0)
    if kind == "images":
        pipe = DDPMPipeline(UNet2D(sample_size=8, in_channels=3, **MODEL, **options), GaussianScheduler())
    else:
        unet = UNet1D(sample_size=16, in_channels=2, **MODEL, **options)
        pipe = DDPMPipeline1D(unet, GaussianScheduler(), data_shift=[1.0, 2.0], data_scale=[3.0, 4.0])
    for p in pipe.unet.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, batch_size=3, output_type="pt", **options):
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 5, **options}
    return pipe(batch_size, generator=generator, output_type=output_type, return_dict=False, **options)[0]


OUTPUTS = [("images", "pil"), ("images", "np"), ("images", "pt"), ("sequences", "np"), ("sequences", "pt")]


@pytest.mark.parametrize(("kind", "output_type"), OUTPUTS)
def test_samples_of_every_output_type(kind, output_type):
    """From one generator of the CPU, the samples of both devices differ by 2e-3 of their range at most."""
    pipe = pipeline(kind)
    with exact():
        expected, found = (sample(pipe.to(device), output_type=output_type) for device in ("cpu", DEVICE))
    if output_type == "pil":
        assert [image.mode for image in found] == ["RGB"] * 3
        expected, found = (np.stack([np.asarray(image) / 255 for image in images]) for images in (expected, found))
        assert np.abs(found - expected).max() <= 2e-3 + 1 / 255
        return
    if output_type == "pt":
        assert found.device.type == DEVICE
        expected, found = expected.numpy(), found.cpu().numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("options", [{"eta": 0.5}, {"num_inference_steps": 50}, {"return_all_timesteps": True}])
def test_ways_of_sampling(options):
    pipe = pipeline("images").to(DEVICE)
    with exact():
        expected = sample(pipe, **options)
        found = sample(pipe.use_cuda_graphs(), **options)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_generator_of_the_device_and_the_fast_sampler():
    pipe = pipeline("images").to(DEVICE).use_cuda_graphs()
    options = {"batch_size": 2, "num_inference_steps": 5, "output_type": "pt"}
    made = [pipe(generator=torch.Generator(DEVICE).manual_seed(1), **options).images for _ in range(2)]
    assert made[0].device.type == DEVICE and torch.equal(*made)
    pipe.use_fast_sampler()
    assert torch.isfinite(sample(pipe, num_inference_steps=6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_samples_of_graphs_are_the_plain_ones(kind, dtype):
    """Also for other batch sizes, after `.to()`, and after the weights were exchanged in place or replaced."""
    with exact():
        pipe = pipeline(kind).to(DEVICE)
        pipe.unet.to(dtype).time_embed.float()

        def compare(*batch_sizes):
            for batch_size in batch_sizes:
                expected = sample(pipe.use_cuda_graphs(False), batch_size)
                found = sample(pipe.use_cuda_graphs(), batch_size)
                again = sample(pipe, batch_size)
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
                assert torch.equal(found, again)
                assert not ON_CARD or pipe._graphs.reason is None

        compare(3, 1)
        plain = sample(pipe.use_cuda_graphs(False))
        pipe.use_cuda_graphs()
        sample(pipe)
        held = [p.detach().clone() for p in pipe.unet.parameters()]
        with torch.no_grad():  # as the average of the weights is swapped in
            for p in pipe.unet.parameters():
                p.copy_(0.5 * p)
        swapped = sample(pipe)
        assert not torch.allclose(swapped, plain, atol=1e-3)
        torch.testing.assert_close(swapped, sample(pipe.use_cuda_graphs(False)), rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for p, value in zip(pipe.unet.parameters(), held):
                p.copy_(value)
        torch.testing.assert_close(sample(pipe.use_cuda_graphs()), plain, rtol=1e-3, atol=1e-3)
        other = {name: 0.5 * value for name, value in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(other, assign=True)  # other addresses
        torch.testing.assert_close(sample(pipe), swapped, rtol=1e-2, atol=1e-2)
        pipe.to("cpu")
        sample(pipe)
        pipe.to(DEVICE)
        compare(2)


def test_graphs_in_inference_mode_and_under_autocast():
    pipe = pipeline("images").to(DEVICE)
    for context in (torch.inference_mode, functools.partial(torch.autocast, DEVICE, torch.bfloat16)):
        with context(), exact():
            expected = sample(pipe.use_cuda_graphs(False))
            torch.testing.assert_close(sample(pipe.use_cuda_graphs()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 2.0, "guidance_rescale": 0.5}])
def test_classes_and_guidance(options):
    """On the card as on the CPU, and with graphs."""
    pipe = pipeline("images", num_class_embeds=3)
    options = {"class_labels": [0, 2, None], **options}
    with exact():
        expected = sample(pipe, **options)
        found = sample(pipe.to(DEVICE), **options)
        replayed = sample(pipe.use_cuda_graphs(), **options)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(replayed, found, rtol=1e-3, atol=1e-3)


def test_self_conditioning_with_graphs():
    pipe = pipeline("sequences", self_condition=True).to(DEVICE)
    with exact():
        expected = sample(pipe)
        torch.testing.assert_close(sample(pipe.use_cuda_graphs()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["model", "sequential"])
@card_only
def test_offloading(way):
    with exact():
        pipe = pipeline("images")
        expected = sample(pipe.to(DEVICE))
        pipe.to("cpu")
        getattr(pipe, f"enable_{way}_cpu_offload")()
        torch.testing.assert_close(sample(pipe).cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
        with pytest.warns(UserWarning, match="without CUDA graphs: its weights are offloaded"):
            found = sample(pipe.use_cuda_graphs())
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


def test_a_saved_pipeline_in_bfloat16(tmp_path):
    pipeline("images").save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(sample(pipe.use_cuda_graphs())).all()


def test_a_trained_pipeline_samples_on_the_card(tmp_path):
    train(config(tmp_path, max_train_steps=5, save_samples_steps=1000))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "pipeline").to(DEVICE)
    assert pipe.device.type == DEVICE
    image = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2).images[0]
    assert image.size == (8, 8) and image.mode == "L"


# -- stopping and going on


def stopped_and_resumed(folder, monkeypatch, **options):
    """Train ten steps, once whole and once stopped in step 8 after the checkpoint of step 6, and resumed."""
    options = {"max_train_steps": 10, "checkpointing_steps": 6, **options}
    train(config(folder / "whole", **options))
    step = Trainer._train_step

    def stop(self, batches):
        if self.progress.step == 7:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder / "parts", **options))
    monkeypatch.setattr(Trainer, "_train_step", step)
    torch.rand(7, device=DEVICE)  # what else the process draws does not matter
    assert train(config(folder / "parts", **options)).steps == 10
    return folder / "whole", folder / "parts"


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "none", "dropout": 0.1, "mixed_precision": "no"},
        {"dropout": 0.1, "self_condition": True, "gradient_accumulation_steps": 2, "ema_update_every": 2},
        {"save_samples_steps": 4, "eval_steps": 5, "eval_num_samples": 8, "feature_network": "pixels"},
    ],
    ids=str,
)
def test_a_deterministic_run_is_resumed_bit_for_bit(options, runners, tmp_path, monkeypatch):
    options = {"mixed_precision": "bf16", **options}
    whole, parts = map(state, stopped_and_resumed(tmp_path, monkeypatch, deterministic=True, **options))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


def test_a_run_is_resumed(runners, tmp_path, monkeypatch):
    """Without deterministic algorithms the losses are equal to the rounding of bf16."""
    whole, parts = map(losses, stopped_and_resumed(tmp_path, monkeypatch, mixed_precision="bf16"))
    np.testing.assert_allclose(parts[:, 0], whole[:, 0], rtol=PRECISION["bf16"])


def test_looks_leave_captured_steps_alone(runners, tmp_path):
    """Samples, evaluations of the average and checkpoints between captured steps change nothing."""
    options = {"mixed_precision": "bf16", "deterministic": True, "holdout": 100, "max_train_steps": 20}
    looks = {"save_samples_steps": 5, "eval_steps": 7, "checkpointing_steps": 6, "feature_network": "pixels",
             "eval_num_samples": 16, "eval_metrics": ["fid", "held_out_loss"]}  # fmt: skip
    train(config(tmp_path / "looks", **options, **looks))
    train(config(tmp_path / "plain", **options, save_samples_steps=1000, eval_steps=0, checkpointing_steps=1000))
    looks, plain = ((losses(tmp_path / name), weights(tmp_path / name)) for name in ("looks", "plain"))
    close(looks, plain, 0)
    assert all(runner.graphs.enabled and runner.graphs.captures for runner in runners)
    found = [line for line in metrics(tmp_path / "looks") if "eval/fid" in line]
    assert [line["step"] for line in found] == [7, 14, 20]
    assert all(np.isfinite(line["eval/fid"]) and np.isfinite(line["eval/held_out_loss"]) for line in found)


# -- conversion


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("ndim", [1, 2])
def test_a_checkpoint_whose_tensors_are_on_the_card(ndim, as_file, tmp_path):
    """The converted model predicts what the original does there, in float32."""
    torch.manual_seed(0)
    options = {"dim": 8, "dim_mults": (1, 2), "channels": 3}
    size = {2: {"image_size": 8}, 1: {"seq_length": 16}}[ndim]
    diffusion = GaussianDiffusion(Unet(**options), **size) if ndim == 2 else GaussianDiffusion1D(
        Unet1D(**options), **size
    )  # fmt: skip
    diffusion.to(DEVICE).eval()
    state_dict = diffusion.state_dict()
    assert all(value.device.type == DEVICE for value in state_dict.values())
    source = state_dict
    if as_file:
        source = tmp_path / "model-1.pt"
        torch.save({"step": 1, "model": state_dict, "version": "2.3.4"}, source)
    overrides = {"weights": "model"} if as_file else {}
    pipe = from_denoising_diffusion_pytorch(source, **size, **overrides)
    assert pipe.device.type == "cpu"
    x, t = torch.randn(2, 3, *((8, 8) if ndim == 2 else (16,)), device=DEVICE), torch.tensor([3, 900], device=DEVICE)
    with exact(), torch.no_grad():
        expected, found = diffusion.model(x, t), pipe.to(DEVICE).unet(x, t).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- compiling


def test_compiled_steps(runners, tmp_path, monkeypatch):
    """By inductor alone, and inside graphs; in float32, where only the order of sums differs (TF32 on a card)."""
    if END - time.monotonic() < 30:  # a test that is killed takes the report of the others with it
        pytest.skip("compiling may take longer than what is left of DDPM_HF_TEST_SECONDS")
    with contextlib.suppress(ImportError, AttributeError):  # another test may have asked while the card was hidden
        importlib.import_module("torch.utils._triton").has_triton.cache_clear()
    expected, _ = run(tmp_path / "eager", 8, mixed_precision="no", compile="none")
    found, _ = run(tmp_path / "inductor", 8, mixed_precision="no", compile="inductor")
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    plan = Plan(graphs=True, inductor="now" if ON_CARD else "never")
    monkeypatch.setattr(loop.compiling, "make_plan", lambda config, accelerator: plan)
    found, _ = run(tmp_path / "both", 8, mixed_precision="no")
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    assert runners[-1].graphs.enabled and runners[-1].graphs.captures
