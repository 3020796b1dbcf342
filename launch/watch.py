"""Whether the workers of an attempt get on: what each says it does, and for how long it may."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

# Seconds without a word after which a worker counts as stuck, while nothing better is known.
# Compiling a large model takes long, and so does starting on a cold file system.
GENEROUS = {
    'starting': 600.0,
    'building': 600.0,
    'restoring': 900.0,
    'compiling': 1800.0,
    'stepping': 600.0,
    'evaluating': 1800.0,
    'saving': 900.0,
    'exporting': 900.0,
    'ending': 300.0,
}
# A phase may take so many times the longest that it ever took in this run.
_TIMES_THE_LONGEST = 5.0


@dataclasses.dataclass(frozen=True)
class Stuck:
    """A worker that makes no progress.

    Attributes:
        worker: its number.
        phase: what it last said it does.
        seconds: for how long it has said nothing.
        allowed: how long it may.
        stopped: whether the process is stopped (SIGSTOP), not just silent.
        where: what its Python code is in, if that is known.
    """

    worker: int
    phase: str
    seconds: float
    allowed: float
    stopped: bool
    where: str = ''

    def __str__(self) -> str:
        why = '; the process is stopped' if self.stopped else ''
        why += f'; it is in {self.where}' if self.where else ''
        return (
            f'worker {self.worker} makes no progress in the phase {self.phase!r}: no word for '
            f'{self.seconds:.0f} s, where {self.allowed:.0f} s are allowed{why}'
        )


class Watch:
    """Follows the records of phases of one attempt.

    Attributes:
        step: the last step that the chief has reported; None before the first.
        first_step_at: when the chief reported the first steps of this attempt, or None.
    """

    def __init__(self, files: Sequence[Path], longest: dict[str, float], patience: float):
        """Begins to watch.

        Args:
            files: of each worker, its record of phases; it need not exist yet.
            longest: for phases, the longest silence so far, in seconds; brought up to date.
            patience: seconds that are allowed in any phase.
        """
        self._files, self._longest, self._patience = files, longest, patience
        self._offsets = [0] * len(files)
        self._phases = ['starting'] * len(files)
        self._times = [time.time()] * len(files)
        self.step: int | None = None
        self.first_step_at: float | None = None

    def read(self) -> None:
        """Takes in what the workers have written since the last time."""
        for index, path in enumerate(self._files):
            for line in self._new_lines(index, path):
                silence, phase = line['time'] - self._times[index], self._phases[index]
                self._longest[phase] = max(self._longest.get(phase, 0.0), silence)
                self._times[index], self._phases[index] = line['time'], line['phase']
                if index == 0 and line['phase'] == 'stepping' and 'step' in line:
                    self.step = line['step']
                    self.first_step_at = self.first_step_at or line['time']

    def allowed(self, phase: str) -> float:
        """Returns how many seconds of silence are allowed in a phase."""
        generous = max(GENEROUS.get(phase, 600.0), self._patience)
        if phase not in self._longest:
            return generous
        return min(generous, max(self._patience, _TIMES_THE_LONGEST * self._longest[phase]))

    def stuck(self, pids: Sequence[int]) -> Stuck | None:
        """Returns the worker that holds up the others, if one is silent for too long.

        All fall silent when one does, because they wait for it: the guilty one is stopped, or in
        another phase than the steps in which the others wait, or fell silent first.
        """
        now = time.time()
        silent = [
            Stuck(index, phase, now - then, self.allowed(phase), _is_stopped(pids[index]))
            for index, (phase, then) in enumerate(zip(self._phases, self._times, strict=True))
        ]
        if not any(each.seconds > each.allowed for each in silent):
            return None
        return max(silent, key=lambda e: (e.stopped, e.phase != 'stepping', e.seconds))

    def states(self) -> list[Mapping[str, object]]:
        """Returns each worker's phase and the seconds since its last word."""
        now = time.time()
        return [
            {'phase': phase, 'seconds': round(now - then, 1)}
            for phase, then in zip(self._phases, self._times, strict=True)
        ]

    def _new_lines(self, index: int, path: Path) -> list[dict]:
        try:
            with open(path, 'rb') as file:
                file.seek(self._offsets[index])
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b'\n') + 1]
        self._offsets[index] += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
