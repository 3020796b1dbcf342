"""The range test takes the steps that training would take."""

import keras
import numpy as np
import pytest

from tests.trainer.training import BATCH, LOSS, dense, make_data, noisy, sgd
from trainer.errors import ConfigError
from trainer.range_test import range_test


def losses(strategy, model=dense, **options):
    found = range_test(
        strategy=strategy, model=model, optimizer=sgd(), loss=LOSS, train_data=make_data(),
        batch_size=BATCH, lowest=1e-3, highest=1e-1, steps=10, **options,
    )  # fmt: skip
    return found.losses


def test_the_users_own_step_is_taken(make_strategy):
    def step(model, weights, batch):
        outputs = model(batch['inputs'], training=True)
        return 0.0 * outputs[:, 0] + 3.0, [0.0 * weight for weight in weights]

    np.testing.assert_array_equal(losses(make_strategy(1), train_step=step), [3.0] * 10)


def test_layers_are_rematerialised(make_strategy):
    calls = []

    class Counting(keras.layers.Dense):
        def call(self, inputs):
            calls.append(self.name)
            return super().call(inputs)

    def model():
        return keras.Sequential([Counting(4, name='counting')])

    plain = losses(make_strategy(1), model)
    once = len(calls)
    np.testing.assert_allclose(
        losses(make_strategy(1), model, remat=['counting']), plain, rtol=1e-5
    )
    assert len(calls) - once > once


def test_sums_of_canonical_shards_have_the_same_bits_on_two_replicas(make_strategy):
    one, two = (losses(make_strategy(r), noisy, canonical_shards=4) for r in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_shards_that_replicas_cannot_share_are_refused(make_strategy):
    with pytest.raises(ConfigError, match='canonical_shards = 3 is no power of two'):
        losses(make_strategy(1), canonical_shards=3)
