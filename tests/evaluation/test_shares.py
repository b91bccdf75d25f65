"""Shares of processes: every small number of processes and items, some without a share; items that are left out."""

import numpy as np
import pytest
import torch
from conftest import simulated

from ddpm_hf.data.images import ImageDataset
from ddpm_hf.evaluation.shares import Items, Shares


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5])
def test_rows_come_in_order_whoever_has_them(processes):
    """Every number of items from 0 to 7: shares part them, and what is gathered is the whole, its type kept."""

    def work(accelerator):
        shares = Shares(accelerator)
        for count in range(8):
            own = shares.of(count)
            assert len(own) <= -(-count // processes)
            for dtype in (torch.float64, torch.float32, torch.uint8):
                whole = torch.arange(count * 3, dtype=dtype).reshape(count, 3)
                batches = (whole[i : i + 1] for i in own)
                if count == 0:
                    with pytest.raises(ValueError, match="no item can be read"):
                        shares.collect(batches, lambda x: x)
                    continue
                plain, doubled = shares.collect(batches, lambda x: x, lambda x: 2 * x[:, 0])
                assert torch.equal(plain, whole) and torch.equal(doubled, 2 * whole[:, 0])
                assert plain.dtype == doubled.dtype == dtype
                # as many rows as each happens to have
                some = whole[own.start : own.stop][::2]
                assert len(shares.gather(some)) == sum(len(part) for part in shares.gather_objects([some]))
        return own

    parts = simulated(processes, work)
    assert [n for part in parts for n in part] == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_once_and_bad_pictures_never(workers):
    """Of 12 pictures 6 are damaged: what is read is the other 6, each with its own number."""
    good = [np.full((8, 8), 20 * i, np.uint8) for i in range(12)]
    sources = [b"damaged" if i in (0, 3, 4, 5, 6, 11) else array for i, array in enumerate(good)]
    items = Items(ImageDataset(sources, (8, 8), 1), "skip", batch_size=3, workers=workers)
    batches = list(items.read(range(12)))
    assert [n for batch in batches for n in batch.numbers] == [1, 2, 7, 8, 9, 10] and len(items.bad) == 6
    values = torch.cat([batch.x0[:, 0, 0, 0] for batch in batches])
    torch.testing.assert_close(values, torch.tensor([1, 2, 7, 8, 9, 10]) * 20 / 127.5 - 1)
    with pytest.raises(ValueError, match="number 0.*--on_bad_image skip"):
        list(Items(items.dataset, "stop", 3, workers).read(range(12)))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, 4), torch.full((1, 8, 8), 3.0), "text"])
def test_items_of_another_kind_are_named(wrong):
    data = [torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), wrong]
    with pytest.raises(ValueError, match="item 2 of the data|one shape"):
        list(Items(data, "skip", 4, 0).read(range(3)))
