"""`phalanx prepare` that is killed, runs out of disk, or is started twice."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.disks import small_disk
from tests.processes import environment
from tests.trainer.preparing import checksums, slow_digits

pytestmark = pytest.mark.chaos

KILLS = 5


def start(directory, out, file_format, *flags):
    """Starts it as the leader of a process group."""
    command = ['prepare', out, slow_digits(directory), f'--format={file_format}', *flags]
    return subprocess.Popen(
        [sys.executable, '-m', 'launch', *map(str, command)],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, file_format):
    code, output = end(start(tmp_path, 'undisturbed', file_format, '--shards=9', '--processes=2'))
    assert code == 0, output
    expected = checksums(tmp_path / 'undisturbed')
    assert len(expected) == 19
    partial, kept = tmp_path / 'out.partial', []
    for number in range(KILLS):
        processes = f'--processes={1 + number % 3}'
        process = start(tmp_path, 'out', file_format, '--shards=9', processes)
        before = len(list(partial.glob('.progress/*record.json')))
        limit = time.monotonic() + 120
        # Once it has written another shard or two, at a random moment.
        wanted = before + random.randrange(3)
        while len(list(partial.glob('.progress/*record.json'))) < wanted or not list(
            partial.glob('.tmp-*')
        ):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / 'out').exists()
        kept.append(len(list(partial.glob('.progress/*record.json'))))
    assert kept == sorted(kept)
    code, output = end(start(tmp_path, 'out', file_format, '--shards=9', '--processes=2'))
    assert code == 0, output
    assert not kept[-1] or f'{kept[-1]} shard(s) are there already' in output
    assert checksums(tmp_path / 'out') == expected
    assert not partial.exists()


def test_a_process_that_is_killed_is_told_and_the_same_command_goes_on(tmp_path):
    process = start(tmp_path, 'out', 'tfrecord', '--shards=5', '--processes=2')
    partial, limit = tmp_path / 'out.partial', time.monotonic() + 120
    while not list(partial.glob('.tmp-*')) and time.monotonic() < limit:
        time.sleep(0.01)
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    code, output = end(process)
    assert code == 1
    assert 'phalanx: A process was killed by signal 9 while it wrote train-0000' in output
    code, output = end(start(tmp_path, 'out', 'tfrecord', '--shards=5'))
    assert code == 0, output


def test_a_full_disk_ends_it_and_once_there_is_room_it_goes_on(tmp_path):
    with small_disk(tmp_path / 'disk', '130k') as disk:
        code, output = end(start(tmp_path, disk / 'out', 'tfrecord', '--shards=6'))
        assert code == 1, output
        assert 'No space left on device' in output
        assert 'Once it can, run the same command again: finished shards are kept.' in output
        assert 'Traceback' not in output
        assert not (disk / 'out').exists()
        kept = len(list((disk / 'out.partial' / '.progress').glob('*record.json')))
        assert kept
        subprocess.run(['mount', '-o', 'remount,size=10m', str(disk)], check=True)
        code, output = end(start(tmp_path, disk / 'out', 'tfrecord', '--shards=6'))
        assert code == 0, output
        assert f'{kept} shard(s) are there already' in output
        found = checksums(disk / 'out')
    code, output = end(start(tmp_path, 'out', 'tfrecord', '--shards=6'))
    assert code == 0, output
    assert checksums(tmp_path / 'out') == found


def test_of_two_at_once_one_is_refused_and_the_other_undisturbed(tmp_path):
    first = start(tmp_path, 'out', 'tfrecord', '--shards=5')
    limit = time.monotonic() + 120
    while not (tmp_path / 'out.partial' / '.progress' / 'lock').exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    code, output = end(start(tmp_path, 'out', 'tfrecord', '--shards=5'))
    assert code == 2
    assert 'out.partial is being written by another `phalanx prepare`' in output
    code, output = end(first)
    assert code == 0, output
    assert len(checksums(tmp_path / 'out')) == 11
