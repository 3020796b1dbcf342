"""A Slurm that keeps accounts knows of a job for longer than its controller does."""

import tempfile
from pathlib import Path

import pytest

from launch.backends import slurm_queue
from launch.backends.slurm import Slurm, SlurmOptions
from launch.known import Submitted
from tests.cluster.hosts import Hosts, needs_root
from tests.cluster.slurm import Cluster
from tests.cluster.slurm_jobs import Running, stand_in_job
from trainer.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_root]


@pytest.fixture(scope='module')
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix='pxs') as directory,
        Hosts(2, prefix='pxsa', net='10.81.3') as hosts,
        Cluster(Path(directory), hosts, accounting=True, job_age=3) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


def until_forgotten(cluster, running):
    """Waits until the controller does not know a job any more."""
    cluster.until(lambda: not slurm_queue.jobs(running.id), 120)


def test_jobs_that_the_controller_has_forgotten_are_told_of_from_the_accounts(
    cluster, tmp_path_factory
):
    def start(end):
        return Running(cluster, stand_in_job(tmp_path_factory.mktemp('job'), end))

    cancelled = start('wait')
    cancelled.until_told()
    cancelled.slurm.cancel(cancelled.submitted)
    cancelled.until('cancelled')
    finished, mistaken, requeued = start('0'), start('2'), start('75 0')
    for running in (finished, mistaken, requeued):
        running.until('finished', 'failed', seconds=60)
    for running in (cancelled, finished, mistaken, requeued):
        until_forgotten(cluster, running)
    status = finished.slurm.status(finished.submitted)
    assert status.state == 'finished'
    assert [task.host for task in status.tasks] == ['node1', 'node2']
    assert cancelled.state == 'cancelled'
    status = mistaken.slurm.status(mistaken.submitted)
    assert (status.state, status.reason) == ('failed', 'FAILED, exit code 2')
    status = requeued.slurm.status(requeued.submitted)
    assert (status.state, status.restarts) == ('finished', 1)
    assert 'the job is requeued' in requeued.output()
    finished.slurm.cancel(finished.submitted)
    assert finished.state == 'finished'


def test_logs_are_followed_until_a_job_that_is_cancelled_has_ended(cluster, tmp_path):
    running = Running(cluster, stand_in_job(tmp_path, 'wait'))
    running.until_told()
    running.slurm.cancel(running.submitted)
    said = ''.join(running.slurm.logs(running.submitted, follow=True))
    assert said.count('has saved') == 2
    assert running.state == 'cancelled'


def test_a_job_that_never_was_is_no_job(cluster):
    with pytest.raises(ConfigError, match='There is no job slurm://testcluster/99999'):
        Slurm().status(Submitted('slurm://testcluster/99999'))


@pytest.mark.parametrize('name', ['account', 'qos'])
def test_an_account_or_quality_of_service_that_is_not_there_is_refused(cluster, tmp_path, name):
    with pytest.raises(ConfigError, match=r'Slurm has not taken the job: .*[Ii]nvalid'):
        Slurm(SlurmOptions(**{name: 'nope'})).submit(stand_in_job(tmp_path, '0'))
