"""Sweeps, but for the trials themselves: the file, what is drawn, what is kept, what is shown."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from launch.__main__ import main
from launch.sweeps import book as books
from launch.sweeps import hparams, measured, report, search, stopping
from launch.sweeps.book import Book, Trial
from launch.sweeps.plan import Choice, Plan, Range, plain, read
from launch.sweeps.runner import Runner
from launch.sweeps.slots import Slot, slots
from trainer import gin_files
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

FILE = """
sweep.method = 'random'
sweep.trials = 40
sweep.metric = 'eval/accuracy'
sweep.mode = 'max'
sweep.seed = 7
sweep.parameters = {
    'LEARNING_RATE': ('log_uniform', 1e-4, 1e-1),
    'mlp.units': ('log_int', 8, 512),
    'mlp.blocks': ('int', 1, 3),
    'mlp.dropout': ('uniform', 0, 0.5),
    'OPTIMIZER': [@keras.optimizers.SGD, @keras.optimizers.Adam],
}
"""


def planned(tmp_path, text=FILE, **changes):
    if 'parameters' in changes:
        text = text.partition('sweep.parameters')[0]
    for name, value in changes.items():
        kept = [line for line in text.splitlines() if not line.startswith(f'sweep.{name} ')]
        text = '\n'.join([*kept, f'sweep.{name} = {value}'] if value else kept)
    (tmp_path / 'sweep.gin').write_text(text)
    return read(str(tmp_path / 'sweep.gin'))


def script(text='LEARNING_RATE = 0.1'):
    return gin_files.read([], [text])


# ---- The file.


def test_the_file_says_what_is_asked_for(tmp_path):
    plan = planned(tmp_path)
    assert (plan.method, plan.trials, plan.metric, plan.mode, plan.seed, plan.stop) == (
        'random',
        40,
        'eval/accuracy',
        'max',
        7,
        None,
    )
    assert plan.parameters == {
        'LEARNING_RATE': Range('log_uniform', 1e-4, 1e-1),
        'mlp.units': Range('log_int', 8, 512),
        'mlp.blocks': Range('int', 1, 3),
        'mlp.dropout': Range('uniform', 0.0, 0.5),
        'OPTIMIZER': Choice(('@keras.optimizers.SGD', '@keras.optimizers.Adam')),
    }
    assert plan.where.endswith('sweep.gin:7')


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'method': "'rndom'"}, r"'rndom' is none of grid, random, optuna\. Did you mean 'random'"),
        ({'mode': "'most'"}, "'most' is none of max, min"),
        ({'mode': ''}, 'sweep.mode is not set'),
        ({'metric': "'accuracy'"}, "must be one as 'eval/accuracy'"),
        ({'trials': '0'}, 'must be a whole number from 1 on'),
        ({'trials': ''}, 'how many trials shall random have'),
        ({'trails': '3'}, r"sweep\.trails is no setting .* Did you mean 'trials'"),
        ({'stop': "'mediam'"}, "Did you mean 'median'"),
        ({'stop': "'median'", 'metric': "'train/loss'"}, 'sweep.stop goes by evaluations'),
        ({'where': "'x'"}, 'is no setting of a sweep'),
        ({'method': "'grid'"}, 'Remove sweep.trials'),
        ({'method': "'grid'", 'trials': ''}, "'LEARNING_RATE' has a range"),
        ({'parameters': '[1]'}, 'not a dict'),
        ({'parameters': '{}'}, 'not a dict'),
        ({'parameters': "{'a b': [1]}"}, 'is no name of a parameter'),
        ({'parameters': "{'X = 1\\nY': [1]}"}, 'is no name of a parameter'),
        ({'parameters': "{'MODEL_DIR': ['a']}"}, 'has a directory of its own'),
        ({'parameters': "{'X': []}"}, 'is an empty list'),
        ({'parameters': "{'X': [1, 2, 1]}"}, 'holds 1 twice'),
        ({'parameters': "{'X': 3}"}, 'neither a list nor a range'),
        ({'parameters': "{'X': ('unifrom', 0, 1)}"}, "Did you mean 'uniform'"),
        ({'parameters': "{'X': ('uniform', 1, 1)}"}, 'from 1 to 1 is empty'),
        ({'parameters': "{'X': ('log_uniform', 0.0, 1)}"}, 'has no logarithm'),
        ({'parameters': "{'X': ('int', 0, 1.5)}"}, 'wants whole numbers'),
        ({'parameters': "{'X': ('int', False, True)}"}, 'wants whole numbers'),
        ({'parameters': "{'X': ('uniform', 0, 1e999)}"}, 'wants numbers'),
        ({'parameters': "{'X': ('uniform', '0', 1)}"}, 'wants numbers'),
    ],
)
def test_mistakes_are_told(tmp_path, changes, told):
    with pytest.raises(ConfigError, match=told):
        planned(tmp_path, **changes)


def test_what_does_not_belong_into_the_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r'sweep\.gin:1: BATCH_SIZE is no setting of a sweep'):
        planned(tmp_path, f'BATCH_SIZE = 3\n{FILE}')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('parameters', 'told'),
    [
        ("{'LEARNIN_RATE': [1.0]}", "7: LEARNIN_RATE is set.* Did you mean 'LEARNING_RATE'"),
        ("{'mlp.units': [16, '32']}", "7: mlp.units = '32' is of type str"),
        ("{'cnn.units': [8], 'MODEL': [@mlp, @cnn]}", '7: cnn.units has no effect'),
    ],
)
def test_what_a_trial_would_refuse_is_told_before_the_first(tmp_path, capfd, parameters, told):
    planned(tmp_path, parameters=parameters)
    flags = ['--gin_file=runs/digits_mlp.gin', f'--model_dir={tmp_path / "sweep"}']
    assert main(['sweep', f'--sweep_file={tmp_path / "sweep.gin"}', *flags]) == 2
    assert re.search(f'sweep.gin:{told}', capfd.readouterr().err)
    assert not list((tmp_path / 'sweep').glob('trial*'))


# ---- What is drawn.


def test_a_grid_is_all_combinations(tmp_path):
    plan = planned(tmp_path, method="'grid'", trials='', parameters="{'A': [1, 2], 'b.c': ['x']}")
    drawn = [search.draw(plan, number, ()) for number in range(1, plan.trials + 1)]
    assert drawn == [{'A': '1', 'b.c': "'x'"}, {'A': '2', 'b.c': "'x'"}]


def test_what_is_drawn_by_chance_is_a_function_of_seed_and_trial(tmp_path):
    plan = planned(tmp_path)
    first = [search.draw(plan, number, ()) for number in range(1, 41)]
    assert first == [search.draw(plan, number, ()) for number in range(1, 41)]
    assert len({json.dumps(each) for each in first}) == 40
    other = search.draw(planned(tmp_path, seed=8), 1, ())
    assert other != first[0]
    # Another parameter beside it changes nothing.
    fewer = planned(tmp_path, parameters="{'mlp.blocks': ('int', 1, 3)}")
    assert search.draw(fewer, 5, ())['mlp.blocks'] == first[4]['mlp.blocks']


def test_what_is_drawn_by_chance_fills_its_range(tmp_path):
    plan = planned(tmp_path)
    drawn = [search.draw(plan, number, ()) for number in range(1, 2001)]
    rates = [float(each['LEARNING_RATE']) for each in drawn]
    units = [int(each['mlp.units']) for each in drawn]
    assert 1e-4 <= min(rates) < 1.1e-4
    assert 0.9e-1 < max(rates) <= 1e-1
    # As many in each power of ten; a third is 667, give or take 21.
    assert 580 < sum(1e-3 <= rate < 1e-2 for rate in rates) < 750
    assert (min(units), max(units)) == (8, 512)
    assert 900 < sum(unit < 64 for unit in units) < 1100
    assert {each['mlp.blocks'] for each in drawn} == {'1', '2', '3'}
    assert {each['OPTIMIZER'] for each in drawn} == set(plan.parameters['OPTIMIZER'].values)
    assert all(0 <= float(each['mlp.dropout']) <= 0.5 for each in drawn)


def judged(plan, number, parameters):
    """A trial whose metric is best for 64 units, SGD and a rate of 0.01."""
    units, rate = int(parameters['mlp.units']), float(parameters['LEARNING_RATE'])
    value = -abs(math.log(units / 64)) - abs(math.log10(rate / 1e-2))
    value -= 3 * (parameters['OPTIMIZER'] != '@keras.optimizers.SGD')
    return Trial(number, parameters, 'finished', 10, value)


def test_optuna_learns_from_the_trials_before_and_goes_on_alike(tmp_path):
    pytest.importorskip('optuna')
    plan = planned(tmp_path, method="'optuna'")
    trials = []
    for number in range(1, plan.trials + 1):
        trials.append(judged(plan, number, search.draw(plan, number, trials)))
    early, late = (sum(t.value for t in part) / 10 for part in (trials[:10], trials[-10:]))
    assert late > early + 1.0
    # Nothing but the trials is kept: whoever has them draws the same.
    assert search.draw(plan, 31, trials[:30]) == trials[30].parameters
    assert len({json.dumps(dict(t.parameters)) for t in trials}) == len(trials)


def test_optuna_takes_trials_that_run_failed_were_stopped_or_lost_their_way(tmp_path):
    pytest.importorskip('optuna')
    plan = planned(tmp_path, method="'optuna'")
    trials = [
        Trial(number, search.draw(plan, number, ()), state, 5, value)
        for number, (state, value) in enumerate(
            [('running', None), ('failed', None), ('stopped', 0.3), ('finished', None)], 1
        )
    ]
    trials.append(judged(plan, 5, search.draw(plan, 5, trials)))
    drawn = search.draw(plan, 6, trials)
    assert drawn.keys() == plan.parameters.keys()
    assert drawn not in [trial.parameters for trial in trials]


def test_without_optuna_it_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ConfigError, match=r"pip install 'phalanx\[optuna\]'"):
        search.check(planned(tmp_path, method="'optuna'"))
    search.check(planned(tmp_path))


# ---- What is kept.


def test_a_sweep_goes_on_with_what_was_written(tmp_path):
    plan, book = planned(tmp_path), Book(tmp_path)
    book.begin(plan, script())
    trial = book.note(Trial(1, {'LEARNING_RATE': '0.1'}))
    book.note(trial, state='finished', value=0.5, step=7)
    again = Book(tmp_path)
    again.begin(plan, script())
    assert (
        again.trials == book.trials == {1: Trial(1, {'LEARNING_RATE': '0.1'}, 'finished', 7, 0.5)}
    )
    assert gin_files.load(str(again.config)).text == script().text


def test_more_trials_are_all_that_may_change(tmp_path):
    Book(tmp_path).begin(planned(tmp_path), script())
    Book(tmp_path).begin(planned(tmp_path, trials=50), script())
    with pytest.raises(ConfigError, match=r'begun with sweep\.trials = 50, but now there are 40'):
        Book(tmp_path).begin(planned(tmp_path), script())
    with pytest.raises(ConfigError, match=r'begun with sweep\.seed = 7, but now it is 8'):
        Book(tmp_path).begin(planned(tmp_path, seed=8, trials=50), script())
    with pytest.raises(ConfigError, match=r'The configuration .* has changed'):
        Book(tmp_path).begin(planned(tmp_path, trials=50), script('LEARNING_RATE = 0.2'))


def test_what_trials_are_compared_by_may_change_until_one_was_measured(tmp_path):
    Book(tmp_path).begin(planned(tmp_path, metric="'eval/acuracy'"), script())
    book = Book(tmp_path)
    book.begin(planned(tmp_path), script())
    assert book.plan['metric'] == 'eval/accuracy'
    book.note(Trial(1, {'LEARNING_RATE': '0.1'}, value=0.5))
    with pytest.raises(ConfigError, match=r"begun with sweep\.metric = 'eval/accuracy', but now"):
        Book(tmp_path).begin(planned(tmp_path, metric="'eval/loss'"), script())


def test_the_directory_of_a_run_and_a_damaged_book_are_refused(tmp_path):
    (tmp_path / 'ledger.jsonl').touch()
    with pytest.raises(ConfigError, match='holds a run'):
        Book(tmp_path).begin(planned(tmp_path), script())
    with pytest.raises(ConfigError, match=r'holds no sweep\.json'):
        Book(tmp_path).load()
    (tmp_path / books.NAME).write_text('{')
    with pytest.raises(ConfigError, match='is damaged'):
        Book(tmp_path).load()


# ---- Which trials are stopped.


def phases(directory, attempt, *lines):
    logs = ModelDir(directory).attempt(attempt)
    logs.mkdir(parents=True)
    text = [json.dumps({'time': 0, 'phase': 'stepping', **line}) for line in lines]
    (logs / 'worker-0.phases.jsonl').write_text('\n'.join([*text, '{"time": 1, "eval/a']))


def test_evaluations_are_read_over_all_attempts(tmp_path):
    first = [{'step': 1}, {'step': 10, 'eval/a': 0.1}, {'step': 20, 'eval/a': 0.2}]
    phases(tmp_path, 1, *first)
    # Training went back, and came to something else.
    phases(tmp_path, 2, {'step': 20, 'eval/a': 0.3}, {'step': 30, 'eval/a': math.nan})
    found = measured.evaluations(ModelDir(tmp_path), 'eval/a')
    assert list(found) == [10, 20, 30]
    assert [found[10], found[20]] == [0.1, 0.3]
    assert math.isnan(found[30])


PLAN = Plan({'X': Choice(('1',))}, 'eval/a', 'max', stop='median')
OTHERS = [{10: 0.2, 20: 0.4}, {10: 0.4, 20: 0.6}, {10: 0.6, 20: 0.8}]


def test_who_is_worse_than_the_median_of_others_is_stopped():
    # Their means up to step 10 are 0.2, 0.4, 0.6, and up to step 20 0.3, 0.5, 0.7.
    assert stopping.median_rule(PLAN, {10: 0.41}, OTHERS) == ''
    assert stopping.median_rule(PLAN, {10: 0.4}, OTHERS) == ''
    said = stopping.median_rule(PLAN, {10: 0.39}, OTHERS)
    assert said == 'at step 10 its best eval/a was 0.39, and the median of others 0.4'
    # By the best that it has reached.
    assert stopping.median_rule(PLAN, {10: 0.51, 20: 0.1}, OTHERS) == ''
    assert stopping.median_rule(PLAN, {10: 0.45, 20: 0.49}, OTHERS)


def test_the_rule_waits_for_three_trials_and_for_the_step_it_is_told():
    assert stopping.median_rule(PLAN, {10: 0.0}, OTHERS[:2]) == ''
    assert stopping.median_rule(PLAN, {5: 0.0}, OTHERS) == ''
    assert stopping.median_rule(PLAN, {}, OTHERS) == ''
    late = Plan({}, 'eval/a', 'max', stop='median', stop_from=15)
    assert stopping.median_rule(late, {10: 0.0}, OTHERS) == ''
    assert stopping.median_rule(late, {20: 0.0}, OTHERS)


def test_the_rule_knows_losses_and_what_is_not_finite():
    losses = Plan({}, 'eval/a', 'min', stop='median')
    assert stopping.median_rule(losses, {10: 0.39}, OTHERS) == ''
    assert stopping.median_rule(losses, {10: 0.41}, OTHERS)
    assert stopping.median_rule(PLAN, {10: math.nan}, OTHERS)
    assert stopping.median_rule(PLAN, {10: 0.5, 20: math.nan}, OTHERS) == ''


def test_what_was_to_be_stopped_is_not_begun_again(tmp_path):
    plan = planned(tmp_path, trials=2)
    book = Book(tmp_path)
    book.begin(plan, script())
    book.note(Trial(1, {}, 'finished', 10, 0.5))
    # The sweep was killed when it had decided, and before the trial had ended.
    trial = book.note(Trial(2, {}, 'running', 10, 0.1, stop_at=10, reason='worse'))
    book.dirs(trial).path.mkdir()
    said = []
    assert Runner(plan, book, [], slots(1, 1), said.append).run() == 0
    assert book.trials[2] == Trial(2, {}, 'stopped', 10, 0.1, 10, reason='worse')
    assert said == []


def test_a_sweep_whose_trials_have_all_failed_has_failed(tmp_path):
    plan, book = planned(tmp_path, trials=2), Book(tmp_path)
    book.begin(plan, script())
    for number in (1, 2):
        book.note(Trial(number, {}, 'failed', code=2))
    assert Runner(plan, book, [], slots(1, 1), print).run() == 1


# ---- Where trials run.


def test_cores_and_gpus_are_divided(monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,3,4')
    assert len(slots(None, 1)) == 5
    assert [slot.gpus for slot in slots(None, 2)] == [('0', '1'), ('2', '3')]
    with pytest.raises(ConfigError, match=r'--parallel=3 trials need 2 GPU.* Use --parallel=2'):
        slots(3, 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
    assert slots(None, 1) == [Slot(frozenset(cores), None)]
    found = slots(len(cores), 1)
    assert [sorted(slot.cores) for slot in found] == [[core] for core in cores]
    assert {slot.gpus for slot in found} == {None}
    # More trials than cores share them.
    assert all(len(slot.cores) == 1 for slot in slots(len(cores) + 1, 1))


def test_what_is_started_in_a_slot_has_its_cores_and_gpus():
    before = os.sched_getaffinity(0)
    core = min(before)
    with Slot(frozenset([core]), ('3',)).taken() as variables:
        code = "import os; print(os.sched_getaffinity(0), os.environ['CUDA_VISIBLE_DEVICES'])"
        said = subprocess.check_output([sys.executable, '-c', code], env=variables, text=True)
    assert said == f'{{{core}}} 3\n'
    assert os.sched_getaffinity(0) == before


# ---- What is shown.


@pytest.fixture
def book(tmp_path):
    parameters = "{'RATE': ('log_uniform', 1e-4, 1.0), 'UNITS': [8, 16], 'B': [True, False]}"
    plan, made = planned(tmp_path, parameters=parameters), Book(tmp_path)
    made.begin(plan, script())
    hparams.write_experiment(tmp_path, plan)
    ends = [('finished', 0.5), ('failed', None), ('stopped', 0.1), ('finished', 0.9)]
    for number, (state, value) in enumerate(ends, 1):
        values = {'RATE': f'{10.0**-number}', 'UNITS': '8', 'B': str(number > 2)}
        reason = 'no space' if state == 'failed' else ''
        made.note(Trial(number, values, state, 10, value, reason=reason))
        directory = tmp_path / made.trials[number].name
        directory.mkdir()
        hparams.write_start(directory, values)
        hparams.write_start(directory, values)  # As a sweep that goes on does.
        hparams.write_end(directory, state)
    return made


def test_the_table_has_the_best_first(book):
    console = Console(width=200, record=True, file=open(os.devnull, 'w'))  # noqa: SIM115
    report.show(book, console)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ['trial', 'RATE', 'UNITS', 'B', 'eval/accuracy', 'step', 'state']
    assert [line.split()[0] for line in lines[1:5]] == [f'trial-00{n}' for n in (4, 1, 2, 3)]
    assert '0.9000' in lines[1]
    assert lines[3].split()[-1] == 'failed'
    assert lines[5:] == ['trial-002: no space', '4 of 40 trials: 1 failed, 2 finished, 1 stopped']


def test_a_trial_that_will_go_on_is_not_said_to_run(book):
    book.note(Trial(5, {'RATE': '0.1', 'UNITS': '8', 'B': 'True'}, 'running', 10, 0.3, code=75))
    book.note(Trial(6, {'RATE': '0.1', 'UNITS': '8', 'B': 'True'}, 'running', 10, 0.3))
    console = Console(width=200, record=True, file=open(os.devnull, 'w'))  # noqa: SIM115
    report.show(book, console)
    lines = console.export_text().splitlines()
    assert [line.split()[-1] for line in lines[5:7]] == ['interrupted', 'running']


def test_the_plot_has_a_part_for_each_parameter(book, tmp_path):
    image = pytest.importorskip('matplotlib.image')
    report.save_png(book, tmp_path / 'sweep.png')
    height, width, _ = image.imread(tmp_path / 'sweep.png').shape
    assert (height, width) == (720, 1440)  # Four parts: two rows of three.


def test_tensorboard_finds_parameters_metric_and_ends(book, tmp_path):
    """By the code that answers its HParams page, in a process without TensorFlow."""
    code = """
