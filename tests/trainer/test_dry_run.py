"""A dry run rehearses everything, finds what would end the run, and leaves nothing behind."""

import re

import pytest
import tensorflow as tf  # noqa: F401 (devices are fixed before the first test)

from trainer.__main__ import main

RUN = [
    '--gin_file=runs/digits.gin',
    '--model_dir=run',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
    '--gin.random_shift.max_pixels=1',
    '--gin.AUGMENT=@random_shift',
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('TF_CONFIG', raising=False)
    return tmp_path


def files(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob('*')}


def test_it_prints_the_plan_and_leaves_nothing(capsys, caplog, empty_directory):
    assert main([*RUN, '--dry_run']) == 0
    assert 'the configuration has changed' not in caplog.text
    assert not list(empty_directory.iterdir())
    plan = capsys.readouterr().out
    assert re.sub(r'(checkpoint: +)[\d,]+', r'\1N', plan) == (
        'topology:    mirrored: 1 worker(s) of 2 CPU\n'
        'batch:       64 examples a step, 32 on each replica\n'
        'data:        1,500 examples\n'
        'epoch:       23.4 steps\n'
        'run:         600 steps\n'
        'parameters:  144\n'
        'checkpoint:  N bytes\n'
        'rehearsed:   training, evaluation, save, restore, export\n'
    )


def test_a_job_of_many_workers_is_rehearsed_by_one_replica(capsys, empty_directory):
    flags = ['--gin.DEVICES=4', '--gin.train.steps="2 epochs"', '--gin.train.eval_every=None']
    assert main([*RUN, *flags, '--check_workers=8']) == 0
    assert not list(empty_directory.iterdir())
    plan = capsys.readouterr().out
    assert plan.startswith(
        'topology:    multi_worker: 8 worker(s) of 4 CPU\n'
        'batch:       64 examples a step, 2 on each replica\n'
    )
    assert 'run:         47 steps\n' in plan
    assert 'restore, export, by one replica\n' in plan


def test_a_job_whose_workers_cannot_share_the_batch_is_refused(capsys, empty_directory):
    assert main([*RUN, '--gin.DEVICES=1', '--check_workers=5']) == 2
    assert capsys.readouterr().err == (
        'error: The global batch of 64 examples cannot be shared equally by 5 replicas. Set '
        'BATCH_SIZE to a multiple of 5, such as 60 or 65.\n'
    )


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--gin.NUM_CLASSES=9', 'The labels '),
        ('--gin.INPUT_SHAPE=(9, 9, 1)', 'takes inputs of shape (9, 9, 1)'),
        ('--gin.BATCH_SIZE=33', 'cannot be shared equally'),
        ('--gin.random_shift.max_pixels=9', 'random_shift.max_pixels is 9'),
        ("--gin.train/Data.inputs='imgae'", "Did you mean 'image'?"),
        ('--gin.Keep.last=1', 'Keep.last = 1'),
        ("--gin.train.save_every='1 day'", "'1 day'"),
    ],
)
def test_what_would_end_the_run_ends_it(capsys, empty_directory, flag, message):
    assert main([*RUN, flag, '--dry_run']) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert not list(empty_directory.iterdir())


@pytest.mark.slow
def test_it_leaves_a_run_that_is_there_as_it_was(capsys, empty_directory):
    assert main([*RUN, '--mode=train', '--gin.STEPS=2']) == 0
    before = files(empty_directory)
    litter = empty_directory / 'run' / 'dry-run' / 'checkpoints' / 'step-00000001'
    litter.mkdir(parents=True)  # Of a dry run that was killed.
    capsys.readouterr()
    assert main([*RUN, '--dry_run', '--gin.SEED=5', '--gin.STEPS=47']) == 0
    out = capsys.readouterr().out
    assert 'run:         47 steps' in out
    after = files(empty_directory)
    assert {path: value for path, value in after.items() if path.is_file()} == {
        path: value for path, value in before.items() if path.is_file()
    }
    assert after.keys() == before.keys()
