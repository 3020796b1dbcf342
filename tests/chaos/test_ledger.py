"""The account of a job's time knows what was done to the job."""

import signal
import time

import pytest

from launch.account import account
from tests.chaos.jobs import LONG, Job, phases
from trainer.model_dir import ModelDir

pytestmark = pytest.mark.chaos

BATCHES, BATCH_SECONDS = 5, 4.0
LOST_SECONDS, HELD_SECONDS = 7.0, 6.0
# One batch after the other sleeps, for threads that sleep side by side would hide each other. The
# loop pauses at each step, so that the input is ahead of it unless it sleeps.
WAITING = f"""
import json
import os
import pathlib
import threading
import time

import gin
import tensorflow as tf

import trainer.train
from trainer.data.augment import scale_images

INDEX = json.loads(os.environ['TF_CONFIG'])['task']['index']
turn, left = threading.Lock(), {BATCHES}


@gin.register
def waiting_images(features):
    def look(image):
        global left
        with turn:
            if left and os.path.exists(f'slow-{{INDEX}}'):
                time.sleep({BATCH_SECONDS})
                left -= 1
                if not left:
                    pathlib.Path(f'slept-{{INDEX}}').touch()
        return image

    features = scale_images(features)
    image = tf.numpy_function(look, [features['image']], tf.float32)
    return {{**features, 'image': tf.ensure_shape(image, features['image'].shape)}}


def pause(*args, add=trainer.train.Report.add):
    time.sleep(0.1)
    add(*args)


trainer.train.Report.add = pause
"""
FLAGS = [
    '--mode=train',
    '--gin_file=waiting.gin',
    '--gin.STEPS=1000000',
    # A step in each call: of more, the input's clock measures only some.
    '--gin.train.log_every=1',
    '--gin.train.save_every="12 seconds"',
    '--gin.train.eval_every=None',
]


def steps(job):
    return [line for line in phases(job.model_dir, job.attempts()) if 'seconds' in line]


def saved(job):
    """The newest step that a new attempt would begin at."""
    found = (job.model_dir / 'checkpoints').glob('step-*/manifest.json')
    return max((int(path.parent.name[5:]) for path in found), default=0)


def lose(job, victim):
    """Kills a worker some seconds after a new checkpoint, while the launcher is held up.

    Returns:
        Seconds from the state of the checkpoint to the kill, and from there to the next attempt.
    """
    process, attempt, before = job.worker(victim), job.attempts(), saved(job)
    step = job.until(lambda: saved(job) > before and saved(job))
    (kept,) = (line['time'] for line in steps(job) if line['step'] == step)
    end = time.monotonic() + LOST_SECONDS
    job.until(lambda: time.monotonic() > end)
    assert saved(job) == step
    job.process.send_signal(signal.SIGSTOP)
    process.kill()
    killed = time.time()
    time.sleep(HELD_SECONDS)  # Nobody could tell 5 % of the half second that it takes otherwise.
    job.process.send_signal(signal.SIGCONT)
    job.until(lambda: job.attempts() > attempt)
    return killed - kept, time.time() - killed


@pytest.mark.parametrize('slow_workers', [(1,), (0, 1)] if LONG else [(1,)])
def test_the_account_is_right_about_a_slow_input_and_two_kills(tmp_path, slow_workers):
    (tmp_path / 'waiting.py').write_text(WAITING)
    (tmp_path / 'waiting.gin').write_text('import waiting\nData.preprocess = @waiting_images\n')
    began = time.time()
    with Job(tmp_path / 'run', *FLAGS, augmented=()) as job:
        # What sleeps while the first step is compiled holds up nobody.
        job.until(lambda: len(steps(job)) > 10)
        for index in slow_workers:
            (tmp_path / f'slow-{index}').touch()
        job.until(lambda: all((tmp_path / f'slept-{index}').exists() for index in slow_workers))
        for index in slow_workers:
            (tmp_path / f'slow-{index}').unlink()
        kills = [lose(job, victim) for victim in (1, 0)]
        job.until(lambda: len(steps(job)) > 10)
        job.process.send_signal(signal.SIGTERM)
        code, output = job.end()
    wall = time.time() - began
    assert code == 75, output
    found = account(ModelDir(job.model_dir))
    lost, down = (sum(each) for each in zip(*kills, strict=True))
    told = f'wall {wall:.1f}, lost {lost:.2f}, down {down:.2f}, account {found.seconds}'
    print(told)
    # Python's own start is not in the account.
    assert found.wall == pytest.approx(wall, rel=0.05)
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
    assert min(found.seconds.values()) >= 0
    assert found.attempts == 3
    assert found.seconds['lost'] == pytest.approx(lost, rel=0.05), told
    assert found.seconds['down'] == pytest.approx(down, rel=0.05), told
    slept = BATCHES * BATCH_SECONDS
    assert found.seconds['input wait'] == pytest.approx(slept, rel=0.05), told


SLOW_STEP = """
import json
import os
import time

import gin
import keras
import tensorflow as tf

INDEX = json.loads(os.environ['TF_CONFIG'])['task']['index']


@gin.register
def slow_loss(labels, outputs):
    def look(values):
        if INDEX == 1:
            time.sleep(0.05)
        return values

    labels = tf.ensure_shape(tf.numpy_function(look, [labels], labels.dtype), labels.shape)
    return keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
"""


def test_the_worker_that_all_others_wait_for_is_named(tmp_path):
    (tmp_path / 'slow_step.py').write_text(SLOW_STEP)
    (tmp_path / 'slow_step.gin').write_text('import slow_step\nLOSS = @slow_loss\n')
    flags = ['--mode=train', '--gin_file=slow_step.gin', '--gin.STEPS=300']
    with Job(tmp_path / 'run', *flags, augmented=()) as job:
        code, output = job.end()
    assert code == 0, output
    chief, other = account(ModelDir(job.model_dir)).work
    assert other > 0.05
    assert other > chief
    assert f'Worker 1 is {other / chief:.1f} times slower than the others' in output
