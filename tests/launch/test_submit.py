"""`phalanx submit` up to the scheduler, which the tests in tests/cluster are about."""

import json

import pytest

from launch import known, record
from launch.__main__ import main
from trainer import gin_files
from trainer.model_dir import ModelDir

RUN = ['submit', '--gin_file=runs/digits.gin']


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ([], 'Which scheduler? Give --scheduler=NAME, one of slurm, kubernetes, ray.'),
        (
            ['--scheduler=slrum'],
            '--scheduler=slrum is none of slurm, kubernetes, ray. Did you mean',
        ),
        (['--scheduler=slurm'], 'Where shall the run be written? Set --model_dir=DIR.'),
        (['--scheduler=slurm', '--model_dir=a', '--time_limit=2w'], '--time_limit=2w is no time.'),
        (['--scheduler=slurm', '--model_dir=a', '--env=A'], '--env=A has no value.'),
        (['--scheduler=slurm', '--model_dir=a', '--env=A-B=1'], 'is no name of an environment'),
        (['--scheduler=slurm', '--model_dir=a', '--name=A b'], 'such as --name=a-b.'),
        (['--scheduler=slurm', '--model_dir=a', '--partitoin=x'], "Did you mean 'partition'?"),
        (['--scheduler=slurm', '--model_dir=a', '--mode=export'], 'jobs train'),
        (['--scheduler=slurm', '--model_dir=a', '--tensorboard'], 'is a flag of `phalanx run`'),
        (['--scheduler=slurm', '--model_dir=a', '--workers=4-2'], '--workers=4-2 is neither'),
        (
            ['--scheduler=slurm', '--model_dir=a', '--workers=3', '--workers_per_host=2'],
            'cannot be divided among hosts of --workers_per_host=2 each',
        ),
        (['--scheduler=kubernetes', '--model_dir=a', '--kube_image=i'], 'must be an absolute path'),
    ],
)
def test_a_mistake_is_told_before_anything_is_handed_over(capsys, tmp_path, flags, said):
    assert main([*RUN, *flags, '--dry_run']) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_with_elastic_alone_one_host_is_the_least(capsys):
    flags = ['--workers=4', '--workers_per_host=2', '--elastic', '--max_restarts=1234567']
    where = ['--scheduler=slurm', '--model_dir=run', '--dry_run']
    assert main([*RUN, *flags, *where]) == 0
    out = capsys.readouterr().out
    assert '--workers=2-4 ' in out
    assert '--max_restarts=1234567 ' in out


@pytest.mark.parametrize('scheduler', ['slurm', 'ray'])
def test_a_dry_run_prints_the_plan_and_leaves_nothing(capsys, tmp_path, scheduler):
    flags = [f'--scheduler={scheduler}', '--model_dir=run', '--workers=2-4', '--time_limit=1h']
    assert main([*RUN, *flags, '--dry_run']) == 0
    out, err = capsys.readouterr()
    assert 'launch' in out
    assert not err
    assert not list(tmp_path.iterdir())


def test_without_the_scheduler_here_that_is_said(capsys, monkeypatch):
    monkeypatch.setenv('PATH', '/nonexistent')
    assert main([*RUN, '--scheduler=slurm', '--model_dir=run']) == 1
    out, err = capsys.readouterr()
    assert not out
    assert 'Traceback' not in err


def test_a_job_is_found_by_its_handle_and_by_its_directory(tmp_path):
    assert known.find('run') is None
    assert known.find('slurm://a/1') == known.Submitted('slurm://a/1')
    for number in (1, 2):
        known.add(known.Submitted(f'slurm://a/{number}', str(tmp_path / 'run'), 'run', 3, 1.0))
    assert known.find('run').handle == 'slurm://a/2'
    assert known.find('slurm://a/1').workers == 3
    assert [each.handle for each in known.jobs()] == ['slurm://a/1', 'slurm://a/2']


def test_handles_stay_in_the_record_of_a_run(tmp_path):
    dirs = ModelDir(tmp_path / 'run')
    script = gin_files.read(['runs/digits.gin'])
    record.note_submission(dirs, 'slurm://a/1', script)
    record.note_submission(dirs, 'slurm://a/2', script)
    request = record.Request(
        flags=[],
        workers=1,
        workers_per_host=1,
        devices_per_worker=None,
        mode='train',
        verbosity=0,
        policy={},
        script=script,
    )
    started = record.Record(dirs, request)
    before = (dirs.path / record.NAME).read_text()
    started.begin()
    (dirs.path / record.NAME).write_text(before)  # By a submission at the same time.
    started.end(1)
    found = json.loads((dirs.path / record.NAME).read_text())
    assert [each['handle'] for each in found['submitted']] == ['slurm://a/1', 'slurm://a/2']
    assert found['outcome'] == 'failed'
    assert len(found['starts']) == 1


@pytest.mark.parametrize('verb', ['status', 'logs', 'cancel'])
def test_a_handle_of_no_scheduler_is_told(capsys, verb):
    assert main([verb, 'sulrm://a/1']) == 2
    assert 'they begin with slurm://, k8s://, ray://' in capsys.readouterr().err


def test_the_jobs_of_a_cluster_that_is_gone_are_listed_all_the_same(capsys, monkeypatch):
    monkeypatch.setenv('PATH', '/nonexistent')
    known.add(known.Submitted('slurm://a/1', '/shared/run', 'digits', 3, 1.0))
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert 'slurm://a/1' in out
    assert 'unknown' in out


@pytest.mark.slow
def test_what_a_rehearsal_refuses_is_not_submitted(capfd, tmp_path, monkeypatch):
    (tmp_path / 'sbatch').write_text('#!/bin/sh\ntouch "$0.called"\n')
    (tmp_path / 'sbatch').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    flags = ['--scheduler=slurm', '--workers=3', '--model_dir=run', '--gin.DEVICES=1', '--check']
    assert main([*RUN, *flags]) == 2
    assert 'cannot be shared equally by 3 replicas' in ''.join(capfd.readouterr())
    assert not (tmp_path / 'sbatch.called').exists()
    assert not (tmp_path / 'run').exists()
