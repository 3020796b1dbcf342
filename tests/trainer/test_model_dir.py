import os
import signal
import socket
import subprocess
import sys

import pytest

from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

HOLD = """
import sys, time
from trainer.model_dir import ModelDir
with ModelDir(sys.argv[1]).lock():
    print('held', flush=True)
    time.sleep(600)
"""


@pytest.fixture
def made(tmp_path):
    model_dir = ModelDir(tmp_path / 'run')
    model_dir.create()
    return model_dir


def test_create_makes_the_documented_tree_and_leaves_nothing_else(made):
    found = sorted(str(path.relative_to(made.path)) for path in made.path.rglob('*'))
    assert found == ['checkpoints', 'config', 'eval', 'export', 'logs', 'train']
    assert made.quarantine == made.checkpoints / 'quarantine'


def test_create_leaves_an_existing_tree_as_it_is(made):
    (made.checkpoints / 'step-00000400').mkdir()
    made.create()
    assert [path.name for path in made.checkpoints.iterdir()] == ['step-00000400']


def test_path_is_absolute_and_the_home_directory_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/somebody')
    assert ModelDir('run').path == tmp_path / 'run'
    assert str(ModelDir('~/run').path) == '/home/somebody/run'


@pytest.mark.parametrize('url', ['gs://bucket/run', 's3://bucket/run', 'file:///tmp/run'])
def test_a_url_is_refused_and_named(url):
    with pytest.raises(ConfigError, match='is a URL') as error:
        ModelDir(url)
    assert url in error.value.message


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match='--model_dir=DIR'):
        ModelDir('')


@pytest.mark.parametrize('name', ['run[1]', 'run*', 'run?', 'a\\b'])
def test_a_name_that_tensorflow_takes_for_a_pattern_is_refused(name):
    with pytest.raises(ConfigError, match='pattern'):
        ModelDir(f'/tmp/{name}')


@pytest.mark.parametrize('below', ['', 'run', 'deep/run'])
def test_a_file_in_the_way_is_named(tmp_path, below):
    file = tmp_path / 'file'
    file.write_text('precious')
    with pytest.raises(ConfigError, match=r'is a file\. Move it away') as error:
        ModelDir(file / below).create()
    assert repr(str(file)) in error.value.message
    assert file.read_text() == 'precious'


@pytest.mark.parametrize('path', ['/proc/phalanx/run', '/sys/phalanx'])
def test_a_file_system_that_cannot_be_written_is_refused_with_the_reason(path):
    with pytest.raises(ConfigError, match=r'cannot be written: .*Give --model_dir'):
        ModelDir(path).create()


def test_a_tree_without_write_permission_is_refused(made):
    if os.geteuid() == 0:
        pytest.skip('root may write everywhere')
    made.checkpoints.chmod(0o500)
    with pytest.raises(ConfigError, match='Permission denied'):
        made.create()


def test_second_holder_is_told_who_the_first_is_and_gets_the_lock_afterwards(made):
    with made.lock():
        with pytest.raises(ConfigError, match='is in use by') as error, made.lock():
            pass
        message = error.value.message
        assert f'process {os.getpid()} on {socket.gethostname()}, started 20' in message
        assert str(made.path) in message
    with made.lock():
        pass


def test_lock_is_freed_when_its_block_raises(made):
    with pytest.raises(KeyError), made.lock():
        raise KeyError
    with made.lock():
        pass


def test_the_kernel_frees_the_lock_of_a_killed_process(made):
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(made.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(ConfigError, match=f'process {holder.pid} on'), made.lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with made.lock():
        assert f'"pid": {os.getpid()}' in (made.path / 'lock').read_text()


def test_needs_no_tensorflow():
    code = 'import sys, trainer.model_dir; assert "tensorflow" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_copies_of_checkpoints_and_logs_are_neither(made):
    assert (made.newest_step(), made.attempts()) == (0, [])
    for name in ('step-00000300', 'step-00000400.bak', 'step-00000350', 'quarantine'):
        (made.checkpoints / name).mkdir()
        if name != 'step-00000350':  # Which is not complete.
            (made.checkpoints / name / 'manifest.json').write_text('{}')
    for name in ('attempt-2', 'attempt-10', 'attempt-11.bak', 'lock'):
        (made.logs / name).mkdir()
    assert (made.newest_step(), made.attempts()) == (300, [2, 10])
    assert made.attempt(10) == made.logs / 'attempt-10'
