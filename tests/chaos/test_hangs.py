"""A worker that hangs is found, with what it hangs in, and the job goes on."""

import signal
import time

import pytest

from tests.chaos.jobs import Job, bits, ledger

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize('index', [0, 1])
def test_a_stopped_worker_is_found_and_replaced(tmp_path, undisturbed_job, index):
    model_dir = tmp_path / 'run'
    with Job(model_dir, '--patience_seconds=8') as job:
        job.until(lambda: job.phase('stepping'))
        began = time.time()
        job.worker(index).send_signal(signal.SIGSTOP)
        job.until(lambda: job.attempts() == 2)
        code, output = job.end()
    assert code == 0, output
    (stuck,) = ledger(model_dir, 'stuck')
    assert (stuck['worker'], stuck['stopped']) == (index, True)
    assert f'worker {index} makes no progress' in output
    # The other worker, which waits for it, says where; or TensorFlow has given up before.
    log = (model_dir / 'logs' / 'attempt-1' / f'worker-{1 - index}.log').read_text()
    assert 'Current thread' in log or 'Traceback' in log
    assert stuck['time'] - began < 40
    assert bits(model_dir) == undisturbed_job


# Each fault waits for a file, takes it away, and hangs, on one worker.
FAULTS = """
import json
import os
import time

import gin
import tensorflow as tf

import trainer.train
from trainer.data.augment import scale_images

INDEX = json.loads(os.environ.get('TF_CONFIG', '{"task": {"index": 0}}'))['task']['index']


def hang(kind, worker):
    if INDEX == worker and os.path.exists(kind):
        os.remove(kind)
        time.sleep(1000)


@gin.register
def hanging_input(features):
    def look(image):
        hang('data', 1)
        return image

    features = scale_images(features)
    image = tf.numpy_function(look, [features['image']], tf.float32)
    return {**features, 'image': tf.ensure_shape(image, features['image'].shape)}


def before(module, name, kind, worker):
    original = getattr(module, name)

    def faulty(*args, **kwargs):
        hang(kind, worker)
        return original(*args, **kwargs)

    setattr(module, name, faulty)


before(os, 'fsync', 'save', 0)
before(trainer.train.Report, 'add', 'python', 1)
hang('start', 1)
"""


@pytest.mark.parametrize(
    ('kind', 'worker', 'phase', 'where'),
    [
        ('data', 1, 'waiting for data', 'faults.py, line 18, in hang'),
        ('python', 1, 'stepping', 'faults.py, line 18, in hang'),
        ('save', 0, 'saving', ''),
    ],
)
def test_a_worker_that_hangs_is_found_with_what_it_hangs_in(tmp_path, kind, worker, phase, where):
    (tmp_path / 'faults.py').write_text(FAULTS)
    (tmp_path / 'faults.gin').write_text('import faults\n')
    faults = ('--gin_file=faults.gin', '--gin.Data.preprocess=@hanging_input')
    more = ('--gin.STEPS=3000', '--gin.train.eval_every=None', '--mode=train')
    model_dir = tmp_path / 'run'
    # A save may take ten times as long: it may wait for the one before.
    patience = 4 if kind == 'save' else 8
    with Job(model_dir, f'--patience_seconds={patience}', *faults, *more) as job:
        job.until(lambda: list((model_dir / 'checkpoints').glob('step-*')))
        began = time.time()
        (tmp_path / kind).write_text('')
        job.until(lambda: job.attempts() == 2)
        code, output = job.end()
    assert code == 0, output
    (stuck,) = ledger(model_dir, 'stuck')
    assert (stuck['worker'], stuck['phase']) == (worker, phase), output
    assert stuck['where'].endswith(where)
    assert bool(stuck['where']) == bool(where)
    assert stuck['time'] - began < stuck['allowed'] + 30


def test_a_worker_that_never_comes_is_found_when_the_others_have_given_up_waiting(tmp_path):
    (tmp_path / 'faults.py').write_text(FAULTS)
    (tmp_path / 'faults.gin').write_text('import faults\n')
    (tmp_path / 'start').write_text('')
    model_dir = tmp_path / 'run'
    with Job(
        model_dir, '--patience_seconds=15', '--gin.STEPS=20', '--mode=train',
        '--gin_file=faults.gin', '--gin.meet.deadline_seconds=20',
    ) as job:  # fmt: skip
        job.until(job.attempts)
        # The launcher has read it, and all attempts get the same.
        (tmp_path / 'faults.gin').unlink()
        code, output = job.end()
    assert code == 0, output
    (stuck,) = ledger(model_dir, 'stuck')
    assert (stuck['worker'], stuck['phase']) == (1, 'starting'), output
    assert 'faults.py' in stuck['where']
    assert job.attempts() == 2
