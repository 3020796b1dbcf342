"""`train` through its Python API: what a run leaves behind, and how it goes on after any end."""

import functools
import json
import os
import re
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from trainer.checkpoint import Checkpoints, Keep
from trainer.data.batch import Data
from trainer.divergence import Divergence
from trainer.errors import ConfigError, Diverged, Preempted
from trainer.stop import StopRequest

PACE = {'steps_per_second', 'examples_per_second', 'input_wait'}


def steps(model_dir):
    return Checkpoints(model_dir / 'checkpoints', writer=False).steps()


def manifest(model_dir, step):
    path = model_dir / 'checkpoints' / f'step-{step:08d}' / 'manifest.json'
    return json.loads(path.read_text())


def curves(model_dir):
    """All points that repeat: neither the pace nor the text of the configuration."""
    return {
        (part, tag): values
        for part in ('train', 'eval')
        for tag, values in tiny.points(model_dir / part).items()
        if tag not in PACE and not tag.startswith('config')
    }


def assert_increasing(model_dir):
    for part in ('train', 'eval'):
        for tag, values in tiny.points(model_dir / part).items():
            seen = [step for step, _ in values]
            assert seen == sorted(set(seen)), (part, tag)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope='module')
def runs(make_strategy, tmp_path_factory):
    """A function: number of replicas -> (strategy, directory, result) of an undisturbed run."""

    @functools.cache
    def run(replicas):
        strategy, model_dir = make_strategy(replicas), tmp_path_factory.mktemp('undisturbed')
        result = tiny.run(strategy, model_dir, sample_log=True, histograms_every=12)
        return strategy, model_dir, result

    return run


@pytest.fixture(params=[1, 2], ids='{} replicas'.format)
def undisturbed(request, runs):
    """What `runs` gives, for one replica and for two."""
    return runs(request.param)


@pytest.fixture
def copy(runs, tmp_path):
    """(strategy, a copy of an undisturbed run's directory, its result)."""
    strategy, model_dir, result = runs(1)
    return strategy, shutil.copytree(model_dir, tmp_path / 'run'), result


@pytest.fixture
def one(make_strategy):
    return make_strategy(1)


def test_a_run_stopped_at_an_odd_step_and_resumed_ends_with_the_bits_of_one_that_was_not(
    undisturbed, tmp_path
):
    strategy, model_dir, whole = undisturbed
    first = tiny.run(strategy, tmp_path, sample_log=True, max_steps=13)
    assert first.step == 13
    last = tiny.run(strategy, tmp_path, sample_log=True)

    assert last.step == whole.step == tiny.STEPS
    assert last.state_sha256 == whole.state_sha256 != first.state_sha256
    assert last.sample_sha256 == whole.sample_sha256
    assert last.metrics == whole.metrics
    # Intervals count from the start of the run and not from that of the process.
    assert steps(model_dir) == [12, 24, 36, 40]
    assert steps(tmp_path) == [12, 13, 24, 36, 40]
    evaluated = tiny.points(tmp_path / 'eval')['loss']
    assert [step for step, _ in evaluated] == [6, 12, 13, 18, 24, 30, 36, 40]
    assert [p for p in evaluated if p[0] != 13] == tiny.points(model_dir / 'eval')['loss']
    assert_increasing(tmp_path)


def test_the_curves_of_a_run_killed_beyond_its_checkpoint_are_those_of_an_undisturbed_one(
    runs, tmp_path
):
    strategy, model_dir, whole = runs(1)
    tiny.run(strategy, tmp_path, sample_log=True, histograms_every=12, max_steps=23)
    # What a kill at step 23 leaves: files that are ahead of the newest checkpoint.
    shutil.rmtree(tmp_path / 'checkpoints' / 'step-00000023')
    assert tiny.points(tmp_path / 'train')['loss'][-1][0] == 23

    last = tiny.run(strategy, tmp_path, sample_log=True, histograms_every=12)
    assert last.state_sha256 == whole.state_sha256
    assert_increasing(tmp_path)
    expected = curves(model_dir)
    assert {tag for _, tag in expected} > {'loss', 'accuracy', 'learning_rate', 'gradient_norm'}
    assert curves(tmp_path) == expected
    assert (tmp_path / 'samples.tsv').read_bytes() == (model_dir / 'samples.tsv').read_bytes()


