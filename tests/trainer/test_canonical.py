"""Elastic bits: the same state on any number of replicas."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from tests.trainer.training import Training, make_data, noisy
from trainer import canonical
from trainer.errors import ConfigError


def test_shards_are_summed_as_a_tree():
    rows = np.float32([1e8, 1.0, -1e8, 1.0])
    found = canonical.sum_of(lambda index: [tf.gather(tf.constant(rows), index)], 4)
    assert found[0].numpy() == (rows[0] + rows[1]) + (rows[2] + rows[3]) != rows.sum(dtype=float)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_any_number_of_replicas_ends_with_the_same_bits(make_strategy, accumulate):
    """With dropout, batch normalisation by shard, weights, a penalty and clipping."""
    weight = np.linspace(0, 2, 24).astype(np.float32)
    data = make_data({'weight': weight}, weight='weight')
    optimizer = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9, global_clipnorm=0.1)
    hashes = {
        replicas: (
            run := Training(
                make_strategy(replicas),
                noisy,
                optimizer,
                data,
                canonical_shards=4,
                accumulate=accumulate,
            )
        ).run(6)
        and run.sha256()
        for replicas in (1, 2, 4)
    }
    assert len(set(hashes.values())) == 1, hashes


def test_without_shards_the_bits_differ(make_strategy):
    """Or the test above would show nothing."""
    found = [Training(make_strategy(replicas), noisy) for replicas in (1, 2)]
    assert len({(run.run(6) and run.sha256()) for run in found}) == 2


def test_a_run_goes_on_with_the_same_bits_on_two_four_and_one_replica(make_strategy, tmp_path):
    whole = tiny.run(make_strategy(2), tmp_path / 'whole', canonical_shards=4)
    parts = tmp_path / 'parts'
    for replicas, steps in ((2, 10), (4, 17), (1, None)):
        found = tiny.run(make_strategy(replicas), parts, canonical_shards=4, max_steps=steps)
    assert found.step == whole.step
    assert found.state_sha256 == whole.state_sha256


@pytest.mark.parametrize(
    ('shards', 'replicas', 'said'),
    [
        (6, 2, 'canonical_shards = 6 is no power of two'),
        (0, 1, 'canonical_shards = 0 is no power of two'),
        (4, 3, 'cannot be shared equally by 3 replicas'),
        (2, 4, 'cannot be shared equally by 4 replicas'),
    ],
)
def test_shards_that_cannot_be_shared_are_refused(shards, replicas, said):
    with pytest.raises(ConfigError, match=said):
        canonical.check(shards, replicas)


def test_a_batch_that_the_shards_cannot_share_is_refused(make_strategy, tmp_path):
    with pytest.raises(ConfigError, match='by 16 replicas'):
        tiny.run(make_strategy(1), tmp_path, canonical_shards=16)
