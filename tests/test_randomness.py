"""Seeds: what torch's CPU generators keep of them, 32 bits, tells every two numbers of a stream apart."""

import numpy as np
import torch

from ddpm_hf.randomness import Stream, generator_seeds


def test_no_two_samples_share_noise():
    """The first 200,000 numbers, 200,000 spread over all 2^32, and neighbours at every power of two have different
    seeds in the 32 bits that a CPU generator keeps (63 random bits collide there in 50,000 samples)."""
    rng = np.random.default_rng(0)
    spread = np.concatenate([rng.integers(0, 2**32, 200_000), [2**k + d for k in range(32) for d in (-1, 0, 1)]])
    numbers = np.union1d(np.arange(200_000), spread).tolist()
    for seed in (0, 1, 12345):
        kept = {value % 2**32 for value in generator_seeds(seed, Stream.SAMPLES, numbers)}
        assert len(kept) == len(numbers)


def test_seeds_follow_from_their_number_alone():
    """Any split over batches and processes has the same; beyond 2^32 the upper bits tell numbers apart; streams and
    run seeds have nothing to do with each other (of 20,000 numbers a random pair of streams shares 0.09)."""
    whole = generator_seeds(3, Stream.SAMPLES, range(1000))
    parts = [generator_seeds(3, Stream.SAMPLES, range(start, start + 10)) for start in range(0, 1000, 10)]
    assert sum(parts, []) == whole
    assert len(set(generator_seeds(3, Stream.NOISE, [5 + k * 2**32 for k in range(1000)]))) == 1000
    assert max(generator_seeds(3, Stream.NOISE, [2**63 - 1])) < 2**63
    sets = [set(generator_seeds(seed, stream, range(20_000))) for seed, stream in ((0, 6), (1, 6), (0, 3))]
    assert all(len(a & b) < 3 for a in sets for b in sets if a is not b)


def test_noise_of_neighbouring_numbers_is_independent():
    """Correlations of 64 x 64 pairs of noises of 4,096 numbers are of the order 1/sqrt(4096): the largest of 2,016
    lies below 5 deviations, and their mean square is 1/4096 up to 5 of its deviations, sqrt(2 / 2016) of that."""
    noise = [torch.randn(4096, generator=torch.Generator().manual_seed(s)) for s in generator_seeds(0, 6, range(64))]
    products = np.corrcoef(torch.stack(noise).double().numpy())[np.triu_indices(64, 1)]
    assert np.abs(products).max() < 5 / 64
    assert abs((products**2).mean() * 4096 - 1) < 5 * np.sqrt(2 / 2016)
