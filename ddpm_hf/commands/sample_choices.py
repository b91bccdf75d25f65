"""Choices of sample.py that depend on the pipeline: scheduler, classes, format of the files, and given items.

All of them are checked before anything is written.
"""

import argparse
import csv
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_hf import DDPMPipeline1D, GaussianScheduler
from ddpm_hf.arguments import Need, check_needs
from ddpm_hf.choices import IMAGE_FORMATS, SEQUENCE_FORMATS
from ddpm_hf.data.images import IMAGE_MODES, find_images, to_mode
from ddpm_hf.data.sequence_files import read_sequences
from ddpm_hf.evaluation.classes import has_classes
from ddpm_hf.pipeline.guidance import make_guidance
from ddpm_hf.pipeline.pairs import refuse_paired
from ddpm_hf.pipeline.rules import check_rules
from ddpm_hf.pipeline.schedulers import begin_at, step_options
from ddpm_hf.pipeline.varying import VARYING_RULES
from ddpm_hf.pipeline.windows import Windows
from ddpm_hf.run.record import without_folders

# What options need to have an effect, beside the rules of the pipeline's call.
NEEDS = (
    Need(("jump_length", "jump_n_sample"), lambda c: c.known is not None, "items to complete (--known)", "without it"),
    Need(("guidance_rescale", "guidance_interval"), lambda c: c.guidance_scale != 1,
         "samples with guidance", "with --guidance_scale 1"),
    Need(("method", "overlap"), lambda c: not c.as_trained, "samples of another size than in training"),
    Need(("eta",), lambda c: c.takes_eta,
         "DDIM steps, which are fewer than the model has timesteps, or those of --scheduler ddim", "for DDPM steps"),
)  # fmt: skip
# What the jumps of RePaint need; jump_n_sample 1 asks for none.
JUMP_NEEDS = (
    Need(("jump_length", "jump_n_sample"), lambda c: not c.is_trained_to_complete,
         "models that were not trained to complete", "for one that was"),
    Need(("jump_length",), lambda c: c.jump_n_sample > 1, "jumps", "with --jump_n_sample 1, which is none"),
    Need(("jump_length", "jump_n_sample"), lambda c: c.steps > c.jump_length,
         "chains of more steps than --jump_length", "with {c.steps} steps and --jump_length {c.jump_length}"),
)  # fmt: skip
LABEL_FILES = (".csv", ".txt")
TO_EIGHT_BIT = ("png", "webp", "npz", "parquet")  # formats of images that hold 8-bit values


def choose_scheduler(pipeline, name: str | None, steps: int | None) -> None:
    """Give the pipeline the scheduler of this name; None keeps its own.

    Args:
        steps: the number of steps of the fast sampler; None: its default.

    Raises:
        ValueError: there is no such scheduler, or it does not fit the pipeline.
    """
    if name is None:
        return
    if name == "fast":
        pipeline.use_fast_sampler(**{} if steps is None else {"num_inference_steps": steps})
        return
    if name in ("ddpm", "ddim"):
        pipeline.scheduler = GaussianScheduler.from_config(pipeline.scheduler.config, sampler=name)
        return
    use_scheduler_class(pipeline, name, "--scheduler", "ddpm, ddim, fast")


def use_scheduler_class(pipeline, name: str, option: str, others: str) -> None:
    """Give the pipeline a scheduler class of diffusers by its name.

    Args:
        option: the option that names it, for messages.
        others: what else the option may be, for messages.

    Raises:
        ValueError: there is no such scheduler, or it does not fit the pipeline.
    """
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{option} must be {others} or a scheduler class of diffusers, got {name!r}")
    try:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    except ValueError:
        raise
    except Exception as error:  # constructors raise many kinds: TypeError, NotImplementedError, ImportError, ...
        raise ValueError(f"{option} {name} cannot be made for this pipeline: {error}") from error


def is_label_file(asked: list[str] | None) -> bool:
    """Return True if the classes that are asked for are the name of a file of labels."""
    return bool(asked) and len(asked) == 1 and Path(asked[0]).suffix in LABEL_FILES and Path(asked[0]).is_file()


