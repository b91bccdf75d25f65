"""Seeds that follow from what they are for, not from what was drawn before.

Every random decision of training has a stream and a place, (seed, step, global index), so a run that is resumed, or
spread over another number of processes, draws the same numbers. Dropout alone is drawn by the process.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np


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


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """A 63-bit seed for `place` in `stream` (NumPy's SeedSequence mixes them); all arguments at least 0."""
    return int(np.random.SeedSequence([seed, stream, *place]).generate_state(1, np.uint64)[0] >> 1)


def generator_seeds(seed: int, stream: Stream, numbers: Iterable[int]) -> list[int]:
    """Seeds of torch generators for the samples of a run with these numbers (0 to 2^63 - 1), no two alike.

    A CPU generator keeps the lower 32 bits of its seed. There, an odd multiple of the number plus a constant, modulo
    2^32, gives each of the first 2^32 numbers its own value; both constants follow from (seed, stream). The upper bits
    of the number stay above, for generators that keep more.
    """
    factor, constant = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint32).tolist()
    factor |= 1
    return [(factor * number + constant) % 2**32 + (number >> 32 << 32) for number in map(int, numbers)]
