"""Data that makes one worker's loss NaN is left out, and training ends as if it had not been."""

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.chaos.jobs import Job, ledger

pytestmark = pytest.mark.chaos

# Three batches in which the last row of worker 1 is not a number.
POISON = """
import json
import os

import gin
import tensorflow as tf

INDEX = json.loads(os.environ['TF_CONFIG'])['task']['index']
BATCH, FIRST, END = 64, 430, 433


@gin.register
def poison(features, seeds):
    step, row = seeds[:, 2] // BATCH, seeds[:, 2] % BATCH
    hit = (step >= FIRST) & (step < END) & (row == BATCH - 1) & (INDEX == 1)
    image = tf.cast(features['image'], tf.float32)
    return {**features, 'image': tf.where(hit[:, None, None, None], float('nan'), image)}
"""
# Nothing random, and small steps: one that is left out makes little difference.
PLAIN = ('--gin_file=models/mlp.gin', '--gin.mlp.dropout=0.0', '--mode=train_and_evaluate')
PLAIN += ('--gin_file=optim/sgd.gin', '--gin.LEARNING_RATE=0.01', '--gin.Divergence.bad_steps=3')


def end_of(model_dir):
    path = model_dir / 'checkpoints' / 'step-00000900'
    reader = tf.train.load_checkpoint(str(path / 'state'))
    names = reader.get_variable_to_shape_map()
    finite = all(np.isfinite(reader.get_tensor(name)).all() for name in names)
    return json.loads((path / 'manifest.json').read_text()), finite


def test_poisoned_data_on_one_worker_is_left_out_and_told(tmp_path):
    (tmp_path / 'poison.py').write_text(POISON)
    (tmp_path / 'poison.gin').write_text('import poison\nAUGMENT = @poison\n')
    clean, model_dir = tmp_path / 'clean', tmp_path / 'run'
    with Job(clean, *PLAIN, augmented=()) as job:
        assert job.end()[0] == 0
    with Job(model_dir, *PLAIN, '--gin_file=poison.gin', augmented=()) as job:
        code, output = job.end()
    assert code == 0, output
    assert job.attempts() == 1, 'it goes back within the processes'
    manifest, finite = end_of(model_dir)
    assert finite
    # As many steps before the bad ones go with them.
    windows = [[427 * 64, 433 * 64]]
    assert manifest['left_out'] == {'windows': windows, 'rollbacks': 1}
    (event,) = ledger(model_dir, 'rollback')
    assert (event['rolled_back'], event['to'], event['windows']) == (433, 400, windows)
    assert 'Training went astray and went back to a checkpoint 1 time(s)' in output
    straight = end_of(clean)[0]['metrics']['eval/loss']
    assert abs(manifest['metrics']['eval/loss'] / straight - 1) < 0.02
    # The log of samples tells which ones they were.
    logs = [(d / 'samples.tsv').read_text().splitlines() for d in (clean, model_dir)]
    ids = [[line.split('\t')[1] for line in log] for log in logs]
    assert ids[1][:427] == ids[0][:427]
    assert ids[1][427:894] == ids[0][433:900]
