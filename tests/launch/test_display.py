"""What a job shows while it runs, from records made by hand, and in a real terminal."""

import contextlib
import fcntl
import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from launch import display
from launch.display import Attempt, Display
from launch.live import Live
from launch.watch import Watch
from tests.processes import environment
from trainer.observe import progress

STEPPING = {
    'phase': 'stepping',
    'seconds': 1.0,
    'input_seconds': 0.25,
    'loss': 0.5,
    'examples_per_second': 6400.0,
    'of a later version': [1],
}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Job:
    """The files of an attempt's workers, which are written by hand, and their exit codes."""

    def __init__(self, directory, workers=2):
        self.directory, self.codes, self.checkpoint = directory, [None] * workers, 0
        directory.mkdir(exist_ok=True)
        self.logs = [directory / f'worker-{index}.log' for index in range(workers)]
        self.phases = [directory / f'worker-{index}.phases.jsonl' for index in range(workers)]
        for log in self.logs:
            log.write_text('')
        self.watch = Watch(self.phases, {}, 60.0)

    def attempt(self, number=1, restarts=0):
        return Attempt(
            number, restarts, self.logs, self.watch, lambda: self.codes, lambda: self.checkpoint
        )

    def prints(self, text, worker=0):
        with open(self.logs[worker], 'a') as log:
            log.write(text)

    def says(self, fields, worker=0, **more):
        with open(self.phases[worker], 'a') as file:
            file.write(json.dumps({'time': time.time(), **fields, **more}) + '\n')
        self.watch.read()

    def compiles(self, step=0, last_step=1000):
        self.says({'phase': 'compiling'}, step=step, last_step=last_step)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / 'attempt-1')


def chiefs_line(step):
    return f'12:34:56 I {progress.line(step, 1000, {"loss": 0.5}, examples_per_second=12.0)}\n'


def lines_of_progress(text):
    """Without the time of day."""
    return re.findall(r'^\d\d:\d\d:\d\d I (step .*)$', text, re.MULTILINE)


# ---- Where there is no terminal.


def test_lines_of_progress_are_held_back_and_all_others_pass(job, clock, capsys):
    shown = Display(clock=clock)
    shown.begin(job.attempt())
    job.prints(chiefs_line(100) + '12:34:56 I evaluation at step 100/1,000 (10 %)  loss 0.2\n')
    job.prints('12:34:56 W disk nearly full\nstep 100/1,000 of my own\nErr')
    shown.show()
    job.prints('or: héllo\n')
    shown.show()
    job.prints('no newline')
    shown.end()
    assert capsys.readouterr().out == (
        '12:34:56 I evaluation at step 100/1,000 (10 %)  loss 0.2\n'
        '12:34:56 W disk nearly full\nstep 100/1,000 of my own\nError: héllo\nno newline\n'
    )


def test_there_is_a_line_of_progress_at_most_every_60_s_and_one_before_the_end(job, clock, capsys):
    shown = Display(clock=clock)
    shown.begin(job.attempt())
    job.compiles()
    told_at = []
    for second in range(200):
        if second >= 20:
            job.says(STEPPING, step=second - 19)
        shown.show()
        if capsys.readouterr().out:
            told_at.append(second)
        clock.now += 1.0
    assert told_at == [30, 90, 150]
    job.says(STEPPING, step=1000)
    job.prints('finished\n')
    shown.show()
    shown.end()
    out = capsys.readouterr().out
    assert lines_of_progress(out) == [
        'step 1,000/1,000 (100 %)  loss 0.5000  6,400 examples/s  input wait 25 %  ETA 0:00:00  '
        '2 workers'
    ]
    assert out.endswith('2 workers\nfinished\n')


def test_restarts_do_not_bring_more_lines_but_each_end_of_an_attempt_brings_one(
    tmp_path, clock, capsys
):
    shown = Display(clock=clock)
    for number in range(1, 4):
        job = Job(tmp_path / f'attempt-{number}')
        shown.begin(job.attempt(number, restarts=number - 1))
        job.compiles(step=100 * number)
        for step in range(12):
            job.says(STEPPING, step=100 * number + 1 + step)
            shown.show()
            clock.now += 1.0
        shown.say('phalanx: worker 1 was ended by signal 9')
        shown.end()
    out, err = capsys.readouterr()
    told = lines_of_progress(out)
    assert [each.split('/')[0] for each in told] == ['step 111', 'step 112', 'step 212', 'step 312']
    assert [each.split('  ')[-1] for each in told] == [
        '2 workers', '2 workers', '1 restart', '2 restarts',
    ]  # fmt: skip
    directory = tmp_path / 'attempt-1'
    assert err.startswith(f'phalanx: attempt 1: 2 workers; logs in {directory}\n')
    assert err.count('was ended by signal 9') == 3


