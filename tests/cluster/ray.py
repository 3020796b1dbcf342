"""A real Ray cluster for tests: one host of it in each network namespace, its head on node1."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.processes import environment

START_SECONDS = 120
_PORT = 6379
_DASHBOARD_PORT = 8265

needs_ray = pytest.mark.skipif(
    not (Path(sys.executable).parent / 'ray').exists(),
    reason="needs Ray beside Phalanx: pip install 'phalanx[ray]'",
)


class RayCluster:
    """Ray on all hosts, each with one core to give away, and with the death of a host seen in
    seconds instead of a minute.

    Args:
        hosts: that it runs on.
        variables: of the environment of all its processes, and of what the jobs inherit.
    """

    def __init__(self, hosts: Hosts, **variables: str):
        self._hosts = hosts
        self._environment = environment(
            # A dead host is found by its silence.
            RAY_health_check_initial_delay_ms='2000',
            RAY_health_check_period_ms='500',
            RAY_health_check_timeout_ms='1500',
            RAY_health_check_failure_threshold='4',
            # A host that is cut off gives up.
            RAY_gcs_rpc_server_reconnect_timeout_s='15',
            # Or every other program of a busy machine goes first.
            RAY_worker_niceness='0',
            RAY_USAGE_STATS_ENABLED='0',
            **variables,
        )
        self._processes: dict[int, subprocess.Popen] = {}

    @property
    def address(self) -> str:
        """Where its Jobs API is."""
        return f'http://{self._hosts.address(1)}:{_DASHBOARD_PORT}'

    def __enter__(self) -> 'RayCluster':
        # Paths of sockets must not be longer than 107 characters, and Ray adds some 60.
        self._directory = tempfile.mkdtemp(prefix='pxr', dir='/tmp')
        try:
            # One after another: two that start at once on one file system take the same sockets.
            for index in range(1, self._hosts.count + 1):
                self.start(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for index in reversed(list(self._processes)):
            self.kill(index)
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self, index: int) -> None:
        """Starts Ray on a host and waits until the cluster counts it."""
        address = self._hosts.address(index)
        if index == 1:
            where = ['--head', f'--port={_PORT}', f'--temp-dir={self._directory}']
            where += [f'--dashboard-host={address}', f'--dashboard-port={_DASHBOARD_PORT}']
        else:
            where = [f'--address={self._hosts.address(1)}:{_PORT}']
        with open(f'{self._directory}/node{index}.log', 'ab') as log:
            self._processes[index] = subprocess.Popen(
                self._hosts.command(
                    index,
                    str(Path(sys.executable).parent / 'ray'),
                    'start',
                    '--block',
                    f'--node-ip-address={address}',
                    '--num-cpus=1',
                    '--num-gpus=0',
                    f'--object-store-memory={80 * 2**20}',
                    '--disable-usage-stats',
                    *where,
                ),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_SECONDS
        while address not in self.alive():
            if time.monotonic() > end or self._processes[index].poll() is not None:
                text = Path(f'{self._directory}/node{index}.log').read_text()
                raise AssertionError(f'Ray did not start on node{index}: {text[-3000:]}')
            time.sleep(0.2)

    def mend(self, index: int) -> None:
        """Brings a host back that was lost, if it was."""
        self._hosts.heal(index)
        if self._hosts.address(index) not in self.alive():
            self.kill(index)
            self.start(index)

    def kill(self, index: int) -> None:
        """Kills Ray on a host, and all that runs under it."""
        process = self._processes.pop(index, None)
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            for child in [*psutil.Process(process.pid).children(True)]:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.kill()
        process.wait()

    def alive(self) -> set[str]:
        """Returns the addresses of the hosts that the cluster counts on."""
        try:
            with urllib.request.urlopen(f'{self.address}/api/v0/nodes', timeout=10) as answer:
                nodes = json.load(answer)['data']['result']['result']
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        return {node['node_ip'] for node in nodes if node['state'] == 'ALIVE'}

    def _all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self._directory in part for part in process.cmdline()):
                    found.append(process)
        return found
