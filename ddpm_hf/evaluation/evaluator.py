"""Evaluation of a pipeline against data, on all processes: distances, memorization, classes, held-out loss.

Every process samples and looks at its own share. The results are put in the order of the samples' numbers, so they
follow from (seed, number of samples) and not from the number of processes.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.data.checking import check_shared_memory, worker_memory
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.data.scaling import has_own_units, scaling_of
from ddpm_hf.evaluation.classes import DataClasses, has_classes, model_classes
from ddpm_hf.evaluation.classifier import Classifier
from ddpm_hf.evaluation.groups import ClassGroups
from ddpm_hf.evaluation.held_out import HeldOutLoss
from ddpm_hf.evaluation.likelihood import Likelihood
from ddpm_hf.evaluation.memorization import Memorization, neighbour_size, neighbour_vectors
from ddpm_hf.evaluation.networks import SequenceFeatures
from ddpm_hf.evaluation.pairs import PairErrors, Pairs, is_paired
from ddpm_hf.evaluation.pictures import PictureDistances
from ddpm_hf.evaluation.records import describe, make_records
from ddpm_hf.evaluation.sampling import Sampling
from ddpm_hf.evaluation.sequences import SequenceDistances, natural_units, tensor_of
from ddpm_hf.evaluation.settings import (
    AGREEMENT,
    BIASED,
    BY_CLASS,
    FEATURE_FRECHET,
    FEW,
    FIDELITY,
    HELD_OUT,
    LIKELIHOOD,
    METRICS,
    OF_FEATURES,
    EvalSettings,
    choose_metrics,
)
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.randomness import Stream, derive_seed
from ddpm_hf.run.record import duration


# This class is longer than 250 lines because all metrics share its real data, its samples and its processes.
class Evaluator:
    """Measures pipelines against one set of data.

    Args:
        accelerator: accelerate's `Accelerator`; its processes share the work.
        dataset: the real items, map-style.
        shape: the shape of one item, (C, *spatial).
        settings: what to measure, and how.
        held_out: the items that training does not see, for the held-out loss; None if there are none.
        classes: the classes of the data, for pipelines whose model has classes; None if the data has none.
        pairs, held_out_pairs: the items and the held-out items with their conditions, for pipelines with paired
            conditions; None if there are none. Samples are given the conditions of held-out items if there are any.

    Raises:
        ValueError: if a metric is not one of this kind of data, or lacks what it needs.
    """

    def __init__(
        self, accelerator, dataset, shape: tuple, settings: EvalSettings, held_out=None,
        classes: DataClasses | None = None, pairs: Pairs | None = None, held_out_pairs: Pairs | None = None,
    ):  # fmt: skip
        self.accelerator, self.dataset, self.shape, self.settings = accelerator, dataset, tuple(shape), settings
        self.shares = Shares(accelerator)
        self.is_image = len(shape) == 3
        self.mirrored = self.is_image and (settings.random_flip or getattr(underlying(dataset), "random_flip", False))
        self.metrics = choose_metrics(settings.metrics, self.is_image, held_out is not None)
        settings.check()
        compared = [metric for metric in self.metrics if metric not in HELD_OUT]
        if getattr(underlying(dataset), "gaps", 0) and compared:
            raise ValueError(
                f"metrics must be of {', '.join(HELD_OUT)} for data with missing values, which samples cannot be "
                f"compared with; got {', '.join(compared)}"
            )
        item_size = 1 if isinstance(underlying(dataset), ImageDataset) else 4
        self.shared_memory = worker_memory(settings.workers, settings.batch_size, shape, item_size)
        check_shared_memory(self.shared_memory, settings.workers)
        self.least = max(4, settings.least_rows())  # the smallest number of real items
        if len(dataset) < self.least:
            raise ValueError(f"evaluation needs at least {self.least} real items, the data has {len(dataset)}")
        count = min(len(dataset), settings.num_real)
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 0)).permutation(len(dataset))
        self.real = Part(dataset, np.sort(order[:count]))
        self.items = Items(self.real, settings.on_bad_image, settings.batch_size, settings.workers)
        self.num_real = count  # after `prepare`, the number of those that could be read
        self.sampling = Sampling(settings, self.shares, classes, pairs, held_out_pairs)
        self.by_class = (
            ClassGroups(classes, self.real.indices, self.sampling.asked, settings.least_rows())
            if settings.per_class
            else None
        )
        self.pictures = self.sequences = self.memorization = self.classifier = None
        self.held_out = self.likelihood = None
        if held_out is not None:
            self.held_out = HeldOutLoss(held_out, settings, self.shares, classes and classes.held_out, held_out_pairs)
        if self._any(*LIKELIHOOD):
            measured = pairs if held_out is None else held_out_pairs
            self.likelihood = Likelihood(dataset, held_out, self.is_image, settings, self.shares, classes, measured)
        if self.is_image and self._any(*OF_FEATURES):
            self.pictures = PictureDistances(self.real, self.shape, settings, self.shares)
        self.network = None
        if not self.is_image and settings.names_file() and self._any(FEATURE_FRECHET, *FIDELITY):
            self.network = SequenceFeatures(settings.feature_network, self.shape, self.shares)
        elif self._any(FEATURE_FRECHET):
            raise ValueError(
                f"the metric {FEATURE_FRECHET} needs feature_network, the file of a network of sequences; got "
                f"{settings.feature_network!r}"
            )

    def _any(self, *metrics: str) -> bool:
        return any(metric in self.metrics for metric in metrics)

    def check(self, pipeline, guidance_scales: Sequence[float] = (1.0,)) -> None:
        """Check, before long work, that a pipeline can be measured: its classes, guidance and the classifier.

        Raises:
            ValueError: if it cannot.
        """
        for scale in guidance_scales:
            self.sampling.check(pipeline, scale)
        if self.settings.classifier is not None:
            classes, device = pipeline.unet.config.num_class_embeds, self.accelerator.device
            self.classifier = Classifier(self.settings.classifier, self.shape, classes, device)

    # -- real data -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Get the statistics of the real data once, from the cache or from all processes, and keep them.

        Raises:
            ValueError: if items cannot be read, or too few of them can.
        """
        if self.is_image:
            self._prepare_pictures()
        elif self._any("memorization", *BY_CLASS):
            self._prepare_sequences()

    def _real_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' share of the real items, and their numbers."""
        batches = self.items.read(self.shares.of(len(self.real)))
        return ((batch.x0, torch.tensor(batch.numbers)) for batch in batches)

    def _prepare_sequences(self) -> None:
        data = underlying(self.dataset)
        (natural,) = self.shares.collect(self._real_batches(), lambda batch: natural_units(batch[0], data))
        self.sequences = SequenceDistances(natural, self.metrics, self.settings, self.shares, self.network)
        if self.by_class is not None:
            self.by_class.fit_sequences(natural, self.metrics, self.settings, self.shares, self.network)
        if self._any("memorization"):
            self.memorization = Memorization(self.sequences.reference, self.settings, self.shares)

    def _prepare_pictures(self) -> None:
        looks, stored = [], False
        if self.pictures is not None:
            if self.by_class is not None:
                self.by_class.make_pictures(self.pictures)
            sets = [self.pictures, *(self.by_class.distances.values() if self.by_class else ())]
            stored = all([each.load() for each in sets])  # every process asks for all of them
            if not stored:
                self.pictures.announce()
                looks += [lambda batch: self.pictures.of_real(batch[0]), lambda batch: batch[1]]
        if self._any("memorization"):
            looks.append(lambda batch: neighbour_vectors(batch[0]))
        found = self.shares.collect(self._real_batches(), *looks) if looks else []
        bad = self.shares.gather_objects(self.items.bad) if looks else self.pictures.bad if stored else []
        self._leave_out(bad)
        if self.pictures is not None and not stored:
            self.pictures.fit(found[0], bad)
            if self.by_class is not None:
                self.by_class.fit_pictures(found[0], found[1])
        if self.pictures is not None and self.by_class is not None:
            self.by_class.leave_out()
        if self._any("memorization"):
            mirrored_shape = (self.shape[0], *neighbour_size(self.shape[1:])) if self.mirrored else None
            self.memorization = Memorization(found[-1], self.settings, self.shares, mirrored_shape, kept=True)

    def _leave_out(self, bad: list[str]) -> None:
        """Count and name the real pictures that cannot be read."""
        self.num_real = len(self.real) - len(bad)
        if bad and self.num_real < self.least:
            raise ValueError(
                f"evaluation needs at least {self.least} real items that can be read, the data has {self.num_real}"
            )
        if bad:
            names = "".join(f"\n  {message}" for message in bad[:3]) + ("\n  ..." if len(bad) > 3 else "")
            self.accelerator.print(f"evaluation: left out {len(bad):,} of {len(self.real):,} real images:{names}")

    # -- one evaluation ------------------------------------------------------------------------

    def __call__(
        self, pipeline, num_inference_steps: int, loss_scheduler=None, between: Callable[[], None] = lambda: None,
        guidance_scale: float = 1.0,
    ) -> dict[str, float]:  # fmt: skip
        """Measure a pipeline.

        Args:
            pipeline: the pipeline, on the accelerator's device, with its progress bar off.
            num_inference_steps: the number of sampling steps.
            loss_scheduler: a `GaussianScheduler` for the held-out loss and the bound; None means the pipeline's.
            between: a function that is called before each batch, equally often on every process; an exception that it
                raises ends the evaluation.
            guidance_scale: the scale of classifier-free guidance, for a pipeline whose model has classes; 1 is none.

        Returns:
            The value of each metric; with memorization also `memorization_real`, the rate of real data; with the
            held-out loss also a value for each bucket of timesteps, such as `held_out_loss_t0-99`; with bits
            per dimension also its parts and standard error; with `per_class`
            also values such as `fid/cat`, of the class named cat; with a classifier also `class_agreement`; with
            paired conditions also `pair_rmse`, the error to the true item of the pair, and for pictures `pair_psnr`.

        Raises:
            ValueError: if the pipeline cannot be measured; see `check`.
        """
        self.sampling.check(pipeline, guidance_scale)
        own = loss_scheduler or pipeline.scheduler
        encode = encoder(pipeline, underlying(self.dataset), self.is_image)
        if self._any(*LIKELIHOOD):
            self.likelihood.check(own)
        values: dict[str, float] = {}
        if self.classifier is not None or self._any(*(set(METRICS) - set(HELD_OUT) - set(LIKELIHOOD))):
            self._announce(pipeline, num_inference_steps, guidance_scale)
            batches = self.sampling.draw(pipeline, num_inference_steps, guidance_scale, between)
            scaling, errors = scaling_of(underlying(self.dataset)), None
            if is_paired(pipeline):
                share = self.shares.of(self.settings.num_samples)
                errors = PairErrors(self.sampling.pairs, self.sampling.pair_numbers[share.start : share.stop], scaling)
                batches = errors.watch(batches)
            values.update((self._of_images if self.is_image else self._of_sequences)(pipeline, batches))
            if errors is not None:
                values.update(errors.values(self.shares, self.is_image and not has_own_units(scaling)))
        if self._any(*HELD_OUT, *LIKELIHOOD):
            numbers = model_classes(pipeline, self.sampling.classes.names) if has_classes(pipeline) else None
            if self._any(*HELD_OUT):
                values.update(self.held_out(pipeline, own, self.metrics, encode, between, numbers))
            if self._any(*LIKELIHOOD):
                values.update(self.likelihood(pipeline, own, encode, between, numbers))
        if self.accelerator.num_processes > 1:  # one answer, whatever the rounding of each machine
            from accelerate.utils import broadcast_object_list

            values = broadcast_object_list([values])[0]
        return values

    def _announce(self, pipeline, steps: int, guidance_scale: float) -> None:
        """Say how long sampling will take, and which metrics are biased."""
        seconds = self.sampling.seconds(pipeline, self.shape, steps, guidance_scale)
        if self.pictures is not None:
            each = -(-self.settings.num_samples // self.accelerator.num_processes)
            batch = min(self.settings.batch_size, each)
            blank = np.zeros((batch, *self.shape[1:], self.shape[0]), np.uint8)
            start = time.perf_counter()
            self.pictures.network(blank)
            seconds += (time.perf_counter() - start) * -(-each // batch)
        biased = ", ".join(metric for metric in self.metrics if metric in BIASED)
        few = f"; warning: below {FEW:,} samples {biased} is biased upwards"
        few = few if biased and self.settings.num_samples < FEW else ""
        guided = f", guidance scale {guidance_scale:g}," if guidance_scale != 1 else ""
        self.accelerator.print(
            f"evaluation: {self.settings.num_samples:,} samples of {steps} steps{guided or ','} about "
            f"{duration(seconds)}{few}"
        )

    def _of_images(self, pipeline, batches: Iterator[np.ndarray]) -> dict[str, float]:
        looks: list[Callable] = []
        scaling = scaling_of(underlying(self.dataset))
        own_units = has_own_units(scaling)

        def levels(images: np.ndarray) -> np.ndarray:
            """Return samples (B, H, W, C) as levels from 0 to 1."""
            return np.moveaxis(scaling.to_levels(np.moveaxis(images, -1, 1)), 1, -1) if own_units else images

        def model_units(images: np.ndarray) -> Tensor:
            """Return samples (B, H, W, C) in model units, (B, C, H, W)."""
            images = torch.from_numpy(images).movedim(-1, 1)
            return scaling.to_model(images.flatten(2)).view(images.shape) if own_units else images * 2 - 1

        if self.pictures is not None:
            looks.append(lambda images: self.pictures.of_samples(levels(images)))
        if self.classifier is not None:
            looks.append(lambda images: self.classifier(levels(images)))
        if self.memorization is not None:
            looks.append(self.memorization.look(lambda images: neighbour_vectors(model_units(images))))
        found = self.shares.collect(batches, *looks)
        values = {}
        if self.pictures is not None:
            values.update(self.pictures.values(found[0], self.metrics))
            if self.by_class is not None:
                values.update(self.by_class.values(found[0], self.metrics))
        if self.classifier is not None:
            values.update(self._agreement(pipeline, found[0 if self.pictures is None else 1]))
        if self.memorization is not None:
            values.update(self.memorization.values(found[-1]))
        return values

    def _of_sequences(self, pipeline, batches: Iterator[np.ndarray]) -> dict[str, float]:
        looks = [tensor_of] if self.classifier is None else [tensor_of, self.classifier]
        samples, *predicted = self.shares.collect(batches, *looks)
        values = {}
        if self.sequences is not None:
            rows = self.sequences.standardized(samples)
            values.update(self.sequences.values(rows))
        if self.by_class is not None and self.sequences is not None:
            values.update(self.by_class.values(samples, self.metrics))
        if predicted:
            values.update(self._agreement(pipeline, predicted[0]))
        if self.memorization is not None:
            share = self.shares.of(len(rows))
            (found,) = self.shares.collect([rows[share.start : share.stop]], self.memorization.look(lambda own: own))
            values.update(self.memorization.values(found))
        return values

    def _agreement(self, pipeline, predicted: Tensor) -> dict[str, float]:
        """Return the share of samples whose predicted class (n,) is the one that they were asked for."""
        asked = torch.from_numpy(self.sampling.model_numbers(pipeline))
        return {AGREEMENT: (predicted == asked).double().mean().item()}

    # -- telling -------------------------------------------------------------------------------

    def records(
        self, values: dict[str, float], pipeline, num_inference_steps: int, guidance_scale: float = 1.0, **more
    ) -> list[dict]:
        """Return a record for each value; see `records.make_records`."""
        return make_records(self, values, pipeline, num_inference_steps, guidance_scale, **more)

    def describe(self, values: dict[str, float]) -> str:
        """Return the values as aligned lines; see `records.describe`."""
        return describe(self, values)


def encoder(pipeline, data, is_image: bool) -> Callable[[Tensor], Tensor]:
    """Return the function from items of a dataset, as it gives them, to the units of a pipeline's model."""
    return lambda x0: x0 if is_image else pipeline._encode(natural_units(x0, data), "the data")
