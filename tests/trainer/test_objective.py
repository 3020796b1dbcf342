"""Losses by name: of outputs, of a whole model, each for variables of its own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from tests.trainer.training import (
    CLASSES,
    FEATURES,
    LOSS,
    Training,
    arrays,
    assert_close,
    make_data,
)
from trainer.data.arrays import Arrays
from trainer.data.batch import Data, batch_spec
from trainer.errors import ConfigError
from trainer.evaluate import Evaluation
from trainer.groups import Group
from trainer.objective import Objective
from trainer.replicas import gather


def two_headed():
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(6, activation='tanh', name='body')(inputs)
    heads = {
        'kind': keras.layers.Dense(CLASSES, name='kind')(x),
        'size': keras.layers.Dense(1, name='size')(x),
    }
    return keras.Model(inputs, heads)


def labelled(**more):
    data = {**arrays(), 'kind': arrays()['label'], **more}
    data['size'] = data['image'].sum(1, keepdims=True)
    return Data(Arrays(data), label=('kind', 'size'), weight='weight' if more else None)


LOSSES = {'kind': LOSS, 'size': keras.losses.MeanSquaredError()}


def by_function(model, batch, training):
    outputs = model(batch['inputs'], training=training)
    kind = LOSS.call(batch['labels']['kind'], outputs['kind'])
    size = tf.square(batch['labels']['size'] - outputs['size'])[:, 0]
    return {'kind': kind, 'size': size}, outputs


def metrics():
    return {
        'kind': keras.metrics.SparseCategoricalAccuracy(name='accuracy'),
        'size': [keras.metrics.MeanAbsoluteError(name='mae')],
    }


def test_a_loss_for_each_output_is_the_sum_of_them_and_each_is_told(make_strategy):
    found = Training(make_strategy(2), two_headed, data=labelled(), loss=LOSSES, metrics=metrics())
    totals = found.run(3)
    names = {'loss', 'gradient_norm', 'kind_loss', 'size_loss', 'kind_accuracy', 'size_mae'}
    assert totals.keys() == names
    assert np.isclose(totals['loss'], totals['kind_loss'] + totals['size_loss'])


def test_a_function_of_the_whole_model_is_the_same_as_losses_of_its_outputs(make_strategy):
    one = Training(make_strategy(1), two_headed, data=labelled(), loss=LOSSES, metrics=metrics())
    two = Training(
        make_strategy(2), two_headed, data=labelled(), loss=by_function, metrics=metrics()
    )
    assert_close(two.run(5), one.run(5))
    assert_close(two.variables(), one.variables())


def test_losses_by_name_are_weighted_means_with_accumulation_too(make_strategy):
    weight = np.linspace(0, 2, len(arrays()['label'])).astype(np.float32)
    one = Training(make_strategy(1), two_headed, data=labelled(weight=weight), loss=LOSSES)
    two = Training(
        make_strategy(2), two_headed, data=labelled(weight=weight), loss=LOSSES, accumulate=2
    )
    assert_close(two.run(4), one.run(4))
    assert_close(two.variables(), one.variables())


def masked(model, batch, training):
    """Two losses, of which the elements of one are masked, so that their weights differ."""
    outputs = model(batch['inputs'], training=training)
    kind = LOSS.call(batch['labels']['kind'], outputs['kind'])
    kind._keras_mask = batch['inputs'][:, 0] > 0
    return {'kind': kind, 'size': tf.square(outputs['size'][:, 0])}


def test_losses_with_masks_are_divided_each_by_its_own_weight(make_strategy):
    one = Training(make_strategy(1), two_headed, data=labelled(), loss=masked)
    two = Training(make_strategy(2), two_headed, data=labelled(), loss=masked)
    assert_close(two.run(4), one.run(4))
    assert_close(two.variables(), one.variables())


def test_a_loss_of_a_group_trains_that_group_alone(make_strategy):
    groups = [Group('size/*', loss='size'), Group(['kind/*', 'body/*'], loss='kind')]
    both = Training(make_strategy(1), two_headed, data=labelled(), loss=LOSSES, groups=groups)

    def kind_alone(labels, outputs):
        return LOSS.call(labels['kind'], outputs['kind'])

    alone = Training(make_strategy(1), two_headed, data=labelled(), loss=kind_alone)
    both.run(3)
    alone.run(3)
    for path, value in alone.weights().items():
        if not path.startswith('size/'):
            np.testing.assert_allclose(both.weights()[path], value, rtol=1e-6)
        else:
            assert not np.allclose(both.weights()[path], value)


@pytest.mark.parametrize(
    ('loss', 'more', 'said'),
    [
        ({'kinds': LOSS}, {}, "loss for the output 'kinds', but .*'kind', 'size'.* Did you mean"),
        (LOSSES, {'metrics': lambda: {'sise': metrics()['kind']}}, "metric for the output 'sise'"),
        (by_function, {'groups': [Group('size/*', loss='sizes')]}, "'sizes' is none of the lo"),
        (lambda model, batch, training: 3, {}, 'must return a dict of losses.*returned int'),
        (
            lambda model, batch, training: {'mean': tf.reduce_mean(model(batch['inputs'])['size'])},
            {},
            "'mean' returns a scalar",
        ),
        (masked, {'metrics': lambda: [metrics()['kind']]}, 'metrics, but no outputs for them'),
    ],
)
def test_what_cannot_be_minimised_is_named(make_strategy, loss, more, said):
    # Metrics have variables, which cannot be made before the devices are.
    more = {name: value() if callable(value) else value for name, value in more.items()}
    with pytest.raises(ConfigError, match=said):
        Training(make_strategy(1), two_headed, data=labelled(), loss=loss, **more).run(1)


def test_a_class_in_a_dict_of_losses_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match='is the class MeanSquaredError; give an instance'):
        Objective({'size': keras.losses.MeanSquaredError})


def test_a_metric_with_the_name_of_a_loss_is_refused(make_strategy, tmp_path):
    named = {**metrics(), 'size': keras.metrics.MeanAbsoluteError(name='loss')}
    with pytest.raises(ConfigError, match="A metric is named 'size_loss', as a loss or"):
        tiny.run(
            make_strategy(1),
            tmp_path,
            model=two_headed,
            loss=LOSSES,
            metrics=named,
            train_data=labelled(),
            eval_data=None,
        )


def test_data_without_a_label_train_what_needs_none(make_strategy):
    def norm(model, batch, training):
        assert 'labels' not in batch
        return tf.reduce_sum(model(batch['inputs'], training=training) ** 2, -1)

    training = Training(make_strategy(2), data=make_data(label=None), loss=norm)
    assert training.run(30)['loss'] > training.run(30)['loss']


def own_step(model, weights, batch):
    with tf.GradientTape() as tape:
        tape.watch(weights)
        found, outputs = by_function(model, batch, True)
        total = tf.add_n([tf.reduce_mean(values) for values in found.values()])
    return (found, outputs), tape.gradient(total, weights)


@pytest.mark.parametrize('options', [{}, {'accumulate': 2}], ids=['whole', 'accumulated'])
def test_a_step_of_the_users_own_is_scaled_and_reduced_as_any(make_strategy, options):
    strategy = make_strategy(2)
    own = Training(strategy, two_headed, data=labelled(), train_step=own_step, **options)
    usual = Training(make_strategy(1), two_headed, data=labelled(), loss=LOSSES)
    assert_close(own.run(4), usual.run(4))
    assert_close(own.variables(), usual.variables())


def test_a_step_that_returns_too_few_gradients_is_refused(make_strategy):
    def short(model, weights, batch):
        found, gradients = own_step(model, weights, batch)
        return found, gradients[1:]

    with pytest.raises(ConfigError, match="'short' must return a gradient, or None, for each of"):
        Training(make_strategy(1), two_headed, data=labelled(), train_step=short)


def test_losses_are_matched_by_name_in_whatever_order_they_come(make_strategy):
    def turned(model, batch, training):
        found, outputs = by_function(model, batch, training)
        names = ['kind', 'size'] if training else ['size', 'kind']
        return {name: found[name] for name in names}, outputs

    training = Training(make_strategy(1), two_headed, data=labelled(), loss=turned)
    objective = Objective(turned)
    objective.find_names(training.strategy, training.state, batch_spec(training.data, 8))
    found = Evaluation(training.strategy, training.state, objective, [], labelled(), 8)()
    plain = Evaluation(training.strategy, training.state, Objective(LOSSES), [], labelled(), 8)()
    assert_close(found, plain)


def test_losses_that_come_and_go_are_refused(make_strategy):
    def fickle(model, batch, training):
        found, _ = by_function(model, batch, training)
        return found if training else {'kind': found['kind']}

    training = Training(make_strategy(1), two_headed, data=labelled(), loss=fickle)
    objective = Objective(fickle)
    objective.find_names(training.strategy, training.state, batch_spec(training.data, 8))
    with pytest.raises(ConfigError, match=r"returned the losses \['kind'\], and before that"):
        Evaluation(training.strategy, training.state, objective, [], labelled(), 8)()


def test_a_loss_sees_the_weights_of_the_data(make_strategy):
    def weighing(model, batch, training):
        return batch['weights'] * tf.square(model(batch['inputs'])['size'][:, 0])

    weight = np.ones(len(arrays()['label']), np.float32)
    Training(make_strategy(2), two_headed, data=labelled(weight=weight), loss=weighing).run(1)


def test_what_gathers_over_replicas_is_refused_where_batches_come_in_parts(make_strategy):
    def gathering(model, batch, training):
        return tf.reduce_sum(gather(model(batch['inputs'])['size'])) + tf.zeros([4])

    for options in ({'accumulate': 2}, {'canonical_shards': 2}):
        training = Training(
            make_strategy(1), two_headed, data=labelled(), loss=gathering, **options
        )
        with pytest.raises(ConfigError, match=r'does not go with train\.accumulate'):
            training.run(1)
