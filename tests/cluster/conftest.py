"""In which order the tests here run: files go to two processes, the longest first."""

import pathlib

HERE = pathlib.Path(__file__).parent
FIRST = ('test_slurm_training', 'test_ray', 'test_kubernetes_training', 'test_hosts')


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    ordered = sorted(here, key=lambda item: (*FIRST, item.path.stem).index(item.path.stem))
    items[:] = [item for item in items if item not in set(here)] + ordered
