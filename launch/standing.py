"""How far a job is that runs, over all its attempts, by the word of its chief."""

import time
from collections.abc import Callable

from trainer.observe.progress import Progress, line

# Of the pace that the rest of the job is estimated by: a minute or so, a line a second.
_MARKS = 60


class Standing:
    """How far a job is.

    Args:
        clock: seconds, never going back.

    Attributes:
        said: the newest value of each field of the chief's records of phases.
        stepping: whether this attempt has taken a step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.said: dict = {}
        self.begin()

    def begin(self) -> None:
        """Another attempt begins: the pace of the one before is none of its."""
        for field in ('examples_per_second', 'seconds', 'input_seconds'):
            self.said.pop(field, None)
        self._progress: Progress | None = None
        self.stepping = False

    def take(self, newest: dict) -> None:
        """Takes in what the chief has said in this attempt, see `Watch.newest`."""
        before = self.step
        self.said |= newest
        self.stepping = 'seconds' in newest
        if 'last_step' not in newest:
            return
        if self._progress is None:
            self._progress = Progress(self.last_step, self.step, marks=_MARKS, clock=self._clock)
        elif self.step > before:
            self._progress.update(self.step)
        elif self.step < before:  # Training has gone back.
            self._progress = Progress(self.last_step, self.step, marks=_MARKS, clock=self._clock)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.said.get('step', 0)

    @property
    def last_step(self) -> int:
        """Steps of the whole job; 0 while that is not known."""
        return self.said.get('last_step', 0)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the job's last step, or None while the pace is unknown."""
        return self._progress.eta_seconds if self._progress else None

    @property
    def input_wait(self) -> float | None:
        """The share of the time, 0 to 1, that replicas waited for batches."""
        if not self.said.get('seconds') or 'input_seconds' not in self.said:
            return None
        return min(1.0, self.said['input_seconds'] / self.said['seconds'])

    def line(self) -> str:
        """Returns the job's progress in one line, in the words of the chief's."""
        return line(
            self.step,
            self.last_step,
            {'loss': self.said['loss']} if 'loss' in self.said else {},
            examples_per_second=self.said.get('examples_per_second'),
            input_wait=self.input_wait,
            eta_seconds=self.eta_seconds,
        )
