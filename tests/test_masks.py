"""Masks of the known part: the shares that the documentation says, by counters, on the device."""

import math

import numpy as np
import pytest
import torch
from helpers import OnDevice
from scipy import stats

from ddpm_hf.masks import MASK_STRATEGIES, WHOLLY_UNKNOWN, condition_of, draw_known
from ddpm_hf.randomness import Stream, derive_seed

KEY = derive_seed(0, Stream.MASKS)
MANY = torch.arange(20_000)
SEQUENCE, IMAGE = (2, 16), (3, 8, 8)
CASES = [(s, shape) for s in MASK_STRATEGIES for shape in (SEQUENCE, IMAGE) if (s, shape) != ("forecast", IMAGE)]


def chi_squared(found, expected):
    """The p-value of counts against expected frequencies."""
    return stats.chisquare(found, np.asarray(expected) * sum(found) / sum(expected)).pvalue


@pytest.mark.parametrize(("strategy", "shape"), CASES)
def test_a_tenth_is_wholly_unknown(strategy, shape):
    """A binomial number, 5 deviations allowed. By "random" a few items more have no known value: of n values that are
    known with a uniform share, none is with the probability 1 / (n + 1)."""
    nothing = (~draw_known(strategy, shape, MANY, KEY)).flatten(1).all(1)
    drawn = math.prod(shape) if shape == SEQUENCE else 64
    parts = 3 if shape == SEQUENCE else 2
    also = {"random": 1 / (drawn + 1), "mixed": 1 / (drawn + 1) / parts}.get(strategy, 0)
    share = WHOLLY_UNKNOWN + (1 - WHOLLY_UNKNOWN) * also
    assert abs(nothing.sum().item() - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))


def partly(strategy, shape):
    known = draw_known(strategy, shape, MANY, KEY)
    return known[known.flatten(1).any(1)]


def test_random_masks():
    """The number of known values of n is uniform on 0 to n for a uniform share (Bayes): chi-squared of the counts 1 to
    n, alike for pixels and for the values of a sequence, of which each is known equally often."""
    for shape, drawn in ((SEQUENCE, 32), (IMAGE, 64)):
        known = partly("random", shape)
        if shape == IMAGE:
            assert torch.equal(known[:, :1].expand_as(known), known)
            known = known[:, :1]
        numbers = np.bincount(known.flatten(1).sum(1).numpy(), minlength=drawn + 1)[1:]
        assert chi_squared(numbers, np.ones(drawn)) > 1e-3
        each = known.flatten(1).sum(0)
        # a value is known in half of the items; the deviation of a count of N is sqrt(N) / 2
        assert (each / len(known) - 0.5 * (drawn + 1) / drawn).abs().max() < 5 / 2 / np.sqrt(len(known))


@pytest.mark.parametrize("strategy", ["blocks", "forecast"])
def test_gaps_and_ends_of_sequences(strategy):
    """Of 16 points, 2 to 12 are unknown, each number equally often; a gap of n begins at each of 17 - n places equally
    often, and a forecast ends with the sequence. All channels are alike."""
    known = partly(strategy, SEQUENCE)
    assert torch.equal(known[:, 0], known[:, 1])
    unknown = ~known[:, 0]
    sides, start = unknown.sum(1), unknown.int().argmax(1)
    place = torch.arange(16)
    assert torch.equal(unknown, (place >= start[:, None]) & (place < (start + sides)[:, None]))
    counts = np.bincount(sides.numpy(), minlength=17)
    assert counts[:2].sum() + counts[13:].sum() == 0 and chi_squared(counts[2:13], np.ones(11)) > 1e-3
    if strategy == "forecast":
        assert (start + sides == 16).all()
        return
    for side in (2, 7, 12):
        starts = np.bincount(start[sides == side].numpy(), minlength=17 - side)
        assert len(starts) == 17 - side and chi_squared(starts, np.ones(17 - side)) > 1e-3


def test_boxes_in_images():
    """Sides of 1 to 6 pixels of 8, independent of each other: 36 pairs equally often; in all channels."""
    known = partly("blocks", IMAGE)
    unknown = ~known
    assert torch.equal(unknown[:, :1].expand_as(unknown), unknown)
    rows, columns = unknown[:, 0].any(2), unknown[:, 0].any(1)
    assert torch.equal(unknown[:, 0], rows[:, :, None] & columns[:, None, :])
    pairs = np.bincount((7 * rows.sum(1) + columns.sum(1)).numpy(), minlength=49).reshape(7, 7)
    assert pairs[0].sum() + pairs[:, 0].sum() == 0 and chi_squared(pairs[1:, 1:].ravel(), np.ones(36)) > 1e-3


def test_mixed_masks_are_each_kind_equally_often():
    """Each mixed mask is that of one of the strategies for the same number: seen where the three differ."""
    masks = {s: draw_known(s, SEQUENCE, MANY, KEY) for s in MASK_STRATEGIES}
    alike = {s: (masks["mixed"] == masks[s]).flatten(1).all(1) for s in MASK_STRATEGIES[:3]}
    assert torch.stack(list(alike.values())).any(0).all()
    one = sum(a.int() for a in alike.values()) == 1
    assert chi_squared([(a & one).sum().item() for a in alike.values()], np.ones(3)) > 1e-3


@pytest.mark.parametrize(("strategy", "shape"), CASES)
def test_masks_follow_from_number_and_key(strategy, shape):
    known = draw_known(strategy, shape, MANY[:100], KEY)
    assert known.shape == (100, *shape) and known.dtype == torch.bool
    parts = [draw_known(strategy, shape, part, KEY) for part in MANY[:100].split(7)]
    assert torch.equal(torch.cat(parts), known)
    assert not torch.equal(draw_known(strategy, shape, MANY[:100], KEY + 1), known)


@pytest.mark.parametrize(("strategy", "shape"), CASES)
def test_masks_stay_on_their_device(strategy, shape):
    numbers, key = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros((), dtype=torch.int64, device="meta")
    with OnDevice("meta") as seen:
        known = draw_known(strategy, shape, numbers, key)
        condition = condition_of(torch.zeros(4, *shape, device="meta"), known)
    assert condition.shape == (4, 2 * shape[0], *shape[1:]) and seen.operations < 110


def test_short_items_have_masks():
    for shape in ((1, 1), (1, 1, 1), (2, 3), (1, 2, 5)):
        for strategy in ("random", "blocks", "mixed"):
            unknown = ~draw_known(strategy, shape, MANY[:200], KEY)
            assert unknown.flatten(1).any(1).any() and unknown.shape == (200, *shape)


def test_a_condition_has_the_known_values_and_the_mask():
    values = torch.tensor([[[1.0, float("nan"), 3.0]]])
    condition = condition_of(values, torch.tensor([[[True, False, False]]]))
    assert condition.tolist() == [[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]


def test_bad_strategies():
    with pytest.raises(ValueError, match="one of random, blocks, forecast, mixed, got 'rows'"):
        draw_known("rows", SEQUENCE, MANY[:2])
    with pytest.raises(ValueError, match="random, blocks or mixed for images.* got 'forecast'"):
        draw_known("forecast", IMAGE, MANY[:2])
