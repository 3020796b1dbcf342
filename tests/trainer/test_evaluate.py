"""Evaluation counts every example once, whatever the batch, the replicas and the padding."""

import gc
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops import script_ops

from tests.trainer import tiny
from tests.trainer.training import (
    BATCH,
    CLASSES,
    FEATURES,
    LOSS,
    Training,
    arrays,
    assert_equal,
    dense,
    noisy,
    sgd,
)
from trainer.checkpoint import Checkpoints
from trainer.data.arrays import Arrays
from trainer.data.batch import Data, batch_spec
from trainer.data.pipeline import eval_batches
from trainer.data.serve import Server
from trainer.data.workers import DataWorkers
from trainer.errors import BadRecord, ConfigError, ReadError
from trainer.evaluate import EvalStep, Evaluation, evaluate
from trainer.objective import Objective
from trainer.state import build_state


def accuracy():
    return keras.metrics.SparseCategoricalAccuracy(name='accuracy')


def by_hand(weights, features, labels, counts):
    """Loss and accuracy of a dense layer, in float64."""
    logits = features.astype(float) @ weights['sequential/dense/kernel']
    logits += weights['sequential/dense/bias']
    likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -likelihood[np.arange(len(labels)), labels]
    right = logits.argmax(-1) == labels
    return {
        'loss': np.average(losses, weights=counts),
        'accuracy': np.average(right, weights=counts),
    }


COUNTS = {1: range(1, 18), 2: (1, 2, 3, 7, 8, 9, 15, 16, 17), 4: (1, 4, 5, 8, 11, 17)}


@pytest.mark.parametrize('batch_size', [4, 8])
def test_any_number_of_examples_gives_what_numpy_gives(strategy, batch_size):
    everything = {**arrays(17), 'weight': 1 + np.arange(17) % 3}
    state = build_state(strategy, dense, None, batch_spec(Data(Arrays(everything)))['inputs'])
    step = EvalStep(strategy, state, Objective(LOSS), [accuracy()])
    for count in COUNTS[strategy.num_replicas_in_sync]:
        part = {name: array[:count] for name, array in everything.items()}
        counts = part['weight'] if count % 3 == 2 else np.ones(count)
        data = Data(Arrays(part), weight='weight' if count % 3 == 2 else None)
        batches, num_steps = eval_batches(data, strategy, global_batch_size=batch_size)
        sums = step.run(batches, tf.constant(num_steps, tf.int64))
        assert int(sums[2]) == count
        found = step.results(sums)
        expected = by_hand(state.weights(), part['image'], part['label'], counts)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(found[name] - value) < 1e-6, (count, name)


def test_the_same_evaluation_may_be_repeated(strategy):
    training = Training(strategy)
    evaluation = Evaluation(
        strategy, training.state, Objective(LOSS), [accuracy()], Data(Arrays(arrays(11))), BATCH
    )
    assert evaluation() == evaluation()


@pytest.mark.parametrize('by_data_worker', [False, True], ids=['here', 'data worker'])
def test_evaluations_in_a_row_are_equal_and_leave_nothing_behind(make_strategy, by_data_worker):
    class Torn(Arrays):
        def fetch(self, indices):
            def read(indices):
                if 5 in indices:
                    raise BadRecord('it is torn')
                return indices

            indices = tf.ensure_shape(tf.numpy_function(read, [indices], tf.int64), indices.shape)
            return super().fetch(indices)

    data, strategy, asked = Data(Torn(arrays(21)), on_bad_record='skip'), make_strategy(2), None
    if by_data_worker:
        server = Server(
            '127.0.0.1:0', train_data=data, eval_data=data, seed=0, config_sha256='c', threads=1
        )
        asked = DataWorkers([server.address], config_sha256='c')
    training = Training(strategy)
    metrics = [accuracy()]
    evaluation = Evaluation(strategy, training.state, Objective(LOSS), metrics, data, BATCH, asked)
    whole, first = evaluation(), evaluation(max_steps=1)
    assert first != whole
    assert evaluation() == whole
    gc.collect()
    before = script_ops._py_funcs.size()
    assert [evaluation() for _ in range(3)] == [whole] * 3
    gc.collect()
    assert script_ops._py_funcs.size() == before
    del evaluation  # What it has asked for the next one is waited for.
    if by_data_worker:
        server.stop()


def test_one_that_fails_changes_nothing_for_the_next(make_strategy):
    class Away(Arrays):
        is_away = False

        def fetch(self, indices):
            def read(indices):
                if self.is_away and 13 in indices:
                    raise OSError(5, 'the disk is away')
                return indices

            indices = tf.ensure_shape(tf.numpy_function(read, [indices], tf.int64), indices.shape)
            return super().fetch(indices)

    source, strategy = Away(arrays(40)), make_strategy(2)
    training = Training(strategy)
    evaluation = Evaluation(strategy, training.state, Objective(LOSS), [], Data(source), 4)
    source.is_away = True
    with pytest.raises(ReadError, match='the disk is away'):
        evaluation()
    source.is_away = False
    other = Evaluation(strategy, training.state, Objective(LOSS), [], Data(Arrays(arrays(40))), 4)
    assert evaluation() == evaluation() == other()


