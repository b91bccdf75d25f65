"""Numbered samples of a pipeline, shared between processes, each of a class that the data's frequencies give it."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ddpm_hf.evaluation.classes import DataClasses, has_classes, model_classes, sample_classes
from ddpm_hf.evaluation.pairs import Pairs, chosen_pairs, is_paired
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.evaluation.shares import Shares
from ddpm_hf.randomness import Stream, generator_seeds


def sample_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """Return a generator for each sample, seeded by (seed, its number) alone; it draws all noise of the sample."""
    return [torch.Generator().manual_seed(s) for s in generator_seeds(seed, Stream.SAMPLES, numbers)]


class Sampling:
    """Draws the samples of an evaluation. Sample number i follows from (seed, i) alone, but for its class.

    Args:
        settings: the settings of the evaluation.
        shares: the exchange between processes.
        classes: the classes of the data, whose frequencies samples have; None for data without classes.
        pairs, held_out_pairs: items with their conditions, for a pipeline with paired conditions: each sample is given
            the condition of a held-out item, or of any if none is held out, and the item's class. None without them.

    Attributes:
        asked: the class (num_samples,) of the data that each sample is asked for, or None.
        pairs: those of both that samples are asked for, or None.
        held_out_pairs: True if these are held out.
        pair_numbers: the number (num_samples,) of the pair of each sample, or None.
    """

    def __init__(
        self, settings: EvalSettings, shares: Shares, classes: DataClasses | None = None, pairs: Pairs | None = None,
        held_out_pairs: Pairs | None = None,
    ):  # fmt: skip
        self.settings, self.shares, self.classes = settings, shares, classes
        self.asked = None
        if classes is not None:
            self.asked = sample_classes(classes.counts, settings.num_samples, settings.seed)
        self.held_out_pairs = held_out_pairs is not None
        self.pairs, self.pair_numbers = held_out_pairs or pairs, None
        if self.pairs is not None:
            self.pair_numbers = chosen_pairs(len(self.pairs.dataset), settings.num_samples, settings.seed)
            if classes is not None:
                numbers = classes.numbers if held_out_pairs is None else classes.held_out
                self.asked = numbers[self.pair_numbers]

    def check(self, pipeline, guidance_scale: float = 1.0) -> None:
        """Check, before long work, that the pipeline can be asked for what the settings say.

        Raises:
            ValueError: if the pipeline has classes and the data none, or the other way round but classes are asked for.
        """
        s = self.settings
        if is_paired(pipeline) and self.pairs is None:
            raise ValueError(
                "condition_column or condition_dir must name the conditions of the data: the pipeline's model needs "
                "one for each sample, and takes them from there"
            )
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {guidance_scale}")
        if has_classes(pipeline):
            if self.classes is None:
                raise ValueError(
                    "the pipeline's model has classes, and samples get them by the frequencies of the data: "
                    "class_labels must name the classes of the data"
                )
            model_classes(pipeline, self.classes.names)
            return
        asks = {"guidance_scale": guidance_scale != 1, "per_class": s.per_class, "classifier": s.classifier is not None}
        for name, given in asks.items():
            if given:
                got = guidance_scale if name == "guidance_scale" else getattr(s, name)
                raise ValueError(f"{name} needs a pipeline whose model has classes, and this one has none; got {got!r}")

    def model_numbers(self, pipeline) -> np.ndarray:
        """Return the model's number of the class of each sample, (num_samples,), for a pipeline with classes."""
        return np.asarray(model_classes(pipeline, self.classes.names))[self.asked]

    def draw(
        self, pipeline, steps: int, guidance_scale: float = 1.0, between: Callable[[], None] = lambda: None
    ) -> Iterator[np.ndarray]:
        """Yield this process' samples in batches, as the pipeline returns them for `output_type="np"`.

        Args:
            pipeline: the pipeline.
            steps: the number of sampling steps.
            guidance_scale: the scale of classifier-free guidance; 1 is no guidance.
            between: a function that is called before each batch, equally often on every process.

        Raises:
            FloatingPointError: samples of some process are not finite; every process raises it, after its last batch.
        """
        faults: list[str] = []
        numbers, size = self.shares.of(self.settings.num_samples), self.settings.batch_size
        starts = range(0, self.shares.largest(self.settings.num_samples), size)
        shown = self.shares.accelerator.is_main_process
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not shown, leave=False):
            between()
            part = numbers[start : start + size]
            if not part or faults:  # another process has more, or this one has failed
                continue
            try:
                samples = pipeline(
                    batch_size=len(part), generator=sample_generators(self.settings.seed, part),
                    num_inference_steps=steps, output_type="np",
                    return_dict=False, **self._condition(pipeline, part, guidance_scale),
                )[0]  # fmt: skip
            except FloatingPointError as error:
                faults.append(str(error))
                continue
            yield samples
        if faults := self.shares.gather_objects(faults):
            raise FloatingPointError(faults[0])

    def _condition(self, pipeline, part: range, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments of a call that ask for the conditions and classes of these samples."""
        given = {}
        if is_paired(pipeline):
            given["condition"] = self.pairs.conditions(self.pair_numbers[list(part)])
        if not has_classes(pipeline):
            return given
        labels = self.model_numbers(pipeline)[list(part)].tolist()
        interval = tuple(self.settings.guidance_interval)
        return given | {"class_labels": labels, "guidance_scale": guidance_scale, "guidance_interval": interval}

    def seconds(self, pipeline, shape: tuple, steps: int, guidance_scale: float = 1.0) -> float:
        """Return about how long sampling will take, from one call of the model (the second: the first may compile)."""
        batch = min(self.settings.batch_size, max(1, len(self.shares.of(self.settings.num_samples))))
        x = torch.zeros(batch, *shape, device=pipeline.device, dtype=pipeline.unet.dtype)
        t = torch.zeros(batch, dtype=torch.long, device=pipeline.device)
        options = {"class_labels": torch.zeros_like(t)} if has_classes(pipeline) else {}
        for _ in range(2):
            start = time.perf_counter()
            with torch.no_grad():
                pipeline.unet(x, t, **options).sample.sum().item()
            once = time.perf_counter() - start
        each = -(-self.settings.num_samples // self.shares.accelerator.num_processes)
        # guidance predicts twice
        return once * steps * -(-each // self.settings.batch_size) * (1 if guidance_scale == 1 else 2)
