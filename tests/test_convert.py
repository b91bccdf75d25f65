"""Checkpoints written by the original's own trainers, converted: inferred options, equal samples, refusals."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_program, run_program
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Trainer, Trainer1D, Unet, Unet1D
from denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d import Dataset1D
from PIL import Image

from ddpm_hf import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.convert import from_denoising_diffusion_pytorch, read_checkpoint
from ddpm_hf.hub.card import card_text

OPTIONS_2D = {"dim": 8, "dim_mults": (1, 2), "channels": 3, "self_condition": True, "full_attn": (True, False)}
DIFFUSION_2D = {"image_size": 8, "timesteps": 20, "objective": "pred_noise", "min_snr_loss_weight": True,
                "min_snr_gamma": 3, "sampling_timesteps": 5}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of its Trainer on random pictures, and of its Trainer1D: (checkpoint, trainer) of each."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("peer")
    rng = np.random.default_rng(0)
    (base / "photos").mkdir()
    for i in range(100):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(base / "photos" / f"{i}.png")
    options = {"train_batch_size": 16, "train_num_steps": 2, "save_and_sample_every": 2, "num_samples": 1}
    diffusion = GaussianDiffusion(Unet(**OPTIONS_2D), **DIFFUSION_2D)
    two = Trainer(diffusion, str(base / "photos"), results_folder=str(base / "2d"), calculate_fid=False, train_lr=1e-2,
                  ema_update_every=1, **options)  # fmt: skip
    two.train()
    one_d = GaussianDiffusion1D(
        Unet1D(8, dim_mults=(1, 2), channels=2, random_fourier_features=True), seq_length=16, timesteps=20,
        objective="pred_v", beta_schedule="cosine",
    )  # fmt: skip
    one = Trainer1D(one_d, Dataset1D(torch.rand(40, 2, 16)), results_folder=str(base / "1d"), **options)
    one.train()
    return {"2d": (base / "2d" / "model-1.pt", two), "1d": (base / "1d" / "model-1.pt", one)}


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_samples_of_a_converted_2d_checkpoint(trained, weights, tmp_path, double):
    path, trainer = trained["2d"]
    pipe = from_denoising_diffusion_pytorch(path, weights=weights, image_size=8, sampling_timesteps=5)
    pipe.save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.unet.double()
    original = (trainer.ema.ema_model if weights == "ema" else trainer.model).eval().double()
    torch.manual_seed(3)
    expected = original.sample(batch_size=2)
    got = pipe(2, generator=torch.Generator().manual_seed(3), output_type="pt").images
    # its schedule is rounded to float32: 6e-8 of numbers that 5 steps magnify at most a hundredfold
    torch.testing.assert_close(got.double(), expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_samples_of_a_converted_1d_checkpoint(trained, double):
    path, trainer = trained["1d"]
    pipe = from_denoising_diffusion_pytorch(path, seq_length=16)
    pipe.unet.double()
    torch.manual_seed(3)
    expected = trainer.ema.ema_model.eval().double().sample(batch_size=2)
    got = pipe(2, generator=torch.Generator().manual_seed(3), output_type="pt").sequences
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_everything_is_inferred(trained):
    found = read_checkpoint(trained["2d"][0])
    assert found.unet["dim_mults"] == [1, 2] and found.unet["self_condition"] and not found.unet["learned_variance"]
    assert found.unet["full_attn"] == [True, False] and found.unet["num_mem_kv"] == 4
    assert (found.unet["attn_heads"], found.unet["attn_dim_head"], found.unet["norm"]) == ([4, 4], [32, 32], "rms")
    assert found.scheduler["beta_schedule"] == "sigmoid" and found.scheduler["prediction_type"] == "epsilon"
    assert "min-SNR: gamma 3" in str(found) and "timesteps: 20, schedule: sigmoid" in str(found)
    one = read_checkpoint(trained["1d"][0])
    assert one.unet["time_embedding"] == "random_fourier"  # the optimizer has no state for its frequencies
    assert one.pipeline["data_shift"] == [0.5, 0.5] and one.scheduler["beta_schedule"] == "cosine"
    assert read_checkpoint(trained["1d"][0], auto_normalize=False).pipeline == {"num_inference_steps": None}


@pytest.mark.parametrize(
    ("kind", "option", "has"),
    [
        ("2d", {"attn_heads": 8}, "memory key-values"),
        ("2d", {"norm_groups": 4}, "a norm without groups"),
        ("1d", {"theta": 500.0}, "a Fourier time embedding"),
        ("2d", {"auto_normalize": False}, "images"),
    ],
)
def test_options_without_effect_are_refused(trained, kind, option, has):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} has no effect on this checkpoint, which has {has}"):
        read_checkpoint(trained[kind][0], **option)


@pytest.mark.parametrize(
    ("heads", "rule"),
    [(0, "attn_heads must divide"), ([4], "one per stage (2), got [4]"), ([4, 4, 4], "one per stage (2)")],
)
def test_heads_that_no_stage_has_are_refused(trained, heads, rule):
    """Of a list of another length, stages would have had the heads of their neighbours; 0 was taken for the default."""
    with pytest.raises(ValueError, match=re.escape(rule)):
        read_checkpoint(trained["1d"][0], attn_heads=heads)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("steps,gamma", [(50, None), (1000, None), (250, 5.0), (1000, 1.0)])
def test_schedule_target_and_min_snr(objective, schedule, steps, gamma):
    min_snr = {"min_snr_loss_weight": True, "min_snr_gamma": gamma} if gamma else {}
    diffusion = GaussianDiffusion(
        Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=steps, objective=objective, beta_schedule=schedule, **min_snr
    )
    found = read_checkpoint(diffusion.state_dict())
    names = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
    assert found.scheduler["beta_schedule"] == schedule and found.scheduler["prediction_type"] == names[objective]
    line = next(line for line in found.lines if "min-SNR" in line)
    assert line.endswith("off") if gamma is None else float(line.split()[-1]) == pytest.approx(gamma, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_halved_checkpoints(dtype, objective, schedule):
    """A named schedule is recognised through the rounding, and its exact betas are taken: half precision costs only
    that of the weights themselves."""
    for gamma in (None, 5.0):
        min_snr = {"min_snr_loss_weight": True, "min_snr_gamma": gamma} if gamma else {}
        diffusion = GaussianDiffusion(
            Unet(8, dim_mults=(1, 2)), image_size=8, objective=objective, beta_schedule=schedule, **min_snr
        )
        state = {name: value.to(dtype) for name, value in diffusion.state_dict().items()}
        whole, halved = read_checkpoint(diffusion.state_dict()), read_checkpoint(state)
        assert halved.scheduler == whole.scheduler and halved.scheduler["beta_schedule"] == schedule
        line = next(line for line in halved.lines if "min-SNR" in line)
        # the largest of 1,000 weights is rounded up by at most half a unit in the last place
        assert (
            line.endswith("off")
            if gamma is None
            else float(line.split()[-1]) == pytest.approx(gamma, rel=torch.finfo(dtype).eps)
        )
    pipe = from_denoising_diffusion_pytorch(state)
    assert pipe.unet.dtype == torch.float32
    assert torch.equal(pipe.unet.conv_in.bias, state["model.init_conv.bias"].float())


def test_halved_betas_of_no_named_schedule_are_refused():
    diffusion = GaussianDiffusion(
        Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=50, beta_schedule="cosine", schedule_fn_kwargs={"s": 0.02}
    )
    with pytest.raises(ValueError, match="rounded to torch.float16 .* before it was halved"):
        read_checkpoint({name: value.half() for name, value in diffusion.state_dict().items()})


DAMAGES = {
    "none": lambda v: None, "scalar": lambda v: torch.zeros(()), "empty": lambda v: v[:0],
    "cut": lambda v: v[: len(v) // 2], "deep": lambda v: v[None, None],
    "flat": lambda v: v.reshape(-1), "sparse": lambda v: v.to_sparse(),
    "meta": lambda v: v.to("meta"), "whole numbers": lambda v: v.long(), "complex": lambda v: v.to(torch.complex64),
    "NaN": lambda v: torch.full_like(v, float("nan")), "infinity": lambda v: torch.full_like(v, float("inf")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_tensor_is_refused(damage):
    """Whatever a tensor was replaced by, the error names it or its rule, and never is a traceback from inside."""
    two = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=30)
    one = GaussianDiffusion1D(
        Unet1D(8, dim_mults=(1, 2), channels=2, random_fourier_features=True), seq_length=16, timesteps=30
    )
    accepted = []
    for state in (two.state_dict(), one.state_dict()):
        for name in [n for n in state if n.startswith("model.") or n in ("betas", "loss_weight")]:
            value = DAMAGES[damage](state[name])
            if damage == "flat" and value.shape == state[name].shape:
                continue  # a vector is flat already
            try:
                read_checkpoint({**state, name: value})
            except ValueError:
                continue
            accepted.append(name)
    # dimensions of size 1 do not count: the numbers are the same in the same order
    assert all(damage == "deep" or damage == "flat" and name.endswith(".g") for name in accepted), accepted


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [("ema", None, "no EMA weights"), ("ema", 3, "no EMA weights"), ("ema", {3: torch.zeros(2)}, "no EMA weights"),
     ("model", None, "model must be a dict"), ("model", [1], "model must be a dict"),
     ("model", {3: torch.zeros(2)}, "must be text, got 3"), ("model", {"model.x": None}, "model.x is a NoneType")],
)  # fmt: skip
def test_parts_of_another_form_are_refused(part, content, message):
    state = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=30).state_dict()
    checkpoint = {"model": state, "ema": {f"ema_model.{name}": value for name, value in state.items()}, "step": 1}
    assert read_checkpoint(checkpoint).ndim == 2
    with pytest.raises(ValueError, match=message):
        read_checkpoint({**checkpoint, part: content})
    del checkpoint["ema"]
    assert read_checkpoint(checkpoint, weights="model").ndim == 2
    with pytest.raises(ValueError, match="use weights='model'"):
        read_checkpoint(checkpoint)


def test_other_schedules_keep_their_betas():
    diffusion = GaussianDiffusion(
        Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=50, beta_schedule="cosine", schedule_fn_kwargs={"s": 0.02}
    )
    pipe = from_denoising_diffusion_pytorch(diffusion.state_dict())
    assert pipe.scheduler.config.beta_schedule == "trained"
    assert torch.equal(pipe.scheduler.betas.float(), diffusion.betas)


def test_program(trained, tmp_path, monkeypatch, capsys):
    path, _ = trained["2d"]
    program = ROOT / "training" / "convert.py"
    done = run_program(program, path, "--output_dir", "mine", "--image_size", "8", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dim_mults: [1, 2]" in done.stdout and "sample_size: [8, 16] (given)" in done.stdout
    index = (tmp_path / "mine" / "model_index.json").read_text()
    assert "pipeline_ddpm_hf_" in index and str(tmp_path) not in index  # the form that loads without the package
    assert list((tmp_path / "mine" / "unet").glob("unet_ddpm_hf_*.py"))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "mine")
    pipe.set_progress_bar_config(disable=True)
    assert pipe().images[0].size == (16, 8)
    card = card_text(tmp_path / "mine")
    assert f"converted from {Path(path).name}, a checkpoint of denoising-diffusion-pytorch." in card
    assert str(tmp_path) not in card and "Data, options, command, hardware and time were not recorded." in card
    monkeypatch.chdir(tmp_path)
    main = load_program("convert").main
    assert main([str(path), "--output_dir", "mine"]) == 2 and "new or empty" in capsys.readouterr().err
    assert main([str(trained["1d"][0]), "--output_dir", "one", "--seq_length", "32"]) == 0
    assert DDPMPipeline1D.from_pretrained(tmp_path / "one").unet.config.sample_size == 32


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_files_that_are_refused(trained, tmp_path):
    whole = trained["2d"][0].read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": Evil(), "ema": {}, "step": 1}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    program = ROOT / "training" / "convert.py"
    for name, message in [("cut.pt", "damaged"), ("list.pt", "dict"), ("other.pt", "no tensor model.init_conv.weight"),
                          ("none.pt", "not a file"), ("evil.pt", "refused"), ("old.pt", "")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            from_denoising_diffusion_pytorch(tmp_path / name)
    done = run_program(program, tmp_path / "evil.pt", "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 2 and "would run its code" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "owned").exists() and not os.path.exists("owned")


def test_missing_extra_and_misshapen_tensors_are_named():
    state = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8).state_dict()
    name = "model.ups.0.1.block2.proj.weight"
    for change, message in [
        (lambda s: s.pop(name), f"missing: {name}"),
        (lambda s: s.update({"model.extra.bias": torch.zeros(2)}), "unknown: model.extra.bias"),
        (lambda s: s.update({name: torch.zeros(2, 2)}), rf"of another shape.*{name} of shape \(2, 2\)"),
        (lambda s: s.pop("betas"), "no tensor betas"),
        (lambda s: s.update({"model.classes_mlp.0.bias": torch.zeros(2)}), "classifier_free_guidance.py cannot"),
        # as WeightedObjectiveGaussianDiffusion's, which has two predictions and their weights
        (lambda s: s.update({"model.final_conv.weight": torch.zeros(8, 8, 1, 1)}), r"given \(3\), .* got 8"),
        (lambda s: s.update(loss_weight=torch.rand(1000)), "no known objective"),
        (lambda s: s.update(loss_weight=torch.zeros(1000)), "not all of them 0"),
        (lambda s: s.update({"model.time_mlp.1.weight": torch.zeros(3, 8)}), "width 0 of time_mlp"),
    ]:
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(changed)
    with pytest.raises(ValueError, match="weights must be"):
        read_checkpoint(state, weights="best")
    with pytest.raises(ValueError, match="a U-Net without the schedule"):
        read_checkpoint({name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")})


class OnCard(torch.Tensor):
    """A tensor that says it lies on a card, can be copied to the CPU, and refuses everything else."""

    @staticmethod
    def __new__(cls, values):
        like = {"strides": values.stride(), "dtype": values.dtype, "device": "cuda"}
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, **like)
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu"):
            return args[0].values.clone()
        raise RuntimeError(f"{function} of a tensor on the card")


def test_tensors_of_any_device_are_taken():
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=30)
    state = diffusion.state_dict()
    here = from_denoising_diffusion_pytorch(state)
    there = from_denoising_diffusion_pytorch({name: OnCard(value) for name, value in state.items()})
    assert there.device.type == "cpu" and there.scheduler.config == here.scheduler.config
    for name, value in here.unet.state_dict().items():
        assert torch.equal(there.unet.state_dict()[name], value), name
