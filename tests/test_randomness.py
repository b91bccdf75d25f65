"""Seeds and counter-based draws: no two places share numbers, and the numbers have their distributions."""

import numpy as np
import pytest
import torch
from cards import tolerance
from helpers import OnDevice
from scipy import stats

from ddpm_hf.randomness import (
    Stream,
    derive_seed,
    generator_seeds,
    happens,
    normal_numbers,
    random_words,
    uniform_integers,
)

# Parameters of SplitMix64, and their inverses modulo 2^64
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
KEY = derive_seed(0, Stream.NOISE)


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
    lies below 5 deviations, and their mean square is 1/4096 up to 5 of its deviations, sqrt(2 / 2016) of that. Seen for
    generators by seed, and for the counter-based draws of 64 numbers and of 64 keys."""
    seeds = generator_seeds(0, Stream.SAMPLES, range(64))
    by_seed = torch.stack([torch.randn(4096, generator=torch.Generator().manual_seed(s)) for s in seeds])
    by_number = normal_numbers(random_words(KEY, torch.arange(64), 2048))
    far = normal_numbers(random_words(KEY, torch.arange(64) << 30, 2048))
    keys = [derive_seed(seed, Stream.NOISE) for seed in range(64)]
    by_key = torch.cat([normal_numbers(random_words(key, torch.tensor([5]), 2048)) for key in keys])
    for noise in (by_seed, by_number, far, by_key):
        products = np.corrcoef(noise.double().numpy())[np.triu_indices(64, 1)]
        assert np.abs(products).max() < 5 / 64
        assert abs((products**2).mean() * 4096 - 1) < 5 * np.sqrt(2 / 2016)


# ---------------------------------------------------------------------------------------------
# Counter-based draws


def test_the_generator_is_splitmix64():
    """The first outputs for the seed 1234567, which are published with the reference implementation."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    key = 1234567 * pow(GAMMA, -1, 2**64) % 2**64  # the state is the counter times GAMMA
    words = random_words(key - 2**64 if key >= 2**63 else key, torch.tensor([0]), 5)[0, 1:]  # its first state is 1
    assert [w % 2**64 for w in words.tolist()] == expected


