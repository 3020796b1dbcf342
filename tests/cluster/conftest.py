"""Which of the tests here may run at the same time: those of different schedulers."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
# The longest first, that another worker gets on with the rest meanwhile.
GROUPS = ('slurm', 'ray', 'hosts', 'kubernetes', 'network')


def _group(item):
    return item.path.stem.split('_')[1]


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    ordered = sorted(here, key=lambda item: GROUPS.index(_group(item)))
    items[:] = [item for item in items if item not in set(here)] + ordered
