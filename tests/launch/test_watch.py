"""Who is stuck, from what the workers say."""

import json
import os
import time

import pytest

from launch.watch import GENEROUS, Watch

ME = os.getpid()


@pytest.fixture
def files(tmp_path):
    return [tmp_path / f'worker-{index}' for index in range(2)]


def says(file, phase, ago, **figures):
    with open(file, 'a') as out:
        out.write(json.dumps({'time': time.time() - ago, 'phase': phase, **figures}) + '\n')


def watch(files, longest=None, patience=10.0):
    result = Watch(files, {} if longest is None else longest, patience)
    result.read()
    return result


def test_nobody_is_stuck_who_has_just_spoken(files):
    for file in files:
        says(file, 'stepping', 1, step=5)
    assert watch(files, {'stepping': 0.1}).stuck([ME, ME]) is None


def test_a_phase_is_given_a_generous_time_until_it_has_been_seen(files):
    for file in files:
        says(file, 'compiling', 300)
    assert watch(files).stuck([ME, ME]) is None
    says(files[1], 'compiling', GENEROUS['compiling'] + 1)
    assert watch(files).stuck([ME, ME]).worker == 1


def test_a_phase_may_take_some_times_the_longest_that_it_took(files):
    for file in files:
        says(file, 'stepping', 40)
    assert watch(files, {'stepping': 9.0}).allowed('stepping') == 45
    assert watch(files, {'stepping': 9.0}).stuck([ME, ME]) is None
    assert watch(files, {'stepping': 1.0}).stuck([ME, ME]).allowed == 10


def test_the_longest_silences_are_learnt(files):
    longest = {}
    now = time.time()
    for ago, phase in ((9, 'starting'), (6, 'stepping'), (4, 'stepping'), (1, 'saving')):
        with open(files[0], 'a') as out:
            out.write(json.dumps({'time': now - ago, 'phase': phase}) + '\n')
    watch(files, longest)
    assert longest['stepping'] == pytest.approx(3, abs=0.1)
    assert 'saving' not in longest, 'it still lasts'


def test_the_guilty_one_is_in_another_phase_than_those_who_wait_for_it(files):
    says(files[0], 'stepping', 100)
    says(files[1], 'evaluating', 90)
    stuck = watch(files, {'stepping': 1.0, 'evaluating': 1.0}).stuck([ME, ME])
    assert (stuck.worker, stuck.phase) == (1, 'evaluating')
    assert str(stuck) == (
        "worker 1 makes no progress in the phase 'evaluating': no word for 90 s, where 10 s are "
        'allowed'
    )


def test_the_guilty_one_fell_silent_first(files):
    says(files[0], 'stepping', 30)
    says(files[1], 'stepping', 31)
    assert watch(files, {'stepping': 1.0}).stuck([ME, ME]).worker == 1


def test_half_a_line_is_left_for_later(files):
    says(files[0], 'stepping', 1, step=7)
    with open(files[0], 'a') as out:
        out.write('{"time": ')
    following = watch(files)
    assert following.step == 7
    with open(files[0], 'a') as out:
        out.write(f'{time.time()}, "phase": "stepping", "step": 8}}\n')
    following.read()
    assert following.step == 8
