"""The likely cause of a failure, from exit codes and logs."""

import pytest

from launch.causes import likely_cause

OURS = """\
Traceback (most recent call last):
  File "/my/model.py", line 3, in build
    raise ValueError('no such layer')
ValueError: no such layer
  In call to configurable 'train' (<function train at 0x7f8228616e80>)
"""
OF_A_PEER = """\
Traceback (most recent call last):
  File "/lib/tensorflow/python/eager/execute.py", line 53, in quick_execute
tensorflow.python.framework.errors_impl.UnavailableError: Collective ops is aborted by: peer gone
"""


@pytest.fixture
def logs(tmp_path):
    paths = [tmp_path / f'worker-{index}.log' for index in range(2)]
    for path in paths:
        path.write_text('12:00:00 I step 1/10\n')
    return paths


def test_a_traceback_is_told_by_its_last_line(logs):
    logs[1].write_text(OURS)
    assert likely_cause(1, 1, logs) == 'ValueError: no such layer'


def test_a_worker_that_has_only_lost_its_peer_is_not_the_cause(logs):
    logs[0].write_text(OF_A_PEER)
    logs[1].write_text(OURS)
    assert likely_cause(0, 1, logs) == 'worker 1: ValueError: no such layer'


def test_an_error_that_the_program_knows_is_told_as_it_says_it(logs):
    logs[0].write_text('error: the disk is full.\n')
    assert likely_cause(0, 1, logs) == 'error: the disk is full.'


def test_a_signal_has_its_usual_reason(logs):
    assert 'lack of memory' in likely_cause(0, -9, logs)
    assert 'native code' in likely_cause(0, -11, logs)


def test_where_nothing_is_to_be_seen_nothing_is_said(logs):
    logs[0].unlink()
    assert likely_cause(0, 3, logs) == ''
    assert likely_cause(1, None, logs) == ''
