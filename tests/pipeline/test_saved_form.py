"""One saved folder for all: the package, stock diffusers without it, and saved again from there."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import run_program
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from helpers import make
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D

SMALL = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 4}
# What the methods that start from given items find for `out`.
METHODS = """
import numpy as np, torch
seeded = lambda: torch.Generator().manual_seed(2)
given = {"sequence" if out.ndim == 3 else "image": out}
found = [
    pipe(**given, strength=0.5, generator=seeded(), output_type="np", return_dict=False)[0],
    pipe.encode(out, 3).numpy(),
    pipe.reconstruct(out, 0.5, generator=seeded()).mean,
    pipe.score(out, strengths=(0.3,), generator=seeded()).maps,
    pipe.score(out, "denoising", num_timesteps=3, generator=seeded()).scores,
]
"""
# Where the package cannot be imported.
STOCK = """
import sys
sys.modules["ddpm_hf"] = None
import hashlib, numpy as np, torch, diffusers
name, folder, again = sys.argv[1:]
pipe = getattr(diffusers, name).from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
options = {"guide": pipe.unet, "guidance_scale": 2.0, "jump_length": 1, "jump_n_sample": 2, "output_type": "np"}
half = np.arange(out.shape[2]) > 5 if out.ndim == 3 else np.eye(8)
completed = pipe.inpaint(out, half, generator=torch.Generator().manual_seed(1), return_dict=False, **options)[0]
size = {"length": 40} if out.ndim == 3 else {"height": 20}
larger = pipe(2, 2, torch.Generator().manual_seed(2), output_type="np", return_dict=False, **size)[0]
if out.ndim == 3:
    assert next(pipe.stream(num_inference_steps=1)).shape == pipe.extend(out[:1, :, :5], 16).sequences.shape
