"""The search for the largest batch, and the test of the learning rate, on real jobs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.__main__ import main
from launch.tune import Sizes, Try, _batch
from tests.processes import REPOSITORY, environment
from trainer.errors import ConfigError
from trainer.range_test import RangeTest


def phalanx(*arguments, cwd, limit=None):
    """Runs the program, perhaps under a limit of the address space in bytes."""
    command = [sys.executable, '-m', 'launch', *arguments]
    if limit:
        command = ['prlimit', f'--as={limit}', *command]
    env = {'PYTHONPATH': str(REPOSITORY), 'CUDA_VISIBLE_DEVICES': '-1', 'PATH': '/usr/bin:/bin'}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize(
    ('limit', 'found'), [(1000, 960), (64, 64), (63, None), (129, 128), (10**9, 4096)]
)
def test_the_largest_batch_is_found_by_doubling_and_bisecting(limit, found, capsys):
    sizes = Sizes(lambda size: Try(size <= limit, 100.0 * size, 'out of memory'))
    largest = sizes.largest(64, most=4096)
    assert largest == found
    assert len(sizes.tried) <= 9
    assert len(capsys.readouterr().out.splitlines()) == len(sizes.tried)
    if found:
        assert all(size % 64 == 0 for size in sizes.tried)
        assert limit - found < max(64, found / 8) or found == 4096


def test_of_batches_that_are_about_as_fast_the_smallest_is_recommended():
    paces = {64: 500.0, 128: 960.0, 256: 1000.0}
    sizes = Sizes(lambda size: Try(size in paces, paces.get(size, 0.0), 'out of memory'))
    assert sizes.largest(64, most=10_000) == 256
    assert sizes.fastest() == 128


def too_short_from(limit):
    """Attempts that end as those of a schedule in epochs, whose run is then below the warm-up."""

    def attempt(size):
        if size >= limit:
            raise ConfigError('Warmup of the schedule takes 500 steps')
        return Try(True, 10.0 * size)

    return attempt


def test_a_size_that_the_schedule_refuses_is_a_limit_and_what_fits_is_told(capsys):
    assert _batch(Sizes(too_short_from(256)), 64, 4096) == 0
    said = capsys.readouterr().out
    assert 'batch     256  cannot be run: Warmup of the schedule takes 500 steps\n' in said
    assert 'largest that fits: 192\n' in said
    assert 'BATCH_SIZE = 192' in said


def test_what_the_schedule_refuses_of_the_first_size_is_a_mistake():
    with pytest.raises(ConfigError, match='Warmup'):
        _batch(Sizes(too_short_from(64)), 64, 4096)


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    rates = np.array([1e-4, 1e-3, 1e-2, 1e-1])
    falling = np.array([2.0, 1.5, 1.0, 3.0])
    assert RangeTest(rates, falling, falling, True).suggestion == pytest.approx(1e-3)
    rising = np.array([2.0, 2.1, 2.2, 9.0])
    assert RangeTest(rates, rising, rising, True).suggestion is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'write phalanx tune batch or phalanx tune lr'),
        (['batches'], "Did you mean 'batch'"),
        (['batch'], 'Give --gin_file=FILE'),
        (['lr', '--gin_file=runs/digits.gin', '--lowest=2', '--highest=1'], 'rates above 0 that'),
        (['batch', '--gin_file=runs/digits.gin', '--largest', '64'], 'in one word'),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(['tune', *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_range_test_of_the_digits_suggests_a_rate_and_touches_nothing(tmp_path):
    done = phalanx(
        'tune', 'lr', '--gin_file=runs/digits.gin', '--model_dir=run', '--highest=10',
        '--tune_steps=60', cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    name, _, suggestion, *_ = lines[-1].split()
    assert name == 'LEARNING_RATE'
    assert 1e-5 < float(suggestion) < 0.5
    assert any('lowest' in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_batch_that_exceeds_the_memory_is_survived_and_reported(tmp_path):
    done = phalanx(
        'tune', 'batch', '--gin_file=runs/digits.gin', '--gin.BATCH_SIZE=4096',
        '--gin.cnn.filters=512', '--tune_steps=4', '--largest=8192', cwd=tmp_path, limit=5 << 30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'does not fit' in done.stdout
    assert 'largest that fits: 4,096\n' in done.stdout
    assert list(tmp_path.iterdir()) == []


def of_directory(path):
    """The command lines of the processes that work in a directory."""
    found = []
    for each in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            command = each.read_bytes().replace(b'\0', b' ').decode()
        except OSError:
            continue  # It has ended.
        if str(path) in command:
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_no_job_outlives_the_search(tmp_path, number):
    aside = tmp_path / 'aside'
    aside.mkdir()
    search = subprocess.Popen(
        [sys.executable, '-m', 'launch', 'tune', 'batch', '--gin_file=runs/digits.gin'],
        cwd=tmp_path,
        env=environment(TMPDIR=str(aside)),
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while len(of_directory(aside)) < 2 and time.monotonic() < end:  # The launcher, its worker.
        assert search.poll() is None, search.stderr.read()
        time.sleep(0.05)
    assert list(aside.glob('*/batch-*/logs/*/worker-0.log'))
    os.kill(search.pid, number)
    assert search.wait(timeout=60) == (130 if number == signal.SIGTERM else -number)
    end = time.monotonic() + 20
    while of_directory(aside) and time.monotonic() < end:
        time.sleep(0.05)
    assert of_directory(aside) == []
    if number == signal.SIGTERM:
        assert list(aside.glob('phalanx-tune-*')) == []
