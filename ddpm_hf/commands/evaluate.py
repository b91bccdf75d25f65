"""Measure a saved pipeline against data: FID, KID, sequence distances, memorization, held-out loss.

    python training/evaluate.py --pipeline runs/digits/pipeline --data digits --feature_network pixels
    python training/evaluate.py --pipeline runs/ecg/pipeline --data ecg --num_inference_steps 10 25 50
    accelerate launch training/evaluate.py --pipeline me/my-model --data photos/ --num_samples 10000

Results go to evaluation.json in the pipeline's folder (--output_dir: elsewhere), which the model card reads; with
several numbers of steps, steps-versus-metric.png shows them.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import diffusers
from accelerate import Accelerator
from diffusers import SchedulerMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import HfArgumentParser

from ddpm_hf import GaussianScheduler, TrainConfig
from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.config import BUNDLED
from ddpm_hf.data.images import BadImageError
from ddpm_hf.data.loading import fingerprint, hold_out, load_item, split_record, underlying
from ddpm_hf.data.opening import build_dataset
from ddpm_hf.data.sequence_files import FILE_ENDINGS
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.tables import table_folder
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.settings import HELD_OUT, EvalSettings
from ddpm_hf.hub.card import write_card
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.plots import save_steps_plot
from ddpm_hf.run.checkpoint import write_text
from ddpm_hf.run.record import without_folders
from ddpm_hf.trainer.memory import keep_freed_memory


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluateConfig:
    """Options of this program; those with the names of training's mean the same."""

    pipeline: str = _option("", "Folder or Hub name of a saved DDPMPipeline or DDPMPipeline1D.")
    data: str = _option("", "'digits', 'ecg', a folder or file as training takes, or a data set's name on the Hub.")
    class_labels: str | None = _option(
        None, "The classes of the data, as in training. Default: as in the pipeline's run, if --data is its data."
    )
    metrics: list[str] | None = field(default=None, metadata={"help": "Default: all that the data allows."})
    num_inference_steps: list[int] | None = field(
        default=None, metadata={"help": "One or more. Default: the pipeline's."}
    )
    sampler: str | None = _option(
        None, "'fast', for the pipeline's fast sampler, or a scheduler class of diffusers. Default: the pipeline's own."
    )  # fmt: skip
    num_samples: int = _option(1000, "Samples generated; FID below 10,000 is biased.")
    num_real: int = _option(50_000, "Real items that samples are compared with, at most.")
    feature_network: str = _option("inception", "'inception', a TorchScript file, or 'pixels'.")
    feature_resolution: int = _option(299, "Pixels of a TorchScript feature network's input.")
    batch_size: int = _option(64, "Samples generated at once, per process.")
    seed: int = _option(0, "Seed of the samples, and of what is held out if the pipeline does not say it.")
    holdout: int | None = _option(
        None, "Items held out in training. Default: those that the pipeline's training.json names, where --data is the "
        "data of its run. 0: the data as given."
    )  # fmt: skip
    dataset_config_name: str | None = _option(None, "Configuration of a data set on the Hub.")
    dataset_split: str = _option("train", "Split of a data set of the Hub, or of a folder of tables.")
    image_column: str | None = _option(None, "Column of the images in a table.")
    sequence_columns: list[str] | None = field(default=None, metadata={"help": "Columns of the sequences in a table."})
    stride: int | None = _option(
        None, "Compare with windows of the data, every stride-th. Default: as the pipeline's run, for its data."
    )
    dataloader_num_workers: int = _option(0, "Processes that load data.")
    on_bad_image: str = _option("stop", "A picture that cannot be read: 'stop', or 'skip'.")
    random_flip: bool | None = field(
        default=None,
        metadata={"help": "'true' if training mirrored pictures: a mirrored copy is one (memorization). Default: "
                          "as training.json in the pipeline's folder says, else no."},
    )  # fmt: skip
    eval_cache_dir: str | None = _option(None, "Folder for the statistics of real images.")
    output_dir: str | None = _option(
        None, "Folder for the results. Default: the pipeline's folder; evaluation/ for a Hub name."
    )


class Parser(SuggestingParser, HfArgumentParser):
    """The options of a dataclass as arguments."""


