import logging

import pytest

from trainer.observe.config_record import record_config


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def texts(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_the_first_attempt_is_recorded_without_news(tmp_path, told):
    record_config(tmp_path, 0, 'a = 1\n')
    assert texts(tmp_path) == {'config-0.gin': 'a = 1\n'}
    assert not told.text


def test_an_attempt_with_the_same_configuration_leaves_no_second_record(tmp_path, told):
    record_config(tmp_path, 0, 'a = 1\n')
    record_config(tmp_path, 200, 'a = 1\n')
    assert texts(tmp_path) == {'config-0.gin': 'a = 1\n'}
    assert not told.text


def test_a_change_is_recorded_at_its_step_and_told(tmp_path, told):
    record_config(tmp_path, 0, 'a = 1\nb = 2\nc = 3\n')
    record_config(tmp_path, 200, 'a = 1\nb = 5\nc = 3\n')
    assert texts(tmp_path)['config-200.gin'] == 'a = 1\nb = 5\nc = 3\n'
    (message,) = told.messages
    assert message == (
        'the configuration has changed:\n--- config-0.gin\n+++ now\n@@ -2 +2 @@\n-b = 2\n+b = 5'
    )


def test_a_second_change_at_one_step_keeps_both_and_is_compared_with_the_latest(tmp_path, told):
    record_config(tmp_path, 0, 'a = 1\n')
    record_config(tmp_path, 0, 'a = 2\n')
    record_config(tmp_path, 0, 'a = 3\n')
    assert texts(tmp_path) == {
        'config-0.gin': 'a = 1\n',
        'config-0-2.gin': 'a = 2\n',
        'config-0-3.gin': 'a = 3\n',
    }
    assert '--- config-0-2.gin' in told.messages[-1]


def test_a_change_that_is_taken_back_is_recorded_too(tmp_path):
    for step, text in ((0, 'a = 1\n'), (10, 'a = 2\n'), (20, 'a = 1\n')):
        record_config(tmp_path, step, text)
    assert texts(tmp_path)['config-20.gin'] == 'a = 1\n'
