import json

import numpy as np
import pytest

from trainer.data import statistics


def in_parts(values, sizes):
    """The statistics of an array, put together from parts."""
    total, start = {}, 0
    for size in sizes:
        part = statistics.of_features({'x': values[start : start + size]})
        total, start = statistics.together(total, part), start + size
    assert start == len(values)
    return total['x']


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'uint8', 'int64', 'float16', 'bool'])
def test_parts_together_are_like_the_whole(dtype):
    values = (np.random.default_rng(0).normal(100, 30, [60, 3]) > 90).astype(dtype)
    if dtype != 'bool':
        values = np.random.default_rng(0).normal(100, 30, [60, 3]).astype(dtype)
    found, exact = in_parts(values, [1, 40, 19]), values.astype(np.float64)
    assert found.count == 180
    assert (found.min, found.max) == (exact.min(), exact.max())
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert found.std == pytest.approx(exact.std(), rel=1e-12)
    assert found.counts is None


def test_small_differences_between_great_numbers_are_kept():
    values = 1e9 + np.tile([0.0, 1.0], 5000)
    assert in_parts(values, [100] * 100).std == pytest.approx(0.5, rel=1e-9)


def test_what_is_not_finite_is_counted_apart():
    values = np.array([1, np.nan, 3, np.inf, np.nan, -np.inf], np.float32)
    found = in_parts(values, [2, 2, 2])
    assert (found.count, found.not_finite, found.min, found.max, found.mean) == (2, 4, 1, 3, 2)
    assert in_parts(values[4:], [1, 1]) == statistics.Numbers(not_finite=2)


def test_whole_numbers_are_counted_by_value():
    found = in_parts(np.array([3, 1, 3, -2, 1, 3]), [2, 4])
    assert found.counts == {-2: 1, 1: 2, 3: 3}
    assert list(found.counts) == [-2, 1, 3]
    assert in_parts(np.array([True, False, True]), [1, 2]).counts == {0: 1, 1: 2}
    assert in_parts(np.array([2**64 - 1], np.uint64), [1]).counts == {2**64 - 1: 1}


def test_too_many_values_are_no_classes_whatever_the_parts():
    values = np.arange(10_001)
    assert in_parts(values, [10_001]).counts is None
    assert in_parts(values, [5000, 5001]).counts is None
    assert len(in_parts(values[:-1], [5000, 5000]).counts) == 10_000


def test_strings_have_none():
    assert statistics.of_features({'x': np.array([b'a', b'b'], object)}) == {}


def test_they_come_back_from_json_as_they_were():
    for values in (np.array([1, 2, 2]), np.array([0.1, np.nan]), np.array([np.nan])):
        found = statistics.of(values)
        assert statistics.from_json(json.loads(json.dumps(found.as_json))) == found