import json, sys, types
sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')  # How it leaves TensorFlow out.
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin

multiplexer = plugin_event_multiplexer.EventMultiplexer()
multiplexer.AddRunsFromDirectory(sys.argv[1])
multiplexer.Reload()
provider = data_provider.MultiplexerDataProvider(multiplexer, sys.argv[1])
context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
request, experiment_id = RequestContext(), 'e'
metadata = context.hparams_metadata(request, experiment_id)
experiment = context.experiment_from_metadata(
    request, experiment_id, True, metadata, context.hparams_from_data_provider(request, 'e', 9)
)
asked = api_pb2.ListSessionGroupsRequest(
    start_index=0,
    slice_size=100,
    allowed_statuses=[1, 2, 3, 0],
    col_params=[api_pb2.ColParams(metric=experiment.metric_infos[0].name)],
)
groups = list_session_groups.Handler(
    request_context=request,
    backend_context=context,
    experiment_id=experiment_id,
    request=asked,
).run().session_groups
print(json.dumps({
    'types': {i.name: i.type for i in experiment.hparam_infos},
    'metrics': [[m.name.group, m.name.tag] for m in experiment.metric_infos],
    'trials': {
        s.name: [
            {n: getattr(v, v.WhichOneof('kind')) for n, v in g.hparams.items()},
            s.status,
        ]
        for g in groups for s in g.sessions
    },
    'tensorflow': 'tensorflow' in sys.modules,
}))
"""
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # String, bool and float64 are 1, 2 and 3; unknown, success, failure, running 0 to 3.
    assert found['types'] == {'RATE': 3, 'UNITS': 3, 'B': 2}
    assert found['metrics'] == [['eval', 'accuracy']]
    assert found['trials'] == {
        'trial-001': [{'RATE': 0.1, 'UNITS': 8.0, 'B': False}, 1],
        'trial-002': [{'RATE': 0.01, 'UNITS': 8.0, 'B': False}, 2],
        'trial-003': [{'RATE': 0.001, 'UNITS': 8.0, 'B': True}, 1],
        'trial-004': [{'RATE': 0.0001, 'UNITS': 8.0, 'B': True}, 1],
    }
    assert not found['tensorflow']


def test_values_are_shown_as_what_they_are():
    assert [plain(text) for text in ('1', '0.5', 'True', "'x'", '@f', '(1, 2)', 'None')] == [
        1,
        0.5,
        True,
        'x',
        '@f',
        '(1, 2)',
        'None',
    ]
