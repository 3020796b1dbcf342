import itertools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays
from trainer.data.mixture import mixture
from trainer.data.one_hot import one_hot
from trainer.data.subset import subset
from trainer.errors import ConfigError

N = 103


def whole(num_examples=N):
    numbers = np.arange(num_examples)
    return Arrays({'x': numbers.astype(np.float32), 'label': numbers % 5})


def members(part):
    features = part.fetch(tf.range(part.num_examples, dtype=tf.int64))
    return features['x'].numpy().astype(int).tolist()


@pytest.mark.parametrize('cuts', [(0.1,), (0.25, 0.5, 0.75), (0.333, 0.667)], ids=str)
def test_ranges_that_follow_each_other_part_the_whole(cuts):
    edges = [0.0, *cuts, 1.0]
    parts = [subset(whole(), low, high) for low, high in itertools.pairwise(edges)]
    found = [members(part) for part in parts]
    assert sorted(itertools.chain(*found)) == list(range(N))
    sizes = [round(high * N) - round(low * N) for low, high in itertools.pairwise(edges)]
    assert [part.num_examples for part in parts] == sizes


def test_which_examples_are_in_it_depends_on_the_seed_alone():
    assert members(subset(whole(), end=0.2)) == members(subset(whole(), end=0.2))
    assert set(members(subset(whole(), end=0.2))) != set(members(subset(whole(), end=0.2, seed=1)))


def test_a_small_subset_is_a_fair_sample():
    part = members(subset(whole(10_000), end=0.1))
    assert len(part) == 1000
    # Mean and classes of a sample without replacement: within four standard deviations.
    assert abs(np.mean(part) - 4999.5) < 4 * 2886.8 / np.sqrt(1000)
    counts = np.bincount(np.array(part) % 5, minlength=5)
    assert np.all(np.abs(counts - 200) < 4 * np.sqrt(1000 * 0.2 * 0.8))


def test_a_subset_is_a_source_like_any_other():
    part = subset(whole(), end=0.1)
    assert part.element_spec == whole().element_spec
    assert part.bounds('label') == (0, 4)
    assert part.where(0) == f'record {members(part)[0]}'
    assert set(members(subset(part, end=0.5))) < set(members(part))


def test_the_fingerprint_tells_parts_apart():
    parts = [
        subset(whole()),
        subset(whole(), end=0.5),
        subset(whole(), begin=0.5),
        subset(whole(), end=0.5, seed=1),
        subset(whole(104), end=0.5),
    ]
    assert len({part.fingerprint for part in parts}) == len(parts)
    assert subset(whole(), end=0.5).fingerprint == parts[1].fingerprint


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'begin': 0.5, 'end': 0.5}, 'from 0.5 to 0.5 is none'),
        ({'end': 10}, 'fractions from 0 to 1'),
        ({'begin': -0.1}, 'fractions from 0 to 1'),
        ({'end': 0.001}, 'of 103 examples holds none'),
        ({'seed': -1}, 'subset.seed is -1'),
    ],
    ids=str,
)
def test_what_is_no_part_is_told(arguments, message):
    with pytest.raises(ConfigError, match=message):
        subset(whole(), **arguments)


def test_a_part_of_a_changed_source_is_one_of_it_with_the_names_of_its_classes():
    named = whole()
    named.class_names = ('a', 'b', 'c', 'd', 'e')
    part = subset(one_hot(named, 5), end=0.2)
    assert part.class_names == named.class_names
    assert members(part) == members(subset(named, end=0.2))
    assert members(subset(part, end=0.5)) == members(subset(subset(named, end=0.2), end=0.5))
    # Epochs of the part, and not of the whole.
    positions = tf.range(part.num_examples, dtype=tf.int64)
    assert sorted(part.records(positions, seed=3).numpy()) == list(range(part.num_examples))


def test_of_what_has_an_order_of_its_own_no_part_is_taken():
    mixed = mixture([whole(), whole()], [1, 3])
    with pytest.raises(ConfigError, match='A Mixture has an order of its own'):
        subset(mixed, end=0.5)
