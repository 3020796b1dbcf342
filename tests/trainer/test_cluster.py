import json

import pytest

from trainer.cluster import Cluster, from_environ
from trainer.errors import ConfigError

TWO = ['a.example:2222', 'b.example:2222']


def environ(cluster, kind='worker', index=0):
    task = {'type': kind, 'index': index}
    return {'TF_CONFIG': json.dumps({'cluster': cluster, 'task': task})}


@pytest.mark.parametrize('variables', [{}, {'TF_CONFIG': '{}'}])
def test_without_tf_config_the_job_is_one_process(variables):
    cluster = from_environ(variables)
    assert cluster == Cluster(workers=(), index=0, type='worker')
    assert cluster.num_workers == 1
    assert cluster.is_chief


def test_workers_and_index_come_from_tf_config():
    cluster = from_environ(environ({'worker': TWO}, index=1))
    assert cluster == Cluster(tuple(TWO), 1, 'worker')
    assert not cluster.is_chief
    assert cluster.num_workers == 2


@pytest.mark.parametrize(('kind', 'index', 'place'), [('chief', 0, 0), ('worker', 0, 1)])
def test_a_chief_job_is_worker_0_and_the_workers_follow(kind, index, place):
    jobs = {'worker': TWO[1:], 'chief': TWO[:1]}
    assert from_environ(environ(jobs, kind, index)) == Cluster(tuple(TWO), place)


def test_an_evaluator_is_a_cluster_of_its_own():
    cluster = from_environ(environ({'worker': TWO}, 'evaluator'))
    assert (cluster.num_workers, cluster.type, cluster.is_chief) == (1, 'evaluator', True)


@pytest.mark.parametrize(
    ('variables', 'said'),
    [
        ({'TF_CONFIG': '{"cluster": '}, 'not valid JSON'),
        # TensorFlow, too, fails on an empty one.
        ({'TF_CONFIG': ''}, 'not valid JSON .*: ""'),
        ({'TF_CONFIG': '[1]'}, r'wrong: it is not an object: \[1\]'),
        ({'TF_CONFIG': '{"cluster": {}}'}, "lacks 'task'"),
        ({'TF_CONFIG': '{"cluster": {}, "task": {"type": "worker"}}'}, "lacks 'index'"),
        (environ([TWO]), "'cluster' is not an object"),
        (environ({'worker': TWO}, index=2), r"beyond its 'worker' job \(2 of them.*: 2"),
        (environ({'worker': TWO}, index=-1), "'index' is not a whole number"),
        (environ({'worker': TWO}, index=True), "'index' is not a whole number"),
        (environ({'worker': TWO}, 'chief'), "beyond its 'chief' job"),
        (environ({'worker': [TWO[0]] * 2}), f'one address to two workers: {TWO[0]}'),
        (environ({'worker': ['a.example']}), "not 'host:port': a.example"),
        (environ({'worker': ['a.example:99999']}), "not 'host:port'"),
        (environ({'worker': 'a.example:1'}), 'not a list'),
        (environ({'worker': TWO, 'ps': TWO}), 'no parameter servers'),
        (environ({'wroker': TWO}), "Did you mean 'worker'"),
        (environ({'chief': TWO}, 'chief'), "more than one 'chief'"),
        (environ({'worker': TWO}, 'evaluator', 1), 'only one'),
    ],
)
def test_a_wrong_tf_config_is_refused_with_a_right_example(variables, said):
    with pytest.raises(ConfigError, match=said) as caught:
        from_environ(variables)
    assert '{"cluster": {"worker": ["host0:2222", "host1:2222"]}' in caught.value.message
