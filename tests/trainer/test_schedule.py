"""The learning rate as a function of the step, against closed forms and against Keras."""

import functools
import math
from fractions import Fraction

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.training import Training, assert_close
from trainer import schedule
from trainer.errors import ConfigError
from trainer.schedule import Schedule, scaled_rate

STEPS, EPOCH = 200, Fraction(100, 8)


def rates(*args, **options):
    """The rate of every step of a run, computed in a graph."""
    made = Schedule(*args, **options)
    made.bind(STEPS, EPOCH)
    steps = tf.range(STEPS + 1, dtype=tf.int64)
    found = tf.function(lambda: tf.map_fn(made, steps, fn_output_signature=tf.float32))()
    return found.numpy()


def warmed(after, warmup, start=0.0):
    """A peak of 0.5, as a function of the fraction of the run behind the warm-up."""

    def rate(step):
        if step < warmup:
            return 0.5 * (start + (1 - start) * step / warmup)
        return 0.5 * after((step - warmup) / (STEPS - warmup))

    return np.array([rate(step) for step in range(STEPS + 1)])


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'shape': 'constant'}, warmed(lambda p: 1.0, 0)),
        ({'shape': 'constant', 'warmup': 30}, warmed(lambda p: 1.0, 30)),
        (
            {'shape': 'linear', 'warmup': '10%', 'end': 0.2},
            warmed(lambda p: 1 - 0.8 * p, 20),
        ),
        (
            {'shape': 'polynomial', 'warmup': '2 epochs', 'power': 3.0, 'start': 0.1},
            warmed(lambda p: (1 - p) ** 3, 25, 0.1),
        ),
        (
            {'shape': 'cosine', 'warmup': '2.5%', 'end': 0.01},
            warmed(lambda p: 0.01 + 0.99 * (1 + math.cos(math.pi * p)) / 2, 5),
        ),
        (
            {'shape': 'step', 'boundaries': ['50%', 150, '14 epochs'], 'factor': 0.5},
            warmed(lambda p: 0.5 ** ((p >= 0.5) + (p >= 0.75) + (p >= 0.875)), 0),
        ),
        (
            {'shape': 'wsd', 'warmup': 20, 'decay': '25%', 'end': 0.1},
            warmed(lambda p: 1 - 0.9 * max(0, p * 180 - 130) / 50, 20),
        ),
    ],
    ids=lambda value: value.get('shape') if isinstance(value, dict) else '',
)
def test_every_shape_is_its_closed_form(options, expected):
    np.testing.assert_allclose(rates(peak=0.5, **options), expected, rtol=2e-6, atol=1e-7)


def test_one_cycle_rises_falls_as_long_and_then_goes_to_its_end():
    found = rates('one_cycle', peak=0.5, warmup='40%', start=0.1, end=0.001)
    knots = [0, 80, 160, 200]
    expected = np.interp(range(STEPS + 1), knots, [0.05, 0.5, 0.05, 0.0005])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(('warmup', 'end'), [(0, 0.0), (30, 0.0), (30, 0.1)])
def test_the_cosine_is_that_of_keras(warmup, end):
    theirs = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else 0.5,
        decay_steps=STEPS - warmup,
        alpha=end,
        warmup_target=0.5 if warmup else None,
        warmup_steps=warmup,
    )
    expected = [float(theirs(step)) for step in range(STEPS + 1)]
    found = rates('cosine', 0.5, warmup=warmup, end=end)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def test_before_it_knows_the_run_it_says_so():
    with pytest.raises(RuntimeError, match='does not know how long the run is'):
        Schedule('cosine', 0.1)(0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'shape': 'cosin'}, "Did you mean 'cosine'"),
        ({'shape': 'cosine', 'power': 2.0}, "shape 'cosine' has no power"),
        ({'shape': 'linear', 'end': 1.5}, 'end is 1.5; it must be a fraction'),
        ({'shape': 'linear', 'peak': -1.0}, 'peak is -1.0'),
        ({'shape': 'step'}, 'boundaries is not set'),
        (
            {'shape': 'step', 'boundaries': ['50%', 20]},
            r'are the steps \[100, 20\]; they must rise',
        ),
        ({'shape': 'cosine', 'warmup': 300}, 'Warmup of the schedule takes 300 steps, but the run'),
        ({'shape': 'wsd', 'warmup': '60%', 'decay': '50%'}, 'Warmup and decay .* takes 220 steps'),
        ({'shape': 'one_cycle', 'warmup': '60%'}, 'Twice the warmup .* takes 240 steps'),
        ({'shape': 'cosine', 'warmup': '101%'}, 'more than the whole run'),
        ({'shape': 'cosine', 'warmup': '5 minutes'}, 'is a time'),
        ({'shape': 'cosine', 'warmup': 'soon'}, 'is no number of steps'),
    ],
)
def test_what_makes_no_schedule_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**{'peak': 0.1, **options}).bind(STEPS, EPOCH)


@pytest.mark.parametrize(('rule', 'rate'), [('linear', 0.4), ('sqrt', 0.2)])
def test_the_rate_is_scaled_with_the_batch(rule, rate):
    assert scaled_rate(0.1, 1024, rule=rule) == pytest.approx(rate)
    assert scaled_rate(0.1, 64, per=64, rule=rule) == 0.1


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'rule': 'square'}, "Did you mean 'sqrt'"), ({'per': 0}, 'must be 1 or more')],
)
def test_a_rule_that_is_none_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        scaled_rate(0.1, 64, **options)


def test_one_device_and_two_replicas_agree_and_report_the_rate(make_strategy):
    def optimizer():
        return keras.optimizers.SGD(Schedule('one_cycle', 0.5, warmup='40%', start=0.1), 0.9)

    weights = []
    for replicas in (1, 2):
        training = Training(make_strategy(replicas), optimizer=optimizer)
        schedule.bind(training.state.optimizers, 20, None)
        training.run(4)
        assert training.state.scalars()['learning_rate'] == pytest.approx(0.5 * 0.55)
        training.run(16)
        weights.append(training.weights())
    assert_close(weights[1], weights[0])


def test_a_schedule_can_be_made_again_from_its_config():
    first = Schedule('wsd', 0.1, warmup='5%', decay='20%')
    again = Schedule.from_config(first.get_config())
    values = []
    for made in (first, again):
        made.bind(STEPS, None)
        values.append([float(made(step)) for step in (0, 5, 50, 180)])
    assert values[0] == values[1]
    assert functools.reduce(max, values[0]) == pytest.approx(0.1)
