import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from launch.backends import Task, Unreachable
from launch.backends.ray import JOB, Ray, RayOptions, define_flags, from_flags
from launch.backends.ray_notes import Notes
from launch.job import Job, Policy, Resources
from launch.known import Submitted
from tests.processes import environment
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

GOLDEN = Path(__file__).parent / 'golden'
# What a shell, Ray and JSON would each like to change.
HOSTILE = 'a b\'c"d\\e\nf $HOME ${HOME} $(touch pwned) `touch pwned`; touch pwned #\t\u00e9'

SMALL = Job(
    name='digits',
    model_dir='/shared/digits',
    config='[["runs/digits.gin", 1, "STEPS = 600"]]',
    flags=('--mode=train_and_evaluate',),
    workers=3,
    min_workers=3,
    directory='/shared/code',
    python='/opt/phalanx/bin/python',
)
LARGE = dataclasses.replace(
    SMALL,
    name='digits-large',
    workers=16,
    min_workers=8,
    workers_per_host=4,
    resources=Resources(cpus=8, memory_mb=16_384, gpus=1),
    policy=Policy(grace_seconds=120.0, elastic=True),
    environment={'NAME': HOSTILE},
    time_limit_seconds=3600,
)


def env_vars(plan):
    return json.loads(plan)['runtime_env']['env_vars']


