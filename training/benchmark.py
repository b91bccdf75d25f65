"""Measure ddpm_hf against what people use now, side by side in one process: alternating, medians.

    python training/benchmark.py                               # everything
    python training/benchmark.py --only call step              # a model call, a training step
    python training/benchmark.py --only loader                 # images per second of the loaders alone
    python training/benchmark.py --only call step --check      # fail where a ratio is 15% worse than recorded

Prints a table and writes it to --output_dir as JSON. Needs the extra [bench].
"""

import argparse
import copy
import functools
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import UNet2D
from ddpm_hf.data import image_folder
from ddpm_hf.losses import diffusion_loss, training_draws
from ddpm_hf.scheduler import GaussianScheduler
from ddpm_hf.stream import StreamSampler, TrainingView, collate


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each contender returns, called in turn so that the machine's moods fall on all."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            found[name].append(run())
    return {name: statistics.median(values) for name, values in found.items()}


# -- the loader


def make_jpegs(folder: Path, count: int, side: int = 256) -> None:
    """Crops of scikit-learn's two photographs, about side x side, quality 90."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        image = photographs[number % 2]
        width, height = (int(side * rng.uniform(0.9, 1.3)) for _ in range(2))
        left, top = int(rng.integers(image.width - width)), int(rng.integers(image.height - height))
        image.crop((left, top, left + width, top + height)).save(folder / f"{number:05d}.jpg", quality=90)


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
        cost = training_flops(row["resolution"])
        per_core = row["ours images/s"]
        print(
            f"default model at {row['resolution']} pixels: {cost / 1e9:.1f} GFLOP an image and step; 8 workers "
            f"at {per_core:,.0f} images/s each feed a GPU that sustains {8 * per_core * cost / 1e12:,.0f} TFLOP/s"
        )
        row |= {"GFLOP an image": cost / 1e9, "TFLOP/s fed by 8 workers": 8 * per_core * cost / 1e12}
    return rows


def training_flops(resolution: int) -> float:
    """Floating-point operations of forward and backward pass of the default model, one image."""
    with torch.device("meta"):
        model = UNet2D(sample_size=resolution)
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, 3, resolution, resolution), torch.zeros(1, dtype=torch.long)).sample.sum().backward()
    return float(counter.get_total_flops())


# -- the model and a training step, against denoising-diffusion-pytorch with the same weights

# Ratios of speed to keep, measured on two CPU threads (README); --check allows 15% less.
RECORDED = {
    "call 4x3x64x64 float32": 1.52, "call 4x3x64x64 bfloat16": 2.94,
    "step 8x3x32x32 float32": 1.21, "step 8x3x32x32 bfloat16": 1.75,
    "step 4x3x64x64 float32": 1.16, "step 4x3x64x64 bfloat16": 1.80,
    "step 32x32x128 float32": 1.07, "step 32x32x128 bfloat16": 1.42,
    "step 4x32x4096 float32": 1.15, "step 4x32x4096 bfloat16": 2.01,
}  # fmt: skip


@functools.cache
def matrix_rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Operations per second of this machine in products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = alternate({"product": lambda: timed(lambda: a @ b, device)}, 9)["product"]
    return 2 * size**3 / seconds


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def same_models(shape: tuple, device: str) -> tuple:
    """The peer's U-Net (dim 64, multipliers 1-2-4-8) and ours, with the same weights."""
    from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D

    from ddpm_hf.convert import from_denoising_diffusion_pytorch

    torch.manual_seed(0)
    if len(shape) == 4:
        peer = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=shape[1])
        diffusion = GaussianDiffusion(peer, image_size=shape[-1])
    else:
        peer = Unet1D(dim=64, dim_mults=(1, 2, 4, 8), channels=shape[1])
        diffusion = GaussianDiffusion1D(peer, seq_length=shape[-1])
    ours = from_denoising_diffusion_pytorch(
        diffusion.state_dict(), seq_length=shape[-1] if len(shape) == 3 else None
    ).unet.train()
    return diffusion.to(device), ours.to(device).channels_last()


def benchmark_call(options) -> list[dict]:
    """One call of the model, batch 4 at 64 x 64."""
    shape, device = (4, 3, 64, 64), options.device
    diffusion, ours = same_models(shape, device)
    x, t = torch.randn(shape, device=device), torch.full((4,), 500, device=device)
    with torch.no_grad():
        expected = diffusion.model(x, t)
        rows, seconds = [], {}
        for dtype in options.dtype:
            kind = getattr(torch, dtype)
            model = copy.deepcopy(ours).to(kind)
            model.time_embed.float()
            error = (model(x.to(kind), t).sample.float() - expected).norm() / expected.norm()
            allowed = 1e-4 if kind == torch.float32 else 0.02
            if not error <= allowed:
                raise SystemExit(f"outputs differ by {error:.1e} of their norm in {dtype}, more than {allowed}")
            run = torch.compile(model) if options.compile else model
            seconds[dtype] = lambda run=run, kind=kind: timed(lambda: run(x.to(kind), t), device)
            rows.append({"what": f"call 4x3x64x64 {dtype}", "error": error.item(), "dtype": dtype})
        found = alternate({"peer": lambda: timed(lambda: diffusion.model(x, t), device), **seconds}, options.rounds)
    return report(rows, found, forward_flops(ours, shape, device), options)


