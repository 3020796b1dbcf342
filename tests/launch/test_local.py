"""`phalanx run` with real workers on this host."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from launch import local
from tests.processes import environment
from trainer.errors import ConfigError

RUN = [
    '--gin_file=runs/digits.gin',
    '--model_dir=run',
    '--gin.cnn.filters=2',
    '--gin.cnn.units=4',
    '--gin.train.sample_log=True',
    '--gin.meet.deadline_seconds=60',
]


def start(*argv, cwd, **variables):
    return subprocess.Popen(
        [sys.executable, '-m', *argv],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Waits; returns the exit code and what was printed; leaves no launcher behind."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def workers_of(directory):
    """The processes that work in a directory on the model_dir 'run', the launcher among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if '--model_dir=run' in process.cmdline() and process.cwd() == str(directory):
                found.append(process)
    return found


def test_free_ports_are_different_free_and_below_those_of_outgoing_calls():
    ports = local.free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        assert 10_000 <= port < 32_000
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', port))


def test_the_environment_tells_each_worker_its_place_and_nothing_of_an_outer_job(monkeypatch):
    monkeypatch.setenv('TF_CONFIG', '{"cluster": "of another job"}')
    (alone,) = local.environments([], 0, 1, 1)
    assert 'TF_CONFIG' not in alone
    cluster = ['a:1', 'a:2', 'b:1']
    found = local.environments(cluster, 1, 2, 2)
    configs = [json.loads(each['TF_CONFIG']) for each in found]
    assert [config['task'] for config in configs] == [
        {'type': 'worker', 'index': index} for index in (1, 2)
    ]
    assert [config['cluster'] for config in configs] == [{'worker': cluster}] * 2


def environments_of_two():
    return local.environments(['a:1', 'a:2'], 0, 2, 2)


def test_the_threads_of_the_host_are_shared_out_unless_the_user_did(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv('TF_NUM_INTRAOP_THREADS', raising=False)
    assert 'TF_NUM_INTRAOP_THREADS' not in local.environments([], 0, 1, 1)[0]
    threads = {each['TF_NUM_INTRAOP_THREADS'] for each in environments_of_two()}
    assert threads == {str(max(1, cores // 2))}
    monkeypatch.setenv('TF_NUM_INTRAOP_THREADS', '7')
    assert environments_of_two()[1]['TF_NUM_INTRAOP_THREADS'] == '7'


def test_the_gpus_of_the_host_are_shared_out(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7,-1,2')
    assert [each['CUDA_VISIBLE_DEVICES'] for each in environments_of_two()] == ['4,5', '6,7']
    assert local.environments([], 0, 1, 1)[0]['CUDA_VISIBLE_DEVICES'] == '4,5,6,7,-1,2'
    with pytest.raises(ConfigError, match='5 workers need a GPU each, but there are 4: 4,5,6,7'):
        local.check_gpus(5)
    local.check_gpus(4)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
    assert {each['CUDA_VISIBLE_DEVICES'] for each in environments_of_two()} == {'-1'}


def test_a_mistake_that_all_workers_make_is_their_exit_code_and_shown_once(tmp_path):
    code, out, err = end(start('launch', 'run', '--workers=2', '--gin_file=no.gin', cwd=tmp_path))
    assert (code, out) == (2, '')
    assert err.count("There is no file 'no.gin'.") == 1
    assert not list(tmp_path.iterdir())
    assert 'Traceback' not in err


@pytest.mark.slow
def test_a_mistake_that_only_the_workers_find_is_told_once_and_leaves_nothing(tmp_path):
    mistake = '--gin.BATCH_SIZE=33'
    code, out, err = end(start('launch', 'run', '--workers=2', *RUN, mistake, cwd=tmp_path))
    assert code == 2
    assert (out + err).count('cannot be shared equally') == 1
    assert 'Traceback' not in out + err
    assert 'restart' not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_workers_end_with_the_bits_of_two_replicas_of_one_process(tmp_path):
    flags = [*RUN, '--gin.STEPS=12', '--gin.train.save_every=6']
    two = start('launch', 'run', '--workers=2', '--devices_per_worker=1', *flags, cwd=tmp_path)
    code, out, err = end(two)
    assert code == 0, err
    sha256 = re.search(r'state sha256: (\w+)', out)[1]
    order = re.search(r'sample order: (\w+)', out)[1]
    # The chief alone tells the result, once, and the others leave nothing behind.
    assert out.count('finished step 12') == 1
    assert 'ended' not in err
    run = tmp_path / 'run'
    assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == [
        'step-00000006',
        'step-00000012',
    ]
    assert (run / 'export' / '12' / 'saved_model.pb').exists()
    topology = json.loads((run / 'checkpoints/step-00000012/manifest.json').read_text())['topology']
    assert (topology['kind'], topology['num_workers'], topology['replicas']) == (
        'multi_worker', 2, 2,
    )  # fmt: skip
    assert not workers_of(tmp_path)

    # Kernels cut their work by the number of threads, and so do the bits.
    threads = environments_of_two()[0]['TF_NUM_INTRAOP_THREADS']
    one = [*flags, '--model_dir=one', '--mode=train']
    code, out, err = end(start('trainer', *one, cwd=tmp_path, TF_NUM_INTRAOP_THREADS=threads))
    assert code == 0, err
    assert re.search(r'state sha256: (\w+)', out)[1] == sha256
    assert re.search(r'sample order: (\w+)', out)[1] == order


BOMB = """
import json
import os
if json.loads(os.environ['TF_CONFIG'])['task']['index'] == 1:
    raise RuntimeError('the bomb of worker 1')
"""


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_job_and_its_log_is_shown(tmp_path):
    (tmp_path / 'bomb.py').write_text(BOMB)
    (tmp_path / 'bomb.gin').write_text("include 'runs/digits.gin'\nimport bomb\n")
    began = time.monotonic()
    job = start(
        'launch', 'run', '--workers=2', '--max_restarts=0', *RUN, '--gin_file=bomb.gin',
        '--gin.DEVICES=1',
        cwd=tmp_path,
    )  # fmt: skip
    code, _, err = end(job)
    assert code == 1
    assert 'phalanx: worker 1 ended with exit code 1\n' in err
    tail = [line for line in err.split('giving up')[1].splitlines() if '  worker 1: ' in line]
    assert tail[-1] == '  worker 1: RuntimeError: the bomb of worker 1'
    assert len(tail) <= 20
    # The other waited at the meeting, a minute long.
    assert time.monotonic() - began < 60
    assert not workers_of(tmp_path)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_job_can_be_run_again(tmp_path):
    flags = [
        'launch', 'run', '--workers=2', *RUN, '--gin.DEVICES=1', '--gin.train.log_every=1',
        '--gin.STEPS=100000', '--mode=train',
    ]  # fmt: skip
    job = start(*flags, cwd=tmp_path)
    log = tmp_path / 'run' / 'samples.tsv'
    try:
        while not (log.exists() and log.stat().st_size) and job.poll() is None:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        code, out, err = end(job)
    finally:
        for process in workers_of(tmp_path):
            process.kill()
    assert code == 75, err
    step = int(re.search(r'preempted: saved step (\d+) of 100000 after a signal', out)[1])
    assert step > 0
    (name,) = os.listdir(tmp_path / 'run' / 'checkpoints')
    assert name == f'step-{step:08d}'

    again = [flag for flag in flags if 'STEPS' not in flag]
    code, out, err = end(start(*again, f'--gin.STEPS={step + 2}', cwd=tmp_path))
    assert code == 0, err
    assert f'resumed at step {step}' in out
    assert f'finished step {step + 2}' in out
