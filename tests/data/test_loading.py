"""The order of the training stream, items of any data set, what is held out."""

import itertools

import numpy as np
import pytest
import torch
from helpers import gradient
from PIL import Image

from ddpm_hf.data import loading
from ddpm_hf.data.given import GivenUnits
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Item, Part, StreamSampler, TrainingView, as_tensor, collate, hold_out, load_item
from ddpm_hf.randomness import Stream


def test_augmentation_follows_from_seed_epoch_and_index():
    data = ImageDataset([gradient()] * 4, (6, 6), center_crop=False, random_flip=True)
    view = TrainingView(data, seed=3)
    first = {key: view[key].x for key in itertools.product(range(6), range(4))}
    again = TrainingView(data, seed=3)
    assert all(torch.equal(again[key].x, x) for key, x in first.items())
    assert len({x.numpy().tobytes() for x in first.values()}) > 8  # 5 places, mirrored or not
    assert torch.equal(data[0], data[1])  # not augmented


def test_generators_are_made_where_something_is_drawn(monkeypatch):
    """A seed and a generator take longer than a cached item, so an item without augmentation has neither."""
    made = []
    monkeypatch.setattr(loading, "derive_seed", lambda *place: made.append(place[1]) or 0)
    for options in ({}, {"random_flip": True}, {"center_crop": False}):
        made.clear()
        view = TrainingView(Part(ImageDataset([gradient()] * 4, (6, 6), **options), [0, 2]), seed=3)
        assert torch.equal(view[0, 1].x, view[0, 0].x) or options
        assert made == [Stream.AUGMENTATION] * 2 * bool(options)


def test_items_of_other_datasets():
    x = torch.zeros(1, 4, 4)
    for item in (x, x.numpy(), (x, 3), {"image": x}, {"pixel_values": x, "label": 1}, Image.new("L", (4, 4), 0)):
        assert as_tensor(item).shape == (1, 4, 4)
    wrongs = [(x + 2, "2 to 2"), (x.int(), "int32"), ("text", "str"), ({"a": 1}, "got a"), (x[0, 0], "float")]
    wrongs += [(x.numpy().astype(kind), got) for kind, got in ((object, "object of"), (np.longdouble, "of shape"))]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            as_tensor(wrong)
    assert "one shape" in collate([Item(x, []), Item(x[:, :2], [])]).error


@pytest.mark.filterwarnings("error")
def test_8_bit_arrays_of_any_layout():
    """BGR arrays that were turned to RGB have negative strides, and those of PIL images are read-only."""
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    expected = torch.from_numpy(array.transpose(2, 0, 1).copy()) / 127.5 - 1
    for item in (array[..., ::-1].copy()[..., ::-1], np.asarray(Image.fromarray(array)), array.copy(order="F")):
        assert torch.equal(as_tensor(item), expected)


@pytest.mark.filterwarnings("error")
def test_pil_images_of_any_mode():
    grey = np.random.default_rng(0).integers(0, 256, (4, 5), dtype=np.uint8)
    expected = torch.from_numpy(grey)[None] / 127.5 - 1
    for array in (grey.astype(np.uint16) * 257, grey.astype(np.int32) * 257, np.float32(grey / 255)):
        assert (as_tensor(Image.fromarray(array)) - expected).abs().max() < 1e-6, array.dtype
    assert torch.equal(as_tensor(Image.fromarray(grey > 99)), torch.from_numpy(grey > 99)[None] * 2.0 - 1)
    colours = Image.fromarray(np.dstack([grey, grey.T[:4, :4].repeat(2, 1)[:, :5], grey])).quantize(6)
    picture = torch.from_numpy(np.asarray(colours.convert("RGB")).transpose(2, 0, 1).copy()) / 127.5 - 1
    assert torch.equal(as_tensor(colours), picture)
    assert (GivenUnits([colours] * 2, value_range=(0, 255))[0] - picture).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"mode I must lie in \[0, 65535\]; got 0 to 70000"):
        as_tensor(Image.fromarray(np.array([[0, 70000]], np.int32)))


def stream(count, **options):
    return list(itertools.islice(StreamSampler(10, **{"batch_size": 4, "seed": 1, **options}), count))


def test_the_stream_is_one_permutation_after_another():
    keys = list(itertools.chain(*stream(10)))
    for epoch in range(4):
        part = keys[epoch * 10 : epoch * 10 + 10]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(10))
    assert keys[:10] != [(0, i) for _, i in keys[10:20]] and keys != list(itertools.chain(*stream(10, seed=2)))


def test_the_stream_starts_anywhere_and_splits_over_processes():
    whole = stream(9)
    assert stream(4, start=20) == whole[5:]
    two = [stream(3, batch_size=2, process=p, processes=2) for p in (0, 1)]
    assert [a + b for a, b in zip(*two)] == whole[:3]


def test_held_out_items_are_apart():
    data = [torch.full((1, 2, 2), i / 10) for i in range(10)]
    rest, held = hold_out(data, 3, seed=0)
    assert sorted([*rest.indices, *held.indices]) == list(range(10)) and len(held) == 3
    assert torch.equal(load_item(held, 1), data[held.indices[1]])
    assert not np.array_equal(held.indices, hold_out(data, 3, seed=1)[1].indices)
    with pytest.raises(ValueError, match="less than the 10 items.*got 10"):
        hold_out(data, 10, seed=0)
