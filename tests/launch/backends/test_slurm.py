"""Batch scripts of Slurm, and what Slurm says, without Slurm."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from launch.backends import slurm_queue
from launch.backends.slurm import Slurm, SlurmOptions, define_flags, from_flags
from launch.job import Job, Policy, Resources
from trainer.errors import ConfigError

GOLDEN = Path(__file__).parent / 'golden'
HOSTILE = 'a b\'c"d`touch {0}`$(touch {0});touch {0}\r\n#SBATCH --hold\n\t\\x41 % ü'

JOB = Job(
    name='digits',
    model_dir='/shared/runs/digits',
    config='[]',
    flags=('--mode=train',),
    workers=3,
    min_workers=3,
    directory='/home/me/project',
    python='/home/me/.venv/bin/python',
    environment={'PYTHONPATH': '/home/me/project'},
)
JOBS = {
    'plain': (JOB, SlurmOptions()),
    'full': (
        dataclasses.replace(
            JOB,
            workers=8,
            min_workers=4,
            workers_per_host=2,
            resources=Resources(cpus=4, memory_mb=16_000, gpus=2),
            policy=Policy(max_restarts=5, grace_seconds=90.5, elastic=True),
            time_limit_seconds=3601,
        ),
        SlurmOptions(
            partition='gpu',
            account='lab',
            qos='high',
            constraint='a100&nvlink|h100',
            nodelist='node[1-3]',
            exclude='node7',
            reservation='course',
            exclusive=True,
            gpus_by='gpus-per-node',
            gpu_type='a100',
            sbatch=('--mail-type=END', '--comment="of ours"'),
        ),
    ),
    'sweep': (
        JOB,
        SlurmOptions(
            sweep=(
                ('--gin_bindings=LEARNING_RATE=0.1',),
                ('--gin_bindings=LEARNING_RATE=0.2', '--gin_bindings=NAME="it\'s"'),
            ),
            sweep_at_once=1,
        ),
    ),
    'pyxis': (
        JOB,
        SlurmOptions(container='registry/phalanx:1', container_mounts=('/data:/mnt', '/opt')),
    ),
    'apptainer': (
        dataclasses.replace(JOB, resources=Resources(gpus=1)),
        SlurmOptions(container='/images/phalanx.sif', container_by='apptainer'),
    ),
    'hostile': (
        dataclasses.replace(
            JOB,
            model_dir='/shared/it\'s "100%" #1;$(x)',
            flags=(f'--gin_bindings=X={HOSTILE}',),
            environment={'HOSTILE': HOSTILE, 'EMPTY': ''},
            directory='/home/me/a b$(x)',
        ),
        SlurmOptions(constraint='a b#"\\c'),
    ),
}


@pytest.mark.parametrize('name', JOBS)
def test_the_plan_is_the_same_text_as_before(name):
    job, options = JOBS[name]
    path = GOLDEN / f'slurm-{name}.sh'
    assert Slurm(options).plan(job) == path.read_bytes().decode()


@pytest.mark.parametrize('name', JOBS)
def test_bash_finds_nothing_wrong_in_the_plan(name):
    subprocess.run(['bash', '-n', GOLDEN / f'slurm-{name}.sh'], check=True)


def test_every_line_for_sbatch_comes_before_the_first_command():
    for path in GOLDEN.glob('slurm-*.sh'):
        lines = path.read_text().splitlines()
        count = sum(line.startswith('#SBATCH') for line in lines)
        assert all(line.startswith('#SBATCH') for line in lines[1 : count + 1])
        assert '\r' not in path.read_bytes().decode()


def test_values_reach_the_step_as_they_are_and_run_nothing(tmp_path):
    """The script is run by bash, with a Python in place of the interpreter that tells its arguments
    and environment."""
    mark, told = tmp_path / 'mark', tmp_path / 'told'
    value = HOSTILE.format(mark)
    interpreter = tmp_path / 'an interpreter'
    interpreter.write_text(
        f'#!{sys.executable}\nimport json, os, sys\n'
        f'json.dump([os.getcwd(), os.environ["VALUE"], sys.argv[1:]], open({str(told)!r}, "w"))\n'
    )
    interpreter.chmod(0o755)
    directory = tmp_path / 'it\'s a "directory"\n;$(x)'
    directory.mkdir()
    job = dataclasses.replace(
        JOB,
        model_dir=str(tmp_path / 'model "dir"'),
        flags=(f'--gin_bindings=X={value}', ''),
        environment={'VALUE': value},
        directory=str(directory),
        python=str(interpreter),
    )
    options = SlurmOptions(sweep=((f'--gin_bindings=Y={value}',), ('--gin_bindings=Y=2',)))
    script = tmp_path / 'script'
    script.write_bytes(Slurm(options).plan(job).encode())
    subprocess.run(['bash', script], check=True, env={'SLURM_ARRAY_TASK_ID': '0'})
    where, variable, arguments = json.loads(told.read_text())
    assert where == str(directory)
    assert variable == value
    assert arguments[-3:] == [f'--gin_bindings=X={value}', '', f'--gin_bindings=Y={value}']
    assert f'--model_dir={job.model_dir}/0' in arguments
    assert not mark.exists()


def test_a_value_of_two_lines_cannot_be_told_to_sbatch():
    with pytest.raises(ConfigError, match='does not fit on one line'):
        Slurm(SlurmOptions(constraint='a\n#SBATCH --hold')).plan(JOB)
    with pytest.raises(ConfigError, match='does not fit on one line'):
        Slurm(SlurmOptions(sbatch=('--comment=a\n#SBATCH --hold',))).plan(JOB)


def test_a_time_limit_that_leaves_no_time_is_refused():
    job = dataclasses.replace(JOB, time_limit_seconds=180)
    with pytest.raises(ConfigError) as caught:
        Slurm().plan(job)
    assert str(caught.value) == (
        '--time_limit: 180 s leave no time to train. Tasks are told to save 120 s before the limit '
        '(--grace_seconds and 60 s), and Slurm may do so 60 s earlier. Give the job more than '
        '180 s.'
    )


def test_a_path_that_a_container_cannot_mount_is_refused():
    with pytest.raises(ConfigError, match="'/a,b:/a,b' cannot be mounted"):
        Slurm(SlurmOptions(container='x', container_mounts=('/a,b',))).plan(JOB)


def options(*argv):
    values = flags.FlagValues()
    define_flags(values)
    values(['phalanx', *argv])
    return from_flags(values)


def test_flags_are_read_into_options(tmp_path):
    assert options() == SlurmOptions()
    sweep = tmp_path / 'sweep'
    sweep.write_text('# rates\n--gin.RATE=0.1\n\n--gin.RATE=0.2 "--gin.NAME=\'a b\'"\n')
    given = options(
        '--partition=gpu',
        '--exclusive',
        '--sbatch=--mail-type=END',
        '--sbatch=--nice',
        f'--sweep={sweep}',
        '--container_mounts=/data',
    )
    assert given == SlurmOptions(
        partition='gpu',
        exclusive=True,
        sbatch=('--mail-type=END', '--nice'),
        sweep=(
            ('--gin_bindings=RATE=0.1',),
            ('--gin_bindings=RATE=0.2', "--gin_bindings=NAME='a b'"),
        ),
        container_mounts=('/data',),
    )


def test_every_option_has_a_flag_with_a_help_text():
    values = flags.FlagValues()
    define_flags(values)
    names = {field.name for field in dataclasses.fields(SlurmOptions)}
    assert names == set(values)
    assert all(values[name].help for name in names)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--gpus_by=grse', "--gpus_by=grse is none of gres, gpus-per-node. Did you mean 'gres'?"),
        ('--container_by=docker', '--container_by=docker is none of pyxis, apptainer.'),
        (
            '--sbatch=mail-type=END',
            '--sbatch=mail-type=END is no option of sbatch. Write it as sbatch has it, such as '
            '--sbatch=--mail-type=END.',
        ),
        ('--sweep=/none', '--sweep=/none cannot be read: [Errno 2] No such file or directory'),
    ],
)
def test_a_wrong_value_is_told(argument, message):
    with pytest.raises(ConfigError) as caught:
        options(argument)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('--gin.A=1\n--workers=2\n', ':2: --workers=2 is not of the form --gin.NAME=VALUE.'),
        ("--gin.A='x\n", ":1: No closing quotation: --gin.A='x"),
        ('# nothing\n', ' holds no lines such as --gin.LEARNING_RATE=0.1'),
    ],
)
def test_a_wrong_line_of_a_sweep_is_told(tmp_path, text, message):
    (tmp_path / 'sweep').write_text(text)
    with pytest.raises(ConfigError) as caught:
        options(f'--sweep={tmp_path}/sweep')
    assert message in str(caught.value)


# As Slurm 22.05 printed it, with a job name as hostile as Slurm allows.
SHOWN = """\
JobId=35 ArrayJobId=34 ArrayTaskId=1 JobName=x JobState=FAILED Reason=y NodeList=z
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode={code}
   PreemptEligibleTime=2026-01-23T12:16:49 PreemptTime={preempt}
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[1-2]
   BatchHost=node1
   StdErr=/tmp/it's 100%%/slurm-35.out
   StdOut=/tmp/it's 100%%/slurm-35.out
   Power=
