"""Small runs, pictures, tables and pipelines that several files of tests make."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, TrainConfig, UNet1D, UNet2D, train
from ddpm_hf.trainer.loop import Trainer

# Options of a run of seconds.
SMALL = {
    "dim": 8, "dim_mults": [1, 2], "attn_heads": [2], "attn_dim_head": [4], "train_batch_size": 8,
    "report_to": ["none"], "num_cpu_threads": 1,
    "lr_scheduler": "constant", "ddpm_num_inference_steps": 3, "num_samples": 4, "logging_steps": 1,
}  # fmt: skip


# Tests whose tensors are on a card that does not exist.
without_a_driver = pytest.mark.skipif(
    torch.__version__ < (2, 11) and not torch.cuda.is_available(),
    reason="PyTorch 2.6 and 2.8 ask the driver of a card also for fake tensors; 2.11 does not",
)


def config(folder, **options):
    return TrainConfig(**{"dataset_name": "digits", "output_dir": str(folder), **SMALL, **options})


def train_until(step, monkeypatch, options):
    """Train as the options say, and be interrupted when `step` steps are done."""
    train_step = Trainer._train_step

    def stop(self, batches):
        if self.progress.step == step:
            raise KeyboardInterrupt
        return train_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", stop)
        train(options)


def weights(folder):
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    """Every file that a run leaves and that is to be the same bit for bit, by name."""
    files = ["metrics.jsonl", "pipeline/unet/diffusion_pytorch_model.safetensors"]
    newest = max((folder / "checkpoints").iterdir())
    kept = ("model.safetensors", "ema.safetensors", "optimizer.bin", "progress.json")
    files += [str((newest / name).relative_to(folder)) for name in kept]
    timed = ("README.md", "training.json")  # they say how long it took
    best = [path for path in (folder / "best").rglob("*") if path.is_file() and path.name not in timed]
    files += [str(path.relative_to(folder)) for path in best]
    files += [f"samples/{path.name}" for path in (folder / "samples").glob("*")]
    return {name: (folder / name).read_bytes() for name in files}


# Options of a run whose card is read.
CARD_RUN = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 4, "report_to": "none", "num_samples": 4,
         "ddpm_num_inference_steps": 3, "logging_steps": 1, "max_train_steps": 4, "train_batch_size": 4,
         "num_cpu_threads": 1}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Pictures and tables


PICTURES = [Image.fromarray(np.full((6, 6, 3), 40 * i, np.uint8)) for i in range(6)]


# the number of a picture in its darkest pixel; brighter to the right
STREAMED = [Image.fromarray((10 * i + np.zeros((8, 8, 3)) + np.arange(8)[:, None]).astype(np.uint8)) for i in range(22)]


def table(pictures=PICTURES, column="image", **more):
    features = {column: datasets.Image(), **{name: datasets.Value("int64") for name in more}}
    return datasets.Dataset.from_dict({column: pictures, **more}, features=datasets.Features(features))


def save_tars(folder, pictures=PICTURES, per_tar=3):
    folder.mkdir()
    for first in range(0, len(pictures), per_tar):
        with tarfile.open(folder / f"{first:04d}.tar", "w") as tar:
            for number, picture in enumerate(pictures[first : first + per_tar], start=first):
                data = io.BytesIO()
                picture.save(data, "PNG")
                info = tarfile.TarInfo(f"{number:04d}.png")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)


def gradient(height=6, width=10):
    """8-bit RGB whose red grows to the right and green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 20, y * 30, np.full_like(x, 9)), -1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Pipelines

MODEL = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 4}


def make(kind):
    torch.manual_seed(0)
    if kind == "images":
        return DDPMPipeline(UNet2D(sample_size=8, in_channels=1, **MODEL), GaussianScheduler(), num_inference_steps=3)
    unet = UNet1D(sample_size=16, in_channels=2, **MODEL)
    return DDPMPipeline1D(unet, GaussianScheduler(), 3, data_shift=[1.0, 2.0], data_scale=[3.0, 4.0])


def paired(kind, own_units=False):
    """A pipeline that is given a condition: 3 x 4 x 4 for images, or 2 x 8 in units of its own for sequences."""
    torch.manual_seed(0)
    if kind == "images":
        unet = UNet2D(sample_size=8, in_channels=1, condition_channels=3, **MODEL)
        units = {"condition_shift": [1, 2, 3], "condition_scale": [2, 2, 2]} if own_units else {}
        return DDPMPipeline(unet, GaussianScheduler(), 3, condition="paired", condition_size=[4, 4], **units)
    unet = UNet1D(sample_size=16, in_channels=1, condition_channels=2, **MODEL)
    return DDPMPipeline1D(
        unet, GaussianScheduler(), 3, condition="paired", condition_size=[8], condition_shift=[5, 0],
        condition_scale=[2, 1],
    )  # fmt: skip


def frechet_by_eigenvalues(mean_1, covariance_1, mean_2, covariance_2):
    """Return the Fréchet distance of two Gaussians in float64.

    The trace of (C1 C2)^(1/2) in its formula is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2).
    """
    values, vectors = np.linalg.eigh(covariance_1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ covariance_2 @ root).clip(0))
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1) + np.trace(covariance_2) - 2 * roots.sum()


# ---------------------------------------------------------------------------------------------
# Devices


class OnDevice(TorchDispatchMode):
    """Counts the operations that compute, and refuses those in which a tensor of another device takes part.

    The meta device stands in for a graphics card: it also raises where the host reads a number.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.operations = torch.device(device), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                assert x.device.type == self.device.type, f"{func} has a tensor of {x.device}"
        self.operations += not func.is_view
        return out
