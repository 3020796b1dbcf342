"""`phalanx run --hosts` on hosts with a network of their own: real workers, hosts that are lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cluster.hosts import Hosts, needs_root
from tests.processes import environment

pytestmark = [pytest.mark.cluster, needs_root]

STEPS = 400
FLAGS = [
    '--gin_file=runs/digits.gin',
    '--gin_file=unhurried.gin',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
    '--gin.DEVICES=1',
    f'--gin.STEPS={STEPS}',
    '--gin.BATCH_SIZE=36',
    '--gin.train.save_every=20',
    '--gin.train.sample_log=True',
    '--meeting_seconds=90',
    '--mode=train',
]
SECONDS = 240
# Steps of a size that hosts can be lost between.
MODULE = """
import time

import gin
import tensorflow as tf

from trainer.data.augment import scale_images


@gin.register
def unhurried(features):
    def wait(image):
        time.sleep(0.02)
        return image

    features = scale_images(features)
    image = tf.numpy_function(wait, [features['image']], tf.float32)
    return {**features, 'image': tf.ensure_shape(image, features['image'].shape)}
"""


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """Where the tasks start: with a module and a configuration of the user's."""
    path = tmp_path_factory.mktemp('work')
    (path / 'unhurried.py').write_text(MODULE)
    (path / 'unhurried.gin').write_text('import unhurried\ntrain/Data.preprocess = @unhurried\n')
    return path


@pytest.fixture(scope='module')
def hosts():
    with Hosts(3, prefix='pxh', net='10.84.1') as found:
        yield found


