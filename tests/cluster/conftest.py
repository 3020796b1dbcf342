"""Which of the tests here may run at the same time: those of different files, whose hosts have
different names and networks."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
# The longest first, that another worker gets on with the rest meanwhile.
FIRST = ('test_slurm_training', 'test_ray', 'test_hosts', 'test_kubernetes_training')


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    ordered = sorted(here, key=lambda item: (*FIRST, item.path.stem).index(item.path.stem))
    items[:] = [item for item in items if item not in set(here)] + ordered
