"""The order of reading: permutations that need no history, and random numbers without state."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import order

# The operation itself is no permutation of 2**16 + 1 and 2**18 + 1 indices.
SIZES = [1, 2, 3, 10, 97, 297, 1500, 60_000, 65_536, 65_537, 131_073, 262_144, 262_145]


def read(first, count, *, num_examples, seed=0):
    positions = tf.range(first, first + count, dtype=tf.int64)
    return order.records(positions, num_examples=num_examples, seed=seed).numpy()


def keys(count, *, seed=0, first=0):
    return order.example_seeds(tf.range(first, first + count, dtype=tf.int64), seed=seed)


def assert_looks_random(values, bins=20):
    """Chi-squared against the uniform distribution on [0, 1), off by chance once in 30,000."""
    counts = np.histogram(values, bins, (0, 1))[0]
    expected = len(values) / bins
    chi2 = np.sum((counts - expected) ** 2) / expected
    assert abs(chi2 - (bins - 1)) < 4 * np.sqrt(2 * (bins - 1)), counts


def assert_uncorrelated(x, y):
    assert abs(np.corrcoef(x, y)[0, 1]) * np.sqrt(len(x)) < 4


def test_a_step_has_the_positions_after_those_before():
    np.testing.assert_array_equal(order.positions(3, 4), [12, 13, 14, 15])
    assert order.positions(tf.constant(2**40, tf.int64), 4)[0] == 2**42


def test_positions_pass_over_what_is_left_out():
    windows, remaining, rng = (), list(range(100)), np.random.default_rng(0)
    for _ in range(6):
        first = int(rng.integers(0, 60))
        end = first + int(rng.integers(1, 6))
        windows = order.leave_out(windows, first, end)
        del remaining[first:end]  # Which is what leaving out means.
        positions = tf.range(60, dtype=tf.int64)
        assert order.used(positions, windows).numpy().tolist() == remaining[:60]
    # Ascending, and no two touch.
    assert all(a[1] < b[0] for a, b in itertools.pairwise(windows))


@pytest.mark.parametrize('num_examples', SIZES)
def test_an_epoch_has_every_record_once(num_examples):
    for epoch in (0, 7):
        records = read(epoch * num_examples, num_examples, num_examples=num_examples)
        np.testing.assert_array_equal(np.sort(records), np.arange(num_examples))


def test_a_batch_that_straddles_epochs_is_the_end_of_one_and_the_start_of_the_next():
    epochs = [read(epoch * 10, 10, num_examples=10) for epoch in range(4)]
    np.testing.assert_array_equal(read(7, 28, num_examples=10), np.concatenate(epochs)[7:35])


def test_a_record_depends_on_its_position_alone():
    together = read(0, 3000, num_examples=1500)
    for first, count in ((0, 1), (1, 7), (1400, 200), (2999, 1)):
        np.testing.assert_array_equal(
            read(first, count, num_examples=1500), together[first : first + count]
        )
    shuffled = np.random.default_rng(0).permutation(3000)
    there = order.records(tf.constant(shuffled), num_examples=1500, seed=0)
    np.testing.assert_array_equal(there, together[shuffled])


# What a resumed run would read differently if these changed, in a later TensorFlow for example.
@pytest.mark.parametrize(
    ('seed', 'first', 'num_examples', 'expected'),
    [
        (0, 0, 1500, [864, 401, 1282, 1266, 1058, 81, 900, 1439]),
        (0, 1500, 1500, [1282, 92, 1298, 803, 293, 1231, 1404, 614]),
        (7, 10**12, 60000, [16387, 30685, 26296, 26915, 34518, 9076, 59704, 51392]),
        (2**31 - 1, 5, 10, [1, 7, 5, 2, 9, 6, 8, 2]),
    ],
)
def test_the_order_is_the_same_for_ever(seed, first, num_examples, expected):
    assert read(first, 8, num_examples=num_examples, seed=seed).tolist() == expected


# The cipher itself sees 8 bits of each word of a key at these sizes: 256 is 0 to it.
@pytest.mark.parametrize('other', [1, 2, 255, 256, 2**16, 2**30, 2**31 - 1])
@pytest.mark.parametrize('num_examples', [1500, 60_000])
def test_seeds_and_epochs_each_give_an_order_of_their_own(num_examples, other):
    first = read(0, 200, num_examples=num_examples)
    of_seed = read(0, 200, num_examples=num_examples, seed=other)
    of_epoch = read(other * num_examples, 200, num_examples=num_examples)
    # Two independent orders agree in 200 / num_examples places on average.
    assert max(np.sum(first == of_seed), np.sum(first == of_epoch), np.sum(of_seed == of_epoch)) < 6


@pytest.mark.parametrize('num_examples', [1500, 60_000, 65_536, 1_000_000])
def test_batches_of_sorted_data_are_mixed_as_by_chance(num_examples):
    records = read(0, num_examples // 100 * 100, num_examples=num_examples, seed=1)
    # Class counts in batches of 100 out of 10 classes stored one after another.
    classes = (records * 10 // num_examples).reshape(-1, 100)
    counts = np.stack([np.sum(classes == c, axis=1) for c in range(10)])
    chi2 = np.sum((counts - 10) ** 2 / 10) * (num_examples - 1) / (num_examples - 100)
    freedom = 9 * classes.shape[0]
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize('num_examples', [1500, 60_000, 65_536, 1_000_000])
def test_neighbours_in_an_epoch_are_uncorrelated(num_examples):
    records = read(0, num_examples, num_examples=num_examples, seed=1)
    assert_uncorrelated(records[:-1], records[1:])


@pytest.mark.parametrize('num_examples', [2, 5, 20, 50])
def test_few_records_too_come_in_all_orders(num_examples):
    epochs = read(0, 600 * num_examples, num_examples=num_examples).reshape(600, num_examples)
    for place in (0, num_examples - 1):
        assert_looks_random((epochs[:, place] + 0.5) / num_examples, bins=num_examples)
    fixed_points = np.sum(epochs == np.arange(num_examples)) / 600
    assert abs(fixed_points - 1) < 4 / np.sqrt(600)


def test_example_seeds_hold_the_seed_and_the_whole_position():
    seeds = order.example_seeds(tf.constant([5, 2**31 + 6, 2**61 + 7]), seed=2**31 - 1)
    assert seeds.dtype == tf.int32
    np.testing.assert_array_equal(
        seeds, [[2**31 - 1, 0, 5], [2**31 - 1, 1, 6], [2**31 - 1, 2**30, 7]]
    )


@pytest.mark.parametrize('draw', [0, 1, 17])
def test_numbers_of_successive_examples_are_uniform_and_independent(draw):
    numbers = order.uniform(keys(20_000), draw).numpy()
    assert_looks_random(numbers)
    assert_uncorrelated(numbers[:-1], numbers[1:])


def test_draws_and_seeds_and_folds_are_independent_of_each_other():
    base = order.uniform(keys(20_000), 0)
    for other in (
        order.uniform(keys(20_000), 1),
        order.uniform(keys(20_000, seed=1), 0),
        order.uniform(keys(20_000, seed=256), 0),
        order.uniform(keys(20_000, first=2**31), 0),
        order.uniform(order.fold(keys(20_000), 0), 0),
        order.uniform(order.fold(keys(20_000), 1), 0),
    ):
        assert_looks_random(other.numpy())
        assert_uncorrelated(base, other)


def test_different_folds_are_independent_of_each_other():
    first, second = (order.uniform(order.fold(keys(20_000), number), 0) for number in (0, 1))
    assert_uncorrelated(first, second)


def test_a_number_depends_on_its_own_key_alone():
    together = order.uniform(keys(100), 2).numpy()
    np.testing.assert_array_equal(order.uniform(keys(10, first=50), 2), together[50:60])


def test_numbers_stay_below_the_upper_bound():
    numbers = order.uniform(keys(1000), 0, 2.0**24, 2.0**24 + 2)
    assert set(numbers.numpy()) == {2.0**24}
    moved = order.uniform(keys(20_000), 0, -3.0, 5.0).numpy()
    assert moved.min() >= -3
    assert moved.max() < 5
    assert_looks_random((moved + 3) / 8)
