"""Settings that follow from the device, with a card that is made up."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ddpm_hf import GaussianScheduler, TrainConfig
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.trainer import device


@pytest.fixture
def card(monkeypatch):
    """A card that computes in bf16."""
    monkeypatch.setattr(device, "on_card", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """No card, and an environment that no launcher has made."""
    monkeypatch.setattr(device, "on_card", lambda: False)
    for name in ("MIXED_PRECISION", "USE_FSDP", "USE_DEEPSPEED"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def config(folder, **options):
    return TrainConfig(dataset_name="digits", output_dir=str(folder / "run"), **options)


def precision(folder, **options):
    return device.resolved(config(folder, **options)).mixed_precision


def test_bf16_is_chosen_on_a_card_only(tmp_path, monkeypatch, card):
    assert precision(tmp_path) == "bf16"
    assert precision(tmp_path, mixed_precision="no") == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert precision(tmp_path) == "no"
    monkeypatch.setattr(device, "on_card", lambda: False)
    assert precision(tmp_path) == "no"


def test_what_accelerate_is_configured_for_comes_before_the_default(tmp_path, monkeypatch, card):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision(tmp_path) == "fp16"
    assert precision(tmp_path, mixed_precision="no") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # its launcher says so where nothing was asked for
    assert precision(tmp_path) == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert precision(tmp_path) == "no"


@pytest.mark.parametrize(("saved", "expected"), [("null", "no"), ("'no'", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, card, saved, expected):
    """Up to version 0.3.0 null stood for accelerate's, which is float32 unless configured."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"mixed_precision: {saved}\n")
    assert precision(tmp_path) == expected
    earlier = {"mixed_precision": None if saved == "null" else saved.strip("'")}
    now = device.resolved(config(tmp_path))
    assert not [line for line in now.differences(earlier) if line.startswith("mixed_precision")]
    other = device.resolved(config(tmp_path, mixed_precision="bf16" if expected == "no" else "no"))
    assert [line for line in other.differences(earlier) if line.startswith("mixed_precision")]


def test_the_given_configuration_is_left_alone(tmp_path):
    given = config(tmp_path, cache_gb=0.5)
    made = device.resolved(given)
    assert given.mixed_precision is None and given.dataloader_num_workers is None
    assert (made.mixed_precision, made.dataloader_num_workers) == ("no", 0)
    made.check_scope("digits")
    with pytest.raises(ValueError, match="cache_gb applies"):
        made.check_scope("ecg")  # what was given is still known


def test_workers_decode_images_on_a_card(tmp_path, monkeypatch, card):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    folder = TrainConfig(train_data_dir=str(tmp_path), output_dir=str(tmp_path / "run"))
    assert device.resolved(folder).dataloader_num_workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.resolved(folder).dataloader_num_workers == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert device.resolved(folder).dataloader_num_workers == 8
    assert device.resolved(TrainConfig(), ImageDataset((), (8, 8))).dataloader_num_workers == 8
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
        assert device.resolved(folder).dataloader_num_workers == 0
    assert device.resolved(TrainConfig(), [torch.zeros(1, 8, 8)]).dataloader_num_workers == 0
    assert device.resolved(config(tmp_path)).dataloader_num_workers == 0  # digits are arrays
    folder.dataloader_num_workers = 0
    assert device.resolved(folder).dataloader_num_workers == 0
    monkeypatch.setattr(device, "on_card", lambda: False)
    folder.dataloader_num_workers = None
    assert device.resolved(folder).dataloader_num_workers == 0


def test_bf16_without_its_instructions_is_warned_of(tmp_path, monkeypatch):
    asked = device.resolved(config(tmp_path, mixed_precision="bf16"))
    found = {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert "seven to eleven times" in device.precision_warning(asked)
    assert device.precision_warning(device.resolved(config(tmp_path))) is None
    for name in ("avx512_bf16", "amx_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {**found, name: True}, raising=False)
        assert device.precision_warning(asked) is None


def test_settings_last_as_long_as_the_run(tmp_path, monkeypatch, card):
    cudnn = torch.backends.cudnn

    def state():
        modes = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        return cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision(), modes

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with device.settings(device.resolved(config(tmp_path, mixed_precision="no"))):
        assert state() == (True, False, "high", before[3])
    assert state() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with device.settings(device.resolved(config(tmp_path))):
        assert state() == (True, False, before[2], before[3])  # bf16
    with device.settings(device.resolved(config(tmp_path, deterministic=True))):
        assert state() == (False, True, before[2], (True, False))
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        with device.deterministic_where_possible():
            assert state()[3] == (True, True)
        assert state()[3] == (True, False)
    assert state() == before
    monkeypatch.setattr(device, "on_card", lambda: False)
    with device.settings(device.resolved(config(tmp_path, mixed_precision="no"))):
        assert state() == before


class Scatter(nn.Module):
    """A model with an operation that has no deterministic form on any device, or without it."""

    def __init__(self, scatter):
        super().__init__()
        self.linear, self.scatter = nn.Conv2d(1, 1, 1), scatter

    def forward(self, x, t):
        y = self.linear(x)
        if not self.scatter:
            return SimpleNamespace(sample=y)
        place = torch.arange(y.numel())
        return SimpleNamespace(sample=torch.zeros_like(y).put_(place, y.flatten(), accumulate=False))


def test_an_operation_without_a_deterministic_form_is_named_before_training(tmp_path):
    c = device.resolved(config(tmp_path, deterministic=True))
    accelerator, scheduler = Accelerator(cpu=True), GaussianScheduler(10)
    model, plain = Scatter(True), Scatter(False)
    random = torch.get_rng_state()
    with device.settings(c):
        with pytest.raises(ValueError, match=r"deterministic must be false with this model on cpu: put_ has no"):
            device.check_deterministic(model, scheduler, (1, 4, 4), c, accelerator)
        device.check_deterministic(plain, scheduler, (1, 4, 4), c, accelerator)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in [*model.parameters(), *plain.parameters()])