def test_number_and_position_can_be_read_off_a_word():
    """The inverse of each operation, in Python's whole numbers, leads from a word back to the counter. So different
    counters have different words, and key + 2^28 number + position is different for each number and position."""

    def unshift(z, bits):
        x = z
        for _ in range(64 // bits):
            x = z ^ x >> bits
        return x

    rng = np.random.default_rng(0)
    numbers = [0, 1, 2, 2**36 - 1, *rng.integers(0, 2**36, 50).tolist()]
    for key in (0, KEY, -1, 2**63 - 1):
        words = random_words(key, torch.tensor(numbers), 300)
        for i, number in enumerate(numbers):
            for position in (0, 1, 255, 299):
                z = unshift(words[i, position].item() % 2**64, 31) * pow(MIX_2, -1, 2**64) % 2**64
                z = unshift(z, 27) * pow(MIX_1, -1, 2**64) % 2**64
                counter = unshift(z, 30) * pow(GAMMA, -1, 2**64) - key
                assert divmod(counter % 2**64, 2**28) == (number, position)


def test_no_word_is_drawn_twice():
    """200,000 samples, four words each, for two keys: of 1.6 million random words a pair is alike in 7e-8 of cases."""
    words = [random_words(derive_seed(s, Stream.NOISE), torch.arange(200_000), 4) for s in (0, 1)]
    assert len(torch.stack(words).unique()) == 1_600_000


def test_every_device_has_the_same_draws(device):
    """The bits and whole numbers are equal. Normal numbers come from logarithm, cosine and sine in float32."""
    numbers = torch.tensor([0, 1, 2**36 - 1])
    expected, found = random_words(KEY, numbers, 500), random_words(KEY, numbers.to(device), 500)
    assert found.device.type == device.type and torch.equal(found.cpu(), expected)
    assert torch.equal(uniform_integers(found, 1000).cpu(), uniform_integers(expected, 1000))
    close = tolerance(device, 2e-6, 2e-6)
    torch.testing.assert_close(normal_numbers(found).cpu(), normal_numbers(expected), **close)


def test_more_words_than_a_sample_has():
    with pytest.raises(ValueError, match=r"at most 2\^28 random words, got 268435457"):
        random_words(0, torch.zeros(1, dtype=torch.int64, device="meta"), 2**28 + 1)


def test_the_bits_are_uniform_and_neighbours_unrelated():
    """Each bit of 800,000 words is set in half of them, and differs from the same bit of the next number, position and
    key in half of them: a binomial number, 5 deviations sqrt(N) / 2 allowed for the largest of 64. Each byte has 256
    equally frequent values: chi-squared with 255 degrees of freedom, 5 deviations sqrt(510) allowed."""
    words = random_words(KEY, torch.arange(200_000), 4)
    others = [
        torch.zeros_like(words),
        random_words(KEY, torch.arange(1, 200_001), 4),
        random_words(KEY, torch.arange(200_000), 5)[:, 1:],
        random_words(derive_seed(1, Stream.NOISE), torch.arange(200_000), 4),
    ]
    for other in others:
        bits = np.unpackbits((words ^ other).numpy().view(np.uint8).reshape(-1, 8), axis=1).sum(0)
        assert np.abs(bits - 400_000.0).max() < 5 * np.sqrt(800_000) / 2
    for column in words.numpy().view(np.uint8).reshape(-1, 8).T:
        counts = np.bincount(column, minlength=256)
        assert abs(((counts - 3125.0) ** 2 / 3125).sum() - 255) < 5 * np.sqrt(510)


@pytest.mark.parametrize("bound", [1, 3, 10, 1000, 4096])
def test_integers_are_uniform(bound):
    """2^16 words spread evenly over all words give each integer equally often, up to one; the ends are 0 and the bound
    less one. Of random words the counts are chi-squared."""
    spread = torch.arange(-(2**15), 2**15) << 48
    counts = torch.bincount(uniform_integers(spread, bound), minlength=bound)
    assert len(counts) == bound and counts.max() - counts.min() <= 1
    assert uniform_integers(torch.tensor([0, -1]), bound).tolist() == [0, bound - 1]
    counts = torch.bincount(uniform_integers(random_words(KEY, torch.arange(100_000), 1), bound)[:, 0], minlength=bound)
    expected = 100_000 / bound
    assert abs(((counts - expected) ** 2 / expected).sum() - (bound - 1)) <= 5 * np.sqrt(2 * (bound - 1))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_events_have_their_probability(probability):
    """Of 2^16 words spread evenly over all words, the share is right to 2^-16; of random ones, to 5 deviations. What
    never or always happens does so for the ends too."""
    spread = torch.arange(-(2**15), 2**15) << 48
    assert abs(happens(spread, probability).sum().item() - probability * 2**16) <= 1
    count = happens(random_words(KEY, torch.arange(100_000), 1), probability).sum().item()
    assert abs(count - 1e5 * probability) <= 5 * np.sqrt(1e5 * probability * (1 - probability))
    ends = happens(torch.tensor([0, -1]), probability)
    assert ends.tolist() == [probability > 0, probability == 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers(dtype):
    """Moments 0, 1, 0, 3 of a million numbers, 5 deviations (the variances of z^k are 1, 2, 15, 96) allowed; the
    Kolmogorov-Smirnov test; both numbers of a word and their squares are uncorrelated; the ends are finite."""
    z = normal_numbers(random_words(KEY, torch.arange(1000), 500), dtype)
    assert z.dtype == dtype and z.shape == (1000, 1000)
    flat = z.double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((flat**power).mean() - moment) < 5 * np.sqrt(variance / 1e6)
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    first, second = z.double()[:, ::2].flatten(), z.double()[:, 1::2].flatten()
    for x, y in ((first, second), (first**2, second**2)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(500_000)
    ends = normal_numbers(torch.tensor([[0, -1, 2**63 - 1, -(2**63), 2**32 - 1]]), dtype)
    assert ends.isfinite().all() and ends.max().item() == pytest.approx(np.sqrt(66 * np.log(2)), rel=1e-6)


def test_float32_and_float64_draw_the_same_numbers():
    """Tolerance: three roundings of an angle up to 2 pi, 3 * 2^-24 * 2 pi = 1.1e-6, times a radius up to 6.8; one of
    the share, 2^-25, which is 2^-25 / r of the radius r: 1e-5 down to r = 0.003, below which lie 0.2 of these words."""
    words = random_words(KEY, torch.arange(100), 500)
    exact, rounded = normal_numbers(words, torch.float64), normal_numbers(words)
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-6, atol=6.8 * 1.1e-6 + 1e-5)


def test_draws_do_not_depend_on_the_split():
    """The bits of a sample's numbers are the same in a batch of 200 and in any part of it."""
    numbers = torch.arange(200)
    for count in (1, 3, 16, 37, 513):
        whole = normal_numbers(random_words(KEY, numbers, count))
        for size in (1, 2, 7, 64):
            parts = [normal_numbers(random_words(KEY, part, count)) for part in numbers.split(size)]
            assert torch.equal(torch.cat(parts), whole)


def test_draws_stay_on_their_device():
    """On the meta device, where a read by the host raises, no tensor of the host takes part; key and first number may
    be tensors of the device. The number of operations is the same for any batch."""

    def draw(batch):
        first, key = torch.zeros((2,), dtype=torch.int64, device="meta")
        with OnDevice("meta") as seen:
            words = random_words(key, first + torch.arange(batch, device="meta"), 500)
            normal_numbers(words), uniform_integers(words, 1000)
        return seen.operations

    assert draw(2) == draw(512) <= 40


def test_draws_compile_whole():
    def draw(key, first):
        words = random_words(key, first + torch.arange(8), 20)
        return words, normal_numbers(words), uniform_integers(words, 1000)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for first in (0, 123):
        key, first = torch.tensor(KEY), torch.tensor(first)
        for found, expected in zip(compiled(key, first), draw(key, first)):
            assert torch.equal(found, expected)