@pytest.mark.parametrize(
    ('logs', 'expected'),
    [
        ('chief', 'from the chief\n'),
        ('all', 'worker 0: from the chief\nworker 1: from the other\n'),
        ('none', ''),
    ],
)
def test_it_is_chosen_whose_output_is_shown(job, capsys, logs, expected):
    shown = Display(logs)
    shown.begin(job.attempt())
    job.prints('from the chief\n')
    job.prints('from the other\n', worker=1)
    shown.show()
    assert capsys.readouterr().out == expected
    assert [shown.shows(0), shown.shows(1)] == [logs != 'none', logs == 'all']


def test_what_does_not_train_shows_its_output_and_nothing_else(job, capsys):
    shown = Display(progress=False)
    shown.begin(job.attempt())
    job.compiles(last_step=1)
    job.says(STEPPING, step=1)
    job.prints(chiefs_line(1))
    shown.show()
    shown.end()
    assert capsys.readouterr() == (chiefs_line(1), '')


@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_a_closed_pipe_ends_nothing_and_leaves_the_exit_code(closed):
    program = f"""
import sys
from launch.display import write
sys.stdin.read()
for _ in range(3):
    write('a line\\n', sys.{closed})
sys.exit(75)
"""
    process = subprocess.Popen(
        [sys.executable, '-c', program],
        env=environment(PYTHONUNBUFFERED=''),  # Without a buffer nothing is left for the end.
        stdin=subprocess.PIPE,
        **{closed: subprocess.PIPE},
    )
    getattr(process, closed).close()
    process.stdin.close()
    assert process.wait(30) == 75


def test_what_a_stream_cannot_encode_is_replaced():
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    display.write('5 ━ 6\n', stream)
    assert stream.buffer.getvalue() == b'5 ? 6\n'


# ---- In a terminal.


def live(clock, logs='chief', width=100):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=width, height=40)
    return out, Live(logs, console=console, clock=clock)


def frame(out, shown, clock):
    """What is drawn anew."""
    out.seek(0)
    out.truncate()
    clock.now += 2.0
    shown.show()
    return re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', out.getvalue()).replace('\r', '')


def test_the_display_has_progress_figures_and_workers(job, clock):
    out, shown = live(clock)
    with shown:
        shown.begin(job.attempt(number=4, restarts=2))
        assert 'starting' in frame(out, shown, clock)
        job.compiles(step=200)
        for step in (300, 400, 500):
            job.says(STEPPING, step=step)
            job.says({'phase': 'stepping'}, step=step, worker=1)
            text = frame(out, shown, clock)
        job.checkpoint = 400
        job.watch._heard[1] -= 7
        job.says({'phase': 'saving'}, step=500)
        text = frame(out, shown, clock)
        progress_line, figures, _, first, second = text.splitlines()
        assert re.fullmatch(r'step 500/1,000 ━+╸?╺?━+ +50 % ETA 0:00:10', progress_line)
        assert len(progress_line) == 100
        assert figures == (
            'loss 0.5000  6,400 examples/s  input wait 25 %  checkpoint 400  attempt 4  2 restarts'
        )
        assert first.split() == ['0', 'saving', '500', '0', 's', 'ago']
        assert second.split() == ['1', 'stepping', '500', '7', 's', 'ago']


def test_who_has_ended_is_shown_with_its_code_and_who_was_ended_without(job, clock):
    out, shown = live(clock)
    with shown:
        shown.begin(job.attempt())
        job.codes = [None, -9]
        assert 'ended with -9' in frame(out, shown, clock)
        job.codes = [-9, -9]  # The launcher has killed the other one.
        shown.end()
        assert 'ended by the launcher' in frame(out, shown, clock)  # Before the next attempt.
    assert re.search(r'0  ended by the launcher +\n +1  ended with -9 +\n', out.getvalue())


