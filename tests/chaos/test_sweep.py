"""A sweep of real runs that is killed, and goes on."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from absl import flags as absl_flags

from launch import asked
from launch.ledger import Ledger
from launch.sweeps.book import Book, Trial
from launch.sweeps.plan import read as read_plan
from launch.sweeps.search import draw
from tests.chaos.jobs import DEADLINE_SECONDS, processes_of
from tests.processes import environment
from trainer.model_dir import ModelDir

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

# One of the four cannot share its batch among two replicas.
FILE = """
sweep.method = 'grid'
sweep.metric = 'train/accuracy'
sweep.mode = 'max'
sweep.parameters = {'LEARNING_RATE': [0.05, 0.0005], 'BATCH_SIZE': [50, 51]}
"""
FLAGS = [
    '--sweep_file=sweep.gin',
    '--parallel=2',
    '--gin_file=runs/digits_mlp.gin',
    '--gin.STEPS=400',
    '--gin.mlp.units=16',
    '--gin.train.save_every=20',
    '--max_restarts=0',
    '--mode=train',
]
# Of a sweep, all its trials together.
SWEEP_SECONDS = 3 * DEADLINE_SECONDS
HPARAMS = """
import json, sys, types
sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

multiplexer = plugin_event_multiplexer.EventMultiplexer()
multiplexer.AddRunsFromDirectory(sys.argv[1])
multiplexer.Reload()
provider = data_provider.MultiplexerDataProvider(multiplexer, sys.argv[1])
asked = api_pb2.ListSessionGroupsRequest(
    start_index=0,
    slice_size=100,
    allowed_statuses=[0, 1, 2, 3],
    col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(group='train', tag='accuracy'))],
)
groups = list_session_groups.Handler(
    request_context=RequestContext(),
    backend_context=backend_context.Context(base_plugin.TBContext(data_provider=provider)),
    experiment_id='e',
    request=asked,
).run().session_groups
print(json.dumps({s.name: [v.value for v in s.metric_values] for g in groups for s in g.sessions}))
"""


def start(directory, flags=FLAGS):
    command = [sys.executable, '-m', 'launch', 'sweep', *flags, f'--model_dir={directory}']
    with open(directory.parent / 'said', 'a') as said:
        return subprocess.Popen(
            command, cwd=directory.parent, env=environment(), stdout=said, stderr=said
        )


def trials(directory):
    content = json.loads((directory / 'sweep.json').read_text())
    return {trial['number']: trial for trial in content['trials']}


def attempts(model_dir):
    ledger = Ledger(model_dir / 'ledger.jsonl').read()
    return [each for each in ledger if each['event'] == 'attempt']


def until(condition, process):
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, 'it has ended'
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(0.1)


def test_a_killed_sweep_goes_on_and_one_failure_does_not_end_it(tmp_path):
    (tmp_path / 'sweep.gin').write_text(FILE)
    directory = tmp_path / 'sweep'
    first = start(directory)
    try:
        # The first trial has saved something.
        checkpoints = directory / 'trial-001' / 'checkpoints'
        until(lambda: any(checkpoints.glob('step-*/manifest.json')), first)
        before = trials(directory)
        second = start(directory)
        assert second.wait(DEADLINE_SECONDS) == 2
        assert 'is in use by process' in (tmp_path / 'said').read_text()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # Nothing is left of it.
    _, alive = psutil.wait_procs(processes_of(directory), timeout=30)
    assert not alive
    assert before[1]['state'] == 'running'

    # Ctrl-C has all that runs save and end.
    interrupted = start(directory)
    try:
        until(lambda: len(attempts(directory / 'trial-001')) > 1, interrupted)
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(DEADLINE_SECONDS) == 75, (tmp_path / 'said').read_text()
    finally:
        interrupted.kill()
        interrupted.wait()
    assert trials(directory)[1]['state'] == 'running'

    again = start(directory)
    try:
        assert again.wait(SWEEP_SECONDS) == 0, (tmp_path / 'said').read_text()
    finally:
        again.kill()
        again.wait()
    found = trials(directory)
    assert [found[n]['state'] for n in range(1, 5)] == ['finished', 'failed', 'finished', 'failed']
    assert 'BATCH_SIZE' in found[2]['reason'] or 'batch' in found[2]['reason']
    assert all(found[n]['parameters'] == before[n]['parameters'] for n in before)
    assert found[1]['value'] > 0.8 > found[3]['value']
    assert found[1]['step'] == 400
    # What the first trial had done was not done again.
    steps = [each['step'] for each in attempts(directory / 'trial-001')]
    assert (len(steps), steps[0]) == (3, 0)
    assert steps[1] >= 20

    # What has ended is not run again, and the table is shown.
    third = start(directory)
    assert third.wait(DEADLINE_SECONDS) == 0
    assert trials(directory) == found
    said = (tmp_path / 'said').read_text().splitlines()
    table = [line.split()[0] for line in said if line.startswith('trial-') and '  ' in line]
    assert table[-4:] == ['trial-001', 'trial-003', 'trial-002', 'trial-004']

    done = subprocess.run(
        [sys.executable, '-c', HPARAMS, str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown['trial-001'] == [pytest.approx(found[1]['value'], abs=1e-6)]
    assert shown['trial-003'] == [pytest.approx(found[3]['value'], abs=1e-6)]


def test_a_trial_that_does_worse_than_others_saves_and_is_stopped(tmp_path):
    text = (
        FILE.replace('grid', 'random')
        .replace('train/', 'eval/')
        .replace("'BATCH_SIZE': [50, 51]", "'SEED': [0, 1, 2, 3]")
    )
    (tmp_path / 'sweep.gin').write_text(
        f"{text.replace('0.05, 0.0005', '1e-6')}sweep.trials = 4\nsweep.stop = 'median'\n"
    )
    flags = [each for each in FLAGS if not re.search('STEPS|parallel|mode', each)]
    # It would take an hour.
    flags += ['--gin.STEPS=1000000', '--gin.train.eval_every=40']
    directory = tmp_path / 'sweep'
    directory.mkdir()
    # Three others have finished, each with nine of ten right at step 40.
    plan = read_plan(str(tmp_path / 'sweep.gin'))
    job = asked_for([*flags, f'--model_dir={directory}'])
    book = Book(directory)
    book.begin(plan, job.script)
    for number in (1, 2, 3):
        trial = book.note(Trial(number, draw(plan, number, ()), 'finished', 40, 0.9))
        logs = book.dirs(trial).attempt(1)
        logs.mkdir(parents=True)
        line = {'time': 0, 'phase': 'stepping', 'step': 40, 'eval/accuracy': 0.9}
        (logs / 'worker-0.phases.jsonl').write_text(json.dumps(line) + '\n')

    process = start(directory, flags)
    try:
        assert process.wait(DEADLINE_SECONDS) == 0, (tmp_path / 'said').read_text()
    finally:
        process.kill()
        process.wait()
    found = trials(directory)[4]
    assert (found['state'], found['code']) == ('stopped', 75)
    assert found['value'] < 0.9
    assert found['stop_at'] >= 40
    assert ModelDir(directory / 'trial-004').newest_step() >= found['stop_at']
    assert 'the median of others 0.9' in found['reason']


def test_a_metric_that_nothing_measures_ends_the_sweep_early_and_can_be_mended(tmp_path):
    directory = tmp_path / 'sweep'
    flags = [each.replace('400', '40') for each in FLAGS]
    codes = []
    for metric in ('train/acuracy', 'train/accuracy'):
        text = FILE.replace('train/accuracy', metric).replace('50, 51', '50')
        (tmp_path / 'sweep.gin').write_text(text.replace('0.05, 0.0005', '0.05'))
        process = start(directory, flags)
        codes.append(process.wait(DEADLINE_SECONDS))
        if len(codes) == 1:
            assert trials(directory)[1]['state'] == 'running'
            assert not psutil.wait_procs(processes_of(directory), timeout=30)[1]
    said = (tmp_path / 'said').read_text()
    assert codes == [2, 0], said
    assert (
        "phalanx: sweep.metric is 'train/acuracy', which trial-001 does not measure. Did you "
        "mean 'train/accuracy'? It measures train/loss, train/accuracy, train/gradient_norm."
    ) in said
    assert trials(directory)[1]['value'] > 0


def asked_for(flags):
    values = absl_flags.FlagValues()
    asked.define(values)
    absl_flags.DEFINE_string('sweep_file', None, '', flag_values=values)
    return asked.read(values, flags)
