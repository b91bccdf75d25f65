"""Data that stays on a device: its batches are those of the host, bit for bit."""

import numpy as np
import pytest
import torch
from helpers import OnDevice
from PIL import Image

from ddpm_hf import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.resident import LEAST_EPOCHS, resident_bytes
from ddpm_hf.data.scientific_images import ScientificImages
from ddpm_hf.data.sequences import SequenceDataset

GIB = 1 << 30
FOREVER = 10**9


def config(**options):
    return TrainConfig(**{"train_batch_size": 5, "gradient_accumulation_steps": 2, "seed": 3, **options})


def grey(**options):
    rng = np.random.default_rng(0)
    return ImageDataset([rng.integers(0, 256, (7, 9), np.uint8) for _ in range(23)], (6, 8), 1, **options)


def colour(**options):
    rng = np.random.default_rng(0)
    return ImageDataset([rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(23)], (8, 8), 3, **options)


def recordings(**options):
    return SequenceDataset(np.random.default_rng(1).normal(2, 3, (6, 3, 41)), length=8, stride=4, **options)


def recording(**options):
    return SequenceDataset(np.random.default_rng(1).normal(2, 3, (2, 700))[None], length=16, stride=4, **options)


def firsts(**options):
    """The first eight samples of sequences, in float32 and with a channel that never changes."""
    array = np.random.default_rng(2).normal(size=(25, 2, 30)).astype(np.float32)
    array[:, 1] = 7
    return SequenceDataset(array, norm="meanstd", length=8, stride=30, **options)


def with_gaps(**options):
    """Sequences with missing values, which are interpolated."""
    array = np.random.default_rng(3).normal(size=(6, 2, 41))
    array[1, 0, 3:17] = array[4, 1, -2:] = np.nan
    return SequenceDataset(array, length=8, stride=4, interpolate=True, **options)


def batches(feed, count, step=0, process=0, processes=1, resident=None):
    loader = iter(feed.loader(step, process, processes, {}, False, resident))
    return [next(loader) for _ in range(count)]


def equal(ours, theirs):
    assert ours.skipped == theirs.skipped and ours.error == theirs.error
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in ours.tensors().items():
        expected = theirs.tensors()[name]
        assert (tensor.dtype, tensor.stride()) == (expected.dtype, expected.stride())
        assert tensor.numpy().tobytes() == expected.numpy().tobytes(), name


def bands(**options):
    """Five channels in units of their own, which are resized and cropped."""
    values = np.random.default_rng(0).normal(300, 100, (23, 5, 9, 12))
    return ScientificImages(values, (8, 8), norm="meanstd", **options)


def eight_bit_bands(**options):
    return ScientificImages(np.random.default_rng(0).integers(0, 256, (23, 5, 8, 8), dtype=np.uint8), **options)


def compare(feed, steps=12):
    """Compare three epochs; two shares of the processes; and a start at step 7."""
    resident = feed.resident(torch.device("cpu"), GIB, FOREVER)
    assert resident.nbytes == resident_bytes(feed.dataset, feed.condition)
    for place in ({}, {"step": 7}, *({"step": 1, "process": p, "processes": 2} for p in range(2))):
        found = batches(feed, steps, resident=resident, **place)
        made = [batch if batch.error else resident.gather(batch) for batch in found]
        expected = batches(feed, steps, **place)
        for ours, theirs in zip(made, expected, strict=True):
            equal(ours, theirs)
    return expected


