"""Jobs on the stand-in for Kubernetes, for tests that do something to them."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from launch.backends.kubernetes import Kubernetes, KubernetesOptions
from launch.backends.kubernetes_options import Volume
from launch.job import Job
from launch.known import Submitted
from tests.cluster.hosts import Hosts
from tests.cluster.kubernetes import StandIn
from tests.processes import environment

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
        try:
            peer.send(bytes([code]))
        except OSError:
            pass  # It is gone.
else:
    while True:
        try:
            with socket.create_connection(address, 2) as leader:
                leader.settimeout(None)
                leader.send(str(rank).encode())
                print('asks the leader', flush=True)
                if answer := leader.recv(1):
                    code = answer[0]
                    break
        except OSError:
            pass
        time.sleep(0.1)
print('ends with', code, flush=True)
sys.exit(code)
"""


class Cluster:
    """A stand-in with a claim, and a back end that submits to it.

    Args:
        directory: where all its files are.
        prefix, net: as for `Hosts`.
        **options: of `StandIn`.
    """

    def __init__(self, directory: Path, *, prefix: str = 'pxk', net: str = '10.82.1', **options):
        self.directory, self.claim = directory, directory / 'claim'
        self.claim.mkdir()
        self.task = directory / 'a task'
        self.task.write_text(TASK)
        self.task.chmod(0o755)
        self.hosts = Hosts(4, prefix=prefix, net=net)
        claims = {'training': self.claim}
        self.stand_in = StandIn(self.hosts, directory, image=IMAGE, claims=claims, **options)
        self.options = KubernetesOptions(
            image='image', kind='jobset', volumes=(Volume('training', '/models'),)
        )
        self.job = Job(
            'digits', '/models/digits', '[]', workers=3, min_workers=3, python=str(self.task)
        )

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.hosts)
            stack.enter_context(self.stand_in)
            self._stack = stack.pop_all()
        os.environ['KUBECONFIG'] = str(self.stand_in.kubeconfig)
        return self

    def __exit__(self, *exc):
        del os.environ['KUBECONFIG']
        self._stack.close()

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
        pods = {
            pod['metadata']['name']: (pod['status'], self.printed(pod)[-2000:])
            for pod in self.pods()
        }
        logs = {
            str(path.relative_to(self.claim)): path.read_text(errors='replace')[-2000:]
            for path in sorted(self.claim.glob('*/logs/attempt-*/worker-*.log'))
        }
        raise AssertionError(f'it never came to that: {pods} {logs}')

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
