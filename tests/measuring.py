"""Pipelines whose samples are known, and evaluators of small data, for several files of tests."""

import numpy as np
import torch
from accelerate import Accelerator

from ddpm_hf import GaussianScheduler, UNet1D
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.settings import EvalSettings
from ddpm_hf.randomness import Stream, generator_seeds

PIXELS = {"feature_network": "pixels", "batch_size": 50}


class Known:
    """A pipeline whose samples are known: for generator i, what `samples[i]` is (by the seeds that it is given)."""

    device = torch.device("cpu")
    scheduler = GaussianScheduler()

    def __init__(self, samples, shape):
        self.samples = samples
        self.unet = UNet1D(sample_size=8, dim=8, dim_mults=[1]).eval()
        self.unet.forward = lambda x, t: type("Out", (), {"sample": x})

    def __call__(self, batch_size, generator, **_):
        seeds = generator_seeds(0, Stream.SAMPLES, range(len(self.samples)))
        return (self.samples[[seeds.index(g.initial_seed()) for g in generator]],)


def evaluator(dataset, shape, held_out=None, accelerator=None, **options):
    settings = EvalSettings(**{**PIXELS, **options})
    return Evaluator(accelerator or Accelerator(cpu=True), dataset, shape, settings, held_out)


def measure(dataset, shape, samples, **options):
    e = evaluator(dataset, shape, num_samples=len(samples), **options)
    e.prepare()
    return e(Known(samples, shape), 5)


def grey(count, seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def images(sources, side=8, **options):
    return ImageDataset(sources, (side, side), 1, **options)


def as_samples(arrays):
    return arrays[..., None] / np.float32(255)


def rng_rows(count):
    return np.random.default_rng(3).normal(size=(count, 1, 8))
