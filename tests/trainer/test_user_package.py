"""A user's own package, outside the repository, through every mode of the program."""

import json
import re
import subprocess
import sys

import pytest

from tests.processes import environment

pytestmark = pytest.mark.slow

MODULE = '''
"""What a user writes: a source, a model, a loss and a metric, each registered with gin."""

import hashlib

import gin
import keras
import numpy as np
import tensorflow as tf

from trainer import Source


@gin.register
class Moons(Source):
    """Two interleaved half circles, computed when they are read."""

    def __init__(self, size: int, first: int = 0):
        self._size, self._first = size, first

    @property
    def num_examples(self):
        return self._size

    @property
    def element_spec(self):
        return {
            'point': tf.TensorSpec([2], tf.float32),
            'side': tf.TensorSpec([], tf.int64),
        }

    @property
    def fingerprint(self):
        return hashlib.sha256(f'moons {self._size} {self._first}'.encode()).hexdigest()

    def fetch(self, indices):
        number = indices + self._first
        side = number % 2
        angle = tf.cast(number * 37 % 180, tf.float32) * (np.pi / 180)
        flip = 1.0 - 2.0 * tf.cast(side, tf.float32)
        shift = tf.cast(side, tf.float32)
        point = tf.stack([tf.cos(angle) * flip + shift, tf.sin(angle) * flip + shift / 2], -1)
        return {'point': point, 'side': side}


@gin.register
class Net(keras.Model):
    def __init__(self, width: int = 16, dropout: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.widen = keras.layers.Dense(width, activation='tanh')
        self.norm = keras.layers.BatchNormalization(momentum=0.9)
        self.drop = keras.layers.Dropout(dropout)
        self.score = keras.layers.Dense(1, dtype='float32')

    def call(self, inputs, training=False):
        x = self.norm(self.widen(inputs), training=training)
        return self.score(self.drop(x, training=training))


@gin.register
def hinge(labels, outputs):
    sign = 2.0 * tf.cast(labels, tf.float32) - 1.0
    return tf.nn.relu(1.0 - sign * outputs[:, 0])


@gin.register
class RightSide(keras.metrics.Mean):
    def update_state(self, labels, outputs, sample_weight=None):
        right = tf.equal(outputs[:, 0] > 0, tf.equal(labels, 1))
        return super().update_state(tf.cast(right, tf.float32), sample_weight=sample_weight)
'''

CONFIG = """
include 'base.gin'
include 'cluster/local.gin'
include 'optim/adam.gin'
import moons.parts

MODEL = @Net
LOSS = @hinge
METRICS = [@RightSide()]
RightSide.name = 'right'
TRAIN_DATA = @train/Data()
EVAL_DATA = @eval/Data()
Data.inputs = 'point'
Data.label = 'side'
train/Data.source = @train/Moons()
eval/Data.source = @eval/Moons()
train/Moons.size = 300
eval/Moons.size = 61
eval/Moons.first = 1000
Net.width = 24
Net.dropout = 0.1
STEPS = 150
BATCH_SIZE = 30
DEVICES = 2
LEARNING_RATE = 0.02
train:
  save_every = 50
  log_every = 50
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / 'moons'
    folder.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / 'parts.py').write_text(MODULE)
    (tmp_path / 'moons.gin').write_text(CONFIG)
    return tmp_path


def run(package, *flags):
    done = subprocess.run(
        [sys.executable, '-m', 'trainer', '--gin_file=moons.gin', '--model_dir=run', *flags],
        cwd=package,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_it_trains_resumes_evaluates_and_exports(package):
    out, _ = run(package, '--mode=train', '--gin.train.max_steps=70', '--gin.train.sample_log=True')
    assert 'finished step 70: ' in out

    out, err = run(package, '--gin.train.sample_log=True')
    assert 'resumed at step 70' in err
    assert float(re.search(r'eval/right (0\.\d+|1\.0+)', out)[1]) > 0.8
    sha256 = re.search(r'state sha256: (\w+)', out)[1]
    assert (package / 'run' / 'export' / '150' / 'saved_model.pb').exists()
    order = (package / 'run' / 'samples.tsv').read_text().splitlines()
    assert [int(line.split('\t')[0]) for line in order] == list(range(150))

    whole, _ = run(package, '--mode=train', '--model_dir=whole')
    assert re.search(r'state sha256: (\w+)', whole)[1] == sha256

    evaluated, _ = run(package, '--mode=evaluate')
    values = re.search(r'eval/(loss [\d.]+), eval/(right [\d.]+)', out)
    assert evaluated.strip() == f'{values[1]}, {values[2]}'

    manifest = package / 'run' / 'checkpoints' / 'step-00000150' / 'manifest.json'
    assert json.loads(manifest.read_text())['state_sha256'] == sha256
    record = (package / 'run' / 'config' / 'config-70.gin').read_text()
    assert 'Net.width = 24' in record