def read_label_file(path: str) -> list[str]:
    """Read one class a line; a first line "label", as in the labels.csv of samples, is a heading.

    Raises:
        ValueError: the file cannot be read, has several columns, or is empty.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row] if path.endswith(".csv") else [[line] for line in file]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--class_labels: cannot read {path}: {error}") from error
    texts = [row[0].strip() for row in rows if len(row) == 1 and row[0].strip()]
    texts = texts[1:] if texts[:1] == ["label"] else texts
    if any(len(row) > 1 for row in rows) or not texts:
        raise ValueError(f"--class_labels: {path} must have one column, with a class in each row")
    return texts


def choose_labels(pipeline, asked: list[str] | None, count: int) -> list | None:
    """Return the class of each sample, a name where the classes have names and else a number.

    Raises:
        ValueError: the model has no classes, or does not know one of those that are asked for.
    """
    if not has_classes(pipeline):
        if asked:
            raise ValueError(f"--class_labels needs a model with classes, and this one has none; got {asked}")
        return None
    number = pipeline.unet.config.num_class_embeds
    names = pipeline.config.get("id2label") or {}
    known = [names.get(str(i), names.get(i, i)) for i in range(number)]
    if asked in (None, ["all"]):
        chosen = known
    else:
        by_text = {**{str(i): each for i, each in enumerate(known)}, **{str(each): each for each in known}}
        asked = read_label_file(asked[0]) if is_label_file(asked) else asked
        wrong = list(dict.fromkeys(each for each in asked if each not in by_text))
        if wrong:
            raise ValueError(
                f"--class_labels must be of {', '.join(map(str, known[:20]))}, or a file ({', '.join(LABEL_FILES)}) "
                f"with one of them in each row; got {', '.join(wrong[:20])}"
            )
        chosen = [by_text[each] for each in asked]
    return [chosen[i % len(chosen)] for i in range(count)]


def has_own_units(pipeline) -> bool:
    """Return True for images in units of the data instead of levels from 0 to 1."""
    return not isinstance(pipeline, DDPMPipeline1D) and pipeline._has_units()


def choose_format(pipeline, form: str | None) -> str:
    """Return the format of the files, checked against the kind of the samples.

    Raises:
        ValueError: the format cannot hold the samples.
    """
    sequences = isinstance(pipeline, DDPMPipeline1D)
    fitting, kind = (SEQUENCE_FORMATS, "sequences") if sequences else (IMAGE_FORMATS, "images")
    form = form or ("npy" if sequences or has_own_units(pipeline) else "png")
    if form not in fitting:
        raise ValueError(f"--format of {kind} must be one of {', '.join(fitting)}; got {form!r}")
    channels = pipeline.unet.config.in_channels
    if form == "csv" and channels != 1:
        raise ValueError(f"--format csv holds sequences of one channel, and these have {channels}: take npy or parquet")
    if sequences:
        return form
    if form in TO_EIGHT_BIT and has_own_units(pipeline):
        raise ValueError(
            f"--format {form} holds levels of pictures, and this pipeline's images are in units of the data "
            "(data_scale): take npy"
        )
    if form in ("png", "webp", "parquet") and channels not in (1, 3, 4):
        raise ValueError(f"--format {form} holds images of 1, 3 or 4 channels, and these have {channels}: take npy")
    if form == "webp" and channels == 1:
        raise ValueError("--format webp has no grey images, and these have one channel: take png")
    return form


def check_numbers(given: argparse.Namespace, pipeline, labels: list | None, guide) -> None:
    """Check the numbers among the options, with the pipeline that has its scheduler, and the guide.

    Raises:
        ValueError: one lies outside of its range, or the guide does not fit.
    """
    for name in ("num_samples", "batch_size", "jump_length", "jump_n_sample"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {given.seed}")
    step_options(pipeline.scheduler, None, given.eta)
    pipeline._set_timesteps(given.num_inference_steps, None)
    if guide is not None and (type(guide) is not type(pipeline) or given.guidance_scale == 1):
        raise ValueError(
            f"--guide must be a pipeline of the same kind, with a --guidance_scale other than 1; got a "
            f"{type(guide).__name__} and {given.guidance_scale:g}"
        )
    make_guidance(
        pipeline, 1, labels and labels[:1], given.guidance_scale, given.guidance_rescale,
        tuple(given.guidance_interval), guide,
    )  # fmt: skip


def check_effects(given: argparse.Namespace, asked: dict, pipeline, size: "SampleSize") -> None:
    """Check that every option that is asked for has an effect, once the timesteps are chosen.

    Args:
        given: the options.
        asked: those that are not at their defaults.
        pipeline: the pipeline, with its scheduler.
        size: the size of the samples.

    Raises:
        ValueError: one has none.
    """
    config, steps = pipeline.scheduler.config, len(pipeline.scheduler.timesteps)
    takes_ddpm = config.get("sampler") == "ddpm" or steps == config.num_train_timesteps
    trained = None if pipeline.unet.config.sample_size is None else tuple(pipeline._size())
    facts = SimpleNamespace(
        **vars(given), as_trained=size.size in (None, trained),
        takes_eta=not (isinstance(pipeline.scheduler, GaussianScheduler) and config.sampler != "ddim" and takes_ddpm),
    )  # fmt: skip
    check_needs(NEEDS, asked, facts)
    check_jumps(pipeline, steps, asked, given.jump_length, given.jump_n_sample)


def check_jumps(pipeline, steps: int, asked: dict, jump_length: int, jump_n_sample: int) -> None:
    """Check that the options of RePaint that are asked for have an effect.

    Args:
        pipeline: the pipeline that completes.
        steps: the number of sampling steps.
        asked: the options that are not at their defaults.
        jump_length, jump_n_sample: as in `inpaint`.

    Raises:
        ValueError: one has none.
    """
    facts = SimpleNamespace(
        is_trained_to_complete=pipeline.config.get("condition") == "known", steps=steps, jump_length=jump_length,
        jump_n_sample=jump_n_sample,
    )  # fmt: skip
    asked = {name: value for name, value in asked.items() if (name, value) != ("jump_n_sample", 1)}
    check_needs(JUMP_NEEDS, asked, facts)


class SampleSize(NamedTuple):
    """The size of the samples, where it may be another than in training.

    Attributes:
        arguments: the arguments of a call that are given.
        size: the size without channels; None: as trained.
        windows: the windows in which the model predicts, or None.
    """

    arguments: dict
    size: tuple[int, ...] | None
    windows: Windows | None


def choose_size(pipeline, given: argparse.Namespace) -> SampleSize:
    """Return the size of the samples.

    Raises:
        ValueError: one does not apply to the pipeline or to given items, or is outside of its range.
    """
    names, others, kind = ("height", "width"), ("length",), "images"
    if isinstance(pipeline, DDPMPipeline1D):
        names, others, kind = others, names, "sequences"
    chosen = {name: getattr(given, name) for name in (*names, "method", "overlap") if getattr(given, name) is not None}
    for name in others:
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} does not apply to a pipeline of {kind}, got {getattr(given, name)}")
    if chosen and (given.known or given.init_image or given.init_sequence):
        raise ValueError(f"--{next(iter(chosen))} does not apply to given items, which have a size: leave it out")
    size = [given.length] if kind == "sequences" else pipeline._size_of(given.height, given.width)
    size = None if size is None or None in size else tuple(size)
    windows = pipeline._windows(size, given.method, given.overlap) if chosen else None
    if given.method == "sequential":
        refuse_paired(pipeline)
        pipeline._check_completion()
    return SampleSize(chosen, size, windows)


class Known(NamedTuple):
    """The items that samples complete.

    Attributes:
        data: the items, (N, C, ...), with 0 where they are unknown.
        unknown: bools of the same shape.
    """

    data: Tensor
    unknown: Tensor

    def part(self, numbers: range) -> "Known":
        """Return the items of these samples: the items in turn."""
        chosen = [number % len(self.data) for number in numbers]
        return Known(self.data[chosen], self.unknown[chosen])

    def digest(self) -> str:
        """Return a digest of the items."""
        found = hashlib.sha256(repr((tuple(self.data.shape), str(self.data.dtype))).encode())
        for values in self:
            found.update(values.contiguous().numpy().tobytes())
        return found.hexdigest()


def read_known(pipeline, known: str | None, mask: str | None) -> Known | None:
    """Read the items that samples complete, and check them; None without --known.

    Raises:
        ValueError: a file cannot be read or does not fit the pipeline, or an item has nothing unknown.
    """
    if known is None:
        if mask is not None:
            raise ValueError(f"--mask says which part of --known is unknown, and --known is missing; got {mask}")
        return None
    items = Known(*pipeline._read_known(_read(pipeline, known, "--known"), mask and _read(pipeline, mask, "--mask")))
    for number, unknown in enumerate(items.unknown.flatten(1)):
        if not unknown.any() or unknown.all():
            raise ValueError(
                f"--known: a part of each item must be unknown, by NaN or --mask, and a part known; item {number} "
                f"(from 0) has {'all' if unknown.all() else 'nothing'} unknown"
            )
    pipeline._encode(items.data, "known")  # checks the range
    return items


class Start(NamedTuple):
    """The items that samples are variations of.

    Attributes:
        name: the argument of the pipeline's call, "image" or "sequence".
        file: the file or folder of the items.
        items: the items, (N, C, *spatial), in the units of the pipeline.
        strength: the share of the way to noise that samples begin at.
    """

    name: str
    file: str
    items: Tensor
    strength: float

    def part(self, numbers: range) -> dict:
        """Return the arguments of a call for these samples: the items in turn."""
        chosen = [number % len(self.items) for number in numbers]
        return {self.name: self.items[chosen], "strength": self.strength}

    def settings(self) -> dict:
        """Return what the samples depend on, without folders of this machine."""
        items = Known(self.items, torch.zeros(0)).digest()
        return {f"init_{self.name}": without_folders(self.file), "init_items": items, "strength": self.strength}


def read_start(pipeline, given: argparse.Namespace) -> Start | None:
    """Read the items that samples are variations of, and check them; None where there are none.

    Raises:
        ValueError: a file cannot be read or does not fit the pipeline, or the strength is out of its range.
    """
    name = "sequence" if isinstance(pipeline, DDPMPipeline1D) else "image"
    file, other = getattr(given, f"init_{name}"), "init_image" if name == "sequence" else "init_sequence"
    if getattr(given, other) is not None:
        raise ValueError(f"--{other} does not apply to a pipeline of {name}s: --init_{name}")
    if file is None:
        if given.strength is not None:
            raise ValueError(f"--strength needs --init_{name}, the items to start from; got {given.strength}")
        return None
    if given.known is not None:
        raise ValueError(f"--known and --init_{name} exclude each other; got {given.known} and {file}")
    strength = 0.5 if given.strength is None else given.strength
    check_rules(
        VARYING_RULES, name=name, strength=strength, num_samples=1, latents=None, scheduler=pipeline.scheduler,
        kind=type(pipeline.scheduler).__name__,
    )  # fmt: skip
    if 0 < strength < 1:
        begin_at(pipeline.scheduler, strength, pipeline.is_spaced_by_log_snr())  # its rule
    found = _read(pipeline, file, f"--init_{name}")
    if isinstance(found, list):  # pictures
        found = [ImageOps.fit(picture, pipeline._size()[::-1]) for picture in found]
    items = pipeline._tensor(found, f"init_{name}")
    pipeline._encode(items, f"init_{name}")  # checks values and range
    if tuple(items.shape[2:]) != tuple(pipeline._size()):
        raise ValueError(
            f"--init_{name} must have the size of the model's {name}s, {tuple(pipeline._size())}; {file} has "
            f"{tuple(items.shape[2:])}"
        )
    return Start(name, file, items, strength)


def _read(pipeline, path: str, option: str):
    """Return the content of a file of items or masks, in a form that `inpaint` takes."""
    channels = pipeline.unet.config.in_channels
    if isinstance(pipeline, DDPMPipeline1D):
        array = torch.from_numpy(read_array(path, option))
        dims = array.ndim
        array = array[:, None] if dims == 2 and channels == 1 else array
        return array if array.ndim == 3 or option == "--mask" and dims == 1 else array.reshape(1, -1, array.shape[-1])
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        mode = None if option == "--mask" else IMAGE_MODES.get(channels)
        try:
            return [_picture(each, mode) for each in (find_images(path)[0] if Path(path).is_dir() else [path])]
        except (OSError, ValueError) as error:
            raise ValueError(f"{option}: cannot read the pictures of {path}: {error}") from error
    array = torch.from_numpy(read_array(path, option))
    if array.ndim == 4 and array.shape[1] != channels and array.shape[-1] in (1, channels):
        array = array.movedim(-1, 1)
    eight_bit = array.dtype == torch.uint8 and option != "--mask" and not has_own_units(pipeline)
    return array / 255 if eight_bit else array


def _picture(path: str, mode: str | None) -> Image.Image:
    """Read a picture upright, in `mode` as training reads it; in a mode of its own for None."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    return upright if mode is None else to_mode(upright, mode)


def read_array(path: str, option: str) -> np.ndarray:
    """Read the array of a file, in which NaN is allowed, as a copy that may be written to.

    Raises:
        ValueError: it cannot be read, or holds no real numbers; the message begins with the option.
    """
    try:
        array = np.array(read_sequences(path, missing=True)[:])
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{option}: {str(error).replace('train_data_file', 'the file')}") from error
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{option}: {path} must hold real numbers, got {array.dtype}")
    return array
