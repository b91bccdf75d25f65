"""Mapped arrays in a pickle: workers that are not forks map the file again, and get the same numbers."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ddpm_hf import TrainConfig
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import TrainingView, collate
from ddpm_hf.data.mapped_array import as_mapped

NUMBERS = np.random.default_rng(0).normal(size=(64, 3, 400))  # 600 kB
PICTURES = NUMBERS.reshape(64, 3, 20, 20)
FILE_OPTIONS = {
    "windows": {"stride": 5, "sequence_length": 16}, "sequences": {}, "known gaps": {"on_missing": "drop"},
    "held out": {"holdout": 3}, "pictures": {}, "pairs": {"condition_column": True},
}  # fmt: skip


@pytest.mark.parametrize("case", [*FILE_OPTIONS, "given", "given in units"])
def test_the_pickle_of_a_mapped_dataset_is_small_and_gives_the_same_items(case, tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, PICTURES if case == "pictures" else NUMBERS)
    if case in FILE_OPTIONS:
        options = FILE_OPTIONS[case]
        if case == "pairs":
            options = {"condition_column": str(file)}
        feed = open_data(TrainConfig(train_data_file=str(file), **options))
    else:
        np.save(file, NUMBERS / 10)
        units = {"image_range": [-1, 1]} if case == "given in units" else {}
        feed = open_data(TrainConfig(**units), np.load(file, mmap_mode="r"))
    view = feed._view()
    content = bytes(ForkingPickler.dumps(view))
    assert len(content) < 60_000
    found = pickle.loads(content)
    for index in (0, len(view) - 1):
        for ours, theirs in zip(view[0, index], found[0, index]):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert len(ForkingPickler.dumps(found)) < 60_000  # what is mapped again is small again


@pytest.mark.parametrize("part", [np.s_[:], np.s_[3:, ::-1, 5::7], np.s_[:, None, 1], np.s_[2]])
@pytest.mark.parametrize("offset", [0, 72])
def test_views_are_mapped_where_they_are(part, offset, tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(bytes(offset) + NUMBERS.astype(">f4").tobytes())
    array = as_mapped(np.memmap(file, ">f4", "r", offset, NUMBERS.shape))[part]
    found = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(found, array, strict=True)
    assert found.strides == array.strides and not found.flags.writeable and len(pickle.dumps(array)) < 1000


def test_what_the_file_does_not_have_is_pickled_whole(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, NUMBERS)
    changed = as_mapped(np.load(file, mmap_mode="c"))
    changed[0] = 7
    result = as_mapped(np.load(file, mmap_mode="r")) + 1
    gone = as_mapped(np.load(file, mmap_mode="r"))
    file.unlink()
    for array in (changed, result, gone):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), np.asarray(array))
        np.testing.assert_array_equal(copy.deepcopy(array), np.asarray(array))


@pytest.mark.slow  # the worker imports torch anew
def test_spawned_workers_map_the_file_again(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, NUMBERS)
    feed = open_data(TrainConfig(train_data_file=str(file)))
    view = TrainingView(feed.dataset, 0)
    loader = DataLoader(
        view, batch_sampler=[[(0, 1), (0, 63)]], num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    (batch,) = loader
    assert torch.equal(batch.x0, collate([view[0, 1], view[0, 63]]).x0)
