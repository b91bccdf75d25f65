"""Metrics of a pipeline against data, on all processes: FID, KID, sequence distances, memorization, held-out loss.

Every process samples, and looks at, its own share; what they found is put in the order of the samples' numbers, so the
result follows from (seed, number of samples) and not from the number of processes.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddpm_hf.data import ImageDataset, fingerprint
from ddpm_hf.features import FeatureNetwork
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.metrics import (
    Gaussian,
    autocorrelation_error,
    frechet_distance,
    log_power_spectrum,
    sliced_wasserstein,
    too_close,
)
from ddpm_hf.record import duration, without_folders
from ddpm_hf.seeding import Stream, derive_seed, generator_seeds
from ddpm_hf.stream import Part, TrainingView, collate, underlying

IMAGE_METRICS = ("fid", "kid", "memorization", "held_out_loss")
SEQUENCE_METRICS = ("frechet", "spectral_frechet", "sliced_wasserstein", "autocorrelation_error", "memorization",
                    "held_out_loss")  # fmt: skip
METRICS = tuple(dict.fromkeys(IMAGE_METRICS + SEQUENCE_METRICS))
BIASED = ("fid", "frechet", "spectral_frechet", "sliced_wasserstein")  # upwards, the more the fewer samples
FEW = 10_000  # samples below which that matters
KID_FEATURES = 10_000  # real features kept for KID, which compares subsets of 1,000
NEIGHBOUR_SIDE = 32  # pictures are compared with their neighbours at this size
BUCKETS = 10  # of timesteps, for the held-out loss


@dataclass
class EvalSettings:
    """What is measured, and with what.

    Args:
        metrics: of `IMAGE_METRICS` or `SEQUENCE_METRICS`; None: all that the data allows.
        num_samples: generated, seeds 0, 1, ... of the evaluation's own stream.
        num_real: real items compared with, at most; drawn by `seed` where there are more.
        feature_network, feature_resolution: of FID and KID, see `FeatureNetwork`.
        batch_size: samples generated at once, per process.
        cache_dir: where statistics of real pictures are kept; None: ddpm_hf/ in the Hugging Face cache.
    """

    metrics: Sequence[str] | None = None
    num_samples: int = 1000
    num_real: int = 50_000
    feature_network: str = "inception"
    feature_resolution: int = 299
    batch_size: int = 64
    seed: int = 0
    cache_dir: str | None = None
    workers: int = 0
    on_bad_image: str = "stop"


class Evaluator:
    """Measures pipelines against one set of data.

    Args:
        accelerator: of accelerate; its processes share the work.
        dataset: real items, map-style.
        shape: of one item, (C, *spatial).
        held_out: items that training does not see, for the held-out loss; None: without that.

    Raises:
        ValueError: a metric that is not one of this kind of data, or that lacks what it needs.
    """

    def __init__(self, accelerator, dataset, shape: tuple, settings: EvalSettings, held_out=None):
        self.accelerator, self.dataset, self.shape, self.settings = accelerator, dataset, tuple(shape), settings
        self.held_out = held_out
        self.is_image = len(shape) == 3
        possible = IMAGE_METRICS if self.is_image else SEQUENCE_METRICS
        self.metrics = list(settings.metrics or (m for m in possible if m != "held_out_loss" or held_out is not None))
        wrong = [metric for metric in self.metrics if metric not in possible]
        if wrong:
            kind = "images" if self.is_image else "sequences"
            raise ValueError(f"metrics of {kind} are {', '.join(possible)}; got {', '.join(wrong)}")
        if "held_out_loss" in self.metrics and held_out is None:
            raise ValueError("the metric held_out_loss needs items that training does not see: holdout of at least 1")
        if settings.num_samples < 2:
            raise ValueError(f"the number of samples must be at least 2, got {settings.num_samples}")
        if len(dataset) < 4:
            raise ValueError(f"evaluation needs at least 4 real items, the data has {len(dataset)}")
        count = min(len(dataset), settings.num_real)
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 0)).permutation(len(dataset))
        self.real = Part(dataset, np.sort(order[:count]))
        self.network = None
        if self._any("fid", "kid"):
            if shape[0] not in (1, 3, 4):
                raise ValueError(f"FID and KID need images of 1, 3 or 4 channels, the data has {shape[0]}")
            with accelerator.local_main_process_first():  # it may be downloaded once
                self.network = FeatureNetwork(settings.feature_network, settings.feature_resolution, accelerator.device)

    def _any(self, *metrics: str) -> bool:
        return any(metric in self.metrics for metric in metrics)

    # -- work shared by processes ----------------------------------------------------------------

    def _share(self, count: int) -> range:
        """This process' part of the numbers 0 ... count - 1."""
        size = -(-count // self.accelerator.num_processes)
        first = self.accelerator.process_index * size
        return range(min(count, first), min(count, first + size))

    def _gather(self, rows: Tensor, count: int) -> Tensor:
        """The rows of all processes' shares, in order, on every process."""
        if self.accelerator.num_processes == 1:
            return rows
        size = -(-count // self.accelerator.num_processes)
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(rows)] = rows
        return self.accelerator.gather(padded.to(self.accelerator.device)).cpu()[:count]

    def _items(self, dataset, numbers: range) -> Iterator[Tensor]:
        """Batches (B, C, *spatial) of a data set's items, without augmentation."""
        view = TrainingView(dataset, self.settings.seed, self.settings.on_bad_image, augment=False)
        loader = DataLoader(
            view, batch_size=self.settings.batch_size, sampler=[(0, n) for n in numbers], collate_fn=collate,
            num_workers=self.settings.workers, generator=torch.Generator(),
        )  # fmt: skip
        for batch in loader:
            if batch.error:
                raise ValueError(f"evaluation: {batch.error}")
            yield batch.x0

    def _collect(self, batches: Iterator, count: int, *looks: Callable[[Any], Tensor]) -> list[Tensor]:
        """What each of `looks` makes of this process' batches, gathered."""
        parts: list[list[Tensor]] = [[] for _ in looks]
        for batch in batches:
            for found, look in zip(parts, looks):
                found.append(look(batch))
        width = [torch.zeros(0) if not found else found[0][:0] for found in parts]
        if self.accelerator.num_processes > 1:  # a process without a share learns the shape from the first
            shapes = self.accelerator.gather_for_metrics([tuple(w.shape[1:]) for w in width], use_gather_object=True)
            width = [w if found else w.new_zeros(0, *shape) for w, found, shape in zip(width, parts, shapes)]
        return [self._gather(torch.cat([w, *found]), count) for w, found in zip(width, parts)]

    # -- real data -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What is known of the real data, once: read from the cache, or computed by all processes and kept there."""
        if self.is_image:
            if self.network is not None:
                self._prepare_features()
            if self._any("memorization"):
                (self.reference,) = self._collect(self._real(), len(self.real), self._neighbour_vectors)
        elif self._any(*SEQUENCE_METRICS[:5]):
            (natural,) = self._collect(self._real(), len(self.real), self._natural)
            self.mean = natural.mean(dim=(0, 2), keepdim=True)
            spread = natural.std(dim=(0, 2), keepdim=True)
            self.spread = torch.where(spread > 0, spread, 1.0)
            self.reference = ((natural - self.mean) / self.spread).flatten(1)
            values = self.reference.numpy()
            if self._any("frechet"):
                self.real_gaussian = Gaussian.fit(values)
            if self._any("spectral_frechet"):
                self.real_spectrum = Gaussian.fit(log_power_spectrum(values.reshape(-1, *self.shape)))
        if self._any("memorization"):
            # as many real items as samples say how near honest ones come
            numbers = torch.arange(min(len(self.reference), self.settings.num_samples))
            share = self._share(len(numbers))
            own = numbers[share.start : share.stop]
            close = too_close(self.reference[own], self.reference, own) if len(own) else torch.zeros(0)
            self.honest_rate = self._gather(close.double(), len(numbers)).mean().item()

    def _real(self) -> Iterator[Tensor]:
        return self._items(self.real, self._share(len(self.real)))

    def _natural(self, x: Tensor) -> Tensor:
        """Items of the data set in the data's own units, float64."""
        data, channels = underlying(self.dataset), self.shape[0]
        scale = torch.tensor(getattr(data, "data_scale", [1.0] * channels), dtype=torch.float64)
        shift = torch.tensor(getattr(data, "data_shift", [0.0] * channels), dtype=torch.float64)
        return x.double() * scale[:, None] + shift[:, None]

    def _neighbour_vectors(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> (B, D), averaged down to a side of at most 32."""
        size = [min(side, NEIGHBOUR_SIDE) for side in x.shape[2:]]
        return F.adaptive_avg_pool2d(x.float(), size).flatten(1)

    def _prepare_features(self) -> None:
        file, stored = self._cache_file(), None
        self.accelerator.wait_for_everyone()
        if file is not None and file.exists():
            try:
                with np.load(file) as arrays:
                    stored = {name: arrays[name] for name in ("mean", "root", "features")}
            except Exception as error:  # damaged: computed again
                self.accelerator.print(f"{file} cannot be read ({error}); computing it again")
        # all or none: the nodes of a cluster may each have their own cache
        have = torch.tensor([stored is not None], device=self.accelerator.device)
        if self.accelerator.gather(have).all():
            self.real_gaussian, self.real_features = Gaussian(stored["mean"], stored["root"]), stored["features"]
            return
        self.accelerator.print(
            f"features of {len(self.real):,} real pictures by {self.settings.feature_network}: computed once"
            + (f", kept in {file}" if file else "")
        )
        (features,) = self._collect(self._real(), len(self.real), lambda x: self.network(eight_bit(x)))
        self.real_gaussian = Gaussian.fit(features.numpy())
        chosen = np.random.default_rng(0).permutation(len(features))[:KID_FEATURES]
        self.real_features = features.numpy()[np.sort(chosen)]
        if file is not None and self.accelerator.is_local_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f"{file.stem}.{os.getpid()}.npz")
            np.savez(aside, mean=self.real_gaussian.mean, root=self.real_gaussian.root, features=self.real_features)
            os.replace(aside, file)
        self.accelerator.wait_for_everyone()

    def _cache_file(self) -> Path | None:
        """Named by what the statistics follow from; None for data that has no fingerprint of its own."""
        data = underlying(self.dataset)
        if not isinstance(data, ImageDataset):
            return None
        key = hashlib.sha256(repr(fingerprint(data, self.shape)).encode())
        key.update(repr(data.listing()).encode())
        key.update(self.real.indices.tobytes())
        if isinstance(self.dataset, Part):
            key.update(self.dataset.indices.tobytes())
        key.update(repr((self.network.digest, len(self.real))).encode())
        if self.settings.cache_dir is not None:
            folder = Path(self.settings.cache_dir)
        else:
            from huggingface_hub.constants import HF_HOME

            folder = Path(HF_HOME) / "ddpm_hf"
        return folder / f"{key.hexdigest()[:32]}.npz"

    # -- one evaluation --------------------------------------------------------------------------

    def __call__(self, pipeline, num_inference_steps: int, loss_scheduler=None) -> dict[str, float]:
        """Each metric's value; with memorization also `memorization_real`, the rate of real data, and with the held-out
        loss one value a bucket of timesteps, `held_out_loss_t0-99`, ....

        Args:
            pipeline: on the accelerator's device, its progress bar off.
            loss_scheduler: a `GaussianScheduler` for the held-out loss; None: the pipeline's.
        """
        values: dict[str, float] = {}
        if self._any(*(metric for metric in METRICS if metric != "held_out_loss")):
            self._announce(pipeline, num_inference_steps)
            values.update((self._of_images if self.is_image else self._of_sequences)(pipeline, num_inference_steps))
        if "held_out_loss" in self.metrics:
            values.update(self._held_out_loss(pipeline, loss_scheduler or pipeline.scheduler))
        if self.accelerator.num_processes > 1:  # one answer, whatever the rounding of each machine
            from accelerate.utils import broadcast_object_list

            values = broadcast_object_list([values])[0]
        return values

    def _sample(self, pipeline, steps: int, output_type: str = "np") -> Iterator[np.ndarray]:
        """This process' samples, in batches; sample number i has its own generator."""
        numbers = list(self._share(self.settings.num_samples))
        size = self.settings.batch_size
        starts = range(0, len(numbers), size)
        shown = self.accelerator.is_main_process
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not shown, leave=False):
            part = numbers[start : start + size]
            seeds = generator_seeds(self.settings.seed, Stream.SAMPLES, part)
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            yield pipeline(
                batch_size=len(part), generator=generators, num_inference_steps=steps, output_type=output_type,
                return_dict=False,
            )[0]  # fmt: skip

    def _announce(self, pipeline, steps: int) -> None:
        """Say how long sampling will take, from one forward pass (the second: the first may compile or allocate)."""
        batch = min(self.settings.batch_size, max(1, len(self._share(self.settings.num_samples))))
        x = torch.zeros(batch, *self.shape, device=pipeline.device, dtype=pipeline.unet.dtype)
        t = torch.zeros(batch, dtype=torch.long, device=pipeline.device)
        for _ in range(2):
            start = time.perf_counter()
            with torch.no_grad():
                pipeline.unet(x, t).sample.sum().item()
            once = time.perf_counter() - start
        each = -(-self.settings.num_samples // self.accelerator.num_processes)
        seconds = once * steps * -(-each // self.settings.batch_size)
        if self.network is not None:
            start = time.perf_counter()
            self.network(eight_bit(x.float().cpu()))
            seconds += (time.perf_counter() - start) * -(-each // batch)
        biased = ", ".join(metric for metric in self.metrics if metric in BIASED)
        few = f"; warning: below {FEW:,} samples {biased} is biased upwards" if self.settings.num_samples < FEW else ""
        self.accelerator.print(
            f"evaluation: {self.settings.num_samples:,} samples of {steps} steps, about {duration(seconds)}{few}"
        )

    def _of_images(self, pipeline, steps: int) -> dict[str, float]:
        from cleanfid.fid import kernel_distance

        count = self.settings.num_samples
        looks: list[Callable] = []
        if self.network is not None:
            looks.append(lambda images: self.network((images * 255).round().astype(np.uint8)))
        if self._any("memorization"):

            def copied(images: np.ndarray) -> Tensor:
                x = torch.from_numpy(images).movedim(-1, 1) * 2 - 1
                return too_close(self._neighbour_vectors(x), self.reference).double()

            looks.append(copied)
        found = self._collect(self._sample(pipeline, steps), count, *looks)
        values = {}
        if "fid" in self.metrics:
            values["fid"] = frechet_distance(self.real_gaussian, found[0].numpy())
        if "kid" in self.metrics:
            with numpy_seed(self.settings.seed):
                values["kid"] = kernel_distance(self.real_features.astype(np.float64), found[0].double().numpy())
        if "memorization" in self.metrics:
            values.update(memorization=found[-1].mean().item(), memorization_real=self.honest_rate)
        return values

    def _of_sequences(self, pipeline, steps: int) -> dict[str, float]:
        count = self.settings.num_samples
        (samples,) = self._collect(self._sample(pipeline, steps), count, lambda x: torch.from_numpy(x).double())
        x = ((samples - self.mean) / self.spread).numpy()
        real = self.reference.numpy()
        flat, values = x.reshape(len(x), -1), {}
        if "frechet" in self.metrics:
            values["frechet"] = frechet_distance(self.real_gaussian, flat)
        if "spectral_frechet" in self.metrics:
            values["spectral_frechet"] = frechet_distance(self.real_spectrum, log_power_spectrum(x))
        if "sliced_wasserstein" in self.metrics:
            values["sliced_wasserstein"] = sliced_wasserstein(flat, real, seed=self.settings.seed)
        if "autocorrelation_error" in self.metrics:
            values["autocorrelation_error"] = autocorrelation_error(x, real.reshape(-1, *self.shape))
        if "memorization" in self.metrics:
            share = self._share(count)
            own = torch.from_numpy(flat[share.start : share.stop])
            close = too_close(own, self.reference).double() if len(own) else torch.zeros(0, dtype=torch.float64)
            values.update(memorization=self._gather(close, count).mean().item(), memorization_real=self.honest_rate)
        return values

    @torch.no_grad()
    def _held_out_loss(self, pipeline, scheduler) -> dict[str, float]:
        """The training loss without weighting of SNR on every held-out item, at one timestep of each bucket; timesteps
        and noise follow from (seed, item, bucket)."""
        steps = scheduler.config.num_train_timesteps
        edges = np.linspace(0, steps, min(BUCKETS, steps) + 1).astype(int)

        def losses(numbers: range) -> Iterator[Tensor]:
            first = numbers.start
            for x in self._items(self.held_out, numbers):
                x0 = x if self.is_image else pipeline._encode(self._natural(x), "the data")
                x0 = x0.to(pipeline.device, torch.float32)
                columns = []
                for bucket, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
                    draws = [
                        np.random.default_rng(derive_seed(self.settings.seed, Stream.EVALUATION, 1, first + i, bucket))
                        for i in range(len(x0))
                    ]
                    t = torch.tensor([int(draw.integers(low, high)) for draw in draws], device=x0.device)
                    noise = np.stack([draw.standard_normal(x0.shape[1:], dtype=np.float32) for draw in draws])
                    noise = torch.from_numpy(noise).to(x0.device)
                    columns.append(diffusion_loss(pipeline.unet, scheduler, x0, t, noise).loss.double().cpu())
                first += len(x0)
                yield torch.stack(columns, dim=1)

        count = len(self.held_out)
        (found,) = self._collect(losses(self._share(count)), count, lambda x: x)
        means = found.mean(dim=0).tolist()
        names = [f"held_out_loss_t{low}-{high - 1}" for low, high in zip(edges[:-1], edges[1:])]
        return {"held_out_loss": float(np.mean(means)), **dict(zip(names, means))}

    def records(self, values: dict[str, float], pipeline, num_inference_steps: int, **more) -> list[dict]:
        """One record a metric, with all that its value depends on: what `evaluation.json` holds."""
        scheduler = type(pipeline.scheduler).__name__
        if pipeline.is_spaced_by_log_snr():
            scheduler += " at log_snr_timesteps"
        settings = {
            "num_samples": self.settings.num_samples, "num_real": len(self.real), "shape": list(self.shape),
            "num_inference_steps": num_inference_steps, "scheduler": scheduler,
            "seed": self.settings.seed,
        }  # fmt: skip
        if self.network is not None:
            settings |= {"feature_network": without_folders(self.network.name), "feature_digest": self.network.digest}
        held_out = {"num_held_out": len(self.held_out)} if self.held_out is not None else {}
        return [
            {"metric": name, "value": value, **more, **settings, **(held_out if "held_out" in name else {})}
            for name, value in values.items()
        ]

    def describe(self, values: dict[str, float]) -> str:
        """The values as aligned lines, each with the number of samples that it is from."""
        width = max(map(len, values))
        samples, few = f"{self.settings.num_samples:,} samples", self.settings.num_samples < FEW
        lines = []
        for name, value in values.items():
            source = f"{len(self.held_out or ()):,} held-out items" if "held_out" in name else samples
            warning = f" (biased: below {FEW:,})" if few and name in BIASED else ""
            lines.append(f"  {name:<{width}}  {value:<12.6g} from {source}{warning}")
        return "\n".join(lines)


def eight_bit(x: Tensor) -> np.ndarray:
    """Pictures (B, C, H, W) in [-1, 1] -> 8 bits (B, H, W, C)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()


@contextlib.contextmanager
def numpy_seed(seed: int):
    """NumPy's global generator seeded for the time being: clean-fid draws from it."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
