"""Hosts for tests: network namespaces of this machine, each with an address and a name of its own.

They share the file system, as the hosts of a cluster share a file server. Only root can make them.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which('ip'),
    reason='makes network namespaces, which takes root and the program `ip` (iproute2)',
)


class Hosts:
    """Hosts node1, node2, ... on one bridge, and this process's own namespace as the host ctl.

    Args:
        count: how many.
        prefix: of the names of namespaces and interfaces; 8 characters at most. Who has the same
            one waits for the other to end.
        net: the first three numbers of their addresses; another for another prefix.
    """

    def __init__(self, count: int, *, prefix: str, net: str):
        self.count, self._prefix, self._net = count, prefix, net
        self._bridge = f'{prefix}br'
        self._lock = open(Path(tempfile.gettempdir(), f'{prefix}.lock'), 'w')  # noqa: SIM115

    def address(self, index: int) -> str:
        """The address of a host, numbered from 1; 0 is this process's."""
        return f'{self._net}.{index or 254}'

    def namespace(self, index: int) -> str:
        """The name of a host's namespace, for `ip netns exec`."""
        return f'{self._prefix}{index}'

    def __enter__(self) -> 'Hosts':
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._make()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _make(self) -> None:
        self._remove()
        _ip('link', 'add', self._bridge, 'type', 'bridge')
        _ip('addr', 'add', f'{self.address(0)}/24', 'dev', self._bridge)
        _ip('link', 'set', self._bridge, 'up')
        names = ['127.0.0.1 localhost', f'{self.address(0)} ctl']
        names += [f'{self.address(index)} node{index}' for index in range(1, self.count + 1)]
        for index in range(1, self.count + 1):
            name = self.namespace(index)
            _ip('netns', 'add', name)
            _ip('link', 'add', f'{name}v', 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name)
            _ip('link', 'set', f'{name}v', 'master', self._bridge, 'up')
            _ip('-n', name, 'addr', 'add', f'{self.address(index)}/24', 'dev', 'eth0')
            _ip('-n', name, 'link', 'set', 'lo', 'up')
            _ip('-n', name, 'link', 'set', 'eth0', 'up')
            _ip('-n', name, 'route', 'add', 'default', 'via', self.address(0))
            # `ip netns exec` mounts these over those of /etc. Without DNS each look-up would wait.
            etc = Path('/etc/netns') / name
            etc.mkdir(parents=True, exist_ok=True)
            (etc / 'nsswitch.conf').write_text('hosts: files\n')
            (etc / 'hosts').write_text('\n'.join(names) + '\n')

    def __exit__(self, *exc: object) -> None:
        self._remove()
        self._lock.close()

    def command(self, index: int, *command: str) -> list[str]:
        """Returns the command line that runs a program on a host, under its name."""
        if index == 0:
            script = 'hostname ctl; exec "$@"'
            return ['unshare', '--uts', 'bash', '-c', script, 'bash', *command]
        script = f'hostname node{index}; exec "$@"'
        within = ['ip', 'netns', 'exec', self.namespace(index)]
        return [*within, 'unshare', '--uts', 'bash', '-c', script, 'bash', *command]

    def cut(self, index: int) -> None:
        """Cuts the cable of a host: what is sent is lost, without a word to either side."""
        _ip('link', 'set', f'{self.namespace(index)}v', 'down')

    def heal(self, index: int) -> None:
        _ip('link', 'set', f'{self.namespace(index)}v', 'up')

    def _remove(self) -> None:
        for index in range(1, self.count + 1):
            name = self.namespace(index)
            # One that a test has left behind would keep the namespace, and its link.
            pids = subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, check=False)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip('link', 'del', f'{name}v')
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip('netns', 'del', name)
            shutil.rmtree(Path('/etc/netns') / self.namespace(index), ignore_errors=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip('link', 'del', self._bridge)


def _ip(*arguments: str) -> None:
    subprocess.run(['ip', *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)
