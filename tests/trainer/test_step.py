"""The training step on 1, 2 and 4 replicas: nothing goes wrong once a replica."""

import functools
import itertools
import math
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism

from tests.trainer.training import (
    BATCH,
    CLASSES,
    EXAMPLES,
    FEATURES,
    LOSS,
    Training,
    arrays,
    assert_close,
    assert_equal,
    make_data,
    no_loss,
    noisy,
    sgd,
)
from trainer import step as step_module
from trainer.data import order
from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.errors import ConfigError

layers = keras.layers


def ids_of_step(step, num_examples=EXAMPLES, batch_size=BATCH, seed=0):
    """The record numbers of a global batch, in the order in which replicas get them."""
    positions = order.positions(tf.constant(step, tf.int64), batch_size)
    return order.records(positions, num_examples=num_examples, seed=seed).numpy()


# ---- Randomness.


def mask_training(strategy, **options):
    """A training whose k-th row of weights changes where the dropout mask of record k is 1."""
    units = 48
    data = Data(Arrays({'image': np.eye(BATCH, dtype=np.float32), 'label': np.zeros(BATCH)}))

    def model():
        return keras.Sequential([layers.Dense(units, use_bias=False), layers.Dropout(0.5)])

    def loss(labels, outputs):
        return tf.reduce_sum(outputs, axis=-1)

    return Training(strategy, model, sgd(1.0), data, loss=loss, **options)


def masks(training, num_steps):
    """The masks that the next steps draw: rows of 0 and 1, [num_steps * BATCH, units]."""
    found = []
    for _ in range(num_steps):
        (before,) = training.weights().values()
        training.run()
        (after,) = training.weights().values()
        found.append(before != after)
    return np.concatenate(found)


def num_different(rows):
    return len({row.tobytes() for row in rows})


def test_dropout_masks_differ_between_replicas_and_between_steps(make_strategy):
    drawn = masks(mask_training(make_strategy(4)), 3)
    assert num_different(drawn) == 3 * BATCH
    assert 0.4 < drawn.mean() < 0.6


def test_dropout_masks_differ_between_micro_batches(make_strategy):
    assert num_different(masks(mask_training(make_strategy(2), accumulate=2), 1)) == BATCH


def test_dropout_masks_are_functions_of_seed_and_step_and_of_no_history(make_strategy):
    whole = masks(mask_training(make_strategy(2)), 4)
    training = mask_training(make_strategy(2))
    tf.random.normal([3])
    training.state.model(tf.ones([BATCH, BATCH]), training=True)  # moves the model's generators
    training.start_at(2)
    np.testing.assert_array_equal(masks(training, 2), whole[2 * BATCH :])
    training.start_at(0)
    np.testing.assert_array_equal(masks(training, 1), whole[:BATCH])


def test_another_seed_draws_other_masks(make_strategy):
    drawn = [masks(mask_training(make_strategy(1), seed=seed), 1) for seed in (0, 1)]
    assert num_different(np.concatenate(drawn)) == 2 * BATCH