def test_penalties_count_once_in_the_loss(strategy):
    def model():
        l2 = keras.regularizers.L2(0.5)
        return keras.Sequential([keras.layers.Dense(CLASSES, kernel_regularizer=l2)])

    data = Data(Arrays(arrays(11)))
    state = build_state(strategy, model, None, batch_spec(data)['inputs'])
    weights = state.weights()
    expected = by_hand(weights, arrays(11)['image'], arrays(11)['label'], None)['loss']
    expected += 0.5 * np.sum(weights['sequential/dense/kernel'] ** 2)
    found = Evaluation(strategy, state, Objective(LOSS), [], data, BATCH)()['loss']
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_evaluation_changes_nothing_and_training_goes_on_as_without_it(make_strategy):
    found = []
    for evaluates in (False, True):
        training = Training(make_strategy(2), noisy, sgd(0.1, momentum=0.9))
        training.run(2)
        if evaluates:
            data = Data(Arrays(arrays(11)))
            metrics = [accuracy()]
            before = training.variables()
            Evaluation(make_strategy(2), training.state, Objective(LOSS), metrics, data, BATCH)()
            assert_equal(training.variables(), before)
        training.run(2)
        found.append(training.sha256())
    assert found[0] == found[1]


def test_max_steps_evaluates_the_first_batches(make_strategy):
    data = Data(Arrays(arrays(20)))
    state = build_state(make_strategy(2), dense, None, batch_spec(data)['inputs'])
    found = Evaluation(make_strategy(2), state, Objective(LOSS), [accuracy()], data, BATCH)(
        max_steps=1
    )
    expected = by_hand(state.weights(), arrays(20)['image'][:8], arrays(20)['label'][:8], None)
    np.testing.assert_allclose(found['loss'], expected['loss'], rtol=1e-6)


def test_labels_outside_the_classes_are_refused_before_anything_runs(make_strategy):
    labels = np.full(8, CLASSES)
    data = Data(Arrays({'image': np.zeros([8, FEATURES], np.float32), 'label': labels}))
    state = build_state(make_strategy(1), dense, None, batch_spec(data)['inputs'])
    with pytest.raises(ConfigError, match='Set NUM_CLASSES = 5'):
        Evaluation(make_strategy(1), state, Objective(LOSS), [], data, BATCH)


# ---- Of checkpoints.


@pytest.fixture(scope='module')
def run(make_strategy, tmp_path_factory):
    """The directory and the result of a short run with checkpoints at steps 4, 8 and 10."""
    model_dir = tmp_path_factory.mktemp('run')
    result = tiny.run(make_strategy(1), model_dir, steps=10, save_every=4, eval_every=4)
    return model_dir, result


def evaluated(strategy, model_dir, **options):
    return evaluate(
        strategy=strategy,
        model_dir=str(model_dir),
        model=tiny.model,
        loss=LOSS,
        metrics=[tiny.accuracy()],
        eval_data=tiny.eval_data(),
        batch_size=tiny.BATCH,
        **options,
    )


def known(model_dir, step):
    """What the run itself found at a step, as its checkpoint has it."""
    _, manifest = Checkpoints(model_dir / 'checkpoints', writer=False).read(step)
    metrics = manifest['metrics'].items()
    return {name[5:]: value for name, value in metrics if name.startswith('eval/')}


@pytest.mark.parametrize('replicas', [1, 2])
def test_the_newest_checkpoint_gives_what_the_run_found(run, make_strategy, replicas):
    model_dir, result = run
    assert result.step == 10
    found = evaluated(make_strategy(replicas), model_dir)
    assert found == pytest.approx(known(model_dir, 10), rel=1e-5)


def test_the_checkpoint_of_a_given_step_is_evaluated(run, make_strategy):
    model_dir, _ = run
    found = evaluated(make_strategy(1), model_dir, step=4)
    assert found == pytest.approx(known(model_dir, 4), rel=1e-5)
    assert found['loss'] != pytest.approx(known(model_dir, 10)['loss'], rel=1e-5)


def test_a_step_without_checkpoint_is_refused_with_the_steps_that_have_one(run, make_strategy):
    with pytest.raises(ConfigError, match=r'no checkpoint of step 5. It holds 4, 8, 10'):
        evaluated(make_strategy(1), run[0], step=5)


def test_a_directory_without_checkpoints_is_refused(make_strategy, tmp_path):
    with pytest.raises(ConfigError, match=r'holds no checkpoint. Train first, or correct'):
        evaluated(make_strategy(1), tmp_path)


def test_following_ends_with_the_last_step_of_the_run(run, make_strategy, tmp_path):
    model_dir, _ = run
    (tmp_path / 'checkpoints').mkdir()

    def copy():
        # In the order and the way of a run: complete, by one rename, the last one late.
        for step, delay in ((8, 0.5), (10, 3.0)):
            time.sleep(delay)
            tensors, manifest = Checkpoints(model_dir / 'checkpoints', writer=False).read(step)
            saver = Checkpoints(tmp_path / 'checkpoints', asynchronous=False)
            saver.save(tensors, manifest)
            saver.close()

    writer = threading.Thread(target=copy)
    writer.start()
    started = time.monotonic()
    found = evaluated(make_strategy(1), tmp_path, follow=True, follow_seconds=60)
    writer.join()
    assert time.monotonic() - started < 50
    assert found == pytest.approx(known(model_dir, 10), rel=1e-5)
    points = tiny.points(tmp_path / 'eval')
    assert [step for step, _ in points['loss']] in ([8, 10], [10])
    assert points['loss'][-1][1] == pytest.approx(found['loss'], rel=1e-6)


def test_following_a_run_that_writes_nothing_ends_when_patience_does(make_strategy, tmp_path):
    started = time.monotonic()
    assert evaluated(make_strategy(1), tmp_path, follow=True, follow_seconds=0.1) == {}
    assert time.monotonic() - started < 30