def benchmark_step(options) -> list[dict]:
    """One training step: loss, gradient, clipping, AdamW, and the average of the weights at each side's default."""
    rows = []
    for shape in ((8, 3, 32, 32), (4, 3, 64, 64), (32, 32, 128), (4, 32, 4096)):
        diffusion, ours = same_models(shape, options.device)
        x = torch.rand(shape, device=options.device) * 2 - 1
        check_gradients(diffusion.model, ours, x)
        contenders = {"peer": peer_step(diffusion, (x + 1) / 2)}
        found_rows = []
        for dtype in options.dtype:
            contenders[dtype] = our_step(copy.deepcopy(ours), x, dtype, options)
            found_rows.append({"what": f"step {'x'.join(map(str, shape))} {dtype}", "dtype": dtype})
        clocks = {k: lambda v=v: timed(v, options.device) for k, v in contenders.items()}
        for clock in clocks.values():
            clock()  # optimizers make their state in the first step
        found = alternate(clocks, options.rounds)
        rows += report(found_rows, found, 3 * forward_flops(ours, shape, options.device), options)
    return rows


def check_gradients(peer, ours, x: torch.Tensor) -> None:
    """That the gradients of both have the same norm."""
    t = torch.full((len(x),), 500, device=x.device)
    norms = []
    for model in (lambda: peer(x, t), lambda: ours(x, t).sample):
        model().square().mean().backward()
    for model in (peer, ours):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        model.zero_grad()
    if abs(norms[0] - norms[1]) > 1e-4 * norms[0]:
        raise SystemExit(f"the norms of the gradients differ: {norms}")


def peer_step(diffusion, images: torch.Tensor) -> Callable[[], None]:
    from ema_pytorch import EMA

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)  # as its Trainer

    def step() -> None:
        diffusion(images).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return step


def our_step(model, x: torch.Tensor, dtype: str, options) -> Callable[[], None]:
    """As `Trainer._train_step`, without its data."""
    scheduler = GaussianScheduler(beta_schedule="sigmoid", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75, foreach=True)
    run = torch.compile(model) if options.compile else model

    def step() -> None:
        timesteps, noise = training_draws(scheduler, x, range(len(x)))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = diffusion_loss(run, scheduler, x, timesteps, noise).loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return step


def forward_flops(model, shape: tuple, device: str) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device))
    return float(counter.get_total_flops())


def report(rows: list[dict], found: dict[str, float], flops: float, options) -> list[dict]:
    """Rows with seconds, the ratio to the peer and the share of the machine's matrix rate; printed."""
    for row in rows:
        seconds = found[row["dtype"]]
        row |= {"peer s": found["peer"], "ours s": seconds, "ratio": found["peer"] / seconds}
        row["share of matrix rate"] = flops / seconds / matrix_rate(getattr(torch, row["dtype"]), options.device)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k != "dtype"))
    return rows


BENCHMARKS = {"call": benchmark_call, "step": benchmark_step, "loader": benchmark_loader}


def main(arguments: list) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=9, help="times that each contender is measured")
    parser.add_argument("--device", default="cpu", help="of the model's measurements: cpu or cuda")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="of the model's measurements on CPU")
    parser.add_argument("--compile", action="store_true", help="our model through torch.compile")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is 15%% worse than recorded")
    parser.add_argument("--images", type=int, default=10_000, help="JPEGs of the loader's measurement")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128], help="that the loader resizes to")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of the loader")
    parser.add_argument("--batch_size", type=int, default=64, help="of the loader")
    parser.add_argument("--output_dir", default="benchmark", help="where benchmark.json goes")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu on a machine without CUDA, got {options.device}")
    results = {}
    for name in options.only:
        torch.set_num_threads(1 if name == "loader" else options.threads)  # the loader's workers have the others
        results[name] = BENCHMARKS[name](options)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps({**machine, **results}, indent=1))
    print(f"results: {folder / 'benchmark.json'}")
    worse = [row for rows in results.values() for row in rows if row["ratio"] < 0.85 * RECORDED.get(row.get("what"), 0)]
    if options.check and worse:
        print("worse than recorded by more than 15%: " + ", ".join(row["what"] for row in worse), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
