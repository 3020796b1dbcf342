"""Every kind of source: the same order on every topology, and after any interruption."""

import json
import random

import numpy as np
import pytest

from tests.processes import REPOSITORY, run_workers
from tests.trainer import source_runs

PROGRAM = REPOSITORY / 'tests' / 'trainer' / 'source_runs.py'
TOPOLOGIES = {'one device': (1, 1), '2 replicas': (1, 2), '2 workers': (2, 1)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Topology -> case -> what came of it. All but the first are interrupted at a random step."""
    data = tmp_path_factory.mktemp('data')
    source_runs.write_data(data)
    found = {}
    for topology, (workers, devices) in TOPOLOGIES.items():
        out = tmp_path_factory.mktemp('runs')
        seed = [] if topology == 'one device' else [random.randrange(2**31)]
        print(topology, 'interrupted by seed', seed)
        run_workers([PROGRAM, data, out, devices, *seed], workers, timeout=900)
        found[topology] = {
            path.stem: json.loads(path.read_text()) for path in sorted(out.glob('*.json'))
        }
    assert found['one device'].keys() == source_runs.cases(data).keys()
    return found


def test_every_run_reads_the_same_examples_in_the_same_order(results):
    for case, expected in results['one device'].items():
        assert expected['samples'].count('\n') == source_runs.STEPS, case
        for topology, found in results.items():
            assert found[case]['samples'] == expected['samples'], (case, topology)
            assert found[case]['sample_sha256'] == expected['sample_sha256'], (case, topology)


def test_every_run_comes_to_the_same_model(results):
    for case, expected in results['one device'].items():
        for topology, found in results.items():
            np.testing.assert_allclose(
                found[case]['metrics']['eval/loss'],
                expected['metrics']['eval/loss'],
                rtol=1e-3,  # Batch normalisation goes by the replica.
                err_msg=f'{case} on {topology}',
            )


def test_two_processes_end_with_the_bits_of_one(results):
    for case, found in results['2 replicas'].items():
        assert found['state_sha256'] == results['2 workers'][case]['state_sha256'], case


@pytest.mark.parametrize('case', ['bad_tfrecord', 'bad_array_record', 'bad_images'])
def test_damaged_records_are_left_out_alike_and_listed(results, case):
    expected = results['one device'][case]
    lines = [line.split('\t')[1] for line in expected['samples'].splitlines()]
    read = [int(record) for line in lines for record in line.split()]
    left_out = {-2 - i for i in read if i < -1}
    listed = {int(line.split('\t')[0]) for line in expected['bad']}
    assert listed
    # Evaluation lists those of its own data too, and reading ahead those of steps to come.
    assert left_out <= listed
    for found in results.values():
        assert found[case]['samples'] == expected['samples']
