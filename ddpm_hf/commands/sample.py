"""Generate many samples of a saved pipeline into a folder, on all processes; a run that was stopped goes on.

    python training/sample.py --pipeline runs/digits/pipeline --num_samples 1000 --output_dir samples/
    python training/sample.py --pipeline runs/ecg/pipeline --num_samples 500 --output_dir ecg/ --format parquet
    accelerate launch training/sample.py --pipeline me/my-model --num_samples 50000 --output_dir samples/ --format npz

Sample number i follows from (seed, i). The batches are cut by the numbers, so that the number of processes does not
change them. The batch size is one of the settings in settings.json, with which a stopped run must be started again.
"""

import argparse
import contextlib
import hashlib
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from PIL import Image
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipeline1D, GaussianScheduler
from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.commands.sample_files import IMAGE_FORMATS, SEQUENCE_FORMATS, SampleFiles
from ddpm_hf.evaluation.classes import has_classes
from ddpm_hf.evaluation.sampling import sample_generators
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.plots import save_image_grid
from ddpm_hf.run.record import without_folders
from ddpm_hf.version import __version__

SHOWN = 36  # the number of images in the grid
SHOWN_SEQUENCES = 12
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_parser() -> SuggestingParser:
    """Return the parser of the options, under headings."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("samples")
    what.add_argument("--pipeline", required=True, help="Folder or Hub name of a saved pipeline.")
    what.add_argument("--num_samples", type=int, required=True, help="Number of samples.")
    what.add_argument("--output_dir", type=Path, required=True, help="New folder, or that of a run that was stopped.")
    what.add_argument("--format", help=f"Images: {', '.join(IMAGE_FORMATS)} (png). Sequences: "
                      f"{', '.join(SEQUENCE_FORMATS)} (npy). png and webp are a file for each sample.")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="Seed of all samples. Default: %(default)s.")
    what = parser.add_argument_group("classes and guidance")
    what.add_argument("--class_labels", nargs="+", help="Names or numbers of classes, which the samples take in turn; "
                      "'all' means every class. Default: all, for a model with classes.")  # fmt: skip
    what.add_argument("--guidance_scale", type=float, default=1.0, help="Scale of guidance; 1 is none.")
    what.add_argument("--guidance_rescale", type=float, default=0.0, help="Share of the rescaling of guidance.")
    what.add_argument("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0],
                      help="Lowest and highest noise level with guidance. Default: 0 1.")  # fmt: skip
    what.add_argument("--guide", help="Folder or Hub name of a pipeline of a worse model, for autoguidance.")
    what = parser.add_argument_group("sampler")
    what.add_argument(
        "--scheduler", help="ddpm, ddim, fast, or a scheduler class of diffusers. Default: the pipeline's."
    )
    what.add_argument("--num_inference_steps", type=int, help="Number of steps. Default: the pipeline's.")
    what.add_argument("--eta", type=float, help="Share of DDIM's noise, 0 to 1. Default: the scheduler's.")
    what = parser.add_argument_group("machine")
    what.add_argument("--batch_size", type=int, default=64, help="Number of samples that a process makes at once.")
    what.add_argument("--mixed_precision", choices=list(DTYPES), default="no", help="Precision of the model's calls.")
    return parser


def choose_scheduler(pipeline, name: str | None) -> None:
    """Give the pipeline the scheduler of this name; None keeps its own.

    Raises:
        ValueError: there is no such scheduler, or it does not fit the pipeline.
    """
    if name is None:
        return
    if name == "fast":
        pipeline.use_fast_sampler()
        return
    if name in ("ddpm", "ddim"):
        pipeline.scheduler = GaussianScheduler.from_config(pipeline.scheduler.config, sampler=name)
        return
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"--scheduler must be ddpm, ddim, fast or a scheduler class of diffusers, got {name!r}")
    try:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    except TypeError as error:  # its constructor needs more than a configuration
        raise ValueError(f"--scheduler {name} cannot be made for this pipeline: {error}") from error


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
        wrong = [each for each in asked if each not in by_text]
        if wrong:
            raise ValueError(f"--class_labels must be of {', '.join(map(str, known[:20]))}; got {', '.join(wrong)}")
        chosen = [by_text[each] for each in asked]
    return [chosen[i % len(chosen)] for i in range(count)]


def choose_format(pipeline, form: str | None) -> str:
    """Return the format of the files, checked against the kind of the samples."""
    sequences = isinstance(pipeline, DDPMPipeline1D)
    fitting, kind = (SEQUENCE_FORMATS, "sequences") if sequences else (IMAGE_FORMATS, "images")
    form = form or fitting[0]
    if form not in fitting:
        raise ValueError(f"--format of {kind} must be one of {', '.join(fitting)}; got {form!r}")
    channels = pipeline.unet.config.in_channels
    if form == "csv" and channels != 1:
        raise ValueError(f"--format csv holds sequences of one channel, and these have {channels}: take npy or parquet")
    if not sequences and form in ("png", "webp", "parquet") and channels not in (1, 3, 4):
        raise ValueError(f"--format {form} holds images of 1, 3 or 4 channels, and these have {channels}: take npy")
    if form == "webp" and channels == 1:
        raise ValueError("--format webp has no grey images, and these have one channel: take png")
    return form


def digest(pipeline) -> str:
    """Return a digest of the pipeline's weights and of the configuration of its model."""
    found = hashlib.sha256(repr(sorted((k, str(v)) for k, v in pipeline.unet.config.items() if k[0] != "_")).encode())
    for name, weight in pipeline.unet.state_dict().items():
        found.update(name.encode() + weight.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()


def make_settings(given: argparse.Namespace, pipeline, guide, form: str) -> dict:
    """Return everything that the samples depend on, for settings.json; without folders of this machine."""
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    settings = {name: value for name, value in vars(given).items() if name != "output_dir"}
    steps = given.num_inference_steps or pipeline.config.num_inference_steps
    return {
        **settings, "pipeline": without_folders(given.pipeline), "format": form, "num_inference_steps": steps,
        "guide": given.guide and without_folders(given.guide), "weights": digest(pipeline),
        "guide_weights": guide and digest(guide), "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {name: str(value) for name, value in sorted(scheduler.items())},
        "version": __version__,
    }  # fmt: skip


def check_numbers(given: argparse.Namespace, pipeline) -> None:
    """Check the numbers among the options.

    Raises:
        ValueError: one lies outside of its range.
    """
    for name in ("num_samples", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    most, steps = pipeline.scheduler.config.num_train_timesteps, given.num_inference_steps
    if steps is not None and not 1 <= steps <= most:
        raise ValueError(f"--num_inference_steps must lie in 1 to {most}, got {steps}")
    if given.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {given.seed}")
    if given.eta is not None and not 0 <= given.eta <= 1:
        raise ValueError(f"--eta must lie in 0 to 1, got {given.eta}")


def sample(given: argparse.Namespace) -> Path:
    """Generate what is missing, and return the place of the samples.

    Raises:
        ValueError: options, pipeline or folder do not fit.
    """
    accelerator = Accelerator()
    pipeline = load_pipeline(given.pipeline)
    guide = load_pipeline(given.guide) if given.guide else None
    check_numbers(given, pipeline)
    choose_scheduler(pipeline, given.scheduler)
    form = choose_format(pipeline, given.format)
    labels = choose_labels(pipeline, given.class_labels, given.num_samples)
    if given.guidance_scale != 1 and labels is None and guide is None:
        raise ValueError(f"--guidance_scale needs a model with classes or --guide, got {given.guidance_scale}")
    files = SampleFiles(given.output_dir, form, given.num_samples, given.batch_size, labels)
    settings = make_settings(given, pipeline, guide, form)
    for turn in (True, False):  # the main process makes the folder, which the others then find
        if accelerator.is_main_process == turn:
            files.open(settings)
        accelerator.wait_for_everyone()
    missing = files.missing()
    accelerator.wait_for_everyone()  # before any process writes
    pipeline.set_progress_bar_config(disable=True)
    for each in (pipeline, guide):
        if each is not None:
            each.to(accelerator.device)
            each.unet.eval()
    if accelerator.device.type == "cuda":
        pipeline.use_cuda_graphs()
    draw_missing(given, pipeline, guide, files, missing, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not files.file.exists():
            save_picture(files, given.output_dir / "grid.png")
        place = files.join()
        print(f"{given.num_samples:,} samples, {accelerator.num_processes} process(es): {place}")
    accelerator.end_training()
    return given.output_dir


def draw_missing(given, pipeline, guide, files: SampleFiles, missing: list[int], accelerator) -> None:
    """Generate and write this process' share of the missing blocks."""
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    dtype = DTYPES[given.mixed_precision]
    precision = contextlib.nullcontext() if dtype is None else torch.autocast(accelerator.device.type, dtype)
    options = {"guidance_scale": given.guidance_scale, "guidance_rescale": given.guidance_rescale,
               "guidance_interval": tuple(given.guidance_interval), "guide": guide}  # fmt: skip
    total = sum(len(files.numbers(block)) for block in missing)
    with tqdm(total=total, desc="sampling", unit="sample", disable=not accelerator.is_main_process) as bar, precision:
        for turn, block in enumerate(mine):
            numbers = files.numbers(block)
            if files.labels is not None:
                options["class_labels"] = [files.labels[n] for n in numbers]
            samples = pipeline(
                batch_size=len(numbers), generator=sample_generators(given.seed, numbers), eta=given.eta,
                num_inference_steps=given.num_inference_steps, output_type="np", return_dict=False, **options,
            )[0]  # fmt: skip
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


def save_picture(files: SampleFiles, path: Path) -> None:
    """Draw the first samples, by class if there are classes."""
    first = list(files.read(range(min(SHOWN, files.count))))
    if first[0].ndim == 2:
        draw_sequences(first, files, path)
        return
    if files.form == "npy":
        first = [(np.moveaxis(x, 0, -1) * 255).round().clip(0, 255).astype(np.uint8) for x in first]
    if first[0].shape[-1] in (1, 3, 4):
        save_image_grid([Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in first], path)


def draw_sequences(samples: list[np.ndarray], files: SampleFiles, path: Path) -> None:
    """Plot the first sequences, with the class of each as its title."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    samples = samples[:SHOWN_SEQUENCES]
    figure = Figure(figsize=(9, 1.2 * len(samples) + 0.5), layout="constrained")
    for number, (axes, sequence) in enumerate(zip(figure.subplots(len(samples), 1, squeeze=False)[:, 0], samples)):
        axes.plot(sequence.T, linewidth=0.9)
        if files.labels is not None:
            axes.set_title(str(files.labels[number]), fontsize="small")
    figure.savefig(path, dpi=100)


def main(arguments: list) -> int:
    """Sample as the arguments say, and return the exit status."""
    given = make_parser().parse_args(arguments)
    try:
        sample(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
