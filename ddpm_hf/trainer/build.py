"""Building the parts of a run (scheduler, model, accelerator, evaluator) and checking that they fit together."""

import math
import os
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from diffusers import UNet2DModel
from torch.utils.checkpoint import checkpoint

from ddpm_hf.config import TrainConfig
from ddpm_hf.data.checking import check_shared_memory
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.evaluator import EvalSettings, Evaluator
from ddpm_hf.evaluation.pairs import Pairs
from ddpm_hf.losses import first_step_warning
from ddpm_hf.masks import check_strategy
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.trainer import launcher
from ddpm_hf.trainer.device import precision_warning
from ddpm_hf.trainer.memory import keep_freed_memory, return_freed_memory
from ddpm_hf.trainer.optimizer import warmup_warning
from ddpm_hf.unet import UNet1D, UNet2D


def make_scheduler(config: TrainConfig, feed, betas: list[float] | None = None) -> GaussianScheduler:
    """Build the noise schedule that the options ask for; predictions of x0 are clipped to the range of the data.

    Args:
        betas: the betas in the place of those that the options ask for.
    """
    return GaussianScheduler(
        trained_betas=betas,
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type="learned_range" if config.learned_variance else "fixed_small",
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        snr_shift=size_shift(feed.shape[1:]) if config.snr_shift == "auto" else config.snr_shift,
        clip_sample_range=feed.scaling.limit,
    )


def size_shift(size: tuple[int, ...]) -> float:
    """Return the shift of the log-SNR for items of a size, (length,) or (height, width): at most 0.

    The mean over n values has the noise of one value divided by the root of n, so that more values for the same
    content show it under more noise: the log-SNR of that content grows by log(n). The shift takes this back. For images
    it is 2 log(64 / size), as in Hoogeboom et al. (arXiv:2301.11093, section 3.1), with the root of height times width
    as the size. The base of sequences is 256 points, the length of the bundled electrocardiogram's windows, on which
    the schedules of this package were tried. Smaller items keep the schedule.
    """
    base = 256 if len(size) == 1 else 64 * 64
    return min(0.0, math.log(base / math.prod(size)))


def make_model(config: TrainConfig, feed, more: dict | None = None) -> UNet1D | UNet2D:
    """Build a U-Net for the items and classes of the data, with weights drawn from the global generator.

    Args:
        more: arguments of the U-Net that no option has.
    """
    channels, *size = feed.shape
    options = {**(more or {}), **config.model_options()}
    if feed.class_names is not None:
        options["num_class_embeds"] = len(feed.class_names)
    options["condition_channels"] = condition_channels(config, feed)
    if len(size) == 1:
        return UNet1D(sample_size=size[0], in_channels=channels, **options)
    sample_size = size[0] if size[0] == size[1] else tuple(size)
    return UNet2D(sample_size=sample_size, in_channels=channels, **options)


def condition_channels(config: TrainConfig, feed) -> int:
    """Return the number of channels of the condition that the model of a run is given; 0 without one."""
    if config.condition == "known":
        return 2 * feed.shape[0]  # the values and the mask
    return 0 if feed.condition_shape is None else feed.condition_shape[0]


def check_model(config: TrainConfig, feed, model, given: bool) -> None:
    """Check that the model fits the data, and a `given` one the options.

    Raises:
        ValueError: it does not.
    """
    model_config, name = model.config, type(model).__name__
    if given:
        config.check_scope(feed.kind, model)
        conditioned = bool(getattr(model_config, "self_condition", False))
        if conditioned != config.self_condition:
            raise ValueError(f"self_condition must be the given model's, {conditioned}, got {config.self_condition}")
        _check_variance(config, model_config, name)
        able = hasattr(model, "enable_gradient_checkpointing")
        able = able and getattr(model, "_supports_gradient_checkpointing", True)
        if config.gradient_checkpointing and not able:
            raise ValueError(f"gradient_checkpointing must be false: {name} does not support it")
    _check_classes(config, feed, model)
    _check_condition(config, feed, model)
    channels, *own = feed.shape
    if model_config.in_channels != channels:
        raise ValueError(f"the model takes {model_config.in_channels} channels, the data has {channels}")
    size = model_config.sample_size
    expected = list(size) if isinstance(size, (tuple, list)) else [size] * len(own)
    if expected != own:
        raise ValueError(f"the model's sample_size must be the data's {tuple(own)}, got {size}")


def _check_variance(config: TrainConfig, model_config, name: str) -> None:
    """Check that a given model predicts a variance if the run trains one, and only then.

    Raises:
        ValueError: its number of output channels is another.
    """
    channels = model_config.in_channels
    learned = getattr(model_config, "learned_variance", False)
    predicted = getattr(model_config, "out_channels", None) or channels * (2 if learned else 1)
    if (predicted == 2 * channels) != config.learned_variance:
        raise ValueError(
            "learned_variance must be true for a given model that predicts twice the channels that it takes, and false "
            f"for others; got {str(config.learned_variance).lower()} with a {name} that takes {channels} channels and "
            f"predicts {predicted}"
        )