def test_every_epoch_reads_every_example_once(undisturbed):
    _, model_dir, _ = undisturbed
    lines = [line.split('\t') for line in (model_dir / 'samples.tsv').read_text().splitlines()]
    assert [int(step) for step, _ in lines] == list(range(tiny.STEPS))
    ids = [int(i) for _, row in lines for i in row.split()]
    for epoch in range(len(ids) // 30):
        assert sorted(ids[30 * epoch : 30 * epoch + 30]) == list(range(30))


def test_a_finished_run_that_is_started_again_trains_nothing(copy):
    strategy, model_dir, result = copy
    before = {p: p.stat().st_mtime_ns for p in (model_dir / 'checkpoints').rglob('*')}
    points = curves(model_dir)
    again = tiny.run(strategy, model_dir, sample_log=True, histograms_every=12)
    assert (again.step, again.state_sha256) == (result.step, result.state_sha256)
    assert (again.metrics, again.sample_sha256) == (result.metrics, result.sample_sha256)
    assert again.checkpoint == model_dir / 'checkpoints' / 'step-00000040'
    assert {p: p.stat().st_mtime_ns for p in (model_dir / 'checkpoints').rglob('*')} == before
    assert curves(model_dir) == points


def test_more_steps_later_go_on_where_the_run_ended(copy):
    strategy, model_dir, _ = copy
    result = tiny.run(strategy, model_dir, steps=44)
    assert result.step == 44
    assert steps(model_dir) == [12, 24, 36, 40, 44]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_leads_to_the_same_bits(copy):
    strategy, model_dir, result = copy
    flip_bit(model_dir / 'checkpoints' / 'step-00000040' / 'state.data-00000-of-00001')
    again = tiny.run(strategy, model_dir)
    assert again.state_sha256 == result.state_sha256
    assert steps(model_dir) == [12, 24, 36, 40]
    assert os.listdir(model_dir / 'checkpoints' / 'quarantine') == ['step-00000040']


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(copy):
    strategy, model_dir, _ = copy
    for step in steps(model_dir):
        flip_bit(model_dir / 'checkpoints' / f'step-{step:08d}' / 'manifest.json')
    names = 'step-00000012, step-00000024, step-00000036, step-00000040'
    # Twice: what was moved to quarantine was a run too.
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            tiny.run(strategy, model_dir)
        assert raised.value.message == (
            f"'{model_dir}/checkpoints' holds no checkpoint that can be used, only damaged ones "
            f'({names}), and a run that had come that far is not begun again at step 0 by '
            'accident. To begin again, use another model_dir or remove this folder.'
        )


def test_the_manifest_records_what_the_result_depends_on(undisturbed):
    strategy, model_dir, result = undisturbed
    record = manifest(model_dir, 40)
    data = tiny.train_data().source
    assert record['step'] == record['last_step'] == 40
    assert record['state_sha256'] == result.state_sha256
    assert record['metrics'] == result.metrics
    assert record['seed'] == 3
    assert record['global_batch_size'] == tiny.BATCH
    assert (record['num_examples'], record['data_fingerprint']) == (30, data.fingerprint)
    assert re.fullmatch('[0-9a-f]{64}', record['config_sha256'])
    assert record['topology']['replicas'] == strategy.num_replicas_in_sync
    assert record['versions']['tensorflow'] == tf.__version__
    assert record['num_parameters'] == 16 * 8 + 8 + 2 * 8 + 8 * 3 + 3
    files = model_dir / 'checkpoints' / 'step-00000040'
    assert {name: entry['size'] for name, entry in record['files'].items()} == {
        p.name: p.stat().st_size for p in files.iterdir() if p.name != 'manifest.json'
    }


def test_the_model_learns(undisturbed):
    _, model_dir, result = undisturbed
    assert result.metrics['eval/accuracy'] > 0.6
    assert set(result.metrics) == {
        'train/loss', 'train/gradient_norm', 'train/accuracy', 'eval/loss', 'eval/accuracy',
    }  # fmt: skip
    rates = dict(tiny.points(model_dir / 'train')['learning_rate'])
    assert rates[4] > rates[20] > rates[40] == 0


def test_another_global_batch_is_refused_with_both_values_unless_it_is_allowed(copy):
    strategy, model_dir, _ = copy
    with pytest.raises(ConfigError) as raised:
        tiny.run(strategy, model_dir, batch_size=4, steps=42)
    assert raised.value.message == (
        'The checkpoint of step 40 was trained with global_batch_size = 8 (now 4). To continue '
        'would show other examples than an undisturbed run. Restore what it was, use another '
        "model_dir, or, if it is meant, set train.allow_changes = ('global_batch_size',)."
    )
    allowed = ('global_batch_size',)
    assert tiny.run(strategy, model_dir, batch_size=4, steps=42, allow_changes=allowed).step == 42
    assert manifest(model_dir, 42)['global_batch_size'] == 4


def test_other_data_of_the_same_size_is_refused(copy):
    strategy, model_dir, _ = copy
    data = Data(tiny.source(30, 9), preprocess=tiny.scale_images)
    with pytest.raises(ConfigError, match=r"data_fingerprint = '.*' \(now '"):
        tiny.run(strategy, model_dir, train_data=data, steps=42)


def test_a_checkpoint_of_another_model_is_refused(copy):
    strategy, model_dir, _ = copy

    def smaller():
        return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(tiny.CLASSES)])

    with pytest.raises(ConfigError, match='is of another model or optimizer'):
        tiny.run(strategy, model_dir, model=smaller)


