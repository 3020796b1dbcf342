import subprocess
import sys

import pytest

from launch.__main__ import main
from tests.processes import environment
from trainer.model_dir import ModelDir


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (
            ['rum'],
            "'rum' is not a verb of phalanx (run, check, sweep, submit, status, logs, cancel, "
            "list, top, report, rerun, replay, prepare, inspect, tune). Did you mean 'run'?",
        ),
        (
            ['--workers=2'],
            "'--workers=2' is not a verb of phalanx (run, check, sweep, submit, status, logs, "
            'cancel, list, top, report, rerun, replay, prepare, inspect, tune).',
        ),
        (
            ['run', '--wrokers=2'],
            "Unknown flag --wrokers. Did you mean 'workers'? Settings of the configuration are "
            'given as --gin.NAME=VALUE; --help lists the flags.',
        ),
        (
            ['run', '--gin_fle=runs/digits.gin'],
            "Unknown flag --gin_fle. Did you mean 'gin_file'? Settings of the configuration are "
            'given as --gin.NAME=VALUE; --help lists the flags.',
        ),
        (
            ['run', '--workers=two'],
            '--workers=two is neither a number from 1 on, such as --workers=4, nor a range, '
            'such as --workers=2-4.',
        ),
        (
            ['run', '--workers=0'],
            '--workers=0 is neither a number from 1 on, such as --workers=4, nor a range, '
            'such as --workers=2-4.',
        ),
        (
            ['run', '--devices_per_worker=0'],
            'flag --devices_per_worker=0: 0 is not a positive integer. phalanx --help lists the '
            'flags.',
        ),
        (
            ['run', '--logs=cheif'],
            "--logs=cheif is none of chief, all, none. Did you mean 'chief'?",
        ),
        (
            ['run', '--mode=trian'],
            '--mode=trian is none of train, evaluate, train_and_evaluate, export, serve_data. Did '
            "you mean 'train'?",
        ),
        (
            ['run', 'runs/digits.gin'],
            "'runs/digits.gin' is not a flag. A file is given as --gin_file=runs/digits.gin.",
        ),
        (
            ['run', '--gin_file=runs/digits.gin'],
            'Where shall the run be written? Set --model_dir=DIR.',
        ),
        *(
            (
                [*flags, '--data_workers=2', '--gin_file=runs/digits.gin', '--model_dir=run'],
                f'--data_workers is for runs that train: {what} makes its batches itself. Leave it '
                'out.',
            )
            for flags, what in [
                (['check'], 'phalanx check'),
                (['run', '--mode=evaluate'], '--mode=evaluate'),
                (['run', '--mode=export'], '--mode=export'),
                (['run', '--dry_run'], '--dry_run'),
            ]
        ),
        (['status'], 'Of which job? Write: phalanx status JOB, its model_dir.'),
        (['logs', 'a', 'b'], 'Of which job? Write: phalanx logs JOB, its model_dir.'),
        (['replay', 'a'], 'Which step? Write: phalanx replay a --step=N.'),
        (
            ['replay', '--step=3'],
            'Of which job? Write: phalanx replay DIR --step=N, its model_dir.',
        ),
        (
            ['replay', 'a', '--step=0'],
            'flag --step=0: 0 is not a positive integer. phalanx --help lists the flags.',
        ),
        (
            ['replay', 'a', '--stp=3'],
            "Unknown flag --stp of phalanx replay. Did you mean 'step'? phalanx --help lists the "
            'flags.',
        ),
        (
            ['run', '--check_workers=4'],
            '--check_workers is a flag of `python -m trainer`. Use `phalanx check --workers=N`.',
        ),
        (['run', '--gin.STEPS'], '--gin.STEPS has no value. Write --gin.STEPS=VALUE.'),
    ],
)
def test_a_mistake_is_told_once_before_any_worker_starts(capsys, argv, message):
    assert main(argv) == 2
    assert capsys.readouterr() == ('', f'phalanx: {message}\n')


def test_a_flag_may_be_given_in_two_words(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    flags = ['--gin_file', 'runs/digits.gin', '--model_dir', f'{tmp_path}/file/run']
    assert main(['run', *flags, '--workers', '2', '--max_restarts=1']) == 2
    assert 'is a file. Move it away' in capsys.readouterr().err


@pytest.mark.parametrize('argv', [[], ['--help'], ['help'], ['run', '--help'], ['run', '-h']])
def test_help(capsys, argv):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith('usage: phalanx run ')
    assert not err


def test_the_launcher_does_not_wait_for_tensorflow():
    program = """
import sys
from launch.__main__ import main
code = main(sys.argv[1:])
assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, '-c', program, 'run', '--mode=trian'],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('phalanx: --mode=trian is none of ')
    assert done.stderr.count('\n') == 1


def test_a_model_dir_that_another_launcher_holds_is_refused(tmp_path, capsys):
    dirs = ModelDir(tmp_path)
    dirs.create()
    with dirs.lock('logs/lock'):
        assert main(['run', '--gin_file=runs/digits.gin', f'--model_dir={tmp_path}']) == 2
    assert 'is in use by process' in capsys.readouterr().err
    assert not (tmp_path / 'ledger.jsonl').exists()


def test_what_cannot_be_a_model_dir_is_told_before_any_worker_starts(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    argv = ['run', '--gin_file=runs/digits.gin', f'--model_dir={tmp_path}/file/run']
    assert main(argv) == 2
    assert 'is a file. Move it away' in capsys.readouterr().err


def test_a_ledger_without_its_beginning_is_told(tmp_path, capsys):
    (tmp_path / 'ledger.jsonl').write_text('{"time": 1, "event": "end", "code": 0}\n')
    assert main(['status', str(tmp_path)]) == 2
    assert 'lacks its beginning' in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_ends_it_without_a_word(tmp_path):
    log = tmp_path / 'logs' / 'attempt-1' / 'worker-0.log'
    log.parent.mkdir(parents=True)
    log.write_text('a line\n' * 100_000)
    command = f'"{sys.executable}" -m launch logs "{tmp_path}" | head -n 1'
    done = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}'],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, 'a line\n', '')
