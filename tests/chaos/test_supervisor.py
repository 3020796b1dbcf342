"""`phalanx run` brings a job to its end, with the bits of an undisturbed one, whatever happens."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.processes import environment

pytestmark = pytest.mark.chaos

# Dropout and batch normalisation are in the model.
AUGMENTED = ('--gin.AUGMENT=@random_shift', '--gin.random_shift.max_pixels=1')
FLAGS = [
    '--gin_file=runs/digits.gin',
    '--gin.STEPS=900',
    '--gin.DEVICES=1',
    '--gin.train.log_every=100',
    '--gin.train.save_every=100',
    '--gin.train.eval_every=150',
    '--gin.train.sample_log=True',
    '--gin.meet.deadline_seconds=60',
]
# The long form, of an hour, is for a release: PHALANX_CHAOS=long make chaos.
LONG = os.environ.get('PHALANX_CHAOS') == 'long'
KILLS = 20 if LONG else 4
# Of sleeping and waiting, everything in a test together.
DEADLINE_SECONDS = 240


class Job:
    """A launcher and its workers."""

    def __init__(self, model_dir, *flags, workers=2, augmented=AUGMENTED):
        self.model_dir = model_dir
        self._output = open(f'{model_dir}.out', 'a+')  # noqa: SIM115, closed by end()
        command = ['launch', 'run', f'--workers={workers}', f'--model_dir={model_dir}']
        self.process = subprocess.Popen(
            [sys.executable, '-m', *command, *FLAGS, *augmented, *flags],
            env=environment(),
            cwd=model_dir.parent,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(True), self.process]:
                process.kill()
        self.process.wait()
        for process in processes_of(self.model_dir):
            process.kill()
        self._output.close()

    def end(self, timeout=DEADLINE_SECONDS):
        """Waits for the launcher; returns its exit code and all that it has printed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        self._output.seek(0)
        return code, self._output.read()

    def worker(self, index):
        """The process of a worker, as soon as there is one."""
        return self.until(lambda: self.find(index))

    def find(self, index):
        for process in processes_of(self.model_dir):
            with contextlib.suppress(psutil.Error, KeyError):
                task = json.loads(process.environ()['TF_CONFIG'])['task']
                if task['index'] == index and 'launch.child' in process.cmdline():
                    return process
        return None

    def until(self, what):
        """Waits until what() is true of a job that runs, and returns that."""
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if found := what():
                return found
            time.sleep(0.02)
        raise AssertionError(f'it never came to that: {self.end(0)[1][-3000:]}')

    def phase(self, name, attempt=1, worker=0):
        """Whether a worker has said so in an attempt."""
        path = self.model_dir / 'logs' / f'attempt-{attempt}' / f'worker-{worker}.phases.jsonl'
        return path.exists() and f'"{name}"' in path.read_text()

    def attempts(self):
        return len(list((self.model_dir / 'logs').glob('attempt-*')))


def processes_of(model_dir):
    """All processes that were given this model_dir."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f'--model_dir={model_dir}' in process.cmdline():
                found.append(process)
    return found


def ledger(model_dir, event):
    lines = (model_dir / 'ledger.jsonl').read_text().splitlines()
    return [each for each in map(json.loads, lines) if each['event'] == event]


def bits(model_dir):
    manifest = model_dir / 'checkpoints' / 'step-00000900' / 'manifest.json'
    return json.loads(manifest.read_text())['state_sha256'], (model_dir / 'samples.tsv').read_text()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp('undisturbed') / 'run'
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert job.attempts() == 1, 'a false alarm'
    assert not processes_of(model_dir)
    return bits(model_dir)


def test_workers_killed_at_random_times_are_replaced(tmp_path, undisturbed):
    model_dir, hits = tmp_path / 'run', 0
    with Job(model_dir, f'--max_restarts={KILLS}') as job:
        while hits < KILLS and job.process.poll() is None:
            attempt = hits + 1
            # From the first moment of an attempt to well within its steps.
            wait = random.choice([random.uniform(0, 6), random.uniform(6, 16)])
            end = time.monotonic() + wait
            while time.monotonic() < end and job.process.poll() is None:
                time.sleep(0.02)
            with contextlib.suppress(psutil.NoSuchProcess, AssertionError):
                job.worker(random.randrange(2)).kill()
                hits += 1
                job.until(lambda attempt=attempt: job.attempts() > attempt)
        code, output = job.end()
    assert code == 0, output
    assert hits, 'nothing was killed'
    killed = [each for each in ledger(model_dir, 'exit') if each['code'] == -signal.SIGKILL]
    assert len(killed) == job.attempts() - 1
    assert bits(model_dir) == undisturbed


@pytest.mark.parametrize('index', [0, 1])
def test_a_stopped_worker_is_found_and_replaced(tmp_path, undisturbed, index):
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
    assert bits(model_dir) == undisturbed


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
    assert stuck['time'] - began < stuck['allowed'] + 30


# Of the short form.
SIGNALS = {
    ('starting', 'launcher'),
    ('compiling', 'chief'),
    ('stepping', 'launcher'),
    ('evaluating', 'other worker'),
    ('exporting', 'launcher'),
}


def interrupt(job, whom):
    target = {'launcher': lambda: job.process, 'chief': lambda: job.worker(0)}
    target.get(whom, lambda: job.worker(1))().send_signal(signal.SIGTERM)


@pytest.mark.parametrize('whom', ['launcher', 'chief', 'other worker'])
@pytest.mark.parametrize('phase', ['starting', 'compiling', 'stepping', 'evaluating', 'exporting'])
def test_a_signal_in_any_phase_ends_the_job_and_it_goes_on(tmp_path, undisturbed, phase, whom):
    if not LONG and (phase, whom) not in SIGNALS:
        pytest.skip('in the long form')
    model_dir = tmp_path / 'run'
    with Job(model_dir) as job:
        job.until(lambda: job.phase(phase))
        began = time.monotonic()
        interrupt(job, whom)
        code, output = job.end(100)
    assert code == 75, output
    assert time.monotonic() - began < 60
    assert not processes_of(model_dir)
    if phase in ('compiling', 'stepping', 'evaluating'):
        saved = int(re.search(r'preempted: saved step (\d+) of 900', output)[1])
        assert ledger(model_dir, 'attempt_end')[-1]['step'] == saved
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert (model_dir / 'export' / '900' / 'saved_model.pb').exists()
    assert bits(model_dir) == undisturbed


BROKEN = """
import json
import os

