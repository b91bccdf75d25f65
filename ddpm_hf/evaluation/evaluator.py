"""Evaluation of a pipeline against data, on all processes: distances, memorization, held-out loss.

Every process samples and looks at its own share. The results are put in the order of the samples' numbers, so they
follow from (seed, number of samples) and not from the number of processes.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.checking import check_shared_memory, worker_memory
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.evaluation.held_out import HeldOutLoss
from ddpm_hf.evaluation.memorization import Memorization, neighbour_size, neighbour_vectors
from ddpm_hf.evaluation.pictures import PictureDistances, eight_bit
from ddpm_hf.evaluation.sequences import SequenceDistances, natural_units, tensor_of
from ddpm_hf.evaluation.settings import (
    BIASED,
    FEW,
    HELD_OUT,
    METRICS,
    SEQUENCE_METRICS,
    EvalSettings,
    choose_metrics,
)
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.randomness import Stream, derive_seed, generator_seeds
from ddpm_hf.run.record import duration, without_folders


class Evaluator:
    """Measures pipelines against one set of data.

    Args:
        accelerator: accelerate's `Accelerator`; its processes share the work.
        dataset: the real items, map-style.
        shape: the shape of one item, (C, *spatial).
        settings: what to measure, and how.
        held_out: the items that training does not see, for the held-out loss; None if there are none.

    Raises:
        ValueError: if a metric is not one of this kind of data, or lacks what it needs.
    """

    def __init__(self, accelerator, dataset, shape: tuple, settings: EvalSettings, held_out=None):
        self.accelerator, self.dataset, self.shape, self.settings = accelerator, dataset, tuple(shape), settings
        self.shares = Shares(accelerator)
        self.is_image = len(shape) == 3
        self.mirrored = self.is_image and (settings.random_flip or getattr(underlying(dataset), "random_flip", False))
        self.metrics = choose_metrics(settings.metrics, self.is_image, held_out is not None)
        settings.check()
        item_size = 1 if isinstance(underlying(dataset), ImageDataset) else 4
        self.shared_memory = worker_memory(settings.workers, settings.batch_size, shape, item_size)
        check_shared_memory(self.shared_memory, settings.workers)
        if len(dataset) < 4:
            raise ValueError(f"evaluation needs at least 4 real items, the data has {len(dataset)}")
        count = min(len(dataset), settings.num_real)
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 0)).permutation(len(dataset))
        self.real = Part(dataset, np.sort(order[:count]))
        self.items = Items(self.real, settings.on_bad_image, settings.batch_size, settings.workers)
        self.num_real = count  # after `prepare`, the number of those that could be read
        self.pictures = self.sequences = self.memorization = None
        self.held_out = None if held_out is None else HeldOutLoss(held_out, settings, self.shares)
        if self._any("fid", "kid"):
            self.pictures = PictureDistances(self.real, self.shape, settings, self.shares)

    def _any(self, *metrics: str) -> bool:
        return any(metric in self.metrics for metric in metrics)

    # -- real data -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Get the statistics of the real data once, from the cache or from all processes, and keep them.

        Raises:
            ValueError: if items cannot be read, or too few of them can.
        """
        if self.is_image:
            self._prepare_pictures()
        elif self._any(*SEQUENCE_METRICS[:5]):
            self._prepare_sequences()

    def _real_batches(self) -> Iterator[Tensor]:
        """Yield this process' share of the real items."""
        return (batch.x0 for batch in self.items.read(self.shares.of(len(self.real))))

    def _prepare_sequences(self) -> None:
        data = underlying(self.dataset)
        (natural,) = self.shares.collect(self._real_batches(), lambda x0: natural_units(x0, data))
        self.sequences = SequenceDistances(natural, self.metrics, self.settings.seed)
        if self._any("memorization"):
            self.memorization = Memorization(self.sequences.reference, self.settings, self.shares)

    def _prepare_pictures(self) -> None:
        looks, stored = [], False
        if self.pictures is not None:
            stored = self.pictures.load()
            if not stored:
                looks.append(self.pictures.of_real)
        if self._any("memorization"):
            looks.append(neighbour_vectors)
        found = self.shares.collect(self._real_batches(), *looks) if looks else []
        bad = self.shares.gather_objects(self.items.bad) if looks else self.pictures.bad if stored else []
        self._leave_out(bad)
        if self.pictures is not None and not stored:
            self.pictures.fit(found[0], bad)
        if self._any("memorization"):
            mirrored_shape = (self.shape[0], *neighbour_size(self.shape[1:])) if self.mirrored else None
            self.memorization = Memorization(found[-1], self.settings, self.shares, mirrored_shape)

    def _leave_out(self, bad: list[str]) -> None:
        """Count and name the real pictures that cannot be read."""
        self.num_real = len(self.real) - len(bad)
        if bad and self.num_real < 4:
            raise ValueError(f"evaluation needs at least 4 real items that can be read, the data has {self.num_real}")
        if bad:
            names = "".join(f"\n  {message}" for message in bad[:3]) + ("\n  ..." if len(bad) > 3 else "")
            self.accelerator.print(f"evaluation: left out {len(bad):,} of {len(self.real):,} real pictures:{names}")

    # -- one evaluation ------------------------------------------------------------------------

    def __call__(
        self, pipeline, num_inference_steps: int, loss_scheduler=None, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Measure a pipeline.

        Args:
            pipeline: the pipeline, on the accelerator's device, with its progress bar off.
            num_inference_steps: the number of sampling steps.
            loss_scheduler: a `GaussianScheduler` for the held-out loss; None means the pipeline's.
            between: a function that is called before each batch, equally often on every process; an exception that it
                raises ends the evaluation.

        Returns:
            The value of each metric; with memorization also `memorization_real`, the rate of real data; with the
            held-out loss also a value for each bucket of timesteps, such as `held_out_loss_t0-99`.
        """
        self.between = between
        values: dict[str, float] = {}
        if self._any(*(metric for metric in METRICS if metric not in HELD_OUT)):
            self._announce(pipeline, num_inference_steps)
            values.update((self._of_images if self.is_image else self._of_sequences)(pipeline, num_inference_steps))
        if self._any(*HELD_OUT):
            values.update(self._held_out_losses(pipeline, loss_scheduler or pipeline.scheduler))
        if self.accelerator.num_processes > 1:  # one answer, whatever the rounding of each machine
            from accelerate.utils import broadcast_object_list

            values = broadcast_object_list([values])[0]
        return values

    def _sample(self, pipeline, steps: int, output_type: str = "np") -> Iterator[np.ndarray]:
        """Yield this process' samples in batches; each sample has a generator of its own, seeded by its number."""
        numbers, size = self.shares.of(self.settings.num_samples), self.settings.batch_size
        starts = range(0, self.shares.largest(self.settings.num_samples), size)
        shown = self.accelerator.is_main_process
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not shown, leave=False):
            self.between()
            part = numbers[start : start + size]
            if not part:
                continue
            seeds = generator_seeds(self.settings.seed, Stream.SAMPLES, part)
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            yield pipeline(
                batch_size=len(part), generator=generators, num_inference_steps=steps, output_type=output_type,
                return_dict=False,
            )[0]  # fmt: skip

    def _announce(self, pipeline, steps: int) -> None:
        """Say how long sampling will take, from one forward pass (the second: the first may compile or allocate)."""
        batch = min(self.settings.batch_size, max(1, len(self.shares.of(self.settings.num_samples))))
        x = torch.zeros(batch, *self.shape, device=pipeline.device, dtype=pipeline.unet.dtype)
        t = torch.zeros(batch, dtype=torch.long, device=pipeline.device)
        for _ in range(2):
            start = time.perf_counter()
            with torch.no_grad():
                pipeline.unet(x, t).sample.sum().item()
            once = time.perf_counter() - start
        each = -(-self.settings.num_samples // self.accelerator.num_processes)
        seconds = once * steps * -(-each // self.settings.batch_size)
        if self.pictures is not None:
            start = time.perf_counter()
            self.pictures.network(eight_bit(x.float().cpu()))
            seconds += (time.perf_counter() - start) * -(-each // batch)
        biased = ", ".join(metric for metric in self.metrics if metric in BIASED)
        few = f"; warning: below {FEW:,} samples {biased} is biased upwards"
        few = few if biased and self.settings.num_samples < FEW else ""
        self.accelerator.print(
            f"evaluation: {self.settings.num_samples:,} samples of {steps} steps, about {duration(seconds)}{few}"
        )

    def _of_images(self, pipeline, steps: int) -> dict[str, float]:
        looks: list[Callable] = []
        if self.pictures is not None:
            looks.append(self.pictures.of_samples)
        if self.memorization is not None:
            # samples come as (B, H, W, C) in [0, 1]
            model_units = lambda images: torch.from_numpy(images).movedim(-1, 1) * 2 - 1  # noqa: E731
            looks.append(lambda images: self.memorization.copies(neighbour_vectors(model_units(images))))
        found = self.shares.collect(self._sample(pipeline, steps), *looks)
        values = {} if self.pictures is None else self.pictures.values(found[0], self.metrics)
        if self.memorization is not None:
            values.update(self.memorization.values(found[-1]))
        return values

    def _of_sequences(self, pipeline, steps: int) -> dict[str, float]:
        (samples,) = self.shares.collect(self._sample(pipeline, steps), tensor_of)
        rows = self.sequences.standardized(samples)
        values = self.sequences.values(rows)
        if self.memorization is not None:
            share = self.shares.of(len(rows))
            own = rows[share.start : share.stop]
            copies = self.shares.gather(self.memorization.copies(own) if len(own) else None)
            values.update(self.memorization.values(copies))
        return values

    def _held_out_losses(self, pipeline, scheduler) -> dict[str, float]:
        data = underlying(self.dataset)

        def encode(x0: Tensor) -> Tensor:
            return x0 if self.is_image else pipeline._encode(natural_units(x0, data), "the data")

        return self.held_out(pipeline, scheduler, self.metrics, encode, self.between)

    # -- telling -------------------------------------------------------------------------------

    def records(self, values: dict[str, float], pipeline, num_inference_steps: int, **more) -> list[dict]:
        """Return a record for each metric, with everything that its value depends on, as in `evaluation.json`."""
        scheduler = type(pipeline.scheduler).__name__
        if pipeline.is_spaced_by_log_snr():
            scheduler += " at log_snr_timesteps"
        settings = {
            "num_samples": self.settings.num_samples, "num_real": self.num_real, "shape": list(self.shape),
            "num_inference_steps": num_inference_steps, "scheduler": scheduler,
            "seed": self.settings.seed,
        }  # fmt: skip
        if self.pictures is not None:
            network = self.pictures.network
            settings |= {"feature_network": without_folders(network.name), "feature_digest": network.digest}
        if self.num_real < len(self.real):
            settings["num_left_out"] = len(self.real) - self.num_real
        own = {name: {"num_held_out": self.held_out.count} for name in values if "held_out" in name}
        if self.mirrored:
            own |= {name: {"mirrored": True} for name in values if "memorization" in name}
        return [
            {"metric": name, "value": value, **more, **settings, **own.get(name, {})} for name, value in values.items()
        ]

    def describe(self, values: dict[str, float]) -> str:
        """Return the values as aligned lines, each with the number of samples or items that it comes from."""
        width = max(map(len, values))
        samples, few = f"{self.settings.num_samples:,} samples", self.settings.num_samples < FEW
        lines = []
        for name, value in values.items():
            source = f"{self.held_out.count:,} held-out items" if "held_out" in name else samples
            source = f"{self.memorization.num_drawn:,} real items" if name == "memorization_real" else source
            warning = f" (biased: below {FEW:,})" if few and name in BIASED else ""
            lines.append(f"  {name:<{width}}  {value:<12.6g} from {source}{warning}")
        return "\n".join(lines)
