"""`phalanx replay`: from a run's directory to one of its steps."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from launch import record, replay
from launch.__main__ import main
from tests.launch.test_local import end, start
from tests.launch.test_record import CONFIG, MODULE, job
from tests.processes import environment
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


@pytest.fixture
def dirs(tmp_path):
    made = ModelDir(tmp_path / 'run')
    made.create()
    return made


def save_manifest(dirs, step, **topology):
    path = dirs.checkpoints / f'step-{step:08d}'
    path.mkdir()
    (path / 'manifest.json').write_text(json.dumps({'topology': topology}))


def test_the_configuration_is_the_newest_that_was_in_force(dirs, capsys):
    for name in ('config-0', 'config-0-2', 'config-0-10', 'config-600', 'recorded'):
        (dirs.config / f'{name}.gin').write_text('')
    assert replay._config(dirs, 1) == (0, dirs.config / 'config-0-10.gin')
    assert replay._config(dirs, 600) == (0, dirs.config / 'config-0-10.gin')
    assert replay._config(dirs, 601) == (600, dirs.config / 'config-600.gin')
    for path in dirs.config.glob('config-0*'):
        path.unlink()
    with pytest.raises(ConfigError) as raised:
        replay._config(dirs, 600)
    assert str(raised.value) == (
        '--step=600 was taken before the first recorded configuration, of step 600. Name a step '
        'after 600.'
    )
    (dirs.config / 'config-600.gin').unlink()
    assert main(['replay', str(dirs.path), '--step=3']) == 2
    assert capsys.readouterr().err == (
        f"phalanx: '{dirs.path}' holds no recorded configuration (config/config-0.gin). Name the "
        '--model_dir of a run that has begun.\n'
    )


def test_the_replicas_are_those_of_the_attempt_that_took_the_step(dirs, monkeypatch):
    monkeypatch.setenv('TF_NUM_INTRAOP_THREADS', '5')
    assert replay._topology(dirs, 3) == {}
    record.Record(dirs, job(workers=3, devices_per_worker=2)).begin()
    assert replay._topology(dirs, 3) == {'replicas': 6, 'intra_op_threads': 5}
    save_manifest(dirs, 10, replicas=4)
    save_manifest(dirs, 20, replicas=2)
    assert replay._topology(dirs, 3) == {'replicas': 4}
    assert replay._topology(dirs, 10) == {'replicas': 4}
    assert replay._topology(dirs, 11) == {'replicas': 2}
    assert replay._topology(dirs, 21) == {'replicas': 2}


def run_replay(*argv, cwd, text=None):
    return subprocess.run(
        [sys.executable, '-m', 'launch', 'replay', *argv],
        cwd=cwd,
        env=environment(),
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def sha256(directory, step):
    path = directory / f'checkpoints/step-{step:08d}/manifest.json'
    return json.loads(path.read_text())['state_sha256']


@pytest.mark.slow
def test_a_step_of_two_workers_has_the_same_bits_in_one_process_even_while_they_run(tmp_path):
    (tmp_path / 'own_model.py').write_text(MODULE)
    (tmp_path / 'own.gin').write_text(CONFIG)
    run = tmp_path / 'run'
    command = ['launch', 'run', '--workers=2', '--devices_per_worker=1', '--gin_file=own.gin']
    command += ['--model_dir=run', '--gin.Keep.last=1000', '--mode=train']
    code, _, err = end(start(*command, cwd=tmp_path))
    assert code == 0, err
    # It goes on for long, with another learning rate.
    changes = ['--gin.STEPS=1000000', '--gin.WARMUP=100', '--gin.LEARNING_RATE=0.01']
    running = start(*command, *changes, '--gin.train.save_every="1 seconds"', cwd=tmp_path)
    try:
        while not (later := sorted(run.glob('checkpoints/step-*/manifest.json'))[2:]):
            assert running.poll() is None
            time.sleep(0.1)
        step = int(later[0].parent.name[5:])
        done = run_replay('run', f'--step={step}', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert running.poll() is None
    finally:
        running.send_signal(signal.SIGTERM)
        assert end(running)[0] == 75
    assert done.stdout.startswith(f'step {step}, reached from the checkpoint of step 12\n')
    assert f'state sha256 after step {step}: {sha256(run, step)}\n' in done.stdout
    assert 'its checkpoint says: the same\n' in done.stdout
    # The step before the change, by the configuration before it; the records are those read.
    files = sorted(run.rglob('*'))
    done = run_replay('run', '--step=12', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'state sha256 after step 12: {sha256(run, 12)}\n' in done.stdout
    read = [line.split('\t') for line in (run / 'samples.tsv').read_text().splitlines()]
    shown = re.findall(r'replica \d: (.*)', done.stdout)
    assert ' '.join(shown) == dict(read)['11']
    assert sorted(run.rglob('*')) == files
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_the_debugger_stops_before_the_step_and_in_the_models_call(tmp_path):
    model = """
import gin
import keras


@gin.register
class own(keras.Model):
    def __init__(self, num_classes: int):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(num_classes)

    def call(self, inputs):
        return self.dense(self.flatten(inputs))
"""
    (tmp_path / 'own_model.py').write_text(model)
    (tmp_path / 'own.gin').write_text(CONFIG)
    command = ['trainer', '--gin_file=own.gin', '--mode=train', '--model_dir=run']
    code, _, err = end(start(*command, cwd=tmp_path))  # Two replicas, without the launcher.
    assert code == 0, err
    text = 'p num_steps\nc\np inputs.shape\nc\n'
    done = run_replay('run', '--step=12', '--pdb', cwd=tmp_path, text=text)
    assert done.returncode == 0, done.stderr
    assert "pdb stops before step 12; `c` goes to the model's call\n" in done.stdout
    assert '(Pdb) 1\n' in done.stdout
    assert re.search(r'own_model.py\(14\)call\(\)\n-> return self.dense', done.stdout)
    assert '(Pdb) TensorShape([32, 8, 8, 1])\n' in done.stdout
    assert f'state sha256 after step 12: {sha256(tmp_path / "run", 12)}\n' in done.stdout
    done = run_replay('run', '--step=12', '--pdb', cwd=tmp_path, text='q\n')
    assert done.returncode == 0, done.stderr
    assert 'state sha256' not in done.stdout
    done = run_replay('run', '--step=13', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith(
        'phalanx: There is no step 13 to replay: the steps of this run are 1 to 12.\n'
    )
    assert 'Traceback' not in done.stderr
