"""The work of score.py: the scores of all items, on all processes, and the files that they are written to."""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from ddpm_hf import DDPMPipeline1D
from ddpm_hf.arguments import Need, check_needs
from ddpm_hf.commands.sample_choices import choose_scheduler
from ddpm_hf.commands.sample_files import check_settings, open_folder, write_aside
from ddpm_hf.commands.sampling import in_precision, pipeline_settings, together
from ddpm_hf.commands.score import METHODS, READING, make_parser
from ddpm_hf.commands.score_files import ENDINGS, ScoreParts, read_scores, write_table
from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.data.scaling import has_own_units, scaling_of
from ddpm_hf.evaluation.anomalies import (
    is_label_file,
    item_metrics,
    item_names,
    map_metrics,
    percentiles,
    read_anomalies,
    read_masks,
)
from ddpm_hf.evaluation.classes import has_classes, model_classes
from ddpm_hf.evaluation.completion import spread_out
from ddpm_hf.evaluation.options import EvaluateConfig
from ddpm_hf.evaluation.pairs import Pairs, is_paired
from ddpm_hf.evaluation.run_data import open_real_data, read_record
from ddpm_hf.evaluation.sampling import sample_generators
from ddpm_hf.evaluation.sequences import sample_units
from ddpm_hf.evaluation.shares import Items
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.pipeline.outputs import ScoreOutput
from ddpm_hf.pipeline.rules import check_rules
from ddpm_hf.pipeline.scoring import SCORING_RULES
from ddpm_hf.plots import save_heat_map
from ddpm_hf.run.checkpoint import write_text
from ddpm_hf.run.record import without_folders

BLOCK = 64  # the number of items in a part
STRONGEST = 0.98  # the share of the items whose maps stay within the colours of the pictures
# Settings on which no score depends: a run that was stopped may go on with others.
FREE = ("output", "batch_size", "dataloader_num_workers", "labels", "normal", "save_reference")

# What options need to have an effect.
NEEDS = (
    Need(("smoothing",), lambda c: c.maps, "maps (--maps or --masks)", "without them"),
    Need(("num_reference",), lambda c: c.reference, "a --reference", "without one"),
    Need(("scheduler",), lambda c: c.method == "denoising" or c.complete,
         "--method denoising and to --complete, because no other score depends on it", "for {c.method}"),
)  # fmt: skip


def check_options(given: argparse.Namespace, pipeline) -> None:
    """Check the options against each other and against the pipeline.

    Raises:
        ValueError: one lies outside of its range, or does not apply.
    """
    if given.output.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output must end in {' or '.join(ENDINGS)}, got {given.output}")
    if given.num_reference < 1:
        raise ValueError(f"--num_reference must be at least 1, got {given.num_reference}")
    for name, methods in (("strengths", METHODS[:1]), ("num_timesteps", METHODS[1:])):
        if getattr(given, name) is not None and given.method not in methods:
            allowed = " or ".join(methods)
            raise ValueError(f"--{name} applies to --method {allowed}, got {getattr(given, name)} for {given.method}")
    check_rules(
        SCORING_RULES, method=given.method, smoothing=given.smoothing, batch_size=given.batch_size,
        strengths=given.strengths or [1], num_timesteps=2 if given.num_timesteps is None else given.num_timesteps,
        scheduler=pipeline.scheduler, kind=type(pipeline.scheduler).__name__,
    )  # fmt: skip
    if given.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {given.seed}")
    if given.save_reference and (not given.reference or not Path(given.pipeline).is_dir()):
        raise ValueError(
            f"--save_reference needs --reference and a --pipeline in a folder; got {given.reference} and "
            f"{given.pipeline}"
        )
    if given.complete and not isinstance(pipeline, DDPMPipeline1D) and not pipeline._has_units():
        raise ValueError(
            "--complete applies to sequences, and to images in units of their own; pictures have no missing values: "
            "leave it out"
        )
    if given.complete and given.on_missing != "stop":
        raise ValueError(f"--complete and --on_missing {given.on_missing} exclude each other")
    if given.normal and not given.labels:
        raise ValueError(f"--normal needs --labels, got {given.normal}")
    check_needs(NEEDS, make_parser().asked(given), given)
    _check_classes(given, pipeline)
    _check_reference(given)


