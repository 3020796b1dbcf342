"""A new run begins with weights out of another's, in whatever kind of file they are."""

import functools
import json
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer import tiny
from tests.trainer.training import CLASSES, FEATURES, Training, assert_equal, sgd
from trainer import weight_files
from trainer.checkpoint import Checkpoints
from trainer.errors import ConfigError
from trainer.groups import Group
from trainer.warm_start import WarmStart, begin_with, restore

layers = keras.layers


def net(classes=CLASSES, name='net', head='head', deeper=False):
    middle = [layers.Dense(8, name='added')] if deeper else []
    return keras.Sequential(
        [
            layers.Dense(8, activation='tanh', name='first'),
            layers.BatchNormalization(name='norm'),
            layers.Dropout(0.2),
            *middle,
            layers.Dense(8, name='second'),
            layers.Dense(classes, name=head),
        ],
        name=name,
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.widen, self.head = layers.Dense(8), layers.Dense(CLASSES)

    def call(self, x):
        return self.head(self.widen(x))


def trained(model=net, optimizer=None):
    """A model with weights and statistics of its own."""
    built = model()
    built(np.zeros([1, FEATURES], np.float32))
    rng = np.random.default_rng(1)
    for variable in built.variables:
        if variable.dtype == 'float32':
            variable.assign(rng.normal(size=variable.shape))
    built.compile(optimizer or keras.optimizers.Adam(), 'mse')
    built.optimizer.build(built.trainable_variables)
    return built


def by_path(model):
    return {v.path: v.numpy() for v in model.variables if not v.path.endswith('generator_state')}


def keras_file(model, directory):
    model.save(directory / 'm.keras')
    return str(directory / 'm.keras')


def weights_file(model, directory):
    model.save_weights(directory / 'm.weights.h5')
    return str(directory / 'm.weights.h5')


def saved_model(model, directory):
    model.export(str(directory / 'exported'), verbose=False)
    return str(directory / 'exported')


def tensorflow_checkpoint(model, directory):
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return checkpoint.write(str(directory / 'ck'))


def named_checkpoint(model, directory):
    values = {v.path: v.numpy() for v in [*model.variables, *model.optimizer.variables]}
    tf.raw_ops.SaveV2(
        prefix=str(directory / 'named'),
        tensor_names=list(values),
        shape_and_slices=[''] * len(values),
        tensors=[tf.constant(v) for v in values.values()],
    )
    return str(directory / 'named')


@pytest.fixture
def state(make_strategy):
    """A function: model -> a new state under two replicas."""
    return lambda model=net, groups=(): Training(make_strategy(2), model, groups=groups).state


# ---- Every kind of file.


@pytest.mark.parametrize(
    'save', [keras_file, weights_file, saved_model, tensorflow_checkpoint, named_checkpoint]
)
def test_all_weights_and_statistics_come_out_of_every_kind_of_file(state, tmp_path, save):
    source = trained()
    path = save(source, tmp_path)
    new = state()
    report = restore(WarmStart(path), new)
    assert_equal(by_path(new.model), by_path(source))
    assert (report.missing, report.misfits, report.left_out, report.unused) == ([], [], [], [])
    assert len(report.restored) == 10


@pytest.mark.parametrize('save', [keras_file, weights_file])
def test_another_head_leaves_the_rest_to_be_matched_by_layers(state, tmp_path, save):
    source = trained(functools.partial(net, deeper=True))
    new = state(functools.partial(net, 7))
    before = by_path(new.model)
    report = restore(WarmStart(save(source, tmp_path)), new)
    # In the file 'second' is the third dense layer, here it is the second.
    expected = {**by_path(source), 'net/head/kernel': before['net/head/kernel']}
    assert_equal(
        {path: by_path(new.model)[path] for path in report.restored},
        {path: expected[path] for path in report.restored},
    )
    assert len(report.restored) == 8
    assert report.misfits == [
        f'net/head/bias [{CLASSES}], here [7]',
        f'net/head/kernel [8, {CLASSES}], here [8, 7]',
    ]
    assert sorted(report.unused) == ['added/0', 'added/1']
    assert 'names of layers' in report.note


def test_a_subclassed_model_takes_a_file_of_its_own_structure(state, tmp_path):
    source = trained(Subclassed)
    new = state(Subclassed)
    report = restore(WarmStart(weights_file(source, tmp_path)), new)
    assert_equal(by_path(new.model), by_path(source))
    assert report.note.startswith('by position')


def test_a_model_of_another_name_takes_the_same_layers(state, tmp_path):
    source = trained(functools.partial(net, name='teacher'))
    new = state()
    restore(WarmStart(named_checkpoint(source, tmp_path)), new)
    np.testing.assert_array_equal(
        by_path(new.model)['net/first/kernel'], by_path(source)['teacher/first/kernel']
    )


# ---- Which of them.


def test_patterns_choose_and_rename(state, tmp_path):
    source = trained(functools.partial(net, head='old_head'))
    new = state()
    before = by_path(new.model)
    start = WarmStart(
        named_checkpoint(source, tmp_path),
        include=['net/first/*', 'net/head/*'],
        exclude='*/bias',
        rename={'net/old_head/*': 'net/head/*'},
    )
    report = restore(start, new)
    assert report.restored == ['net/first/kernel', 'net/head/kernel']
    expected = {
        **before,
        'net/first/kernel': by_path(source)['net/first/kernel'],
        'net/head/kernel': by_path(source)['net/old_head/kernel'],
    }
    assert_equal(by_path(new.model), expected)


def test_what_is_frozen_is_restored_too(state, tmp_path):
    source = trained()
    new = state(groups=[Group('net/first/*', frozen=True)])
    restore(WarmStart(weights_file(source, tmp_path)), new)
    assert_equal(by_path(new.model), by_path(source))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'include': 'net/frist/*'}, r"include 'net/frist/\*' matches no .* net/first/"),
        ({'exclude': '*/gama'}, "exclude '\\*/gama' matches no variable"),
        ({'rename': {'nets/*': 'net/*'}}, r"rename 'nets/\*' matches nothing"),
        ({'rename': {'net/*': 'other/net/*'}}, r'Nothing in .* fits this model'),
        ({'rename': {'*/kernel': 'net/x', '*/bias': 'y'}}, r'both must have as many \*'),
        ({'averages': True}, 'holds no averages'),
    ],
)
def test_patterns_that_have_no_effect_are_mistakes(state, tmp_path, options, message):
    Checkpoints(tmp_path / 'checkpoints').save(by_path(trained()), {'step': 1})
    Checkpoints(tmp_path / 'checkpoints').wait()
    with pytest.raises(ConfigError, match=message):
        restore(WarmStart(str(tmp_path), **options), state())


