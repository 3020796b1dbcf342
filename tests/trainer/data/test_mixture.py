import collections

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.data.mixture import mixture
from trainer.data.pipeline import eval_batches, train_batches
from trainer.data.subset import subset
from trainer.errors import ConfigError


def source(first, count, **more):
    numbers = np.arange(first, first + count)
    return Arrays({'image': numbers.astype(np.float32)[:, None], 'label': numbers % 7, **more})


def order_of(mixed, positions, seed=3):
    return mixed.records(tf.constant(positions, tf.int64), seed=seed).numpy()


def small_large(weights=(3, 1)):
    return mixture([source(0, 10), source(1000, 200)], weights)


def test_every_block_holds_each_source_in_its_share():
    records = order_of(small_large(), range(3 * 1024))
    for block in records.reshape(3, 1024):
        assert np.sum(block < 10) == 768


@pytest.mark.parametrize(
    ('weights', 'block'),
    [
        ((3, 1), (768, 256)),
        ((0.1, 0.9), (102, 918)),
        ((2, 4), (341, 682)),
        ((1, 2.5), (292, 730)),
        ((1, 2e-3), (1020, 2)),
    ],
    ids=str,
)
def test_shares_are_as_they_were_written(weights, block):
    first = order_of(small_large(weights), range(sum(block)))
    assert (np.sum(first < 10), np.sum(first >= 10)) == block


def test_the_sources_are_mixed_within_a_block():
    small = order_of(small_large((1, 1)), range(1024)) < 10
    # How often the next one is of the other source; of fair coins 512 times, give or take 16.
    assert abs(np.sum(small[1:] != small[:-1]) - 512) < 80


def test_without_weights_each_has_the_share_of_its_size():
    records = order_of(small_large(None), range(1008))
    assert np.sum(records < 10) == 48


def test_each_source_is_read_in_epochs_of_its_own():
    records = order_of(small_large((1, 1)), range(1024))
    small, large = records[records < 10], records[records >= 10]
    for epoch in small[:510].reshape(-1, 10):
        assert sorted(epoch) == list(range(10))
    for epoch in large[:400].reshape(-1, 200):
        assert sorted(epoch) == list(range(10, 210))
    assert len({tuple(epoch) for epoch in small[:510].reshape(-1, 10)}) == 51


def test_sources_of_equal_size_are_not_read_in_step():
    mixed = mixture([source(0, 50), source(1000, 50)])
    records = order_of(mixed, range(1024))
    first, second = records[records < 50], records[records >= 50] - 50
    assert np.mean(first == second) < 0.1


def test_any_position_is_known_without_those_before():
    mixed = small_large()
    whole = order_of(mixed, range(500))
    np.testing.assert_array_equal(order_of(mixed, range(123, 500)), whole[123:])
    assert not np.array_equal(order_of(mixed, range(500), seed=4), whole)


def test_records_come_from_the_right_source():
    mixed = small_large()
    ids = np.array([209, 3, 10, 9, 3])
    features = mixed.fetch(tf.constant(ids))
    expected = np.where(ids < 10, ids, ids + 990)
    np.testing.assert_array_equal(features['image'][:, 0], expected)
    np.testing.assert_array_equal(features['label'], expected % 7)


def test_a_batch_may_hold_nothing_of_a_source():
    features = small_large().fetch(tf.constant([3, 4], tf.int64))
    np.testing.assert_array_equal(features['image'][:, 0], [3, 4])


def test_batches_are_the_same_on_any_topology(strategy):
    iterator = train_batches(
        Data(small_large()), strategy, seed=3, global_batch_size=8, start_step=2
    )
    found = []
    for _ in range(5):
        batches = strategy.experimental_local_results(next(iterator))
        found += np.concatenate([b['ids'] for b in batches]).tolist()
        images = np.concatenate([b['inputs'] for b in batches])[:, 0]
        ids = np.array(found[-8:])
        np.testing.assert_array_equal(images, np.where(ids < 10, ids, ids + 990))
    assert found == order_of(small_large(), range(16, 56)).tolist()


def test_evaluation_reads_every_example_once(make_strategy):
    iterator, steps = eval_batches(Data(small_large()), make_strategy(2), global_batch_size=16)
    seen = collections.Counter()
    for _ in range(steps):
        for batch in make_strategy(2).experimental_local_results(next(iterator)):
            seen.update(batch['ids'].numpy().tolist())
    del seen[-1]
    assert seen == dict.fromkeys(range(210), 1)


def test_parts_and_mixtures_can_be_mixed_again():
    inner = mixture([source(0, 10), subset(source(100, 40), end=0.5)])
    outer = mixture([inner, source(1000, 10)], [1, 1])
    records = order_of(outer, range(1024))
    assert np.sum(records >= 30) == 512
    assert sorted(set(records[records < 30])) == list(range(30))
    assert outer.where(35) == 'record 5'
    assert outer.bounds('label') == (0, 6)


def test_the_fingerprint_tells_sources_and_weights_apart():
    mixed = [
        small_large(),
        small_large((1, 1)),
        mixture([source(0, 10), source(1000, 201)], (3, 1)),
        mixture([source(1000, 200), source(0, 10)], (3, 1)),
    ]
    assert len({each.fingerprint for each in mixed}) == 4
    assert small_large((6, 2)).fingerprint == mixed[0].fingerprint


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: mixture([]), 'at least one source'),
        (lambda: small_large((1,)), '2 sources but 1 weights'),
        (lambda: small_large((1, 0)), '0 is not above 0'),
        (lambda: small_large((1, 1e-6)), 'less than one in 1024'),
        (
            lambda: mixture([source(0, 3), source(0, 3, weight=np.ones(3, np.float32))]),
            r'number 2 has image float32\[1\], label int64\[\], weight float32\[\]',
        ),
    ],
)
def test_what_cannot_be_mixed_is_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class Named(Arrays):
    def __init__(self, class_names):
        super().__init__({'image': np.zeros([4, 1], np.float32), 'label': np.arange(4) % 2})
        self.class_names = class_names


def test_classes_must_be_the_same_in_all_sources():
    assert mixture([Named(('cat', 'dog')), Named(('cat', 'dog')), source(0, 3)]).num_examples == 11
    with pytest.raises(ConfigError, match='first one are cat, dog, of number 2 bird, dog'):
        mixture([Named(('cat', 'dog')), Named(('bird', 'dog'))])
