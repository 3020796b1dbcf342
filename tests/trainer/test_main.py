"""The program of one task, run as users run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

ROOT = str(Path(trainer.__file__).parents[1])


def run(*flags, cwd, code=0):
    """Runs the program in a directory that is not the checkout; returns stdout and stderr."""
    environment = {**os.environ, 'PYTHONPATH': ROOT}
    environment.pop('TF_CONFIG', None)
    done = subprocess.run(
        [sys.executable, '-m', 'trainer', *flags],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--mode=trian'], '--mode=trian is none of'),
        (['--modle_dir=d'], "Did you mean 'model_dir'?"),
        (['--gin_file=runs/digit.gin'], "Did you mean 'runs/digits.gin'?"),
        (['--gin_file=runs/digits.gin', '--gin.SEED=x'], """--gin.SEED='"x"'"""),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_without_tensorflow(flags, message, tmp_path):
    out, err = run(*flags, cwd=tmp_path, code=2)
    assert not out
    assert err.startswith('error: ')
    assert message in err
    assert err.count('\n') == 1  # TensorFlow would have said more, and so would a traceback.


def test_verbosity_1_shows_the_traceback_of_a_mistake(tmp_path):
    _, err = run('--gin_file=no.gin', '--verbosity=1', cwd=tmp_path, code=2)
    assert 'Traceback' in err


def test_a_mistake_found_inside_a_configured_function_is_told_without_gins_additions(tmp_path):
    _, err = run(
        '--gin_file=runs/digits.gin', '--model_dir=d', '--gin.train/digits.split="trian"',
        cwd=tmp_path, code=2,
    )  # fmt: skip
    assert 'trian' in err.splitlines()[-1]
    assert 'Traceback' not in err
    assert 'In call to' not in err


@pytest.mark.slow
def test_a_run_leaves_a_record_with_which_every_mode_can_be_run_again(tmp_path):
    short = ('--gin.STEPS=8', '--gin.train.eval_every=None', '--gin.DEVICES=1')
    out, _ = run(
        '--gin_file=runs/digits.gin', *short, '--model_dir=first', '--mode=train', cwd=tmp_path
    )
    assert 'eval/' not in out
    assert not list((tmp_path / 'first').glob('export/*'))

    record = 'first/config/config-0.gin'
    trained = re.search(r'state sha256: (\w+)', out)[1]
    out, _ = run(f'--gin_file={record}', '--model_dir=second', cwd=tmp_path)
    assert re.search(r'state sha256: (\w+)', out)[1] == trained
    assert (tmp_path / 'second' / 'export' / '8' / 'saved_model.pb').exists()
    assert str(tmp_path / 'second' / 'checkpoints' / 'step-00000008') in out
    again = (tmp_path / 'second' / 'config' / 'config-0.gin').read_text()
    assert again.replace("'second'", "'first'") == (tmp_path / record).read_text()

    evaluated, _ = run(f'--gin_file={record}', '--mode=evaluate', cwd=tmp_path)
    assert re.search(r'accuracy (0\.\d+)', evaluated)[1] in out.splitlines()[0]
    out, _ = run(f'--gin_file={record}', '--mode=export', cwd=tmp_path)
    assert (tmp_path / 'first' / 'export' / '8' / 'saved_model.pb').exists()
