"""Random numbers that follow from their purpose and place, not from what was drawn before.

Every random decision of training belongs to a stream and has a place in it (the step, the number of the sample), so a
run that is resumed, or spread over another number of processes, draws the same numbers. Dropout alone is drawn by the
process.

The host draws through seeds (`derive_seed`, `generator_seeds`). The noise and timesteps of training are drawn on the
device by a counter-based generator: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) turns a counter into 64 random bits, and the Box-Muller transform turns those into two
standard normal numbers. That takes the same few tensor operations for any batch, reads nothing back to the host, and
works in a captured CUDA graph, under `torch.compile` and on the meta device.
"""

import math
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

# The name of the generator below. A run records it, because another generator would continue the run with other noise.
DRAWS = "splitmix64"
# A sample's counters are its number times 2^28 plus 0, 1, 2, ...: 2^28 words a sample and 2^36 samples a run.
WORD_BITS = 28


class Stream(IntEnum):
    """The purpose of a seed; two streams never share numbers."""

    WEIGHTS = 0
    ORDER = 1
    AUGMENTATION = 2
    NOISE = 3
    SELF_CONDITION = 4
    DROPOUT = 5
    SAMPLES = 6
    HOLDOUT = 7
    EVALUATION = 8
    SHARDS = 9
    STAND_IN = 10
    CLASS_DROPOUT = 11
    MASKS = 12


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """Return a 63-bit seed for `place` in `stream`, mixed by NumPy's SeedSequence. All arguments must be at least 0."""
    return int(np.random.SeedSequence([seed, stream, *place]).generate_state(1, np.uint64)[0] >> 1)


def generator_seeds(seed: int, stream: Stream, numbers: Iterable[int]) -> list[int]:
    """Return a seed for a torch generator for each of these sample numbers (0 to 2^63 - 1); no two are alike.

    A CPU generator keeps the lower 32 bits of its seed. There, an odd multiple of the number plus a constant, modulo
    2^32, gives each of the first 2^32 numbers its own value; both constants follow from (seed, stream). The upper bits
    of the number stay above, for generators that keep more.
    """
    factor, constant = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32).tolist()
    factor |= 1
    return [(factor * number + constant) % 2**32 + (number >> 32 << 32) for number in map(int, numbers)]


def _signed(x: int) -> int:
    """Return the int64 that has the bits of an unsigned 64-bit number."""
    return x - 2**64 if x >= 2**63 else x


GAMMA = _signed(0x9E3779B97F4A7C15)  # the odd number next to 2^64 over the golden ratio
MIX_1, MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers right as unsigned ones; torch's own shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def random_words(key: int | Tensor, numbers: Tensor, count: int) -> Tensor:
    """Draw `count` words of 64 random bits for each sample number.

    Word j of number n is SplitMix64's output for the counter key + 2^28 n + j. For one key the counters of different
    (n, j) differ, and the generator maps different counters to different words.

    Args:
        key: an int64 number, for instance from `derive_seed`. Different keys begin at unrelated counters.
        numbers: (B,) int64, from 0 to 2^36 - 1, on any device; the words are made there.
        count: number of words for each sample, up to 2^28.

    Returns:
        (B, count) int64.

    Raises:
        ValueError: `count` is above 2^28.
    """
    key = key.to(numbers.device) if isinstance(key, Tensor) else key
    if count > 2**WORD_BITS:
        raise ValueError(f"a sample can have at most 2^{WORD_BITS} random words, got {count}")
    first = (numbers << WORD_BITS) + key
    z = (first[:, None] + torch.arange(count, device=numbers.device)) * GAMMA
    z = (z ^ _shift_right(z, 30)) * MIX_1
    z = (z ^ _shift_right(z, 27)) * MIX_2
    return z ^ _shift_right(z, 31)


def uniform_integers(words: Tensor, bound: int | Tensor) -> Tensor:
    """Turn random words into integers that are uniform on 0 to bound - 1 up to a relative error of bound / 2^32.

    Args:
        words: int64 of any shape, from `random_words`; the upper 32 bits are used.
        bound: from 1 to 2^31; an int64 tensor broadcasts against the words.
    """
    return (_shift_right(words, 32) * bound) >> 32


def happens(words: Tensor, probability: float) -> Tensor:
    """Turn each random word into True with a probability, right to 2^-32, and into False otherwise.

    Args:
        words: int64 of any shape, from `random_words`; the upper 32 bits are used.
        probability: from 0 (never) to 1 (always).
    """
    return _shift_right(words, 32) < round(probability * 2**32)


def normal_numbers(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn random words into standard normal numbers, two for each word (Box and Muller 1958).

    The radius comes from the upper 32 bits of a word, so no number is larger than sqrt(66 log 2) = 6.76 in magnitude.

    Args:
        words: (B, count) int64, from `random_words`.
        dtype: float32 or float64.

    Returns:
        (B, 2 * count); columns 2j and 2j + 1 come from word j.
    """
    share = (_shift_right(words, 32).to(dtype) + 0.5) * 2.0**-32
    angle = (words & (2**32 - 1)).to(dtype) * (2 * math.pi * 2.0**-32)
    radius = (-2 * share.log()).sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
