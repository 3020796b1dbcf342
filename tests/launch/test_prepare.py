"""`phalanx prepare` and `phalanx inspect` as programs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.__main__ import main
from tests.processes import environment
from tests.trainer.preparing import checksums, slow_digits


def phalanx(directory, *arguments, **variables):
    """Runs a verb to its end."""
    return subprocess.run(
        [sys.executable, '-m', 'launch', *map(str, arguments)],
        cwd=directory,
        env=environment(COLUMNS='200', **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['prepare'],
            'Where to, and of which data? Write: phalanx prepare DIR --gin_file=FILE, such as '
            '--gin_file=data/digits.gin.',
        ),
        (
            ['prepare', 'out', '--gin_file=data/digits.gin', '--format=tfrecords'],
            "--format=tfrecords is none of array_record, tfrecord. Did you mean 'tfrecord'?",
        ),
        (
            ['prepare', 'out', '--gin_file=data/digits.gin', '--on_bad_record=skp'],
            "--on_bad_record=skp is none of stop, skip. Did you mean 'skip'?",
        ),
        (
            ['prepare', 'out', '--gin_file=data/digits.gin', '--shard=3'],
            "Unknown flag --shard of phalanx prepare. Did you mean 'shards'? phalanx --help lists "
            'the flags.',
        ),
        (
            ['prepare', 'out', '--gin_file=data/digits.gin', '--shards=3', '--shard_mb=1'],
            '--shards and --shard_mb say the same. Give one of them.',
        ),
        (
            ['prepare', 'out', '--gin_file=data/digit.gin'],
            "There is no file 'data/digit.gin'. Did you mean 'data/digits.gin'? Looked in: the ",
        ),
        (
            ['prepare', '{}/raw/out', '--gin_file=data/mnist.gin', '--gin.DATA_DIR="{}/raw"'],
            '{}/raw/out lies in {}/raw, which DATA_DIR names and which is read. Name a directory '
            'elsewhere.',
        ),
        (
            ['inspect'],
            'What shall be looked at? Write: phalanx inspect DIR, of prepared data, or phalanx '
            'inspect --gin_file=FILE, such as --gin_file=data/digits.gin.',
        ),
        (
            ['inspect', '{}/raw'],
            "'{}/raw' is no prepared data set: it has no dataset.json.",
        ),
        (
            ['inspect', 'a', '--verfy'],
            "Unknown flag --verfy of phalanx inspect. Did you mean 'verify'? phalanx --help lists "
            'the flags.',
        ),
    ],
)
def test_a_mistake_is_told_before_anything_starts(tmp_path, capsys, argv, message):
    (tmp_path / 'raw').mkdir()
    assert main([each.replace('{}', str(tmp_path)) for each in argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f'phalanx: {message}'.replace('{}', str(tmp_path)))
    assert os.listdir(tmp_path) == ['raw']


@pytest.mark.slow
def test_data_is_prepared_looked_at_and_found_damaged(tmp_path):
    digits = ['--gin_file=data/digits.gin', '--format=tfrecord', '--shards=4']
    one = phalanx(tmp_path, 'prepare', 'one', *digits, '--processes=1')
    assert one.returncode == 0, one.stderr
    assert one.stdout == (
        f'{tmp_path}/one is finished.\n'
        'train: 1,500 records in 4 shard(s), 0.2 MB\n'
        'test: 297 records in 4 shard(s), 0.0 MB\n'
    )
    assert 'train-00000-of-00004.tfrecord: 375 records' in one.stderr
    # Any number of processes, a whole run in place of a file of data/, and an EVAL_DATA or none.
    run = ['--gin_file=runs/digits.gin', *digits[1:]]
    two = phalanx(tmp_path, 'prepare', 'two', *run, '--processes=2')
    assert two.returncode == 0, two.stderr
    assert checksums(tmp_path / 'one') == checksums(tmp_path / 'two')
    again = phalanx(tmp_path, 'prepare', 'two', *digits)
    assert (again.returncode, again.stderr) == (0, '')
    assert again.stdout.startswith(f'{tmp_path}/two is finished already.\ntrain: 1,500 records')
    other = phalanx(tmp_path, 'prepare', 'two', *digits, '--gin.train/digits.split="test"')
    assert other.returncode == 2
    assert "source of the split 'train' was {'records': 1500" in other.stderr
    missing = phalanx(tmp_path, 'prepare', 'three', '--gin_file=data/mnist.gin')
    assert missing.returncode == 2
    assert 'The configuration leaves DATA_DIR to you. Set it with' in missing.stderr

    looked = phalanx(tmp_path, 'inspect', 'one', '--verify', '--png=sheet.png', '--tensorboard=tb')
    assert looked.returncode == 0, looked.stderr
    assert re.search(r'image +uint8 +8 x 8 x 1 +0 +16 +4\.88', looked.stdout)
    assert re.search(r'3 +153 +10\.2% ', looked.stdout)
    assert '1,500 records were read; none damaged' in looked.stdout
    assert (tmp_path / 'sheet.png').read_bytes().startswith(b'\x89PNG')
    assert {path.name for path in (tmp_path / 'tb').iterdir()} == {'train', 'test'}

    shard = tmp_path / 'one' / 'train-00001-of-00004.tfrecord'
    content = bytearray(shard.read_bytes())
    content[20] ^= 1  # In the contents of its first record.
    shard.write_bytes(content)
    test = tmp_path / 'one' / 'test-00000-of-00004.tfrecord'
    test.write_bytes(test.read_bytes()[:-1])
    looked = phalanx(tmp_path, 'inspect', 'one', '--verify')
    assert looked.returncode == 1, looked.stderr
    assert f'{shard.relative_to(tmp_path)} has changed: its sha256' in looked.stdout
    assert re.search(r'test-00000-of-00004\.tfrecord has [\d,]+ bytes instead of', looked.stdout)
    assert f'damaged: {shard.relative_to(tmp_path)}, record 0 (byte 0): ' in looked.stdout
    assert '1,500 records were read; 1 damaged' in looked.stdout


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path, number):
    command = ['prepare', 'out', slow_digits(tmp_path), '--shards=10', '--processes=2']
    partial = tmp_path / 'out.partial'
    process = subprocess.Popen(
        [sys.executable, '-m', 'launch', *command],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    # Each of the two processes may be at one, and have finished one that it has not told of yet.
    while len(list(partial.glob('train-*'))) < 5 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    told = re.search(r'phalanx: Stopped; (\d+) of 20 shards are finished and kept. The ', error)
    assert told, error
    assert 1 <= int(told[1]) < 20
    assert not (tmp_path / 'out').exists()
    done = phalanx(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert f'{told[1]} shard(s) are there already' in done.stderr
    told = json.loads((tmp_path / 'out' / 'dataset.json').read_text())
    assert sum(shard['records'] for shard in told['splits']['train']['shards']) == 1500
