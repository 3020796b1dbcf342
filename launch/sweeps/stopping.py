"""Which trials are not worth their time any more: a pure decision."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from launch.sweeps.plan import Plan

# By fewer trials that have finished nobody is judged.
_LEAST_TRIALS = 3


def median_rule(
    plan: Plan, values: Mapping[int, float], finished: Sequence[Mapping[int, float]]
) -> str:
    """Returns why a trial should be stopped, '' if it should go on.

    This is the median stopping rule of Golovin et al., "Google Vizier" (2017,
    https://doi.org/10.1145/3097983.3098043), section 3.2.2: the best that the trial has reached is
    worse than the median of what finished trials had on average up to the same step.

    Args:
        plan: of the sweep.
        values: of the metric, by step.
        finished: the same of each trial that has finished.
    """
    if not values or max(values) < plan.stop_from:
        return ''
    step = max(values)
    means = [
        statistics.mean(seen)
        for other in finished
        if (seen := [value for at, value in _finite(other) if at <= step])
    ]
    if len(means) < _LEAST_TRIALS:
        return ''
    median = statistics.median(means)
    mine = [value for _, value in _finite(values)]
    best = (max if plan.mode == 'max' else min)(mine) if mine else math.nan
    if not plan.better(median, best):
        return ''
    return (
        f'at step {step:,} its best {plan.metric} was {best:.4g}, and the median of others '
        f'{median:.4g}'
    )


def _finite(values: Mapping[int, float]) -> Iterable[tuple[int, float]]:
    return ((step, value) for step, value in values.items() if math.isfinite(value))
