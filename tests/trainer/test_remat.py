import keras
import pytest

from tests.trainer.training import CLASSES, Training, assert_close
from trainer.errors import ConfigError
from trainer.remat import rematerialise


@keras.saving.register_keras_serializable('tests')
class Block(keras.layers.Layer):
    """Dropout and moving statistics, which a second computation must neither change nor miss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(8, activation='relu')
        self.norm = keras.layers.BatchNormalization(momentum=0.8)
        self.drop = keras.layers.Dropout(0.4)

    def call(self, x, training=False):
        return self.drop(self.norm(self.dense(x), training=training), training=training)


def blocks():
    return keras.Sequential(
        [*(Block(name=f'block_{i}') for i in range(3)), keras.layers.Dense(CLASSES, name='head')]
    )


def run(strategy, patterns=(), **options):
    training = Training(strategy, blocks, **options)
    rematerialise(training.state.model, patterns)
    return training.run(5), training.variables()


@pytest.mark.parametrize('options', [{}, {'accumulate': 2}], ids=['whole', 'accumulated'])
def test_training_is_the_same(strategy, options):
    found = run(strategy, ['block_*'], **options)
    for one, other in zip(found, run(strategy, **options), strict=True):
        assert_close(one, other)


def test_a_layer_is_computed_twice(make_strategy):
    counted = []

    class Counting(Block):
        def call(self, x, training=False):
            counted.append(self.name)
            return super().call(x, training=training)

    def model():
        return keras.Sequential([Counting(name='block'), keras.layers.Dense(CLASSES)])

    calls = []
    for patterns in ([], ['block']):
        training = Training(make_strategy(1), model)
        rematerialise(training.state.model, patterns)
        counted.clear()
        training.run(1)
        calls.append(len(counted))
    assert calls[1] == calls[0] + 1


def test_a_pattern_of_no_layer_is_refused_with_the_nearest(make_strategy):
    with pytest.raises(ConfigError, match=r"'blok_\*', which is no layer .* nearest are block_"):
        run(make_strategy(1), ['blok_*'])
