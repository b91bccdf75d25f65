"""Memory of scores and of long series: tensors that live at the same time, counted and not timed."""

import weakref

import numpy as np
import pytest
import torch
from test_pipeline import images, sequences
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return for as long as a tensor or a view of it lives.

    Attributes:
        peak: the most bytes that were alive at the same time.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.holders, self.seen = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and id(x) not in self.seen and x.untyped_storage().data_ptr():
                place, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
                count, size = self.holders.get(place, (0, size))
                self.live += 0 if count else size
                self.holders[place] = count + 1, size
                self.seen.add(id(x))
                weakref.finalize(x, self.release, id(x), place)
        self.peak = max(self.peak, self.live)
        return out

    def release(self, tensor: int, place: int) -> None:
        self.seen.discard(tensor)
        count, size = self.holders.pop(place)
        if count > 1:
            self.holders[place] = count - 1, size
        else:
            self.live -= size


def peak(call) -> int:
    with LiveBytes() as memory:
        call()
    return memory.peak


def test_the_count_is_that_of_tensors_that_live():
    def call():
        x = torch.zeros(1000)  # 4,000 bytes, twice while it is doubled
        view = (x + 1)[:10]
        del x
        x = torch.zeros(500)  # beside 4,000 that a view holds
        return view, x

    assert peak(call) == 8000
    assert peak(lambda: [torch.zeros(1000) for _ in range(3)] and None) == 12000
    assert peak(lambda: [torch.zeros(1000).sum().item() for _ in range(3)]) == 4004


@pytest.mark.parametrize("method", ["reconstruction", "denoising"])
def test_scores_of_more_items_take_no_more_than_the_items(method):
    """Eight times the items at one batch size: 40 bytes for each value more, in float64 maps, items and masks."""
    pipe = images(1)
    x = np.random.default_rng(0).random((32, 8, 8, 1), dtype=np.float32)

    def of(items):
        options = {"strengths": (0.2,), "num_timesteps": 2, "batch_size": 4}
        return peak(lambda: pipe.score(x[:items], method, **options))

    small, large = of(4), of(32)
    assert large - small <= 40 * 28 * 64 and small > 4 * 64 * 8 * 4


def test_windows_that_are_denoised_together_take_no_more_than_the_series():
    """Eight times the length with as many samples in a call: 64 bytes for each value more."""
    pipe = sequences(unet={"self_condition": True})
    pipe.max_batch_size = 4
    small, large = (peak(lambda n=n: pipe(1, 2, length=16 * n, method="joint")) for n in (5, 40))
    assert large - small <= 64 * (35 * 16) * 2


def test_a_stream_takes_the_same_for_any_length():
    pipe = sequences()

    def of(windows):
        return peak(lambda: [None for _ in pipe.stream(16 * windows, 1, 2, jump_n_sample=1)])

    of(1)  # tables that are kept
    assert of(4) == of(12)
