"""Completion of held-out items: a part of each is hidden, completed by the pipeline, and scored beside baselines.

The task "forecast" hides the last part of a sequence; "impute" hides a gap of a sequence, or a block of an image.
Processes share the items. What is hidden follows from (seed, item), and a completion from (seed, item, its number), so
that results depend neither on the number of processes nor on the batch size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.data.scaling import has_own_units, scaling_of
from ddpm_hf.evaluation.classes import DataClasses, has_classes, model_classes
from ddpm_hf.evaluation.completion_scores import (
    find_season,
    image_baselines,
    score_sums,
    sequence_baselines,
    summary,
)
from ddpm_hf.evaluation.sampling import Sampling
from ddpm_hf.evaluation.sequences import sample_units
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.randomness import Stream, derive_seed, generator_seeds
from ddpm_hf.run.record import duration
from ddpm_hf.scheduler import GaussianScheduler

TASKS = ("impute", "forecast")
SHOWN = 6  # the number of items in the picture
REFERENCE = 2000  # the largest number of training items for the deviations of channels and the season


@dataclass
class CompletionSettings:
    """Settings of an evaluation of completions.

    Args:
        task: "impute", or for sequences "forecast".
        unknown_share: the share of each item that is hidden, between 0 and 1.
        num_items: the largest number of held-out items; if there are more, evenly spaced ones are taken.
        num_samples: the number of completions of each item.
        season: the length of a season for the baseline `seasonal`; None means the autocorrelation's.
        num_real: the largest number of training items that deviations and the season are computed from.
        batch_size: the number of completions that a process makes at once.
        seed: the seed of what is hidden, and of the completions.
        jump_length, jump_n_sample: the jumps of RePaint; see `inpaint`.
        guidance_interval: the lowest and the highest noise level with guidance.
        workers, on_bad_image: as in `EvalSettings`.
    """

    task: str
    unknown_share: float = 0.25
    num_items: int = 100
    num_samples: int = 20
    season: int | None = None
    num_real: int = REFERENCE
    batch_size: int = 64
    seed: int = 0
    jump_length: int = 10
    jump_n_sample: int = 10
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    workers: int = 0
    on_bad_image: str = "stop"

    def check(self, spatial: tuple[int, ...]) -> None:
        """Check the settings against the size of an item, (length,) or (H, W).

        Raises:
            ValueError: if a setting is out of its range, or does not fit items of this size.
        """
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        is_image = len(spatial) == 2
        if is_image and self.task == "forecast":
            raise ValueError("the task forecast applies to sequences; images have impute: got 'forecast' for images")
        if not 0 < self.unknown_share < 1:
            raise ValueError(f"unknown_share must lie between 0 and 1, both excluded, got {self.unknown_share}")
        self._settings().check()
        for name in ("num_items", "jump_length", "jump_n_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        left = [total - size for total, size in zip(spatial, hidden_size(spatial, self.unknown_share))]
        if min(left) < 2:
            raise ValueError(
                f"unknown_share must leave at least 2 values known along each side of {_times(spatial)}, got "
                f"{self.unknown_share}, which leaves {_times(left)}"
            )
        if self.season is not None and is_image:
            raise ValueError(f"season applies to sequences; got {self.season} for images")
        if self.season is not None and not 1 <= self.season <= left[0]:
            raise ValueError(
                f"season must be at least 1 and not longer than the known part of a sequence, which has {left[0]} of "
                f"{spatial[0]} values, got {self.season}"
            )

    def _settings(self) -> EvalSettings:
        """Return the settings that evaluations of completions and of samples share."""
        return EvalSettings(
            num_samples=self.num_samples, num_real=self.num_real, batch_size=self.batch_size, seed=self.seed,
            workers=self.workers, on_bad_image=self.on_bad_image, guidance_interval=self.guidance_interval,
        )  # fmt: skip


class Completed(NamedTuple):
    """An item with its completions, in the data's own units; images have levels from 0 to 1.

    Attributes:
        truth: the item (C, *spatial).
        hidden: True (*spatial) where it was hidden.
        completions: the completions (M, C, *spatial).
    """

    truth: np.ndarray
    hidden: np.ndarray
    completions: np.ndarray


def hidden_size(spatial: tuple[int, ...], share: float) -> list[int]:
    """Return the size of the hidden part along each side; it has this share of the item and its proportions."""
    return [max(1, round(side * share ** (1 / len(spatial)))) for side in spatial]


def hidden_part(settings: CompletionSettings, spatial: tuple[int, ...], item: int) -> np.ndarray:
    """Return bools (*spatial) that are True where item number `item` is hidden.

    A gap or a block lies at a place that (seed, item) draws, with something known on each of its sides.
    """
    sizes = hidden_size(spatial, settings.unknown_share)
    corner = [total - size for total, size in zip(spatial, sizes)]
    if settings.task == "impute":
        draw = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 4, item))
        corner = [int(draw.integers(1, last)) for last in corner]
    hidden = np.zeros(spatial, dtype=bool)
    hidden[tuple(slice(first, first + size) for first, size in zip(corner, sizes))] = True
    return hidden


def spread_out(total: int, count: int) -> np.ndarray:
    """Return at most `count` evenly spaced numbers from 0 to total - 1, in ascending order."""
    count = min(total, count)
    return np.arange(count) * total // max(count, 1)


def is_trained_to_complete(pipeline) -> bool:
    """Return True if the model was trained to be given the known part; others are sampled by RePaint."""
    return getattr(pipeline.config, "condition", None) == "known"


class Completion:
    """Measures how well pipelines complete held-out items.

    Args:
        accelerator: accelerate's `Accelerator`; its processes share the work.
        dataset: the items that were trained on, map-style, for the deviations of the channels and the season.
        held_out: the items to complete, map-style.
        shape: the shape of an item, (C, *spatial).
        settings: what to hide, and how to complete it.
        classes: the classes of the data, for pipelines whose model has classes; None if there are none.

    Attributes:
        season: after `prepare`, the length of a season for the baseline; None if there is none.
        shown: after a call, up to `SHOWN` items with their completions, on every process.
        count: after a call, the number of items that could be read.

    Raises:
        ValueError: if the settings do not fit the items.
    """

    def __init__(
        self, accelerator, dataset, held_out, shape: tuple, settings: CompletionSettings,
        classes: DataClasses | None = None,
    ):  # fmt: skip
        settings.check(tuple(shape[1:]))
        self.settings, self.shape, self.spatial = settings, tuple(shape), tuple(shape[1:])
        self.accelerator, self.shares = accelerator, Shares(accelerator)
        self.is_image = len(shape) == 3
        self.classes, self.data = classes, underlying(held_out)
        self.chosen = spread_out(len(held_out), settings.num_items)
        if not len(self.chosen):
            raise ValueError("completing needs at least 1 held-out item, got 0")
        self.held_out = Part(held_out, self.chosen)
        self.trained = Part(dataset, spread_out(len(dataset), min(settings.num_real, REFERENCE)))
        self.season, self.shown, self.count = settings.season, [], len(self.chosen)

    def check(self, pipeline, guidance_scale: float = 1.0) -> None:
        """Check, before any call of the model, that a pipeline can complete these items.

        Raises:
            ValueError: if it cannot, or guidance is asked for and its model has no classes.
        """
        if not hasattr(pipeline, "inpaint"):
            raise ValueError(f"completing needs a pipeline with the method inpaint, got {type(pipeline).__name__}")
        if not is_trained_to_complete(pipeline):
            if getattr(pipeline.unet.config, "condition_channels", 0):
                raise ValueError(
                    "completing needs a model without conditions, or one that was trained with --condition known; got "
                    f"a model with {pipeline.unet.config.condition_channels} channels of a paired condition"
                )
            if not isinstance(pipeline.scheduler, GaussianScheduler):
                raise ValueError(
                    "completing by a model that was not trained for it needs a GaussianScheduler, got "
                    f"{type(pipeline.scheduler).__name__}"
                )
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {guidance_scale}")
        if self.has_classes(pipeline):
            model_classes(pipeline, self.classes.names)
        elif guidance_scale != 1:
            raise ValueError(
                f"guidance_scale needs a pipeline and data with classes, and one of them has none; got {guidance_scale}"
            )

    def has_classes(self, pipeline) -> bool:
        """Return True if the model takes classes, and those of the held-out items are known."""
        return has_classes(pipeline) and self.classes is not None and self.classes.held_out is not None

    # -- data ----------------------------------------------------------------------------------

    def _natural(self, items: Tensor) -> np.ndarray:
        """Return items (B, C, *spatial) in the units of samples, float64; pictures have levels from 0 to 1."""
        return sample_units(items, self.data).numpy()

    def _drawn(self, item: Completed) -> Completed:
        """Return an item whose values, if it is an image, are levels from 0 to 1."""
        scaling = scaling_of(self.data)
        if not (self.is_image and has_own_units(scaling)):
            return item
        return Completed(scaling.to_levels(item.truth[None])[0], item.hidden, scaling.to_levels(item.completions))

    def _items(self, part: Part, batch_size: int) -> Items:
        return Items(part, self.settings.on_bad_image, batch_size, self.settings.workers)

    def prepare(self) -> None:
        """Compute the deviation of each channel, and the season if it is not given, from training items.

        Raises:
            ValueError: if items cannot be read.
        """
        own = self._items(self.trained, self.settings.batch_size).read(self.shares.of(len(self.trained)))
        if self.is_image:  # moments are enough
            (moments,) = self.shares.collect(own, lambda batch: self._moments(batch.x0))
            mean, square = moments.mean(dim=0).numpy().T
            deviation = np.sqrt(np.maximum(square - mean**2, 0))
        else:
            (rows,) = self.shares.collect(own, lambda batch: torch.from_numpy(self._natural(batch.x0)))
            deviation = np.nanstd(rows.numpy(), axis=(0, 2))
            if self.season is None:
                known = self.spatial[0] - hidden_size(self.spatial, self.settings.unknown_share)[0]
                self.season = find_season(rows.numpy(), known)
        self.deviation = np.where(deviation > 0, deviation, 1.0)

    def _moments(self, x0: Tensor) -> Tensor:
        """Return the mean and the mean square (n, C, 2) of each channel of each image."""
        natural = torch.from_numpy(self._natural(x0))
        return torch.stack((natural.mean(dim=(2, 3)), (natural**2).mean(dim=(2, 3))), dim=-1)

    # -- one evaluation ------------------------------------------------------------------------

    def __call__(self, pipeline, steps: int, guidance_scale: float = 1.0) -> dict[str, dict[str, Any]]:
        """Complete the items and score the completions.

        Args:
            pipeline: the pipeline, on the accelerator's device, with its progress bar off.
            steps: the number of sampling steps.
            guidance_scale: the scale of classifier-free guidance, for a pipeline and data with classes; 1 is none.

        Returns:
            For the method "model" and each baseline the scores that `summary` names. Sequences of several channels also
            have the scores of each channel, as `crps/0`.

        Raises:
            ValueError: if the pipeline cannot be measured (see `check`), or no hidden value can be scored.
        """
        self.check(pipeline, guidance_scale)
        self._announce(pipeline, steps, guidance_scale)
        names, rows, shown = ["model"], [], []
        wanted = set(spread_out(len(self.chosen), SHOWN).tolist())
        for numbers, truth, hidden, completions in self._completed(pipeline, steps, guidance_scale):
            everywhere = np.broadcast_to(hidden[:, None], truth.shape)
            known = np.where(everywhere, np.nan, truth)
            task, season = self.settings.task, self.season
            simple = image_baselines(known) if self.is_image else sequence_baselines(known, task, season)
            # neither missing values of the truth nor channels of which nothing is known
            counted = everywhere & np.isfinite(truth) & np.isfinite(next(iter(simple.values())))
            ensembles = {"model": completions, **{name: each[:, None] for name, each in simple.items()}}
            names = list(ensembles)
            sums = [score_sums(truth, each, counted) for each in ensembles.values()]
            rows.append(torch.from_numpy(np.stack(sums, axis=1)))  # (n, methods, C, sums)
            found = zip(numbers, truth, hidden, completions)
            shown += [(number, self._drawn(Completed(*each))) for number, *each in found if number in wanted]
        gathered = self.shares.gather(torch.cat(rows) if rows else None)
        names = max(self.shares.gather_objects([names]), key=len)  # a process without items knows no baselines
        self.shown = [each for _, each in sorted(self.shares.gather_objects(shown), key=lambda pair: pair[0])]
        self.count = len(gathered)
        return self._scores(names, gathered.sum(dim=0).numpy())

    def _scores(self, names: list[str], sums: np.ndarray) -> dict[str, dict[str, float]]:
        """Return the scores of each method from its sums, (methods, C, sums)."""
        counts = sums[0, :, 0]
        if not counts.sum():
            raise ValueError("there is nothing to score: no hidden value of these items is known")
        found = {}
        for name, own in zip(names, sums):
            has_bands = name == "model"
            found[name] = summary(own, self.deviation, has_bands)
            if not self.is_image and len(own) > 1:
                for channel in np.flatnonzero(counts):
                    each = slice(channel, channel + 1)
                    values = summary(own[each], self.deviation[each], has_bands)
                    found[name] |= {f"{metric}/{channel}": value for metric, value in values.items()}
        return found

    def _completed(self, pipeline, steps: int, guidance_scale: float) -> Iterator[tuple]:
        """Yield this process' items with their completions, in batches.

        Yields:
            The numbers of n items, the items (n, C, *spatial), bools (n, *spatial), True where they were hidden, and
            completions (n, M, C, *spatial).
        """
        s, own = self.settings, self.shares.of(len(self.chosen))
        together = max(1, s.batch_size // s.num_samples)
        batches = self._items(self.held_out, together).read(own)
        shown = self.accelerator.is_main_process
        rounds = -(-len(own) // together)
        for batch in tqdm(batches, desc="completing", unit="batch", total=rounds, disable=not shown, leave=False):
            numbers, truth = list(batch.numbers), self._natural(batch.x0)
            hidden = np.stack([hidden_part(s, self.spatial, int(self.chosen[number])) for number in numbers])
            known = np.where(hidden[:, None], np.nan, truth)
            parts = []
            for first in range(0, s.num_samples, s.batch_size):
                samples = range(first, min(first + s.batch_size, s.num_samples))
                parts.append(self._complete(pipeline, known, numbers, samples, steps, guidance_scale))
            yield numbers, truth, hidden, np.concatenate(parts, axis=1)

    def _complete(
        self, pipeline, known: np.ndarray, numbers: list[int], samples: range, steps: int, guidance_scale: float
    ) -> np.ndarray:
        """Return completions (n, len(samples), C, *spatial) of items (n, C, *spatial), which are NaN where hidden."""
        s, options = self.settings, {}
        items = self.chosen[numbers].tolist()
        # the numbers of completions stand above those of up to 2^20 items, so that a seed depends on neither count
        places = [item + (sample << 20) for item in items for sample in samples]
        seeds = generator_seeds(s.seed, Stream.EVALUATION, places)
        if self.has_classes(pipeline):
            of_model = np.asarray(model_classes(pipeline, self.classes.names))
            options["class_labels"] = of_model[self.classes.held_out[items]].tolist()
            options |= {"guidance_scale": guidance_scale, "guidance_interval": tuple(s.guidance_interval)}
        (found,) = pipeline.inpaint(
            np.moveaxis(known, 1, -1) if self.is_image else known, num_inference_steps=steps,
            jump_length=s.jump_length, jump_n_sample=s.jump_n_sample, num_samples=len(samples),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="np", return_dict=False,
            **options,
        )  # fmt: skip
        found = np.moveaxis(found, -1, 1) if self.is_image else found
        return found.reshape(len(items), len(samples), *self.shape).astype(np.float64)

    def _announce(self, pipeline, steps: int, guidance_scale: float) -> None:
        """Say about how long completing will take."""
        s = self.settings
        whole = EvalSettings(num_samples=len(self.chosen) * s.num_samples, batch_size=s.batch_size)
        seconds = Sampling(whole, self.shares).seconds(pipeline, self.shape, steps, guidance_scale)
        # RePaint passes a step jump_n_sample times
        seconds *= 1 if is_trained_to_complete(pipeline) or steps <= s.jump_length else s.jump_n_sample
        self.accelerator.print(
            f"completion: {s.num_samples} completions of {len(self.chosen)} held-out items, about {duration(seconds)}"
        )


def make_records(
    completion: Completion, scores: dict[str, dict[str, float]], pipeline, steps: int, guidance_scale: float, **more
) -> list[dict]:
    """Return a record for each score, with everything that it depends on, as in `completion.json`.

    Args:
        completion: the `Completion` that measured.
        scores: the scores that it returned.
        pipeline, steps, guidance_scale: as in that call.
        more: further entries of every record.
    """
    s = completion.settings
    common = {
        **more, "task": s.task, "unknown_share": s.unknown_share, "num_items": completion.count,
        "shape": list(completion.shape), "seed": s.seed,
    }  # fmt: skip
    own = {"num_samples": s.num_samples, "num_inference_steps": steps}
    own["scheduler"] = type(pipeline.scheduler).__name__
    if not is_trained_to_complete(pipeline):
        own |= {"jump_length": s.jump_length, "jump_n_sample": s.jump_n_sample}
    if completion.has_classes(pipeline):
        own |= {"guidance_scale": guidance_scale, "guidance_interval": list(s.guidance_interval)}
    records = []
    for method, values in scores.items():
        settings = common | (own if method == "model" else {})
        if method == "seasonal":
            settings["season"] = completion.season
        for name, value in values.items():
            metric, _, channel = name.partition("/")
            which = {"channel": int(channel)} if channel else {}
            records.append({"metric": metric, "value": value, "method": method, **which, **settings})
    return records


def describe(completion: Completion, scores: dict[str, dict[str, float]]) -> str:
    """Return the scores of all channels as a table with one line for each method.

    Args:
        completion: the `Completion` that measured.
        scores: the scores that it returned.
    """
    columns = [name for name in scores["model"] if "/" not in name]
    heads = {method: f"seasonal ({completion.season})" if method == "seasonal" else method for method in scores}
    wide = max(map(len, heads.values()))
    lines = [f"  {'':<{wide}}" + "".join(f"  {name:>17}" for name in columns)]
    for method, values in scores.items():
        cells = [f"{values[name]:.5g}" if name in values else "" for name in columns]
        lines.append((f"  {heads[method]:<{wide}}" + "".join(f"  {cell:>17}" for cell in cells)).rstrip())
    if not completion.is_image and completion.season is None:
        lines.append("  (no seasonal baseline: the autocorrelation of the training data has no peak; --season N)")
    return "\n".join(lines)


def _times(sides) -> str:
    return " x ".join(map(str, sides))
