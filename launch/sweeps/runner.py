"""Runs the trials of a sweep, each a job of its own under `phalanx run`, to their end."""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch import child
from launch.follower import MISTAKE, POLL_SECONDS, PREEMPTED
from launch.sweeps import hparams
from launch.sweeps.book import ENDED, Book, Trial
from launch.sweeps.measured import evaluations, measures
from launch.sweeps.plan import Plan
from launch.sweeps.search import draw
from launch.sweeps.slots import Slot
from launch.sweeps.stopping import median_rule
from trainer.errors import ConfigError, nearest

# Saved; or told to stop so early that nothing had begun that could be saved.
_STOPPED = (PREEMPTED, -signal.SIGTERM)
# A worker's error, or what its launcher makes of it.
_TOLD = re.compile(r'(?:error: |phalanx: (?=giving up|model_dir))(.*)')
_LOOK_SECONDS = 1.0  # How often their evaluations are read.


class Runner:
    """Runs trials until all have ended or it is asked to stop.

    Args:
        plan: which trials.
        book: where they are written down.
        flags: of `phalanx run`, for each of them.
        slots: where they run, one each.
        tell: is told what happens, in a line.
    """

    def __init__(
        self,
        plan: Plan,
        book: Book,
        flags: Sequence[str],
        slots: Sequence[Slot],
        tell: Callable[[str], None],
    ):
        self._plan, self._book, self._flags, self._tell = plan, book, list(flags), tell
        self._slots = list(slots)
        self._running: dict[int, tuple[subprocess.Popen, Slot]] = {}
        self._curves: dict[int, dict[int, float]] = {}
        self._signals: list[int] = []
        self._looked = 0.0
        self._metric_is_known = False

    def run(self) -> int:
        """Returns the exit code: 0 if a trial has finished, 1 if all failed, 75 if stopped.

        Raises:
            ConfigError: a trial does not measure what all shall be compared by.
        """
        with self._catching_signals():
            try:
                sent = 0
                while self._start_more() or self._running:
                    if len(self._signals) > sent:
                        sent = len(self._signals)
                        for process, _ in self._running.values():
                            process.send_signal(signal.SIGTERM)
                    if time.monotonic() - self._looked > _LOOK_SECONDS:
                        self._look()
                    self._reap()
                    time.sleep(POLL_SECONDS)
            finally:
                for number, (process, _) in self._running.items():
                    process.kill()  # Its workers end with it.
                    self._book.note(self._book.trials[number], code=process.wait())
        if self._left():
            return PREEMPTED
        return 0 if any(t.state != 'failed' for t in self._book.trials.values()) else 1

    def _left(self) -> list[int]:
        """The numbers of the trials that have not ended."""
        trials = self._book.trials
        return [
            number
            for number in range(1, self._plan.trials + 1)
            if number not in trials or trials[number].state not in ENDED
        ]

    def _start_more(self) -> bool:
        """Starts trials where there is room; returns whether there are any that have to wait."""
        if self._signals:
            return False
        waiting = [number for number in self._left() if number not in self._running]
        while waiting and self._slots:
            number = waiting.pop(0)
            trial = self._book.trials.get(number)
            if trial is None:
                parameters = draw(self._plan, number, self._known())
                trial = self._book.note(Trial(number, parameters))
            if trial.stop_at is not None:
                # The sweep was killed between the decision and its end.
                self._end(trial, 'stopped')
                continue
            self._start(trial, self._slots.pop(0))
        return bool(waiting)

    def _known(self) -> list[Trial]:
        return [trial for _, trial in sorted(self._book.trials.items())]

    def _start(self, trial: Trial, slot: Slot) -> None:
        dirs = self._book.dirs(trial)
        goes_on = dirs.path.exists()
        dirs.path.mkdir(exist_ok=True)
        hparams.write_start(dirs.path, trial.parameters)
        bindings = [f'--gin.{name}={text}' for name, text in trial.parameters.items()]
        command = child.command(
            'launch',
            'run',
            f'--gin_script={self._book.config}',
            *self._flags,
            *bindings,
            f'--model_dir={dirs.path}',
        )
        with slot.taken() as variables, open(self.log(trial), 'ab') as log:
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Out of the terminal's group: Ctrl-C comes from the sweep, and once.
                start_new_session=True,
            )
        self._running[trial.number] = process, slot
        self._book.note(trial, code=None)
        verb = 'goes on' if goes_on else 'begins'
        self._tell(f'{trial.name} {verb}: {described(trial)}')

    def log(self, trial: Trial) -> Path:
        """What the launcher of a trial has printed."""
        return self._book.directory / f'{trial.name}.log'

    def _look(self) -> None:
        """Takes in what the trials say of themselves, and stops those that are not worth it."""
        self._looked = time.monotonic()
        finished = None
        for number, (process, _) in self._running.items():
            trial = self._book.trials[number]
            self._check_metric(trial)
            curve = self._curve(trial, new=True)
            if curve:
                step = max(curve)
                trial = self._book.note(trial, step=step, value=_json(curve[step]))
            if not self._plan.stop or trial.stop_at is not None or self._signals:
                continue
            if finished is None:
                finished = [self._curve(t) for t in self._known() if t.state == 'finished']
            if reason := median_rule(self._plan, curve, finished):
                # First written, then done: whoever goes on after a kill knows of it.
                self._book.note(trial, stop_at=max(curve), reason=reason)
                self._tell(f'{trial.name} is stopped: {reason}')
                process.send_signal(signal.SIGTERM)

    def _check_metric(self, trial: Trial) -> None:
        """Raises ConfigError once it is known that there will be nothing to compare by.

        Where another trial has measured it, this one is an exception, and fails at its end.
        """
        dirs, metric = self._book.dirs(trial), self._plan.metric
        if self._metric_is_known or not (found := measures(dirs)):
            return
        if metric not in found and not any(t.value is not None for t in self._known()):
            raise ConfigError(
                f'sweep.metric is {metric!r}, which {trial.name} does not measure.'
                f'{nearest(metric, found)} It measures {", ".join(found)}.'
            )
        self._metric_is_known = True
        hparams.write_experiment(self._book.directory, self._plan)

    def _curve(self, trial: Trial, new: bool = False) -> dict[int, float]:
        if new or trial.number not in self._curves:
            curve = evaluations(self._book.dirs(trial), self._plan.metric)
            self._curves[trial.number] = curve
        return self._curves[trial.number]

    def _reap(self) -> None:
        for number, (process, slot) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[number]
            self._slots.append(slot)
            trial = self._book.note(self._book.trials[number], code=code)
            if code == 0:
                self._finish(trial)
            elif code not in _STOPPED:
                self._end(trial, 'failed', reason=self._why(trial, code))
            elif trial.stop_at is not None:
                self._end(trial, 'stopped')
            elif self._signals:
                step = self._book.dirs(trial).newest_step()
                goes_on = f'go on from step {step:,}' if step else 'begin again'
                self._tell(f'{trial.name} is interrupted, and will {goes_on}')
            else:
                # A signal that was for it alone. Whoever starts the sweep again goes on with it.
                self._signals.append(signal.SIGTERM)
                self._tell(f'{trial.name} was asked to stop, and so the sweep is')

    def _finish(self, trial: Trial) -> None:
        """Takes the metric of a trial that has come to its end."""
        self._check_metric(trial)
        dirs, metric = self._book.dirs(trial), self._plan.metric
        step = dirs.newest_step()
        metrics = json.loads(dirs.manifests()[step].read_text())['metrics']
        if metric not in metrics:
            reason = f'it measured no {metric}, but {", ".join(sorted(metrics))}.'
            self._end(trial, 'failed', step=step, reason=reason + nearest(metric, metrics))
            return
        self._curve(trial, new=True)
        self._end(trial, 'finished', step=step, value=metrics[metric], stop_at=None, reason='')

    def _end(self, trial: Trial, state: str, **changes) -> None:
        trial = self._book.note(trial, state=state, **changes)
        hparams.write_end(self._book.dirs(trial).path, state)
        if state == 'finished':
            value = 'not finite' if trial.value is None else f'{trial.value:.4f}'
            self._tell(f'{trial.name} finished step {trial.step}: {self._plan.metric} {value}')
        elif state == 'failed':
            self._tell(f'{trial.name} failed: {trial.reason}')

    def _why(self, trial: Trial, code: int) -> str:
        """The last thing that the launcher of a trial has said of a failure."""
        with contextlib.suppress(OSError):
            lines = self.log(trial).read_text(errors='replace').splitlines()
            for line in reversed(lines):
                if match := _TOLD.match(line):
                    return match[1]
        if code < 0:
            return f'signal {-code}'
        return 'a mistake' if code == MISTAKE else f'exit code {code}'

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            del frame
            self._signals.append(number)

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def described(trial: Trial) -> str:
    """Returns the values of a trial in a line."""
    return ', '.join(f'{name} = {text}' for name, text in trial.parameters.items())


def _json(value: float) -> float | None:
    return value if value == value and abs(value) != float('inf') else None
