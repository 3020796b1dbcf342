from fractions import Fraction

import pytest

from trainer.errors import ConfigError
from trainer.interval import Every, parse_steps

EPOCH = Fraction(10, 3)  # 10 examples in batches of 3: epochs end in steps 4, 7, 10, 14...


@pytest.mark.parametrize(
    ('value', 'steps'),
    [
        (500, 500),
        ('500 steps', 500),
        ('1 step', 1),
        ('1 epoch', 4),
        ('2 epochs', 7),
        ('3epochs', 10),
    ],
)
def test_a_length_is_steps_or_epochs(value, steps):
    assert parse_steps(value, EPOCH) == steps


@pytest.mark.parametrize(
    ('value', 'said'),
    [
        ('10 parsecs', "unknown unit 'parsecs'; there are steps, epochs, seconds"),
        ('10 stps', "Did you mean 'step'"),
        (0, '0 must be at least 1 step'),
        (-3, '-3 must be at least 1 step'),
        ('-3 epochs', 'at least 1 epoch'),
        (2.5, '2.5 is no number of steps'),
        ('2.5 epochs', 'a whole number and a unit'),
        (True, 'True is no number of steps'),
        (None, 'None is no number of steps'),
        ('epoch', "'epoch' is no number of steps"),
        ('500', 'write a whole number of steps'),
        ('10 minutes', "'10 minutes' is a time"),
    ],
)
def test_any_other_length_is_refused(value, said):
    with pytest.raises(ConfigError, match=said):
        parse_steps(value, EPOCH)


def test_a_rounded_number_of_steps_per_epoch_is_refused():
    with pytest.raises(TypeError, match='Fraction'):
        parse_steps('3 epochs', 10 / 3)


@pytest.mark.parametrize('value', ['10 parsecs', 0, '0 minutes', -1, 1.5])
def test_a_wrong_interval_is_refused(value):
    with pytest.raises(ConfigError):
        Every(value, EPOCH, 0)


def test_an_interval_of_zero_is_told_how_to_say_never():
    with pytest.raises(ConfigError, match='None means never'):
        Every(0, EPOCH, 0)


def due_steps(every, steps):
    return [step for step in steps if every.due(step, 0.0)]


def test_steps_are_due_at_multiples():
    assert due_steps(Every(100, EPOCH, 0), range(1, 351)) == [100, 200, 300]


def test_epochs_are_due_in_the_steps_they_end_in():
    assert due_steps(Every('1 epoch', EPOCH, 0), range(1, 15)) == [4, 7, 10, 14]
    assert due_steps(Every('2 epochs', EPOCH, 0), range(1, 15)) == [7, 14]


def test_epochs_shorter_than_a_step_are_due_at_every_step():
    assert due_steps(Every('1 epoch', Fraction(1, 5), 0), range(1, 4)) == [1, 2, 3]


def test_a_resume_does_not_shift_the_cadence():
    assert due_steps(Every(100, EPOCH, 130), range(131, 351)) == [200, 300]


def test_nothing_is_due_where_a_run_resumes():
    every = Every(100, EPOCH, 200)
    assert not every.due(200)
    assert every.next_due(200) == 300


def test_a_due_step_passed_over_is_made_up_for_without_shifting_the_cadence():
    assert due_steps(Every(100, EPOCH, 0), [90, 130, 190, 200, 290, 510, 590, 600]) == [
        130, 200, 510, 600,
    ]  # fmt: skip


def test_what_is_due_is_due_once():
    every = Every(100, EPOCH, 0)
    assert every.due(100)
    assert not every.due(100)


@pytest.mark.parametrize('value', [7, '1 epoch', '3 epochs'])
def test_the_next_due_step_is_where_it_falls_due(value):
    dues = due_steps(Every(value, EPOCH, 0), range(1, 100))
    every = Every(value, EPOCH, 0)
    for step in range(dues[-1]):
        assert every.next_due(step) == min(due for due in dues if due > step)


def test_never_is_never():
    every = Every(None, EPOCH, 0)
    assert every.next_due(0) is None
    assert not every.due(10**9, 1e9)


@pytest.mark.parametrize(
    ('value', 'seconds'),
    [('30 seconds', 30), ('1 second', 1), ('10 minutes', 600), ('1 hour', 3600)],
)
def test_times_fall_due_by_the_clock_of_the_caller(value, seconds):
    every = Every(value, EPOCH, 0)
    assert every.next_due(0) is None
    assert not every.due(10**6, seconds - 0.01)
    assert every.due(1, seconds + 0.5)
    assert not every.due(2, 2 * seconds)
    assert every.due(3, 2 * seconds + 0.5)


def test_a_long_pause_is_made_up_for_once():
    every = Every('10 seconds', EPOCH, 0)
    assert [every.due(1, now) for now in (95.0, 96.0, 104.0, 105.0)] == [True, False, False, True]
