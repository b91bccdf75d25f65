"""The work of sample.py: the generation of samples into a folder, on all processes."""

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipeline, DDPMPipeline1D
from ddpm_hf.choices import SAMPLING_PRECISIONS
from ddpm_hf.commands.sample import make_parser
from ddpm_hf.commands.sample_choices import (
    Known,
    SampleSize,
    Start,
    check_effects,
    check_numbers,
    choose_format,
    choose_labels,
    choose_scheduler,
    choose_size,
    has_own_units,
    is_label_file,
    read_known,
    read_start,
)  # fmt: skip
from ddpm_hf.commands.sample_conditions import Conditions, read_conditions
from ddpm_hf.commands.sample_files import SampleFiles
from ddpm_hf.data.scaling import Scaling
from ddpm_hf.evaluation.sampling import sample_generators
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.plots import MOST_AXES, channel_name, channel_parts, picture_of, save_image_grid
from ddpm_hf.run.record import without_folders
from ddpm_hf.version import __version__

SHOWN = 36  # the number of images in the grid
SHOWN_SEQUENCES = 12
DTYPES = dict(zip(SAMPLING_PRECISIONS, (None, torch.float16, torch.bfloat16)))


def digest(pipeline) -> str:
    """Return a digest of the pipeline's weights and of the configuration of its model."""
    found = hashlib.sha256(repr(sorted((k, str(v)) for k, v in pipeline.unet.config.items() if k[0] != "_")).encode())
    for name, weight in pipeline.unet.state_dict().items():
        found.update(name.encode() + weight.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()


def pipeline_settings(pipeline) -> dict:
    """Return everything that the samples or scores of a pipeline depend on in it, for files of settings."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    return {
        "weights": digest(pipeline), "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {name: str(value) for name, value in sorted(scheduler.items())}, "version": __version__,
    }  # fmt: skip


def in_precision(accelerator: Accelerator, name: str) -> contextlib.AbstractContextManager:
    """Return the context in which the model's calls have a precision, one of `SAMPLING_PRECISIONS`."""
    dtype = DTYPES[name]
    return contextlib.nullcontext() if dtype is None else torch.autocast(accelerator.device.type, dtype)


def make_settings(
    given: argparse.Namespace, pipeline, guide, form: str, labels, known: Known | None, start: Start | None,
    conditions: Conditions | None,
) -> dict:  # fmt: skip
    """Return everything that the samples depend on, for settings.json; without folders of this machine."""
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    steps = given.num_inference_steps or pipeline.config.num_inference_steps
    if is_label_file(given.class_labels):
        of_file = hashlib.sha256(repr(labels).encode()).hexdigest()
        settings.update(class_labels=without_folders(given.class_labels[0]), labels=of_file)
    if known is not None:
        settings.update(known=without_folders(given.known), known_items=known.digest())
        settings["mask"] = given.mask and without_folders(given.mask)
    if start is not None:
        settings.update(start.settings())
    if conditions is not None:
        settings.update(conditions.settings())
    return {
        **settings, "pipeline": without_folders(given.pipeline), "format": form, "num_inference_steps": steps,
        "guide": given.guide and without_folders(given.guide), "guide_weights": guide and digest(guide),
        **pipeline_settings(pipeline),
    }  # fmt: skip


def check_with_conditions(conditions: Conditions, known: Known | None, start: Start | None):
    """Check that the given items go with the conditions of the samples.

    Raises:
        ValueError: they do not.
    """
    items = {} if start is None else {f"init_{start.name}": len(start.items)}
    items |= {} if known is None else {"known": len(known.data)}
    for option, count in items.items():
        if count not in (1, len(conditions.names)):
            raise ValueError(
                f"--{option} must have one item, or one for each of the {len(conditions.names):,} conditions of "
                f"--condition; got {count:,}"
            )


class SharedError(ValueError):
    """An error that all processes raise together."""


def together(accelerator: Accelerator, do: Callable[[], Any]) -> Any:
    """Call a function on each process, and let all of them fail where one does, so that none waits for it.

    Raises:
        SharedError: the function raised ValueError on a process; the message is that of the first one.
    """
    result, failure = None, None
    try:
        result = do()
    except ValueError as error:
        failure = error
    messages = gather_object([None if failure is None else str(failure)])
    for message in messages:
        if message is not None:
            raise SharedError(message) from failure
    return result


class Work(NamedTuple):
    """All that a process needs to generate its share."""

    pipeline: DDPMPipeline | DDPMPipeline1D
    guide: DDPMPipeline | DDPMPipeline1D | None
    known: Known | None
    start: Start | None
    conditions: Conditions | None
    size: SampleSize
    files: SampleFiles
    settings: dict


def prepare(given: argparse.Namespace) -> Work:
    """Load the pipeline and check all options, before anything is written.

    Raises:
        ValueError: options and pipeline do not fit.
    """
    pipeline = load_pipeline(given.pipeline)
    guide = load_pipeline(given.guide) if given.guide else None
    choose_scheduler(pipeline, given.scheduler, given.num_inference_steps)
    form = choose_format(pipeline, given.format)
    size = choose_size(pipeline, given)
    conditions = read_conditions(pipeline, given.condition, given.num_samples, size.size, size.windows)
    count = given.num_samples if conditions is None else conditions.count
    labels = choose_labels(pipeline, given.class_labels, count)
    check_numbers(given, pipeline, labels, guide)
    check_effects(given, make_parser().asked(given), pipeline, size)
    known = read_known(pipeline, given.known, given.mask)
    start = read_start(pipeline, given)
    if conditions is not None:
        check_with_conditions(conditions, known, start)
    files = SampleFiles(given.output_dir, form, count, given.batch_size, labels, conditions)
    settings = make_settings(given, pipeline, guide, form, labels, known, start, conditions)
    return Work(pipeline, guide, known, start, conditions, size, files, settings)


def sample(given: argparse.Namespace) -> Path:
    """Generate what is missing, and return the place of the samples.

    Raises:
        ValueError: options, pipeline or folder do not fit.
    """
    accelerator = Accelerator()
    work = together(accelerator, lambda: prepare(given))
    pipeline, files = work.pipeline, work.files
    is_main = accelerator.is_main_process
    together(accelerator, lambda: files.open(work.settings) if is_main else None)
    together(accelerator, lambda: None if is_main else files.open(work.settings))  # it is there now
    missing = files.missing()
    accelerator.wait_for_everyone()  # before any process writes
    pipeline.set_progress_bar_config(disable=True)
    for each in (pipeline, work.guide):
        if each is not None:
            each.to(accelerator.device)
            each.unet.eval()
    if accelerator.device.type == "cuda":
        pipeline.use_cuda_graphs()
    draw_missing(given, work, missing, accelerator)
    accelerator.wait_for_everyone()
    if is_main:
        if not files.file.exists():
            save_picture(work, given.output_dir / "grid.png")
        place = files.join()
        print(f"{files.count:,} samples, {accelerator.num_processes} process(es): {place}")
    accelerator.end_training()
    return given.output_dir


def draw_missing(given: argparse.Namespace, work: Work, missing: list[int], accelerator: Accelerator) -> None:
    """Generate and write this process' share of the missing blocks."""
    pipeline, files = work.pipeline, work.files
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    options = {"guidance_scale": given.guidance_scale, "guidance_rescale": given.guidance_rescale,
               "guidance_interval": tuple(given.guidance_interval), "guide": work.guide, "eta": given.eta,
               "num_inference_steps": given.num_inference_steps, "output_type": "np", "return_dict": False}  # fmt: skip
    jumps = {"jump_length": given.jump_length, "jump_n_sample": given.jump_n_sample}
    total = sum(len(files.numbers(block)) for block in missing)
    bar = tqdm(total=total, desc="sampling", unit="sample", disable=not accelerator.is_main_process)
    with bar, in_precision(accelerator, given.mixed_precision):
        for turn, block in enumerate(mine):
            numbers = files.numbers(block)
            if files.labels is not None:
                options["class_labels"] = [files.labels[n] for n in numbers]
            options["generator"] = sample_generators(given.seed, numbers)
            items = numbers  # the numbers by which the samples take given items in turn
            if work.conditions is not None:
                options["condition"], items = work.conditions.part(numbers), work.conditions.places(numbers)
            if work.start is not None:
                samples = pipeline(**work.start.part(items), **options)[0]
            elif work.known is None:
                samples = pipeline(batch_size=len(numbers), **work.size.arguments, **options)[0]
            else:
                samples = pipeline.inpaint(*work.known.part(items), **jumps, **options)[0]
            files.write(block, in_form(samples, files.form))
            processes = accelerator.num_processes
            round_ = missing[turn * processes : (turn + 1) * processes]
            bar.update(sum(len(files.numbers(each)) for each in round_))


def in_form(samples: np.ndarray, form: str) -> np.ndarray:
    """Return samples as the files hold them: images (B, H, W, C) of 8 bits, or for npy as floats (B, C, H, W)."""
    if samples.ndim != 4:
        return samples
    if form == "npy":
        return np.ascontiguousarray(np.moveaxis(samples, -1, 1))
    return (samples * 255).round().clip(0, 255).astype(np.uint8)


def save_picture(work: Work, path: Path) -> None:
    """Draw the first samples, by class if there are classes."""
    files = work.files
    first = list(files.read(range(min(SHOWN, files.count))))
    if first[0].ndim == 2:
        draw_sequences(first, files, path)
        return
    levels = np.stack(first)
    if files.form != "npy":
        levels = np.moveaxis(levels, -1, 1) / 255
    elif has_own_units(work.pipeline):
        levels = Scaling.from_json(work.pipeline.config).to_levels(levels)
    save_image_grid([picture_of(each) for each in levels], path)


def draw_sequences(samples: list[np.ndarray], files: SampleFiles, path: Path) -> None:
    """Plot the first sequences, with the class and the condition of each as its title."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    parts = channel_parts(len(samples[0]))
    depth = len(parts)
    samples = samples[: min(SHOWN_SEQUENCES, max(1, MOST_AXES // depth))]
    figure = Figure(figsize=(9, (1.2 if depth == 1 else depth) * len(samples) + 0.5), layout="constrained")
    panels = figure.subplots(len(samples) * depth, 1, squeeze=False)[:, 0]
    for number, sequence in enumerate(samples):
        axes = panels[number * depth]  # of the first channel
        for part, channels in enumerate(parts):
            below = panels[number * depth + part]
            below.plot(sequence[channels].T, linewidth=0.9, color=f"C{part % 10}" if depth > 1 else None)
            if depth > 1:
                below.set_ylabel(channel_name(None, part), fontsize="x-small")
        named = [] if files.labels is None else [str(files.labels[number])]
        named += [] if files.conditions is None else [files.conditions.sample_names()[number]]
        if named:
            axes.set_title(", ".join(named), fontsize="small")
    figure.align_ylabels()
    figure.savefig(path, dpi=100)


def exit_status(do: Callable[[], Any]) -> int:
    """Call a function, print its error as a line if it raises ValueError, and return the exit status of the program."""
    try:
        do()
    except SharedError as error:
        process = PartialState()
        if process.is_main_process:
            print(f"error: {error}", file=sys.stderr, flush=True)
        process.wait_for_everyone()  # a launcher ends the other processes once one has ended
        return 2
    except (ValueError, FloatingPointError) as error:  # of this process alone: the launcher ends the others
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
