"""Pipelines whose samples are known, and evaluators of small data, for several files of tests."""

from types import SimpleNamespace

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


class KnownClasses(Known):
    """A pipeline whose sample number i of the model's class k is `samples[k, i]`; `names` are its classes, or None.

    Attributes:
        asked: the class that it was asked for, by the number of the sample.
        guidance: the guidance that it was asked for in the last call.
    """

    def __init__(self, samples, names):
        super().__init__(samples[0], None)
        self.by_class, self.asked, self.guidance = samples, {}, None
        classes = None if names is None else len(names)
        self.unet = UNet1D(sample_size=8, dim=8, dim_mults=[1], num_class_embeds=classes).eval()
        self.unet.forward = lambda x, t, class_labels=None: SimpleNamespace(sample=x)
        self.config = SimpleNamespace(id2label=names and dict(enumerate(names)))
        self.is_spaced_by_log_snr = lambda: False

    def __call__(self, batch_size, generator, class_labels, guidance_scale, guidance_interval, **_):
        seeds = generator_seeds(0, Stream.SAMPLES, range(len(self.samples)))
        numbers = [seeds.index(g.initial_seed()) for g in generator]
        self.asked |= dict(zip(numbers, class_labels))
        self.guidance = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
        return (self.by_class[class_labels, numbers],)


def evaluator(dataset, shape, held_out=None, accelerator=None, classes=None, **options):
    settings = EvalSettings(**{**PIXELS, **options})
    return Evaluator(accelerator or Accelerator(cpu=True), dataset, shape, settings, held_out, classes)


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
