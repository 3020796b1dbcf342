"""The account of a job's time adds up, from records made by hand."""

import json

import pytest

from launch.account import account
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


def add(path, *lines):
    with open(path, 'a') as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)


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


def test_all_wait_for_the_worker_that_waits_longest_for_its_batch(dirs):
    # In lockstep with the chief: a line a call.
    calls = [{'step': 1}, {'step': 60, 'input_seconds': 11}, {'step': 100, 'input_seconds': 1}]
    path = dirs.logs / 'attempt-1' / 'worker-1.phases.jsonl'
    add(path, *({'time': 0, 'phase': 'stepping', **call} for call in calls))
    ledger = dirs.path / 'ledger.jsonl'
    ledger.write_text(ledger.read_text().replace('"workers": 1', '"workers": 2'))
    found = account(dirs)
    assert found.seconds['input wait'] == pytest.approx(11)
    assert found.seconds['steps'] == pytest.approx(9 + 12)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)


def test_steps_before_a_roll_back_are_lost_if_they_lie_beyond_its_checkpoint(dirs):
    path = dirs.logs / 'attempt-2' / 'worker-0.phases.jsonl'
    lines = path.read_text().splitlines(True)
    back = {'time': 95, 'phase': 'restoring', 'rolled_back': 103, 'to': 80}
    more = [
        {'time': 84, 'phase': 'stepping', 'step': 80},
        {'time': 90, 'phase': 'stepping', 'step': 100},
        back,
        {'time': 96, 'phase': 'compiling', 'step': 80},
        {'time': 97, 'phase': 'stepping', 'step': 81},
        {'time': 99, 'phase': 'stepping', 'step': 100},
    ]
    path.write_text(''.join(lines[:3]))
    add(path, *more)
    found = account(dirs)
    assert found.seconds['lost'] == pytest.approx(18 + 6 + 5)
    assert found.seconds['steps'] == pytest.approx(15 + 6 + 2)
    assert sum(found.seconds.values()) == pytest.approx(found.wall)


def test_the_work_of_each_worker_is_its_median_a_step(dirs):
    ledger = dirs.path / 'ledger.jsonl'
    ledger.write_text(ledger.read_text().replace('"workers": 1', '"workers": 2'))
    assert account(dirs).work == []
    for worker, work in ((0, 1.0), (1, 2.0)):
        path = dirs.logs / 'attempt-2' / f'worker-{worker}.phases.jsonl'
        path.unlink(missing_ok=True)
        steps = [{'step': 60}]
        steps += [{'step': 60 + 10 * n, 'work_seconds': work} for n in range(1, 10)]
        if worker:  # Of a few calls nothing is told.
            add(path, *({'time': 80, 'phase': 'stepping', **each} for each in steps))
            assert account(dirs).work == []
            path.unlink()
        steps += [{'step': 151, 'work_seconds': 50}]
        add(path, *({'time': 80, 'phase': 'stepping', **each} for each in steps))
    assert account(dirs).work == pytest.approx([0.1, 0.2])
