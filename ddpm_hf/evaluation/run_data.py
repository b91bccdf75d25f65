"""The real data of an evaluation, opened and split as the run that trained the pipeline did.

A pipeline's training.json says which data its run was trained on. If that is the data of the evaluation, options that
are not given are those of the run, and the items that the run held out are held out again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ddpm_hf.config import BUNDLED, TrainConfig
from ddpm_hf.data.images import BadImageError
from ddpm_hf.data.loading import fingerprint, hold_out, load_item, split_record, underlying
from ddpm_hf.data.opening import build_dataset, holds_recordings
from ddpm_hf.data.recordings import ENDINGS
from ddpm_hf.data.scaling import Scaling, has_own_units, scaling_of
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequence_files import FILE_ENDINGS
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.data.tables import table_folder
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.options import EvaluateConfig
from ddpm_hf.evaluation.pairs import Pairs, is_paired
from ddpm_hf.evaluation.settings import HELD_OUT
from ddpm_hf.run.record import without_folders

# Options that tell how data is read: those of the data's own run are taken unless others are given.
READING = ("image_range", "stride", "sequence_columns", "image_column", "on_bad_image", "class_labels", "channels_last",
           "csv_decimal", "recording", "on_missing", "condition_column", "condition_dir")  # fmt: skip


@dataclass
class RealData:
    """The data to compare samples with.

    Attributes:
        dataset: the items that the run trained on, or all items, map-style.
        held_out: the items that the run did not see, or None.
        shape: the shape of an item, (C, *spatial).
        classes: the classes of the items, or None for data without classes.
        config: the options, with those that were taken from the run.
        pairs, held_out_pairs: both with their conditions, for a pipeline with paired conditions, or None.
    """

    dataset: Any
    held_out: Any
    shape: tuple
    classes: DataClasses | None
    config: EvaluateConfig
    pairs: Pairs | None = None
    held_out_pairs: Pairs | None = None


def open_real_data(
    config: EvaluateConfig, facts: dict, pipeline, say: Callable[[str], None], gaps: bool = False
) -> RealData:
    """Open the data that samples are compared with.

    Args:
        config: the options of the evaluation.
        facts: the pipeline's record, which `read_record` returns.
        pipeline: the pipeline, whose samples have the shape that the data must have.
        say: the function that prints a line.
        gaps: True to leave missing values of sequences, and of images in units of their own, as NaN.

    Raises:
        ValueError: if the data cannot be opened, does not fit the pipeline, or is not the run's any more.
    """
    run = _run_of(config, facts)
    say(f"{config.data} is {'' if run else 'not '}taken as the data that the pipeline was trained on")
    if run:
        given = config.given()
        taken = {name: run["options"].get(name) for name in READING if name not in given}
        config = replace(config, **{name: value for name, value in taken.items() if value is not None})
    elif config.image_range is None and (trained := _trained_range(config, facts, pipeline)):
        say("values outside image_range {:g} {:g} are clipped, as in training".format(*trained))
        config = replace(config, image_range=trained)
    dataset, shape = _open(config, run, pipeline, gaps)
    config.check_scope(is_image=len(shape) == 3)
    for name in ("condition_column", "condition_dir"):
        if getattr(config, name) is not None and not is_paired(pipeline):
            raise ValueError(
                f"{name} needs a pipeline whose model is given paired conditions, and this one's is not; got "
                f"{getattr(config, name)!r}"
            )
    condition = getattr(dataset, "condition", None)
    dataset, held_out = _split(config, run, dataset)
    classes = DataClasses.of(getattr(underlying(dataset), "labels", None), dataset, held_out)
    pairs = [Pairs.of_part(part, condition) for part in (dataset, held_out)]
    return RealData(dataset, held_out, shape, classes, config, *pairs)


def read_record(place: str) -> dict:
    """Return training.json of a pipeline in a folder or on the Hub; {} if it has none with options and data."""
    folder = Path(place)
    try:
        file = folder / "training.json" if folder.is_dir() else hf_hub_download(place, "training.json")
        facts = json.loads(Path(file).read_text(encoding="utf-8"))
        return facts if isinstance(facts["options"], dict) and isinstance(facts["data"], dict) else {}
    except (EntryNotFoundError, OSError, ValueError, KeyError, TypeError):  # there is none, or it has another form
        return {}


def trained_mirrored(config: EvaluateConfig, facts: dict) -> bool:
    """Return True if training mirrored images, by the option or by the pipeline's record, `facts`."""
    options = facts.get("options", {})
    return options.get("random_flip") is True if config.random_flip is None else config.random_flip


def _run_of(config: EvaluateConfig, facts: dict) -> dict:
    """Return the pipeline's record, `facts`, if --data is the data that it was trained on; otherwise {}."""
    name = facts.get("data", {}).get("name")
    same = name == without_folders(str(Path(config.data)))
    # the record has no folders of the machine; the content is compared later
    if not same and not (name and Path(config.data).exists() and Path(name).name == Path(config.data).resolve().name):
        return {}
    given = {"dataset_config_name": config.dataset_config_name, "dataset_split": config.dataset_split}
    # options that do not apply to the data are not recorded
    return facts if all(facts["options"].get(name, value) == value for name, value in given.items()) else {}


