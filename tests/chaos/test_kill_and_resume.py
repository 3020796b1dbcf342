"""A run that is killed again and again ends with the bits of one that never was."""

import json
import random
import re
import sys
import time

import pytest

from tests.processes import finish, run_workers, start_workers

pytestmark = pytest.mark.chaos

STEPS = 120
# Dropout and batch normalisation are in the model; small intervals give the killer many chances.
FLAGS = [
    '-m',
    'trainer',
    '--gin_file=runs/digits.gin',
    f'--gin.STEPS={STEPS}',
    '--gin.AUGMENT=@random_shift',
    '--gin.random_shift.max_pixels=1',
    '--gin.train.log_every=15',
    '--gin.train.save_every=15',
    '--gin.train.eval_every=30',
    '--gin.train.sample_log=True',
    '--gin.meet.deadline_seconds=15',
]
# One worker of two devices, or two workers of one: the same two replicas.
TOPOLOGIES = {'2 workers': (2, 1), '2 replicas': (1, 2)}


def command(model_dir, devices):
    return [*FLAGS, f'--gin.DEVICES={devices}', f'--model_dir={model_dir}']


def appears(directory, pattern):
    return lambda: any(directory.glob(pattern))


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def said(process_log, words):
    return lambda: words in process_log.read_text(errors='replace')


def moments(model_dir, log):
    """Name -> a function that tells when that moment has come."""
    return {
        'start-up': after(random.uniform(0.5, 4.0)),
        'a step': said(log, 'step 15/'),
        'a save': appears(model_dir / 'checkpoints', '.tmp-step-*'),
        'an evaluation': said(log, 'step 90/'),
        'the export': appears(model_dir / 'export', '.tmp-*'),
    }


def run_and_kill(model_dir, workers, devices, moment, log):
    """Starts a job, kills one worker at a moment, sees the rest end; returns whether it hit."""
    with open(log, 'w') as output:
        processes = start_workers(command(model_dir, devices), workers, stdout=output)
    has_come = moments(model_dir, log)[moment]
    try:
        while not (hit := has_come()) and processes[0].poll() is None:
            time.sleep(0.0005)
        # The chief is the one that saves and exports.
        victim = 0 if moment in ('a save', 'the export') else random.randrange(workers)
        processes[victim].kill()
    finally:
        deadline = time.monotonic() + 30
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = [(p.kill(), p.wait())[1] for p in processes]
    assert hit, f'the run ended before {moment}: {log.read_text()[-2000:]}'
    assert all(codes), f'a worker took no notice of a killed one: {codes}'


def final(model_dir):
    manifest = json.loads(
        (model_dir / 'checkpoints' / f'step-{STEPS:08d}' / 'manifest.json').read_text()
    )
    return manifest['state_sha256'], (model_dir / 'samples.tsv').read_bytes()


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Topology -> (state_sha256, sample log) of a run to the end."""
    found = {}
    for name, (workers, devices) in TOPOLOGIES.items():
        model_dir = tmp_path_factory.mktemp('undisturbed')
        outputs = run_workers(command(model_dir, devices), workers)
        found[name] = final(model_dir)
        assert re.search(r'state sha256: (\w+)', outputs[0])[1] == found[name][0]
    return found


def test_two_replicas_end_with_the_same_bits_in_one_process_and_in_two(undisturbed):
    assert undisturbed['2 workers'] == undisturbed['2 replicas']


def test_every_example_is_read_once_in_each_epoch(undisturbed):
    lines = undisturbed['2 workers'][1].decode().splitlines()
    assert [int(line.split('\t')[0]) for line in lines] == list(range(STEPS))
    ids = [int(i) for line in lines for i in line.split('\t')[1].split()]
    for epoch in range(len(ids) // 1500):
        assert sorted(ids[epoch * 1500 : (epoch + 1) * 1500]) == list(range(1500))


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_killed_at_five_moments_a_run_ends_with_the_bits_of_an_undisturbed_one(
    topology, undisturbed, tmp_path
):
    seed = random.randrange(10**6)
    random.seed(seed)
    print(f'seed {seed}', file=sys.stderr)
    workers, devices = TOPOLOGIES[topology]
    model_dir = tmp_path / 'run'
    for moment in ('start-up', 'a step', 'a save', 'an evaluation', 'the export'):
        run_and_kill(model_dir, workers, devices, moment, tmp_path / 'log')
    ended = finish(start_workers(command(model_dir, devices), workers))
    assert [code for code, _ in ended] == [0] * workers, ended
    assert final(model_dir) == undisturbed[topology]
    assert (model_dir / 'export' / str(STEPS) / 'saved_model.pb').exists()
    assert not list(model_dir.rglob('.tmp-*'))
