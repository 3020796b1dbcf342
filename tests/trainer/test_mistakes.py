"""Every mistake a newcomer is likely to make gets one message, exit code 2, and trains nothing.

The whole text is compared: a message is part of the interface. All but one are made in this
process, through the program's `main`, for the start of a process takes seconds.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf  # noqa: F401 (devices are fixed before the first test)
from absl.flags import FLAGS

from launch.local import free_ports
from tests.processes import environment
from trainer import gin_files
from trainer.__main__ import main
from trainer.model_dir import ModelDir

# The smallest run of the program: two replicas, one step, a small model.
RUN = [
    '--gin_file=runs/digits.gin',
    '--model_dir=run',
    '--mode=train',
    '--gin.STEPS=1',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('TF_CONFIG', raising=False)
    return tmp_path


@pytest.fixture
def told(capsys, monkeypatch, empty_directory):
    """A function: flags -> the one message, after checking all that holds for every mistake."""
    monkeypatch.setattr(FLAGS['logtostderr'], 'value', True)  # And not where it was at import.

    def run(*flags):
        before = sorted(empty_directory.rglob('step-*'))
        assert main(flags) == 2
        out, err = capsys.readouterr()
        assert not out
        assert 'Traceback' not in err
        news, _, message = err.rpartition('error: ')
        assert all(' I ' in line for line in news.splitlines()), err
        assert message.endswith('\n')

        assert main([*flags, '--verbosity=1']) == 2
        _, err = capsys.readouterr()
        assert 'Traceback (most recent call last):' in err
        assert err.endswith(f'error: {message}')
        assert sorted(empty_directory.rglob('step-*')) == before, 'something was trained'
        return message.removesuffix('\n')

    return run


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        (
            '--gin.BATCH_SZ=32',
            'the command line: BATCH_SZ is set, but nothing uses %BATCH_SZ. Did you mean '
            "'BATCH_SIZE'?",
        ),
        (
            "--gin.tarin/digits.split='train'",
            'the command line: tarin/digits.split has no effect, because digits is never called '
            "in the scope 'tarin', only as eval/digits, train/digits. Did you mean "
            "'train/digits'?",
        ),
        (
            '--gin.cnn.dropuot=0.5',
            "the command line: 'cnn' has no parameter 'dropuot'. Did you mean 'dropout'? It has "
            'num_classes, input_shape, filters, units, dropout, l2, norm.',
        ),
        (
            '--gin.keras.optimizers.AdmW.weight_decay=0.1',
            "the command line: there is no 'keras.optimizers.AdmW'. Did you mean 'AdamW'? A "
            'function or class of your own must be registered with @gin.register and its module '
            'imported in the .gin file.',
        ),
        (
            "--gin.BATCH_SIZE='64'",
            "the command line: BATCH_SIZE = '64', for train.batch_size, is of type str, but int "
            'is wanted. Write it without quotes: 64',
        ),
        (
            '--gin.PRECISION=bfloat16',
            '--gin.PRECISION=bfloat16 cannot be read. A text needs quotes: '
            """--gin.PRECISION='"bfloat16"'""",
        ),
        (
            '--gin_file=models/ccn.gin',
            "There is no file 'models/ccn.gin'. Did you mean 'models/cnn.gin'? Looked in: the "
            f'working directory, {gin_files.shipped_configs()}.',
        ),
        (
            '--gin.BATCH_SIZE=33',
            'The global batch of 33 examples cannot be shared equally by 2 replicas. Set '
            'BATCH_SIZE to a multiple of 2, such as 32 or 34.',
        ),
        (
            '--gin.NUM_CLASSES=9',
            "The labels 'label' run from 0 to 9, but the model has 9 outputs, for classes 0 to 8. "
            'Set NUM_CLASSES = 10, or number the labels from 0.',
        ),
        (
            '--gin.INPUT_SHAPE=(28, 28, 1)',
            "The model 'cnn' takes inputs of shape (28, 28, 1), but those of the data are "
            '(8, 8, 1). Set INPUT_SHAPE = (8, 8, 1), or change the input of your model.',
        ),
        (
            '--gin.INPUT_SHAPE=(64,)',
            "The model 'cnn' cannot be built: Input 0 with name 'None' of layer 'conv2d' is "
            'incompatible with the layer: expected min_ndim=4, found ndim=2. Full shape received: '
            '(None, 64). Look '
            'at INPUT_SHAPE and its parameters; --verbosity=1 shows where it failed.',
        ),
        (
            '--model_dir=/proc/run',
            "model_dir = '/proc/run' cannot be written: No such file or directory (/proc/run). "
            'Give --model_dir a directory that this user may write to and that has space left.',
        ),
        (
            '--mode=trian',
            '--mode=trian is none of train, evaluate, train_and_evaluate, export, serve_data. Did '
            "you mean 'train'?",
        ),
        (
            '--gin.Keep.metrc="eval/accuracy"',
            "the command line: 'Keep' has no parameter 'metrc'. Did you mean 'metric'? It has "
            'last, best, metric, mode, older_than_hours.',
        ),
        (
            '--gin.PRECISION="float61"',
            "precision = 'float61' is none of float32, bfloat16, float16. Did you mean 'float16'?",
        ),
        (
            '--gin.train.log_every="5 mintues"',
            "'5 mintues' has the unknown unit 'mintues'; there are steps, epochs, seconds, "
            "minutes, hours. Did you mean 'minute'?",
        ),
    ],
    ids=lambda text: text.partition('=')[0] if text.startswith('--') else '',
)
def test_a_wrong_setting(told, flag, message):
    assert told(*RUN, flag) == message


def test_a_wrong_setting_in_a_file_is_told_with_its_line(told, empty_directory):
    (empty_directory / 'mine.gin').write_text("include 'runs/digits.gin'\n\nBATCH_SZ = 32\n")
    assert told('--gin_file=mine.gin', '--model_dir=run') == (
        "mine.gin:3: BATCH_SZ is set, but nothing uses %BATCH_SZ. Did you mean 'BATCH_SIZE'?"
    )


def test_labels_outside_the_classes_in_data_of_ones_own(told):
    np.savez('mine.npz', image=np.zeros((6, 8, 8, 1), np.uint8), label=np.arange(6) * 3)
    flags = [*RUN, '--gin.train/Data.source=@npz()']
    assert told(*flags, "--gin.npz.path='mine.npz'") == (
        "The labels 'label' run from 0 to 15, but the model has 10 outputs, for classes 0 to 9. "
        'Set NUM_CLASSES = 16, or number the labels from 0.'
    )
    assert told(*flags, "--gin.npz.path='main.npz'") == (
        "The data file 'main.npz' does not exist. Did you mean 'mine.npz'?"
    )


def test_a_file_in_the_place_of_model_dir(told, empty_directory):
    (empty_directory / 'run').write_text('')
    where = repr(str(empty_directory / 'run'))
    assert told(*RUN) == (
        f'model_dir = {where} cannot be made: {where} is a file. Move it away, or give another '
        '--model_dir.'
    )


def test_another_seed_for_a_run_that_has_begun(told, capsys):
    assert main(RUN) == 0
    capsys.readouterr()
    assert told(*RUN, '--gin.SEED=1') == (
        'The checkpoint of step 1 was trained with seed = 0 (now 1). To continue would show other '
        'examples than an undisturbed run. Restore what it was, use another model_dir, or, if it '
        "is meant, set train.allow_changes = ('seed',)."
    )


def test_a_model_dir_that_another_job_uses(told, empty_directory):
    dirs = ModelDir('run')
    dirs.create()
    with dirs.lock():
        holder = json.loads((empty_directory / 'run' / 'lock').read_text())
        assert told(*RUN) == (
            f'model_dir = {str(dirs.path)!r} is in use by process {holder["pid"]} on '
            f'{holder["host"]}, started {holder["started"]}. Stop that run, or give this one '
            'another --model_dir.'
        )


@pytest.mark.parametrize('index', [0, 1])
def test_a_peer_that_does_not_come(told, monkeypatch, index):
    workers = [f'127.0.0.1:{port}' for port in free_ports(2)]
    task = {'type': 'worker', 'index': index}
    monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': {'worker': workers}, 'task': task}))
    flags = ['--gin_file=cluster/multi_worker.gin', '--gin.meet.deadline_seconds=1']
    messages = [
        f'After 1 s these have not come: worker 1 ({workers[1]}). See whether each was started, '
        f'with this TF_CONFIG, and can reach worker 0 at {workers[0]}.',
        f'worker 0 ({workers[0]}) has not come within 1 s (Connection refused). See whether it '
        f'was started, with this TF_CONFIG, and can be reached from worker 1 ({workers[1]}).',
    ]
    assert told(*RUN, *flags) == messages[index]


def test_no_such_checkpoint(told, capsys):
    where = repr(str(ModelDir('run').checkpoints))
    for mode in ('evaluate', 'export'):
        assert told(*RUN, f'--mode={mode}') == (
            f'{where} holds no checkpoint. Train first, or correct --model_dir.'
        )
    assert main(RUN) == 0
    capsys.readouterr()
    for mode in ('evaluate', 'export'):
        assert told(*RUN, f'--mode={mode}', f'--gin.{mode}.step=2') == (
            f'{where} holds no checkpoint of step 2. It holds 1.'
        )


@pytest.mark.slow
def test_in_a_process_of_its_own_the_message_is_all_there_is(empty_directory):
    done = subprocess.run(
        [sys.executable, '-m', 'trainer', *RUN, '--gin.NUM_CLASSES=9'],
        env={k: v for k, v in environment().items() if k != 'TF_CPP_MIN_LOG_LEVEL'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == (
        "error: The labels 'label' run from 0 to 9, but the model has 9 outputs, for classes 0 to "
        '8. Set NUM_CLASSES = 10, or number the labels from 0.\n'
    )
