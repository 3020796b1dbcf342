"""How a job stands, from records made by hand."""

import json
import os

import pytest

from launch.status import logs, status
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


def test_a_job_that_has_ended_is_told_with_how_its_workers_did(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    text = ledger.read_text().replace(
        '"outcome": "finished"', '"outcome": "finished", "codes": [0]'
    )
    ledger.write_text(text)
    assert status(dirs) == (
        'finished (exit code 0)\n'
        'attempt 2, begun at step 60\n'
        'worker 0: ended with 0, ending at step 100\n'
        'newest checkpoint: none yet'
    )


def test_a_worker_whose_host_was_lost_has_no_exit_code(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    text = ledger.read_text().replace(
        '"outcome": "finished"', '"outcome": "failed", "codes": [null]'
    )
    ledger.write_text(text)
    assert 'worker 0: its end was not seen, ending at step 100\n' in status(dirs)


def test_a_job_that_runs_is_told_with_its_phases(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    job = {'time': 2e9, 'event': 'job', 'pid': os.getpid(), 'host': os.uname().nodename}
    attempt = {'time': 2e9, 'event': 'attempt', 'number': 2, 'workers': 1, 'step': 60}
    ledger.write_text(''.join(json.dumps(each) + '\n' for each in (job, attempt)))
    text = status(dirs)
    assert text.startswith(f'running, process {os.getpid()} on ')
    assert 'worker 0: ending at step 100, ' in text


def test_a_directory_without_a_job_has_no_logs(tmp_path):
    with pytest.raises(ConfigError, match=r'holds no ledger\.jsonl'):
        logs(ModelDir(tmp_path))