assert pipe.use_cuda_graphs() is pipe
assert all(w.movedim(1, -1).is_contiguous() for w in pipe.unet.parameters() if w.ndim > 2)
METHODS
print(*(hashlib.sha256(np.ascontiguousarray(each)).hexdigest() for each in (out, completed, larger, *found)))
pipe.save_pretrained(again)
""".replace("METHODS", METHODS)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_the_fast_sampler_is_saved(kind, tmp_path):
    pipe = make(kind).use_fast_sampler(4)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    assert type(loaded.scheduler) is DPMSolverMultistepScheduler and loaded.config.num_inference_steps == 4
    samples = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        samples.append(each(2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0])
    np.testing.assert_array_equal(*samples)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_pipelines_give_our_models_the_layout_of_their_activations(kind, tmp_path):
    """Weights of convolutions have their channels last, also after a move and loading; numbers and saved files stay."""

    def channels_last(pipe):
        return all(w.movedim(1, -1).is_contiguous() for w in pipe.unet.parameters() if w.ndim > 2)

    pipe = make(kind)
    assert channels_last(pipe) and channels_last(pipe.to(torch.float64)) and channels_last(pipe.to(torch.float32))
    pipe.save_pretrained(tmp_path / "saved")
    assert channels_last(type(pipe).from_pretrained(tmp_path / "saved"))
    assert channels_last(type(pipe).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16))

    usual = type(pipe.unet).from_pretrained(tmp_path / "saved" / "unet")
    assert all(weight.is_contiguous() for weight in usual.parameters())
    usual.save_pretrained(tmp_path / "usual")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "saved" / "unet" / name).read_bytes()
    x, t = torch.randn(2, usual.config.in_channels, *(8,) * usual.ndim), torch.tensor([3, 900])
    torch.testing.assert_close(pipe.unet(x, t).sample, usual(x, t).sample, rtol=1e-5, atol=1e-5)


def test_other_models_and_offloaded_weights_keep_their_layout():
    stock = UNet2DModel(8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                        up_block_types=("UpBlock2D",))  # fmt: skip
    offloaded = cpu_offload(UNet2D(sample_size=8, in_channels=1, **SMALL), torch.device("cpu"))
    for model in (stock, offloaded):
        layout = [weight.stride() for weight in model.parameters()]
        DDPMPipeline(model, GaussianScheduler())
        assert [weight.stride() for weight in model.parameters()] == layout


@pytest.mark.parametrize(("kind", "stock"), [("images", "DDPMPipeline"), ("sequences", "DiffusionPipeline")])
def test_the_same_samples_in_every_way(kind, stock, tmp_path):
    """Ours, and diffusers' classes in fresh processes without the package; saved from there, and loaded again.

    Samples of a call, completions, guided by the model itself, and larger samples.
    """
    pipe = make(kind)
    pipe.save_pretrained(tmp_path / "saved")
    ours = type(pipe).from_pretrained(tmp_path / "saved")
    assert type(ours.unet) is type(pipe.unet) and type(ours.scheduler) is GaussianScheduler
    ours.set_progress_bar_config(disable=True)
    samples = ours(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
    half = np.arange(16) > 5 if kind == "sequences" else np.eye(8)
    options = {"guide": ours.unet, "guidance_scale": 2.0, "jump_length": 1, "jump_n_sample": 2, "output_type": "np"}
    generator = torch.Generator().manual_seed(1)
    completed = ours.inpaint(samples, half, generator=generator, return_dict=False, **options)[0]
    size = {"length": 40} if kind == "sequences" else {"height": 20}
    larger = ours(2, 2, torch.Generator().manual_seed(2), output_type="np", return_dict=False, **size)[0]
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    printed = []
    for name, source, target in (("DiffusionPipeline", "saved", "again"), (stock, "again", "third")):
        done = run_program("-c", STOCK, name, tmp_path / source, tmp_path / target, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
    names = {"pipe": ours, "out": samples}
    exec(METHODS, names)
    results = (samples, completed, larger, *names["found"])
    digests = (hashlib.sha256(np.ascontiguousarray(each)).hexdigest() for each in results)
    assert printed == [" ".join(digests)] * 2
    ours.save_pretrained(tmp_path / "ours again")
    for copy in ("again", "third", "ours again"):
        assert files(tmp_path / copy) == files(tmp_path / "saved")
    assert not any(str(tmp_path).encode() in content for content in files(tmp_path / "third").values())


def test_the_levels_of_images_are_saved(tmp_path):
    """The bound is that of the levels in every way of loading; without them, as in older pipelines, of a density."""
    torch.manual_seed(0)
    unet, units = UNet2D(sample_size=8, in_channels=1, **SMALL), {"data_shift": [32767.5], "data_scale": [32767.5]}
    x = np.random.default_rng(0).integers(0, 2**16, (2, 8, 8, 1)).astype(np.uint16)

    def score(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe.score(x, "denoising", num_timesteps=3, generator=torch.Generator().manual_seed(0)).scores

    pipe = DDPMPipeline(unet, GaussianScheduler(), **units, data_levels=[65536])
    pipe.save_pretrained(tmp_path / "levels")
    older = DDPMPipeline(unet, GaussianScheduler(), **units)
    older.save_pretrained(tmp_path / "older")
    assert "data_levels" not in json.loads((tmp_path / "older" / "model_index.json").read_text())
    # a bin of the model's range is 2 / 65535 wide, and only t = 0 has one
    scores, densities = score(pipe), score(older)
    assert np.abs(scores - densities).min() > 0.01
    for folder, expected in (("levels", scores), ("older", densities)):
        for cls, more in ((DDPMPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
            loaded = cls.from_pretrained(tmp_path / folder, **more)
            np.testing.assert_array_equal(score(loaded), expected)
            np.testing.assert_array_equal(score(type(loaded).from_pipe(loaded)), expected)


@pytest.mark.parametrize(
    ("levels", "units", "message"),
    [
        ([256, 256], {"data_scale": [2.0]}, r"one whole number of at least 2 per channel \(1\), got \[256, 256\]"),
        ([1], {"data_scale": [2.0]}, "at least 2 per channel"),
        ([4.5], {"data_scale": [2.0]}, "one whole number"),
        ([256], {}, "must be None without data_scale"),
    ],
)
def test_levels_that_do_not_fit(levels, units, message):
    with pytest.raises(ValueError, match=f"data_levels.*{message}"):
        DDPMPipeline(UNet2D(sample_size=8, in_channels=1, **SMALL), GaussianScheduler(), **units, data_levels=levels)


def test_two_versions_in_one_process_do_not_share_code(tmp_path, monkeypatch):
    """And without trust, the stock class says so."""
    for version in ("0.1.0", "0.2.0.dev1"):
        monkeypatch.setattr("ddpm_hf.__version__", version)
        make("images").save_pretrained(tmp_path / version)
    other = tmp_path / "0.2.0.dev1"
    (code,) = other.glob("unet/unet_ddpm_hf_0_2_0_dev1.py")
    code.write_text(code.read_text() + "\nUNet2D.later = True\n")
    program = (
        "import sys; sys.modules['ddpm_hf'] = None\nfrom diffusers import DiffusionPipeline\n"
        "a, b = (DiffusionPipeline.from_pretrained(p, trust_remote_code=True).unet for p in sys.argv[1:])\n"
        "print(hasattr(a, 'later'), hasattr(b, 'later'))\n"
        "DiffusionPipeline.from_pretrained(sys.argv[1])"
    )
    done = run_program("-c", program, tmp_path / "0.1.0", other, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "m"))
    assert done.stdout.strip() == "False True", done.stderr
    assert done.returncode != 0 and "trust_remote_code" in done.stderr
    assert DDPMPipeline.from_pretrained(other).unet.config.dim == 8  # the package's own classes read any version


@pytest.mark.parametrize("wrong", ["missing", "left over", "shape", "damaged", "unknown key"])
def test_weights_that_do_not_fit_are_refused(wrong, tmp_path):
    """Never a silent random weight."""
    make("images").save_pretrained(tmp_path)
    file, config = (tmp_path / "unet" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if wrong == "missing":
        del tensors[name]
    elif wrong == "left over":
        name = "one_more.weight"
        tensors[name] = torch.zeros(3)
    elif wrong == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    if wrong == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
        name = "diffusion_pytorch_model.safetensors"
    if wrong == "unknown key":
        name = "dimm"
        config.write_text(json.dumps({**json.loads(config.read_text()), name: 3}))
    for load in (
        lambda: UNet2D.from_pretrained(tmp_path, subfolder="unet"),
        lambda: DDPMPipeline.from_pretrained(tmp_path),
    ):
        with pytest.raises((ValueError, OSError), match=re.escape(name)):
            load()


def test_the_parts_alone(tmp_path):
    make("images").save_pretrained(tmp_path)
    assert UNet2D.from_pretrained(tmp_path, subfolder="unet").config.dim == 8
    assert GaussianScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.beta_schedule == "sigmoid"
    assert "ddpm_hf" in sys.modules


def test_misspelt_keys_are_refused(tmp_path):
    """By the package, and by the code that the folder carries."""
    make("images").save_pretrained(tmp_path / "saved")
    names = {
        "model_index.json": "num_inference_step", "scheduler/scheduler_config.json": "beta_shedule",
        "unet/config.json": "dropuot",
    }  # fmt: skip
    for i, (name, key) in enumerate(names.items()):
        shutil.copytree(tmp_path / "saved", tmp_path / str(i))
        config = tmp_path / str(i) / name
        config.write_text(json.dumps({**json.loads(config.read_text()), key: 1}))
        with pytest.raises(ValueError, match=f"does not know: {key}"):
            DDPMPipeline.from_pretrained(tmp_path / str(i))
    program = """
