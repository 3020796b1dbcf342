"""A table from file to served model: trained, resumed, evaluated, exported."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.processes import environment
from tests.trainer import tiny
from trainer.data.batch import Data
from trainer.data.subset import subset
from trainer.data.table import table
from trainer.data.table_features import table_features
from trainer.errors import ConfigError
from trainer.evaluate import evaluate
from trainer.export.saved_model import argument_names, export
from trainer.models.mlp import mlp

PENGUINS = Path(__file__).parents[2] / 'trainer' / 'data' / 'penguins.csv'
CLASSES = ['Adelie', 'Chinstrap', 'Gentoo']
SERVE = """
import json, sys
sys.modules.update(dict.fromkeys(('keras', 'trainer', 'gin', 'pyarrow')))  # Not installed.
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures['serving_default']
spec = served.structured_input_signature[1]
raw = {name: tf.constant(cells, spec[name].dtype) for name, cells in json.load(sys.stdin).items()}
print(json.dumps(served(**raw)['outputs'].numpy().tolist()))
"""


def optimizer():
    return keras.optimizers.Adam(1e-2)


@pytest.fixture
def path(tmp_path):
    (tmp_path / 'penguins.csv').write_bytes(PENGUINS.read_bytes())
    return str(tmp_path / 'penguins.csv')


def data(path, label, **options):
    """What is trained and what is evaluated on."""
    whole = table(path, label=label)
    train, test = subset(whole, begin=0.2), subset(whole, end=0.2)
    preprocess = table_features(train, **options)
    return tuple(Data(s, 'features', label=label, preprocess=preprocess) for s in (train, test))


def served(exported, raw):
    done = subprocess.run(
        [sys.executable, '-c', SERVE, str(exported)],
        input=json.dumps(raw),
        env=environment(PYTHONPATH=''),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


@pytest.mark.slow
def test_raw_rows_are_served_as_they_were_trained_and_evaluated_on(make_strategy, tmp_path, path):
    # TensorFlow takes none of these for the name of an argument as it stands.
    renamed = {
        'bill_length_mm': 'Bill length (mm)',
        'bill_depth_mm': 'bill_length__mm_',
        'flipper_length_mm': 'self',
        'body_mass_g': 'file',
    }
    cells = Path(path).read_text()
    for name, odd in renamed.items():
        cells = cells.replace(name, odd, 1)
    Path(path).write_text(cells)
    options = {'crosses': [('island', 'sex')], 'cross_buckets': 16, 'categories': ['year']}
    train, test = data(path, 'species', **options)
    run = {
        'model': functools.partial(mlp, 3, units=16, blocks=1),
        'optimizer': optimizer,
        'batch_size': 30,
        'train_data': train,
        'eval_data': test,
    }
    # Interrupted and on another topology, with what it had learnt before.
    tiny.run(make_strategy(1), tmp_path / 'run', **{**run, 'steps': 100, 'max_steps': 20})
    result = tiny.run(make_strategy(2), tmp_path / 'run', **{**run, 'steps': 100})
    assert result.metrics['eval/accuracy'] > 0.95  # The largest class is 44 %.
    manifest = json.loads((result.checkpoint / 'manifest.json').read_text())
    assert manifest['preprocess'] == train.preprocess.state

    alone = evaluate(
        strategy=make_strategy(1),
        model_dir=str(tmp_path / 'run'),
        model=run['model'],
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[tiny.accuracy()],
        eval_data=test,
        batch_size=17,
    )
    assert alone['accuracy'] == result.metrics['eval/accuracy']

    exported = export(model_dir=str(tmp_path / 'run'), model=run['model'], data=train)
    rows = test.source.fetch(tf.range(test.source.num_examples, dtype=tf.int64))
    labels = rows.pop('species').numpy()
    arguments = argument_names(rows)
    raw = {
        arguments[name]: [c.decode() for c in cells] if cells.dtype == object else cells.tolist()
        for name, cells in ((name, tensor.numpy()) for name, tensor in rows.items())
    }
    logits = served(exported, raw)
    assert np.mean(logits.argmax(axis=1) == labels) == pytest.approx(alone['accuracy'], abs=1e-6)
    # Another species of islands and sexes, and nothing known at all.
    strange = {
        name: ['Mars' if name == 'island' else ''] if isinstance(cells[0], str) else [np.nan]
        for name, cells in raw.items()
    }
    assert np.isfinite(served(exported, {**strange, 'year': [1900]})).all()

    other = {**run, 'train_data': data(path, 'species', categories=['year'])[0]}
    with pytest.raises(ConfigError, match='Restore the ones it was trained with'):
        tiny.run(make_strategy(1), tmp_path / 'run', **{**other, 'steps': 110})


def test_a_number_can_be_predicted_and_categories_be_embedded(make_strategy, tmp_path, path):
    rows = [row for row in Path(path).read_text().splitlines() if 'NA,NA,NA,NA' not in row]
    Path(path).write_text('\n'.join(rows))

    def model():
        features = keras.Input((10,), name='features')
        island = keras.Input((), dtype='int64', name='island')
        embedded = keras.layers.Embedding(4, 2)(island)
        x = keras.layers.Concatenate()([features, embedded])
        outputs = keras.layers.Dense(1)(keras.layers.Dense(16, activation='relu')(x))
        outputs = keras.layers.Rescaling(800.0, 4200.0)(outputs)
        return keras.Model({'features': features, 'island': island}, outputs)

    train, test = (
        dataclasses.replace(part, inputs=('features', 'island'))
        for part in data(path, 'body_mass_g', indexed=['island'])
    )
    result = tiny.run(
        make_strategy(2),
        tmp_path / 'run',
        model=model,
        optimizer=optimizer,
        loss=keras.losses.MeanSquaredError(),
        metrics=[keras.metrics.MeanAbsoluteError(name='error')],
        train_data=train,
        eval_data=test,
        batch_size=34,
        steps=150,
    )
    masses = train.source.fetch(tf.range(train.source.num_examples, dtype=tf.int64))
    masses = masses['body_mass_g'].numpy()
    guess = np.abs(masses - masses.mean()).mean()
    assert guess > 600
    assert result.metrics['eval/error'] < guess / 2