def _check_classes(config: TrainConfig, feed, model) -> None:
    """Check that the model has the classes of the data.

    Raises:
        ValueError: it has not, or a name stands for several classes.
    """
    names, has = feed.class_names, getattr(model.config, "num_class_embeds", None)
    if names is None:
        if has is not None:
            raise ValueError(f"class_labels must be given for a model with classes (num_class_embeds {has}), got None")
        return
    if has != len(names):
        raise ValueError(
            f"num_class_embeds of the model must be the number of classes of the data, {len(names)}, got {has}"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each class must have a name of its own, got several named {', '.join(twice[:5])}")
    if isinstance(model, UNet2DModel) and config.class_dropout_prob:
        raise ValueError(
            'class_dropout_prob must be 0 with a UNet2DModel, which has no embedding for "no class"; got '
            f"{config.class_dropout_prob}"
        )


def _check_condition(config: TrainConfig, feed, model) -> None:
    """Check that the model takes the condition of the run, whose masks can be drawn for the data.

    Raises:
        ValueError: it does not, or the mask_strategy is not one of this kind of data.
    """
    has, channels = getattr(model.config, "condition_channels", 0), condition_channels(config, feed)
    if config.condition == "known":
        check_strategy(config.mask_strategy, len(feed.shape))
    if has != channels:
        paired = [name for name in ("condition_column", "condition_dir") if getattr(config, name) is not None]
        option = paired[0] if paired else "condition"
        raise ValueError(
            f"condition_channels of the model must be {channels} with {option} {getattr(config, option)!r}, got {has}"
        )


def enable_checkpointing(config: TrainConfig, model, given: bool) -> None:
    """Let the model recompute activations in the backward pass.

    Without dropout nothing random is recomputed, and keeping the random state would end the capture of a step.
    """
    if given or config.dropout:
        model.enable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))


def global_batch_size(config: TrainConfig, feed, processes: int) -> int:
    """Return the number of samples of an optimizer step over all processes.

    Raises:
        ValueError: the data has fewer items.
    """
    total = config.train_batch_size * config.gradient_accumulation_steps * processes
    if feed.items is not None and total > feed.items:
        raise ValueError(
            f"a batch must not be larger than the data: train_batch_size {config.train_batch_size} x "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps} x {processes} processes = {total}, "
            f"the data has {feed.items} items"
        )
    return total


def describe(config: TrainConfig, feed, model, begin: int = 0) -> str:
    """Return the options, the size of the model, the data found, and warnings of options that are hardly intended."""
    warnings = [warmup_warning(config, begin), first_step_warning(config), precision_warning(config)]
    notes = [*_padding_notes(feed, model), *feed.notes]
    if config.snr_shift == "auto":
        notes.insert(0, f"snr_shift: {size_shift(feed.shape[1:]):.4g}, from the size of the items")
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{config.to_yaml()}"
        f"model: {type(model).__name__}, {parameters:,} parameters\n"
        f"data: {'streamed' if feed.items is None else f'{feed.items:,}'} items of shape {feed.shape}"
        + "".join(f"\n{note}" for note in notes)
        + "".join(f"\nwarning: {warning}" for warning in warnings if warning)
    )


def _padding_notes(feed, model) -> list[str]:
    """Return a line that says the size to which the model pads items inside, if it does."""
    size, factor = feed.shape[1:], getattr(model, "downsample_factor", 1)  # a given model may be another kind
    padded = tuple(-(-length // factor) * factor for length in size)
    if padded == tuple(size):
        return []
    was, to = (" x ".join(map(str, sizes)) for sizes in (size, padded))
    return [f"size: the model works at multiples of {factor}: it pads {was} to {to} inside, and crops what it predicts"]


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate, and set the threads and the memory of this process.

    Raises:
        ValueError: accelerate's configuration asks for what cannot be had here.
    """
    accelerator = launcher.start(
        mixed_precision=config.mixed_precision,
        # the loader does not set the number of batches: its stream has no end
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == ["none"] else config.report_to,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=os.path.join(config.output_dir, "logs")),
    )
    if accelerator.device.type != "cpu" and config.num_cpu_threads:
        torch.set_num_threads(config.num_cpu_threads)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(config.num_cpu_threads or launcher.threads(accelerator.num_processes))
        return_freed_memory() if config.release_memory else keep_freed_memory()
    if config.optimizer == "muon" and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("optimizer must be adamw under DeepSpeed, which flattens the matrices, got 'muon'")
    return accelerator


def make_evaluator(config: TrainConfig, accelerator, feed) -> Evaluator | None:
    """Build the evaluator that the options ask for, or return None where they ask for no evaluation.

    Raises:
        ValueError: a metric does not fit the data, or the workers lack shared memory.
    """
    c = config
    if not c.eval_steps:
        return None
    settings = EvalSettings(
        metrics=c.eval_metrics, num_samples=c.eval_num_samples, num_real=c.eval_num_real,
        feature_network=c.feature_network, feature_resolution=c.feature_resolution, batch_size=c.eval_batch_size,
        seed=c.seed, cache_dir=c.eval_cache_dir, workers=c.dataloader_num_workers, on_bad_image=c.on_bad_image,
        num_neighbours=c.eval_num_neighbours, likelihood_items=c.eval_likelihood_items,
        likelihood_timesteps=c.eval_likelihood_timesteps,
    )  # fmt: skip
    classes = DataClasses.of(feed.labels, feed.dataset, feed.held_out)
    evaluator = Evaluator(accelerator, feed.dataset, feed.shape, settings, feed.held_out, classes, *Pairs.of_feed(feed))
    # the batches of training wait in shared memory meanwhile
    check_shared_memory(feed.shared_memory + evaluator.shared_memory, c.dataloader_num_workers)
    if c.metric_for_best not in (None, *evaluator.metrics):
        raise ValueError(
            f"metric_for_best must be one of those evaluated, {', '.join(evaluator.metrics)}; got {c.metric_for_best!r}"
        )
    return evaluator
