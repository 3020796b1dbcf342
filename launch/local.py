"""Workers of one attempt at a job, as processes of this host."""

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from launch import child
from trainer.errors import ConfigError
from trainer.observe import phases

_DUMP_SECONDS = 1.0
_THREADS = 'TF_NUM_INTRAOP_THREADS'


class Host:
    """This host alone, whose workers talk over loopback. See `launch.gang` for several hosts.

    Attributes:
        lock_seconds: how long to wait for another launcher to leave the directory.
    """

    lock_seconds = 0.0

    def when_asked(self, asked: Callable[[int, int], None]) -> None:
        """There are no other hosts that could get signals."""

    def gather(
        self, workers: int, least: int, *, stop: Callable[[], bool], show: Callable[[], None]
    ) -> int:
        """Returns how many workers there is room for; see `Gang.gather`."""
        del least, stop, show
        return workers

    def start(
        self,
        flags: Sequence[str],
        count: int,
        directory: Path,
        *,
        wanted: int,
        variables: Mapping[str, str],
    ) -> 'Workers':
        """Starts the workers of an attempt.

        Args:
            flags: of `python -m trainer`.
            count: how many.
            directory: where the files go; it exists.
            wanted: how many there should be; each gets its share of the GPUs as if they were.
            variables: of the environment, besides those of this process.
        """
        cluster = [f'127.0.0.1:{port}' for port in free_ports(count)] if wanted > 1 else []
        found = environments(cluster, 0, count, wanted)
        return Workers(flags, [{**each, **variables} for each in found], directory)

    def check(self, workers: int) -> None:
        """Raises ConfigError if there are GPUs, but not one for each worker."""
        check_gpus(workers)

    def end(self, code: int) -> None:
        """The job has ended."""


class Workers:
    """Processes that train together, each with its log and its record of phases in a directory.

    Attributes:
        logs: of each worker, what it prints.
        phases: of each worker, see `trainer.observe.phases`.
    """

    def __init__(
        self,
        flags: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        directory: Path,
        *,
        first: int = 0,
        phases_directory: Path | None = None,
    ):
        """Starts workers.

        Args:
            flags: of `python -m trainer`.
            environments: of each, all its variables but one.
            directory: where the logs go; it exists.
            first: the number of the first of them.
            phases_directory: where the records of phases go; None is `directory`.
        """
        numbers = range(first, first + len(environments))
        beside = phases_directory or directory
        self.logs = [directory / f'worker-{number}.log' for number in numbers]
        self.phases = [beside / f'worker-{number}.phases.jsonl' for number in numbers]
        self._ports: list[int] = []
        self._processes: list[subprocess.Popen] = []
        command = child.command('trainer', *flags)
        try:
            for index, variables in enumerate(environments):
                environment = {**variables}
                environment[phases.VARIABLE] = str(self.phases[index].absolute())
                with open(self.logs[index], 'wb') as log:
                    process = subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # Out of the terminal's group: Ctrl-C comes from the launcher, and once.
                        start_new_session=True,
                    )
                self._processes.append(process)
                if config := environment.get('TF_CONFIG'):
                    address = json.loads(config)['cluster']['worker'][numbers[index]]
                    self._ports.append(int(address.rpartition(':')[2]))
        except BaseException:
            self.kill()
            raise

    def codes(self) -> list[int | None]:
        """Returns each worker's exit code, negative for a signal, None while it runs."""
        return [process.poll() for process in self._processes]

    def states(self) -> list[str]:
        """Returns what each worker is: 'running', 'stopped' (by SIGSTOP) or 'ended'."""
        return [
            'ended' if process.poll() is not None else _state(process.pid)
            for process in self._processes
        ]

    def lost(self) -> None:
        """Workers of one host are not lost; see `launch.gang`."""

    def leaving(self) -> bool:
        """Whether a host of the workers is about to go: not this one."""
        return False

    def signal(self, number: int) -> None:
        """Sends a signal to all that run."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def dump_stacks(self) -> None:
        """Has every worker write what all its Python threads do into its log."""
        self.signal(signal.SIGUSR2)
        time.sleep(_DUMP_SECONDS)

    def taken_port(self) -> tuple[int, int] | None:
        """Returns a worker and its port if that is another process's; ask once all have ended."""
        for index, port in enumerate(self._ports):
            if is_taken(port):
                return index, port
        return None

    def kill(self) -> None:
        """Ends all that run, with what they have started, and waits for them."""
        for process in self._processes:
            # The group may outlive the worker: an export has a process to prove it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def check_gpus(workers: int) -> None:
    """Raises ConfigError if there are GPUs on this host, but not one for each worker."""
    gpus = visible_gpus()
    if workers > 1 and gpus and len(gpus) < workers:
        raise ConfigError(
            f'{workers} workers need a GPU each, but there are {len(gpus)}: {",".join(gpus)}. Use '
            f'--workers={len(gpus)}, or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU.'
        )


def intra_op_threads(workers: int, wanted: int | None = None) -> str | None:
    """Returns what TF_NUM_INTRAOP_THREADS is for each of `workers`, None if it is not set."""
    if (chosen := os.environ.get(_THREADS)) is not None:
        return chosen
    if (wanted or workers) == 1 or visible_gpus():
        return None
    # Each worker would otherwise start a thread for every core of the host.
    return str(max(1, len(os.sched_getaffinity(0)) // workers))


def environments(
    cluster: Sequence[str], first: int, count: int, wanted: int
) -> list[dict[str, str]]:
    """Returns the environment variables of the workers of this host.

    Args:
        cluster: 'host:port' of every worker of the job; empty for one that is alone.
        first: the number of the first worker of this host.
        count: of workers of this host.
        wanted: how many share its GPUs and cores; there may be fewer just now.
    """
    # TF_CONFIG of an outer job is that job's business.
    common = {name: value for name, value in os.environ.items() if name != 'TF_CONFIG'}
    gpus = visible_gpus()
    each = len(gpus) // wanted
    if threads := intra_op_threads(count, wanted):
        common[_THREADS] = threads
    found = []
    for index in range(count):
        found.append({**common})
        if cluster:
            task = {'type': 'worker', 'index': first + index}
            config = {'cluster': {'worker': list(cluster)}, 'task': task}
            found[-1]['TF_CONFIG'] = json.dumps(config)
        if gpus and wanted > 1:
            own = gpus[index * each : (index + 1) * each]
            found[-1]['CUDA_VISIBLE_DEVICES'] = ','.join(own)
    return found


def _state(pid: int) -> str:
    try:
        stopped = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return 'ended'
    return 'stopped' if stopped else 'running'


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by CUDA's names."""
    if (visible := os.environ.get('CUDA_VISIBLE_DEVICES')) is not None:
        # CUDA sees those before the first that is not there.
        return list(itertools.takewhile(lambda name: name not in ('', '-1'), visible.split(',')))
    devices = Path('/dev').glob('nvidia[0-9]*')
    return sorted((path.name.removeprefix('nvidia') for path in devices), key=int)


def is_taken(port: int) -> bool:
    """Whether a process that is not there any more could not have listened on a TCP port."""
    with socket.socket() as probe:
        # As a worker tries it: what its like have just left is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError:
            return True
    return False


def free_ports(count: int) -> list[int]:
    """Returns TCP ports of loopback that nothing listens on, below those of outgoing calls."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(('', port))  # On all interfaces, as TensorFlow's server will.
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
