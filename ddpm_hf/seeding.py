"""Seeds that follow from what they are for, not from what was drawn before.

Every random decision of training has a stream and a place, (seed, step, global index), so a run that is resumed, or
spread over another number of processes, draws the same numbers.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a seed is for; two streams never share numbers."""

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


def derive_seed(seed: int, stream: Stream, *place: int) -> int:
    """A 63-bit seed for `place` in `stream` (NumPy's SeedSequence mixes them); all arguments at least 0."""
    return int(np.random.SeedSequence([seed, stream, *place]).generate_state(1, np.uint64)[0] >> 1)