@pytest.mark.parametrize("holdout", [0, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("make", [grey, colour, bands, eight_bit_bands])
def test_images(make, flip, holdout):
    data = make(random_flip=flip, labels=np.arange(23) % 3)
    feed = open_data(config(holdout=holdout, class_labels="label"), data)
    assert len({tuple(batch.labels.tolist()) for batch in compare(feed)}) > 1


@pytest.mark.parametrize("holdout", [0, 7])
@pytest.mark.parametrize("make", [recordings, recording, firsts, with_gaps])
def test_sequences(make, holdout, monkeypatch):
    monkeypatch.setattr("ddpm_hf.data.resident.PART", 50)  # parts of sequences
    for batch in compare(open_data(config(holdout=holdout), make())):
        assert batch.items.isfinite().all()


def test_sequences_with_classes():
    compare(open_data(config(class_labels="y", holdout=8), recordings(labels=[0, 1, 2, 0, 1, 2])))


@pytest.mark.parametrize("kind", ["array", "images"])
def test_conditions(kind, tmp_path):
    """Pairs opened from files: windows of both, and both images mirrored together."""
    if kind == "array":
        rng = np.random.default_rng(0)
        data, y = rng.normal(size=(6, 2, 40)), rng.normal(size=(6, 1, 20))
        data[2, 1, 30:33] = y[5, 0, :4] = np.nan
        np.savez(tmp_path / "pairs.npz", data=data, y=y)
        options = {"sequence_length": 8, "stride": 4, "condition_column": "y", "on_missing": "interpolate"}
        feed = open_data(config(train_data_file=str(tmp_path / "pairs.npz"), holdout=9, **options))
    else:
        import datasets

        pictures = [Image.fromarray(source) for source in colour().sources]
        small = [picture.resize((4, 4)).convert("L") for picture in pictures]
        features = datasets.Features({"image": datasets.Image(), "small": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": pictures, "small": small}, features=features)
        table.to_parquet(tmp_path / "pairs.parquet")
        options = {"image_column": "image", "condition_column": "small", "resolution": [8], "random_flip": True}
        feed = open_data(config(train_data_dir=str(tmp_path), **options))
    compare(feed)
    assert feed.condition_shape == ((1, 4) if kind == "array" else (1, 4, 4))


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_images_that_cannot_be_read(on_bad):
    data = colour(random_flip=True, labels=np.arange(23) % 3)
    data.sources[11] = data.sources[4] = b"no image"
    feed = open_data(config(on_bad_image=on_bad, class_labels="label"), data)
    expected = compare(feed)
    assert any(batch.error if on_bad == "stop" else batch.skipped for batch in expected)


def test_images_are_decoded_by_workers_and_flips_drawn_by_them():
    data = colour(random_flip=True)
    data.sources[3] = b"no image"
    feed = open_data(config(on_bad_image="skip", dataloader_num_workers=2), data)
    compare(feed, steps=3)


def test_data_that_does_not_stay():
    def resident(dataset, most=GIB, draws=FOREVER, **options):
        return open_data(config(**options), dataset).resident(torch.device("cpu"), most, draws)

    class Own(ImageDataset):
        pass

    images = colour()
    assert resident(images, most=23 * 3 * 64) is not None
    assert resident(images, most=23 * 3 * 64 - 1) is None
    assert resident(images, draws=LEAST_EPOCHS * 23) is not None
    assert resident(images, draws=LEAST_EPOCHS * 23 - 1) is None
    assert resident(recordings(), draws=1) is not None  # nothing has to be decoded
    assert resident(colour(center_crop=False)) is None and resident(bands(center_crop=False)) is None
    assert resident(bands(), most=4 * 23 * 5 * 64) is not None
    assert (
        resident(bands(), most=4 * 23 * 5 * 64 - 1) is None and resident(bands(), draws=LEAST_EPOCHS * 23 - 1) is None
    )
    assert resident(Own(images.sources, (8, 8))) is None
    assert resident([torch.zeros(1, 8, 8)] * 20) is None
    pairs = [(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8))] * 20
    assert resident(pairs, condition_column="y") is None


@pytest.mark.parametrize("make", [colour, recordings])
def test_a_step_copies_a_few_numbers_for_each_item(make):
    """The meta device stands for a card: no tensor of the host takes part, and no number is read back."""
    feed = open_data(config(), make(random_flip=True) if make is colour else make())
    resident = feed.resident(torch.device("meta"), GIB, FOREVER)
    (numbers,) = batches(feed, 1, resident=resident)
    assert sum(tensor.nbytes for tensor in numbers.tensors().values()) == 5 * 8 * (2 if make is colour else 1)
    numbers = numbers.on(torch.device("meta"))
    with OnDevice("meta") as card:
        batch = resident.gather(numbers)
    assert batch.items.shape == (5, *feed.shape) and card.operations <= 5
