"""A step of a run again: the bits of training, and where numbers stop being finite."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from tests.trainer.test_divergence import SEED as POISON_SEED
from tests.trainer.test_divergence import data as poisoned
from trainer.checkpoint import Checkpoints
from trainer.data import order
from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.divergence import Divergence
from trainer.errors import ConfigError
from trainer.replay import replay


def again(strategy, model_dir, step, **changes):
    """Replays a step of what `tiny.run` has trained."""
    arguments = {
        'model': tiny.model,
        'optimizer': tiny.optimizer,
        'loss': keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        'metrics': [tiny.accuracy()],
        'train_data': tiny.train_data(),
        'steps': tiny.STEPS,
        'batch_size': tiny.BATCH,
        'seed': 3,
        **changes,
    }
    return replay(strategy=strategy, model_dir=str(model_dir), step=step, **arguments)


def contents(directory):
    """All files with their bytes and times."""
    files = [path for path in sorted(directory.rglob('*')) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def manifest(model_dir, step):
    return Checkpoints(model_dir / 'checkpoints', writer=False).read(step)[1]


@pytest.mark.parametrize('replicas', [1, 2])
def test_a_replayed_step_has_the_bits_and_the_examples_of_training_and_writes_nothing(
    make_strategy, tmp_path, replicas
):
    strategy = make_strategy(replicas)
    tiny.run(strategy, tmp_path, steps=9, save_every=4, eval_data=None, sample_log=True)
    before = contents(tmp_path)
    lines = dict(line.split('\t') for line in (tmp_path / 'samples.tsv').read_text().splitlines())
    for step, start in ((8, 4), (1, 0), (9, 8)):
        found = again(strategy, tmp_path, step, steps=9)
        assert found.finite
        assert found.start == start
        assert np.concatenate(found.records).tolist() == [
            int(number) for number in lines[str(step - 1)].split()
        ]
        assert len(found.records) == replicas
        assert found.difference < 1e-5
        assert (found.finding, found.operation, found.nearest) == (None, None, None)
        total = np.sqrt(sum(each.norm**2 for each in found.gradients))
        assert total == pytest.approx(found.gradient_norm, rel=1e-4)
        norms = [each.norm for each in found.gradients]
        assert norms == sorted(norms, reverse=True)
        if step > 1:
            assert found.state_sha256 == found.saved_sha256
            assert found.saved_sha256 == manifest(tmp_path, step)['state_sha256']
            assert f'state sha256 after step {step}: {found.saved_sha256}\n' in str(found)
            assert 'its checkpoint says: the same' in str(found)
    assert contents(tmp_path) == before
    assert not tf.config.functions_run_eagerly()


EXAMPLES, SEED = 24, 5


def bad_record(step, row):
    """The record that a row of a step reads, of 24 examples in batches of 8."""
    positions = order.positions(step - 1, tiny.BATCH)
    return int(order.records(positions, num_examples=EXAMPLES, seed=SEED)[row])


def points(spoil):
    """Examples of two positive numbers each; `spoil` is given the arrays to change."""
    rng = np.random.default_rng(0)
    arrays = {
        'point': rng.uniform(1, 2, (EXAMPLES, 2)).astype(np.float32),
        'label': rng.uniform(1, 2, EXAMPLES).astype(np.float32),
    }
    spoil(arrays)
    return Data(Arrays(arrays), inputs='point')


class Logarithm(keras.layers.Layer):
    def call(self, x):
        return tf.math.log(x)


class Root(keras.layers.Layer):
    def call(self, x):
        return tf.sqrt(x)


class Chain(keras.Model):
    """A dense layer that begins as the identity, then another layer, then the sum."""

    def __init__(self, layer):
        super().__init__(name='chain')
        self.begin = keras.layers.Dense(2, kernel_initializer='identity', name='begin')
        self.layer = layer

    def call(self, inputs):
        return tf.reduce_sum(self.layer(self.begin(inputs)), axis=1)


def squares(labels, outputs):
    return tf.square(labels - outputs)


def logarithmic(labels, outputs):
    return tf.math.log(labels) * outputs


def fragile(strategy, directory, spoil, layer=Logarithm, step=1, **changes):
    arguments = {
        'model': lambda: Chain(layer(name='fragile')),
        'optimizer': lambda: keras.optimizers.SGD(1e-3),
        'loss': squares,
        'metrics': (),
        'train_data': points(spoil),
        'seed': SEED,
        **changes,
    }
    return again(strategy, directory, step, **arguments)


def test_a_record_that_is_not_finite_is_named_and_its_step_is_skipped(make_strategy, tmp_path):
    bad = bad_record(2, row=6)

    def spoil(arrays):
        arrays['point'][bad, 1] = np.nan

    found = fragile(make_strategy(2), tmp_path, spoil, step=2)
    assert not found.finite
    assert str(found.finding) == f"the batch's inputs for record {bad} (replica 1)"
    assert found.operation is None  # Nothing was finite before.
    assert np.isnan([found.loss, found.gradient_norm]).all()
    assert found.gradients[0].bad > 0
    assert found.nearest in ('chain/begin/kernel', 'chain/begin/bias')
    text = str(found)
    assert f"in the forward pass: the batch's inputs for record {bad} (replica 1)" in text
    assert f'in the gradient, seen from the loss: {found.nearest}' in text
    assert 'state sha256' not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('accumulate', [1, 2])
def test_the_layer_the_operation_and_the_line_are_named(make_strategy, tmp_path, accumulate):
    bad = bad_record(1, row=7)

    def spoil(arrays):
        arrays['point'][bad, 0] = -1.0

    found = fragile(make_strategy(1), tmp_path, spoil, accumulate=accumulate)
    assert not found.finite
    assert str(found.finding) == f"the layer 'chain/fragile' for record {bad} (replica 0)"
    assert found.operation.name == 'Log'
    assert not found.operation.backward
    assert found.operation.where.startswith(f'{__file__}, line ')
    assert found.operation.where.endswith(', in call')


def test_the_loss_function_is_named(make_strategy, tmp_path):
    bad = bad_record(1, row=0)

    def spoil(arrays):
        arrays['label'][bad] = -1.0

    found = fragile(make_strategy(1), tmp_path, spoil, loss=logarithmic)
    assert str(found.finding) == f'the loss function for record {bad} (replica 0)'
    assert found.operation.name == 'Log'
    assert found.operation.where.endswith(', in logarithmic')


def test_a_gradient_that_alone_is_not_finite_is_named(make_strategy, tmp_path):
    def spoil(arrays):
        arrays['point'][bad_record(1, row=3)] = 0.0

    found = fragile(make_strategy(1), tmp_path, spoil, layer=Root)
    assert not found.finite
    assert np.isfinite(found.loss)
    assert found.finding is None
    assert found.operation.backward
    assert found.nearest in ('chain/begin/kernel', 'chain/begin/bias')


def test_a_finite_step_that_uses_infinities_on_purpose_is_finite(make_strategy, tmp_path):
    class Masked(keras.layers.Layer):
        def call(self, x):
            hidden = tf.where(x > 1.5, x, tf.constant(-np.inf) * tf.ones_like(x))
            return tf.nn.softmax(tf.concat([x, hidden], axis=1))

    found = fragile(make_strategy(1), tmp_path, lambda arrays: None, layer=Masked)
    assert found.finite
    assert (found.finding, found.operation, found.nearest) == (None, None, None)


def test_a_step_that_the_run_does_not_have_is_refused(make_strategy, tmp_path):
    for step in (0, -1, tiny.STEPS + 1, True, 1.5):
        with pytest.raises(ConfigError) as raised:
            again(make_strategy(1), tmp_path, step)
        assert str(raised.value) == (
            f'There is no step {step!r} to replay: the steps of this run are 1 to 40.'
        )


def test_a_damaged_checkpoint_is_left_where_it_is_and_the_one_before_is_used(
    make_strategy, tmp_path
):
    one = make_strategy(1)
    tiny.run(one, tmp_path, steps=9, save_every=3, eval_data=None)
    data = tmp_path / 'checkpoints/step-00000006/state.data-00000-of-00001'
    data.write_bytes(data.read_bytes()[:-1] + b'?')
    before = contents(tmp_path)
    found = again(one, tmp_path, 9, steps=9)
    assert found.start == 3
    assert found.state_sha256 == found.saved_sha256
    assert contents(tmp_path) == before
    with pytest.raises(ConfigError) as raised:
        again(one, tmp_path, 9, steps=9, oldest=5)
    assert str(raised.value) == (
        'Step 9 cannot be reached: its configuration holds from step 5 on, and no good checkpoint '
        'from there is left. There are: 3, 6, 9. Replay a step after one of these.'
    )
    with pytest.raises(ConfigError, match='was trained with seed = 3'):
        again(one, tmp_path, 9, steps=9, seed=4)


def test_a_step_after_a_roll_back_has_the_examples_that_it_read_in_the_end(make_strategy, tmp_path):
    strategy, data = make_strategy(1), poisoned([20])
    common = {'train_data': data, 'seed': POISON_SEED}
    tiny.run(
        strategy, tmp_path, eval_data=None, divergence=Divergence(bad_steps=1), sample_log=True,
        **common,
    )  # fmt: skip
    lines = dict(line.split('\t') for line in (tmp_path / 'samples.tsv').read_text().splitlines())
    for step in (24, 19, 20):  # Before the window, at it, and behind; from checkpoint 12.
        found = again(strategy, tmp_path, step, **common)
        assert ' '.join(map(str, np.concatenate(found.records))) == lines[str(step - 1)]
        assert found.saved_sha256 in (None, found.state_sha256)
    assert again(strategy, tmp_path, 24, **common).saved_sha256
