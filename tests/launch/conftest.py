"""The records of a job, made by hand."""

import json

import pytest

from trainer.model_dir import ModelDir


@pytest.fixture
def dirs(tmp_path):
    """Two attempts of one job: killed at 60 s, 40 steps of 100 after the checkpoint of step 60."""
    ledger = [
        {'time': 0, 'event': 'job', 'workers': 1},
        {'time': 0, 'event': 'attempt', 'number': 1, 'workers': 1, 'step': 0},
        {'time': 61, 'event': 'exit', 'worker': 1, 'code': -9},
        {'time': 61, 'event': 'attempt_end', 'number': 1, 'outcome': 'failed', 'step': 60},
        {'time': 62, 'event': 'attempt', 'number': 2, 'workers': 1, 'step': 60},
        {'time': 100, 'event': 'attempt_end', 'number': 2, 'outcome': 'finished', 'step': 100},
        {'time': 100, 'event': 'end', 'code': 0},
    ]
    first = [
        (1, 'starting', {}),
        (8, 'building', {}),
        (9, 'restoring', {}),
        (10, 'compiling', {'step': 0}),
        (20, 'stepping', {'step': 1}),
        (40, 'stepping', {'step': 60, 'input_seconds': 5}),
        (40, 'saving', {'step': 60}),
        (42, 'stepping', {}),
        (60, 'stepping', {'step': 100, 'input_seconds': 2}),
    ]
    second = [
        (63, 'starting', {}),
        (70, 'compiling', {'step': 60}),
        (78, 'stepping', {'step': 61}),
        (90, 'stepping', {'step': 100}),
        (90, 'evaluating', {'step': 100}),
        (95, 'exporting', {'step': 100}),
        (99, 'ending', {}),
    ]
    result = ModelDir(tmp_path)
    (tmp_path / 'ledger.jsonl').write_text('\n'.join(map(json.dumps, ledger)) + '\n{"time')
    for number, lines in ((1, first), (2, second)):
        directory = result.logs / f'attempt-{number}'
        directory.mkdir(parents=True)
        with open(directory / 'worker-0.phases.jsonl', 'w') as out:
            for time, phase, figures in lines:
                out.write(json.dumps({'time': time, 'phase': phase, **figures}) + '\n')
    return result