def _check_classes(given: argparse.Namespace, pipeline) -> None:
    """Check the options of classes.

    Raises:
        ValueError: the model has no classes, or both options are given.
    """
    asked = [name for name in ("class_labels", "class_for_all") if getattr(given, name) is not None]
    if asked and not has_classes(pipeline):
        raise ValueError(f"--{asked[0]} needs a model with classes, and this one has none")
    if len(asked) == 2:
        raise ValueError("--class_labels and --class_for_all exclude each other; got both")


def _check_reference(given: argparse.Namespace) -> None:
    """Check that no option names a file or folder of classes or conditions, if --reference has other items than --data.

    Raises:
        ValueError: one does.
    """
    if given.reference in (None, given.data):
        return
    labels, column = given.class_labels or "", given.condition_column or ""
    beside = {"class_labels": labels if is_label_file(labels) else None, "condition_dir": given.condition_dir,
              "condition_column": column if column.lower().endswith(".npy") else None}  # fmt: skip
    for name, place in beside.items():
        if place:
            raise ValueError(
                f"--{name} {place} belongs to the items of --data, and --reference has others. Score those first, as "
                "--data and --reference, with --save_reference; later calls need no --reference then"
            )


def class_for_all(pipeline, text: str) -> int | None:
    """Return the number of the class that all items are scored as; None for "none", no class.

    Raises:
        ValueError: the model does not know it.
    """
    total = pipeline.unet.config.num_class_embeds
    names = {name: int(number) for number, name in (pipeline.config.get("id2label") or {}).items()}
    known = {"none": None, **{str(number): number for number in range(total)}, **names}
    if text not in known:
        shown = ", ".join(list(names)[:20]) or f"numbers from 0 to {total - 1}"
        raise ValueError(f"--class_for_all must be one of the model's classes ({shown}), or none; got {text!r}")
    return known[text]


# ---------------------------------------------------------------------------------------------
# Data


@dataclass
class Scored:
    """Items to score.

    Attributes:
        dataset: the items, map-style.
        shape: the shape of an item, (C, *spatial).
        names: the names of the columns that say what an item is.
        rows: their values, a list for each item.
        classes: the number of the class that each item is scored as, or None for no class, a list.
        pairs: the items with their conditions, for a model with paired conditions; None for other models.
    """

    dataset: Any
    shape: tuple
    names: list[str]
    rows: list
    classes: list
    pairs: Pairs | None = None

    def place(self, number: int) -> str:
        """Return what says which item it is, for a message."""
        return ", ".join(f"{name} {value}" for name, value in zip(self.names, self.rows[number]))

    def part(self, chosen: Sequence[int]) -> "Scored":
        """Return the items at these places."""
        rows, classes = ([values[n] for n in chosen] for values in (self.rows, self.classes))
        dataset, pairs = Part(self.dataset, chosen), self.pairs
        pairs = None if pairs is None else Pairs(dataset, pairs.condition, pairs.scaling)
        return Scored(dataset, self.shape, self.names, rows, classes, pairs)


def open_data(given: argparse.Namespace, data: str, pipeline, say, column: str | None):
    """Open data as the options say; the arguments are those of `open_items`."""
    options = {name: getattr(given, name) for name in READING}
    config = EvaluateConfig(pipeline=given.pipeline, data=data, holdout=0, class_labels=column, **options)
    return open_real_data(config, read_record(given.pipeline), pipeline, say, gaps=given.complete)


def open_items(given: argparse.Namespace, data: str, pipeline, say, column: str | None = None) -> Scored:
    """Open items in the units of the pipeline, with their classes.

    Args:
        given: the options.
        data: the source of the items.
        pipeline: the pipeline.
        say: the function that prints a line.
        column: the column that the classes of the data are read from, as `--class_labels` and `--labels` name it.

    Raises:
        ValueError: they cannot be opened, or do not fit the pipeline.
    """
    real = open_data(given, data, pipeline, say, column)
    classes = [None] * len(real.dataset)
    if has_classes(pipeline):
        if given.class_for_all is not None:
            classes = [class_for_all(pipeline, given.class_for_all)] * len(classes)
        elif real.classes is not None:
            classes = np.asarray(model_classes(pipeline, real.classes.names))[real.classes.numbers].tolist()
        else:
            say("the model has classes, and scores the items without one; --class_labels and --class_for_all give one")
    if is_paired(pipeline) and real.pairs is None:
        raise ValueError(
            f"--condition_column or --condition_dir must name the conditions of {data}: the model has paired conditions"
        )
    return Scored(real.dataset, real.shape, *item_names(real.dataset, data), classes, real.pairs)


