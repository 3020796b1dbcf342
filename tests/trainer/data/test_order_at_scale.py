"""The order on data and clusters that no machine here could hold: what was proved small holds."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import order
from trainer.data.pipeline import shares

RECORDS = 10**12
WORKERS = 4096
BATCH = 2**16


def records_of(positions, *, num_examples=RECORDS, seed=0):
    positions = tf.constant(positions, tf.int64)
    return order.records(positions, num_examples=num_examples, seed=seed).numpy()


@functools.cache
def graph(replicas):
    """What each of the 4,096 workers computes, as one graph for all of them."""

    @tf.function
    def rows(step, worker):
        return shares(
            step * replicas + tf.range(replicas, dtype=tf.int64),
            global_batch_size=BATCH,
            num_replicas=WORKERS * replicas,
            num_local=replicas,
            first_replica=worker * replicas,
        )

    return rows


def positions_of(step, worker, replicas):
    """The positions that a worker of 4,096 reads in a step, a row for each of its replicas."""
    return graph(replicas)(tf.constant(step, tf.int64), tf.constant(worker, tf.int64)).numpy()


@pytest.mark.parametrize('seed', [0, 2**31 - 1])
def test_every_epoch_of_every_small_data_set_has_every_record_once(seed):
    for num_examples in range(1, 301):
        epochs = np.array([0, 1, 2**20])
        positions = epochs[:, np.newaxis] * num_examples + np.arange(num_examples)
        records = records_of(positions.ravel(), num_examples=num_examples, seed=seed)
        expected = np.broadcast_to(np.arange(num_examples), positions.shape)
        np.testing.assert_array_equal(np.sort(records.reshape(positions.shape)), expected)


@pytest.mark.parametrize('replicas', [1, 2, 8])
# In the first epoch, across its end, and where positions need more than 42 bits.
@pytest.mark.parametrize('step', [0, 1, RECORDS // BATCH, 2**26])
def test_workers_share_each_global_batch_without_overlap_gap_or_favour(step, replicas):
    parts = [positions_of(step, worker, replicas) for worker in range(WORKERS)]
    assert {part.shape for part in parts} == {(replicas, BATCH // WORKERS // replicas)}
    # In the order of workers and replicas too, so that any other topology has the same batch.
    together = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(together, order.positions(step, BATCH))


def test_a_sample_of_an_epoch_of_a_trillion_has_no_record_twice():
    rng = np.random.default_rng(0)
    positions = np.unique(rng.integers(0, RECORDS, 400_000))
    for epoch in (0, 3):
        records = records_of(epoch * RECORDS + positions)
        assert len(np.unique(records)) == len(positions)
        assert records.min() >= 0
        assert records.max() < RECORDS
    # Neighbours too, where a cipher that is too weak would show first.
    assert len(np.unique(records_of(np.arange(400_000)))) == 400_000


def test_the_slices_of_a_batch_are_alike_in_what_they_read():
    """Each worker's records are spread over all the data: no shard of a file feeds one worker."""
    steps = range(64)
    for worker in (0, 1, 2047, 4095):
        positions = np.concatenate([positions_of(step, worker, 1).ravel() for step in steps])
        records = records_of(positions)
        counts = np.histogram(records, 16, (0, RECORDS))[0]
        expected = len(records) / 16
        # Chi-squared with 15 degrees of freedom: beyond 50 by chance once in 80,000.
        assert np.sum((counts - expected) ** 2) / expected < 50, counts


def test_any_step_is_the_same_for_who_comes_to_it_and_for_who_begins_there():
    size = BATCH // WORKERS
    walked = [records_of(positions_of(step, 77, 2).ravel()) for step in range(40)]
    assert {len(records) for records in walked} == {size}
    # At once, as a pipeline does for some steps, and one by one.
    at_once = records_of(np.concatenate([positions_of(s, 77, 2).ravel() for s in range(17, 40)]))
    np.testing.assert_array_equal(at_once, np.concatenate(walked[17:]))
