"""`run.json`, and a recorded job run again."""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest

from launch import record, rerun
from launch.__main__ import main
from launch.ledger import Ledger
from tests.launch.test_local import end, start
from trainer import gin_files
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir
from trainer.version import installed, versions

MODULE = """
import gin
import keras


@gin.register
def own(num_classes: int) -> keras.Model:
    layers = keras.layers
    return keras.Sequential([layers.Flatten(), layers.Dropout(0.2), layers.Dense(num_classes)])
"""
CONFIG = """
import own_model
include 'runs/digits.gin'
MODEL = @own
own.num_classes = %NUM_CLASSES
STEPS = 12
train.sample_log = True
train.save_every = 6
"""


def job(text='STEPS = 3\nimport trainer.gin_setup\n', **changes):
    script = gin_files.Script(
        parts=[('a.gin', 1, text.removesuffix('\n'))], imports=[('trainer.gin_setup', 'here')]
    )
    arguments = {
        'flags': ['--gin_file=a.gin'],
        'workers': 2,
        'workers_per_host': 2,
        'devices_per_worker': 1,
        'mode': 'train',
        'verbosity': 0,
        'policy': {'max_restarts': 3, 'elastic': False},
        'script': script,
        **changes,
    }
    return record.Request(**arguments)


def checkpoint(dirs, step, sha256='f00', **more):
    """What a run has committed, for those who look at the manifest alone."""
    path = dirs.checkpoints / f'step-{step:08d}'
    path.mkdir()
    manifest = {'step': step, 'state_sha256': sha256, 'versions': {'keras': '3.1'}, **more}
    (path / 'manifest.json').write_text(json.dumps(manifest))


def finished(dirs, code=0, **changes):
    """Goes through a start of the launcher, without workers."""
    ledger, written = Ledger(dirs.path / 'ledger.jsonl'), record.Record(dirs, job(**changes))
    ledger.write('job')
    written.begin()
    ledger.write('attempt', number=1)
    if code == 0:
        checkpoint(dirs, 3 + len(list(dirs.checkpoints.iterdir())))
    ledger.write('end', code=code)
    written.end(code)
    return record.read(dirs)


@pytest.fixture
def dirs(tmp_path):
    made = ModelDir(tmp_path / 'run')
    made.create()
    return made


def test_a_record_is_kept_over_starts_and_completed_at_each_end(dirs, monkeypatch):
    monkeypatch.setenv('TF_NUM_INTRAOP_THREADS', '3')
    monkeypatch.setenv('A_TOKEN', 'that nobody may see')
    record.Record(dirs, job()).begin()
    text = (dirs.path / record.NAME).read_text()
    assert json.loads(text)['outcome'] is None
    first = finished(dirs)
    assert (first['outcome'], first['code'], first['attempts']) == ('finished', 0, 1)
    assert first['result']['state_sha256'] == 'f00'
    assert first['result']['sample_sha256'] is None
    assert first['config'] == 'STEPS = 3\nimport trainer.gin_setup\n'
    assert first['imports'] == ['trainer.gin_setup']
    assert first['intra_op_threads'] == '3'
    assert first['versions'] == installed()
    second = finished(dirs, text='STEPS = 9\n', workers=1)
    assert second['config'] == first['config']
    assert [each['workers'] for each in second['starts']] == [2, 2, 1]
    assert [each['from_step'] for each in second['starts']] == [0, 0, 3]
    assert [each.get('outcome') for each in second['starts']] == [None, 'finished', 'finished']
    assert second['attempts'] == 2
    assert 'nobody may see' not in (dirs.path / record.NAME).read_text()
    assert sorted(path.name for path in dirs.path.iterdir() if path.is_file()) == [
        'ledger.jsonl',
        'run.json',
    ]


def test_a_start_that_came_to_no_checkpoint_is_not_the_one_a_run_begins_with(dirs):
    assert finished(dirs, code=1, text='a slip = 1')['outcome'] == 'failed'
    mended = finished(dirs, text='mended = 1')
    assert mended['config'] == 'mended = 1\n'
    assert [each['outcome'] for each in mended['starts']] == ['failed', 'finished']


def test_installed_versions_are_those_that_are_imported():
    assert installed() == versions()


def test_git_tells_the_revision_and_whether_the_code_is_another(tmp_path, monkeypatch):
    assert record._git(tmp_path) is None

    def git(*arguments):
        identity = ('-c', 'user.name=n', '-c', 'user.email=e')
        subprocess.run(['git', *identity, *arguments], cwd=tmp_path, check=True)

    git('init', '--quiet')
    (tmp_path / 'model.py').write_text('a = 1\n')
    git('add', '.')
    git('commit', '--quiet', '--message=one')
    clean = record._git(tmp_path)
    assert re.fullmatch('[0-9a-f]{40}', clean['revision'])
    assert not clean['dirty']
    (tmp_path / 'run.json').write_text('{}')
    assert record._git(tmp_path) == clean
    (tmp_path / 'other.py').write_text('')
    assert record._git(tmp_path)['dirty']
    (tmp_path / 'other.py').unlink()
    (tmp_path / 'model.py').write_text('a = 2\n')
    assert record._git(tmp_path) == {**clean, 'dirty': True}
    monkeypatch.setenv('PATH', '')
    assert record._git(tmp_path) is None


