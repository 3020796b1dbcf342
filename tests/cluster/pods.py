"""The pods of the stand-in: each is a process in a network, process and mount namespace of its own.

Its root is an overlay of this machine's, so that it sees the same programs, writes where nobody
sees it, and has its volumes where the plan mounts them.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.cluster.hosts import Hosts
from tests.cluster.store import Store, now

# Who is killed by a signal has this and its number for an exit code.
_KILLED = 128


class Pods:
    """The nodes, with one pod at a time on each.

    Args:
        store: where the pods are.
        hosts: the nodes.
        directory: for logs and mounts.
        image: the environment that a container has from its image.
        claims: the directory of each PersistentVolumeClaim.
    """

    def __init__(
        self,
        store: Store,
        hosts: Hosts,
        directory: Path,
        image: dict[str, str],
        claims: dict[str, Path],
    ):
        self._store, self._hosts, self._directory = store, hosts, directory
        self._image, self._claims = image, claims
        self._running: dict[str, _Process] = {}  # by uid
        self._logs: dict[str, list[tuple[float, bytes]]] = {}
        self._threads: list[threading.Thread] = []
        self._over = False
        self.cordoned: set[int] = set()

    def schedule(self) -> None:
        """Gives waiting pods the nodes that are free."""
        for pod in self._store.all('pods', lambda each: 'nodeName' not in each['spec']):
            if 'deletionTimestamp' in pod['metadata']:
                self._end(pod, 137)
                continue
            nodes = range(1, self._hosts.count + 1)
            busy = {int(each['spec']['nodeName'][4:]) for each in self._store.all('pods', _holds)}
            free = [each for each in nodes if each not in busy | self.cordoned]
            if free:
                pod['spec']['nodeName'] = f'node{free[0]}'
                pod['status'].pop('conditions', None)
                thread = threading.Thread(target=self._run, args=(pod, free[0]), daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                said = f'0/{self._hosts.count} nodes are available: all of them have a pod.'
                pod['status']['conditions'] = [
                    {
                        'type': 'PodScheduled',
                        'status': 'False',
                        'reason': 'Unschedulable',
                        'message': said,
                    }
                ]
            self._store.changed('pods', pod)

    def delete(self, pod: dict, grace: float | None = None) -> None:
        """Has a pod end: SIGTERM, and SIGKILL after its grace."""
        if 'deletionTimestamp' in pod['metadata']:
            return
        pod['metadata']['deletionTimestamp'] = now()
        self._store.changed('pods', pod)
        if grace is None:
            grace = pod['spec'].get('terminationGracePeriodSeconds', 30)
        if process := self._running.get(pod['metadata']['uid']):
            threading.Thread(target=process.end, args=(grace,), daemon=True).start()

    def disrupt(self, pod: dict, reason: str, message: str) -> None:
        """Deletes a pod as an eviction does."""
        one = {'type': 'DisruptionTarget', 'status': 'True', 'reason': reason, 'message': message}
        with self._store.lock:
            pod['status'].setdefault('conditions', []).append(one)
            self.delete(pod)

    def signal(self, pod: dict, number: int) -> None:
        """Sends a signal to the first process of a pod, as if it came from its node."""
        self._running[pod['metadata']['uid']].signal(number)

    def kill(self) -> None:
        """Ends all that run, at once."""
        self._over = True
        for each in list(self._running.values()):
            each.end(0)
        for thread in self._threads:
            thread.join()

    def log(self, pod: dict, follow: bool) -> Iterator[tuple[float, bytes]]:
        """Yields the lines that a pod prints, with their times."""
        lines, read = self._logs.setdefault(pod['metadata']['uid'], []), 0
        while True:
            over = pod['status'].get('phase') in ('Succeeded', 'Failed')
            while read < len(lines):
                yield lines[read]
                read += 1
            if over or not follow:
                return
            time.sleep(0.02)

    def _run(self, pod: dict, node: int) -> None:
        meta, spec = pod['metadata'], pod['spec']
        if not (mounts := self._mounts(pod)):
            return
        with self._store.lock:
            self._name(spec, node)
        process = _Process(
            self._hosts.namespace(node),
            spec,
            self._environment(pod),
            mounts,
            self._directory,
        )
        with self._store.lock:
            self._running[meta['uid']] = process
            self._state(pod, 'Running', {'running': {}})
            if 'deletionTimestamp' in meta:
                threading.Thread(target=process.end, args=(5,), daemon=True).start()
        lines = self._logs.setdefault(meta['uid'], [])
        for line in process.output:
            lines.append((time.time(), line))
        code = process.wait()
        with self._store.lock:
            self._running.pop(meta['uid'])
            self._name(spec, None)
            self._end(pod, code)

    def _end(self, pod: dict, code: int) -> None:
        last = b''.join(line for _, line in self._logs.get(pod['metadata']['uid'], [])[-5:])
        terminated = {'exitCode': code, 'reason': 'Error' if code else 'Completed'}
        if code:
            terminated['message'] = last.decode(errors='replace')
        self._state(pod, 'Failed' if code else 'Succeeded', {'terminated': terminated})

    def _state(self, pod: dict, phase: str, state: dict) -> None:
        name = pod['spec']['containers'][0]['name']
        pod['status'].update(phase=phase, containerStatuses=[{'name': name, 'state': state}])
        self._store.changed('pods', pod)

    def _mounts(self, pod: dict) -> list[tuple[Path, str, bool]]:
        """The directories to mount, once all of them are there; [] if the pod is deleted."""
        volumes = {each['name']: each for each in pod['spec']['volumes']}
        while 'deletionTimestamp' not in pod['metadata'] and not self._over:
            with contextlib.suppress(KeyError):
                return [
                    (
                        self._volume(pod, volumes[m['name']]),
                        m['mountPath'],
                        m.get('readOnly', False),
                    )
                    for m in pod['spec']['containers'][0]['volumeMounts']
                ]
            with self._store.lock:
                self._state(pod, 'Pending', {'waiting': {'reason': 'ContainerCreating'}})
            time.sleep(0.1)
        with self._store.lock:
            self._end(pod, 137)
        return []

    def _volume(self, pod: dict, volume: dict) -> Path:
        if claim := volume.get('persistentVolumeClaim'):
            return self._claims[claim['claimName']]
        path = self._directory / pod['metadata']['uid'] / volume['name']
        path.mkdir(parents=True, exist_ok=True)
        if found := volume.get('configMap'):
            key = ('configmaps', pod['metadata']['namespace'], found['name'])
            for name, text in self._store.objects[key]['data'].items():
                (path / name).write_text(text)
        return path

    def _environment(self, pod: dict) -> dict[str, str]:
        found = dict(self._image)
        for each in pod['spec']['containers'][0].get('env', []):
            if 'value' in each:
                found[each['name']] = expand(each['value'], found)
            else:
                path = each['valueFrom']['fieldRef']['fieldPath']
                key = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]
                found[each['name']] = pod['metadata']['annotations'][key]
        return found

    def _name(self, spec: dict, node: int | None) -> None:
        """Adds the name of a pod to what the nodes resolve, or takes it away."""
        name = f'{spec["hostname"]}.{spec["subdomain"]}'
        for index in range(1, self._hosts.count + 1):
            # In place: it is mounted where pods run.
            file = Path('/etc/netns') / self._hosts.namespace(index) / 'hosts'
            lines = [line for line in file.read_text().splitlines() if f' {name} ' not in line]
            if node is not None:
                lines.append(f'{self._hosts.address(node)} {name} {spec["hostname"]}')
            file.write_text('\n'.join(lines) + '\n')


class _Process:
    """A running container."""

    def __init__(
        self,
        namespace: str,
        spec: dict,
        environment: dict[str, str],
        mounts: list[tuple[Path, str, bool]],
        directory: Path,
    ):
        container = spec['containers'][0]
        command = [
            expand(each, environment) for each in container['command'] + container.get('args', [])
        ]
        etc = f'/etc/netns/{namespace}'
        bound = [(Path(f'{etc}/{name}'), f'/etc/{name}') for name in ('hosts', 'nsswitch.conf')]
        lines = [
            'set -e',
            f'hostname {shlex.quote(spec["hostname"])}',
            f'root=$(mktemp -d -p {shlex.quote(str(directory))})',
            'mount -t tmpfs tmpfs "$root"',
            'mkdir "$root"/upper "$root"/work "$root"/all',
            'mount -t overlay overlay "$root"/all '
            '-o "lowerdir=/,upperdir=$root/upper,workdir=$root/work"',
            'root="$root"/all',
            'mount --rbind /dev "$root"/dev',
            *(f'mount --bind {source} "$root"{target}' for source, target in bound),
        ]
        for source, target, read_only in mounts:
            inside = f'"$root"{shlex.quote(target)}'
            lines.append(f'mkdir -p {inside}')
            lines.append(f'mount --bind {shlex.quote(str(source))} {inside}')
            if read_only:
                lines.append(f'mount -o remount,bind,ro {inside}')
        work = container.get('workingDir', '/')
        lines.append(f'mkdir -p "$root"{shlex.quote(work)}')
        lines.append(
            'exec unshare --pid --fork --kill-child --mount-proc=/proc --root="$root" '
            f'--wd={shlex.quote(work)} -- {shlex.join(command)}'
        )
        self._process = subprocess.Popen(
            [
                *('ip', 'netns', 'exec', namespace, 'unshare', '--uts', '--mount'),
                *('bash', '-c', '\n'.join(lines)),
            ],
            env={'PATH': os.environ['PATH'], **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = self._process.stdout
        self._killed = False

    def signal(self, number: int) -> None:
        """Sends a signal to the container's first process, once that is there."""
        while self._process.poll() is None:
            if (first := self._first()) is not None:
                self._killed = number == signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.kill(first, number)
                return
            time.sleep(0.02)

    def end(self, grace: float) -> None:
        if grace:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
                return
        self.signal(signal.SIGKILL)

    def wait(self) -> int:
        """Returns the exit code, as Kubernetes counts."""
        code = self._process.wait()
        if self._killed:  # Which some versions of `unshare` cannot tell.
            return _KILLED + signal.SIGKILL
        return _KILLED - code if code < 0 else code

    def _first(self) -> int | None:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            for child in psutil.Process(self._process.pid).children():
                status = Path(f'/proc/{child.pid}/status').read_text()
                if re.search(r'^NSpid:\t\d+\t1$', status, re.MULTILINE):
                    return child.pid
        return None


def expand(text: str, environment: dict[str, str]) -> str:
    """Does what Kubernetes does with $(NAME) in commands and variables; $$ is one dollar.

    https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container/
    """

    def one(found: re.Match) -> str:
        if found[0] == '$$':
            return '$'
        return environment.get(found[1], found[0])

    return re.sub(r'\$\$|\$\(([^)]*)\)', one, text)


def _holds(pod: dict) -> bool:
    """Whether a pod holds its node."""
    ended = pod['status'].get('phase') in ('Succeeded', 'Failed')
    return 'nodeName' in pod['spec'] and not ended