"""


def shown(state='RUNNING', reason='None', code='0:0', preempt='None'):
    text = SHOWN.format(state=state, reason=reason, code=code, preempt=preempt)
    (record,) = slurm_queue.parse_jobs(text)
    return record


def test_what_scontrol_prints_is_read():
    assert shown() == slurm_queue.Record(
        job_id='34_1',
        elements=(1,),
        word='RUNNING',
        state='running',
        restarts=2,
        nodes='node[1-2]',
        output="/tmp/it's 100%/slurm-35.out",
    )
    assert shown(preempt='2026-01-23T12:16:51').preempted


@pytest.mark.parametrize(
    ('state', 'code', 'meaning'),
    [
        ('PENDING', '0:0', 'pending'),
        ('CONFIGURING', '0:0', 'pending'),
        ('COMPLETING', '0:0', 'running'),
        ('COMPLETED', '0:0', 'finished'),
        ('FAILED', '1:0', 'failed'),
        ('FAILED', '75:0', 'stopped'),
        ('TIMEOUT', '0:0', 'failed'),
        ('NODE_FAIL', '0:0', 'failed'),
        ('OUT_OF_MEMORY', '0:125', 'failed'),
        ('CANCELLED', '0:15', 'cancelled'),
        ('A_STATE_OF_TOMORROW', '0:0', 'unknown'),
    ],
)
def test_a_state_of_slurm_has_a_meaning(state, code, meaning):
    assert shown(state, code=code).state == meaning


@pytest.mark.parametrize(
    'reason',
    ['PartitionConfig', 'PartitionNodeLimit', 'PartitionTimeLimit', 'BadConstraints', 'JobHeldUser']
    + ['AccountNotAllowed', 'QOSMaxNodePerJobLimit', 'AssocMaxWallDurationPerJobLimit']
    + ['QOSMaxGRESPerNode', 'QOSMinCpuNotSatisfied', 'DependencyNeverSatisfied', 'InvalidQOS']
    + ['ReqNodeNotAvail,_UnavailableNodes:node4', 'launch_failed_requeued_held'],
)
def test_a_reason_that_does_not_pass_by_itself_is_known(reason):
    assert shown('PENDING', reason).never


@pytest.mark.parametrize(
    'reason',
    ['None', 'Resources', 'Priority', 'BeginTime', 'Dependency', 'QOSGrpCpuLimit', 'Licenses']
    + ['QOSMaxJobsPerUserLimit', 'AssocGrpNodeLimit', 'JobArrayTaskLimit', 'ReqNodeNotAvail']
    + ['ReqNodeNotAvail,_UnavailableNodes:', 'ReqNodeNotAvail,_May_be_reserved_for_other_job']
    + [
        'Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions'
    ],
)
def test_a_job_may_wait_for_what_passes(reason):
    assert not shown('PENDING', reason).never


def test_what_waits_of_an_array_are_its_elements():
    text = SHOWN.replace('ArrayTaskId=1 ', 'ArrayTaskId=3-5,8%2 ')
    text = text.format(state='PENDING', reason='None', code='0:0', preempt='None')
    (record,) = slurm_queue.parse_jobs(text)
    assert (record.job_id, record.elements) == ('34', (3, 4, 5, 8))


def test_of_a_requeued_job_the_accounts_tell_the_last_start():
    first, last = slurm_queue.parse_accounts(
        '7|REQUEUED|0:0|node[1-2]\n7|CANCELLED by 0|0:15|node[1,3]\n8_2|FAILED|75:0|node4\n'
    )
    assert (first.state, first.restarts, first.nodes) == ('cancelled', 1, 'node[1,3]')
    assert (last.job_id, last.elements, last.state) == ('8_2', (2,), 'stopped')
    assert slurm_queue.parse_accounts('9|PENDING|0:0|None assigned\n')[0].nodes == ''
