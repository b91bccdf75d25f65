"""Metrics of a pipeline against data, on all processes: FID, KID, sequence distances, memorization, held-out loss.

Every process samples, and looks at, its own share; what they found is put in the order of the samples' numbers, so the
result follows from (seed, number of samples) and not from the number of processes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.data.checking import check_shared_memory, worker_memory
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Part, underlying
from ddpm_hf.evaluation import feature_cache
from ddpm_hf.evaluation.features import FeatureNetwork
from ddpm_hf.evaluation.metrics import (
    Gaussian,
    autocorrelation_error,
    distinct,
    frechet_distance,
    log_power_spectrum,
    sliced_wasserstein,
    too_close,
)
from ddpm_hf.evaluation.shares import Items, Shares
from ddpm_hf.losses import diffusion_loss
from ddpm_hf.randomness import Stream, derive_seed, generator_seeds
from ddpm_hf.run.record import duration, without_folders

HELD_OUT = ("held_out_loss", "held_out_weighted_loss")
IMAGE_METRICS = ("fid", "kid", "memorization", *HELD_OUT)
SEQUENCE_METRICS = ("frechet", "spectral_frechet", "sliced_wasserstein", "autocorrelation_error", "memorization",
                    *HELD_OUT)  # fmt: skip
METRICS = tuple(dict.fromkeys(IMAGE_METRICS + SEQUENCE_METRICS))
BIASED = ("fid", "frechet", "spectral_frechet", "sliced_wasserstein")  # upwards, the more the fewer samples
FEW = 10_000  # samples below which that matters
KID_FEATURES = 10_000  # real features kept for KID, which compares subsets of 1,000
NEIGHBOUR_SIDE = 32  # pictures are compared with their neighbours at this size
BUCKETS = 10  # of timesteps, for the held-out loss


@dataclass
class EvalSettings:
    """Settings of an evaluation: metrics, numbers of samples and of real items, features, seeds.

    Args:
        metrics: of `IMAGE_METRICS` or `SEQUENCE_METRICS`; None: all that the data allows.
        num_samples: generated, seeds 0, 1, ... of the evaluation's own stream.
        num_real: real items compared with, at most; drawn by `seed` where there are more.
        feature_network, feature_resolution: of FID and KID, see `FeatureNetwork`.
        batch_size: samples generated at once, per process.
        cache_dir: where statistics of real pictures are kept; None: ddpm_hf/ in the Hugging Face cache.
        on_bad_image: "stop", or "skip": a picture that cannot be read counts nowhere, and is reported.
        random_flip: training mirrors pictures, also where the data set does not say so. For memorization a picture and
            its mirror image are then one item, so a mirrored copy is a copy.
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
    random_flip: bool = False


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
        self.shares = Shares(accelerator)
        self.is_image = len(shape) == 3
        self.mirrored = self.is_image and (settings.random_flip or getattr(underlying(dataset), "random_flip", False))
        possible = IMAGE_METRICS if self.is_image else SEQUENCE_METRICS
        self.metrics = list(settings.metrics or (m for m in possible if m not in HELD_OUT or held_out is not None))
        wrong = [metric for metric in self.metrics if metric not in possible]
        if wrong:
            kind = "images" if self.is_image else "sequences"
            raise ValueError(f"metrics of {kind} are {', '.join(possible)}; got {', '.join(wrong)}")
        if self._any(*HELD_OUT) and held_out is None:
            named = next(metric for metric in self.metrics if metric in HELD_OUT)
            raise ValueError(f"the metric {named} needs items that training does not see: holdout of at least 1")
        least = {"num_samples": 2, "num_real": 2, "batch_size": 1, "workers": 0, "seed": 0}
        for name, value in least.items():
            if getattr(settings, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(settings, name)}")
        if settings.on_bad_image not in ("stop", "skip"):
            raise ValueError(f"on_bad_image must be 'stop' or 'skip', got {settings.on_bad_image!r}")
        item_size = 1 if isinstance(underlying(dataset), ImageDataset) else 4
        self.shared_memory = worker_memory(settings.workers, settings.batch_size, shape, item_size)
        check_shared_memory(self.shared_memory, settings.workers)
        if len(dataset) < 4:
            raise ValueError(f"evaluation needs at least 4 real items, the data has {len(dataset)}")
        count = min(len(dataset), settings.num_real)
        order = np.random.default_rng(derive_seed(settings.seed, Stream.EVALUATION, 0)).permutation(len(dataset))
        self.real = Part(dataset, np.sort(order[:count]))
        self.items = Items(self.real, settings.on_bad_image, settings.batch_size, settings.workers)
        self.num_real, self.num_held_out = count, len(held_out or ())  # those that can be read, once they were
        self.network = None
        if self._any("fid", "kid"):
            if shape[0] not in (1, 3, 4):
                raise ValueError(f"FID and KID need images of 1, 3 or 4 channels, the data has {shape[0]}")
            with accelerator.local_main_process_first():  # it may be downloaded once
                self.network = FeatureNetwork(settings.feature_network, settings.feature_resolution, accelerator.device)

    def _any(self, *metrics: str) -> bool:
        return any(metric in self.metrics for metric in metrics)

    # -- real data -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Get the statistics of the real data once, from the cache or from all processes, and keep them there.

        Raises:
            ValueError: items that cannot be read, or too few that can.
        """
        if self.is_image:
            self._prepare_pictures()
        elif self._any(*SEQUENCE_METRICS[:5]):
            self._prepare_sequences()
        if self._any("memorization"):
            self._prepare_memorization()

    def _prepare_sequences(self) -> None:
        (natural,) = self.shares.collect(self._real(), self._natural)
        self.mean = natural.mean(dim=(0, 2), keepdim=True)
        spread = natural.std(dim=(0, 2), keepdim=True)
        self.spread = torch.where(spread > 0, spread, 1.0)
        self.reference = ((natural - self.mean) / self.spread).flatten(1)
        values = self.reference.numpy()
        if self._any("frechet"):
            self.real_gaussian = Gaussian.fit(values)
        if self._any("spectral_frechet"):
            self.real_spectrum = Gaussian.fit(log_power_spectrum(values.reshape(-1, *self.shape)))

    def _prepare_memorization(self) -> None:
        """Equal items count once; as many of them as samples, drawn by the seed, say how near honest ones come."""
        self.known = self.reference[distinct(self.reference, self._mirror())]
        if len(self.known) < 3:
            raise ValueError(
                f"the metric memorization needs at least 3 different real items, the data has {len(self.known)}: "
                "name the other metrics"
            )
        order = np.random.default_rng(derive_seed(self.settings.seed, Stream.EVALUATION, 2)).permutation(
            len(self.known)
        )
        own = torch.from_numpy(order[: self.settings.num_samples])
        self.num_drawn = len(own)
        share = self.shares.of(len(own))
        own = own[share.start : share.stop]
        self.honest_rate = self._rate(self.known[own], own)

    def _rate(self, queries: Tensor, own: Tensor | None = None) -> float:
        """Share of `queries`, this process' part of them, that are too close to an item; over all processes."""
        close = too_close(queries, self.known, own, self._mirror()).double() if len(queries) else None
        return self.shares.gather(close).mean().item()

    def _mirror(self) -> Callable[[Tensor], Tensor] | None:
        """Mirrors neighbour vectors, where training mirrors pictures; else None."""
        if not self.mirrored:
            return None
        shape = (self.shape[0], *self._neighbour_size(self.shape[1:]))
        return lambda vectors: vectors.unflatten(1, shape).flip(-1).flatten(1)

    def _real(self) -> Iterator[Tensor]:
        return (batch.x0 for batch in self.items.read(self.shares.of(len(self.real))))

    def _natural(self, x: Tensor) -> Tensor:
        """Items of the data set in the data's own units, float64."""
        data, channels = underlying(self.dataset), self.shape[0]
        scale = torch.tensor(getattr(data, "data_scale", [1.0] * channels), dtype=torch.float64)
        shift = torch.tensor(getattr(data, "data_shift", [0.0] * channels), dtype=torch.float64)
        return x.double() * scale[:, None] + shift[:, None]

    def _neighbour_size(self, size: tuple) -> list[int]:
        return [min(side, NEIGHBOUR_SIDE) for side in size]

    def _neighbour_vectors(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> (B, D), averaged down to a side of at most 32.

        On a grid of 2^-20 all sums are exact in float64, so the vector of a mirrored picture is the mirrored vector.
        """
        grid = (x.double() * 2**20).round()
        return (F.adaptive_avg_pool2d(grid, self._neighbour_size(x.shape[2:])) / 2**20).float().flatten(1)

    def _prepare_pictures(self) -> None:
        """Statistics of features, and the vectors among which neighbours are looked for."""
        file, stored, looks = None, None, []
        if self.network is not None:
            file = self._cache_file()
            stored = self._stored(file)
            if stored is None:
                self.accelerator.print(
                    f"features of {len(self.real):,} real pictures by {self.settings.feature_network}: computed once"
                    + (f", kept in {file}" if file else "")
                )
                looks.append(lambda x: self.network(eight_bit(x)))
        if self._any("memorization"):
            looks.append(self._neighbour_vectors)
        found = self.shares.collect(self._real(), *looks) if looks else []
        bad = self.shares.gather_objects(self.items.bad) if looks else stored["bad"].tolist() if stored else []
        self._left_out(bad)
        if self._any("memorization"):
            self.reference = found[-1]
        if stored is not None:
            self.real_gaussian, self.real_features = Gaussian(stored["mean"], stored["root"]), stored["features"]
        elif self.network is not None:
            features = found[0].numpy()
            self.real_gaussian = Gaussian.fit(features)
            chosen = np.random.default_rng(0).permutation(len(features))[:KID_FEATURES]
            self.real_features = features[np.sort(chosen)]
            if file is not None and self.accelerator.is_local_main_process:
                arrays = dict(
                    zip(("mean", "root"), self.real_gaussian), features=self.real_features, bad=np.array(bad, str)
                )
                feature_cache.save(file, arrays, print)
            self.accelerator.wait_for_everyone()

    def _left_out(self, bad: list[str]) -> None:
        """Count and name the real pictures that cannot be read."""
        self.num_real = len(self.real) - len(bad)
        if bad and self.num_real < 4:
            raise ValueError(f"evaluation needs at least 4 real items that can be read, the data has {self.num_real}")
        if bad:
            names = "".join(f"\n  {message}" for message in bad[:3]) + ("\n  ..." if len(bad) > 3 else "")
            self.accelerator.print(f"evaluation: left out {len(bad):,} of {len(self.real):,} real pictures:{names}")

    def _stored(self, file: Path | None) -> dict | None:
        """Read the cache on all nodes: each node of a cluster may have its own."""
        self.accelerator.wait_for_everyone()
        stored = None if file is None else feature_cache.load(file, self.accelerator.print)
        return stored if all(self.shares.gather_objects([stored is not None])) else None

    def _cache_file(self) -> Path | None:
        """Named by what the statistics follow from; None for data whose content cannot be told."""
        digests = feature_cache.content_digests(self.real, self.shares.of(len(self.real)))
        if not all(self.shares.gather_objects([digests is not None])):
            return None
        digests = self.shares.gather(digests)
        if self.settings.cache_dir is not None:
            folder = Path(self.settings.cache_dir)
        else:
            from huggingface_hub.constants import HF_HOME

            folder = Path(HF_HOME) / "ddpm_hf"
        more = (self.network.digest, self.settings.on_bad_image)
        return folder / feature_cache.file_name(underlying(self.dataset), self.shape, digests, *more)

    # -- one evaluation --------------------------------------------------------------------------

    def __call__(self, pipeline, num_inference_steps: int, loss_scheduler=None) -> dict[str, float]:
        """Each metric's value; with memorization also `memorization_real`, the rate of real data, and with the held-out
        loss one value a bucket of timesteps, `held_out_loss_t0-99`, ....

        Args:
            pipeline: on the accelerator's device, its progress bar off.
            loss_scheduler: a `GaussianScheduler` for the held-out loss; None: the pipeline's.
        """
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
        """This process' samples, in batches; sample number i has its own generator."""
        numbers = list(self.shares.of(self.settings.num_samples))
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
        if self.network is not None:
            start = time.perf_counter()
            self.network(eight_bit(x.float().cpu()))
            seconds += (time.perf_counter() - start) * -(-each // batch)
        biased = ", ".join(metric for metric in self.metrics if metric in BIASED)
        few = f"; warning: below {FEW:,} samples {biased} is biased upwards"
        few = few if biased and self.settings.num_samples < FEW else ""
        self.accelerator.print(
            f"evaluation: {self.settings.num_samples:,} samples of {steps} steps, about {duration(seconds)}{few}"
        )

    def _of_images(self, pipeline, steps: int) -> dict[str, float]:
        from cleanfid.fid import kernel_distance

        looks: list[Callable] = []
        if self.network is not None:
            looks.append(lambda images: self.network((images * 255).round().astype(np.uint8)))
        if self._any("memorization"):

            def copied(images: np.ndarray) -> Tensor:
                x = torch.from_numpy(images).movedim(-1, 1) * 2 - 1
                return too_close(self._neighbour_vectors(x), self.known, mirror=self._mirror()).double()

            looks.append(copied)
        found = self.shares.collect(self._sample(pipeline, steps), *looks)
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
        (samples,) = self.shares.collect(self._sample(pipeline, steps), lambda x: torch.from_numpy(x).double())
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
            share = self.shares.of(len(flat))
            rate = self._rate(torch.from_numpy(flat[share.start : share.stop]))
            values.update(memorization=rate, memorization_real=self.honest_rate)
        return values

    @torch.no_grad()
    def _held_out_losses(self, pipeline, scheduler) -> dict[str, float]:
        """Mean squared error of the model's output on every held-out item, at one timestep of each bucket, plain and
        weighted by SNR; timesteps and noise follow from (seed, item, bucket)."""
        steps = scheduler.config.num_train_timesteps
        edges = np.linspace(0, steps, min(BUCKETS, steps) + 1).astype(int)
        items = Items(self.held_out, self.settings.on_bad_image, self.settings.batch_size, self.settings.workers)

        def losses(numbers: range) -> Iterator[Tensor]:
            for batch in items.read(numbers):
                x0 = batch.x0 if self.is_image else pipeline._encode(self._natural(batch.x0), "the data")
                x0 = x0.to(pipeline.device, torch.float32)
                columns = []
                for bucket, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
                    seeds = [derive_seed(self.settings.seed, Stream.EVALUATION, 1, n, bucket) for n in batch.numbers]
                    draws = [np.random.default_rng(seed) for seed in seeds]
                    t = torch.tensor([int(draw.integers(low, high)) for draw in draws], device=x0.device)
                    noise = np.stack([draw.standard_normal(x0.shape[1:], dtype=np.float32) for draw in draws])
                    noise = torch.from_numpy(noise).to(x0.device)
                    plain = diffusion_loss(pipeline.unet, scheduler, x0, t, noise, weighting="uniform").loss.double()
                    columns.append(torch.stack((plain, plain * scheduler.loss_weights(t).to(plain))).cpu())
                yield torch.stack(columns, dim=2).movedim(1, 0)  # (B, 2, buckets)

        (found,) = self.shares.collect(losses(self.shares.of(len(self.held_out))), lambda x: x)
        self.num_held_out = len(found)
        plain, weighted = found.mean(dim=0)
        values = {}
        if "held_out_loss" in self.metrics:
            values["held_out_loss"] = plain.mean().item()
            names = [f"held_out_loss_t{low}-{high - 1}" for low, high in zip(edges[:-1], edges[1:])]
            values.update(zip(names, plain.tolist()))
        if "held_out_weighted_loss" in self.metrics:
            values["held_out_weighted_loss"] = weighted.mean().item()
        return values

    def records(self, values: dict[str, float], pipeline, num_inference_steps: int, **more) -> list[dict]:
        """One record a metric, with all that its value depends on: what `evaluation.json` holds."""
        scheduler = type(pipeline.scheduler).__name__
        if pipeline.is_spaced_by_log_snr():
            scheduler += " at log_snr_timesteps"
        settings = {
            "num_samples": self.settings.num_samples, "num_real": self.num_real, "shape": list(self.shape),
            "num_inference_steps": num_inference_steps, "scheduler": scheduler,
            "seed": self.settings.seed,
        }  # fmt: skip
        if self.network is not None:
            settings |= {"feature_network": without_folders(self.network.name), "feature_digest": self.network.digest}
        if self.num_real < len(self.real):
            settings["num_left_out"] = len(self.real) - self.num_real
        own = {name: {"num_held_out": self.num_held_out} for name in values if "held_out" in name}
        if self.mirrored:
            own |= {name: {"mirrored": True} for name in values if "memorization" in name}
        return [
            {"metric": name, "value": value, **more, **settings, **own.get(name, {})} for name, value in values.items()
        ]

    def describe(self, values: dict[str, float]) -> str:
        """The values as aligned lines, each with the number of samples that it is from."""
        width = max(map(len, values))
        samples, few = f"{self.settings.num_samples:,} samples", self.settings.num_samples < FEW
        lines = []
        for name, value in values.items():
            source = f"{self.num_held_out:,} held-out items" if "held_out" in name else samples
            source = f"{self.num_drawn:,} real items" if name == "memorization_real" else source
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
