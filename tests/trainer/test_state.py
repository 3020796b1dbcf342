"""The state is complete, is named the same in every process, and comes back bit by bit."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.training import (
    CLASSES,
    FEATURES,
    Training,
    assert_equal,
    dense,
    noisy,
    sgd,
)
from trainer.errors import ConfigError
from trainer.state import build_state

layers = keras.layers
SPEC = tf.TensorSpec([None, FEATURES], tf.float32)
COUNTERS = {
    'phalanx/step',
    'phalanx/skipped',
    'phalanx/loss_scale',
    'phalanx/good_steps',
}


@pytest.fixture
def build(make_strategy):
    """Builds a state under two replicas; the defaults are a dense layer and SGD."""

    def build(model=dense, optimizer=None, spec=SPEC, **options):
        return build_state(make_strategy(2), model, optimizer or sgd(), spec, **options)

    return build


def arrays(state):
    return {path: np.array(value) for path, value in state.snapshot().items()}


# ---- What is in it.


def test_weights_statistics_slots_and_counters_are_in_and_nothing_else(build):
    state = build(noisy, keras.optimizers.Adam)
    weights = {
        f'sequential/{name}'
        for name in (
            'dense/kernel',
            'dense/bias',
            'batch_normalization/gamma',
            'batch_normalization/beta',
            'dense_1/kernel',
            'dense_1/bias',
        )
    }
    statistics = {f'sequential/batch_normalization/moving_{m}' for m in ('mean', 'variance')}
    slots = {
        f'adam/{path.replace("/", "_")}_{slot}'
        for path in weights
        for slot in ('momentum', 'velocity')
    }
    assert set(state.variables) == weights | statistics | slots | {'adam/iteration'} | COUNTERS
    assert list(state.variables) == sorted(state.variables)
    assert len(state.seeds) == 1  # which is left out: seeds are functions of the step


def test_the_learning_rate_is_left_to_the_configuration(build):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    plain, scheduled = build(), build(optimizer=sgd(schedule))
    assert plain.optimizer.learning_rate in plain.optimizer.variables
    assert set(plain.variables) == set(scheduled.variables)
    assert not [path for path in plain.variables if 'learning_rate' in path]


def test_averages_of_the_weights_are_in(build):
    extra = set(build(optimizer=sgd(use_ema=True)).variables) - set(build().variables)
    assert extra == {
        'averages/sequential/dense/kernel',
        'averages/sequential/dense/bias',
    }


def test_without_an_optimizer_the_state_is_the_model(make_strategy):
    state = build_state(make_strategy(2), dense, None, SPEC)
    assert set(state.variables) == {'sequential/dense/kernel', 'sequential/dense/bias'}


def test_names_and_values_are_the_same_however_often_it_is_built(build):
    first, second = arrays(build(noisy, seed=5)), arrays(build(noisy, seed=5))
    assert_equal(second, first)
    assert any((v != first[path]).any() for path, v in arrays(build(noisy, seed=6)).items())


class Twins(keras.Model):
    """Two layers that were given one name."""

    def __init__(self):
        super().__init__()
        self.one, self.two = layers.Dense(3, name='twin'), layers.Dense(CLASSES, name='twin')

    def call(self, x):
        return self.two(self.one(x))


def test_layers_of_one_name_keep_their_variables_apart(build):
    state = build(Twins, sgd(0.1, momentum=0.9))
    shapes = {path: tuple(v.shape) for path, v in state.variables.items() if 'kernel' in path}
    first, second = (FEATURES, 3), (3, CLASSES)
    assert shapes['twins/twin/kernel'] == first
    assert shapes['twins/twin/kernel~2'] == second
    assert sorted(shapes.values()) == sorted([first, second] * 2)
    held = [*state.model.variables, *state.optimizer.variables]
    assert len(state.variables) == len(held) - 1 + len(COUNTERS)  # all but the learning rate


# ---- Snapshots and restoring.


def test_later_steps_leave_a_snapshot_as_it_was(strategy):
    training = Training(strategy, noisy, sgd(0.1, momentum=0.9))
    training.run()
    snapshot = training.state.snapshot()
    copies = {path: np.array(value) for path, value in snapshot.items()}
    training.run(3)
    assert_equal({path: np.asarray(v) for path, v in snapshot.items()}, copies)
    changed = [
        path for path, value in training.variables().items() if (value != copies[path]).any()
    ]
    assert {'phalanx/step', 'sequential/dense/kernel', 'sgd/iteration'} <= set(changed)


def test_restoring_sets_the_copy_of_every_replica(strategy):
    state = build_state(strategy, noisy, functools.partial(keras.optimizers.Adam, 0.1), SPEC)
    rng = np.random.default_rng(0)
    tensors = {
        path: (100 * rng.random(v.shape)).astype(v.dtype.as_numpy_dtype)
        for path, v in state.variables.items()
    }
    state.restore(tensors)
    assert_equal(arrays(state), tensors)
    for path, variable in state.variables.items():
        for copy in strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(copy.numpy(), tensors[path], err_msg=path)


def test_a_model_alone_takes_its_part_of_a_whole_state(build, make_strategy):
    tensors = arrays(build(noisy, seed=1))
    state = build_state(make_strategy(2), noisy, None, SPEC, seed=2)
    state.restore(tensors)
    assert_equal(arrays(state), {path: tensors[path] for path in state.variables})


def wrong(kind):
    kernel = 'sequential/dense/kernel'

    def change(tensors):
        if kind == 'missing':
            del tensors[kernel]
        elif kind == 'extra':
            tensors['sequential/dense_9/kernel'] = np.zeros(3)
        elif kind == 'shape':
            tensors[kernel] = np.zeros([FEATURES, 9], np.float32)
        else:
            tensors[kernel] = tensors[kernel].astype(np.float64)

    return change


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('missing', "'sequential/dense/kernel' is not in the checkpoint"),
        ('extra', "'sequential/dense_9/kernel' is only in it"),
        ('shape', r"'sequential/dense/kernel' as float32\[5, 9\], the model as float32\[5, 4\]"),
        ('dtype', r"'sequential/dense/kernel' as float64\[5, 4\], the model as float32\[5, 4\]"),
    ],
)
def test_the_state_of_another_model_is_refused_by_path_and_changes_nothing(build, kind, message):
    state = build()
    before = arrays(state)
    tensors = {path: value + 1 for path, value in before.items()}
    wrong(kind)(tensors)
    with pytest.raises(ConfigError, match=message) as error:
        state.restore(tensors)
    assert 'use another model_dir' in error.value.message
    assert_equal(arrays(state), before)


# ---- What it is built from.


def functional():
    inputs = layers.Input([FEATURES])
    return keras.Model(inputs, layers.Dense(CLASSES)(inputs))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.logits = layers.Dense(CLASSES)

    def call(self, x):
        return self.logits(x)


def with_input():
    return keras.Sequential([layers.Input([FEATURES]), layers.Dense(CLASSES)])


@pytest.mark.parametrize('model', [dense, with_input, functional, Subclassed])
def test_any_kind_of_model_is_built_from_the_shape_of_the_data(build, model):
    state = build(model)
    assert state.num_parameters == FEATURES * CLASSES + CLASSES
    assert tuple(state.output_spec.shape) == (None, CLASSES)


def test_a_model_of_several_inputs_and_outputs_is_built_from_a_dict(build):
    def model():
        inputs = {'a': layers.Input([2], name='a'), 'b': layers.Input([3], name='b')}
        outputs = {'x': layers.Dense(4)(inputs['a']), 'y': layers.Dense(5)(inputs['b'])}
        return keras.Model(inputs, outputs)

    spec = {'a': tf.TensorSpec([None, 2]), 'b': tf.TensorSpec([None, 3])}
    state = build(model, spec=spec)
    assert {name: tuple(v.shape) for name, v in state.output_spec.items()} == {
        'x': (None, 4),
        'y': (None, 5),
    }


@pytest.mark.parametrize(
    ('model', 'got'),
    [
        (lambda: layers.Dense(3), "'<lambda>' returned Dense"),
        ('instance', 'got <Sequential'),
        (None, 'got None'),
    ],
    ids=['a layer', 'a model', 'nothing'],
)
def test_what_does_not_make_a_model_is_refused(build, model, got):
    if model == 'instance':
        model = with_input()
    with pytest.raises(ConfigError, match=f'returns a keras model .*; {got}.*MODEL = @my_model'):
        build(model)


@pytest.mark.parametrize(
    ('optimizer', 'got'),
    [(lambda: 0.1, "'<lambda>' returned float"), ('instance', 'got <.*Adam')],
)
def test_what_does_not_make_an_optimizer_is_refused(build, optimizer, got):
    if optimizer == 'instance':
        optimizer = keras.optimizers.Adam()
    with pytest.raises(ConfigError, match=f'a keras optimizer .*; {got}.*OPTIMIZER = @keras'):
        build(optimizer=optimizer)


@pytest.mark.parametrize(
    ('optimizer', 'mend'),
    [
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            "LossScaleOptimizer .*train.precision = 'float16'",
        ),
        pytest.param(
            lambda: keras.optimizers.MultiOptimizer(lambda variable: None),
            'MultiOptimizer .*Give one optimizer',
            marks=pytest.mark.skipif(
                not hasattr(keras.optimizers, 'MultiOptimizer'), reason='an older Keras'
            ),
        ),
        (sgd(gradient_accumulation_steps=2), 'gradient_accumulation_steps = 2 .*train.accumulate'),
        (
            sgd(use_ema=True, ema_overwrite_frequency=5),
            'ema_overwrite_frequency = 5 .*Leave it None',
        ),
    ],
)
def test_an_optimizer_that_does_by_itself_what_the_step_does_is_refused(build, optimizer, mend):
    with pytest.raises(ConfigError, match=mend):
        build(optimizer=optimizer)


def test_an_unknown_precision_is_refused(build):
    with pytest.raises(ConfigError, match="'half' is none of float32, bfloat16, float16"):
        build(precision='half')


def test_a_model_of_another_input_shape_is_refused_with_both_shapes(build):
    with pytest.raises(ConfigError, match=r'shape \(5,\), .* \(7,\). Set INPUT_SHAPE = \(7,\)'):
        build(with_input, spec=tf.TensorSpec([None, 7]))


def test_a_model_that_cannot_take_the_data_is_refused_in_one_sentence_of_keras(build):
    def model():
        return keras.Sequential([layers.Reshape([2, 3]), layers.Flatten(), layers.Dense(3)])

    with pytest.raises(ConfigError, match=r'does not accept .*5.*: The total size of') as error:
        build(model)
    assert '\n' not in error.value.message
    assert 'Exception encountered' not in error.value.message