def open_labelled(given: argparse.Namespace, pipeline, say) -> tuple[Scored, Any]:
    """Open the items to score, and the dataset whose classes are the labels of the anomalies."""
    column = None if given.labels is None or is_label_file(given.labels) else given.labels
    if not has_classes(pipeline):
        items = open_items(given, given.data, pipeline, say, column)
        return items, items.dataset
    items = open_items(given, given.data, pipeline, say, given.class_labels)
    if column in (None, given.class_labels):
        return items, items.dataset
    return items, open_data(given, given.data, pipeline, lambda _: None, column).dataset


def score_block(given, pipeline, scored: Scored, numbers: range) -> tuple[np.ndarray, np.ndarray, ScoreOutput | None]:
    """Score the items with these numbers.

    Returns:
        Scores (n,) and maps (n, C, *spatial), of which an item that could not be read, and was to be skipped, has NaN;
        and what `pipe.score` returned, or None if no item could be read.

    Raises:
        ValueError: an item cannot be read, or has a value that is missing or infinite.
    """
    scores, maps = np.full(len(numbers), np.nan), np.full((len(numbers), *scored.shape), np.nan, np.float32)
    found = None
    reading = Items(scored.dataset, given.on_bad_image, len(numbers), given.dataloader_num_workers)
    for batch in reading.read(numbers):
        own, items = batch.numbers, sample_units(batch.x0, underlying(scored.dataset))
        if is_paired(pipeline) and given.on_bad_image == "skip":
            kept = [place for place, number in enumerate(own) if scored.pairs.is_readable(number)]
            if not kept:
                continue
            own, items = [own[place] for place in kept], items[kept]
        wrong, empty = ~items.flatten(1).isfinite().all(dim=1), items.flatten(1).isnan().all(dim=1)
        if wrong.any() and not given.complete:
            place = scored.place(own[int(wrong.nonzero()[0])])
            raise ValueError(f"items must be finite; NaN or infinity is in {place}; --complete fills NaN in first")
        if empty.any():
            place = scored.place(own[int(empty.nonzero()[0])])
            raise ValueError(f"items must have a known value to be completed; {place} has missing values alone")
        options = {name: getattr(given, name) for name in ("strengths", "num_timesteps")}
        found = pipeline.score(
            items, method=given.method, smoothing=given.smoothing, batch_size=given.batch_size,
            complete=given.complete, generator=sample_generators(given.seed, own),
            class_labels=[scored.classes[number] for number in own] if has_classes(pipeline) else None,
            condition=scored.pairs.conditions(own) if is_paired(pipeline) else None,
            **{name: value for name, value in options.items() if value is not None},
        )  # fmt: skip
        places = [number - numbers.start for number in own]
        scores[places] = found.scores
        maps[places] = found.maps if found.maps.ndim == 3 else np.moveaxis(found.maps, -1, 1)
    return scores, maps, found


# ---------------------------------------------------------------------------------------------
# The program


def make_settings(given: argparse.Namespace, pipeline, scored: Scored) -> dict:
    """Return everything that the scores and files depend on; without folders of this machine."""
    settings = {name: value for name, value in vars(given).items() if name not in FREE}
    for name in ("pipeline", "data", "reference", "masks", "class_labels", "condition_dir", "condition_column"):
        settings[name] = settings[name] and without_folders(settings[name])
    told = hashlib.sha256(json.dumps(scored.classes).encode()).hexdigest() if has_classes(pipeline) else None
    return {
        **settings, "classes": told, "items": len(scored.dataset), "shape": list(scored.shape),
        **pipeline_settings(pipeline),
    }  # fmt: skip


