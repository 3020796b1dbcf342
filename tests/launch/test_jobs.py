"""What looks after a job, whoever runs it, on a real one of this host."""

import json
import sys
import time

import psutil
import pytest

from launch import exits
from launch.__main__ import main
from launch.ledger import Ledger
from tests.processes import environment
from trainer.model_dir import ModelDir

RUN = [
    '--gin_file=runs/digits.gin',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
    '--gin.STEPS=1000000',
    '--mode=train',
]


@pytest.fixture
def job(tmp_path):
    log = open(tmp_path / 'log', 'w')  # noqa: SIM115, the job's
    with log:
        process = psutil.Popen(
            [sys.executable, '-m', 'launch', 'run', *RUN, f'--model_dir={tmp_path}/runs/a'],
            env=environment(),
            stdout=log,
            stderr=log,
        )
    yield process
    if process.is_running():
        process.kill()
        process.wait()


def wait_for_steps(directory):
    path = directory / 'logs' / 'attempt-1' / 'worker-0.phases.jsonl'
    end = time.monotonic() + 120
    while not (path.exists() and '"stepping"' in path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_of_this_host_is_shown_and_cancelled(tmp_path, job, capsys):
    directory = tmp_path / 'runs' / 'a'
    wait_for_steps(directory)
    assert main(['status', str(directory)]) == 0
    assert f'running, process {job.pid}' in capsys.readouterr().out
    assert main(['top', str(tmp_path)]) == 0
    assert 'running' in capsys.readouterr().out
    assert main(['cancel', str(directory)]) == 0
    assert job.wait(60) == 75
    assert f'process {job.pid} is asked to save and end' in capsys.readouterr().err
    end = json.loads((directory / 'ledger.jsonl').read_text().splitlines()[-1])
    assert end['code'] == 75
    assert main(['cancel', str(directory)]) == 0
    assert 'the job has ended' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('codes', 'said'),
    [
        ({0: 75, 1: -15}, ''),
        ({0: 75, 1: 1}, 'the first to end badly: worker 1 on node1, exit code 1'),
    ],
)
def test_who_was_asked_to_stop_has_not_ended_badly(tmp_path, capsys, codes, said):
    dirs = ModelDir(tmp_path)
    dirs.attempt(1).mkdir(parents=True)
    ledger = Ledger(tmp_path / 'ledger.jsonl')
    ledger.write('job', workers=2, pid=1, host='node1')
    ledger.write('attempt', number=1, workers=2, step=0)
    ledger.write('end', code=75)
    exits.write(dirs, exits.Exit(1, 0, 'node1', codes, 1.0, 2.0))
    assert main(['status', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert ('badly' in out) == bool(said)


def test_there_is_nothing_to_cancel_where_no_job_has_run(tmp_path, capsys):
    assert main(['cancel', str(tmp_path)]) == 2
    assert 'holds no ledger.jsonl' in capsys.readouterr().err
