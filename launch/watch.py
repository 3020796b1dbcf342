"""Whether the workers of an attempt get on: what each says it does, and for how long it may."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from launch.ledger import parse_lines

# How many times the patience each phase has while nothing better is known. Compiling a large model
# takes long, as does anything with a large checkpoint, or a pass over all data.
_TIMES_PATIENCE = {
    'starting': 10,
    'indexing': 120,
    'building': 10,
    'restoring': 15,
    'compiling': 30,
    'stepping': 10,
    'evaluating': 30,
    'saving': 10,
    'exporting': 15,
    'ending': 5,
}
# These come again and again and take about as long each time. A save does not: it takes long only
# if the one before has not been written yet.
_LEARNT = ('stepping', 'evaluating')
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
        newest: of each worker, the newest value of every field that it has written.
        compiling: whether any worker has come as far as that.
        rollbacks: what the chief has said when it went back to a checkpoint.
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
        self._said: list[float | None] = [None] * len(files)  # by the worker's clock
        # By this process's own clock, which neither jumps nor stands still for one side alone.
        self._heard = [time.monotonic()] * len(files)
        self.newest: list[dict] = [{} for _ in files]
        self.compiling = False
        self.rollbacks: list[dict] = []

    def read(self) -> None:
        """Takes in what the workers have written since the last time."""
        for index, path in enumerate(self._files):
            for line in self._new_lines(index, path):
                phase, said = self._phases[index], self._said[index]
                if phase in _LEARNT and said is not None:
                    silence = line['time'] - said
                    self._longest[phase] = max(self._longest.get(phase, 0.0), silence)
                self._said[index], self._phases[index] = line['time'], line['phase']
                self._heard[index] = time.monotonic()
                self.newest[index] |= line
                self.compiling = self.compiling or line['phase'] == 'compiling'
                if index == 0 and 'rolled_back' in line:
                    self.rollbacks.append(line)

    def silences(self) -> list[float]:
        """Returns for how many seconds each worker has said nothing."""
        now = time.monotonic()
        return [now - heard for heard in self._heard]

    def allowed(self, phase: str) -> float:
        """Returns how many seconds of silence are allowed in a phase."""
        generous = self._patience * _TIMES_PATIENCE.get(phase, 10)
        if phase not in self._longest:
            return generous
        return max(self._patience, _TIMES_THE_LONGEST * self._longest[phase])

    def stuck(self, states: Sequence[str]) -> Stuck | None:
        """Returns the worker that holds up the others, if one is silent for too long.

        All fall silent when one does, because they wait for it: the guilty one is stopped, or in
        another phase than the steps in which the others wait, or fell silent first. Its own phase
        then says how long it may: others wait in a step for a long save of the chief.

        Args:
            states: of each worker, see `launch.local.Workers.states`.
        """
        silent = self._silent(states)
        if not any(each.seconds > each.allowed for each in silent):
            return None
        guilty = max(silent, key=lambda e: (e.stopped, e.phase != 'stepping', e.seconds))
        return guilty if guilty.stopped or guilty.seconds > guilty.allowed else None

    def stopped(self, states: Sequence[str]) -> Stuck | None:
        """Returns a worker whose process is stopped, for however short a time."""
        return next((each for each in self._silent(states) if each.stopped), None)

    def silent(self, states: Sequence[str]) -> Stuck | None:
        """Returns a worker that has said nothing for longer than the patience, in any phase."""
        silent = [each for each in self._silent(states) if each.seconds > self._patience]
        return max(silent, key=lambda each: each.seconds, default=None)

    def _silent(self, states: Sequence[str]) -> list[Stuck]:
        return [
            Stuck(index, phase, silence, self.allowed(phase), state == 'stopped')
            for index, (phase, silence, state) in enumerate(
                zip(self._phases, self.silences(), states, strict=True)
            )
            if state != 'ended'
        ]

    def _new_lines(self, index: int, path: Path) -> list[dict]:
        try:
            with open(path, 'rb') as file:
                file.seek(self._offsets[index])
                text = file.read()
        except OSError:  # Not there yet, or a file system that stalls.
            return []
        complete = text[: text.rfind(b'\n') + 1]
        self._offsets[index] += len(complete)
        lines = parse_lines(complete.decode(errors='replace'))
        return [line for line in lines if 'time' in line and 'phase' in line]
