"""The shipped MNIST run, to its end, on three topologies."""

import os
import re

import pytest

from tests.processes import run_workers

pytestmark = pytest.mark.slow

MNIST_DIR = os.environ.get('PHALANX_MNIST_DIR')
TOPOLOGIES = {'one device': (1, 1), '2 replicas': (1, 2), '2 workers': (2, 1)}


@pytest.mark.skipif(
    not MNIST_DIR, reason='PHALANX_MNIST_DIR, a directory with the files of MNIST, is not set'
)
def test_mnist_reaches_98_5_percent_on_every_topology_in_one_sample_order(tmp_path):
    accuracies, orders, states = {}, {}, {}
    for name, (workers, devices) in TOPOLOGIES.items():
        command = [
            '-m',
            'trainer',
            '--gin_file=runs/mnist_cnn.gin',
            f"--gin.DATA_DIR='{MNIST_DIR}'",
            f'--gin.DEVICES={devices}',
            '--gin.train.sample_log=True',
            f'--model_dir={tmp_path / name}',
        ]
        chief = run_workers(command, workers, timeout=1200)[0]
        accuracies[name] = float(re.search(r'eval/accuracy (0\.\d+)', chief)[1])
        orders[name] = re.search(r'sample order: (\w{64})', chief)[1]
        states[name] = re.search(r'state sha256: (\w{64})', chief)[1]
    print(accuracies)
    assert min(accuracies.values()) >= 0.985, accuracies
    assert len(set(orders.values())) == 1, orders
    assert states['2 replicas'] == states['2 workers']