def test_another_attempt_keeps_the_progress_and_may_have_fewer_workers(tmp_path, clock):
    out, shown = live(clock)
    with shown:
        before = Job(tmp_path / 'attempt-1', workers=4)
        shown.begin(before.attempt())
        before.compiles()
        before.says(STEPPING, step=500)
        frame(out, shown, clock)
        after = Job(tmp_path / 'attempt-2', workers=2)
        shown.say('phalanx: going on with 2 workers instead of 4')
        before.prints('last words\n')
        shown.end()
        shown.begin(after.attempt(2, 1))
        assert out.getvalue().count('last words') == 1
        text = frame(out, shown, clock)
        assert 'step 500/1,000' in text
        assert 'loss 0.5000  no checkpoint  attempt 2  1 restart\n' in text
        assert text.count('s ago') == 2
        after.compiles(step=400)
        assert 'step 400/1,000' in frame(out, shown, clock)
        shown.begin(Job(tmp_path / 'attempt-3', workers=1).attempt(3, 2))  # Nothing comes of it.
    assert 'attempt 3  2 restarts' in out.getvalue()


def test_log_lines_scroll_by_as_they_are(job, clock):
    long = 'a word ' * 30
    out, shown = live(clock, width=60)
    with shown:
        shown.begin(job.attempt())
        job.prints(f'[bold]12:34:56 :smile: {long}|\n[/red] {{"a": 1}}\n')
        job.prints('10 %\r20 %\r30 %\r\n\x1b[2Jcleared\n')
        text = frame(out, shown, clock)
    assert text.startswith(
        f'[bold]12:34:56 :smile: {long}|\n[/red] {{"a": 1}}\n30 %\ncleared\nstarting'
    )


def test_the_display_is_drawn_at_most_four_times_a_second(job, clock):
    out, shown = live(clock)
    with shown:
        shown.begin(job.attempt())
        drawn = 0
        for _ in range(100):
            job.prints('a line\n')
            size = len(out.getvalue())
            shown.show()
            drawn += len(out.getvalue()) > size
            clock.now += 0.1
        assert 30 <= drawn <= 40
    assert out.getvalue().count('a line') == 100


def test_how_a_job_ended_stands_below_its_last_state_and_the_cursor_is_back(job, clock):
    out, shown = live(clock)
    with shown:
        shown.begin(job.attempt())
        job.says({'phase': 'ending'})
        job.prints('finished step 1000\n')
        assert 'finished' not in frame(out, shown, clock)
        job.checkpoint = 1000
        job.codes = [0, 0]
        shown.show()
        shown.end()
    text = out.getvalue()
    assert 'checkpoint 1,000' in text
    assert text.rindex('ended with 0') < text.index('finished step 1000')
    assert text.rindex('\x1b[?25h') > text.rindex('ended with 0')


def test_a_very_small_terminal_is_survived(job, clock):
    out, shown = live(clock, width=12)
    with shown:
        shown.begin(job.attempt())
        job.compiles()
        job.says(STEPPING, step=500)
        job.prints('a line that is longer than that\n')
        assert 'a line that is longer than that\n' in frame(out, shown, clock)


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [([], 'Live True'), (['TERM=dumb'], 'Display False'), (['>pipe'], 'Display False')],
)
def test_rich_is_loaded_only_for_a_terminal_that_can_show_it(argv, expected):
    program = (
        'import sys; from launch import __main__, display\n'
        'shown = display.for_stdout("chief")\n'
        'print(type(shown).__name__, "rich.live" in sys.modules, file=sys.stderr)'
    )
    term = 'dumb' if argv == ['TERM=dumb'] else 'xterm'
    terminal, inner = os.openpty()
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=environment(TERM=term),
        stdout=subprocess.DEVNULL if argv == ['>pipe'] else inner,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    os.close(terminal)
    os.close(inner)
    assert done.stderr == f'{expected}\n'


# Makes stdin the terminal that Ctrl-C comes from.
BOOT = (
    'import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); '
    'from launch.__main__ import main; sys.exit(main())'
)


