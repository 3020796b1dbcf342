"""What is said of a job: table, sentences, chart and TensorBoard."""

import dataclasses
import io
import subprocess
import sys

import pytest
from rich.console import Console

from launch.account import CATEGORIES, Account, account
from launch.board import write_text
from launch.report import markdown, save_png, show, verdict
from tests.trainer import tiny
from trainer.errors import ConfigError


def test_the_table_has_every_category_and_the_deaths(dirs):
    text = io.StringIO()
    show(dirs, Console(file=text, width=100))
    for words in ('input wait', 'lost', '18.0', 'goodput 27.0%', 'worker 1 ended with -9'):
        assert words in text.getvalue()


def test_the_verdict_says_what_stands_out_in_plain_words(dirs):
    result = account(dirs)
    assert verdict(result) == []
    seconds = {**result.seconds, 'input wait': 20.0, 'saving': 25.0, 'lost': 20.0, 'down': 5.0}
    bound, saving, spoilt = verdict(dataclasses.replace(result, seconds=seconds))
    # Of 27 s of steps, 20 lost, 20 of waiting, 25 of saving and 5 of evaluation.
    assert bound.startswith('Input-bound 21% of the time in the training loop: so long did')
    assert saving.startswith('Saving held up the training loop for 26% of its time.')
    assert spoilt.startswith('1 failure(s) cost 25 s of steps done again and of waiting.')


def test_the_verdict_on_a_smooth_run_is_silence():
    seconds = {**dict.fromkeys(CATEGORIES, 0.0), 'steps': 90.0, 'start and end': 10.0}
    assert verdict(Account(seconds, 100.0, 1, 900, [])) == []


def test_a_worker_that_others_wait_for_is_named(dirs):
    result = account(dirs)
    assert not any('slower' in sentence for sentence in verdict(result))
    result = dataclasses.replace(result, work=[0.1, 0.18, 0.1])
    assert any(s.startswith('Worker 1 is 1.8 times slower than the') for s in verdict(result))


def test_a_roll_back_is_told(dirs):
    events = [{'event': 'rollback', 'rolled_back': 103, 'to': 80}]
    result = dataclasses.replace(account(dirs), events=events)
    assert any('went back to a checkpoint 1 time(s)' in sentence for sentence in verdict(result))
    assert '* went back from step 103 to step 80' in markdown(result)


def test_the_chart_is_a_png_with_a_bar_for_each_category(dirs, tmp_path):
    path = tmp_path / 'report.png'
    save_png(dirs, path)
    assert path.read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ConfigError, match='cannot be written: No such file or directory'):
        save_png(dirs, tmp_path / 'nowhere' / 'report.png')


def test_tensorboard_shows_the_report(dirs, tmp_path):
    for step in (100, 200):
        write_text(tmp_path / 'job', step, 'report', markdown(account(dirs)))
    points = tiny.points(tmp_path / 'job')['report']
    assert [step for step, _ in points] == [100, 200]
    assert b'| steps | 27.0 | 27.0% |' in points[0][1]


def test_tensorboard_is_told_without_loading_tensorflow(tmp_path):
    code = (
        'import sys; from pathlib import Path; from launch.board import write_text; '
        f'write_text(Path({str(tmp_path)!r}), 1, "a", "b"); assert "tensorflow" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
