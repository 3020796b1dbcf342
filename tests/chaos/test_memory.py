"""A data set ten times the memory that a run may take trains from disk, and takes no more of it."""

import contextlib
import json
import math
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.processes import environment
from trainer.data import example
from trainer.observe import phases

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

# What a run may take beyond what it has taken after its first steps.
ALLOWANCE = 200 * 2**20
SHAPE = (160, 160, 3)
SIZE = int(np.prod(SHAPE))
NUM = 10 * ALLOWANCE // SIZE
FILES = 8
DEADLINE_SECONDS = 240
# Where all that is allowed is taken, the run dies, or hangs for ever.
FULL_SECONDS = 20

MODULE = f"""
import gin
import numpy as np
import keras
import tensorflow as tf

from trainer import Source
from trainer.data import files


@gin.register
class Raw(Source):
    num_examples = {NUM}
    element_spec = {{
        'image': tf.TensorSpec({SHAPE}, tf.uint8),
        'label': tf.TensorSpec([], tf.int64),
    }}

    def __init__(self, path, hoards=False):
        self._path, self._hoards, self._hoard = path, hoards, []

    @property
    def fingerprint(self):
        return files.fingerprint(self._path)

    def _read(self, ids):
        parts = files.read_ranges([files.Range(self._path, int(i) * {SIZE}, {SIZE}) for i in ids])
        if self._hoards:
            self._hoard += parts
        return np.frombuffer(b''.join(parts), np.uint8).reshape(-1, *{SHAPE})

    def fetch(self, indices):
        image = tf.numpy_function(self._read, [indices], tf.uint8, stateful=False)
        return {{'image': image, 'label': indices % 2}}


@gin.register
def corners(features):
    return {{'image': tf.cast(features['image'][:, ::40, ::40], tf.float32) / 255}}


@gin.register
def flat():
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
"""
CONFIG = """
import big
include 'base.gin'
include 'cluster/local.gin'
include 'optim/adam.gin'
MODEL = @flat
STEPS = '3 epochs'
BATCH_SIZE = 32
DEVICES = 1
TRAIN_DATA = @Data()
Data.source = %SOURCE
Data.preprocess = @corners
train.sample_log = True
"""
FEATURES = {'image': ('uint8', SHAPE, 'bytes'), 'label': ('int64', ())}
SOURCES = {
    'raw': "@Raw()\nRaw.path = 'DIR/raw'",
    'tfrecord': f"@tfrecord()\ntfrecord.files = 'DIR/*.tfrecord'\ntfrecord.features = {FEATURES}",
    'array_record': "@array_record()\narray_record.files = 'DIR/*.array_record'\n"
    f'array_record.features = {FEATURES}',
    'hoards': "@Raw()\nRaw.path = 'DIR/raw'\nRaw.hoards = True",
}


def images():
    """Numbers that no file system could make smaller, for one record after another."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, SHAPE, np.uint8) for _ in range(NUM))


def serialized():
    spec = example.spec(FEATURES)
    for number, image in enumerate(images()):
        yield example.serialize({'image': image, 'label': number % 2}, spec)


def write(kind, directory):
    if kind in ('raw', 'hoards'):
        with open(directory / 'raw', 'wb') as file:
            for image in images():
                file.write(image.data)
        return
    if kind == 'tfrecord':
        import tensorflow as tf

        writers = [
            tf.io.TFRecordWriter(str(directory / f'{index}.tfrecord')) for index in range(FILES)
        ]
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writers = [
            ArrayRecordWriter(str(directory / f'{index}.array_record'), 'group_size:1,uncompressed')
            for index in range(FILES)
        ]
    for number, record in enumerate(serialized()):
        writers[number * FILES // NUM].write(record)
    for writer in writers:
        writer.close()


def steps(path):
    """The last step that the run has told, 0 before the first."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    said = [json.loads(line) for line in lines if line.endswith('\n')]
    return max([0, *(each['step'] for each in said if 'step' in each)])


def data_bytes(process):
    """What RLIMIT_DATA limits: private memory that can be written to, used or not."""
    for line in open(f'/proc/{process.pid}/status'):  # noqa: SIM115
        if line.startswith('VmData:'):
            return int(line.split()[1]) * 1024
    raise AssertionError('no VmData')


@pytest.fixture
def directory(tmp_path):
    yield tmp_path
    for path in tmp_path.iterdir():  # Gigabytes, which pytest would keep for a while.
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize('kind', list(SOURCES))
def test_memory_stays_flat_on_ten_times_as_much_data(directory, kind):
    write(kind, directory)
    assert sum(path.stat().st_size for path in directory.iterdir()) >= 10 * ALLOWANCE - SIZE
    (directory / 'big.py').write_text(MODULE)
    config = CONFIG + 'SOURCE = ' + SOURCES[kind].replace('DIR', str(directory)) + '\n'
    (directory / 'big.gin').write_text(config)
    run, said = directory / 'run', directory / 'phases.jsonl'
    command = [sys.executable, '-m', 'trainer', '--gin_file=big.gin', f'--model_dir={run}']
    with open(directory / 'log', 'w') as log:
        process = psutil.Popen(
            [*command, '--mode=train'],
            cwd=directory,
            env=environment(**{phases.VARIABLE: str(said)}),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        code, used, begun = watch(process, said, directory / 'log')
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
    output = (directory / 'log').read_text()[-3000:]
    used = np.array(used) / 2**20
    print(
        f'{kind}: {NUM} records, {used[0]:.0f} MB at step {begun}, at most {used.max():.0f} MB',
        file=sys.stderr,
    )
    if kind == 'hoards':
        # It dies of it, or hangs where a thread of TensorFlow's got no memory.
        assert code != 0, 'the limit limits nothing'
        assert steps(said) < math.ceil(3 * NUM / 32)
        assert used.max() - used[0] > 0.9 * ALLOWANCE / 2**20, output
        return
    assert code == 0, output
    assert steps(said) == math.ceil(3 * NUM / 32)
    assert begun < steps(said) / 3, 'nearly all of it went by without a limit'
    assert used.max() - used[0] < ALLOWANCE / 2**20
    # No slope either: the second half of the run takes no more than the first.
    halves = np.array_split(used, 2)
    assert np.median(halves[1]) - np.median(halves[0]) < 0.1 * ALLOWANCE / 2**20, used
    ids = [int(i) for line in (run / 'samples.tsv').open() for i in line.split('\t')[1].split()]
    assert set(ids) == set(range(NUM))


def watch(process, said, log):
    """Limits a run's memory after its first steps; returns its exit code, resident bytes, when."""
    end = time.monotonic() + DEADLINE_SECONDS
    used, limited, begun, full = [], False, 0, math.inf
    while process.poll() is None and time.monotonic() < end:
        if not limited and (begun := steps(said)) >= 10:
            limit = data_bytes(process) + ALLOWANCE
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
            limited = True
        if limited:
            try:
                used.append(process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            if used and used[-1] - used[0] > 0.9 * ALLOWANCE:
                full = min(full, time.monotonic())
        if time.monotonic() - full > FULL_SECONDS:
            break
        time.sleep(0.1)
    assert limited, log.read_text()[-3000:]
    return process.poll(), [each for each in used if each], begun