class Job:
    """A task on each of some hosts, node1 the leader."""

    def __init__(self, hosts, directory, model_dir, count, *flags):
        self.hosts, self.model_dir, self.flags = hosts, model_dir, flags
        self.directory = directory
        self.names = ','.join(f'node{index}' for index in range(1, count + 1))
        self.tasks = {}
        self.count = count

    def __enter__(self):
        for rank in range(self.count):
            self.start(rank)
        return self

    def __exit__(self, *exc):
        for task in self.tasks.values():
            if task.poll() is None:
                task.kill()
                task.wait()

    def start(self, rank):
        log = open(self.model_dir.with_suffix(f'.{rank}.log'), 'a')  # noqa: SIM115, the task's
        command = [sys.executable, '-m', 'launch', 'run', *FLAGS, *self.flags]
        command += [f'--hosts={self.names}', f'--rank={rank}', f'--model_dir={self.model_dir}']
        with log:
            self.tasks[rank] = subprocess.Popen(
                self.hosts.command(rank + 1, *command),
                cwd=self.directory,
                env=environment(TF_NUM_INTRAOP_THREADS='1'),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def output(self, rank):
        return self.model_dir.with_suffix(f'.{rank}.log').read_text()

    def reach(self, step, attempt=1):
        """Waits until the chief has taken a step, in some attempt."""
        path = self.model_dir / 'logs' / f'attempt-{attempt}' / 'worker-0.phases.jsonl'

        def taken():
            lines = path.read_text().splitlines() if path.exists() else []
            steps = [json.loads(line).get('step', 0) for line in lines if line.endswith('}')]
            return max(steps, default=0) >= step

        self.until(taken)

    def until(self, done, seconds=SECONDS):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, '\n'.join(self.output(rank) for rank in self.tasks)
            time.sleep(0.05)

    def codes(self):
        return [task.wait(SECONDS) for task in self.tasks.values()]

    def end(self, step=STEPS):
        """Returns what the job has come to: the bits of its state, and the order of its samples."""
        codes = self.codes()
        said = '\n'.join(self.output(rank)[-3000:] for rank in self.tasks)
        assert set(codes) == {0}, said
        path = self.model_dir / 'checkpoints' / f'step-{step:08}' / 'manifest.json'
        return (
            json.loads(path.read_text())['state_sha256'],
            (self.model_dir / 'samples.tsv').read_bytes(),
        )

    def ledger(self, event):
        lines = (self.model_dir / 'ledger.jsonl').read_text().splitlines()
        return [each for each in map(json.loads, lines) if each['event'] == event]


@pytest.fixture(scope='module')
def undisturbed(directory, tmp_path_factory):
    """The same job on this host alone."""
    model_dir = tmp_path_factory.mktemp('alone') / 'run'
    command = [sys.executable, '-m', 'launch', 'run', *FLAGS, '--workers=2']
    done = subprocess.run(
        [*command, f'--model_dir={model_dir}'],
        cwd=directory,
        env=environment(TF_NUM_INTRAOP_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = model_dir / 'checkpoints' / f'step-{STEPS:08}' / 'manifest.json'
    state = json.loads(manifest.read_text())['state_sha256']
    return state, (model_dir / 'samples.tsv').read_bytes()


def test_a_task_that_is_killed_and_started_again_changes_nothing(
    hosts, directory, tmp_path, undisturbed
):
    with Job(hosts, directory, tmp_path / 'run', 2) as job:
        job.reach(40)
        job.tasks[1].kill()
        job.tasks[1].wait()
        job.until(lambda: job.ledger('lost'))
        assert 'host 1 (node2) is lost' in job.ledger('lost')[0]['reason']
        job.start(1)
        assert job.end() == undisturbed
        ends = job.ledger('attempt_end')
        assert [each['outcome'] for each in ends] == ['failed', 'finished']


def test_a_leader_that_is_killed_and_started_again_changes_nothing(
    hosts, directory, tmp_path, undisturbed
):
    with Job(hosts, directory, tmp_path / 'run', 2) as job:
        job.reach(40)
        job.tasks[0].kill()
        job.tasks[0].wait()
        job.until(lambda: 'lost the leader, host 0 (node1)' in job.output(1))
        assert job.tasks[1].poll() is None
        job.start(0)
        assert job.end() == undisturbed


def test_a_signal_to_any_task_saves_and_ends_all_and_the_same_commands_go_on(
    hosts, directory, tmp_path, undisturbed
):
    with Job(hosts, directory, tmp_path / 'run', 2) as job:
        job.reach(40)
        os.kill(job.tasks[1].pid, signal.SIGTERM)
        assert job.codes() == [75, 75]
        assert job.ledger('end')[-1]['code'] == 75
        for rank in range(2):
            job.start(rank)
        assert job.end() == undisturbed


def test_the_same_commands_given_twice_disturb_nobody(hosts, directory, tmp_path):
    with Job(hosts, directory, tmp_path / 'run', 2) as job:
        job.reach(40)
        with Job(hosts, directory, tmp_path / 'run', 2) as second:
            assert job.codes() == [0, 0]
            # These had waited, and found nothing left to do.
            assert second.codes() == [0, 0]
        assert [each['outcome'] for each in job.ledger('attempt_end')] == ['finished'] * 2


def test_an_elastic_job_goes_on_without_a_host_that_stays_away(
    hosts, directory, tmp_path, undisturbed
):
    with Job(hosts, directory, tmp_path / 'run', 3, '--workers=2-3') as job:
        job.reach(40)
        job.tasks[2].kill()
        job.tasks[2].wait()
        del job.tasks[2]
        _, samples = job.end()
        assert samples == undisturbed[1]
        assert [each['workers'] for each in job.ledger('attempt')] == [3, 2]


def test_a_host_that_does_not_come_is_named_before_tensorflow_starts(hosts, directory, tmp_path):
    with Job(hosts, directory, tmp_path / 'run', 2, '--meeting_seconds=3') as job:
        job.tasks[1].kill()
        job.tasks[1].wait()
        assert job.tasks[0].wait(60) == 75
        assert 'after 3 s these have not come: host 1 (node2)' in job.output(0)
        assert not job.ledger('attempt')
