import json
import time

import pytest

from launch.__main__ import main
from launch.top import lines


def job(path, *, step=10, last_step=100, end=None, ago=1.0):
    """Writes what a job leaves that has taken a step each second."""
    path.mkdir(parents=True)
    now = time.time() - ago
    events = [
        {'time': now - 30, 'event': 'job', 'workers': 2},
        {'time': now - 29, 'event': 'attempt', 'number': 1, 'workers': 2, 'step': 0},
    ]
    if end is not None:
        events.append({'time': now, 'event': 'end', 'code': end})
    (path / 'ledger.jsonl').write_text(''.join(json.dumps(each) + '\n' for each in events))
    said = [{'time': now - 28, 'phase': 'compiling', 'last_step': last_step, 'step': 0}]
    for number in range(1, step + 1):
        figures = {'seconds': 0.9, 'input_seconds': 0.0, 'examples_per_second': 32.0}
        at = now - step + number
        said.append({'time': at, 'phase': 'stepping', 'step': number, **figures})
    directory = path / 'logs' / 'attempt-1'
    directory.mkdir(parents=True)
    for worker in range(2):
        file = directory / f'worker-{worker}.phases.jsonl'
        file.write_text(''.join(json.dumps(each) + '\n' for each in said))


def test_all_jobs_below_a_directory_those_that_run_first(tmp_path):
    job(tmp_path / 'sweep' / 'a', end=0, step=100)
    job(tmp_path / 'sweep' / 'b')
    job(tmp_path / 'c', end=75)
    job(tmp_path / 'd', ago=1000)
    job(tmp_path / '.hidden')
    found = {each.name: each for each in lines(tmp_path)}
    assert list(found) == ['sweep/b', 'c', 'd', 'sweep/a']
    states = [each.state for each in found.values()]
    assert states == ['running', 'stopped', 'silent', 'finished']
    running = found['sweep/b']
    assert (running.step, running.last_step, running.workers) == (10, 100, 2)
    assert running.eta_seconds == pytest.approx(90, rel=0.2)
    assert running.examples_per_second == 32.0
    assert 0 < running.goodput < 1
    assert found['c'].eta_seconds is None


def test_in_a_pipe_the_table_is_printed_once(tmp_path, capsys):
    job(tmp_path / 'a')
    assert main(['top', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '10/100' in out
    assert 'running' in out


def test_a_ledger_that_is_damaged_spoils_no_other_job(tmp_path, capsys):
    job(tmp_path / 'a')
    job(tmp_path / 'b')
    (tmp_path / 'b' / 'ledger.jsonl').write_text('{"time": 1, "event": "att')
    job(tmp_path / 'c')
    (tmp_path / 'c' / 'ledger.jsonl').write_text('{"event": "end", "code": 0, "time": 1}\n')
    assert main(['top', str(tmp_path)]) == 0
    assert '10/100' in capsys.readouterr().out


def test_where_there_is_no_job_that_is_said(tmp_path, capsys):
    assert main(['top', str(tmp_path)]) == 2
    assert 'holds no job' in capsys.readouterr().err
    assert main(['top', str(tmp_path / 'none')]) == 2
    assert 'is no directory' in capsys.readouterr().err
