"""When something is due: every so many steps, epochs or seconds."""

import math
import re
from fractions import Fraction

from trainer.errors import ConfigError, nearest

_SECONDS = {'second': 1, 'minute': 60, 'hour': 3600}
_UNITS = ('step', 'epoch', *_SECONDS)


def epoch_steps(num_examples: int | None, global_batch_size: int) -> Fraction | None:
    """Returns how many steps an epoch takes, None if it is not known how many examples it has."""
    return None if num_examples is None else Fraction(num_examples, global_batch_size)


def parse_steps(value: int | str, steps_per_epoch: int | Fraction | None) -> int:
    """Returns a length of training in steps.

    Args:
        value: A number of steps (500 or '500 steps') or of epochs ('2 epochs'); at least 1.
        steps_per_epoch: From `epoch_steps`. Batches straddle epochs, so this need not
            be whole; e epochs end in the step that reads the last of their examples, the
            ceil(e * steps_per_epoch)-th.

    Returns:
        The number of steps, at least 1.

    Raises:
        ConfigError: The value is something else.
    """
    count, unit = _parse(value)
    if unit in _SECONDS:
        raise ConfigError(
            f'{value!r} is a time, but here a number of steps or epochs is needed, such as 500, '
            "'500 steps' or '2 epochs'."
        )
    return count if unit == 'step' else math.ceil(count * _exact(steps_per_epoch))


def parse_length(value: int | str, last_step: int, steps_per_epoch: int | Fraction | None) -> int:
    """Returns the length of a part of a run in steps.

    Args:
        value: As for `parse_steps`, or a part of the run ('5%', '2.5%'), or 0.
        last_step: The length of the whole run, in steps.
        steps_per_epoch: From `epoch_steps`.

    Raises:
        ConfigError: The value is something else, or more than 100%.
    """
    if value == 0 and not isinstance(value, bool):
        return 0
    percent = isinstance(value, str) and re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*%\s*', value)
    if not percent:
        return parse_steps(value, steps_per_epoch)
    if Fraction(percent[1]) > 100:
        raise ConfigError(f'{value!r} is more than the whole run. Give at most 100%.')
    return round(Fraction(percent[1]) * last_step / 100)


class Every:
    """Tells when a periodic action is due.

    Steps and epochs count from the start of training and not of the process: every 100 steps
    means at 100, 200, 300, also for a run resumed at 130, and every epoch means at the steps in
    which epochs end (see `parse_steps`). When the due step is passed over, the next one seen is
    due in its place, without moving those that follow.

    Seconds count from the last time the action was due. The caller passes the time, so that in a
    job of many workers one clock, the chief's, decides for all.

    Args:
        value: The interval: 100, '100 steps', '2 epochs', '30 seconds', '10 minutes', '1 hour';
            None for never.
        steps_per_epoch: From `epoch_steps`.
        start: The step at which this process starts or resumes; nothing is due there.

    Raises:
        ConfigError: The interval is something else.
    """

    def __init__(
        self, value: int | str | None, steps_per_epoch: int | Fraction | None, start: int = 0
    ):
        self._period: int | Fraction | None = None
        self._seconds: int | None = None
        self._due_seconds = 0.0
        if value is not None:
            count, unit = _parse(value, hint=' None means never.')
            if unit in _SECONDS:
                self._seconds = self._due_seconds = count * _SECONDS[unit]
            else:
                self._period = count * (_exact(steps_per_epoch) if unit == 'epoch' else 1)
        self._due_step = self.next_due(start)

    def next_due(self, step: int) -> int | None:
        """Returns the first due step after `step`; None if steps do not decide."""
        if self._period is None:
            return None
        # The k-th is due at ceil(k * period); k is the least for which that exceeds `step`.
        return math.ceil((step // self._period + 1) * self._period)

    def due(self, step: int, elapsed_seconds: float = 0.0) -> bool:
        """Tells whether the action is due now, and if so takes it as done.

        Args:
            step: The number of steps completed since the start of training.
            elapsed_seconds: The time since this object was made, by the clock that decides.
        """
        if self._seconds is not None:
            if elapsed_seconds < self._due_seconds:
                return False
            self._due_seconds = elapsed_seconds + self._seconds
            return True
        if self._due_step is None or step < self._due_step:
            return False
        self._due_step = self.next_due(step)
        return True


def _parse(value: int | str, hint: str = '') -> tuple[int, str]:
    """Returns the count and the unit in the singular."""
    if isinstance(value, int) and not isinstance(value, bool):
        count, unit = value, 'step'
    else:
        match = (
            re.fullmatch(r'\s*([+-]?\d+)\s*([a-z]+)\s*', value) if isinstance(value, str) else None
        )
        if not match:
            raise ConfigError(
                f'{value!r} is no number of steps or interval: write a whole number of steps '
                "(500) or a whole number and a unit ('500 steps', '2 epochs', '10 minutes')."
            )
        count, unit = int(match[1]), match[2].removesuffix('s')
        if unit not in _UNITS:
            raise ConfigError(
                f'{value!r} has the unknown unit {match[2]!r}; there are '
                f'{", ".join(name + "s" for name in _UNITS)}.{nearest(unit, _UNITS)}'
            )
    if count < 1:
        raise ConfigError(f'{value!r} must be at least 1 {unit}.{hint}')
    return count, unit


def _exact(steps_per_epoch: int | Fraction | None) -> int | Fraction:
    if steps_per_epoch is None:
        raise ConfigError(
            'Epochs cannot be counted, as the training data does not tell how many examples it '
            'has. Count in steps, or give the stream its num_examples.'
        )
    # A float is not exact: an epoch of 10/3 steps would end its third one step late.
    if not isinstance(steps_per_epoch, int | Fraction):
        raise TypeError('steps_per_epoch must be Fraction(num_examples, global_batch_size).')
    return steps_per_epoch
