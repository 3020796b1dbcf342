"""The ready-made models: shapes, sizes counted by hand, and logits in float32."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.models.cnn import cnn
from trainer.models.linear import linear
from trainer.models.mlp import mlp
from trainer.models.resnet import resnet
from trainer.models.vit import vit
from trainer.models.wide_and_deep import wide_and_deep
from trainer.state import build_model

SPEC = tf.TensorSpec([None, 8, 8, 3], tf.float32)


def norm(channels):
    return 2 * channels, 2 * channels  # trainable, statistics


def cnn_size():
    """A 2x2 convolution of 3 channels, pooling to 3x3, a dense layer, a norm, logits."""
    trainable, moving = norm(6)
    return (2 * 2 * 3 * 5 + 5) + (3 * 3 * 5 * 6 + 6) + trainable + (6 * 10 + 10), moving


def resnet_size():
    """A stem, stages of 4 and 8 channels, the second with a projection, logits."""
    kernels = 9 * 3 * 4 + 2 * (9 * 4 * 4) + (9 * 4 * 8 + 9 * 8 * 8 + 4 * 8)
    channels = 4 + 2 * 4 + 3 * 8
    return kernels + norm(channels)[0] + 8 * 10 + 10, norm(channels)[1]


def mlp_size():
    """A projection, two residual blocks, a norm, logits."""
    block = 2 * 6 + (6 * 12 + 12) + (12 * 6 + 6)
    return (8 * 8 * 3 * 6 + 6) + 2 * block + 2 * 6 + (6 * 10 + 10), 0


def vit_size():
    """Patches of 4x4, learned positions, a block of attention and dense layers, a norm, logits."""
    attention = 3 * (8 * 8 + 8) + 8 * 8 + 8
    block = 2 * 8 + attention + 2 * 8 + (8 * 32 + 32) + (32 * 8 + 8)
    return (4 * 4 * 3 * 8 + 8) + 2 * 2 * 8 + block + 2 * 8 + 8 * 10 + 10, 0


def linear_size():
    return 8 * 8 * 3 * 10 + 10, 0


def wide_and_deep_size():
    """All features to the logits, hidden layers of 6 and 5 units, and those to the logits."""
    features = 8 * 8 * 3
    return (features * 10 + 10) + (features * 6 + 6) + (6 * 5 + 5) + 5 * 10, 0


MODELS = {
    'cnn': (functools.partial(cnn, 10, filters=5, units=6), cnn_size()),
    'cnn with input': (functools.partial(cnn, 10, (8, 8, 3), filters=5, units=6), cnn_size()),
    'resnet': (functools.partial(resnet, 10, (8, 8, 3), filters=4, blocks=(1, 1)), resnet_size()),
    'vit': (
        functools.partial(
            vit,
            10,
            (8, 8, 3),
            patch=4,
            units=8,
            blocks=1,
            heads=2,
            positions='learned',
            dropout=0.1,
        ),
        vit_size(),
    ),
    'mlp': (functools.partial(mlp, 10, units=6, blocks=2), mlp_size()),
    'linear': (functools.partial(linear, 10, l2=0.1), linear_size()),
    'wide and deep': (functools.partial(wide_and_deep, 10, units=(6, 5)), wide_and_deep_size()),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def test_sizes_are_those_counted_by_hand(case):
    maker, (trainable, moving) = case
    model, outputs = build_model(maker, SPEC)
    assert tuple(outputs.shape) == (None, 10)
    assert count(model.trainable_variables) == trainable
    statistics = [v for v in model.non_trainable_variables if 'seed' not in v.path]
    assert count(statistics) == moving


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_logits_are_float32_in_any_precision_and_differ_with_the_image(case, precision):
    model, outputs = build_model(case[0], SPEC, precision=precision)
    computed = {layer.compute_dtype for layer in model._flatten_layers() if layer is not model}
    assert ('bfloat16' in computed) == (precision == 'bfloat16')
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    logits = model(images).numpy()
    assert logits.dtype == outputs.dtype == 'float32'
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize('name', ['cnn', 'vit', 'mlp', 'wide and deep'])
def test_dropout_is_there_in_training_alone(name):
    model, _ = build_model(MODELS[name][0], SPEC)
    image = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    same = [np.array_equal(model(image, training=t), model(image, training=t)) for t in (0, 1)]
    assert same == [True, False]


def test_penalties_are_there_where_they_are_promised():
    for maker in (
        functools.partial(cnn, 10, l2=0.5),
        functools.partial(resnet, 10, (8, 8, 3)),
        functools.partial(linear, 10, l2=0.5),
        functools.partial(wide_and_deep, 10, l2=0.5),
    ):
        model, _ = build_model(maker, SPEC)
        penalised = [v for v in model.trainable_variables if v.regularizer is not None]
        expected = sum(v.regularizer(v.value) for v in penalised)
        assert penalised
        np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-6)


def test_the_names_of_variables_do_not_depend_on_what_was_built_before():
    for maker, _ in MODELS.values():
        paths = [[v.path for v in build_model(maker, SPEC)[0].variables] for _ in range(2)]
        assert paths[0] == paths[1]
    assert keras.backend.floatx() == 'float32'