def test_what_differs_is_told_with_both_values(dirs, tmp_path):
    one = finished(dirs)
    other = json.loads(json.dumps(one))
    new = ModelDir(tmp_path / 'new')
    assert rerun.compare(dirs, one, new, other) == ['the same bits: state sha256 f00 at step 3']
    other['result']['state_sha256'] = 'bad'
    assert rerun.compare(dirs, one, new, other)[-1].startswith('Nothing that is recorded differs.')
    other['processor'] = 'another'
    other['git'] = {'revision': 'abc', 'dirty': True}
    other['result']['versions']['keras'] = '3.2'
    lines = rerun.compare(dirs, {**one, 'git': {'revision': 'abc', 'dirty': False}}, new, other)
    assert lines == [
        'other bits:',
        f'  {dirs.path}: state sha256 f00 at step 3',
        f'  {new.path}: state sha256 bad at step 3',
        'What differs, then and now:',
        '  versions.keras: 3.1 / 3.2',
        '  git.dirty: False / True',
        f'  processor: {one["processor"]} / another',
    ]
    again = finished(dirs, text='STEPS = 9\n')
    again['result']['state_sha256'] = 'bad'
    (cause,) = rerun.compare(dirs, again, new, {**one, 'result': {**one['result']}})[4:][-1:]
    assert 'the job was started 2 times, the last with other flags or files: config_sha256' in cause


def refused(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    return err.removeprefix('phalanx: ').rstrip('\n')


def test_what_cannot_be_run_again_is_told_in_one_message(dirs, tmp_path, capsys):
    new = tmp_path / 'new'
    argv = ['rerun', str(dirs.path)]
    assert refused([*argv, f'--model_dir={new}'], capsys) == (
        f"'{dirs.path}' holds no run.json. Name the --model_dir of a job that was started with "
        '`phalanx run`.'
    )
    finished(dirs, code=75)
    assert refused([*argv, f'--model_dir={new}'], capsys) == (
        f"The job in '{dirs.path}' has not finished (stopped), so there is nothing to compare "
        'with. Bring it to its end with `phalanx run` first.'
    )
    finished(dirs)
    assert refused(argv, capsys) == (
        f'Where shall it run again? Write: phalanx rerun {dirs.path} --model_dir=NEW.'
    )
    assert refused([*argv, f'--model_dir={dirs.path}'], capsys) == (
        f'--model_dir={dirs.path} holds a run already (run.json). Give a directory that is new.'
    )
    assert refused([*argv, '--model_dri=a'], capsys) == (
        "Unknown flag --model_dri of phalanx rerun. Did you mean 'model_dir'? phalanx --help lists "
        'the flags.'
    )
    assert refused(['rerun'], capsys) == (
        'Of which job? Write: phalanx rerun DIR --model_dir=NEW, its model_dir.'
    )
    assert not new.exists()


def test_a_run_again_that_is_refused_leaves_nothing_behind(dirs, tmp_path):
    finished(dirs)
    new = ModelDir(tmp_path / 'new')
    assert rerun.rerun(dirs, new, lambda flags: ConfigError.exit_code) == 2
    assert not new.path.exists()


@pytest.mark.slow
def test_a_job_is_run_again_from_its_record_alone_and_compared(tmp_path):
    (tmp_path / 'own_model.py').write_text(MODULE)
    (tmp_path / 'own.gin').write_text(CONFIG)
    flags = ['--gin_file=own.gin', '--gin.meet.deadline_seconds=60', '--model_dir=one']
    first = start(*('launch', 'run', '--workers=2', '--devices_per_worker=1', *flags), cwd=tmp_path)
    code, out, err = end(first)
    assert code == 0, err
    one = record.read(ModelDir(tmp_path / 'one'))
    sha256 = re.search(r'state sha256: (\w+)', out)[1]
    assert one['result']['state_sha256'] == sha256
    assert one['result']['sample_sha256'] == re.search(r'sample order: (\w+)', out)[1]
    assert one['result']['versions'] == one['versions']
    assert one['result']['topology']['intra_op_threads'] == int(one['intra_op_threads'])
    assert one['imports'] == ['own_model', 'trainer.gin_setup']
    assert one['flags'] == ['--workers=2', '--devices_per_worker=1', *flags]
    # The record alone: the file is gone.
    (tmp_path / 'own.gin').unlink()
    code, out, err = end(start('launch', 'rerun', 'one', '--model_dir=two', cwd=tmp_path))
    assert code == 0, err
    assert out.endswith(f'the same bits: state sha256 {sha256} at step 12\n')
    two = record.read(ModelDir(tmp_path / 'two'))
    assert two['workers'] == 2
    assert two['result'] == one['result']
    # Another model of the same name.
    (tmp_path / 'own_model.py').write_text(MODULE.replace('0.2', '0.1'))
    code, out, err = end(start('launch', 'rerun', 'two', '--model_dir=three', cwd=tmp_path))
    assert code == 1, err
    assert f'two: state sha256 {sha256} at step 12\n' in out
    assert 'Nothing that is recorded differs.' in out
    # A stopped job is gone on with, and cannot be run again before its end.
    shutil.rmtree(tmp_path / 'three')
    long = [f'--gin_file={tmp_path}/two/config/recorded.gin', '--gin.STEPS=100000']
    stopped = start('launch', 'run', *long, '--model_dir=three', cwd=tmp_path)
    while not list(tmp_path.glob('three/checkpoints/step-*')):
        assert stopped.poll() is None
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert end(stopped)[0] == 75
    code, _, err = end(start('launch', 'rerun', 'three', '--model_dir=four', cwd=tmp_path))
    assert code == 2
    assert 'has not finished (stopped)' in err
    assert not (tmp_path / 'four').exists()


def test_a_slip_at_a_later_start_changes_nothing_of_what_a_run_has_come_to(dirs):
    first = finished(dirs)
    after = finished(dirs, code=2, text='a slip = 1\n')
    assert [each['outcome'] for each in after['starts']] == ['finished', 'mistake']
    assert {**after, 'starts': None} == {**first, 'starts': None}