def _open(config: EvaluateConfig, run: dict, pipeline, gaps: bool) -> tuple[Any, tuple]:
    """Open the data in the shape of the pipeline's samples, scaled as its run scaled it; return it and that shape."""
    path, size = Path(config.data), pipeline._size()
    _check_kind(config.data, is_image=len(size) == 2)
    own_units = pipeline.config.get("data_scale") is not None
    if (
        config.data in BUNDLED
        or not path.exists()
        or (path.is_dir() and len(size) == 1 and not holds_recordings(config.data))
    ):
        source = {"dataset_name": config.data}
    else:
        source = {"train_data_dir" if path.is_dir() else "train_data_file": config.data}
    given, options = config.given(), {}
    for name in ("dataset_config_name", "dataset_split", *READING):
        if name in given:
            options[name] = getattr(config, name)
    if config.data in BUNDLED and (config.data == "ecg") != (len(size) == 1):
        pass  # bundled data of the other kind is refused by its shape, below
    elif len(size) == 2:
        options |= {"resolution": list(size), "image_channels": pipeline.unet.config.in_channels}
        if "train_data_file" in source or path.is_dir() and not table_folder(config.data):
            options |= _image_norm(run, own_units) if config.image_range is None else {}
    else:
        options |= {"sequence_length": size[0]}
        if norm := run.get("options", {}).get("sequence_norm"):
            options["sequence_norm"] = norm
        if gaps or pipeline.config.get("condition") == "known":  # its data may have missing values
            options["condition"] = "known"
    run_folder = str(path_of_run) if (path_of_run := Path(config.pipeline).parent).is_dir() else "none"
    own = {}
    if len(size) == 2 and own_units:
        scaling = Scaling.from_json(pipeline.config)  # other data is seen as the model sees its own
        scaling = replace(scaling, limit=float(pipeline.scheduler.config.get("clip_sample_range") or 1.0))
        own = {"scaling": scaling, "missing": gaps}
    dataset = build_dataset(TrainConfig(**source, **options, cache_gb=0, output_dir=run_folder), **own)
    fits = isinstance(dataset, ScientificImages) if own else not has_own_units(scaling_of(dataset))
    if len(size) == 2 and not fits:
        units = "in units of the data" if own_units else "in [0, 1]"
        raise ValueError(f"the pipeline's samples are {units}, and {config.data} has other units")
    shape, expected = _first_shape(dataset, config.on_bad_image), (pipeline.unet.config.in_channels, *size)
    if shape != expected:
        raise ValueError(f"the pipeline generates {expected}, the data has {shape}")
    return dataset, shape


def _trained_range(config: EvaluateConfig, facts: dict, pipeline) -> list[float] | None:
    """Return the range that training clipped values to, by the pipeline's record, `facts`, for images in units of their
    own in an array or in files; None for other data and without such a range."""
    own_units = len(pipeline._size()) == 2 and pipeline.config.get("data_scale") is not None
    is_read = Path(config.data).is_file() or Path(config.data).is_dir() and not table_folder(config.data)
    return facts.get("options", {}).get("image_range") if own_units and is_read else None


def _image_norm(run: dict, own_units: bool) -> dict[str, Any]:
    """Return the option by which images are read in units of their own, if the pipeline has them."""
    # their scaling is then the pipeline's
    return {"image_norm": run.get("options", {}).get("image_norm") or "meanstd"} if own_units else {}


def _check_kind(data: str, is_image: bool) -> None:
    """Check that data that is written as a path exists, and is of the kind that the pipeline generates."""
    path = Path(data)
    meant = path.suffix.lower() in (*FILE_ENDINGS, *ENDINGS) or data.startswith((".", "/", "~")) or data.endswith("/")
    if meant and not path.exists():
        raise ValueError(f"--data {data}: there is no such file or folder")
    if is_image and path.is_file() and path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"the pipeline generates images, --data {data} is a file of sequences")
    if not is_image and path.is_dir() and not (table_folder(data) or holds_recordings(data)):
        raise ValueError(f"the pipeline generates sequences, --data {data} is a folder of images")


def _first_shape(dataset, on_bad_image: str) -> tuple:
    """Return the shape of the first item that can be read."""
    for index in range(len(dataset)):
        try:
            return tuple(load_item(dataset, index).shape)
        except BadImageError as error:
            if on_bad_image != "skip":
                raise ValueError(f"{error}. To leave such images out: --on_bad_image skip") from error
    raise ValueError("none of the images can be read")


def _split(config: EvaluateConfig, run: dict, dataset) -> tuple[Any, Any]:
    """Return the items that the run trained on and those that it held out, or all items and None."""
    options = run.get("options", {})
    count, seed = options.get("holdout", 0), options.get("seed", config.seed)
    asked = config.holdout
    if run and asked and asked != count:
        raise ValueError(
            f"--holdout must be that of the pipeline's run, {count}, or 0 for the data as given, because the run was "
            f"trained on everything that it did not hold out; got {asked}"
        )
    count = (count if run else 0) if asked is None else asked
    if not count:
        wanted = [f"--task {config.task}"] if config.task else sorted(set(HELD_OUT) & set(config.metrics or ()))
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
    _check_content(config, run, rest)
    return rest, held_out


def _check_content(config: EvaluateConfig, run: dict, dataset) -> None:
    """Check, by a digest of some items, that data with the name of the run's data is that data.

    Other items would have been held out of other data.
    """
    recorded = run.get("data", {}).get("content")
    if recorded is not None and recorded != fingerprint(underlying(dataset), ())["digest"]:
        raise ValueError(
            f"{config.data} has the name of the data that the pipeline was trained on, but other content (or is cut "
            "otherwise): --holdout 0 takes the data as given"
        )
