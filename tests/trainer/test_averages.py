"""Running averages of the weights are what is evaluated and exported."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from tests.trainer.training import Training
from trainer.checkpoint import Checkpoints
from trainer.evaluate import evaluate
from trainer.export.saved_model import export
from trainer.retention import Keep

MOMENTUM = 0.8


def averaged():
    return keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=MOMENTUM)


def test_an_average_is_what_the_formula_says(strategy):
    training = Training(strategy, optimizer=averaged)
    expected = None
    for _ in range(4):
        training.run(1)
        weights = training.weights()
        expected = {
            path: value if expected is None else MOMENTUM * expected[path] + (1 - MOMENTUM) * value
            for path, value in weights.items()
        }
    found = training.variables()
    for path, value in expected.items():
        np.testing.assert_allclose(found[f'averages/{path}'], value, rtol=1e-5)
        assert not np.allclose(found[path], value)


def test_evaluation_and_export_use_the_averages(make_strategy, tmp_path):
    strategy = make_strategy(2)
    run = tiny.run(strategy, tmp_path, optimizer=averaged)
    tensors, _ = Checkpoints(tmp_path / 'checkpoints', writer=False).read(run.step)
    state = Training(make_strategy(1), tiny.model, data=tiny.train_data()).state
    by_hand = {p: tensors.get(f'averages/{p}', tensors.get(p)) for p in state.variables}
    for path, variable in state.variables.items():
        if by_hand[path] is not None:
            variable.assign(by_hand[path])

    alone = {'model': tiny.model, 'model_dir': str(tmp_path)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = evaluate(
        strategy=strategy, loss=loss, eval_data=tiny.eval_data(), batch_size=8, **alone
    )
    assert found['loss'] == pytest.approx(run.metrics['eval/loss'], abs=1e-6)

    exported = tf.saved_model.load(str(export(data=tiny.train_data(), **alone)))
    images = tiny.eval_data().source.fetch(tf.range(5, dtype=tf.int64))['image']
    served = exported.signatures['serving_default'](image=images)['outputs']
    expected = state.model(tf.cast(images, tf.float32) / 255.0, training=False)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_same_averages(make_strategy, tmp_path):
    whole = tiny.run(make_strategy(2), tmp_path / 'whole', optimizer=averaged)
    for steps in (9, None):
        parts = tiny.run(make_strategy(2), tmp_path / 'b', optimizer=averaged, max_steps=steps)
    assert parts.state_sha256 == whole.state_sha256


def test_the_best_checkpoint_is_found_by_the_metric_of_the_run(make_strategy, tmp_path):
    keep = Keep(last=100, best=2, metric='eval/accuracy', mode='max')
    tiny.run(make_strategy(1), tmp_path, keep=keep)
    checkpoints = Checkpoints(tmp_path / 'checkpoints', writer=False)
    found = {s: checkpoints.read(s)[1]['metrics'].get('eval/accuracy') for s in checkpoints.steps()}
    best = checkpoints.choose('best')
    assert found[best] == max(value for value in found.values() if value is not None)
