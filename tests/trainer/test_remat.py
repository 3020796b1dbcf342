import keras
import numpy as np
import pytest

from tests.trainer.training import CLASSES, FEATURES, Training, assert_close, make_data
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


class Own(keras.layers.Layer):
    """Weights of its own, which a layer reads in the precision it computes in; two outputs."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 8), name='kernel')

    def call(self, x):
        return keras.ops.tanh(keras.ops.matmul(x, self.kernel)), None


class OwnModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Own(name='block')
        self.head = keras.layers.Dense(CLASSES, dtype='float32')

    def call(self, x):
        x, _ = self.block(x)
        return self.head(x)


def own():
    return OwnModel()


def masked():
    words = keras.Sequential(
        [keras.layers.Embedding(9, 8, mask_zero=True), keras.layers.Dense(8)], name='block'
    )
    return keras.Sequential([words, keras.layers.Dense(CLASSES, dtype='float32')])


def frozen():
    model = blocks()
    model.build((None, FEATURES))
    model.layers[0].dense.trainable = False
    return model


def words():
    tokens = np.random.default_rng(0).integers(0, 4, (24, 6)) * 2
    return make_data({'image': tokens, 'label': tokens // 2})


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize(
    ('model', 'data'),
    [(own, None), (masked, words), (frozen, None)],
    ids=['weights of its own', 'mask', 'frozen'],
)
def test_any_layer_trains_the_same_in_any_precision(make_strategy, model, data, precision):
    found = []
    for patterns in ((), ('block*',)):
        training = Training(make_strategy(2), model, data=data and data(), precision=precision)
        rematerialise(training.state.model, patterns)
        found.append((training.run(4), training.variables()))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-5 if precision == 'float32' else 1e-2, atol=1e-3)


def test_what_is_frozen_keeps_its_bits(make_strategy):
    training = Training(make_strategy(3), frozen, batch_size=9)
    rematerialise(training.state.model, ['block_*'])
    kernel = training.state.model.layers[0].dense.kernel
    before = kernel.numpy()
    training.run(3)
    assert kernel.numpy().tobytes() == before.tobytes()


def test_a_layer_that_adds_losses_is_refused(make_strategy):
    class Adding(Block):
        def call(self, x, training=False):
            self.add_loss(keras.ops.sum(x))
            return super().call(x, training=training)

    def model():
        return keras.Sequential([Adding(name='block'), keras.layers.Dense(CLASSES)])

    training = Training(make_strategy(1), model)
    rematerialise(training.state.model, ['block'])
    with pytest.raises(ConfigError, match="the layer 'block', which adds losses of its own"):
        training.run(1)
