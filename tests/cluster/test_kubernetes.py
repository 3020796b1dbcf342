"""Jobs on a stand-in for Kubernetes: the official client and kubectl, and pods that are processes.

Without a kubelet, a scheduler and admission, this shows that the clients are used as they want to
be, and that a job lives through what the Job controller does to its pods.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.backends import Unreachable
from launch.backends.kubernetes import Kubernetes, KubernetesOptions
from launch.backends.kubernetes_options import Volume
from launch.job import Job, Policy, Resources
from launch.known import Submitted
from tests.cluster.hosts import Hosts, needs_root
from tests.processes import environment
from trainer import gin_files
from trainer.errors import ConfigError

yaml = pytest.importorskip('yaml', reason="pip install 'phalanx[kubernetes]'")
pytest.importorskip('kubernetes', reason="pip install 'phalanx[kubernetes]'")

from tests.cluster.kubernetes import StandIn  # noqa: E402

pytestmark = [pytest.mark.cluster, needs_root]

KUBECTL = os.environ.get('PHALANX_KUBECTL') or shutil.which('kubectl')
DEADLINE_SECONDS = 60
IMAGE = {**environment(), 'PATH': os.environ['PATH']}
# In place of launch.task: says what it has got, meets, and then does what its directory says.
TASK = f"""#!{sys.executable}
import json, os, signal, socket, sys, time
from pathlib import Path