@pytest.mark.parametrize(
    ('name', 'job', 'options'),
    [
        ('small', SMALL, RayOptions()),
        ('large', LARGE, RayOptions('http://head:8265')),
        ('shipped', SMALL, RayOptions(working_dir='/home/me/code', excludes=('runs/', '.git/'))),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_the_plan_is_that_of_the_golden_file(name, job, options):
    golden = GOLDEN / f'ray-{name}.json'
    plan = Ray(options).plan(job)
    if os.environ.get('PHALANX_WRITE_GOLDEN'):
        golden.write_text(plan)
    assert plan == golden.read_text()


def test_the_job_arrives_as_it_was_though_ray_expands_variables():
    value = env_vars(Ray().plan(LARGE))[JOB]
    assert os.path.expandvars(value) == value  # which Ray does
    sent = json.loads(value)
    assert sent['environment'] == {'NAME': HOSTILE}
    assert sent == json.loads(json.dumps(dataclasses.asdict(LARGE)))


def test_hostile_paths_run_nothing(tmp_path):
    strange = tmp_path / 'a \'b" $(touch pwned); touch pwned\n'
    strange.mkdir()
    python = strange / "py'thon $(touch pwned)"
    python.write_text('#!/bin/sh\npwd >ran\n')
    python.chmod(0o755)
    job = dataclasses.replace(SMALL, directory=str(strange), python=str(python))
    entrypoint = json.loads(Ray().plan(job))['entrypoint']
    subprocess.run(entrypoint, shell=True, check=True, cwd=tmp_path)
    assert {path.name for path in tmp_path.rglob('*')} == {strange.name, python.name, 'ran'}
    assert (strange / 'ran').read_text() == f'{strange}\n'


def test_ray_is_told_to_wait_for_as_long_as_the_workers_may_save():
    assert env_vars(Ray().plan(LARGE))['RAY_JOB_STOP_WAIT_TIME_S'] == '150'


def test_shipped_code_is_where_the_tasks_start():
    plan = Ray(RayOptions(working_dir='code', excludes=('*.npz',))).plan(SMALL)
    assert json.loads(plan)['runtime_env']['working_dir'] == str(Path.cwd() / 'code')
    assert json.loads(plan)['runtime_env']['excludes'] == ['*.npz']
    assert json.loads(plan)['entrypoint'] == (
        'exec /opt/phalanx/bin/python -m launch.backends.ray_driver'
    )
    assert json.loads(env_vars(plan)[JOB])['directory'] == ''


def test_a_plan_for_1024_hosts_takes_less_than_a_second():
    job = dataclasses.replace(SMALL, workers=1024, min_workers=1024)
    begun = time.monotonic()
    Ray().plan(job)
    assert time.monotonic() - begun < 1.0


def test_what_is_too_large_for_the_environment_is_refused():
    job = dataclasses.replace(SMALL, environment={'TEXT': 'x' * 100_000})
    with pytest.raises(ConfigError, match='as one argument of 100,000 bytes at most'):
        Ray().plan(job)


def test_the_flags_become_options():
    values = flags.FlagValues()
    define_flags(values)
    values(['phalanx', '--ray_address=http://head:8265', '--ray_working_dir=.', '--ray_exclude=a'])
    assert from_flags(values) == RayOptions('http://head:8265', '.', ('a',))


def test_excludes_without_a_directory_are_refused():
    values = flags.FlagValues()
    define_flags(values)
    values(['phalanx', '--ray_exclude=*.png'])
    with pytest.raises(ConfigError, match='goes with --ray_working_dir=DIR'):
        from_flags(values)


@pytest.mark.parametrize('address', ['head:8265', 'ray://head:10001', 'auto', 'http://'])
def test_an_address_that_is_no_dashboard_is_refused(address):
    with pytest.raises(ConfigError, match=r'is no address of a dashboard.*http://HOST:8265'):
        Ray(RayOptions(address)).submit(SMALL)


def test_without_an_address_the_environment_is_asked(monkeypatch):
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.delenv('RAY_API_SERVER_ADDRESS', raising=False)
    with pytest.raises(ConfigError, match='Which Ray cluster'):
        Ray().submit(SMALL)
    monkeypatch.setenv('RAY_ADDRESS', 'head:6379')
    with pytest.raises(ConfigError, match='--ray_address=head:6379 is no address'):
        Ray().submit(SMALL)


def test_a_directory_to_ship_must_be_there(tmp_path):
    options = RayOptions('http://127.0.0.1:9', working_dir=str(tmp_path / 'none'))
    with pytest.raises(ConfigError, match='is no directory of this machine'):
        Ray(options).submit(SMALL)


@pytest.mark.parametrize('handle', ['ray://', 'ray://head:8265', 'ray://head:8265/', 'slurm://a/1'])
def test_what_is_no_handle_is_refused(handle):
    with pytest.raises(ConfigError, match='is no handle of a job'):
        Ray().status(Submitted(handle))


def test_a_cluster_that_does_not_answer_is_unreachable(monkeypatch):
    pytest.importorskip('ray', reason="pip install 'phalanx[ray]'")
    # Ray's own client would ask that one instead.
    monkeypatch.setenv('RAY_ADDRESS', 'http://127.0.0.1:1')
    with pytest.raises(Unreachable, match=r'Ray at http://127\.0\.0\.1:9 cannot be asked'):
        Ray().status(Submitted('ray://127.0.0.1:9/raysubmit_1'))
    assert os.environ['RAY_ADDRESS'] == 'http://127.0.0.1:1'


def test_importing_the_back_end_imports_no_ray():
    code = "import sys; import launch.backends.ray; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, '-c', code], env=environment(), check=True)


def test_without_ray_the_extra_is_named(tmp_path):
    (tmp_path / 'ray.py').write_text('raise ImportError("No module named ray")\n')
    code = (
        'from launch.backends.ray import Ray, RayOptions\n'
        'from launch.known import Submitted\n'
        'Ray().status(Submitted("ray://a:1/b"))\n'
    )
    path = os.pathsep.join([str(tmp_path), environment()['PYTHONPATH']])
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'phalanx[ray]'" in done.stderr
    assert 'ConfigError' in done.stderr


def test_the_drivers_directory_hides_no_package():
    """Run as a module it does not put launch/backends, where ray.py is, on the path."""
    pytest.importorskip('ray', reason="pip install 'phalanx[ray]'")
    entrypoint = json.loads(Ray(RayOptions(working_dir='.')).plan(SMALL))['entrypoint']
    _, _, *arguments = shlex.split(entrypoint)
    code = f"import runpy, sys; sys.argv = ['-m']; runpy.run_module({arguments[1]!r})"
    subprocess.run([sys.executable, '-c', code], env=environment(), check=True)


def test_notes_are_those_of_one_submission(tmp_path):
    dirs = ModelDir(tmp_path)
    notes = Notes('raysubmit_1', 'waiting', True, 2, None, [Task(0, 'pending', reason='lost')])
    notes.write(dirs)
    assert Notes.read(dirs, 'raysubmit_1') == notes
    assert Notes.read(dirs, 'raysubmit_2') is None
    notes.remove(dirs)
    assert not tmp_path.exists()
