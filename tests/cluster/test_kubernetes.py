"""Jobs on a stand-in for Kubernetes: the official client and kubectl, and pods that are processes.

Without a kubelet, a scheduler and admission, this shows that the clients are used as they want to
be, and that a job lives through what the Job controller does to its pods.
"""

import dataclasses
import json
import signal
import threading
import time

import pytest

from launch.__main__ import main
from launch.backends import Unreachable
from launch.known import Submitted
from tests.cluster.hosts import needs_root
from tests.cluster.kubernetes_jobs import DEADLINE_SECONDS, Cluster
from trainer.errors import ConfigError

yaml = pytest.importorskip('yaml', reason="pip install 'phalanx[kubernetes]'")
pytest.importorskip('kubernetes', reason="pip install 'phalanx[kubernetes]'")

pytestmark = [pytest.mark.cluster, needs_root]


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as found:
        yield found


@pytest.mark.parametrize('kind', ['jobset', 'job', 'trainjob'])
def test_a_job_of_three_hosts_runs_to_its_end(cluster, kind):
    submitted = cluster.submit(kind=kind)
    assert submitted.handle == f'k8s://team%2Fcluster%3A1/research/{kind}/digits'
    cluster.all_meet(submitted)
    found = cluster.status(submitted)
    assert [(each.rank, each.state, each.code) for each in found.tasks] == [
        (rank, 'running', None) for rank in range(3)
    ]
    assert sorted(each.host for each in found.tasks) == ['node1', 'node2', 'node3']
    cluster.end(0)
    found = cluster.wait(submitted, 'finished')
    assert found.tasks[0].code == 0
    assert 'ends with 0' in ''.join(cluster.back_end().logs(submitted))


@pytest.mark.parametrize('kind', ['jobset', 'job', 'trainjob'])
def test_what_is_sent_is_the_plan(cluster, kind):
    back_end = cluster.back_end(kind=kind, tensorboard=True, queue='team-a')
    back_end.submit(cluster.job)
    planned = list(yaml.safe_load_all(back_end.plan(cluster.job)))
    objects = cluster.stand_in.store.objects.values()
    for document in planned:
        name, kind = document['metadata']['name'], document['kind']
        (made,) = [e for e in objects if e['kind'] == kind and e['metadata']['name'] == name]
        if made['kind'] == 'ConfigMap':
            assert made['data'] == document['data']
        else:
            assert made['spec'] == document['spec']
        for key in ('labels', 'annotations'):
            assert made['metadata'].get(key) == document['metadata'].get(key)


def test_hostile_values_arrive_as_they_were_and_run_nothing(cluster):
    hostile = 'a b\'c"d`touch m`$(touch m);touch m\n$(HOME) $$(PATH) $ $$ \\ %s ü'
    job = dataclasses.replace(
        cluster.job,
        config=json.dumps([['a', 1, hostile]]),
        flags=(f'--gin_bindings=X={hostile}',),
        model_dir='/models/it\'s "100%" $(HOME);x',
        environment={'VALUE': hostile},
        directory='/tmp/a $(HOME) b',
        workers=1,
        min_workers=1,
    )
    submitted = cluster.submit(job)
    told = cluster.claim / 'it\'s "100%" $(HOME);x' / 'told-0.json'
    cluster.until(told.exists)
    cluster.all_meet(submitted)
    assert json.loads(told.read_text()) == {
        'argv': [*job.command('kubernetes', '/etc/phalanx/config.json')[1:], '--tee'],
        'value': hostile,
        'directory': job.directory,
        'config': job.config,
    }
    assert not list(cluster.directory.rglob('m'))


def test_a_pod_that_is_killed_is_replaced_and_the_others_stay(cluster):
    submitted = cluster.submit()
    cluster.all_meet(submitted)
    leader, before = cluster.running(0), cluster.running(2)
    cluster.stand_in.pods.signal(leader, signal.SIGKILL)
    cluster.until(lambda: len(cluster.pods(0)) == 2)
    cluster.running(0)
    # The leader of before went without a word, and its name leads to the new one.
    cluster.until(lambda: 'all are here' in cluster.printed(cluster.running(0)))
    assert cluster.running(2) is before
    assert cluster.printed(before).count('asks the leader') >= 2
    found = cluster.status(submitted)
    assert (found.state, found.restarts) == ('running', 1)
    cluster.end(0)
    cluster.wait(submitted, 'finished')


def test_a_pod_that_is_evicted_saves_and_its_end_does_not_count(cluster):
    submitted = cluster.submit(retries=0)
    cluster.all_meet(submitted)
    evicted = cluster.running(1)
    cluster.stand_in.pods.disrupt(evicted, 'EvictionByEvictionAPI', 'drained')
    cluster.until(lambda: evicted['status']['phase'] == 'Failed')
    assert 'saved' in cluster.printed(evicted)
    again = cluster.running(1)
    assert again is not evicted
    assert cluster.status(submitted).state == 'running'


