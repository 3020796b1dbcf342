"""Who is stuck, from what the workers say."""

import json
import time

import pytest

from launch.watch import Watch

RUNNING = ['running', 'running']


@pytest.fixture
def files(tmp_path):
    return [tmp_path / f'worker-{index}' for index in range(2)]


def watch(files, *words, longest=None, patience=10.0):
    """Watches workers that said their word, a (phase, seconds ago), and nothing since."""
    result = Watch(files, {} if longest is None else longest, patience)
    for index, (phase, ago) in enumerate(words):
        files[index].write_text(json.dumps({'time': time.time() - ago, 'phase': phase}) + '\n')
    result.read()
    for index, (_, ago) in enumerate(words):
        result._heard[index] -= ago
    return result


def test_nobody_is_stuck_who_has_just_spoken(files):
    following = watch(files, ('stepping', 1), ('stepping', 1), longest={'stepping': 0.1})
    assert following.stuck(RUNNING) is None


def test_a_phase_is_given_much_patience_until_it_has_been_seen(files):
    assert watch(files, ('compiling', 299), ('compiling', 200)).stuck(RUNNING) is None
    assert watch(files, ('compiling', 301), ('compiling', 200)).stuck(RUNNING).worker == 0


def test_a_phase_may_take_some_times_the_longest_that_it_took(files):
    words = ('stepping', 40), ('stepping', 40)
    patient = watch(files, *words, longest={'stepping': 9.0})
    assert patient.allowed('stepping') == 45
    assert patient.stuck(RUNNING) is None
    assert watch(files, *words, longest={'stepping': 1.0}).stuck(RUNNING).allowed == 10


def test_what_repeats_is_learnt_and_what_does_not_is_not(files):
    longest = {}
    now = time.time()
    with open(files[0], 'a') as out:
        for ago, phase in ((9, 'restoring'), (6, 'stepping'), (4, 'stepping'), (1, 'saving')):
            out.write(json.dumps({'time': now - ago, 'phase': phase}) + '\n')
    watch(files, longest=longest)
    assert longest == {'stepping': pytest.approx(3, abs=0.1)}


def test_the_guilty_one_is_in_another_phase_than_those_who_wait_for_it(files):
    seen = {'stepping': 1.0, 'evaluating': 1.0}
    stuck = watch(files, ('stepping', 100), ('evaluating', 90), longest=seen).stuck(RUNNING)
    assert (stuck.worker, stuck.phase) == (1, 'evaluating')
    assert str(stuck) == (
        "worker 1 makes no progress in the phase 'evaluating': no word for 90 s, where 10 s are "
        'allowed'
    )


def test_the_others_may_wait_as_long_as_what_they_wait_for_may_take(files):
    seen = {'stepping': 1.0}
    assert watch(files, ('saving', 90), ('stepping', 91), longest=seen).stuck(RUNNING) is None
    assert watch(files, ('saving', 101), ('stepping', 102), longest=seen).stuck(RUNNING).worker == 0


def test_the_guilty_one_fell_silent_first(files):
    following = watch(files, ('stepping', 30), ('stepping', 31), longest={'stepping': 1.0})
    assert following.stuck(RUNNING).worker == 1


def test_who_has_ended_is_not_stuck(files):
    following = watch(files, ('ending', 1000), ('exporting', 2))
    assert following.stuck(['ended', 'running']) is None


def test_half_a_line_is_left_for_later_and_a_broken_one_left_out(files):
    following = watch(files, ('starting', 1))
    with open(files[0], 'a') as out:
        out.write('{"time": 1, "pha\n{"time": ')
    following.read()
    assert not following.compiling
    with open(files[0], 'a') as out:
        out.write(f'{time.time()}, "phase": "compiling"}}\n')
    following.read()
    assert following.compiling


def test_the_newest_value_of_every_field_is_kept(files):
    following = watch(files, ('starting', 1), ('starting', 1))
    with open(files[1], 'a') as out:
        out.write('{"time": 1, "phase": "compiling", "step": 3, "last_step": 9}\n')
        out.write('{"time": 2, "phase": "stepping", "step": 4}\n')
    following.read()
    newest = {'time': 2, 'phase': 'stepping', 'step': 4, 'last_step': 9}
    assert following.newest[1] == newest
    assert following.newest[0]['phase'] == 'starting'
    assert following.silences() == [pytest.approx(1, abs=0.5), pytest.approx(0, abs=0.5)]
