"""Weighted losses and metrics as sums that can be added up over replicas and steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import ConfigError
from trainer.sums import MetricSums, hide, per_example_loss, weigh

NAN, INF = float('nan'), float('inf')


def mean(losses, weights=None, mask=None):
    tensors = [None if v is None else tf.constant(v) for v in (losses, weights, mask)]
    total, weight = weigh(*tensors)
    return float(total), float(weight)


def test_without_weights_every_element_weighs_one():
    assert mean([[1.0, 2.0], [3.0, 4.0]]) == (10.0, 4.0)


def test_weights_of_examples_weigh_all_their_elements():
    assert mean([[1.0, 2.0], [3.0, 4.0]], [2.0, 0.5]) == (9.5, 5.0)


def test_a_mask_and_weights_multiply():
    assert mean([[1.0, 2.0], [3.0, 4.0]], [2.0, 0.5], [[True, False], [True, True]]) == (5.5, 3.0)


def test_a_weight_of_zero_hides_a_loss_that_is_not_finite():
    assert mean([1.0, NAN, INF], [1.0, 0.0, 0.0]) == (1.0, 1.0)


def test_hiding_makes_finite_what_examples_of_weight_zero_hold_and_leaves_all_else():
    batch = {
        'inputs': {'x': tf.constant([[NAN, 1.0], [NAN, 2.0], [INF, 3.0]]), 'n': tf.range(3)},
        'labels': tf.constant([NAN, NAN, 5.0]),
        'weights': tf.constant([1.0, 0.0, 0.0]),
    }
    hidden = hide(batch)
    np.testing.assert_array_equal(hidden['inputs']['x'], [[NAN, 1], [0, 2], [0, 3]])
    np.testing.assert_array_equal(hidden['inputs']['n'], [0, 1, 2])
    np.testing.assert_array_equal(hidden['labels'], [NAN, 0, 5])
    assert hidden['weights'] is batch['weights']


@pytest.mark.parametrize(
    'loss',
    [
        keras.losses.MeanSquaredError(),
        keras.losses.MeanSquaredError(reduction='sum'),
        lambda labels, outputs: tf.reduce_mean((labels - outputs) ** 2, axis=-1),
    ],
)
def test_a_loss_is_one_value_an_example_whatever_its_reduction(loss):
    losses, mask = per_example_loss(loss, tf.constant([[1.0, 2.0]]), tf.constant([[1.0, 4.0]]))
    np.testing.assert_array_equal(losses, [2.0])
    assert mask is None


@pytest.mark.parametrize('name', ['keras', 'function'])
def test_a_scalar_loss_is_refused_by_name_with_its_mend(name):
    class Total(keras.losses.Loss):
        def call(self, labels, outputs):
            return tf.reduce_sum(outputs)

    def function(labels, outputs):
        return tf.reduce_sum(outputs)

    loss = {'keras': Total(name='keras'), 'function': function}[name]
    with pytest.raises(ConfigError, match=rf'{name}.*\n?.*one value an example, \[batch\]'):
        per_example_loss(loss, tf.ones([2]), tf.ones([2]))


def test_losses_in_half_precision_are_summed_in_float32():
    losses, _ = per_example_loss(lambda y, p: p, None, tf.ones([2], tf.bfloat16))
    assert losses.dtype == tf.float32


def test_the_masks_of_outputs_and_of_losses_are_both_kept():
    labels, outputs = tf.constant([[0, 1, 2]]), tf.random.stateless_normal([1, 3, 4], [1, 2])
    outputs._keras_mask = tf.constant([[True, True, False]])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    losses, mask = per_example_loss(loss, labels, outputs)
    np.testing.assert_array_equal(mask, [[False, True, False]])
    total, weight = weigh(losses, None, mask)
    np.testing.assert_allclose(total / weight, float(loss(labels, outputs)), rtol=1e-6)


# ---- Metrics.


def parts(metrics, labels, outputs, weights=None):
    """The metrics of a batch that was cut into unequal parts."""
    sums = MetricSums(metrics)
    total = 0
    for part in (slice(0, 1), slice(1, 3), slice(3, None)):
        own = None if weights is None else tf.constant(weights[part])
        added = sums.increments(tf.constant(labels[part]), tf.constant(outputs[part]), own)
        total += tf.cast(tf.concat(added, 0), tf.float64)
    return sums.results(total)


@pytest.mark.parametrize('weighted', [False, True])
def test_metrics_of_parts_add_up_to_those_of_the_whole(weighted):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (10, 1)).astype(np.float32)
    outputs = rng.random((10, 1)).astype(np.float32)
    weights = rng.random(10).astype(np.float32) if weighted else None
    metrics = [
        keras.metrics.AUC(name='auc'),
        keras.metrics.Precision(name='precision'),
        keras.metrics.RootMeanSquaredError(name='rmse'),
    ]
    found = parts(metrics, labels, outputs, weights)
    assert all(float(tf.reduce_sum(tf.abs(v))) == 0 for m in metrics for v in m.variables)
    for metric in metrics:
        metric.update_state(labels, outputs, sample_weight=weights)
        np.testing.assert_allclose(found[metric.name], float(metric.result()), rtol=1e-5)


def test_weights_of_examples_and_a_mask_of_elements_multiply_in_metrics():
    labels, outputs = tf.constant([[0, 1], [1, 0]]), tf.one_hot([[0, 0], [1, 1]], 2)
    outputs._keras_mask = tf.constant([[True, True], [True, False]])
    sums = MetricSums([keras.metrics.SparseCategoricalAccuracy(name='accuracy')])
    added = sums.increments(labels, outputs, tf.constant([1.0, 3.0]))
    # Right are the first elements of both examples: (1 + 3) of (1 + 1 + 3).
    np.testing.assert_allclose(
        sums.results(tf.cast(tf.concat(added, 0), tf.float64))['accuracy'], 0.8
    )


def test_counts_stay_exact_beyond_what_float32_can_count():
    metric = keras.metrics.MeanAbsoluteError(name='error')
    found = MetricSums([metric]).results(tf.constant([2.0**27, 2.0**28], tf.float64))
    assert found == {'error': 0.5}


@pytest.mark.parametrize('names', [('a', 'a'), ('loss',)])
def test_two_metrics_of_one_name_are_refused_and_so_is_the_name_of_the_loss(names):
    metrics = [keras.metrics.AUC(name=name) for name in names]
    with pytest.raises(ConfigError, match='Give each its own name='):
        MetricSums(metrics)


def test_a_metric_without_variables_is_refused_until_it_was_used_once():
    metric = keras.metrics.F1Score(name='f1', average='micro')
    labels, outputs = (
        np.eye(3, dtype=np.float32)[[0, 1, 2, 2]],
        np.eye(3, dtype=np.float32)[[0, 1, 1, 2]],
    )
    with pytest.raises(ConfigError, match=r"'f1'.*call its update_state .* then its reset_state"):
        MetricSums([metric])
    metric.update_state(labels, outputs)
    metric.reset_state()
    np.testing.assert_allclose(parts([metric], labels, outputs)['f1'], 0.75)


def test_one_number_an_example_is_no_axis_to_average_over():
    labels, outputs = tf.constant([1.0, 2.0]), tf.constant([1.0, 4.0])
    losses, _ = per_example_loss(keras.losses.MeanSquaredError(), labels, outputs)
    assert losses.numpy().tolist() == [0.0, 4.0]
    sums = MetricSums([keras.metrics.MeanAbsoluteError(name='error')])
    added = sums.increments(labels, outputs, tf.constant([1.0, 0.5]))
    assert sums.results(tf.cast(tf.concat(added, 0), tf.float64)) == {'error': pytest.approx(2 / 3)}


def test_a_loss_that_compares_each_example_with_each_is_refused():
    def broad(labels, outputs):
        return tf.abs(labels - outputs)

    with pytest.raises(ConfigError, match=r"'broad' returns \(3, 3\) of labels \(3,\) and"):
        per_example_loss(broad, tf.ones([3]), tf.ones([3, 1]))