def test_a_pod_that_ends_badly_too_often_fails_the_job(cluster):
    submitted = cluster.submit(retries=1)
    cluster.all_meet(submitted)
    for _ in range(2):
        killed = cluster.running(1)
        cluster.stand_in.pods.signal(killed, signal.SIGKILL)
        cluster.until(lambda pod=killed: pod['status']['phase'] == 'Failed')
    found = cluster.wait(submitted, 'failed')
    assert 'MaxFailedIndexesExceeded' in found.reason
    assert {each.rank: each.code for each in found.tasks}[1] == 137


def test_a_job_that_its_leader_has_finished_needs_no_pod_that_is_missing(cluster):
    submitted = cluster.submit()
    cluster.all_meet(submitted)
    cluster.stand_in.pods.cordoned.update(range(1, 5))
    cluster.stand_in.pods.signal(cluster.running(2), signal.SIGKILL)
    cluster.until(lambda: 'waiting for rank 2' in cluster.status(submitted).reason)
    cluster.end(0)
    cluster.wait(submitted, 'finished')


@pytest.mark.parametrize('code', [1, 2])
def test_what_a_retry_cannot_mend_is_not_tried_again(cluster, code):
    submitted = cluster.submit()
    cluster.all_meet(submitted)
    cluster.end(code)
    found = cluster.wait(submitted, 'failed')
    assert f'exit code {code}' in found.reason
    # The Job deletes those that are left.
    assert all(len(cluster.pods(rank)) <= 1 for rank in range(3))


def test_a_job_that_has_used_up_its_time_saves_and_is_stopped(cluster):
    submitted = cluster.submit(dataclasses.replace(cluster.job, time_limit_seconds=3))
    assert 'time limit' in cluster.wait(submitted, 'stopped').reason


@pytest.mark.parametrize('kind', ['jobset', 'job', 'trainjob'])
def test_cancel_lets_the_pods_save_and_leaves_nothing_but_the_directory(cluster, kind):
    submitted = cluster.submit(kind=kind, tensorboard=True)
    cluster.all_meet(submitted)
    pods = [cluster.running(rank) for rank in range(3)]
    cluster.back_end().cancel(submitted)
    cluster.until(lambda: not cluster.left())
    assert all('saved' in cluster.printed(pod) for pod in pods)
    assert (cluster.claim / 'digits').exists()
    with pytest.raises(ConfigError, match='There is no job k8s://'):
        cluster.status(submitted)
    cluster.back_end().cancel(submitted)  # Once more does no harm.


def test_what_belongs_to_a_job_goes_with_it_when_kubectl_deletes_it(cluster):
    submitted = cluster.submit(tensorboard=True)
    cluster.all_meet(submitted)
    cluster.kubectl('delete', 'jobset', 'digits')
    cluster.until(lambda: not cluster.left())


def test_a_job_of_the_same_name_is_refused_while_it_runs_and_makes_room_when_it_has_ended(cluster):
    submitted = cluster.submit()
    cluster.all_meet(submitted)
    with pytest.raises(ConfigError, match=r'has not ended: k8s://.*phalanx cancel'):
        cluster.submit()
    cluster.back_end().cancel(submitted)
    # While its pods still save.
    again = cluster.submit()
    cluster.all_meet(again)
    assert cluster.status(again).state == 'running'


def test_logs_follow_a_worker_from_before_its_start_over_its_replacement_to_its_end(cluster):
    cluster.stand_in.pods.cordoned.update(range(1, 5))
    submitted = cluster.submit()
    pieces = []
    follows = threading.Thread(
        target=lambda: pieces.extend(cluster.back_end().logs(submitted, worker=1, follow=True))
    )
    follows.start()
    cluster.until(lambda: 'Unschedulable' in cluster.status(submitted).reason)
    cluster.stand_in.pods.cordoned.clear()
    cluster.all_meet(submitted)
    cluster.stand_in.pods.signal(cluster.running(1), signal.SIGKILL)
    cluster.until(lambda: len(cluster.pods(1)) == 2)
    cluster.running(1)
    cluster.stand_in.pods.signal(cluster.running(0), signal.SIGKILL)
    cluster.until(lambda: len(cluster.pods(0)) == 2)
    cluster.until(lambda: 'all are here' in cluster.printed(cluster.running(0)))
    cluster.end(0)
    follows.join(DEADLINE_SECONDS)
    assert not follows.is_alive()
    text = ''.join(pieces)
    assert text.count('I am 1 digits-workers-0-1') == 2
    assert text.endswith('ends with 0\n')


def test_logs_of_a_worker_are_those_of_its_pod(cluster):
    job = dataclasses.replace(cluster.job, workers=6, min_workers=6, workers_per_host=2)
    submitted = cluster.submit(job)
    cluster.all_meet(submitted)
    assert 'I am 2 ' in ''.join(cluster.back_end().logs(submitted, worker=5))
    with pytest.raises(ConfigError, match='no worker 6: the job has 6'):
        list(cluster.back_end().logs(submitted, worker=6))


