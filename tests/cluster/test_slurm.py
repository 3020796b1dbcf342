"""Jobs under a real Slurm: how they are started, ended, requeued and told of, without training."""

import functools
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from launch.backends import Unreachable
from launch.backends.slurm import Slurm, SlurmOptions
from launch.job import Policy, Resources
from launch.known import Submitted
from launch.nodelist import expand
from tests.cluster.hosts import Hosts, needs_root
from tests.cluster.slurm import Cluster
from tests.cluster.slurm_jobs import Running, stand_in_job
from tests.processes import REPOSITORY
from trainer.errors import ConfigError

pytestmark = [pytest.mark.cluster, needs_root]


@pytest.fixture(scope='module')
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix='pxs') as directory,
        Hosts(12, prefix='pxsj', net='10.81.2') as hosts,
        Cluster(Path(directory), hosts) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture
def make_job(tmp_path):
    """A function: what its tasks do, what is different -> a job on two hosts."""
    return functools.partial(stand_in_job, tmp_path)


def test_shellcheck_finds_nothing_wrong_in_any_script():
    scripts = sorted((REPOSITORY / 'tests' / 'launch' / 'backends' / 'golden').glob('slurm-*.sh'))
    assert scripts
    assert shutil.which('shellcheck'), 'Install it: apt-get install shellcheck'
    # SC2016: that nothing expands in single quotes is what they are for.
    done = subprocess.run(
        ['shellcheck', '--exclude=SC2016', *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_values_of_all_kinds_arrive_intact_and_run_nothing(cluster, make_job, tmp_path):
    mark = tmp_path / 'mark'
    value = f'a b\'c"d`touch {mark}`$(touch {mark});touch {mark}\r\n#SBATCH --hold\n\t\\x41 %j ü'
    directory = tmp_path / 'it\'s "$(here)";\n#'
    directory.mkdir()
    job = make_job(
        '0',
        variables={'VALUE': value},
        model_dir=str(tmp_path / 'it\'s "100%j" #1;$(x)'),
        flags=(f'--gin.X={value}', ''),
        directory=str(directory),
    )
    running = Running(cluster, job)
    assert running.until('finished', 'failed').state == 'finished'
    for rank in range(2):
        (told,) = running.told(rank)
        assert told['value'] == value
        assert told['directory'] == str(directory)
        assert told['arguments'][-2:] == [f'--gin.X={value}', '']
        assert f'--model_dir={job.model_dir}' in told['arguments']
        script = next(each for each in told['arguments'] if each.startswith('--gin_script='))
        assert Path(script.partition('=')[2]).read_text() == job.config
    assert not mark.exists()
    assert 'task 0 on node' in running.output()


def test_a_job_is_pending_then_runs_and_its_log_is_followed_to_the_end(cluster, make_job):
    running = Running(cluster, make_job('wait'))
    status = running.until('running')
    assert [task.rank for task in status.tasks] == [0, 1]
    assert [task.state for task in status.tasks] == ['running', 'running']
    pieces = running.slurm.logs(running.submitted, follow=True)
    text = next(pieces)
    while 'task' not in text:
        text += next(pieces)
    told = running.until_told()
    assert [task.host for task in status.tasks] == expand(told[0]['nodes'])
    running.slurm.cancel(running.submitted)
    rest = ''.join(pieces)
    assert sorted(re.findall(r'task (\d) has saved', rest)) == ['0', '1']
    assert 'phalanx: the job was cancelled\n' in rest
    assert running.state == 'cancelled'


def test_a_cancelled_job_saves_first_and_is_never_requeued(cluster, make_job):
    running = Running(cluster, make_job('wait'))
    running.until_told()
    running.slurm.cancel(running.submitted)
    status = running.until('cancelled')
    assert status.restarts == 0
    assert [each['signal'] for each in running.told(0, 'signal')] == [10]
    running.slurm.cancel(running.submitted)
    assert running.state == 'cancelled'


def test_a_second_cancel_ends_a_job_that_took_no_notice_of_the_first(cluster, make_job):
    running = Running(cluster, make_job('deaf'))
    running.until_told()
    running.slurm.cancel(running.submitted)
    cluster.until(lambda: running.told(0, 'signal'))
    time.sleep(1)
    assert running.state == 'running'
    running.slurm.cancel(running.submitted)
    assert running.until('cancelled').restarts == 0


def test_a_job_that_waits_is_cancelled_at_once(cluster, make_job):
    running = Running(cluster, make_job('0'), SlurmOptions(sbatch=('--begin=now+1hour',)))
    assert running.state == 'pending'
    running.slurm.cancel(running.submitted)
    assert running.state == 'cancelled'


def test_what_its_user_ends_with_scancel_stays_so(cluster, make_job):
    running = Running(cluster, make_job('wait'))
    running.until_told()
    cluster.run('scancel', running.id)
    running.until('cancelled')
    assert running.output().count('has saved') == 2
    time.sleep(8)  # longer than a requeue takes
    assert running.state == 'cancelled'
    assert len(running.told()) == 1


def test_a_killed_task_has_the_step_start_again_where_it_is(cluster, make_job):
    running = Running(cluster, make_job('killed 0'))
    status = running.until('finished', 'failed', seconds=90)
    assert (status.state, status.restarts) == ('finished', 0)
    assert len(running.told()) == 2
    assert 'the tasks were killed (exit code 137) and are started again (1 of 1' in running.output()


@pytest.mark.parametrize(('code', 'meaning'), [(1, 'failed'), (2, 'failed')])
def test_a_failure_for_good_and_a_mistake_end_the_job(cluster, make_job, code, meaning):
    running = Running(cluster, make_job(str(code)))
    status = running.until('finished', 'failed', 'stopped')
    assert status.state == meaning
    assert status.reason == f'FAILED, NonZeroExitCode, exit code {code}'
    assert len(running.told()) == 1


def test_a_stopped_job_is_requeued_until_it_gets_nowhere(cluster, make_job):
    running = Running(cluster, make_job('75'))
    status = running.until('finished', 'failed', 'stopped')
    assert (status.state, status.restarts) == ('failed', 1)
    output = running.output()
    assert 'the tasks were stopped; the job is requeued (1 of 1 without' in output
    assert 'giving up: 2 times in a row the tasks ended without a new checkpoint' in output


def test_requeues_with_a_new_checkpoint_each_do_not_count(cluster, make_job):
    running = Running(cluster, make_job('wait wait wait 0', variables={'SAVES': '1'}))
    for start in (1, 2, 3):
        running.until_told(start)
        # As Slurm does before the time limit.
        cluster.run('scancel', '--batch', '--signal=USR1', running.id)
    status = running.until('finished', 'failed', 'stopped')
    assert (status.state, status.restarts) == ('finished', 3)


def test_a_preempted_job_saves_is_requeued_and_goes_on_without_being_counted(cluster, make_job):
    job = make_job('wait wait 0', policy=Policy(max_restarts=0))
    running = Running(cluster, job, SlurmOptions(exclusive=True))
    for start in (1, 2):
        running.until_told(start)
        wanted = ['-p', 'high', '-N4', '--exclusive', '-o', '/dev/null', '--wrap', 'true']
        cluster.run('sbatch', *wanted)
    status = running.until('finished', 'failed', 'stopped', seconds=90)
    assert (status.state, status.restarts) == ('finished', 2)
    assert running.output().count('the job is preempted') == 2
    assert [each['signal'] for each in running.told(0, 'signal')] == [15, 15]


def test_a_job_whose_hosts_have_no_scontrol_ends_with_75_and_says_what_to_do(
    cluster, make_job, tmp_path
):
    bare = tmp_path / 'bin'
    bare.mkdir()
    for name in ('srun', 'bash'):
        path = subprocess.run(['which', name], capture_output=True, text=True, check=True).stdout
        (bare / name).symlink_to(path.strip())
    running = Running(cluster, make_job('75', variables={'PATH': str(bare)}))
    assert running.until('finished', 'failed', 'stopped').state == 'stopped'
    assert 'scontrol is not on this host.' in running.output()
    assert 'this job cannot be requeued: submit it again to go on.' in running.output()


def test_gpus_and_cpus_of_all_workers_of_a_host_are_asked_for_together(cluster, make_job):
    resources = Resources(cpus=2, memory_mb=100, gpus=2)
    job = make_job('0', workers=4, min_workers=4, workers_per_host=2, resources=resources)
    running = Running(cluster, job)
    assert running.until('finished', 'failed').state == 'finished'
    assert [running.told(rank)[0]['gpus'] for rank in range(2)] == ['0,1,2,3', '0,1,2,3']
    shown = cluster.run('scontrol', 'show', 'job', running.id)
    assert 'CPUs/Task=4' in shown
    assert 'MinMemoryNode=200M' in shown


def test_an_elastic_job_takes_as_many_hosts_as_there_are(cluster, make_job):
    job = make_job('0', workers=4, min_workers=2)
    running = Running(cluster, job, SlurmOptions(exclude='node4'))
    assert running.until('finished', 'failed').state == 'finished'
    assert expand(running.told()[0]['nodes']) == ['node1', 'node2', 'node3']
    assert '--workers=2-4' in running.told()[0]['arguments']


def test_twelve_hosts_have_their_ranks_in_the_order_of_slurm(cluster, make_job):
    running = Running(
        cluster, make_job('0', workers=12, min_workers=12), SlurmOptions(partition='wide')
    )
    status = running.until('finished', 'failed')
    assert status.state == 'finished'
    wanted = [f'node{number}' for number in range(1, 13)]
    assert [running.told(rank)[0]['host'] for rank in range(12)] == wanted
    assert expand(running.told()[0]['nodes']) == wanted
    assert [task.host for task in status.tasks] == wanted


@pytest.mark.parametrize(
    ('more', 'options', 'reason'),
    [
        ({'workers': 13, 'min_workers': 13}, {}, 'Partition(Config|NodeLimit)'),
        ({}, {'partition': 'narrow'}, 'Partition(Config|NodeLimit)'),
        ({'time_limit_seconds': 7200}, {}, 'Partition(Config|TimeLimit)'),
        ({}, {'sbatch': ('--hold',)}, 'JobHeldUser'),
    ],
    ids=['too many hosts', 'too many hosts of a partition', 'too long', 'held'],
)
def test_a_job_that_can_never_start_says_so(cluster, make_job, more, options, reason):
    running = Running(cluster, make_job('0', **more), SlurmOptions(**options))
    try:
        begun = time.monotonic()
        cluster.until(lambda: running.slurm.status(running.submitted).never, 30)
        assert time.monotonic() - begun < 30
        status = running.slurm.status(running.submitted)
        assert status.state == 'pending'
        assert re.fullmatch(reason, status.reason)
        with pytest.raises(ConfigError, match=f'the job is pending [(]{reason}[)]'):
            running.output()
    finally:
        running.slurm.cancel(running.submitted)


def test_a_job_that_waits_for_hosts_that_are_down_says_so(cluster, make_job):
    cluster.run('scontrol', 'update', 'NodeName=node4', 'State=DRAIN', 'Reason=test')
    try:
        running = Running(cluster, make_job('0'), SlurmOptions(nodelist='node4'))
        cluster.until(lambda: running.slurm.status(running.submitted).never, 30)
        status = running.slurm.status(running.submitted)
        assert status.reason == 'ReqNodeNotAvail, UnavailableNodes:node4'
    finally:
        cluster.run('scontrol', 'update', 'NodeName=node4', 'State=RESUME')
    assert running.until('finished', 'failed').state == 'finished'


@pytest.mark.parametrize(
    ('more', 'options', 'words'),
    [
        ({}, {'partition': 'nope'}, 'invalid partition specified: nope'),
        ({'resources': Resources(gpus=9)}, {}, 'Requested node configuration is not available'),
        ({'resources': Resources(memory_mb=99999)}, {}, 'Memory specification can not be'),
        ({}, {'constraint': 'warp'}, 'Invalid feature specification'),
        ({}, {'sbatch': ('--no-such-option',)}, 'no-such-option'),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(cluster, make_job, more, options, words):
    before = cluster.run('squeue', '-h')
    with pytest.raises(ConfigError, match=r'^Slurm has not taken the job: ') as caught:
        Slurm(SlurmOptions(**options)).submit(make_job('0', **more))
    assert words in str(caught.value)
    assert cluster.run('squeue', '-h') == before


def test_variables_of_sbatch_do_not_override_the_plan(cluster, make_job, monkeypatch):
    monkeypatch.setenv('SBATCH_PARTITION', 'nope')
    monkeypatch.setenv('SBATCH_TIMELIMIT', '1')
    monkeypatch.setenv('SBATCH_NO_REQUEUE', '1')
    monkeypatch.setenv('SLURM_NTASKS_PER_NODE', '7')
    with pytest.raises(ConfigError, match='invalid partition specified: nope'):
        Slurm().submit(make_job('0'))
    running = Running(cluster, make_job('0'), SlurmOptions(partition='main'))
    assert running.until('finished', 'failed').state == 'finished'
    shown = cluster.run('scontrol', 'show', 'job', running.id)
    assert 'TimeLimit=01:00:00' in shown
    assert 'Requeue=1' in shown


def test_a_sweep_runs_each_element_in_a_directory_of_its_own(cluster, make_job):
    sweep = (('--gin_bindings=X=0',), ('--gin_bindings=X="1 $(x)"',), ('--gin_bindings=X=2',))
    running = Running(cluster, make_job('0'), SlurmOptions(sweep=sweep, sweep_at_once=2))
    status = running.until('finished', 'failed')
    assert [(task.rank, task.state) for task in status.tasks] == [
        (element, 'finished') for element in range(3)
    ]
    for element in range(3):
        for rank in range(2):
            (told,) = running.told(rank, element=str(element))
            assert told['arguments'][-1] == sweep[element][0]
    handle = f'{running.submitted.handle}_1'
    element = Submitted(handle)
    assert [task.rank for task in running.slurm.status(element).tasks] == [0, 1]
    assert 'task 1 on node' in ''.join(running.slurm.logs(element))
    with pytest.raises(ConfigError, match='is a sweep: name one of its elements, such as slurm://'):
        running.output()


def test_all_elements_of_a_sweep_are_cancelled_those_that_run_after_saving(cluster, make_job):
    sweep = (('--gin_bindings=X=0',), ('--gin_bindings=X=1',))
    running = Running(cluster, make_job('wait'), SlurmOptions(sweep=sweep, sweep_at_once=1))
    cluster.until(lambda: running.told(1, element='0'))
    running.slurm.cancel(running.submitted)
    assert running.until('cancelled').restarts == 0
    assert running.told(1, 'signal', element='0')
    assert not running.told(1, element='1')


def test_a_job_that_slurm_has_forgotten_is_unknown(cluster):
    status = Slurm().status(Submitted('slurm://testcluster/99999'))
    assert status.state == 'unknown'
    assert 'keeps no accounts' in status.reason


def test_a_handle_of_another_form_is_refused(cluster):
    with pytest.raises(ConfigError, match='A right one: slurm://cluster/123'):
        Slurm().status(Submitted('slurm://testcluster/x'))


def test_where_slurm_is_not_there_or_does_not_answer_it_is_unreachable(
    cluster, make_job, monkeypatch, tmp_path
):
    conf = Path(cluster.environment['SLURM_CONF'])
    other = tmp_path / 'slurm.conf'
    other.write_text(conf.read_text() + 'SlurmctldPort=9\nMessageTimeout=2\n')
    monkeypatch.setenv('SLURM_CONF', str(other))
    for ask in (
        lambda: Slurm().submit(make_job('0')),
        lambda: Slurm().status(Submitted('slurm://local/1')),
    ):
        with pytest.raises(Unreachable, match='Unable to contact slurm controller'):
            ask()
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(Unreachable, match='is not on this host'):
        Slurm().submit(make_job('0'))
