"""Jobs with data workers come to the bits of one without, whatever happens to those."""

import contextlib
import signal
import time

import psutil
import pytest

from tests.chaos.jobs import Job, bits, ledger, phases, processes_of

pytestmark = pytest.mark.chaos

# It fails in data workers alone.
BROKEN = """
import sys

if '--mode=serve_data' in sys.argv:
    raise RuntimeError('no good data worker')
"""


def data_workers(model_dir):
    """The data workers that run, by their addresses."""
    found = {}
    for process in processes_of(model_dir):
        with contextlib.suppress(psutil.Error):
            for argument in process.cmdline():
                if argument.startswith('--listen='):
                    found[argument] = process
    return [found[address] for address in sorted(found)]


def step(job):
    return max([0, *(line.get('step', 0) for line in phases(job.model_dir, job.attempts()))])


def serving(job, index):
    path = job.model_dir / 'logs' / f'data-worker-{index}.phases.jsonl'
    return path.read_text().count('"serving"') if path.exists() else 0


def test_data_workers_that_are_killed_or_frozen_change_nothing(tmp_path, undisturbed_job):
    model_dir = tmp_path / 'run'
    with Job(model_dir, '--data_workers=2') as job:
        job.until(lambda: step(job) >= 50)
        data_workers(model_dir)[0].kill()
        job.until(lambda: step(job) >= 150)
        for each in data_workers(model_dir):  # Nobody is left.
            each.kill()
        job.until(lambda: serving(job, 0) >= 2 and serving(job, 1) >= 2)
        job.until(lambda: step(job) >= 400)
        for each in data_workers(model_dir):
            each.kill()
        job.until(lambda: step(job) >= 600)
        data_workers(model_dir)[-1].send_signal(signal.SIGSTOP)
        code, output = job.end()
    assert code == 0, output
    assert job.attempts() == 1, output
    ended = ledger(model_dir, 'data_worker')
    assert len(ended) >= 4
    assert {each['code'] for each in ended} == {-signal.SIGKILL}
    assert output.count('was ended by signal 9; starting another') == len(ended)
    assert not ledger(model_dir, 'stuck')
    assert bits(model_dir) == undisturbed_job


def test_a_worker_that_is_killed_finds_the_data_workers_again(tmp_path, undisturbed_job):
    model_dir = tmp_path / 'run'
    with Job(model_dir, '--data_workers=2') as job:
        job.until(lambda: step(job) >= 250)
        before = [each.pid for each in data_workers(model_dir)]
        job.worker(1).kill()
        job.until(lambda: job.attempts() == 2 and step(job) >= 400)
        assert [each.pid for each in data_workers(model_dir)] == before
        code, output = job.end()
    assert code == 0, output
    assert not ledger(model_dir, 'data_worker')
    assert not processes_of(model_dir)
    assert bits(model_dir) == undisturbed_job


def test_data_workers_that_fail_again_and_again_are_told(tmp_path):
    (tmp_path / 'broken.py').write_text(BROKEN)
    (tmp_path / 'broken.gin').write_text('import broken\n')
    model_dir, flags = tmp_path / 'run', ['--gin_file=broken.gin', '--max_restarts=0']
    with Job(model_dir, '--data_workers=1', *flags, workers=1) as job:
        code, output = job.end()
    assert code == 1, output
    assert 'data worker 0 is given up: 5 ends in a row' in output
    assert 'data worker 0: RuntimeError: no good data worker' in output
    assert len(ledger(model_dir, 'data_worker')) == 5


def test_they_end_with_a_launcher_that_is_killed(tmp_path):
    model_dir = tmp_path / 'run'
    with Job(model_dir, '--data_workers=2', workers=1) as job:
        job.until(lambda: serving(job, 0) and serving(job, 1))
        job.process.kill()
        end = time.monotonic() + 30
        while processes_of(model_dir) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_of(model_dir)