import sys; sys.modules["ddpm_hf"] = None
import diffusers
for folder in sys.argv[1:]:
    try:
        diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        print(error)
"""
    folders = [tmp_path / str(i) for i in range(len(names))]
    done = run_program("-c", program, *folders, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "m"))
    for line, key in zip(done.stdout.splitlines(), names.values(), strict=True):
        assert f"does not know: {key}" in line


def test_keys_of_others_are_warned_of(tmp_path, diffusers_log):
    """As of stock classes: what others keep in a configuration does not stop loading."""
    make("images").save_pretrained(tmp_path)
    for name in ("model_index.json", "unet/config.json"):
        config = tmp_path / name
        config.write_text(json.dumps({**json.loads(config.read_text()), "of_another_program": 1}))
    assert DDPMPipeline.from_pretrained(tmp_path)(num_inference_steps=2).images
    for name in ("DDPMPipeline", "UNet2D"):
        assert f"{{'of_another_program': 1}} were passed to {name}, but are not expected" in diffusers_log.text


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_the_average_of_diffusers_saves_and_loads_our_models(kind, tmp_path):
    model = make(kind).unet
    ema = EMAModel(
        model.parameters(), decay=0.9, use_ema_warmup=True, power=0.7, model_cls=type(model), model_config=model.config
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, type(model))
    assert (again.decay, again.power, again.optimization_step) == (0.9, 0.7, 1)
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, ema.shadow_params, strict=True))
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ema.shadow_params, strict=True))


def test_a_stock_configuration_is_read(tmp_path):
    """What stock schedulers know is no unknown key, also after their keys have been carried through ours."""
    stock = DPMSolverMultistepScheduler.from_config(GaussianScheduler().config)
    stock.save_pretrained(tmp_path / "stock")
    ours = GaussianScheduler.from_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(GaussianScheduler.from_pretrained(tmp_path / "ours").betas, GaussianScheduler().betas)


def test_loading_without_einops_says_so(tmp_path):
    """The model's code needs einops; where it is missing, the error's last line names it."""
    make("images").save_pretrained(tmp_path / "saved")
    program = """
import sys
from importlib.machinery import PathFinder
sys.modules["ddpm_hf"] = None
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.startswith("einops") else find(name, *rest))
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = run_program("-c", program, tmp_path / "saved", cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'einops'", done.stderr
