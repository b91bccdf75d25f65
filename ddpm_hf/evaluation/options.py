"""Options of the evaluation of a saved pipeline, as the program evaluate.py takes them."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from ddpm_hf.arguments import Need, check_needs
from ddpm_hf.evaluation.settings import BY_CLASS, FEATURE_FRECHET, FIDELITY, HELD_OUT, LIKELIHOOD, OF_FEATURES


def _measures(*metrics: str) -> Callable[[Any], bool]:
    """Return a function that returns True if the options ask for one of these metrics, or for the usual ones."""
    return lambda c: c.metrics is None or not set(metrics).isdisjoint(c.metrics)


def _draws_samples(c) -> bool:
    """Return True if the options ask for something that is computed from samples."""
    return bool(c.task or c.classifier or c.metrics is None or set(c.metrics) - {*HELD_OUT, *LIKELIHOOD})


OF_SEQUENCES = (FEATURE_FRECHET, *FIDELITY)  # the metrics of sequences that are computed from features
# What options need to have an effect: the facts are all options, and `is_image`.
NEEDS = (
    Need(("metrics", "per_class", "classifier", "feature_network", "feature_resolution", "eval_cache_dir",
          "random_flip", "num_neighbours", "likelihood_items", "likelihood_timesteps"),
         lambda c: not c.task, "evaluations of samples, not to --task {c.task}"),
    Need(("unknown_share", "num_items", "season", "jump_length", "jump_n_sample"), lambda c: c.task, "a --task"),
    Need(("likelihood_items", "likelihood_timesteps"), lambda c: "bits_per_dim" in (c.metrics or ()),
         "the metric bits_per_dim", "without it"),
    Need(("feature_resolution", "eval_cache_dir", "random_flip"), lambda c: c.is_image, "images", "for sequences"),
    Need(("feature_network",), lambda c: c.is_image or c.feature_network != "pixels", "images", "for sequences"),
    Need(("feature_network",), lambda c: c.is_image or set(OF_SEQUENCES) & set(c.metrics or ()),
         f"the metrics {', '.join(OF_SEQUENCES)} of sequences", "without any of them"),
    Need(("feature_network", "feature_resolution"), lambda c: not c.is_image or _measures(*OF_FEATURES)(c),
         f"the metrics {', '.join(OF_FEATURES)} of images", "without any of them"),
    Need(("feature_resolution",), lambda c: c.feature_network not in ("inception", "pixels"),
         "a TorchScript --feature_network", "with {c.feature_network!r}"),
    Need(("eval_cache_dir",), _measures("memorization", *OF_FEATURES),
         f"the metrics {', '.join(('memorization', *OF_FEATURES))}", "without any of them"),
    Need(("random_flip",), _measures("memorization"), "the metric memorization", "without it"),
    Need(("per_class",), _measures(*BY_CLASS), f"the metrics {', '.join(BY_CLASS)}", "without any of them"),
    Need(("num_samples", "num_real", "num_inference_steps", "sampler", "guidance_scale", "guidance_interval"),
         _draws_samples, "samples, which these metrics do not need", "with --metrics {c.metrics}"),
    Need(("guidance_interval",), lambda c: set(c.guidance_scale or [1]) != {1}, "samples with guidance",
         "with --guidance_scale 1"),
)  # fmt: skip


def _option(default, help: str):
    """Return the field of an option; its help names a default that is a number or a text."""
    if not isinstance(default, bool) and default not in (None, "") and "Default:" not in help:
        help += f" Default: {default}."
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluateConfig:
    """Options of an evaluation. Those that training has too mean the same there."""

    pipeline: str = _option("", "Folder or Hub name of a saved DDPMPipeline or DDPMPipeline1D.")
    data: str = _option(
        "", "Data to compare with: 'digits', 'ecg', a folder or file as training takes, or the name of a dataset on "
        "the Hub."
    )  # fmt: skip
    class_labels: str | None = _option(
        None, "The classes of the data, as in training. Default: as in the pipeline's run, if --data is its data."
    )
    condition_column: str | None = _option(
        None, "The conditions of the data, for a pipeline with paired conditions, as in training. Default: as in the "
        "pipeline's run, if --data is its data."
    )  # fmt: skip
    condition_dir: str | None = _option(
        None, "Folder of the conditions of the images in --data, as in training. Default: as in the pipeline's run, if "
        "--data is its data."
    )  # fmt: skip
    task: str | None = _option(
        None, "Measure how held-out items are completed, instead of comparing samples with data: 'forecast' hides the "
        "last part of each sequence, 'impute' a gap of each sequence or a block of each image. Default: no task."
    )  # fmt: skip
    unknown_share: float = _option(0.25, "Share of each item that a task hides, between 0 and 1.")
    num_items: int = _option(100, "Largest number of held-out items that a task completes.")
    season: int | None = _option(
        None, "Length of a season for a task's seasonal baseline. Default: the first high peak of the autocorrelation "
        "of the training data."
    )  # fmt: skip
    jump_length: int = _option(
        10,
        "Number of steps that a jump of RePaint goes back, for a task with a model that was not trained to complete.",
    )
    jump_n_sample: int = _option(10, "Number of times that RePaint passes each place that it jumps from; 1: no jumps.")
    metrics: list[str] | None = _option(
        None, "Metrics to compute. Default: all that the data allows, without precision, recall, density, coverage and "
        "bits_per_dim, which are computed if they are named."
    )  # fmt: skip
    likelihood_items: int = _option(
        256, "Largest number of items of the metric bits_per_dim: held-out items, or without them those of --data."
    )
    likelihood_timesteps: int = _option(
        100, "Number of timesteps, and so of calls of the model, that bits_per_dim takes for each item. From the "
        "number of training timesteps on, the bound is computed term by term; below, it is estimated without bias."
    )  # fmt: skip
    num_inference_steps: list[int] | None = _option(
        None, "Number of sampling steps, or several for a curve. Default: the pipeline's."
    )
    guidance_scale: list[float] | None = _option(
        None, "Scale of classifier-free guidance, or several for a curve, for a model with classes; 1 is no guidance. "
        "Default: 1."
    )  # fmt: skip
    guidance_interval: list[float] | None = _option(
        None, "Lowest and highest noise level with guidance, from 0 (data) to 1 (noise). Default: 0 1."
    )
    per_class: bool = _option(
        False,
        "Also compute all metrics but memorization and held-out losses for each class, from its samples and items.",
    )
    classifier: str | None = _option(
        None, "TorchScript or torch.export (.pt2) file of a classifier, for the share of samples that it takes for the "
        "class that they were asked for. It gets images (B, C, H, W) in [0, 1], or sequences (B, C, length) in the "
        "units of the data."
    )  # fmt: skip
    sampler: str | None = _option(
        None, "'fast', for the pipeline's fast sampler, or a scheduler class of diffusers. Default: the pipeline's own."
    )  # fmt: skip
    num_samples: int | None = _option(
        None, "Number of generated samples; with a task, number of completions of each item. FID of fewer than 10,000 "
        "samples is biased. Default: 1000, and 20 with a task."
    )  # fmt: skip
    num_real: int = _option(50_000, "Largest number of real items that samples are compared with.")
    feature_network: str = _option(
        "inception", "Features of images, for FID, KID, precision, recall, density and coverage: 'inception', a "
        "TorchScript or torch.export (.pt2) file, or 'pixels'. For sequences, such a file, for feature_frechet, "
        "precision, recall, density and coverage; it gets (B, C, length) in the units of the data and gives (B, D)."
    )  # fmt: skip
    feature_resolution: int = _option(299, "Height and width in pixels of the input of a feature network in a file.")
    num_neighbours: int | None = _option(
        None, "Number k of the neighbour that a ball reaches to, for precision, recall, density and coverage. Default: "
        "3 for precision and recall, 5 for density and coverage, as in their papers."
    )  # fmt: skip
    batch_size: int = _option(64, "Number of samples that a process generates at once.")
    seed: int = _option(0, "Seed of the samples, and of the held-out items if the pipeline does not record them.")
    holdout: int | None = _option(
        None, "Number of items that training held out. Default: those that the pipeline's training.json names, if "
        "--data is the data of its run. 0 takes the data as given."
    )  # fmt: skip
    dataset_config_name: str | None = _option(None, "Configuration of a dataset on the Hub.")
    dataset_split: str = _option("train", "Split of a dataset on the Hub, or of a folder of tables.")
    image_column: str | None = _option(
        None, "Column of the images in a table. Default: as in the pipeline's run, if --data is its data."
    )
    channels_last: bool = _option(
        False,
        "Arrays have their channels last, as in training. Default: as in the pipeline's run, if --data is its data.",
    )
    image_range: list[float] | None = _option(
        None, "Lowest and highest value of scientific images; values outside are clipped. Default: as in "
        "the pipeline's run."
    )  # fmt: skip
    sequence_columns: list[str] | None = _option(
        None, "Columns of the sequences in a table. Default: as in the pipeline's run, if --data is its data."
    )
    stride: int | None = _option(
        None, "Distance between the windows of the data to compare with. Default: as in the pipeline's run, if --data "
        "is its data."
    )  # fmt: skip
    csv_decimal: str | None = _option(None, "Decimal mark of a .csv file. Default: found from the file.")
    recording: bool = _option(False, "An array (channels, points) is one recording.")
    on_missing: str = _option("stop", "What to do with missing values: 'stop', 'drop', 'interpolate' or 'mask'.")
    dataloader_num_workers: int = _option(0, "Number of processes that load data.")
    on_bad_image: str = _option(
        "stop", "What to do with an image that cannot be read: 'stop', or 'skip' to leave it out."
    )
    random_flip: bool | None = _option(
        None, "'true' if training mirrored images, so that memorization takes a mirrored copy for a copy. Default: as "
        "the pipeline's training.json says, otherwise false."
    )  # fmt: skip
    eval_cache_dir: str | None = _option(None, "Folder for the statistics of real images.")
    output_dir: str | None = _option(
        None, "Folder for the results. Default: the pipeline's folder, or evaluation/ for a name on the Hub."
    )

    def given(self) -> list[str]:
        """Return the names of the options that are not at their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def check_scope(self, is_image: bool) -> None:
        """Check that options are given only where they have an effect; those of the data are checked when it is opened.

        Raises:
            ValueError: if one was given that has none.
        """
        facts = SimpleNamespace(is_image=is_image, **vars(self))
        check_needs(NEEDS, {name: getattr(self, name) for name in self.given()}, facts)
