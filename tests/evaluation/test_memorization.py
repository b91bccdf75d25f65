"""Memorization: copies are found, also of items that come twice and of mirrored ones."""

import numpy as np
import pytest
from measuring import Known, as_samples, evaluator, grey, images, measure
from scipy.spatial.distance import cdist

from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation import metrics
from ddpm_hf.evaluation.memorization import AT_ONCE


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
    distances = cdist(rows[:, 0], rows[:, 0]) + np.diag(np.full(400, np.inf))
    near = distances[:60].argmin(1)
    beyond = distances[near]
    beyond[np.arange(60), np.arange(60)] = np.inf
    first = (distances[:60].min(1) < beyond.min(1)).mean()
    assert abs(first - whole) > 5 * deviation  # the test can fail


def test_memorization_needs_different_items():
    with pytest.raises(ValueError, match="at least 3 different real items, the data has 2"):
        measure(images([*grey(2)] * 4), (1, 8, 8), as_samples(grey(5)), metrics=["memorization"])


@pytest.mark.parametrize("pictures", [True, False])
def test_what_concerns_real_items_alone_is_computed_once(pictures, monkeypatch, tmp_path):
    """Norms once; each real item is looked for among the others at most once, and not again for the next evaluation of
    the same samples, nor, for images, by the next program; samples are looked for by many at once, however
    small the batches are."""
    norms, asked, searched = [], [], []
    squares, search = metrics.squared_norms, metrics.Reference.nearest

    def nearest(self, queries, count=1, exclude=None):
        if exclude is None:
            searched.append(len(queries))
        else:
            asked.extend(exclude[:, 0].tolist())
        return search(self, queries, count, exclude)

    monkeypatch.setattr(metrics, "squared_norms", lambda rows: norms.append(len(rows)) or squares(rows))
    monkeypatch.setattr(metrics.Reference, "nearest", nearest)
    number, rng = AT_ONCE + 90, np.random.default_rng(0)
    if pictures:
        data, shape, samples = images(list(grey(60))), (1, 8, 8), as_samples(grey(number, seed=1))
    else:
        data, shape, samples = SequenceDataset(rng.normal(size=(60, 1, 8))), (1, 8), rng.normal(size=(number, 1, 8))
    e = evaluator(data, shape, num_samples=number, metrics=["memorization"], cache_dir=str(tmp_path))
    e.prepare()
    values = [e(Known(samples, shape), steps) for steps in (5, 6)]
    assert values[0] == values[1] and norms == [60]
    assert len(asked) == len(set(asked)) == 60
    assert max(searched) >= AT_ONCE and sum(searched) == 2 * number and len(searched) <= 4
    if pictures:
        other = evaluator(data, shape, num_samples=number, metrics=["memorization"], cache_dir=str(tmp_path))
        other.prepare()
        assert other(Known(samples, shape), 5) == values[0] and len(asked) == 60
        changed = grey(60)
        changed[7, 0, 0] ^= 1
        evaluator(
            images(list(changed)), shape, num_samples=9, metrics=["memorization"], cache_dir=str(tmp_path)
        ).prepare()
        assert len(asked) > 60 and len(list(tmp_path.iterdir())) == 2
