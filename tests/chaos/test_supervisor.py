"""`phalanx run` brings a job to its end, with the bits of an undisturbed one, whatever happens."""

import json
import random
import sys
import time

import pytest

from tests.chaos.jobs import LONG, Job, bits, ledger, processes_of, slow

pytestmark = pytest.mark.chaos

# When a worker is killed: in a phase, or at any time. Each job has all of these, in random order.
MOMENTS = ('starting', 'compiling', 'evaluating', 'saving', 'any time')


def kill(job, attempt, moment):
    """Kills a random worker at a moment of an attempt; returns what the chief did then."""
    index = random.randrange(2)
    if moment == 'any time':
        end = time.monotonic() + random.uniform(0, 12)
        job.until(lambda: time.monotonic() > end)
    # Found before it is time: to look at all processes takes longer than a short phase.
    victim = job.worker(index)
    job.until(lambda: job.attempts() == attempt and moment in (job.moment(), 'any time'))
    if moment in ('starting', 'compiling'):
        time.sleep(random.uniform(0, 0.5))  # These last longer than that.
    found = job.moment()
    victim.kill()
    return found


@pytest.mark.parametrize('number', range(4 if LONG else 1))
def test_workers_killed_at_random_times_are_replaced(tmp_path, undisturbed_job, number):
    seed = random.randrange(10**6)
    random.seed(seed)
    moments, hit = random.sample(MOMENTS, len(MOMENTS)), []
    model_dir = tmp_path / 'run'
    with Job(model_dir, f'--max_restarts={len(moments)}', *slow(tmp_path)) as job:
        for attempt, moment in enumerate(moments, 1):
            hit.append(kill(job, attempt, moment))
            job.until(lambda attempt=attempt: job.attempts() > attempt)
        code, output = job.end()
    print(f'job {number}, seed {seed}, aimed at {moments}, hit {hit}', file=sys.stderr)
    assert code == 0, output
    assert [each for each in MOMENTS if each != 'any time' and each not in hit] == []
    assert len(ledger(model_dir, 'exit')) == job.attempts() - 1 == len(moments)
    assert not ledger(model_dir, 'stuck')
    assert bits(model_dir) == undisturbed_job


@pytest.mark.parametrize('number', range(20 if LONG else 2))
def test_a_job_that_nothing_happens_to_raises_no_alarm(tmp_path, undisturbed_job, number):
    model_dir = tmp_path / 'run'
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert job.attempts() == 1
    assert [each['event'] for each in ledger(model_dir)] == ['job', 'attempt', 'attempt_end', 'end']
    assert not processes_of(model_dir)
    assert bits(model_dir) == undisturbed_job


BROKEN = """
import json
import os

if json.loads(os.environ['TF_CONFIG'])['task']['index'] > 1 and os.path.exists('down'):
    raise RuntimeError('this device is down')
"""


def test_an_elastic_job_goes_on_with_fewer_workers_and_then_with_all(tmp_path):
    (tmp_path / 'broken.py').write_text(BROKEN)
    (tmp_path / 'broken.gin').write_text('import broken\n')
    plain = ('--gin_file=models/mlp.gin', '--gin_file=optim/sgd.gin', '--gin.LEARNING_RATE=0.01')
    plain += ('--gin.mlp.dropout=0.0', '--mode=train')
    straight, elastic = tmp_path / 'straight', tmp_path / 'elastic'
    # Of what is chaotic, rounding would make something else in so many steps.
    four = {'workers': 4, 'augmented': ()}
    with Job(straight, *plain, **four) as job:
        assert job.end()[0] == 0
    with Job(elastic, *plain, '--gin_file=broken.gin', '--elastic', **four) as job:
        saved = elastic / 'checkpoints' / 'step-00000200'
        job.until(saved.exists)
        (tmp_path / 'down').write_text('')
        job.worker(3).kill()
        job.until(lambda: job.phase('stepping', attempt=3))
        job.until((elastic / 'checkpoints' / 'step-00000600').exists)
        (tmp_path / 'down').unlink()
        job.worker(1).kill()
        code, output = job.end()
    assert code == 0, output
    assert [each['workers'] for each in ledger(elastic, 'attempt')] == [4, 4, 2, 4]
    assert 'going on with 2 workers instead of 4' in output
    assert bits(elastic)[1] == bits(straight)[1]
    losses = [
        float(json.loads(path.read_text())['metrics']['train/loss'])
        for path in (run / 'checkpoints/step-00000900/manifest.json' for run in (straight, elastic))
    ]
    assert abs(losses[0] - losses[1]) < 1e-5


def test_workers_do_not_outlive_a_launcher_that_is_killed(tmp_path, undisturbed_job):
    model_dir = tmp_path / 'run'
    with Job(model_dir) as job:
        job.until(lambda: job.phase('stepping'))
        job.process.kill()
        end = time.monotonic() + 10
        while processes_of(model_dir) and time.monotonic() < end:
            time.sleep(0.1)
        assert not processes_of(model_dir)
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    assert bits(model_dir) == undisturbed_job
