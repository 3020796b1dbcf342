"""When training has gone astray: rows of bad steps, found alike on every worker and in every run.

A step is bad if its loss or gradient is not finite, and then it changes nothing; or, where that is
asked for, if its loss lies far above those before it. After too many of them in a row training
goes back to a checkpoint and leaves out the data around them, as in Chowdhery et al., "PaLM",
section 5.1 (https://arxiv.org/abs/2204.02311), where the same batches did no harm to weights of
another step.

"Far above" is the modified z-score of Iglewicz and Hoaglin, "How to Detect and Handle Outliers"
(1993): the distance from the median, in units of the median absolute deviation.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data import order
from trainer.errors import ConfigError, Diverged

_HISTORY = 200  # good steps that a loss is compared with
_LEAST_HISTORY = 50
_RENEW_EVERY = 10  # steps; medians take their time
_MAD_OF_NORMAL = 0.6745


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What counts as divergence and how often it is put up with.

    Attributes:
        bad_steps: so many bad steps in a row are one too many.
        spike_z: a step is also bad if the modified z-score of its loss among the 200 good steps
            before it is above this; None looks at no losses.
        max_rollbacks: how often a run goes back and leaves out data; then, or where there is no
            checkpoint to go back to, it ends.

    Raises:
        ConfigError: a value out of its range.
    """

    bad_steps: int = 20
    spike_z: float | None = None
    max_rollbacks: int = 3

    def __post_init__(self):
        for name, least in (('bad_steps', 1), ('max_rollbacks', 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f'Divergence.{name} = {value!r} must be an integer of at least {least}.'
                )
        z = self.spike_z
        if z is not None and (isinstance(z, bool) or not isinstance(z, int | float) or z <= 0):
            raise ConfigError(
                f'Divergence.spike_z = {z!r} must be a number above 0, such as 10, or None.'
            )


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What a run does not read because of roll-backs.

    Attributes:
        windows: of positions, see `trainer.data.order`.
        rollbacks: how many led to them.
    """

    windows: order.Windows = ()
    rollbacks: int = 0

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> 'LeftOut':
        """Returns what the run had left out when it saved a checkpoint."""
        record = manifest.get('left_out', {})
        windows = tuple((int(first), int(end)) for first, end in record.get('windows', ()))
        return LeftOut(windows, int(record.get('rollbacks', 0)))

    def more(self, first: int, end: int) -> 'LeftOut':
        """Returns this after a roll-back that leaves out positions, counted without the others."""
        return LeftOut(order.leave_out(self.windows, first, end), self.rollbacks + 1)


class BadSteps:
    """Looks out for rows of bad steps, whatever calls the steps come in.

    Args:
        policy: what is looked for.
        record: of an instance that had seen all steps before, from `record`.
    """

    def __init__(self, policy: Divergence, record: Mapping[str, Any] | None = None):
        record = record or {}
        self._policy = policy
        self._row = int(record.get('row', 0))
        self._losses = collections.deque(record.get('losses', ()), _HISTORY)
        self._limit = float(record.get('limit', math.inf))

    @property
    def in_row(self) -> bool:
        """Whether the last step was a bad one."""
        return self._row > 0

    def record(self) -> dict[str, Any]:
        """Returns what a resumed run has to know, as JSON can hold it."""
        record: dict[str, Any] = {'row': self._row}
        if self._losses:
            record['losses'] = list(self._losses)
        if math.isfinite(self._limit):
            record['limit'] = self._limit
        return record

    def look(
        self, first: int, num_steps: int, skipped: Sequence[int], losses: np.ndarray | None = None
    ) -> Diverged | None:
        """Takes in the next steps; says so if with them there are too many bad ones in a row.

        Args:
            first: steps taken before them.
            num_steps: how many they are.
            skipped: which steps (counted from 0) were not finite, ascending.
            losses: [num_steps] of each step, if `spike_z` is set.

        Returns:
            None, or the error to raise if nothing can be done about it.
        """
        if losses is None and not skipped:
            self._row = 0
            return None
        not_finite = set(skipped)
        for step in range(first, first + num_steps):
            loss = None if losses is None else float(losses[step - first])
            if step in not_finite or (loss is not None and loss > self._limit):
                self._row += 1
            else:
                self._row = 0
                if loss is not None:
                    self._losses.append(loss)
            if self._row >= self._policy.bad_steps:
                return self._diverged(step + 1)
            if losses is not None and step % _RENEW_EVERY == 0:
                self._limit = self._loss_limit()
        return None

    def _diverged(self, end: int) -> Diverged:
        first = end - self._row
        what = 'not finite' if self._policy.spike_z is None else 'not finite or far too high'
        return Diverged(
            f'The losses of {self._row} step(s) in a row, from step {first + 1} on, were {what}. '
            'Lower the learning rate, clip gradients, or look at the data; `phalanx replay` shows '
            'a step in detail.',
            first_step=first,
            end_step=end,
        )

    def _loss_limit(self) -> float:
        if len(self._losses) < _LEAST_HISTORY:
            return math.inf
        losses = np.asarray(self._losses)
        median = np.median(losses)
        deviation = np.median(np.abs(losses - median))
        # Where most losses are equal, the least bit above would be infinitely far.
        deviation = max(deviation, 1e-3 * abs(median), 1e-12)
        return float(median + self._policy.spike_z * deviation / _MAD_OF_NORMAL)