if json.loads(os.environ['TF_CONFIG'])['task']['index'] > 1 and os.path.exists('down'):
    raise RuntimeError('this device is down')
"""


def test_an_elastic_job_goes_on_with_fewer_workers_and_then_with_all(tmp_path):
    (tmp_path / 'broken.py').write_text(BROKEN)
    (tmp_path / 'broken.gin').write_text('import broken\n')
    plain = ('--gin_file=models/mlp.gin', '--gin_file=optim/sgd.gin', '--gin.LEARNING_RATE=0.01')
    plain += ('--gin.mlp.dropout=0.0', '--mode=train')
    straight, elastic = tmp_path / 'straight', tmp_path / 'elastic'
    # Of what is chaotic, rounding would make something else in so many steps.
    four = {'workers': 4, 'augmented': ()}
    with Job(straight, *plain, **four) as job:
        assert job.end()[0] == 0
    with Job(elastic, *plain, '--gin_file=broken.gin', '--elastic', **four) as job:
        saved = elastic / 'checkpoints' / 'step-00000200'
        job.until(saved.exists)
        (tmp_path / 'down').write_text('')
        job.worker(3).kill()
        job.until(lambda: job.phase('stepping', attempt=3))
        job.until((elastic / 'checkpoints' / 'step-00000600').exists)
        (tmp_path / 'down').unlink()
        job.worker(1).kill()
        code, output = job.end()
    assert code == 0, output
    assert [each['workers'] for each in ledger(elastic, 'attempt')] == [4, 4, 2, 4]
    assert 'going on with 2 workers instead of 4' in output
    assert bits(elastic)[1] == bits(straight)[1]
    losses = [
        float(json.loads(path.read_text())['metrics']['train/loss'])
        for path in (run / 'checkpoints/step-00000900/manifest.json' for run in (straight, elastic))
    ]
    assert abs(losses[0] - losses[1]) < 1e-5


def test_workers_do_not_outlive_a_launcher_that_is_killed(tmp_path, undisturbed):
    model_dir = tmp_path / 'run'
    with Job(model_dir) as job:
        job.until(lambda: job.phase('stepping'))
        job.process.kill()
        end = time.monotonic() + 10
        while processes_of(model_dir) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_of(model_dir)
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert bits(model_dir) == undisturbed


def test_a_job_that_always_fails_is_given_up_with_its_first_error(tmp_path):
    (tmp_path / 'crashing.py').write_text(
        'import gin\n\n\n@gin.register\ndef crashing(): raise RuntimeError("my model is broken")\n'
    )
    (tmp_path / 'crashing.gin').write_text('import crashing\nMODEL = @crashing\n')
    model_dir = tmp_path / 'run'
    job = Job(
        model_dir, f'--gin_file={tmp_path}/crashing.gin', '--max_restarts=1',
        f'--gin_search_path={tmp_path}',
    )  # fmt: skip
    with job:
        code, output = job.end()
    assert code == 1
    assert 'giving up: 2 attempts in a row ended without a new checkpoint' in output
    assert f'Its log is {model_dir}/logs/attempt-1/worker-' in output
    assert 'my model is broken' in output.split('giving up')[1]
    assert not processes_of(model_dir)