def stop(*_):
    print('saved', flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
rank, hosts = int(os.environ['JOB_COMPLETION_INDEX']), int(os.environ['PHALANX_HOSTS'])
flags = dict(each.removeprefix('--').partition('=')[::2] for each in sys.argv[1:])
directory = Path(flags['model_dir'])
directory.mkdir(parents=True, exist_ok=True)
print('I am', rank, socket.gethostname(), os.getpid(), flush=True)
told = {{'argv': sys.argv[1:], 'value': os.environ.get('VALUE'), 'directory': os.getcwd()}}
told['config'] = Path(flags['gin_script']).read_text()
(directory / f'told-{{rank}}.json').write_text(json.dumps(told))
address = os.environ['PHALANX_LEADER'], int(os.environ['PHALANX_PORT'])
if rank == 0:
    met, server = {{}}, socket.create_server(('', address[1]))
    while len(met) < hosts - 1:
        peer, _ = server.accept()
        met[int(peer.recv(10))] = peer
    print('all are here', flush=True)
    while not (directory / 'end').exists():
        time.sleep(0.05)
    code = int((directory / 'end').read_text())
    for peer in met.values():
        peer.send(bytes([code]))
else:
    while True:
        try:
            leader = socket.create_connection(address, 2)
        except OSError:
            time.sleep(0.1)
            continue
        leader.settimeout(None)
        leader.send(str(rank).encode())
        if answer := leader.recv(1):
            code = answer[0]
            break
        print('lost the leader', flush=True)
print('ends with', code, flush=True)
sys.exit(code)
"""


class Cluster:
    """A stand-in with a claim, and a back end that submits to it."""

    def __init__(self, directory: Path, **options):
        self.directory, self.claim = directory, directory / 'claim'
        self.claim.mkdir()
        self.task = directory / 'a task'
        self.task.write_text(TASK)
        self.task.chmod(0o755)
        self.hosts = Hosts(4, prefix='pxk', net='10.82.1')
        claims = {'training': self.claim}
        self.stand_in = StandIn(self.hosts, directory, image=IMAGE, claims=claims, **options)
        self.options = KubernetesOptions(
            image='image', kind='jobset', volumes=(Volume('training', '/models'),)
        )
        self.job = Job(
            'digits', '/models/digits', '[]', workers=3, min_workers=3, python=str(self.task)
        )

    def __enter__(self):
        self.hosts.__enter__()
        self.stand_in.__enter__()
        os.environ['KUBECONFIG'] = str(self.stand_in.kubeconfig)
        return self

    def __exit__(self, *exc):
        del os.environ['KUBECONFIG']
        self.stand_in.__exit__(*exc)
        self.hosts.__exit__(*exc)

    def back_end(self, **options):
        return Kubernetes(dataclasses.replace(self.options, **options))

    def submit(self, job=None, **options):
        return Submitted(self.back_end(**options).submit(job or self.job))

    def status(self, submitted):
        return self.back_end().status(submitted)

    def wait(self, submitted, state, seconds=DEADLINE_SECONDS):
        """Waits until a job is in a state and returns how it stands then."""
        return self.until(lambda: self._in(submitted, state), seconds)

    def _in(self, submitted, state):
        found = self.status(submitted)
        return found if found.state == state else None

    def until(self, what, seconds=DEADLINE_SECONDS):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.1)
        logs = {pod['metadata']['name']: self.printed(pod)[-2000:] for pod in self.pods()}
        raise AssertionError(f'it never came to that: {logs}')

    def all_meet(self, submitted):
        self.until(lambda: 'all are here' in ''.join(self.back_end().logs(submitted)))

    def end(self, code):
        """Has the tasks end."""
        aside = self.claim / 'digits' / 'aside'
        aside.write_text(str(code))
        aside.rename(self.claim / 'digits' / 'end')

    def pods(self, rank=None):
        index = 'batch.kubernetes.io/job-completion-index'
        return self.stand_in.store.all(
            'pods', lambda each: rank in (None, int(each['metadata']['annotations'][index]))
        )

    def running(self, rank):
        """The pod of a rank, once it runs."""
        return self.until(
            lambda: next(
                (
                    each
                    for each in self.pods(rank)
                    if each['status']['phase'] == 'Running'
                    and 'deletionTimestamp' not in each['metadata']
                ),
                None,
            )
        )

    def printed(self, pod):
        lines = self.stand_in.pods.log(pod, follow=False)
        return b''.join(line for _, line in lines).decode(errors='replace')

    def left(self):
        return [key[::2] for key in self.stand_in.store.objects]

    def kubectl(self, *arguments, **more):
        assert KUBECTL, 'Install kubectl, and set PHALANX_KUBECTL if it is not on PATH.'
        command = [KUBECTL, f'--kubeconfig={self.stand_in.kubeconfig}', *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout


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
    assert 'lost the leader' in cluster.printed(before)
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
    with pytest.raises(ConfigError, match=r'refuses it: admission webhook .* denied the request'):
        cluster.submit(tensorboard=True)
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
    cluster.end(0)
    cluster.kubectl('wait', '--for=condition=complete', 'job/digits', '--timeout=30s')
    assert cluster.status(submitted).state == 'finished'


FLAGS = [
    'STEPS = 400',
    'DEVICES = 1',
    'train.log_every = 50',
    'train.save_every = 50',
    'train.eval_every = 400',
    'train.sample_log = True',
]


def _bits(model_dir):
    manifest = model_dir / 'checkpoints' / 'step-00000400' / 'manifest.json'
    return json.loads(manifest.read_text())['state_sha256'], (model_dir / 'samples.tsv').read_text()


def test_a_real_run_whose_pods_are_lost_ends_with_the_bits_of_an_undisturbed_one(cluster):
    undisturbed = cluster.directory / 'undisturbed'
    command = [sys.executable, '-m', 'launch', 'run', '--workers=2', f'--model_dir={undisturbed}']
    command += ['--gin_file=runs/digits.gin', *(f'--gin_bindings={each}' for each in FLAGS)]
    threads = environment(TF_NUM_INTRAOP_THREADS='1')
    subprocess.run(command, check=True, env=threads, capture_output=True, timeout=300)

    script = gin_files.read(['runs/digits.gin'], [*FLAGS, "MODEL_DIR = '/models/digits'"])
    job = dataclasses.replace(
        cluster.job,
        config=json.dumps(script.parts),
        workers=2,
        min_workers=2,
        python=sys.executable,
        policy=Policy(meeting_seconds=60),
        resources=Resources(cpus=1),
    )
    submitted = cluster.submit(job)
    model_dir = cluster.claim / 'digits'
    steps = model_dir / 'checkpoints'
    cluster.until(lambda: list(steps.glob('step-00000[1-4]*')), 200)
    stays = cluster.running(0)
    cluster.stand_in.pods.signal(cluster.running(1), signal.SIGKILL)
    cluster.until(lambda: list(steps.glob('step-00000[2-4]*')), 200)
    assert cluster.running(0) is stays
    cluster.stand_in.pods.disrupt(stays, 'EvictionByEvictionAPI', 'drained')
    found = cluster.wait(submitted, 'finished', 300)
    assert stays['status']['containerStatuses'][0]['state']['terminated']['exitCode'] == 75
    assert found.restarts >= 1
    assert _bits(model_dir) == _bits(undisturbed)
