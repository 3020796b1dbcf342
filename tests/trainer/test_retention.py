import subprocess
import sys

import pytest

from trainer.errors import ConfigError
from trainer.retention import Info, Keep, to_delete

HOUR = 3600.0


def infos(metrics=(None,) * 6):
    """Steps 100, 200, ... written at hours 1, 2, ..."""
    return [Info(100 * i, i * HOUR, metric) for i, metric in enumerate(metrics, 1)]


@pytest.mark.parametrize(
    ('keep', 'metrics', 'deleted'),
    [
        pytest.param(Keep(), [None] * 6, [100, 200, 300], id='last 3 is the default'),
        pytest.param(Keep(last=2), [None] * 6, [100, 200, 300, 400], id='last 2'),
        pytest.param(Keep(last=9), [None] * 6, [], id='fewer than last'),
        pytest.param(Keep(), [], [], id='none at all'),
        pytest.param(Keep(last=2, best=1), [3, 1, 2, 4, 5, 6], [100, 300, 400], id='least'),
        pytest.param(
            Keep(last=2, best=2, mode='max'), [3, 1, 2, 4, 5, 6], [100, 200, 300, 400], id='most'
        ),
        pytest.param(
            Keep(last=2, best=2, mode='max'), [7, 1, 9, 4, 5, 6], [200, 400], id='two greatest'
        ),
        pytest.param(Keep(last=2, best=1), [1, 1, 2, 2, 2, 2], [100, 300, 400], id='tie: newer'),
        pytest.param(
            Keep(last=2, best=1, mode='max'), [2, 2, 1, 1, 1, 1], [100, 300, 400], id='tie: max'
        ),
        pytest.param(
            Keep(last=2, best=2), [None, 5, None, None, None, None], [100, 300, 400], id='no metric'
        ),
    ],
)
def test_last_and_best(keep, metrics, deleted):
    assert to_delete(infos(metrics), keep, now=0) == deleted


@pytest.mark.parametrize(
    ('now', 'deleted'),
    [
        pytest.param(3.0, [200, 300, 400], id='none is old yet: the oldest will be'),
        pytest.param(6.0, [300, 400], id='exactly old enough'),
        pytest.param(7.5, [100, 400], id='newest old one and oldest young one'),
        pytest.param(8.5, [100, 200], id='an hour later'),
        pytest.param(99.0, [100, 200, 300, 400], id='all old'),
    ],
)
def test_older_than_hours(now, deleted):
    keep = Keep(last=2, older_than_hours=5)
    assert to_delete(infos(), keep, now * HOUR) == deleted


@pytest.mark.parametrize('every_minutes', [7, 60, 200])
def test_once_there_was_an_old_one_there_always_is(every_minutes):
    keep, kept = Keep(last=2, older_than_hours=6), []
    for i in range(400):
        now = i * every_minutes * 60.0
        kept.append(Info(i, now))
        gone = to_delete(kept, keep, now)
        kept = [info for info in kept if info.step not in gone]
        if now >= 6 * HOUR:
            oldest = now - kept[0].created
            assert 6 * HOUR <= oldest <= 12 * HOUR + 2 * every_minutes * 60
        assert len(kept) <= 5


@pytest.mark.parametrize('every', [1, 3, 10, 39, 40, 41, 100])
def test_there_is_always_one_to_go_back_to_and_never_many_more(every):
    kept = []
    for step in range(every, 40 * every, every):
        kept.append(Info(step, 0.0))
        gone = to_delete(kept, Keep(last=2), 0.0, way_back=40)
        kept = [info for info in kept if info.step not in gone]
        steps = [info.step for info in kept]
        assert len(steps) <= 6
        if step > 40 + every:
            # Not farther back than need be.
            assert step - 40 - 20 - every <= max(s for s in steps if s <= step - 40)


def test_order_of_the_argument_does_not_matter():
    assert to_delete(infos()[::-1], Keep(), now=0) == [100, 200, 300]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'last': 1}, 'Keep.last = 1 must be an integer of at least 2'),
        ({'last': '3'}, "Keep.last = '3' must be"),
        ({'best': -1}, 'Keep.best = -1'),
        ({'mode': 'maxi'}, "Keep.mode = 'maxi' is neither .* Did you mean 'max'?"),
        ({'older_than_hours': 0}, 'Keep.older_than_hours = 0 must be'),
        ({'older_than_hours': '6'}, "Keep.older_than_hours = '6' must be"),
    ],
)
def test_a_value_out_of_range_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message.replace('?', r'\?')):
        Keep(**arguments)


def test_needs_no_tensorflow():
    code = 'import sys, trainer.retention; assert "tensorflow" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