def test_a_log_that_breaks_off_goes_on_with_the_line_that_is_next(cluster):
    submitted = cluster.submit(dataclasses.replace(cluster.job, workers=1, min_workers=1))
    cluster.all_meet(submitted)
    pieces, follows = [], cluster.back_end().logs(submitted, follow=True)
    pieces.append(next(follows))
    cluster.stand_in.break_logs = True
    cluster.end(0)
    pieces.extend(follows)
    assert [each.split()[0] for each in pieces] == ['I', 'all', 'ends']


def test_a_cluster_without_jobsets_is_told_and_auto_makes_a_job(tmp_path, capfd):
    with Cluster(tmp_path, without=('jobsets',)) as cluster:
        with pytest.raises(ConfigError, match=r'knows no JobSets\. Install it .* --kube_kind=job'):
            cluster.submit()
        assert not cluster.left()
        submitted = cluster.submit(kind='auto')
        assert submitted.handle.endswith('/job/digits')
        assert 'knows no JobSets; this is a Job' in capfd.readouterr().err
        cluster.all_meet(submitted)


def test_a_job_that_is_refused_leaves_nothing(cluster):
    cluster.stand_in.refuse = 'jobsets'
    with pytest.raises(ConfigError, match='refuses it: jobsets is forbidden: User "nobody" cannot'):
        cluster.submit(tensorboard=True)
    cluster.until(lambda: not cluster.left())


def test_who_may_not_list_what_was_not_made_can_cancel_all_the_same(cluster):
    cluster.stand_in.refuse = 'deployments'
    submitted = cluster.submit()
    cluster.all_meet(submitted)
    cluster.back_end().cancel(submitted)
    cluster.until(lambda: not cluster.left())


def test_a_job_in_a_queue_waits_until_it_is_admitted(cluster):
    submitted = cluster.submit(queue='team-a')
    found = cluster.status(submitted)
    assert (found.state, found.never) == ('pending', True)
    assert 'the queue team-a of Kueue, which this cluster does not have' in found.reason
    # What Kueue would do.
    patch = '{"spec": {"suspend": false}}'
    cluster.kubectl('patch', 'jobset', 'digits', '--type=merge', '-p', patch)
    cluster.all_meet(submitted)


def test_a_cluster_that_does_not_answer_is_unreachable(cluster):
    submitted = cluster.submit()
    config = json.loads(cluster.stand_in.kubeconfig.read_text())
    config['clusters'][0]['cluster']['server'] = 'http://127.0.0.1:9'
    cluster.stand_in.kubeconfig.write_text(json.dumps(config))
    begin = time.monotonic()
    with pytest.raises(Unreachable, match='team/cluster:1 does not answer'):
        cluster.status(submitted)
    assert time.monotonic() - begin < 10


def test_the_verbs_of_phalanx_go_from_submission_to_cancellation(
    cluster, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
    command = ['submit', '--scheduler=kubernetes', '--kube_image=image', '--workers=3']
    command += ['--kube_volume=training:/models', '--model_dir=/models/digits']
    command += ['--gin_file=runs/digits.gin', '--gin.DEVICES=1', f'--python={cluster.task}']
    assert main(command) == 0
    handle = capsys.readouterr().out.strip()
    assert handle == 'k8s://team%2Fcluster%3A1/research/jobset/digits'
    cluster.all_meet(Submitted(handle))
    assert main(['status', handle]) == 0
    assert f'{handle}: running\nhost 0: running on node' in capsys.readouterr().out
    assert main(['logs', '/models/digits', '--worker=2']) == 0
    assert 'I am 2 digits-workers-0-2' in capsys.readouterr().out
    assert main(['cancel', handle]) == 0
    cluster.until(lambda: not cluster.left())
    assert main(['status', handle]) == 2
    assert 'There is no job' in capsys.readouterr().err


def test_kubectl_makes_the_plan_and_sees_what_becomes_of_it(cluster):
    plan = cluster.back_end(kind='job').plan(cluster.job)
    said = cluster.kubectl('create', '--validate=false', '-f', '-', input=plan)
    assert said.splitlines() == [
        'configmap/digits-config created',
        'service/digits created',
        'job.batch/digits created',
    ]
    submitted = Submitted('k8s://team%2Fcluster%3A1/research/job/digits')
    cluster.all_meet(submitted)
    pod = cluster.running(0)['metadata']['name']
    assert 'all are here' in cluster.kubectl('logs', pod)
    cluster.kubectl('delete', 'pod', cluster.running(1)['metadata']['name'], '--wait=false')
    cluster.until(lambda: len(cluster.pods(1)) == 1 and cluster.running(1))
    # Before that it would not hear of its end, as the first process of a container.
    cluster.until(lambda: 'I am 1' in cluster.printed(cluster.running(1)))
    cluster.end(0)
    cluster.kubectl('wait', '--for=condition=complete', 'job/digits', '--timeout=30s')
    assert cluster.status(submitted).state == 'finished'
