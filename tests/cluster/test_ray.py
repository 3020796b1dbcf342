"""Jobs on a real Ray cluster of three hosts."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch.backends import Status
from launch.backends.ray import Ray, RayOptions
from launch.job import Job, Policy
from launch.known import Submitted
from tests.cluster.hosts import Hosts, needs_root
from tests.cluster.ray import RayCluster, needs_ray
from tests.processes import REPOSITORY, environment
from trainer import gin_files
from trainer.model_dir import ModelDir

pytestmark = [pytest.mark.cluster, needs_root, needs_ray]

# Of a job, everything in a test together; the machine may be busy.
DEADLINE_SECONDS = 240
STEPS = 300
BINDINGS = {
    'STEPS': STEPS,
    'BATCH_SIZE': 48,
    'DEVICES': 1,
    'cnn.filters': 8,
    'cnn.units': 16,
    'train.save_every': 50,
    'train.eval_every': 200,
    'train.sample_log': True,
}
# Each host here has the cores of all.
THREADS = {'TF_NUM_INTRAOP_THREADS': '1'}
HOSTILE = 'a b\'c"d\\e\nf $HOME ${HOME} $(touch pwned) `touch pwned`; touch pwned #\t\u00e9'
HEAD = 'node1'


@pytest.fixture(scope='module')
def hosts():
    with Hosts(3, prefix='pxr', net='10.83.1') as hosts:
        yield hosts


@pytest.fixture(scope='module')
def whole_cluster(hosts):
    with RayCluster(hosts) as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster):
    """The cluster, which has all its hosts again after the test."""
    yield whole_cluster
    for index in (2, 3):
        whole_cluster.mend(index)


@pytest.fixture
def ray(cluster):
    return Ray(RayOptions(cluster.address))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """A function: number of workers -> the digest and the samples of the job on this host."""
    found = {}

    def run(workers):
        if workers not in found:
            model_dir = tmp_path_factory.mktemp(f'local{workers}') / 'run'
            given = [f'--gin.{name}={value}' for name, value in BINDINGS.items()]
            command = ['launch', 'run', f'--workers={workers}', '--gin_file=runs/digits.gin']
            subprocess.run(
                [sys.executable, '-m', *command, *given, f'--model_dir={model_dir}'],
                env=environment(**THREADS),
                check=True,
                capture_output=True,
                timeout=DEADLINE_SECONDS,
            )
            found[workers] = end_of(model_dir)
        return found[workers]

    return run


class Run:
    """A job that was submitted."""

    def __init__(self, ray: Ray, job: Job):
        self.ray, self.job = ray, job
        self.dirs = ModelDir(job.model_dir)
        self.submitted = Submitted(ray.submit(job), model_dir=job.model_dir)
        self.said: list[str] = []
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.status().state in ('pending', 'running'):
            self.ray.cancel(self.submitted)
            with contextlib.suppress(AssertionError):
                self.end()

    @property
    def text(self) -> str:
        return ''.join(self.said)

    def _follow(self):
        for piece in self.ray.logs(self.submitted, follow=True):
            self.said.append(piece)

    def status(self) -> Status:
        return self.ray.status(self.submitted)

    def until(self, what):
        """Waits until what() is true, and returns that."""
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.1)
        raise AssertionError(f'it never came to that: {self.status()}\n{self.text[-3000:]}')

    def until_step(self, step: int) -> None:
        """Waits for a checkpoint of that step or a later one."""
        self.until(lambda: self.dirs.checkpoints.is_dir() and self.dirs.newest_step() >= step)

    def end(self) -> Status:
        """Follows the job to its end; returns how it stands then."""
        self._follower.join(DEADLINE_SECONDS)
        status = self.status()
        assert status.state not in ('pending', 'running'), self.text[-3000:]
        return status


def job(model_dir, workers, *, policy=None, variables=None, gin=(), **more) -> Job:
    """A job of so many hosts with a worker each."""
    bindings = [f'{name} = {value}' for name, value in BINDINGS.items()]
    files = [*gin, 'runs/digits.gin']
    script = gin_files.read(
        files, [*bindings, f'MODEL_DIR = {str(model_dir)!r}'], [str(p.parent) for p in gin]
    )
    config = model_dir.parent / 'config.json'
    script.save(config)
    return Job(
        name='digits',
        model_dir=str(model_dir),
        config=config.read_text(),
        flags=('--mode=train_and_evaluate', '--verbosity=0'),
        workers=workers,
        min_workers=more.pop('min_workers', workers),
        policy=policy or Policy(meeting_seconds=120.0),
        environment={**THREADS, **(variables or {})},
        directory=str(REPOSITORY),
        python=sys.executable,
        **more,
    )


def end_of(model_dir):
    """What has to be equal: the digest of the last state, and which examples were read."""
    manifest = Path(model_dir) / 'checkpoints' / f'step-{STEPS:08d}' / 'manifest.json'
    digest = json.loads(manifest.read_text())['state_sha256']
    return digest, (Path(model_dir) / 'samples.tsv').read_text()


def worker_of(model_dir, rank) -> psutil.Process:
    """The process of a worker."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, KeyError):
            if f'--model_dir={model_dir}' in process.cmdline():
                task = json.loads(process.environ()['TF_CONFIG'])['task']
                if task['index'] == rank:
                    return process
    raise AssertionError(f'no worker {rank}')


