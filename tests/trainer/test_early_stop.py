import keras
import pytest

from tests.trainer import tiny
from trainer.early_stop import EarlyStop, Progress
from trainer.errors import ConfigError
from trainer.retention import Keep


def measured(rule, *values, progress=None):
    progress = progress or Progress(rule)
    for step, value in enumerate(values, 1):
        progress.look(step, {rule.metric: value})
    return progress


@pytest.mark.parametrize(
    ('mode', 'values', 'over'),
    [
        ('min', (3, 2, 2, 2), True),
        ('min', (3, 2, 2, 1.9), False),
        ('min', (1, float('nan'), float('nan')), True),
        ('min', (float('nan'), 1, 2), False),
        ('max', (3, 2, 1), True),
        ('max', (1, 2, 3), False),
        ('max', (1,), False),
    ],
)
def test_it_is_over_once_the_patience_is_used_up(mode, values, over):
    assert measured(EarlyStop(patience=2, mode=mode), *values).is_over == over


def test_a_gain_must_be_larger_than_the_least_that_counts():
    assert measured(EarlyStop(patience=2, min_delta=0.5), 3, 2.6, 2.5).is_over
    assert not measured(EarlyStop(patience=2, min_delta=0.5), 3, 2.6, 2.4).is_over


def test_what_is_not_measured_says_nothing():
    progress = Progress(EarlyStop(patience=1))
    assert not progress.look(1, {'train/loss': 1.0})
    assert not progress.is_over


def test_a_record_goes_on_where_it_was():
    rule = EarlyStop(patience=3)
    half = measured(rule, 1, 2, 3)
    assert not half.is_over
    assert measured(rule, 4, progress=Progress(rule, half.record())).is_over


def test_a_record_of_another_metric_is_forgotten():
    record = measured(EarlyStop(patience=1), 1, 2).record()
    assert not Progress(EarlyStop(metric='eval/accuracy'), record).is_over


@pytest.mark.parametrize(
    'options',
    [{'patience': 0}, {'min_delta': -1.0}, {'mode': 'least'}, {'metric': 'train/loss'}],
    ids=str,
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=r'EarlyStop\.'):
        EarlyStop(**options)


RULE = EarlyStop(patience=2)
# The loss falls, and then rises for good: the rate grows until it is far too high.
KEEP = Keep(last=100, best=1)


def rising():
    rate = keras.optimizers.schedules.PolynomialDecay(0.01, tiny.STEPS, 5.0)
    return keras.optimizers.SGD(rate)


def test_a_run_ends_where_it_would_have_and_stays_there(make_strategy, tmp_path):
    strategy, arguments = make_strategy(2), {'optimizer': rising, 'early_stop': RULE, 'keep': KEEP}
    whole = tiny.run(strategy, tmp_path / 'whole', **arguments)
    assert 12 < whole.step < tiny.STEPS
    assert 'train/loss' in whole.metrics
    again = tiny.run(strategy, tmp_path / 'whole', **arguments)
    assert (again.step, again.state_sha256) == (whole.step, whole.state_sha256)

    for steps in (6, 6, None):  # Where it evaluates anyway.
        parts = tiny.run(strategy, tmp_path / 'parts', **arguments, max_steps=steps)
    assert (parts.step, parts.state_sha256) == (whole.step, whole.state_sha256)

    patient = {**arguments, 'early_stop': EarlyStop(patience=100)}
    assert tiny.run(strategy, tmp_path / 'whole', **patient).step == tiny.STEPS


def test_a_metric_that_is_not_measured_is_refused(make_strategy, tmp_path):
    with pytest.raises(ConfigError, match=r"'eval/acuracy', which .* Did you mean 'eval/accuracy'"):
        tiny.run(make_strategy(1), tmp_path, early_stop=EarlyStop(metric='eval/acuracy'))
