"""Jobs under `phalanx run`, for tests that do something to them."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time

import psutil

from tests.processes import environment

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
# Of sleeping and waiting, everything in a test together.
DEADLINE_SECONDS = 240


class Job:
    """A launcher and its workers."""

    def __init__(self, model_dir, *flags, workers=2, augmented=AUGMENTED, **variables):
        self.model_dir = model_dir
        # Not beside model_dir, whose disk may be full.
        self._output = tempfile.TemporaryFile('w+')  # noqa: SIM115, closed by __exit__
        command = ['launch', 'run', f'--workers={workers}', f'--model_dir={model_dir}']
        self.process = subprocess.Popen(
            [sys.executable, '-m', *command, *FLAGS, *augmented, *flags],
            env=environment(**variables),
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
        return any(line['phase'] == name for line in phases(self.model_dir, attempt, worker))

    def moment(self):
        """What the chief does now: its phase, '' before the first; also 'saving' beside steps."""
        lines = phases(self.model_dir, self.attempts())
        phase = lines[-1]['phase'] if lines else ''
        # A thread saves beside the steps.
        saving = any((self.model_dir / 'checkpoints').glob('.tmp-step-*'))
        return 'saving' if phase == 'stepping' and saving else phase

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


def phases(model_dir, attempt, worker=0):
    """What a worker has said of its phases in an attempt."""
    path = model_dir / 'logs' / f'attempt-{attempt}' / f'worker-{worker}.phases.jsonl'
    text = path.read_text() if path.exists() else ''
    # The last line may be half written.
    return [json.loads(line) for line in text.splitlines(True) if line.endswith('\n')]


def ledger(model_dir, event=None):
    """The events of a job, all or those of one kind."""
    lines = (model_dir / 'ledger.jsonl').read_text().splitlines()
    return [each for each in map(json.loads, lines) if event in (None, each['event'])]


def bits(model_dir):
    """What has to be equal: the digest of the last state, and which examples were read."""
    manifest = model_dir / 'checkpoints' / 'step-00000900' / 'manifest.json'
    return json.loads(manifest.read_text())['state_sha256'], (model_dir / 'samples.tsv').read_text()


SLOW = """
import os
import time

import gin
import tensorflow as tf

from trainer.data.augment import scale_images

sync = os.fsync


def slow_sync(descriptor):
    time.sleep(0.3)
    sync(descriptor)


os.fsync = slow_sync


@gin.register
def slow_images(features):
    def look(image):
        time.sleep(0.1)
        return image

    features = scale_images(features)
    image = tf.numpy_function(look, [features['image']], tf.float32)
    return {**features, 'image': tf.ensure_shape(image, features['image'].shape)}
"""


def slow(directory):
    """Makes the disk and the input of evaluations slow, or restoring, saving and evaluating would
    be over before anyone can hit them; returns the flags. The bits are the same.

    Args:
        directory: the one that model_dir is in.
    """
    (directory / 'slow.py').write_text(SLOW)
    (directory / 'slow.gin').write_text('import slow\neval/Data.preprocess = @slow_images\n')
    return ['--gin_file=slow.gin']
