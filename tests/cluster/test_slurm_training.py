"""Jobs that train under a real Slurm end in the bits of one that nothing happened to."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts, needs_root
from tests.cluster.slurm import Cluster
from tests.processes import environment

pytestmark = [pytest.mark.cluster, needs_root]

STEPS = 400
# The number of threads decides over the bits; hosts with one worker would take all cores.
VARIABLES = {'TF_NUM_INTRAOP_THREADS': '1'}
FLAGS = [
    '--gin_file=slow.gin',
    f'--gin.STEPS={STEPS}',
    '--gin.BATCH_SIZE=60',
    '--gin.DEVICES=1',
    '--gin.cnn.filters=4',
    '--gin.cnn.units=8',
    '--gin.train.log_every=20',
    '--gin.train.save_every=20',
    '--gin.train.eval_every=200',
    '--gin.train.sample_log=True',
    '--gin.meet.deadline_seconds=120',
    '--grace_seconds=20',
    '--meeting_seconds=120',
    '--patience_seconds=30',
]
# The digits that come with the package, or MNIST where its files are at hand.
MNIST = os.environ.get('PHALANX_MNIST_DIR')
DIGITS_OR_MNIST = ['--gin_file=slow_mnist.gin', f"--gin.DATA_DIR='{MNIST}'"] if MNIST else []
# Steps take a while, so that things can happen to them. The bits are the same.
SLOW = """
import os
import time

import gin
import tensorflow as tf


@gin.register
def slowly(features, seeds):
    def look(image):
        time.sleep(float(os.environ.get('SECONDS_A_BATCH', '0')))
        return image

    image = tf.numpy_function(look, [features['image']], features['image'].dtype)
    return {**features, 'image': tf.ensure_shape(image, features['image'].shape)}
"""
SLOW_GIN = """
include 'runs/{}.gin'
import slow
AUGMENT = @slowly
"""


@pytest.fixture(scope='module')
def directory():
    """A directory that all hosts share, with the configuration."""
    with tempfile.TemporaryDirectory(prefix='pxs') as name:
        (Path(name) / 'slow.py').write_text(SLOW)
        (Path(name) / 'slow.gin').write_text(SLOW_GIN.format('digits'))
        (Path(name) / 'slow_mnist.gin').write_text(SLOW_GIN.format('mnist_cnn'))
        yield Path(name)


@pytest.fixture(scope='module')
def cluster(directory):
    (directory / 'slurm').mkdir()
    with (
        Hosts(6, prefix='pxs', net='10.81.1') as hosts,
        Cluster(directory / 'slurm', hosts) as cluster,
    ):
        cluster.hosts = hosts
        yield cluster


class Phalanx:
    """The program, as a user of the cluster has it."""

    def __init__(self, cluster, directory):
        self._cluster, self._directory = cluster, directory
        variables = {**VARIABLES, 'XDG_STATE_HOME': str(directory / 'state')}
        self._environment = environment(**variables, **cluster.environment)

    def run(self, *argv, code=0, timeout=400):
        done = subprocess.run(
            [sys.executable, '-m', 'launch', *argv],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def submit(self, name, *flags, seconds=0.05):
        """Submits a job whose steps take some time, and returns it."""
        out = self.run(
            'submit', '--scheduler=slurm', f'--model_dir={self._directory / name}', *FLAGS, *flags,
            f'--env=SECONDS_A_BATCH={seconds}',
        )  # fmt: skip
        handle = out.strip().splitlines()[-1]
        assert handle.startswith('slurm://testcluster/')
        return Running(self, self._cluster, handle, self._directory / name)


class Running:
    """A job that was submitted."""

    def __init__(self, phalanx, cluster, handle, model_dir):
        self.handle, self.model_dir = handle, model_dir
        self.id = handle.rpartition('/')[2]
        self._phalanx, self._cluster = phalanx, cluster

    def shown(self, name):
        return re.search(rf'\s{name}=(\S*)', self._cluster.run('scontrol', 'show', 'job', self.id))[
            1
        ]

    def until_step(self, step, seconds=120):
        """Waits until a checkpoint of that step or a later one is there; returns its step."""
        return self.until(lambda: self.newest if self.newest >= step else None, seconds)

    def until(self, what, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            assert self.shown('JobState') not in ('FAILED', 'CANCELLED', 'TIMEOUT'), self.output
            time.sleep(0.2)
        raise AssertionError(self.output)

    def end(self, state='COMPLETED', seconds=240):
        self.until(lambda: self.shown('JobState') == state, seconds)

    @property
    def output(self):
        return (self.model_dir / 'logs' / f'slurm-{self.id}.out').read_text(errors='replace')

    @property
    def newest(self):
        return max([0, *(int(p.name[5:]) for p in self.model_dir.glob('checkpoints/step-*'))])

    def workers(self, index):
        """The processes of a worker that run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, KeyError):
                if f'--model_dir={self.model_dir}' in process.cmdline():
                    task = json.loads(process.environ()['TF_CONFIG'])['task']
                    if task['index'] == index and 'launch.child' in process.cmdline():
                        found.append(process)
        return found

    def host(self, rank):
        """The number of the host that has a rank."""
        nodes = self._cluster.run('scontrol', 'show', 'hostnames', self.shown('NodeList')).split()
        return int(nodes[rank].removeprefix('node'))