def test_only_the_newest_and_the_best_checkpoints_are_kept(one, tmp_path):
    keep = Keep(last=2, best=1, metric='eval/loss', mode='max')
    # To go back from bad steps there must be one two steps before the newest.
    short = Divergence(bad_steps=1)
    tiny.run(one, tmp_path, save_every=3, eval_every=6, keep=keep, divergence=short)
    losses = dict(tiny.points(tmp_path / 'eval')['loss'])
    best = max(losses, key=losses.get)
    assert best < 36
    assert steps(tmp_path) == [best, 36, 39, 40]
    assert manifest(tmp_path, best)['metrics']['eval/loss'] == pytest.approx(losses[best])
    # A checkpoint between two evaluations does not pass for one that was evaluated.
    assert not [name for name in manifest(tmp_path, 39)['metrics'] if name.startswith('eval/')]


def test_the_best_checkpoint_is_kept_even_where_no_save_was_due(one, tmp_path):
    keep = Keep(last=2, best=1, metric='eval/loss', mode='max')
    tiny.run(one, tmp_path, save_every='10 minutes', steps=24, eval_every=5, keep=keep)
    losses = dict(tiny.points(tmp_path / 'eval')['loss'])
    assert steps(tmp_path) == sorted({max(losses, key=losses.get), 20, 24})


def test_the_best_by_what_is_not_measured_is_refused(one, tmp_path):
    with pytest.raises(ConfigError) as raised:
        tiny.run(one, tmp_path, keep=Keep(best=1, metric='eval/acuracy'))
    assert raised.value.message == (
        "Keep.best = 1 goes by Keep.metric = 'eval/acuracy', which this run does not measure. Did "
        "you mean 'eval/accuracy'? It measures train/loss, train/accuracy, train/gradient_norm, "
        'eval/loss, eval/accuracy.'
    )
    with pytest.raises(ConfigError, match="'eval/loss', which this run does not measure"):
        tiny.run(one, tmp_path, keep=Keep(best=1), eval_data=None)


def test_intervals_in_epochs(one, tmp_path):
    tiny.run(
        one, tmp_path, steps='4 epochs', log_every='1 epochs', save_every='2 epochs',
        eval_every=None,
    )  # fmt: skip
    # 30 examples are 3.75 batches of 8.
    assert [step for step, _ in tiny.points(tmp_path / 'train')['loss']] == [4, 8, 12, 15]
    assert steps(tmp_path) == [8, 15]
    assert [step for step, _ in tiny.points(tmp_path / 'eval')['loss']] == [15]


