"""One training, any topology: the mistakes that plain Keras makes in silence are not made.

The rows of the table of silent errors that are about topology are the cases of `parity.cases`.
"""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.processes import REPOSITORY, environment, run_workers
from tests.trainer import parity

PROGRAM = REPOSITORY / 'tests' / 'trainer' / 'parity.py'
TOPOLOGIES = {'2 replicas': (1, 2), '2 workers': (2, 1), '2 workers of 2 replicas': (2, 2)}
NAMES = (
    'plain',
    'adam',
    'fused_adam',
    'fused_sgd',
    'clipping',
    'accumulation',
    'weights',
    'weights_and_accumulation',
    'l2',
    'batch_norm',
    'embedding',
    'poisoned_record',
)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Topology -> case -> what each worker got; every case on every topology, in few processes."""
    found = {}
    for topology, (workers, devices) in {'one device': (1, 1), **TOPOLOGIES}.items():
        out = tmp_path_factory.mktemp('parity')
        command = [PROGRAM, out, devices]
        if workers > 1:
            run_workers(command, workers)
        else:
            subprocess.run(
                [sys.executable, *map(str, command)], env=environment(), check=True, timeout=300
            )
        found[topology] = [
            pickle.loads((out / f'{index}.pickle').read_bytes()) for index in range(workers)
        ]
    return found


@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('case', NAMES)
def test_training_is_the_same_as_on_one_device(results, case, topology):
    expected = results['one device'][0][case]
    for worker in results[topology]:
        for what in ('losses', 'norms', 'accuracies'):
            np.testing.assert_allclose(worker[case][what], expected[what], rtol=1e-5, atol=1e-5)
        assert worker[case]['variables'].keys() == expected['variables'].keys()
        for path, value in worker[case]['variables'].items():
            np.testing.assert_allclose(
                value, expected['variables'][path], rtol=1e-5, atol=1e-5, err_msg=path
            )


@pytest.mark.parametrize('case', NAMES)
def test_two_replicas_in_one_process_and_in_two_give_the_same_bits(results, case):
    (mirrored,), workers = results['2 replicas'], results['2 workers']
    for worker in workers:
        for path, value in worker[case]['variables'].items():
            assert value.tobytes() == mirrored[case]['variables'][path].tobytes(), path


def test_every_case_is_compared(results):
    assert set(NAMES) == set(parity.cases()) == set(results['one device'][0])


@pytest.mark.parametrize('topology', ['one device', *TOPOLOGIES])
def test_a_step_that_is_infinite_on_one_replica_is_skipped_on_all(results, topology):
    for worker in results[topology]:
        # The poisoned record is read once in each of the 6.4 epochs.
        assert 6 <= worker['poisoned_record']['skipped'] <= 7
        for path, value in worker['poisoned_record']['variables'].items():
            assert np.isfinite(value).all(), path
