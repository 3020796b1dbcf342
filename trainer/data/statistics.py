"""What the numbers of a feature are like: computed of parts, and put together exactly as parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Whole numbers with more different values than this are no classes.
_MOST_CLASSES = 10_000


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The statistics of all values of a numeric feature.

    Attributes:
        count: of finite values.
        not_finite: of all others: NaN and infinities.
        min: the least finite value; None if there is none, like the following three.
        max: the greatest.
        mean: the mean.
        std: the standard deviation, of all values and not of a sample.
        counts: how often each value occurs, ascending, where a feature is one whole number an
            example and has few different ones; else None.
    """

    count: int = 0
    not_finite: int = 0
    min: float | int | None = None
    max: float | int | None = None
    mean: float | None = None
    std: float | None = None
    counts: dict[int, int] | None = None

    @property
    def as_json(self) -> dict[str, Any]:
        """What `json` can write; without `counts` if there are none."""
        fields = dataclasses.asdict(self)
        if self.counts is None:
            del fields['counts']
        return fields


def of(values: np.ndarray) -> Numbers | None:
    """Returns the statistics of a batch of a feature, [B, ...]; None of what is no number."""
    if values.dtype.kind not in 'biuf' and values.dtype.name != 'bfloat16':
        return None
    counts = None
    if values.dtype.kind in 'biu':
        low, high = int(values.min()), int(values.max())
        if values.ndim == 1:
            numbers = values.astype(np.uint8) if values.dtype == np.bool_ else values
            distinct, times = np.unique(numbers, return_counts=True)
            counts = _few(dict(zip(distinct.tolist(), times.tolist(), strict=True)))
        finite, not_finite = values, 0
    else:
        finite = values[np.isfinite(values)]
        not_finite = values.size - finite.size
        if not finite.size:
            return Numbers(not_finite=not_finite)
        low, high = float(finite.min()), float(finite.max())
    numbers = finite.astype(np.float64)
    return Numbers(
        finite.size, not_finite, low, high, float(numbers.mean()), float(numbers.std()), counts
    )


def of_features(features: Mapping[str, np.ndarray]) -> dict[str, Numbers]:
    """Returns the statistics of each feature of a batch that holds numbers."""
    found = {name: of(values) for name, values in features.items()}
    return {name: numbers for name, numbers in found.items() if numbers is not None}


def merged(first: Numbers, second: Numbers) -> Numbers:
    """Returns the statistics of two parts together."""
    counts = None
    if first.counts is not None and second.counts is not None:
        total = dict(first.counts)
        for value, times in second.counts.items():
            total[value] = total.get(value, 0) + times
        counts = _few(dict(sorted(total.items())))
    not_finite = first.not_finite + second.not_finite
    if not first.count or not second.count:
        some = first if first.count else second
        return dataclasses.replace(some, not_finite=not_finite, counts=counts)
    # Chan, Golub and LeVeque, 'Updating Formulae and a Pairwise Algorithm for Computing Sample
    # Variances', 1979: no difference of great sums.
    count = first.count + second.count
    apart = second.mean - first.mean
    squares = (
        first.std**2 * first.count
        + second.std**2 * second.count
        + apart**2 * (first.count * second.count / count)
    )
    return Numbers(
        count,
        not_finite,
        min(first.min, second.min),
        max(first.max, second.max),
        first.mean + apart * (second.count / count),
        (squares / count) ** 0.5,
        counts,
    )


def together(first: Mapping[str, Numbers], second: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Returns the statistics of two parts, feature by feature; an empty part adds nothing."""
    if not first or not second:
        return dict(first or second)
    return {name: merged(first[name], second[name]) for name in first}


def from_json(fields: Mapping[str, Any]) -> Numbers:
    """Returns what `as_json` was made of."""
    counts = fields.get('counts')
    if counts is not None:
        counts = {int(value): times for value, times in counts.items()}
    return Numbers(**{**fields, 'counts': counts})


def _few(counts: dict[int, int]) -> dict[int, int] | None:
    return counts if len(counts) <= _MOST_CLASSES else None
