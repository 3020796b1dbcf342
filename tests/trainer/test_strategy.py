import json
import os
import random
import socket
import subprocess
import sys

import pytest
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.errors import ConfigError
from trainer.strategy import build_strategy, topology

ALONE = Cluster()
TWO = Cluster(('a:2222', 'b:2222'), 0)
GPUS = tf.config.list_physical_devices('GPU')
on_cpu = pytest.mark.skipif(bool(GPUS), reason='is about machines without GPU')
on_gpu = pytest.mark.skipif(not GPUS, reason='needs a GPU')


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'kind': 'miror'}, "kind is 'miror'.*Did you mean 'mirrored'"),
        ({'collective': 'nccll'}, "Did you mean 'nccl'"),
        ({'collective': 'nccl'}, 'needs GPUs'),
        ({'devices_per_worker': 0}, 'devices_per_worker is 0, but must be an integer of 1'),
        ({'devices_per_worker': '2'}, "devices_per_worker is '2'"),
        ({'bytes_per_pack': -1}, 'bytes_per_pack is -1'),
        ({'collective_timeout_seconds': 0}, 'collective_timeout_seconds is 0, but must be a num'),
        ({'kind': 'one_device', 'devices_per_worker': 2}, "Use 'mirrored'"),
        ({'kind': 'mirrored', 'cluster': TWO}, 'the job has 2 workers'),
    ],
)
@on_cpu
def test_a_wrong_option_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        build_strategy(**{'cluster': ALONE, 'deterministic': False, **options})


def test_a_multi_worker_strategy_after_the_first_operation_is_refused():
    tf.constant(0)
    with pytest.raises(ConfigError, match='must come before any TensorFlow operation'):
        build_strategy(cluster=TWO, deterministic=False)


@on_cpu
def test_more_cpu_devices_than_a_running_tensorflow_has_are_refused():
    there = len(tf.config.list_logical_devices('CPU'))
    with pytest.raises(ConfigError, match=f'already in this process, with {there} CPU'):
        build_strategy(cluster=ALONE, devices_per_worker=there + 1, deterministic=False)


@on_gpu
def test_more_gpus_than_there_are_are_refused():
    with pytest.raises(ConfigError, match='Use at most'):
        build_strategy(cluster=ALONE, devices_per_worker=1000, deterministic=False)


def test_an_evaluator_gets_a_local_strategy_from_the_configuration_of_its_job():
    evaluator = Cluster(type='evaluator')
    strategy = build_strategy(
        cluster=evaluator, kind='multi_worker', devices_per_worker=1, deterministic=False
    )
    assert isinstance(strategy, tf.distribute.OneDeviceStrategy)
    facts = topology(strategy, evaluator)
    assert (facts['kind'], facts['num_workers'], facts['replicas']) == ('one_device', 1, 1)


WORKER = """
import json, sys
from trainer.cluster import from_environ
from trainer.meeting import meet
cluster = from_environ()
meet(cluster, digest='same', deadline_seconds=60)
import tensorflow as tf
from trainer.strategy import build_strategy, topology
tf.config.threading.set_intra_op_parallelism_threads(3)
strategy = build_strategy(cluster=cluster, devices_per_worker=2, **json.loads(sys.argv[1]))
with strategy.scope():
    variable = tf.Variable(tf.random.stateless_uniform([3], [cluster.index, 0]))

@tf.function
def reduce():
    def replica():
        context = tf.distribute.get_replica_context()
        mine = 10.0 ** tf.cast(context.replica_id_in_sync_group, tf.float32)
        tf.debugging.assert_equal(variable, variable.read_value())
        return context.all_reduce('sum', mine)
    return strategy.run(replica)

sums = [float(value) for value in strategy.experimental_local_results(reduce())]
values = [v.numpy().tolist() for v in strategy.experimental_local_results(variable)]
try:
    tf.random.uniform([])
    refused = False
except RuntimeError:
    refused = True
print(json.dumps({'sums': sums, 'values': values, 'refused': refused,
                  'topology': topology(strategy, cluster)}))
"""


def run_workers(environments, **options):
    """Runs WORKER once per environment, all at once, and returns what each printed."""
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, json.dumps(options)],
            env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in environments
    ]
    try:
        printed = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), [err[-3000:] for _, err in printed]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


@pytest.mark.parametrize('onednn', [False, True])
def test_two_cpu_devices_of_one_process_are_two_replicas(onednn):
    environment = {'TF_CONFIG': '{}', 'TF_ENABLE_ONEDNN_OPTS': str(int(onednn))}
    (told,) = run_workers([environment])
    assert told['sums'] == [11.0, 11.0]
    assert told['refused']  # Determinism is on: a random operation without a seed may not run.
    assert told['topology'] == {
        'kind': 'mirrored',
        'num_workers': 1,
        'replicas': 2,
        'replicas_per_worker': 2,
        'device_type': 'CPU',
        'onednn': onednn,
        'deterministic': True,
        'intra_op_threads': 3,
    }


def free_ports(count):
    ports = set()
    while len(ports) < count:
        with socket.socket() as server:
            port = random.randrange(20_000, 32_000)
            if server.connect_ex(('127.0.0.1', port)):
                ports.add(port)
    return sorted(ports)


@pytest.mark.slow
def test_two_workers_of_two_cpu_devices_are_four_replicas():
    # With a 'chief' job, whose task TensorFlow is told of as worker 0.
    chief, worker = (f'127.0.0.1:{port}' for port in free_ports(2))
    jobs = {'chief': [chief], 'worker': [worker]}
    environments = [
        {'TF_CONFIG': json.dumps({'cluster': jobs, 'task': {'type': kind, 'index': 0}})}
        for kind in ('chief', 'worker')
    ]
    told = run_workers(
        environments,
        collective='ring',
        bytes_per_pack=1024,
        collective_timeout_seconds=30.0,
        deterministic=False,
    )
    for each in told:
        assert each['sums'] == [1111.0, 1111.0]
        assert not each['refused']
        facts = each['topology']
        assert (facts['kind'], facts['num_workers']) == ('multi_worker', 2)
        assert (facts['replicas'], facts['replicas_per_worker']) == (4, 2)
        assert not facts['deterministic']
    first, second = (each['values'] for each in told)
    assert first == second  # All four replicas start from the chief's values.
    assert first[0] == first[1]
