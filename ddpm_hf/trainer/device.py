"""Settings that follow from the device: precision, algorithms of torch and cuDNN, and processes that load data."""

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn

from ddpm_hf.config import SOURCES, TrainConfig, accelerate_precision, in_present_form
from ddpm_hf.data.checking import check_shared_memory, usable_cores, worker_memory
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.opening import kind_of_source
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.reading import read_mapping

DECODED = ("folder", "image table", "image stream")  # kinds of data whose items are decoded when they are read
MOST_WORKERS = 8
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as `torch.cpu.get_capabilities` names them


def on_card() -> bool:
    """Return True if accelerate will train on a CUDA device."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def resolved(config: TrainConfig, dataset: Any = None) -> TrainConfig:
    """Return a copy of a configuration in which the options that depend on the device have their values.

    mixed_precision is, in this order, what was given, what the run in output_dir has, what accelerate is configured
    for, bf16 on a card that computes in it, and no. dataloader_num_workers is, where it was not given, the number of
    cores of this process (at most 8, and 0 if /dev/shm is too small) on a card for data that is decoded, and 0
    elsewhere.
    """
    config = copy.copy(config)
    if config.mixed_precision is None:
        file = Path(config.output_dir) / "config.yaml"
        earlier = {}
        with contextlib.suppress(ValueError, OSError):  # refused where the folder is checked
            earlier = in_present_form(read_mapping(file)) if file.is_file() else {}
        config.mixed_precision = earlier.get("mixed_precision") or _default_precision()
    if config.dataloader_num_workers is None:
        config.dataloader_num_workers = _default_workers(config, dataset)
    return config


def _default_precision() -> str | None:
    configured = accelerate_precision()
    if configured == "fp8":  # refused when accelerate starts
        return None
    spread = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    by_itself = "bf16" if on_card() and not spread and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return configured or by_itself


def _default_workers(config: TrainConfig, dataset: Any) -> int:
    decoded = isinstance(dataset, ImageDataset) or (dataset is None and _is_decoded(config))
    if not on_card() or not decoded:
        return 0
    workers = min(MOST_WORKERS, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    size = dataset.resolution if decoded and dataset is not None else (config.resolution or [64])[:2]
    height, width = (*size, *size)[:2]
    try:  # twice: the batches of an evaluation wait there too
        check_shared_memory(2 * worker_memory(workers, config.train_batch_size, (4, height, width), 1), workers)
    except ValueError:
        return 0
    return workers


def _is_decoded(config: TrainConfig) -> bool:
    """Return True if the items of the data that a configuration names are decoded when they are read."""
    if config.train_data_dir and not config.sequence_columns:
        return True  # a folder of images or a table of images; which of both takes listing the folder
    return any(getattr(config, name) for name in SOURCES) and kind_of_source(config) in DECODED


def room_for_data(device: torch.device) -> int:
    """Return the bytes of a device's memory that data may take to stay there: a tenth on a card, 0 elsewhere."""
    return torch.cuda.get_device_properties(device).total_memory // 10 if device.type == "cuda" else 0


def precision_warning(config: TrainConfig) -> str | None:
    """Return a sentence if bf16 was chosen for a processor without instructions for it; None otherwise."""
    if config.mixed_precision != "bf16" or on_card() or not hasattr(torch.cpu, "get_capabilities"):
        return None
    found = torch.cpu.get_capabilities()
    if not found or any(found.get(name) for name in BF16_INSTRUCTIONS):
        return None
    return (
        "mixed_precision bf16 on a processor without bfloat16 instructions: a step takes seven to eleven times as long "
        "as in float32 (mixed_precision no)"
    )


@contextlib.contextmanager
def settings(config: TrainConfig) -> Iterator[None]:
    """Set torch and cuDNN for a run, and set them back at its end.

    With `deterministic`, only deterministic algorithms run. Otherwise cuDNN chooses its algorithms on a card by timing
    them, because shapes are fixed. Without mixed precision, matrix products on a card use TF32, as convolutions do.
    """
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision())
    filled = torch.utils.deterministic.fill_uninitialized_memory
    mode = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost a pass over all new memory
    if on_card():
        cudnn.benchmark, cudnn.deterministic = not config.deterministic, config.deterministic
        if config.mixed_precision == "no":
            torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        torch.set_float32_matmul_precision(before[2])
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


@contextlib.contextmanager
def deterministic_where_possible() -> Iterator[None]:
    """Let operations without a deterministic form run inside, with torch's warning (evaluations may have some)."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def check_deterministic(model: nn.Module, scheduler, shape: tuple[int, ...], config: TrainConfig, accelerator) -> None:
    """Try a forward and a backward pass of a copy of the model with deterministic algorithms.

    Raises:
        ValueError: an operation has no deterministic form on this device; the message has its name.
    """
    device = accelerator.device
    trial = copy.deepcopy(model).to(device).train()
    x0 = torch.zeros(2, *shape, device=device)
    timesteps = torch.zeros(2, dtype=torch.long, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            with accelerator.autocast():
                losses = diffusion_loss(
                    trial, scheduler, x0, timesteps, torch.zeros_like(x0), weighting=config.loss_weighting,
                    min_snr_gamma=config.min_snr_gamma or None, self_condition=config.self_condition,
                    class_labels=timesteps if config.class_labels else None,
                ).loss  # fmt: skip
            losses.mean().backward()
        except RuntimeError as error:
            operation, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            raise ValueError(
                f"deterministic must be false with this model on {device.type}: {operation} has no deterministic form"
            ) from error
