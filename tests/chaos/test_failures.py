"""What no restart can mend ends a job with one clear message, and what one can is tried again."""

import json
import shutil
import socket

import pytest

from tests import disks
from tests.chaos.jobs import Job, bits, ledger, processes_of

pytestmark = pytest.mark.chaos


def own_words(output):
    """What the launcher says itself, without the workers' words that it shows."""
    return [line for line in output.splitlines() if line.startswith('phalanx: ')]


def test_a_job_that_always_fails_is_given_up_with_its_first_error(tmp_path):
    (tmp_path / 'crashing.py').write_text(
        'import gin\n\n\n@gin.register\ndef crashing(): raise RuntimeError("my model is broken")\n'
    )
    (tmp_path / 'crashing.gin').write_text('import crashing\nMODEL = @crashing\n')
    model_dir = tmp_path / 'run'
    job = Job(
        model_dir, f'--gin_file={tmp_path}/crashing.gin', '--max_restarts=1',
        f'--gin_search_path={tmp_path}',
    )  # fmt: skip
    with job:
        code, output = job.end()
    assert code == 1
    assert output.count('giving up: 2 attempts in a row ended without a new checkpoint') == 1
    assert 'The likely cause: RuntimeError: my model is broken. Its log is' in output
    assert f'Its log is {model_dir}/logs/attempt-1/worker-' in output
    assert 'my model is broken' in output.split('giving up')[1]
    # A traceback is the worker's, never the launcher's.
    assert 'launch/supervisor.py' not in output
    assert not processes_of(model_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    with disks.small_disk(tmp_path / 'small', '1m') as mount:
        yield mount


def test_a_disk_that_fills_up_is_told_and_the_job_goes_on_when_there_is_space(
    small_disk, tmp_path, undisturbed_job
):
    model_dir = small_disk / 'run'
    with Job(model_dir, '--max_restarts=1') as job:
        code, output = job.end()
    assert code == 1
    _, verdict = output.split('phalanx: giving up: ')
    assert (
        f"error: model_dir = '{model_dir}' cannot be written: No space left on device. Free some "
        'space there, then run again: the run goes on from its newest checkpoint.\n'
    ) in verdict
    assert 'Traceback' not in verdict
    assert 'launch/supervisor.py' not in output
    assert not processes_of(model_dir)

    larger = shutil.copytree(model_dir, tmp_path / 'larger')
    with Job(larger) as job:
        code, output = job.end()
    assert code == 0, output
    assert not (larger / 'checkpoints' / 'quarantine').exists()
    assert bits(larger) == undisturbed_job


def test_more_workers_than_gpus_is_one_message_and_leaves_nothing(tmp_path):
    model_dir = tmp_path / 'run'
    with Job(model_dir, workers=3, CUDA_VISIBLE_DEVICES='0,1') as job:
        code, output = job.end()
    assert code == 2
    assert output == (
        'phalanx: 3 workers need a GPU each, but there are 2: 0,1. Use --workers=2, or set '
        'CUDA_VISIBLE_DEVICES=-1 to train on the CPU.\n'
    )
    assert not processes_of(model_dir)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('index', [0, 1])
def test_a_port_that_somebody_takes_is_told_and_others_are_tried(tmp_path, undisturbed_job, index):
    model_dir = tmp_path / 'run'
    with Job(model_dir) as job, socket.socket() as thief:
        config = json.loads(job.worker(index).environ()['TF_CONFIG'])
        port = int(config['cluster']['worker'][index].rpartition(':')[2])
        thief.bind(('', port))  # The worker needs seconds to import TensorFlow before it looks.
        thief.listen()
        code, output = job.end()
    assert code == 0, output
    assert own_words(output)[1:3] == [
        f'phalanx: port {port} of worker {index} was taken by another process',
        'phalanx: starting again from step 0 (restart 1 of 3 without a new checkpoint)',
    ]
    assert 'Traceback' not in output
    assert [each['outcome'] for each in ledger(model_dir, 'attempt_end')] == ['failed', 'finished']
    assert not processes_of(model_dir)
    assert bits(model_dir) == undisturbed_job