# ---- Damage.


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('nothing', None, 'does not exist'),
        ('m.weights.h5', None, 'There is no file'),
        ('m.weights.h5', b'no HDF5', 'is no file of weights, or damaged'),
        ('m.keras', b'no zip', 'is no file of weights, or damaged'),
        ('ck.index', b'no index', 'cannot be read'),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(state, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        restore(WarmStart(str(tmp_path / name.removesuffix('.index'))), state())


def test_a_file_that_is_cut_off_is_named(state, tmp_path):
    path = weights_file(trained(), tmp_path)
    whole = (tmp_path / 'm.weights.h5').read_bytes()
    (tmp_path / 'm.weights.h5').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match='is no file of weights, or damaged'):
        restore(WarmStart(path), state())


@pytest.mark.parametrize('save', [keras_file, weights_file, saved_model, tensorflow_checkpoint])
def test_of_files_of_others_no_averages_are_known(tmp_path, save):
    model = trained()
    with pytest.raises(ConfigError, match=r'averages = True, but .* Set it to False'):
        weight_files.read(save(model, tmp_path), model, averages=True)


# ---- In a run.


@pytest.mark.slow
def test_a_run_starts_warm_once_and_its_manifests_tell(make_strategy, tmp_path, caplog):
    first = tiny.run(make_strategy(2), tmp_path / 'first', steps=4, save_every=4)
    start = WarmStart(str(tmp_path / 'first'))
    options = {'warm_start': start, 'steps': 4, 'save_every': 2}
    with caplog.at_level(logging.INFO, 'absl'):
        tiny.run(make_strategy(2), tmp_path / 'second', max_steps=2, **options)
        assert caplog.text.count('warm start from') == 1
        caplog.clear()
        result = tiny.run(make_strategy(2), tmp_path / 'second', **options)
        assert 'warm start from' not in caplog.text
    manifest = json.loads((result.checkpoint / 'manifest.json').read_text())
    assert manifest['warm_start']['path'] == start.path
    assert manifest['warm_start']['restored'] == 8
    whole = tiny.run(make_strategy(2), tmp_path / 'third', **options)
    assert whole.state_sha256 == result.state_sha256 != first.state_sha256


def test_averages_are_taken_in_place_of_weights(make_strategy, tmp_path):
    def training():
        return Training(make_strategy(2), net, sgd(0.5, use_ema=True, ema_momentum=0.5))

    source = training()
    for variable in source.state.optimizer.variables:
        if variable.path.endswith('_average'):  # Not what they were made equal to.
            variable.assign(variable + 1.0)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    checkpoints.save(source.state.snapshot(), {'step': 3})
    checkpoints.wait()
    new = training()
    begin_with(WarmStart(str(tmp_path), averages=True), new.state)
    values = source.variables()
    found = new.variables()
    averages = values['averages/net/first/kernel']
    np.testing.assert_array_equal(found['net/first/kernel'], averages)
    assert (averages != values['net/first/kernel']).any()
    np.testing.assert_array_equal(found['net/norm/moving_mean'], values['net/norm/moving_mean'])


def test_one_device_and_two_replicas_begin_with_the_same(make_strategy, tmp_path):
    path = weights_file(trained(), tmp_path)
    sums = []
    for replicas in (1, 2):
        training = Training(make_strategy(replicas), net)
        sums.append(begin_with(WarmStart(path), training.state))
        assert training.copies(training.state.model.trainable_variables[0])[-1].shape == (5, 8)
    assert sums[0] == sums[1]
