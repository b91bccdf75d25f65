"""Memorization: copies are found, also of items that come twice and of mirrored ones."""

import numpy as np
import pytest
import torch
from measuring import as_samples, grey, images, measure

from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.metrics import too_close


def test_copies_of_data_that_come_twice_are_copies():
    """Each item twice, once mirrored where training mirrors: all copies are found, and equal items count once."""
    once = grey(50)
    options = {"metrics": ["memorization"], "seed": 0}
    alone = measure(images(list(once)), (1, 8, 8), as_samples(once), **options)
    twice = measure(images([*once, *once]), (1, 8, 8), as_samples(once), **options)
    assert alone == twice and twice["memorization"] == 1
    rows = np.random.default_rng(0).normal(size=(50, 1, 8))
    both = SequenceDataset(np.concatenate((rows, rows)))
    assert measure(both, (1, 8), rows, metrics=["memorization"])["memorization"] == 1


def test_mirrored_copies_are_copies_where_training_mirrors():
    """By the data set's own random_flip or by the setting: also of pictures that are averaged to 32 pixels, of data
    that holds both, and of nearly symmetric pictures. Without, a mirrored picture is another one."""
    options = {"metrics": ["memorization"]}
    pictures = grey(40, side=50)
    mirrored = as_samples(pictures[:, :, ::-1])
    plain = measure(images(list(pictures), 50), (1, 50, 50), mirrored, **options)
    assert plain["memorization"] < 0.9
    by_data = measure(images(list(pictures), 50, random_flip=True), (1, 50, 50), mirrored, **options)
    by_setting = measure(images(list(pictures), 50), (1, 50, 50), mirrored, random_flip=True, **options)
    both = measure(images([*pictures, *pictures[:, :, ::-1]], 50), (1, 50, 50), mirrored, random_flip=True, **options)
    assert by_data == by_setting == both and both["memorization"] == 1
    symmetric = (pictures // 2 + pictures[:, :, ::-1] // 2) // 2 * 2 + (pictures & 1)
    same = measure(images(list(symmetric), 50, random_flip=True), (1, 50, 50), as_samples(symmetric), **options)
    assert same["memorization"] == 1


def test_the_rate_of_real_data_is_of_random_items():
    """Sorted so that half of the data, tight pairs far from each other, comes first: as many items as samples, 60 of
    400, drawn at random, have the rate of all up to 5 deviations; the first 60 have another."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, 1, 8)) * 3
    pairs = (centres[:, None] + rng.normal(size=(100, 2, 1, 8)) * 0.01).reshape(200, 1, 8)
    rows = np.concatenate((pairs, rng.normal(size=(200, 1, 8)) * 3))
    samples = rng.normal(size=(60, 1, 8))
    every = measure(SequenceDataset(rows), (1, 8), np.repeat(samples, 7, 0), metrics=["memorization"])
    some, shuffled = (
        measure(SequenceDataset(r), (1, 8), samples, metrics=["memorization"])["memorization_real"]
        for r in (rows, rng.permutation(rows))
    )
    whole, deviation = every["memorization_real"], (0.25 / 60) ** 0.5
    assert abs(some - whole) < 5 * deviation and abs(shuffled - whole) < 5 * deviation
    first = too_close(torch.from_numpy(rows[:60, 0]), torch.from_numpy(rows[:, 0]), torch.arange(60)).double().mean()
    assert abs(first - whole) > 5 * deviation  # the test can fail


def test_memorization_needs_different_items():
    with pytest.raises(ValueError, match="at least 3 different real items, the data has 2"):
        measure(images([*grey(2)] * 4), (1, 8, 8), as_samples(grey(5)), metrics=["memorization"])
