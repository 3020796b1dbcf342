"""Whether a run has got as good as it will: a pure decision on what evaluations have found."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Ends a run once a metric has stopped getting better.

    The checkpoints with the best metric are kept by `Keep.best`.

    Attributes:
        metric: the metric, 'eval/loss', 'eval/accuracy', ... Those of training are means since the
            last log line, which are others after a resume.
        patience: so many measurements in a row may be no better than the best.
        min_delta: by how much a measurement must be better to count as better.
        mode: 'min' where less is better, or 'max'.

    Raises:
        ConfigError: a value is out of range.
    """

    metric: str = 'eval/loss'
    patience: int = 5
    min_delta: float = 0.0
    mode: Literal['min', 'max'] = 'min'

    def __post_init__(self):
        if not self.metric.startswith('eval/'):
            raise ConfigError(
                f"EarlyStop.metric is {self.metric!r}; it must be one of evaluation, 'eval/loss' "
                'or the like: those of training are others after a resume.'
            )
        if self.patience < 1:
            raise ConfigError(f'EarlyStop.patience is {self.patience}; it must be 1 or more.')
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f'EarlyStop.min_delta is {self.min_delta}; it must be 0 or more.')
        if self.mode not in ('min', 'max'):
            raise ConfigError(f"EarlyStop.mode is {self.mode!r}; it is 'min' or 'max'.")


class Progress:
    """What the measurements so far have shown.

    Args:
        rule: when to stop; None never does.
        record: what `record` returned when the run was saved.
    """

    def __init__(self, rule: EarlyStop | None, record: Mapping[str, Any] | None = None):
        self._rule = rule
        record = record or {}
        # What another metric has come to says nothing of this one.
        known = rule is not None and record.get('metric') == rule.metric
        self.best: float | None = record['best'] if known else None
        self.best_step: int = record['best_step'] if known else 0
        self._worse: int = record['worse'] if known else 0

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self._rule is not None and self._worse >= self._rule.patience

    def look(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes note of what was measured at a step; returns whether the metric was among it."""
        rule = self._rule
        if rule is None or rule.metric not in metrics:
            return False
        value = metrics[rule.metric]
        gain = math.inf if self.best is None else value - self.best
        if rule.mode == 'min' and self.best is not None:
            gain = -gain
        if math.isfinite(value) and gain > rule.min_delta:
            self.best, self.best_step, self._worse = value, step, 0
        else:
            self._worse += 1
        return True

    def __str__(self) -> str:
        if self._rule is None or self.best is None:
            return 'nothing measured'
        return f'{self._rule.metric} was best at step {self.best_step}, {self.best:.4g}'

    def record(self) -> dict[str, Any] | None:
        """Returns what a checkpoint must hold of it, JSON-compatible."""
        if self._rule is None:
            return None
        return {
            'metric': self._rule.metric,
            'best': self.best,
            'best_step': self.best_step,
            'worse': self._worse,
        }
