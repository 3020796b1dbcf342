"""A language model from files: a loss for each token, on several replicas, weighted, evaluated."""

import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.processes import environment
from tests.trainer import tiny, training
from tests.trainer.families import families
from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.data.text import text
from trainer.evaluate import evaluate
from trainer.export.saved_model import export
from trainer.models.transformer_lm import transformer_lm

LENGTH, STEPS = 16, 100
GENERATE = """
import json
import sys
sys.modules.update(dict.fromkeys(('keras', 'trainer', 'gin')))  # As if they were not installed.
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures['generate']
settings = {'max_new_tokens': 20, 'temperature': 0.0, 'top_k': 0, 'seed': 0}
prompts = tf.constant(['spam egg', 'spam eggs\\nsp', ''])
texts = served(prompt=prompts, **{k: tf.constant(v) for k, v in settings.items()})['text']
print(json.dumps([text.decode('latin-1') for text in texts.numpy()]))
"""
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model():
    return transformer_lm(257, units=32, blocks=2)


def adam():
    # The rate goes to nothing, so that what is evaluated is not a moment of a swing.
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, STEPS))


@pytest.fixture
def data(tmp_path):
    """What is trained on, and another text that is shorter than a whole number of batches."""
    for name, count in (('train', 60), ('eval', 23)):
        words = ('spam ', 'eggs\n') * count
        (tmp_path / f'{name}.txt').write_text(''.join(words))
    return tuple(
        Data(text(str(tmp_path / f'{name}.txt'), LENGTH), 'tokens', label='targets')
        for name in ('train', 'eval')
    )


def test_a_text_is_learnt_on_two_replicas_and_evaluated_on_each_token_once(
    make_strategy, tmp_path, data
):
    train, test = data
    run = functools.partial(
        tiny.run,
        model=model,
        optimizer=adam,
        loss=LOSS,
        train_data=train,
        eval_data=test,
        batch_size=6,
        steps=STEPS,
    )
    result = run(make_strategy(2), tmp_path / 'run')
    assert result.metrics['eval/loss'] < 0.5  # nats a token; by chance it would be 5.5.
    assert result.metrics['eval/accuracy'] > 0.9

    alone = evaluate(
        strategy=make_strategy(1),
        model_dir=str(tmp_path / 'run'),
        model=model,
        loss=LOSS,
        metrics=[tiny.accuracy()],
        eval_data=test,
        batch_size=5,
    )
    assert alone['loss'] == pytest.approx(result.metrics['eval/loss'], rel=1e-5)
    assert alone['accuracy'] == pytest.approx(result.metrics['eval/accuracy'], rel=1e-6)

    # By hand, from the bytes of the file, with the same weights.
    from trainer.checkpoint import Checkpoints
    from trainer.data.batch import batch_spec
    from trainer.state import State, build_model

    built, spec = build_model(model, batch_spec(test)['inputs'])
    State(built, None, spec).restore(Checkpoints(tmp_path / 'run' / 'checkpoints').read(STEPS)[0])
    content = (tmp_path / 'eval.txt').read_bytes()
    count = len(content) // LENGTH
    stream = np.array([256, *content])
    logits = built(stream[: count * LENGTH].reshape(count, LENGTH)).numpy()
    targets = stream[1 : count * LENGTH + 1].reshape(count, LENGTH)
    losses = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    assert alone['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert alone['accuracy'] == pytest.approx(np.mean(logits.argmax(axis=2) == targets))


def test_windows_can_be_weighted(make_strategy, tmp_path, data):
    features = data[0].source.fetch(tf.range(12, dtype=tf.int64))
    arrays = {name: tensor.numpy() for name, tensor in features.items()}
    # The weightless half is nonsense, which nothing may come of.
    weights = np.repeat([1.0, 0.0], 6).astype(np.float32)
    arrays['targets'] = np.where(weights[:, None] > 0, arrays['targets'], 7)
    half = {name: array[:6] for name, array in arrays.items()}
    results = [
        tiny.run(
            make_strategy(2),
            tmp_path / name,
            model=model,
            optimizer=functools.partial(keras.optimizers.SGD, 0.1),
            loss=LOSS,
            train_data=Data(Arrays(inputs), 'tokens', label='targets', weight=weight),
            eval_data=Data(Arrays(inputs), 'tokens', label='targets', weight=weight),
            batch_size=size,
            steps=1,
        ).metrics
        for name, inputs, weight, size in (
            ('weighted', {**arrays, 'w': weights}, 'w', 12),
            ('half', half, None, 6),
        )
    ]
    for name in ('train/loss', 'train/accuracy', 'eval/loss', 'eval/accuracy'):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize('name', ['transformer_lm', 'text_classifier'])
def test_steps_on_two_replicas_are_those_on_one_device(make_strategy, name):
    family = families()[name]
    found = []
    for replicas in (1, 2):
        run = training.Training(
            make_strategy(replicas), family.model, training.sgd(0.02), family.data, loss=family.loss
        )
        losses = [run.run()['loss'] for _ in range(4)]
        found.append({'losses': np.array(losses), **run.weights()})
    training.assert_close(found[1], found[0])
    assert len(set(found[0]['losses'])) == 4


@pytest.mark.slow
def test_a_process_that_has_tensorflow_alone_goes_on_with_texts(make_strategy, tmp_path, data):
    tiny.run(
        make_strategy(1),
        tmp_path / 'run',
        model=model,
        optimizer=adam,
        loss=LOSS,
        train_data=data[0],
        eval_data=None,
        batch_size=6,
        steps=STEPS,
    )
    path = export(model_dir=str(tmp_path / 'run'), model=model, data=data[0])
    done = subprocess.run(
        [sys.executable, '-c', GENERATE, str(path)],
        env=environment(PYTHONPATH=''),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout.splitlines()[-1])
    line = 'spam eggs\n'
    assert texts[0].startswith('s\n' + line)
    assert texts[1].startswith('am eggs\n')
    assert texts[2].startswith(line)