def load(config: EvaluateConfig):
    """The pipeline, whichever of the two it is, with the sampler asked for.

    Raises:
        ValueError: no such pipeline or scheduler.
    """
    pipeline = load_pipeline(config.pipeline)
    own = pipeline.scheduler
    if config.sampler == "fast":
        pipeline.use_fast_sampler()
    elif config.sampler is not None:
        scheduler = getattr(diffusers, config.sampler, None)
        if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
            raise ValueError(f"--sampler must be 'fast' or a scheduler class of diffusers, got {config.sampler!r}")
        try:
            pipeline.scheduler = scheduler.from_config(own.config)
        except TypeError as error:  # of a class whose constructor asks for more
            raise ValueError(f"--sampler {config.sampler} cannot be made for this pipeline: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, own


def real_data(config: EvaluateConfig, run: dict, pipeline):
    """The data, shaped as what the pipeline generates, and scaled as its run scaled it."""
    path, size = Path(config.data), pipeline._size()
    check_kind(config.data, is_image=len(size) == 2)
    if config.data in BUNDLED or not path.exists() or (path.is_dir() and len(size) == 1):
        source = {"dataset_name": config.data}
    else:
        source = {"train_data_dir" if path.is_dir() else "train_data_file": config.data}
    shared = ("dataset_config_name", "dataset_split", "image_column", "sequence_columns", "stride", "on_bad_image",
              "class_labels")  # fmt: skip
    defaults = {f.name: f.default for f in fields(config)}
    options = {name: value for name in shared if (value := getattr(config, name)) != defaults[name]}
    if config.data in BUNDLED and (config.data == "ecg") != (len(size) == 1):
        pass  # of the other kind, which is said below
    elif len(size) == 2:
        options |= {"resolution": list(size), "image_channels": pipeline.unet.config.in_channels}
    else:
        options |= {"sequence_length": size[0]}
        if norm := run.get("options", {}).get("sequence_norm"):
            options["sequence_norm"] = norm
    dataset = build_dataset(TrainConfig(**source, **options, cache_gb=0))
    shape, expected = first_shape(dataset, config.on_bad_image), (pipeline.unet.config.in_channels, *size)
    if shape != expected:
        raise ValueError(f"the pipeline generates {expected}, the data has {shape}")
    return dataset, shape


def check_kind(data: str, is_image: bool) -> None:
    """Check that the data is there, where it is meant as a path, and of the kind that the pipeline generates.

    Raises:
        ValueError: it is not.
    """
    path = Path(data)
    meant = path.suffix.lower() in FILE_ENDINGS or data.startswith((".", "/", "~")) or data.endswith("/")
    if meant and not path.exists():
        raise ValueError(f"--data {data}: there is no such file or folder")
    if is_image and path.is_file():
        raise ValueError(f"the pipeline generates images, --data {data} is a file of sequences")
    if not is_image and path.is_dir() and not table_folder(data):
        raise ValueError(f"the pipeline generates sequences, --data {data} is a folder of images")


def record_of(config: EvaluateConfig) -> dict:
    """The pipeline's training.json, where there is one with options and data; else {}."""
    folder = Path(config.pipeline)
    try:
        file = folder / "training.json" if folder.is_dir() else hf_hub_download(config.pipeline, "training.json")
        facts = json.loads(Path(file).read_text(encoding="utf-8"))
        return facts if isinstance(facts["options"], dict) and isinstance(facts["data"], dict) else {}
    except (EntryNotFoundError, OSError, ValueError, KeyError, TypeError):  # without one, or one of something else
        return {}


def run_of(config: EvaluateConfig, facts: dict) -> dict:
    """Return the pipeline's record, `facts`, if --data is the data that it was trained on; else {}."""
    name = facts.get("data", {}).get("name")
    same = name == without_folders(str(Path(config.data)))
    # the record leaves folders of the machine out, and its content is compared later
    if not same and not (name and Path(config.data).exists() and Path(name).name == Path(config.data).resolve().name):
        return {}
    given = {"dataset_config_name": config.dataset_config_name, "dataset_split": config.dataset_split}
    # what does not apply to the data is not recorded
    return facts if all(facts["options"].get(name, value) == value for name, value in given.items()) else {}


def split(config: EvaluateConfig, run: dict, dataset) -> tuple:
    """(the real items, those held out or None), as the run that trained the pipeline split them.

    Raises:
        ValueError: --holdout says something else than the run, or the data is not the run's any more.
    """
    options = run.get("options", {})
    count, seed = options.get("holdout", 0), options.get("seed", config.seed)
    asked = config.holdout
    if run and asked and asked != count:
        raise ValueError(
            f"--holdout must be that of the pipeline's run, {count}, or 0 for the data as given: what the run did not "
            f"hold out it was trained on; got {asked}"
        )
    count = (count if run else 0) if asked is None else asked
    if not count:
        wanted = sorted(set(HELD_OUT) & set(config.metrics or ()))
        if run and wanted and asked is None:
            raise ValueError(
                f"{', '.join(wanted)} needs items that training does not see, and the pipeline's run held none of "
                f"{config.data} out: --holdout 0 takes the data as given, seen or not"
            )
        return dataset, dataset if wanted else None
    rest, held_out = hold_out(dataset, count, seed)
    recorded = run.get("data", {}).get("held_out")
    if recorded is not None and recorded != split_record(held_out):
        raise ValueError(
            f"{config.data} is not as it was in training (items, length or stride), so that others would be held out; "
            "--holdout 0 takes the data as given"
        )
    if run and recorded is None and isinstance(dataset, SequenceDataset) and dataset.windows > 1:
        raise ValueError(
            f"the pipeline was trained by ddpm_hf 0.2.0 or earlier, which held out {count} single windows and trained "
            "on others that overlap them; --holdout 0 takes the data as given"
        )
    check_content(config, run, rest)
    return rest, held_out


def check_content(config: EvaluateConfig, run: dict, dataset) -> None:
    """Check that data of the name of the run's data is that data, by a digest of some of its items.

    Other items would have been held out of other data.

    Raises:
        ValueError: it is other data, and is not to be taken as given.
    """
    recorded = run.get("data", {}).get("content")
    if recorded is not None and recorded != fingerprint(underlying(dataset), ())["digest"]:
        raise ValueError(
            f"{config.data} has the name of the data that the pipeline was trained on, but other content (or is cut "
            "otherwise): --holdout 0 takes the data as given"
        )


def first_shape(dataset, on_bad_image: str) -> tuple:
    """The shape of the first item that can be read.

    Raises:
        ValueError: there is none, or a picture before it cannot be read and is not to be skipped.
    """
    for index in range(len(dataset)):
        try:
            return tuple(load_item(dataset, index).shape)
        except BadImageError as error:
            if on_bad_image != "skip":
                raise ValueError(f"{error}. To leave such images out: --on_bad_image skip") from error
    raise ValueError("none of the images can be read")


def trained_mirrored(config: EvaluateConfig, facts: dict) -> bool:
    """Return True if training mirrored pictures, by the option or by the pipeline's record, `facts`."""
    options = facts.get("options", {})
    return options.get("random_flip") is True if config.random_flip is None else config.random_flip


def check_scope(config: EvaluateConfig, is_image: bool) -> None:
    """Check that the options of features, and of mirrored images, are given where they have an effect; those of the
    data are checked where it is opened.

    Raises:
        ValueError: one was given that has none.
    """
    given = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
    for name in ("feature_network", "feature_resolution", "eval_cache_dir", "random_flip"):
        if name in given and not is_image:
            raise ValueError(f"--{name} applies to images; got {getattr(config, name)!r} for sequences: leave it out")
    if "feature_resolution" in given and config.feature_network in ("inception", "pixels"):
        raise ValueError(
            f"--feature_resolution applies to a TorchScript --feature_network; got {config.feature_resolution} with "
            f"{config.feature_network!r}: leave it out"
        )


def evaluate(config: EvaluateConfig) -> list[dict]:
    """All records of this evaluation, one a metric and number of steps.

    Raises:
        ValueError: options, pipeline or data that do not fit.
    """
    for name in ("pipeline", "data"):
        if not getattr(config, name):
            raise ValueError(f"--{name} must be given")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    pipeline, own = load(config)
    facts = record_of(config)
    run = run_of(config, facts)
    if run:  # read the data as the run did, where nothing else is asked for
        names = {"stride": None, "sequence_columns": None, "image_column": None, "on_bad_image": "stop",
                 "class_labels": None}  # fmt: skip
        for name, default in names.items():
            if getattr(config, name) == default and run["options"].get(name) is not None:
                config = replace(config, **{name: run["options"][name]})
    accelerator.print(f"{config.data} is {'' if run else 'not '}taken as the data that the pipeline was trained on")
    dataset, shape = real_data(config, run, pipeline)
    check_scope(config, is_image=len(shape) == 3)
    dataset, held_out = split(config, run, dataset)
    if held_out is not None and not isinstance(own, GaussianScheduler):
        raise ValueError(f"the held-out loss needs a pipeline with a GaussianScheduler, got {type(own).__name__}")
    steps = config.num_inference_steps or [pipeline.config.num_inference_steps or own.config.num_train_timesteps]
    if not all(1 <= n <= own.config.num_train_timesteps for n in steps):
        raise ValueError(f"--num_inference_steps must lie in 1 to {own.config.num_train_timesteps}, got {steps}")
    settings = EvalSettings(
        metrics=config.metrics, num_samples=config.num_samples, num_real=config.num_real,
        feature_network=config.feature_network, feature_resolution=config.feature_resolution,
        batch_size=config.batch_size, seed=config.seed, cache_dir=config.eval_cache_dir,
        workers=config.dataloader_num_workers, on_bad_image=config.on_bad_image,
        random_flip=trained_mirrored(config, facts),
    )  # fmt: skip
    evaluator = Evaluator(accelerator, dataset, shape, settings, held_out)
    pipeline.to(accelerator.device)
    pipeline.unet.eval()
    folder = Path(config.output_dir or (config.pipeline if Path(config.pipeline).is_dir() else "evaluation"))
    earlier = read_records(folder)
    evaluator.prepare()
    records = []
    for n in steps:
        values = evaluator(pipeline, n, own)
        accelerator.print(f"{n} steps:\n{evaluator.describe(values)}", flush=True)
        records += evaluator.records(values, pipeline, n, data=without_folders(config.data), split=config.dataset_split)
        # it does not depend on the number of sampling steps
        evaluator.metrics = [metric for metric in evaluator.metrics if metric not in HELD_OUT] or evaluator.metrics
    if accelerator.is_main_process:
        save(records, earlier, steps, config, folder)
    accelerator.end_training()
    return records


def read_records(folder: Path) -> list[dict]:
    """Read the records that an earlier evaluation left in the folder, which is made if it is not there.

    Raises:
        ValueError: evaluation.json holds something else, or the folder cannot be made or written.
    """
    file = folder / "evaluation.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"results cannot be written into {folder}: {error}. Another folder: --output_dir") from error
    try:
        earlier = json.loads(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, and is left as it is: {error}") from error
    if not (isinstance(earlier, list) and all(isinstance(record, dict) for record in earlier)):
        raise ValueError(f"{file} holds something else than records of evaluations, and is left as it is")
    return earlier


def save(records: list[dict], earlier: list[dict], steps: list[int], config: EvaluateConfig, folder: Path) -> None:
    """Add the records to evaluation.json, in the place of earlier ones of the same settings; draw the picture."""
    file = folder / "evaluation.json"

    def settings(record: dict) -> dict:
        return {name: value for name, value in record.items() if name != "value"}

    kept = [record for record in earlier if settings(record) not in [settings(new) for new in records]]
    try:
        write_text(file, json.dumps(kept + records, indent=1))
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}. The results are those printed above") from error
    print(f"results: {file}")
    if (folder / "model_index.json").exists():
        write_card(folder)
    if len(steps) > 1:
        names = list(dict.fromkeys(record["metric"] for record in records))
        names = [name for name in names if "held_out" not in name and not name.endswith("_real")]
        values = {name: [r["value"] for r in records if r["metric"] == name] for name in names}
        picture = folder / "steps-versus-metric.png"
        sampler = records[0]["scheduler"]
        title = f"{without_folders(config.pipeline)}, {sampler}, {config.num_samples:,} samples"
        save_steps_plot(steps, values, title, picture)
        print(f"picture: {picture}")


def main(arguments: list) -> int:
    parser = Parser(EvaluateConfig, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        evaluate(EvaluateConfig(**vars(parser.parse_args(arguments))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
