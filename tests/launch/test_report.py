"""The account of a job's time adds up, from records made by hand."""

import io
import json

import pytest
from rich.console import Console

from launch.report import CATEGORIES, Account, account, show, verdict
from trainer.errors import ConfigError
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


def test_every_second_is_in_one_category(dirs):
    found = account(dirs)
    assert found.seconds == pytest.approx(
        {
            'steps': 15 + 12,
            'input wait': 5,
            'evaluation': 5,
            'saving': 2,
            'export': 4,
            'start and end': 9 + 8 + 1,
            'compiling': 10 + 8,
            'restoring': 1,
            'lost': 18,
            'down': 2,
        }
    )
    assert sum(found.seconds.values()) == pytest.approx(found.wall) == 100
    assert found.goodput == pytest.approx(0.27)
    assert (found.attempts, found.step) == (2, 100)


def test_the_table_has_every_category_and_the_deaths(dirs):
    text = io.StringIO()
    show(dirs, Console(file=text, width=100))
    for words in ('input wait', 'lost', '18.0', 'goodput 27.0%', 'worker 1 ended with -9'):
        assert words in text.getvalue()


def test_the_verdict_says_what_stands_out_in_plain_words(dirs):
    bound, spoilt = verdict(account(dirs))
    assert bound.startswith('Input-bound: the replicas waited for batches 10% of the training time')
    assert spoilt.startswith('1 failure(s) cost 20 s of steps done again and of waiting.')


def test_the_verdict_on_a_smooth_run_is_silence():
    seconds = {**dict.fromkeys(CATEGORIES, 0.0), 'steps': 90.0, 'start and end': 10.0}
    assert verdict(Account(seconds, 100.0, 1, 900, [])) == []


def test_an_attempt_that_left_no_record_is_only_down_time(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    refused = [
        {'time': 200, 'event': 'job', 'workers': 1},
        {'time': 200, 'event': 'attempt', 'number': 3, 'workers': 1, 'step': 100},
        {'time': 207, 'event': 'attempt_end', 'number': 3, 'outcome': 'mistake', 'step': 100},
        {'time': 207, 'event': 'end', 'code': 2},
    ]
    more = '\n' + '\n'.join(map(json.dumps, refused)) + '\n'
    ledger.write_text('\n'.join(ledger.read_text().splitlines()[:-1]) + more)
    found = account(dirs)
    assert sum(found.seconds.values()) == pytest.approx(found.wall) == 107
    assert found.seconds['down'] == pytest.approx(9)


def test_a_job_whose_launcher_was_killed_ends_with_the_last_sign_of_life(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    ledger.write_text('\n'.join(ledger.read_text().splitlines()[:2]) + '\n')
    found = account(dirs)
    assert found.wall == pytest.approx(60)
    assert found.seconds['lost'] == 0


def test_a_directory_without_a_job_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r'holds no ledger\.jsonl'):
        account(ModelDir(tmp_path))