class Subclassed(keras.Model):
    """Hands `training` to nobody: Keras itself tells the layers inside."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)
        self.logits = layers.Dense(CLASSES)

    def call(self, x):
        return self.logits(self.drop(self.norm(x)))


def test_layers_know_of_training_even_if_a_subclassed_model_does_not_tell_them(make_strategy):
    def functional():
        inputs = keras.Input([FEATURES])
        model = Subclassed()
        return keras.Model(inputs, model.logits(model.drop(model.norm(inputs))))

    found = []
    for model in (Subclassed, functional):
        training = Training(make_strategy(2), model, sgd(0.1, momentum=0.9))
        training.run(3)
        found.append(sorted(value.tobytes() for value in training.variables().values()))
    assert found[0] == found[1]


def test_the_same_run_twice_gives_the_same_bits(make_strategy):
    runs = [Training(make_strategy(2), noisy, sgd(0.1, momentum=0.9)) for _ in range(2)]
    assert runs[0].run(4) == runs[1].run(4)
    assert runs[0].sha256() == runs[1].sha256()


@pytest.mark.parametrize('replicas', [1, 2])
def test_how_steps_are_shared_out_among_calls_leaves_the_same_bits(make_strategy, replicas):
    training = Training(make_strategy(replicas), noisy, sgd(0.1, momentum=0.9))
    start = training.variables()
    found = set()
    for calls in ([6], [1] * 6, [2, 4]):
        training.state.restore(start)
        training.start_at(0)
        for num_steps in calls:
            training.run(num_steps)
        found.add(training.sha256())
    assert len(found) == 1


# ---- Losses, weights, masks, penalties.


@pytest.mark.parametrize('replicas', [1, 2])
def test_a_loss_that_returns_a_scalar_is_refused(make_strategy, replicas):
    def mean_loss(labels, outputs):
        return tf.reduce_mean(LOSS.call(labels, outputs))

    training = Training(make_strategy(replicas), loss=mean_loss)
    with pytest.raises(ConfigError, match=r"'mean_loss'.*scalar. Return one value an example"):
        training.run()


def test_a_keras_loss_and_the_function_it_wraps_give_the_same_bits(make_strategy):
    def function(labels, outputs):
        return keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)

    found = [Training(make_strategy(2), loss=loss) for loss in (LOSS, function)]
    assert found[0].run(3) == found[1].run(3)
    assert found[0].sha256() == found[1].sha256()


def test_a_keras_loss_computes_in_float32_whatever_the_model_does(make_strategy):
    seen = []

    class Loss(keras.losses.Loss):
        def call(self, labels, outputs):
            seen.append(outputs.dtype)
            return LOSS.call(labels, outputs)

    Training(make_strategy(1), precision='bfloat16', loss=Loss()).run()
    assert set(seen) == {tf.float32}


@pytest.mark.parametrize('damaged', ['image', 'label'])
def test_a_weight_of_zero_hides_an_example_that_is_nan(make_strategy, damaged):
    weights = np.ones(EXAMPLES, np.float32)
    weights[[1, 7, 20]] = 0
    changes = {'weight': weights, 'label': np.linspace(0, 1, EXAMPLES)[:, None].astype('float32')}
    bad = {**arrays(), **changes}[damaged].copy()
    bad[[1, 7, 20]] = np.nan

    def one():
        return keras.Sequential([layers.Dense(1)])

    found = []
    for values in (changes, {**changes, damaged: bad}):
        error = keras.metrics.MeanAbsoluteError(name='error')
        data = make_data(values, weight='weight')
        training = Training(
            make_strategy(2), one, data=data, loss=keras.losses.MeanSquaredError(), metrics=[error]
        )
        found.append({**training.run(3), **training.variables()})
    assert found[1]['phalanx/skipped'] == 0
    assert_close(found[1], found[0])


def test_a_batch_of_zero_weights_changes_no_weight(make_strategy):
    data = make_data({'weight': np.zeros(EXAMPLES)}, weight='weight')
    training = Training(make_strategy(2), data=data)
    before = training.weights()
    assert training.run(2) == {'loss': 0.0, 'gradient_norm': 0.0}
    assert_equal(training.weights(), before)
    assert training.state.skipped.numpy() == 0


@pytest.mark.parametrize(('replicas', 'accumulate'), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_penalties_count_once_whatever_the_number_of_replicas(make_strategy, replicas, accumulate):
    def model():
        l2 = keras.regularizers.L2(0.5)
        return keras.Sequential([layers.Dense(3, use_bias=False, kernel_regularizer=l2)])

    training = Training(make_strategy(replicas), model, loss=no_loss, accumulate=accumulate)
    (before,) = training.weights().values()
    result = training.run()
    (after,) = training.weights().values()
    np.testing.assert_allclose(result['loss'], 0.5 * np.sum(before**2), rtol=1e-6)
    np.testing.assert_allclose(after, before * (1 - 0.1 * 2 * 0.5), rtol=1e-6)


@pytest.mark.parametrize('weighted', [False, True])
def test_what_a_keras_mask_leaves_out_counts_in_neither_loss_nor_metrics(make_strategy, weighted):
    rng = np.random.default_rng(1)
    words = rng.integers(1, 6, (BATCH, 4)) * (np.arange(4) < np.arange(BATCH)[:, None] % 5)
    labels = rng.integers(0, CLASSES, words.shape)
    weights = np.arange(BATCH).astype(np.float32)
    data = Data(
        Arrays({'words': words, 'label': labels, 'weight': weights}),
        inputs='words',
        weight='weight' if weighted else None,
    )

    def model():
        return keras.Sequential([layers.Embedding(6, 3, mask_zero=True), layers.Dense(CLASSES)])

    accuracy = keras.metrics.SparseCategoricalAccuracy(name='accuracy')
    training = Training(make_strategy(2), model, data=data, metrics=[accuracy])
    outputs = training.state.model(words).numpy()
    losses = LOSS.call(labels, outputs).numpy()
    counts = (words > 0) * (weights[:, None] if weighted else 1)
    result = training.run()
    np.testing.assert_allclose(result['loss'], np.average(losses, weights=counts), rtol=1e-5)
    right = outputs.argmax(-1) == labels
    np.testing.assert_allclose(result['accuracy'], np.average(right, weights=counts), rtol=1e-5)


def test_a_class_that_the_loss_ignores_counts_neither_above_nor_below_the_line(make_strategy):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
    data = Data(Arrays(arrays(BATCH)))
    training = Training(make_strategy(2), data=data, loss=loss)
    outputs = training.state.model(arrays(BATCH)['image'])
    expected = float(loss(arrays(BATCH)['label'], outputs))
    assert (arrays(BATCH)['label'] == 1).any()
    np.testing.assert_allclose(training.run()['loss'], expected, rtol=1e-5)


def test_micro_batches_give_what_the_full_batch_gives(make_strategy):
    expected = Training(make_strategy(1), optimizer=sgd(0.1, momentum=0.9))
    losses = expected.run(3)
    for replicas, accumulate in ((1, 2), (2, 4), (4, 2)):
        training = Training(
            make_strategy(replicas), optimizer=sgd(0.1, momentum=0.9), accumulate=accumulate
        )
        assert_close(training.run(3), losses)
        assert_close(training.variables(), expected.variables())


# ---- Metrics and reports.


@pytest.mark.parametrize(('replicas', 'weighted'), [(1, False), (2, True), (4, False)])
def test_metrics_are_those_of_keras_over_all_examples(make_strategy, replicas, weighted):
    weights = np.arange(EXAMPLES).astype(np.float32) % 5
    labels = (arrays()['label'] % 2).astype(np.float32)[:, None]
    data = make_data({'weight': weights, 'label': labels}, weight='weight' if weighted else None)

    def model():
        return keras.Sequential([layers.Dense(1, activation='sigmoid')])

    def metrics():
        return [
            keras.metrics.BinaryAccuracy(name='accuracy'),
            keras.metrics.AUC(name='auc'),
            keras.metrics.MeanAbsoluteError(name='error'),
        ]

    loss = keras.losses.BinaryCrossentropy()
    training = Training(
        make_strategy(replicas), model, sgd(0.0), data, loss=loss, metrics=metrics()
    )
    outputs = training.state.model(arrays()['image'])
    totals = [training.totals(num_steps) for num_steps in (1, 2)]
    results = training.step.results({key: totals[0][key] + totals[1][key] for key in totals[0]})
    for metric in metrics():
        metric.update_state(labels, outputs, sample_weight=weights if weighted else None)
        np.testing.assert_allclose(results[metric.name], float(metric.result()), rtol=1e-5)


def test_the_loss_is_the_mean_over_steps_and_the_norm_that_of_the_gradient(strategy):
    training = Training(strategy, optimizer=sgd(0.0), data=Data(Arrays(arrays(BATCH))))
    features, labels = arrays(BATCH)['image'], arrays(BATCH)['label']
    with tf.GradientTape() as tape:
        loss = LOSS(labels, training.state.model(features))
    variables = [v.value for v in training.state.model.trainable_variables]
    norm = tf.linalg.global_norm(tape.gradient(loss, variables))
    result = training.run(3)
    np.testing.assert_allclose([result['loss'], result['gradient_norm']], [loss, norm], rtol=1e-5)


def test_reported_ids_are_those_of_the_global_batch_in_its_order(strategy):
    training = Training(strategy, log_ids=True)
    ids = np.concatenate([training.totals(2)['ids'], training.totals(3)['ids']])
    np.testing.assert_array_equal(ids, [ids_of_step(step) for step in range(5)])


@pytest.mark.parametrize('replicas', [1, 2])
def test_input_seconds_is_the_time_spent_waiting_for_batches(make_strategy, replicas):
    one_at_a_time = threading.Lock()

    def slow(features):
        def wait(image):
            with one_at_a_time:
                time.sleep(0.01)
            return image

        image = tf.numpy_function(wait, [features['image']], tf.float32, stateful=False)
        return {'image': tf.ensure_shape(image, features['image'].shape)}

    training = Training(make_strategy(replicas), data=make_data(preprocess=slow))
    for _ in range(30):  # uses up what was read ahead
        training.totals()
    started = time.perf_counter()
    waited = sum(training.totals()['input_seconds'] for _ in range(20))
    wall = time.perf_counter() - started
    assert 0.05 < waited < wall


# ---- What the optimizer does, it does to reduced gradients.


def update_of(training):
    before = training.weights()
    training.run()
    return {path: before[path] - value for path, value in training.weights().items()}


def test_global_clipnorm_is_the_norm_of_the_whole_update(strategy):
    update = update_of(Training(strategy, optimizer=sgd(1.0, global_clipnorm=0.01)))
    norm = math.sqrt(sum(np.sum(value**2) for value in update.values()))
    np.testing.assert_allclose(norm, 0.01, rtol=1e-4)


@pytest.mark.parametrize('replicas', [1, 4])
def test_clipnorm_is_the_norm_of_the_update_of_each_variable(make_strategy, replicas):
    update = update_of(Training(make_strategy(replicas), optimizer=sgd(1.0, clipnorm=0.01)))
    norms = [np.linalg.norm(value) for value in update.values()]
    np.testing.assert_allclose(norms, [0.01] * 2, rtol=1e-4)


@pytest.mark.parametrize('replicas', [1, 4])
def test_clipvalue_is_the_greatest_element_of_the_update(make_strategy, replicas):
    update = update_of(Training(make_strategy(replicas), optimizer=sgd(1.0, clipvalue=0.01)))
    np.testing.assert_allclose(max(abs(v).max() for v in update.values()), 0.01, rtol=1e-4)


@pytest.mark.parametrize('replicas', [1, 2])
def test_weight_decay_is_applied_once(make_strategy, replicas):
    training = Training(make_strategy(replicas), optimizer=sgd(0.1, weight_decay=0.5), loss=no_loss)
    before = training.weights()
    training.run()
    expected = {path: value * (1 - 0.1 * 0.5) for path, value in before.items()}
    assert_close(training.weights(), expected)


MULTI = getattr(keras.optimizers, 'MultiOptimizer', None)
OPTIMIZERS = sorted(
    {
        maker
        for maker in vars(keras.optimizers).values()
        if isinstance(maker, type) and issubclass(maker, keras.optimizers.Optimizer)
    }
    - {keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer, MULTI},
    key=lambda maker: maker.__name__,
)


def constrained():
    layer = keras.layers.Dense(CLASSES, kernel_constraint=keras.constraints.MaxNorm(0.5))
    return keras.Sequential([layer])


@pytest.mark.parametrize('maker', OPTIMIZERS, ids=lambda maker: maker.__name__)
def test_every_optimizer_updates_as_keras_applies_it(make_strategy, maker):
    training, twin = (
        Training(make_strategy(1), model=constrained, optimizer=functools.partial(maker, 0.1))
        for _ in range(2)
    )
    model, optimizer = twin.state.model, twin.state.optimizer
    for batch in itertools.islice(iter(twin.batches), 3):
        with tf.GradientTape() as tape:
            loss = LOSS(batch['labels'], model(batch['inputs'], training=True))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        optimizer.apply(gradients, model.trainable_variables)
        training.run()
    expected = twin.variables()
    for path, value in training.variables().items():
        if not path.startswith('phalanx/'):
            np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_variable_without_gradient_stays(make_strategy, accumulate):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.unused, self.used = layers.Dense(2, name='unused'), layers.Dense(CLASSES)

        def call(self, x):
            self.unused(x)
            return self.used(x)

    optimizer = sgd(0.1, momentum=0.9, weight_decay=0.1)
    training = Training(make_strategy(2), Model, optimizer, accumulate=accumulate)
    before = training.weights()
    training.run(2)
    for path, value in training.weights().items():
        assert np.array_equal(value, before[path]) == ('unused' in path), path


def test_frozen_weights_keep_every_bit_even_on_three_replicas(make_strategy):
    def model():
        frozen = layers.Dense(50, trainable=False, name='frozen', bias_initializer='normal')
        return keras.Sequential([frozen, layers.BatchNormalization(), layers.Dense(CLASSES)])

    for options in ({}, {'accumulate': 2}):
        training = Training(make_strategy(3), model, batch_size=12, **options)
        before = training.variables()
        training.run(10)
        after = training.variables()
        for path in before:
            if 'frozen' in path:
                assert after[path].tobytes() == before[path].tobytes(), path
            if 'moving' in path:
                assert after[path].tobytes() != before[path].tobytes(), path


# ---- Steps that are not finite.


def poisoned(steps, value=np.nan):
    """Data of two batches an epoch, where a record read last in each of `steps` is not finite."""
    images = arrays(2 * BATCH)['image']
    for step in steps:
        images[ids_of_step(step, 2 * BATCH)[-1]] = value
    return Data(Arrays({**arrays(2 * BATCH), 'image': images}))


@pytest.mark.parametrize('replicas', [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(make_strategy, replicas):
    training = Training(make_strategy(replicas), noisy, keras.optimizers.Adam, poisoned([1]))
    training.run()
    before = training.variables()
    totals = training.totals()
    after = training.variables()
    counters = {'phalanx/step': 2, 'phalanx/skipped': 1}
    assert_equal(after, {**before, **counters})
    assert (totals['finite_steps'], totals['skipped_steps'], totals['loss']) == (0, [1], 0)


def test_a_run_goes_on_after_steps_that_were_not_finite(make_strategy):
    training = Training(make_strategy(2), noisy, sgd(0.1, momentum=0.9), poisoned([0]))
    before = training.weights()
    result = training.run(7)
    assert np.isfinite(list(result.values())).all()
    # Record by record the epochs are shuffled anew, but each of them has the poison once.
    assert training.state.step.numpy() == 7
    assert training.state.skipped.numpy() in (3, 4)
    after = training.weights()
    assert all(np.isfinite(v).all() and (v != before[p]).any() for p, v in after.items())


def test_skipped_steps_are_told_and_counted_across_calls(make_strategy):
    images = np.full_like(arrays()['image'], np.inf)
    training = Training(make_strategy(2), data=make_data({'image': images}))
    assert [training.totals(n)['skipped_steps'] for n in (2, 3)] == [[0, 1], [2, 3, 4]]
    training.data = make_data()
    training.start_at(5)
    assert training.totals()['skipped_steps'] == []
    assert training.state.skipped.numpy() == 5


def test_the_loss_of_every_step_is_told_where_asked_for(make_strategy):
    training = Training(make_strategy(2), data=poisoned([0]), log_losses=True)
    totals = training.totals(2)
    losses = totals['losses']
    assert np.isfinite(losses).tolist() == [False, True]
    assert losses[1] == pytest.approx(totals['loss'], rel=1e-6)


# ---- Precision.


@pytest.mark.parametrize('replicas', [2, 4])
def test_an_overflow_on_one_replica_is_skipped_on_all_and_halves_the_scale(make_strategy, replicas):
    data = poisoned([0], value=1e4)  # finite, but not once it is multiplied by the loss scale
    training = Training(make_strategy(replicas), precision='float16', data=data)
    before = training.weights()
    training.run()
    assert training.state.skipped.numpy() == 1
    assert_equal(training.weights(), before)
    for copy in training.copies(training.state.loss_scale):
        assert copy == 2.0**14
    for variable in training.state.model.trainable_variables:
        for copy in training.copies(variable):
            np.testing.assert_array_equal(copy, before[variable.path])
    assert training.totals()['finite_steps'] == 1
    for variable in training.state.model.trainable_variables:
        first, *others = training.copies(variable)
        assert np.isfinite(first).all()
        assert (first != before[variable.path]).any()
        assert all(other.tobytes() == first.tobytes() for other in others)


def test_the_loss_scale_doubles_after_a_row_of_finite_steps(make_strategy, monkeypatch):
    monkeypatch.setattr(step_module, 'LOSS_SCALE_GROWTH_STEPS', 3)
    training = Training(make_strategy(2), precision='float16')
    scales = []
    for _ in range(7):
        training.run()
        scales.append(math.log2(training.state.loss_scale.numpy()))
    assert scales == [15, 15, 16, 16, 16, 17, 17]
    assert training.state.good_steps.numpy() == 1


def test_the_loss_scale_does_not_show_in_the_results(make_strategy):
    full = Training(make_strategy(2)).run(3)
    half = Training(make_strategy(2), precision='float16').run(3)
    assert_close(half, full, rtol=1e-2)


def test_bfloat16_trains_float32_weights(make_strategy):
    training = Training(make_strategy(2), optimizer=sgd(0.5), precision='bfloat16')
    assert training.state.model.layers[0].compute_dtype == 'bfloat16'
    assert {v.dtype for v in training.weights().values()} == {np.dtype('float32')}
    first, last = training.run()['loss'], training.run(60) and training.run()['loss']
    assert last < 0.9 * first
    assert training.state.loss_scale.numpy() == 1


# ---- Batch normalisation.


@pytest.mark.parametrize('replicas', [2, 4])
def test_batch_statistics_are_the_mean_over_replicas_and_the_same_on_all(make_strategy, replicas):
    def model():
        return keras.Sequential(
            [layers.BatchNormalization(momentum=0.9, name='norm'), layers.Dense(CLASSES)]
        )

    training = Training(make_strategy(replicas), model)
    images = arrays()['image']
    mean, variance = np.zeros(FEATURES), np.ones(FEATURES)
    for step in range(3):
        training.run()
        parts = np.split(images[ids_of_step(step)], replicas)
        mean = 0.9 * mean + 0.1 * np.mean([part.mean(0) for part in parts], 0)
        variance = 0.9 * variance + 0.1 * np.mean([part.var(0) for part in parts], 0)
        found = {v.name: training.copies(v) for v in training.state.moving}
        for name, expected in (('moving_mean', mean), ('moving_variance', variance)):
            first, *others = found[name]
            np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-6)
            assert all(other.tobytes() == first.tobytes() for other in others)


# ---- How a step is run.


def regularised():
    l2 = keras.regularizers.L2(0.01)
    return keras.Sequential(
        [
            layers.Dense(8, activation='tanh', kernel_regularizer=l2),
            layers.BatchNormalization(),
            layers.Dense(CLASSES),
        ]
    )


@pytest.mark.parametrize(('replicas', 'accumulate'), [(1, 1), (2, 2)])
def test_xla_gives_what_tensorflow_gives(make_strategy, replicas, accumulate):
    found = []
    for jit_compile in (False, True):
        training = Training(
            make_strategy(replicas),
            regularised,
            metrics=[keras.metrics.SparseCategoricalAccuracy(name='accuracy')],
            jit_compile=jit_compile,
            accumulate=accumulate,
        )
        found.append({**training.run(3), **training.variables()})
    assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.fixture
def deterministic():
    tf.config.experimental.enable_op_determinism()
    yield
    disable_op_determinism()


def test_an_operation_without_a_deterministic_kernel_is_a_mistake_with_a_way_out(
    make_strategy, deterministic
):
    def pooled():
        return keras.Sequential(
            [
                layers.Reshape([FEATURES, 1, 1]),
                layers.Conv2D(2, 1),
                layers.MaxPooling2D([2, 1]),
                layers.Flatten(),
                layers.Dense(CLASSES),
            ]
        )

    training = Training(make_strategy(1), pooled, jit_compile=True)
    with pytest.raises(ConfigError, match=r'(?s)MaxPool.*jit_compile = False.*deterministic = F'):
        training.run(1)


@pytest.fixture
def eagerly():
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


class Counting(keras.layers.Layer):
    calls = 0

    def call(self, x):
        type(self).calls += 1
        return x


def counting():
    return keras.Sequential([*noisy().layers, Counting()])


@pytest.mark.parametrize('replicas', [1, 2])
def test_eager_steps_run_the_models_python_code_and_give_what_the_graph_gives(
    make_strategy, replicas, request
):
    metrics = [keras.metrics.SparseCategoricalAccuracy(name='accuracy')]
    graph = Training(make_strategy(replicas), counting, metrics=metrics)
    expected = {**graph.run(3), **graph.variables()}
    request.getfixturevalue('eagerly')
    eager = Training(make_strategy(replicas), counting, metrics=metrics)
    before = Counting.calls
    found = eager.run(3)
    assert Counting.calls - before == 3 * replicas
    assert_close({**found, **eager.variables()}, expected, rtol=1e-5, atol=1e-5)