def test_a_job_ends_with_the_bits_of_the_same_job_on_one_host(ray, undisturbed, tmp_path):
    with Run(ray, job(tmp_path / 'run', 3)) as run:
        status = run.end()
    assert status.state == 'finished', run.text
    assert [(t.rank, t.state, t.code) for t in status.tasks] == [
        (rank, 'finished', 0) for rank in range(3)
    ]
    assert {task.host for task in status.tasks} == {'node1', 'node2', 'node3'}
    digest, samples = undisturbed(3)
    assert end_of(run.job.model_dir) == (digest, samples)
    assert f'state sha256: {digest}' in run.text
    assert ''.join(ray.logs(run.submitted)) == run.text
    log = run.dirs.attempt(1) / 'worker-2.log'
    assert ''.join(ray.logs(run.submitted, worker=2)) == log.read_text(errors='replace') != ''


def test_a_worker_that_is_killed_is_the_leaders_business(ray, undisturbed, tmp_path):
    with Run(ray, job(tmp_path / 'run', 2)) as run:
        run.until_step(50)
        worker_of(run.job.model_dir, 1).kill()
        status = run.end()
    assert status.state == 'finished', run.text
    assert status.restarts == 0
    assert 'worker 1 was ended by signal 9' in run.text
    assert end_of(run.job.model_dir) == undisturbed(2)


def test_a_job_that_fails_says_why_and_what_it_was_given_arrives(ray, tmp_path):
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code' / 'broken.py').write_text(
        'import os\nraise RuntimeError("NAME is " + ascii(os.environ["NAME"]))\n'
    )
    (tmp_path / 'code' / 'broken.gin').write_text('import broken\n')
    (tmp_path / 'code' / 'large.npz').write_bytes(b'0' * 1000)
    strange = tmp_path / 'a \'b" $(touch pwned); #'
    strange.mkdir()
    ship = Ray(
        dataclasses.replace(ray._options, working_dir=str(tmp_path / 'code'), excludes=('*.npz',))
    )
    given = job(
        strange / 'run',
        1,
        gin=[tmp_path / 'code' / 'broken.gin'],
        variables={'NAME': HOSTILE},
        policy=Policy(max_restarts=0),
    )
    with Run(ship, given) as run:
        status = run.end()
    assert status.state == 'failed'
    assert status.reason.startswith('Job entrypoint command failed with exit code ')
    assert f'NAME is {HOSTILE!a}' in run.text
    assert status.tasks[0].code in (1, 2)
    assert not list(tmp_path.rglob('pwned'))


def test_a_job_that_is_cancelled_saves_and_the_same_job_goes_on(ray, undisturbed, tmp_path):
    with Run(ray, job(tmp_path / 'run', 2)) as run:
        run.until_step(50)
        ray.cancel(run.submitted)
        status = run.end()
    assert status.state == 'stopped', run.text
    assert [task.code for task in status.tasks] == [75, 75]
    step = run.dirs.newest_step()
    assert 50 <= step < STEPS
    with Run(ray, run.job) as again:
        assert again.end().state == 'finished', again.text
    assert f'resumed at step {step}' in again.text
    assert end_of(run.job.model_dir) == undisturbed(2)


def test_a_host_that_dies_is_replaced(ray, cluster, undisturbed, tmp_path):
    with Run(ray, job(tmp_path / 'run', 2)) as run:
        run.until_step(50)
        host = next(task.host for task in run.status().tasks if task.host != HEAD)
        cluster.kill(int(host.removeprefix('node')))
        status = run.end()
    assert status.state == 'finished', run.text
    assert status.restarts == 1
    assert host not in {task.host for task in status.tasks}
    assert 'its host is gone' in run.text
    assert end_of(run.job.model_dir) == undisturbed(2)


def test_an_elastic_job_goes_on_without_a_host_that_is_cut_off(
    ray, cluster, hosts, undisturbed, tmp_path
):
    policy = Policy(meeting_seconds=30.0, elastic=True)
    with Run(ray, job(tmp_path / 'run', 3, min_workers=2, policy=policy)) as run:
        run.until_step(50)
        hosts.cut(3)
        status = run.end()
    assert status.state == 'finished', run.text
    assert ': 2 workers; logs in' in run.text
    _, samples = undisturbed(3)
    assert end_of(run.job.model_dir)[1] == samples


def test_a_job_that_can_never_be_placed_says_so(ray, tmp_path):
    begun = time.monotonic()
    with Run(ray, job(tmp_path / 'run', 4)) as run:
        status = run.until(lambda: (found := run.status()).never and found)
        seconds = time.monotonic() - begun
    assert seconds < 30
    assert status.state == 'pending'
    assert status.reason == (
        'Ray can never place this job on the cluster as it is now: it needs 4 host(s) with 1 CPU '
        'each, and 3 of the 3 host(s) there have that much in all'
    )
    assert run.status().state == 'stopped'
    assert os.path.exists(run.dirs.logs / 'ray.json')
