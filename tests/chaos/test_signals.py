"""A signal, to whomever and whenever, ends a job after it has saved, and the job goes on."""

import shutil
import signal
import time

import pytest

from tests.chaos.jobs import LONG, Job, bits, ledger, processes_of, slow

pytestmark = pytest.mark.chaos

PHASES = ('starting', 'restoring', 'compiling', 'stepping', 'evaluating', 'saving', 'exporting')
RECEIVERS = ('launcher', 'chief', 'other worker')
# Those in which something is saved that was not before.
BEFORE_THE_END = PHASES[1:-1]


def cases():
    """All phases and receivers; in the short form one receiver of each phase."""
    for number, phase in enumerate(PHASES):
        for whom in RECEIVERS if LONG else [RECEIVERS[number % len(RECEIVERS)]]:
            yield phase, whom


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    """The directory of a job that has come to step 200."""
    model_dir = tmp_path_factory.mktemp('begun') / 'run'
    with Job(model_dir, '--mode=train', '--gin.train.max_steps=200') as job:
        code, output = job.end()
    assert code == 0, output
    return model_dir


@pytest.mark.parametrize(('phase', 'whom'), [*cases()])
def test_a_signal_in_any_phase_ends_the_job_and_it_goes_on(
    tmp_path, undisturbed_job, begun, phase, whom
):
    model_dir = tmp_path / 'run'
    if phase == 'restoring':
        shutil.copytree(begun, model_dir, ignore=shutil.ignore_patterns('logs', 'ledger.jsonl'))
    short = phase in ('restoring', 'evaluating', 'saving')
    with Job(model_dir, *(slow(tmp_path) if short else ())) as job:
        # Found before it is time: to look at all processes takes longer than a short phase.
        index = RECEIVERS.index(whom) - 1
        target = job.process if whom == 'launcher' else job.worker(index)
        job.until(lambda: job.moment() == phase)
        began = time.monotonic()
        target.send_signal(signal.SIGTERM)
        code, output = job.end(100)
    assert code == 75, output
    assert time.monotonic() - began < 60
    assert not processes_of(model_dir)
    assert not ledger(model_dir, 'exit')
    saved = ledger(model_dir, 'attempt_end')[-1]['step']
    if phase in BEFORE_THE_END:
        assert f'preempted: saved step {saved} of 900' in output
        assert saved > (200 if phase == 'restoring' else 0)
    with Job(model_dir) as job:
        code, output = job.end()
    assert code == 0, output
    # No step is lost.
    assert ledger(model_dir, 'attempt')[-1]['step'] == saved
    assert f'resumed at step {saved} from ' in output or not saved
    assert (model_dir / 'export' / '900' / 'saved_model.pb').exists()
    assert bits(model_dir) == undisturbed_job
