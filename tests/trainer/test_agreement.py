"""Workers that must know the same before they act together; also the program of one of them.

usage: python tests/trainer/test_agreement.py OUT_DIR        (with TF_CONFIG)
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import REPOSITORY, run_workers
from trainer.agreement import Agreement
from trainer.cluster import Cluster
from trainer.errors import ConfigError


def refuse():
    raise ConfigError('the disk is full')


@pytest.fixture
def alone(make_strategy):
    """The agreement of a job of one worker with two replicas."""
    return Agreement(make_strategy(2), Cluster())


def test_one_worker_agrees_with_itself(alone):
    np.testing.assert_array_equal(alone.sum([1.5, True]), [1.5, 1.0])
    assert alone.chief_does(lambda: 7) == 7
    alone.check_same('anything', lambda: 'not even a digest')
    alone.wait()


def test_one_worker_hears_its_own_refusal(alone):
    with pytest.raises(ConfigError, match='the disk is full'):
        alone.chief_does(refuse)


def main(out_dir):
    from trainer.cluster import from_environ
    from trainer.meeting import meet
    from trainer.strategy import build_strategy

    cluster = from_environ()
    meet(cluster, digest='agreement', deadline_seconds=120)
    agreement = Agreement(build_strategy(cluster=cluster, devices_per_worker=2), cluster)
    acted = []

    def act():
        acted.append(cluster.index)
        return 7.25

    def message(function, *args):
        try:
            function(*args)
        except (ConfigError, RuntimeError) as error:
            return f'{type(error).__name__}: {error}'
        return None

    found = {
        'sum': agreement.sum([cluster.index + 1, 0.1, 2.0**40]).tolist(),
        'result': agreement.chief_does(act),
        'acted': acted,
        'refusal': message(agreement.chief_does, refuse),
        'after the refusal': agreement.sum([1]).tolist(),
        'same': message(agreement.check_same, 'the state', lambda: 'ab' * 32),
        'different': message(agreement.check_same, 'the state', lambda: f'{cluster.index}' * 64),
    }
    agreement.wait()
    Path(out_dir, f'{cluster.index}.json').write_text(json.dumps(found))


def test_two_workers_agree(tmp_path):
    run_workers([REPOSITORY / 'tests' / 'trainer' / 'test_agreement.py', tmp_path], 2)
    chief, other = (json.loads((tmp_path / f'{index}.json').read_text()) for index in (0, 1))
    for found in (chief, other):
        assert found['sum'] == [3, 0.2, 2.0**41]
        assert found['result'] == 7.25
        assert found['after the refusal'] == [2]
        assert found['same'] is None
    assert (chief['acted'], other['acted']) == ([0], [])
    assert chief['refusal'] == 'ConfigError: the disk is full'
    assert other['refusal'].startswith('ConfigError: Worker 0 refused to start')
    for index, found in enumerate((chief, other)):
        expected = f'RuntimeError: the state of this worker is not that of the others: {index}'
        assert found['different'].startswith(expected)


if __name__ == '__main__':
    main(sys.argv[1])