class Terminal:
    """A launcher in a terminal of its own."""

    def __init__(self, *argv):
        self._terminal, inner = os.openpty()
        self.resize(40, 120)
        self.process = subprocess.Popen(
            [sys.executable, '-c', BOOT, *argv],
            env=environment(TERM='xterm'),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self.output = ''

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def resize(self, rows, columns):
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack('4H', rows, columns, 0, 0))

    def type(self, text):
        os.write(self._terminal, text)

    def read_until(self, pattern, timeout=120):
        """Reads what is printed from now on until the pattern is in it."""
        begin, end = len(self.output), time.monotonic() + timeout
        while not re.search(pattern, self.output[begin:]):
            assert time.monotonic() < end, self.output[-3000:]
            assert self._read(), self.output[-3000:]

    def end(self):
        """Waits; returns the exit code."""
        with contextlib.suppress(OSError):  # The other side is closed.
            while self._read():
                pass
        return self.process.wait(30)

    def _read(self):
        if not select.select([self._terminal], [], [], 120)[0]:
            return False
        new = os.read(self._terminal, 65536).decode(errors='replace')
        self.output += new
        return bool(new)


@pytest.mark.slow
def test_a_job_in_a_terminal(tmp_path):
    flags = [
        'run', '--workers=2', '--gin_file=runs/digits.gin', '--gin.DEVICES=1', '--mode=train',
        '--gin.train.eval_every=None', f'--model_dir={tmp_path}/run',
    ]  # fmt: skip
    with Terminal(*flags, '--gin.STEPS=1000000') as terminal:
        terminal.read_until(r'0  starting')
        terminal.read_until(r'step [1-9][\d,]*/1,000,000 .*━')
        terminal.read_until(r'loss [\d.]+  [\d,]+ examples/s')
        terminal.read_until(r'1  stepping +[\d,]+ +\d s ago')
        terminal.resize(20, 50)
        terminal.read_until(r'1  stepping +[\d,]+ +\d s ago')
        assert terminal.output.count('\x1b[?25l') == 1
        terminal.type(b'\x03')
        assert terminal.end() == 75
    steps = int(re.search(r'preempted: saved step (\d+) of', terminal.output)[1])
    assert 'phalanx: SIGINT: the workers save and end' in terminal.output
    assert terminal.output.count('ended with 75') >= 2
    assert terminal.output.rindex('\x1b[?25h') > terminal.output.rindex('ended with 75')
    assert f'checkpoint {steps:,}' in terminal.output

    with Terminal(*flags, f'--gin.STEPS={steps + 5}') as terminal:
        assert terminal.end() == 0
    _, shown, final = terminal.output.rpartition('1  ended with 0')
    assert shown
    *_, last_state = re.findall(r'step ([\d,]+)/[\d,]+ .*━.*?(\d+ %)', terminal.output)
    assert last_state == (f'{steps + 5:,}', '100 %')
    assert final.index('\x1b[?25h') < final.index(f'finished step {steps + 5}: train/loss')
    assert final.index('checkpoint:   ') < final.index('in steps that count; `phalanx report')


def test_a_log_that_somebody_has_deleted_is_not_quoted(job, clock, capsys):
    shown = Display(clock=clock)
    job.prints('the reason\n', worker=1)
    shown.begin(job.attempt())
    shown.quote('worker 1', job.logs[1])
    job.logs[0].unlink()
    shown.quote('worker 0', job.logs[0])
    assert 'worker 1: the reason' in capsys.readouterr().err


def test_a_job_that_goes_back_gets_another_estimate(job, clock, capsys):
    shown = Display(clock=clock)
    shown.begin(job.attempt())
    job.compiles()
    for step in (400, 100, 200):
        clock.now += 100
        job.says(STEPPING, step=step)
        shown.show()
    shown.end()
    # 100 steps in 100 s since it went back, and 800 to go.
    assert lines_of_progress(capsys.readouterr().out)[-1].endswith('ETA 0:13:20  2 workers')


@pytest.mark.parametrize('logs', ['chief', 'all'])
def test_what_the_others_say_of_a_dead_worker_is_not_shown(job, clock, capsys, logs):
    shown = Display(logs, clock=clock)
    shown.begin(job.attempt())
    job.prints('before\n')
    shown.show()
    shown.only(1)
    job.prints('a long traceback\n')
    job.prints('why I die\n', worker=1)
    shown.show()
    shown.end()
    out = capsys.readouterr().out
    assert 'before' in out
    assert 'a long traceback' not in out
    assert ('why I die' in out) == (logs == 'all')
    shown.begin(job.attempt(2))
    job.prints('again\n')
    shown.end()
    assert 'again' in capsys.readouterr().out