def test_a_run_without_evaluation_data_evaluates_nothing(one, tmp_path):
    result = tiny.run(one, tmp_path, steps=4, eval_data=None)
    assert set(result.metrics) == {'train/loss', 'train/gradient_norm', 'train/accuracy'}


def test_a_run_of_non_finite_steps_ends(one, tmp_path):
    def broken(labels, outputs):
        return tf.reduce_sum(outputs, -1) * float('nan')

    with pytest.raises(Diverged) as raised:
        tiny.run(one, tmp_path, loss=broken, divergence=Divergence(bad_steps=3), log_every=1)
    assert str(raised.value) == (
        'The losses of 3 step(s) in a row, from step 1 on, were not finite. Lower the learning '
        'rate, clip gradients, or look at the data; `phalanx replay` shows a step in detail.'
    )
    assert steps(tmp_path) == []


class Terminates(keras.metrics.SparseCategoricalAccuracy):
    """Sends this process a signal at its third result; before the first it was asked for names."""

    number, calls = signal.SIGTERM, 0

    def stateless_result(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), self.number)
        return super().stateless_result(*args, **kwargs)


@pytest.mark.parametrize(('number', 'replicas'), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_at_once_and_the_resumed_run_ends_with_the_same_bits(
    runs, tmp_path, number, replicas
):
    strategy, _, whole = runs(replicas)
    metric = Terminates(name='accuracy')
    metric.number = number
    before = [signal.getsignal(n) for n in StopRequest.signals]
    with pytest.raises(Preempted, match='saved step 4 of 40 after a signal') as raised:
        tiny.run(
            strategy, tmp_path, metrics=[metric], log_every=1, eval_every=None, sample_log=True
        )
    assert raised.value.exit_code == 75
    assert [signal.getsignal(n) for n in StopRequest.signals] == before
    assert steps(tmp_path) == [4]

    last = tiny.run(strategy, tmp_path, sample_log=True)
    assert (last.state_sha256, last.sample_sha256) == (whole.state_sha256, whole.sample_sha256)
    assert_increasing(tmp_path)


def test_eager_steps_do_what_compiled_ones_do_and_leave_the_process_as_it_was(one, tmp_path):
    common = {'steps': 3, 'log_every': 1, 'eval_every': None}
    compiled = tiny.run(one, tmp_path / 'compiled', **common)
    eager = tiny.run(one, tmp_path / 'eager', run_eagerly=True, **common)
    assert eager.metrics == pytest.approx(compiled.metrics, rel=1e-5)
    assert not tf.config.functions_run_eagerly()


@pytest.mark.parametrize('precision', ['float16', 'bfloat16'])
def test_half_precision_trains_and_resumes_bit_by_bit(one, tmp_path, precision):
    whole = tiny.run(one, tmp_path / 'whole', precision=precision, steps=8)
    tiny.run(one, tmp_path / 'parts', precision=precision, steps=8, max_steps=3)
    parts = tiny.run(one, tmp_path / 'parts', precision=precision, steps=8)
    assert parts.state_sha256 == whole.state_sha256
    assert np.isfinite(whole.metrics['train/loss'])
    tensors, _ = Checkpoints(tmp_path / 'whole' / 'checkpoints').read(8)
    # The first scale may be too large; each step that shows it is skipped and halves it.
    begin = 2.0**15 if precision == 'float16' else 1.0
    assert tensors['phalanx/loss_scale'] == begin / 2.0 ** tensors['phalanx/skipped']
    assert {t.dtype.name for t in tensors.values()} <= {'float32', 'int32', 'int64', 'uint32'}


def test_the_configuration_is_recorded_when_all_is_built(one, tmp_path):
    tiny.run(one, tmp_path, steps=2, config=lambda: 'train.steps = 2\n')
    assert (tmp_path / 'config' / 'config-0.gin').read_text() == 'train.steps = 2\n'
    assert 'train.steps = 2' in str(tiny.points(tmp_path / 'train')['config'])