class Run:
    """One run of the program, on one of its processes.

    Args:
        given: the options.
        accelerator: accelerate's `Accelerator`.

    Raises:
        ValueError: options, pipeline, data, labels and masks do not fit each other.
    """

    def __init__(self, given: argparse.Namespace, accelerator):
        self.given, self.accelerator = given, accelerator
        if given.masks and "npy" not in given.maps:
            given.maps = [*given.maps, "npy"]
        self.pipeline = load_pipeline(given.pipeline)
        choose_scheduler(self.pipeline, given.scheduler, None)
        check_options(given, self.pipeline)
        self.items, labelled = open_labelled(given, self.pipeline, accelerator.print)
        self.anomalous = self.masks = self.reference = None
        if given.labels:
            self.anomalous = read_anomalies(given.labels, labelled, given.normal)
        if given.masks:
            self.masks = read_masks(given.masks, self.items.dataset, self.items.shape, self.items.rows)
        if given.reference:
            found = open_items(given, given.reference, self.pipeline, accelerator.print, given.class_labels)
            self.reference = found.part(spread_out(len(found.dataset), given.num_reference))
            if (None in self.items.classes) != (None in self.reference.classes):
                raise ValueError(
                    "--data and --reference must both be scored with classes, or both without; only one of them has "
                    "classes: --class_labels names those of both, and --class_for_all one class"
                )
        self.settings = json.loads(json.dumps(make_settings(given, self.pipeline, self.items)))
        output = given.output
        self.facts, self.folder = output.with_suffix(".json"), output.with_name(f"{output.name}.parts")
        self.map_file, self.pictures = (output.with_name(f"{output.stem}-maps{end}") for end in (".npy", ""))

    def is_done(self) -> bool:
        """Return True if an earlier run has scored all items.

        Raises:
            ValueError: the output belongs to a run with other settings, or to something else.
        """
        if not self.given.output.exists():
            self.check_new()
            return False
        try:
            found = json.loads(self.facts.read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--output {self.given.output} exists already without its settings, {self.facts.name}, so this run "
                "cannot go on with it: choose another --output"
            ) from error
        check_settings(found, self.settings, f"--output {self.given.output}", "output", "scores")
        if self.masks is not None and not self.map_file.exists():
            raise ValueError(f"--masks needs the maps, and {self.map_file} is gone: choose another --output")
        if self.given.save_reference and self.given.method not in (self.pipeline.config.get("score_quantiles") or {}):
            raise ValueError(
                "--save_reference must be given to the run that scores the reference, and that of --output "
                f"{self.given.output} has ended without it: choose another --output"
            )
        return True

    def check_new(self) -> None:
        """Check that a run that begins would not write over files, nor mix its own with those of another run.

        Raises:
            ValueError: there are some.
        """
        written = [self.facts, *([self.map_file] if "npy" in self.given.maps else [])]
        written += [self.pictures] if "pictures" in self.given.maps else []
        if found := [str(path) for path in written if path.exists() and not self.folder.exists()]:
            raise ValueError(
                f"--output {self.given.output} would write over {', '.join(found)}: choose another --output"
            )

    def score(self, scored: Scored, name: str) -> ScoreParts:
        """Score what is missing of the items, on all processes, and return the parts."""
        given, accelerator = self.given, self.accelerator
        has_maps = name == "items" and bool(given.maps)
        parts = ScoreParts(self.folder / name, len(scored.dataset), BLOCK, has_maps)
        missing = parts.missing()
        accelerator.wait_for_everyone()  # before any process writes
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        shown = tqdm(mine, desc=f"scoring {name}", unit="block", disable=not accelerator.is_main_process)
        with in_precision(accelerator, given.mixed_precision):
            for block in shown:
                parts.write(block, *score_block(given, self.pipeline, scored, parts.numbers(block)))
        accelerator.wait_for_everyone()
        return parts

    def __call__(self) -> dict:
        """Score what is missing, write the files, and return the metrics."""
        accelerator, is_main = self.accelerator, self.accelerator.is_main_process
        if together(accelerator, self.is_done):
            return self.finish(read_scores(self.given.output))

        def open_parts() -> None:
            open_folder(self.folder, self.settings, "output", "parts of scores")

        together(accelerator, lambda: open_parts() if is_main else None)
        together(accelerator, lambda: None if is_main else open_parts())  # the folder is there now
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(accelerator.device)
        self.pipeline.unet.eval()
        if accelerator.device.type == "cuda":
            self.pipeline.use_cuda_graphs()
        parts = self.score(self.items, "items")
        reference = None if self.reference is None else self.score(self.reference, "reference")
        if "pictures" in self.given.maps:
            self.draw(parts)
        if accelerator.is_main_process:
            if "npy" in self.given.maps:
                parts.write_maps(self.map_file)
            if self.given.save_reference:
                self.save_reference(reference)
            self.write_table(parts, reference)
        accelerator.wait_for_everyone()
        return self.finish(read_scores(self.given.output))

    def draw(self, parts: ScoreParts) -> None:
        """Draw this process' share of the pictures, all with the same colours."""
        low, high = np.nanmedian(parts.joined("lowest")), np.nanquantile(parts.joined("highest"), STRONGEST)
        limits = float(low), float(high if high > low else low + 1)
        data = underlying(self.items.dataset)
        names = getattr(data, "channel_names", None)
        mine = parts.blocks[self.accelerator.process_index :: self.accelerator.num_processes]
        for block in tqdm(mine, desc="drawing maps", unit="block", disable=not self.accelerator.is_main_process):
            numbers = parts.numbers(block)
            reading = Items(self.items.dataset, "skip", len(numbers), self.given.dataloader_num_workers)
            maps = parts.maps_of(block)
            for batch in reading.read(numbers):
                items = sample_units(batch.x0, data).numpy()
                if items.ndim == 4 and has_own_units(scaling_of(data)):
                    items = scaling_of(data).to_levels(items)
                for number, item in zip(batch.numbers, items):
                    path, heat = self.pictures / self.picture_name(number), maps[number - numbers.start]
                    if not path.exists():
                        write_aside(path, lambda aside, x=item, h=heat: save_heat_map(x, h, limits, aside, names))
        self.accelerator.wait_for_everyone()

    def picture_name(self, number: int) -> str:
        """Return the name of the picture of an item: that of its file, with .png added to other endings."""
        name = self.items.rows[number][0]
        if not isinstance(name, str) or Path(name).is_absolute():
            return f"{number:06d}.png"
        return name if name.endswith(".png") else f"{name}.png"

    def save_reference(self, reference: ScoreParts) -> None:
        """Keep the distribution of the reference's scores in the pipeline's folder, as `calibrate_score` does."""
        scores, file = reference.joined("scores"), Path(self.given.pipeline) / "model_index.json"
        found = ScoreOutput(scores=scores[np.isfinite(scores)], maps=None, options=reference.options())
        self.pipeline.calibrate_score(found)
        settings = json.loads(file.read_text()) | {"score_quantiles": self.pipeline.config["score_quantiles"]}
        write_text(file, json.dumps(settings, indent=2) + "\n")

    def write_table(self, parts: ScoreParts, reference: ScoreParts | None) -> None:
        """Write the settings, and then the table, which makes the run complete."""
        scores, places = parts.joined("scores"), parts.joined("percentiles")
        if reference is not None:
            found = reference.joined("scores")
            places = percentiles(scores, found[np.isfinite(found)])
        columns, rows = [*self.items.names, "score"], [[*row, s] for row, s in zip(self.items.rows, scores.tolist())]
        if np.isfinite(places).any():
            columns, rows = [*columns, "percentile"], [[*row, p] for row, p in zip(rows, places.tolist())]
        write_text(self.facts, json.dumps({"settings": self.settings}, indent=1))
        write_table(self.given.output, columns, rows)

    def finish(self, scores: np.ndarray) -> dict:
        """Compute the metrics, print them, and add them to the JSON file."""
        metrics, accelerator = {}, self.accelerator
        if accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.masks is not None and self.anomalous is None:
                self.anomalous = self.masks.reshape(len(self.masks), -1).any(axis=1)
            try:
                if self.anomalous is not None and not self.anomalous.all() and self.anomalous.any():
                    metrics |= item_metrics(scores, self.anomalous)
                if self.masks is not None:
                    metrics |= map_metrics(np.load(self.map_file, mmap_mode="r"), self.masks)
            except ValueError as error:  # items that could not be read were all of one kind
                print(f"no more metrics: {error}")
            write_text(self.facts, json.dumps({"settings": self.settings, "metrics": metrics}, indent=1))
            print(f"{len(scores):,} items, {accelerator.num_processes} process(es): {self.given.output}")
            for name, value in metrics.items():
                print(f"  {name.replace('_', ' '):<22} {value:.5g}")
        accelerator.wait_for_everyone()
        return metrics


def score(given: argparse.Namespace) -> dict:
    """Score items as the options say, and return the metrics, on the main process.

    Raises:
        ValueError: options, pipeline or data do not fit.
    """
    accelerator = Accelerator()
    metrics = together(accelerator, lambda: Run(given, accelerator))()
    accelerator.end_training()
    return metrics
