"""Which checkpoints are kept and which may go: a pure decision (no TensorFlow, no files)."""

import dataclasses
from collections.abc import Sequence

from trainer.errors import ConfigError, nearest

_MODES = ('min', 'max')


@dataclasses.dataclass(frozen=True)
class Keep:
    """What must not be deleted; a checkpoint is kept when any of the three wants it.

    Attributes:
        last: so many of the newest, at least 2: the newest could turn out damaged.
        best: so many of those with the best metric; those without it are no candidates.
        metric: the name in the manifest's `metrics` by which `best` chooses.
        mode: 'min' when less is better, 'max' when more is.
        older_than_hours: keep one checkpoint of at least this age, to go back behind a mistake
            that showed late; None keeps none.

    Raises:
        ConfigError: a value out of its range.
    """

    last: int = 3
    best: int = 0
    metric: str = 'eval/loss'
    mode: str = 'min'
    older_than_hours: float | None = None

    def __post_init__(self):
        if not isinstance(self.last, int) or self.last < 2:
            raise ConfigError(
                f'Keep.last = {self.last!r} must be an integer of at least 2: with only one '
                'checkpoint, damage to it would lose the run.'
            )
        if not isinstance(self.best, int) or self.best < 0:
            raise ConfigError(f'Keep.best = {self.best!r} must be an integer of at least 0.')
        if self.mode not in _MODES:
            raise ConfigError(
                f"Keep.mode = {self.mode!r} is neither 'min' nor 'max'."
                + nearest(str(self.mode), _MODES)
            )
        hours = self.older_than_hours
        if hours is not None and not (isinstance(hours, int | float) and hours > 0):
            raise ConfigError(
                f'Keep.older_than_hours = {hours!r} must be a number of hours above 0, or None.'
            )


@dataclasses.dataclass(frozen=True)
class Info:
    """What the decision needs to know of one checkpoint.

    Attributes:
        step: its step.
        created: when it was written, in seconds since the epoch.
        metric: the value of `Keep.metric`, None where the manifest has none or no number.
    """

    step: int
    created: float
    metric: float | None = None


def to_delete(infos: Sequence[Info], keep: Keep, now: float, way_back: int = 0) -> list[int]:
    """Returns the steps, ascending, that no rule of `keep` wants.

    Args:
        infos: all usable checkpoints, in any order.
        keep: the rules.
        now: seconds since the epoch.
        way_back: so many steps back from the newest there must be a checkpoint too, or the first
            one before that, and some on the way there, however close to each other they are saved.
    """
    by_step = sorted(infos, key=lambda info: info.step)
    kept = set(by_step[-keep.last :])

    sign = 1 if keep.mode == 'min' else -1
    measured = [info for info in by_step if info.metric is not None]
    kept.update(sorted(measured, key=lambda i: (sign * i.metric, -i.step))[: keep.best])

    if keep.older_than_hours is not None:
        limit = now - 3600 * keep.older_than_hours
        old = [info for info in by_step if info.created <= limit]
        young = [info for info in by_step if info.created > limit]
        # The oldest of the young takes over once it has come of age.
        kept.update(old[-1:] + young[:1])

    if way_back and by_step:
        start = by_step[-1].step - way_back
        early = [info for info in by_step if info.step <= start]
        chosen = early[-1] if early else by_step[0]
        kept.add(chosen)
        for info in by_step:
            # From old to new, so that what is chosen now is chosen later too.
            if info.step >= chosen.step + way_back / 2:
                chosen = info
                kept.add(chosen)

    return [info.step for info in by_step if info not in kept]
