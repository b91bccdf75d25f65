"""The benchmark's part for loaders: images per second of ours and of denoising-diffusion-pytorch's alone."""

import itertools
import tempfile
import time
from pathlib import Path

from contenders import operations
from measures import alternate
from pictures import make_jpegs
from torch.utils.data import DataLoader

from ddpm_hf import UNet2D
from ddpm_hf.data.images import image_folder
from ddpm_hf.data.loading import StreamSampler, TrainingView, collate


def rate(loader: DataLoader, images: int) -> float:
    """Images per second of a loader, from the first batch on (workers have started by then)."""
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    for batch in itertools.islice(batches, images // loader_batch(loader)):
        seen += len(getattr(batch, "items", batch))
    return seen / (time.perf_counter() - start)


def loader_batch(loader: DataLoader) -> int:
    return loader.batch_size or loader.batch_sampler.batch_size


def benchmark_loader(options) -> list[dict]:
    """Ours as the trainer builds it, decoding and from its cache, and the peer's `Dataset` in a `DataLoader`; flips."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset as PeerDataset

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"writing {options.images:,} JPEGs", flush=True)
        make_jpegs(folder, options.images)
        for resolution, workers in itertools.product(options.resolutions, options.workers):
            shared = {"num_workers": workers}

            def ours(cache_gb: float, resolution=resolution, shared=shared) -> DataLoader:
                data = image_folder(str(folder), (resolution, resolution), random_flip=True, cache_gb=cache_gb)
                sampler = StreamSampler(len(data), options.batch_size, seed=0)
                return DataLoader(TrainingView(data, 0), batch_sampler=sampler, collate_fn=collate, **shared)

            def peer(resolution=resolution, shared=shared) -> DataLoader:
                data = PeerDataset(str(folder), resolution, augment_horizontal_flip=True)
                return DataLoader(data, options.batch_size, shuffle=True, **shared)

            cached = ours(cache_gb=4)
            for index in range(len(cached.dataset.dataset)):  # an epoch before
                cached.dataset.dataset.load(index)
            found = alternate(
                {
                    "ours": lambda ours=ours: rate(ours(0), options.images // 4),
                    "ours, cached": lambda cached=cached: rate(cached, options.images),
                    "peer": lambda peer=peer: rate(peer(), options.images // 4),
                },
                options.rounds,
            )
            row = {"resolution": resolution, "workers": workers, **{f"{k} images/s": v for k, v in found.items()}}
            row |= {"ratio": found["ours"] / found["peer"], "ratio, cached": found["ours, cached"] / found["peer"]}
            rows.append(row)
            print("  ".join(f"{k} {v:,.2f}" if "ratio" in k else f"{k} {v:,.0f}" for k, v in row.items()), flush=True)
    for row in [row for row in rows if row["workers"] == 1]:
        cost = 3 * operations(UNet2D, (1, 3, row["resolution"], row["resolution"]))
        per_core = row["ours images/s"]
        print(
            f"default model at {row['resolution']} pixels: {cost / 1e9:.1f} GFLOP an image and step; 8 workers "
            f"at {per_core:,.0f} images/s each feed a GPU that sustains {8 * per_core * cost / 1e12:,.0f} TFLOP/s"
        )
        row |= {"GFLOP an image": cost / 1e9, "TFLOP/s fed by 8 workers": 8 * per_core * cost / 1e12}
    return rows
