import pytest

from trainer.observe.progress import Progress, duration, line, number


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0, '0:00:00'),
        (59.6, '0:01:00'),
        (83, '0:01:23'),
        (86_399, '23:59:59'),
        (2 * 86_400 + 3 * 3600 + 4 * 60 + 5, '2 d 3:04:05'),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (0.1234, '0.1234'),
        (0.951, '0.9510'),
        (1234.4, '1234'),
        (123_456.0, '1.235e+05'),
        (12_345, '12,345'),
        (float('nan'), 'nan'),
        (float('-inf'), '-inf'),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_full_line():
    values = {'loss': 0.12341, 'accuracy': 0.9512}
    told = line(400, 2000, values, examples_per_second=12_345.4, input_wait=0.02, eta_seconds=83.2)
    assert told == (
        'step 400/2,000 (20 %)  loss 0.1234  accuracy 0.9512  12,345 examples/s  '
        'input wait 2 %  ETA 0:01:23'
    )


def test_unknown_parts_are_left_out():
    assert line(1999, 2000, {}) == 'step 1,999/2,000 (99 %)'


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_eta_is_for_the_whole_job_at_the_recent_pace():
    clock = Clock()
    progress = Progress(1000, 500, clock=clock)
    assert progress.eta_seconds is None
    clock.now += 50.0  # Compiles: 50 s for the first 10 steps.
    assert progress.line(510, {}).endswith('ETA 0:40:50')
    clock.now += 10.0
    assert progress.line(520, {}).endswith('(52 %)  ETA 0:08:00')
    for step in range(530, 640, 10):  # Ten times as fast from now on.
        clock.now += 1.0
        progress.update(step)
    assert progress.eta_seconds == pytest.approx((1000 - 630) / 10)


def test_the_pace_is_that_of_as_many_lines_as_are_asked_for():
    clock = Clock()
    progress = Progress(100, 0, marks=4, clock=clock)
    for step, seconds in ((10, 50), (20, 50), (21, 1), (22, 1), (23, 1)):
        clock.now += seconds
        progress.update(step)
    assert progress.eta_seconds == pytest.approx(77)


def test_without_progress_there_is_no_eta_and_at_the_end_it_is_0():
    clock = Clock()
    progress = Progress(10, 0, clock=clock)
    clock.now += 1
    progress.update(0)
    assert progress.eta_seconds is None
    clock.now += 1
    progress.update(12)
    assert progress.eta_seconds == 0