@pytest.fixture(scope='module')
def phalanx(cluster, directory):
    return Phalanx(cluster, directory)


@pytest.fixture(scope='module', autouse=True)
def limited(phalanx):
    """A job of two workers on one host, longer than its time limit; it runs beside the others."""
    return phalanx.submit(
        'limited', *DIGITS_OR_MNIST, '--workers=2', '--workers_per_host=2', '--cpus_per_worker=1',
        '--gpus_per_worker=2', '--time_limit=3m', '--grace_seconds=1', '--partition=wide',
        '--nodelist=node5', seconds=0.3,
    )  # fmt: skip


@pytest.fixture(scope='module')
def undisturbed(phalanx, directory):
    """The end of a job that nothing happened to, on one host, by its number of workers."""
    ends = {}

    def end_of(workers, *flags):
        if workers not in ends:
            model_dir = directory / f'undisturbed-{workers}'
            phalanx.run('run', f'--workers={workers}', f'--model_dir={model_dir}', *FLAGS, *flags)
            ends[workers] = model_dir
        return ends[workers]

    return end_of


def manifest(model_dir):
    path = model_dir / 'checkpoints' / f'step-{STEPS:08d}' / 'manifest.json'
    return json.loads(path.read_text())


def bits(model_dir):
    """What has to be equal: the digest of the last state, the last figures, and which examples
    were read."""
    last = manifest(model_dir)
    return last['state_sha256'], last['metrics'], samples(model_dir)


def samples(model_dir):
    """Which examples each step read."""
    return (model_dir / 'samples.tsv').read_text()


def test_gpus_of_a_host_are_divided_among_its_workers(limited):
    """They are none, but Slurm takes them for some; TensorFlow takes the CPU."""
    limited.until_step(20)
    workers = [limited.workers(index)[0] for index in range(2)]
    visible = [worker.environ()['CUDA_VISIBLE_DEVICES'] for worker in workers]
    assert visible == ['0,1', '2,3']


def test_a_job_is_told_of_followed_cancelled_and_goes_on_through_crash_preemption_and_lost_host(
    phalanx, cluster, directory, undisturbed
):
    first = phalanx.submit('digits', '--workers=3', '--cpus_per_worker=1')
    first.until_step(20)
    status = phalanx.run('status', first.handle)
    print(status)
    assert 'running' in status
    for host in ('node1', 'node2', 'node3'):
        assert host in status
    assert 'step ' in phalanx.run('logs', first.handle)

    phalanx.run('cancel', first.handle)
    phalanx.run('logs', first.handle, '--follow', timeout=60)
    first.end('CANCELLED', 30)
    saved = first.newest
    assert 0 < saved < STEPS
    assert 'cancelled' in phalanx.run('status', first.handle)

    # The same command goes on, and no other directory is needed.
    job = phalanx.submit('digits', '--workers=3', '--cpus_per_worker=1')
    at = job.until_step(saved + 20)
    # A worker crashes: the leader starts all of them again.
    job.workers(1)[0].send_signal(signal.SIGKILL)
    at = job.until_step(at + 40)
    assert job.shown('Restarts') == '0'
    # A job of a higher partition takes all hosts of the first for a moment.
    wanted = ['-p', 'high', '-N4', '--exclusive', '-o', '/dev/null', '--wrap', 'true']
    cluster.run('sbatch', *wanted)
    job.until(lambda: job.shown('Restarts') == '1')
    assert 'the job is preempted, and requeued' in job.output
    at = job.until_step(job.newest + 20)
    # A host is cut off; there is another one.
    lost = job.host(1)
    cluster.hosts.cut(lost)
    try:
        job.until(lambda: job.shown('Restarts') == '2')
        job.until_step(job.newest + 20)
        assert lost not in [job.host(rank) for rank in range(3)]
    finally:
        cluster.hosts.heal(lost)
    job.end()
    assert bits(directory / 'digits') == bits(undisturbed(3))
    assert 'finished' in phalanx.run('status', job.handle)


def test_a_job_that_is_longer_than_its_time_limit_goes_on_in_the_next(
    limited, directory, undisturbed
):
    limited.end(seconds=300)
    assert 'SIGUSR1: the workers save and end' in limited.output
    assert 'the tasks were stopped; the job is requeued (1 of 3' in limited.output
    assert int(limited.shown('Restarts')) >= 1
    assert bits(directory / 'limited') == bits(undisturbed(2, *DIGITS_OR_MNIST))


def test_an_elastic_job_goes_on_with_fewer_hosts_in_the_same_order_of_examples(
    phalanx, cluster, directory, undisturbed
):
    job = phalanx.submit('elastic', '--workers=2-3', '--elastic', '--exclude=node4')
    at = job.until_step(20)
    assert job.shown('NumNodes') == '3'
    lost = job.host(2)
    cluster.hosts.cut(lost)
    try:
        job.until(lambda: job.shown('Restarts') == '1' and job.shown('JobState') == 'RUNNING')
        assert job.shown('NumNodes') == '2'
        job.until_step(at + 40)
    finally:
        cluster.hosts.heal(lost)
    job.end()
    assert manifest(directory / 'elastic')['topology']['num_workers'] == 2
    assert samples(directory / 'elastic') == samples(undisturbed(3))
