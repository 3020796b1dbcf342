"""What the wide and the deep part each see."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import ConfigError
from trainer.models.wide_and_deep import wide_and_deep
from trainer.state import build_model

SPEC = {
    'features': tf.TensorSpec([None, 4], tf.float32),
    'crosses': tf.TensorSpec([None, 6], tf.float32),
}


def inputs(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(3, spec.shape[1])) for name, spec in SPEC.items()}


@pytest.fixture
def model():
    maker = functools.partial(wide_and_deep, 2, units=(5,), scale=3.0, offset=7.0)
    return build_model(maker, SPEC)[0]


def test_the_output_is_the_scaled_sum_of_a_linear_model_and_a_perceptron(model):
    given = inputs(0)
    wide, bias = (v.numpy() for v in model.wide.weights)
    hidden, hidden_bias = (v.numpy() for v in model.hidden[0].weights)
    (deep,) = (v.numpy() for v in model.deep.weights)
    x = given['features']
    linear = np.concatenate([x, given['crosses']], axis=1) @ wide + bias
    perceptron = np.maximum(x @ hidden + hidden_bias, 0) @ deep
    expected = 3.0 * (linear + perceptron) + 7.0
    np.testing.assert_allclose(model(given), expected, rtol=1e-5)


def test_crosses_count_linearly_alone(model):
    a, b = inputs(0), inputs(1)
    b['features'] = a['features']
    middle = {**a, 'crosses': (a['crosses'] + b['crosses']) / 2}
    np.testing.assert_allclose(model(middle), (model(a) + model(b)) / 2, rtol=1e-5)


def test_other_inputs_and_no_layers_are_refused():
    strange = {**SPEC, 'crosess': SPEC['crosses']}
    with pytest.raises(ConfigError, match=r"not 'crosess'\. Did you mean 'crosses'"):
        build_model(functools.partial(wide_and_deep, 2), strange)
    with pytest.raises(ConfigError, match="lacks the input 'features'"):
        build_model(functools.partial(wide_and_deep, 2), {'crosses': SPEC['crosses']})
    with pytest.raises(ConfigError, match='take the model `linear`'):
        wide_and_deep(2, units=())
