"""Ray: a job is an entry of the Jobs API, whose driver places one task on each host."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from launch.backends import Status, Unreachable
from launch.backends.ray_notes import Notes
from launch.job import Job
from launch.known import Submitted
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# The variable of the driver's environment that holds the job.
JOB = 'PHALANX_JOB'
# How long after the workers' own time to save Ray kills the driver that was asked to stop.
_STOP_SECONDS = 30
# Ray hands the environment of a job to each of its processes as one argument, and Linux allows
# 131,072 bytes for that (MAX_ARG_STRLEN, execve(2)). Ray adds a little, and quotes it again.
_MOST_BYTES = 100_000
_STATES = {
    'PENDING': 'pending',
    'RUNNING': 'running',
    'SUCCEEDED': 'finished',
    'FAILED': 'failed',
    'STOPPED': 'cancelled',
}
_ENDED = ('finished', 'failed', 'stopped', 'cancelled')
_HOST = 'http://HOST:8265'
# Ray's client lets variables of the environment override the address that it is given.
_OVERRIDING = ('RAY_API_SERVER_ADDRESS', 'RAY_ADDRESS')
_environment = threading.Lock()
_POLL_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """What a user can say of a Ray cluster.

    Attributes:
        address: of its dashboard, where the Jobs API is, such as 'http://head:8265'; '' for that in
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
        working_dir: a directory of this machine that is sent to the hosts, which the tasks then
            start in; '' sends nothing.
        excludes: what of it is left behind, in the patterns of .gitignore.
    """

    address: str = ''
    working_dir: str = ''
    excludes: tuple[str, ...] = ()


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `RayOptions`."""
    flags.DEFINE_string(
        'ray_address',
        '',
        f'The dashboard of a Ray cluster that runs, {_HOST}; default: RAY_ADDRESS.',
        flag_values=values,
    )
    flags.DEFINE_string(
        'ray_working_dir',
        '',
        'A directory of this machine that Ray sends to the hosts; the tasks start in it.',
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        'ray_exclude',
        [],
        'What of --ray_working_dir is not sent, a pattern as in .gitignore; may be repeated.',
        flag_values=values,
    )


def from_flags(values: flags.FlagValues) -> RayOptions:
    """Returns the options that the flags of `define_flags` ask for.

    Raises:
        ConfigError: they contradict each other.
    """
    if values.ray_exclude and not values.ray_working_dir:
        raise ConfigError(
            f'--ray_exclude={values.ray_exclude[0]} excludes it from nothing: it goes with '
            '--ray_working_dir=DIR.'
        )
    return RayOptions(values.ray_address, values.ray_working_dir, tuple(values.ray_exclude))


class Ray:
    """A Ray cluster that is there already; none is started or stopped."""

    def __init__(self, options: RayOptions | None = None):
        self._options = options or RayOptions()

    def plan(self, job: Job) -> str:
        """Returns the arguments of `JobSubmissionClient.submit_job`, in JSON.

        Raises:
            ConfigError: the job does not fit into the environment of a process.
        """
        # What is shipped is the directory that Ray starts its processes in.
        shipped = self._options.working_dir
        stop = math.ceil(job.policy.grace_seconds) + _STOP_SECONDS
        run = f'exec {shlex.quote(job.python)} -m launch.backends.ray_driver'
        sent = dataclasses.asdict(job) | {'directory': '' if shipped else job.directory}
        runtime_env: dict[str, Any] = {
            'env_vars': {
                # Ray expands $NAME and ${NAME} in values. In JSON a dollar can be spelt otherwise.
                JOB: json.dumps(sent).replace('$', '\\u0024'),
                # Of the cluster's processes too, but this one is meant for this job.
                'RAY_JOB_STOP_WAIT_TIME_S': str(stop),
            }
        }
        if shipped:
            runtime_env['working_dir'] = os.path.abspath(shipped)
            runtime_env['excludes'] = list(self._options.excludes)
        size = len(json.dumps(runtime_env['env_vars']))
        if size > _MOST_BYTES:
            raise ConfigError(
                f'Ray passes the configuration and --env on as one argument of {_MOST_BYTES:,} '
                f'bytes at most, and they are {size:,}. Put large values into files that the hosts '
                'can read.'
            )
        plan = {
            # The driver needs no resources, so it runs on the head, which outlives other hosts.
            'entrypoint': run if shipped else f'cd {shlex.quote(job.directory)} && {run}',
            'runtime_env': runtime_env,
            'metadata': {
                'name': job.name,
                'model_dir': job.model_dir,
                'hosts': str(job.hosts),
                'workers': str(job.workers),
            },
        }
        return json.dumps(plan, indent=2) + '\n'

    def submit(self, job: Job) -> str:
        """Sends the plan; see `launch.backends.Backend`."""
        plan = json.loads(self.plan(job))
        shipped = self._options.working_dir
        if shipped and not os.path.isdir(shipped):
            raise ConfigError(f'--ray_working_dir={shipped} is no directory of this machine.')
        address = self._address()
        client = _client(address)
        with _errors(address):
            identifier = client.submit_job(**plan)
        return f'ray://{address.partition("://")[2]}/{identifier}'

    def status(self, submitted: Submitted) -> Status:
        """Asks the Jobs API, and reads what the driver has noted if model_dir is visible here."""
        address, identifier = self._split(submitted)
        info = _info(_client(address), identifier, address)
        state, code = _STATES.get(info.status.value, 'unknown'), info.driver_exit_code
        model_dir = (info.metadata or {}).get('model_dir') or submitted.model_dir
        notes = Notes.read(ModelDir(model_dir), identifier) if model_dir else None
        if 75 in (code, notes.code if notes else None) and state in ('failed', 'cancelled'):
            state = 'stopped'
        if notes is None:
            return Status(state, _reason(info))
        waits = state == 'running' and notes.waits_for
        tasks = notes.tasks
        if state in _ENDED:
            # The driver may have been killed before it could note how they ended.
            tasks = [
                dataclasses.replace(each, state='cancelled' if state == 'cancelled' else 'unknown')
                if each.state in ('pending', 'running')
                else each
                for each in tasks
            ]
        return Status(
            'pending' if waits else state,
            notes.waits_for if waits else _reason(info),
            never=bool(waits) and notes.never,
            restarts=notes.restarts,
            tasks=tuple(tasks),
        )

    def logs(
        self, submitted: Submitted, worker: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Yields the driver's output, which is that of the job's leader; of a worker, its log in
        the newest attempt, where model_dir is visible here.

        Raises:
            ConfigError: there is no such job, or its logs are out of sight.
            Unreachable: the cluster cannot be asked.
        """
        address, identifier = self._split(submitted)
        client = _client(address)
        info = _info(client, identifier, address)
        if worker is not None:
            model_dir = (info.metadata or {}).get('model_dir') or submitted.model_dir
            yield from self._worker_log(submitted, ModelDir(model_dir), worker, follow)
        elif not follow:
            with _errors(address):
                yield client.get_job_logs(identifier)
        else:
            yield from _follow(client, identifier, address)

    def cancel(self, submitted: Submitted) -> None:
        """Has Ray send SIGTERM to the driver, which has all tasks save and end."""
        address, identifier = self._split(submitted)
        client = _client(address)
        _info(client, identifier, address)
        with _errors(address):
            client.stop_job(identifier)

    def _address(self) -> str:
        """The dashboard's address, without a slash at its end."""
        given = self._options.address
        for name in _OVERRIDING:
            given = given or os.environ.get(name, '')
        if not given:
            raise ConfigError(f'Which Ray cluster? Set --ray_address={_HOST}, or RAY_ADDRESS.')
        if given.partition('://')[0] not in ('http', 'https') or not given.partition('://')[2]:
            raise ConfigError(
                f'--ray_address={given} is no address of a dashboard, where the Jobs API is. '
                f'Write it as {_HOST}.'
            )
        return given.rstrip('/')

    def _split(self, submitted: Submitted) -> tuple[str, str]:
        """The address and the submission id of a handle."""
        rest = submitted.handle.partition('://')[2]
        host, _, identifier = rest.rpartition('/')
        if submitted.scheme != 'ray' or not host or not identifier:
            raise ConfigError(f'{submitted.handle!r} is no handle of a job: ray://HOST:8265/ID.')
        # A handle does not tell http from https, but the options may.
        for given in (self._options.address, *map(os.environ.get, _OVERRIDING)):
            if given and given.partition('://')[2].rstrip('/') == host:
                return given.rstrip('/'), identifier
        return f'http://{host}', identifier

    def _worker_log(
        self, submitted: Submitted, dirs: ModelDir, worker: int, follow: bool
    ) -> Iterator[str]:
        path, at = None, 0
        while True:
            ended = not follow or self.status(submitted).state in _ENDED
            newest = max(dirs.attempts(), default=0) if dirs.logs.is_dir() else 0
            current = dirs.attempt(newest) / f'worker-{worker}.log'
            if current != path and current.is_file():
                path, at = current, 0
            if path is not None:
                with open(path, errors='replace') as file:
                    file.seek(at)
                    while text := file.read(1 << 20):
                        yield text
                    at = file.tell()
            if ended:
                break
            time.sleep(_POLL_SECONDS)
        if path is None:
            raise ConfigError(
                f'There is no log of worker {worker} in {str(dirs.logs)!r}. The workers write '
                'there; look on a machine that sees that directory.'
            )


def _client(address: str) -> 'JobSubmissionClient':
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ConfigError(
            f"Jobs for Ray need its client ({error}): pip install 'phalanx[ray]'"
        ) from None
    if not urllib.request.getproxies():
        # Ray's client waits without end where nobody answers.
        with _errors(address):
            parts = urllib.parse.urlsplit(address)
            port = parts.port or (443 if parts.scheme == 'https' else 80)
            socket.create_connection((parts.hostname, port), _CONNECT_SECONDS).close()
    with _errors(address), _environment:
        hidden = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
        try:
            client = JobSubmissionClient(address)
        finally:
            os.environ.update(hidden)
    logging.getLogger('ray.dashboard.modules.job.sdk').setLevel(logging.WARNING)
    return client


def _info(client: 'JobSubmissionClient', identifier: str, address: str) -> 'JobDetails':
    with _errors(address):
        return client.get_job_info(identifier)


@contextlib.contextmanager
def _errors(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into what `launch.backends.Backend` promises."""
    try:
        yield
    except OSError as error:  # Those of `requests` are OSErrors too.
        raise Unreachable(
            f'Ray at {address} cannot be asked: {error}. Is the address right, can this machine '
            'reach it, and does the dashboard run?'
        ) from None
    except Exception as error:
        # RuntimeError for what the server answers, and Ray's own where a token is missing.
        if not isinstance(error, (RuntimeError, ValueError)) and not _is_of_ray(error):
            raise
        if 'status code 404' in str(error):
            raise ConfigError(f'Ray at {address} knows no such job.') from None
        raise ConfigError(f'Ray at {address} refuses: {error}') from None


def _is_of_ray(error: Exception) -> bool:
    return type(error).__module__.partition('.')[0] == 'ray'


def _reason(info: 'JobDetails') -> str:
    """What Ray says of a job, in a line; of a failed one also the last that its driver said."""
    first, _, said = (info.message or '').partition('\n')
    lines = said.strip().split('\n')
    last = [line for line in lines if line.startswith('phalanx: ')] or lines
    return f'{first.partition(", last available")[0]}{f": {last[-1]}" if last[-1] else ""}'


def _follow(client: 'JobSubmissionClient', identifier: str, address: str) -> Iterator[str]:
    """Yields a job's output until its end, from where it was whenever the connection was lost."""
    loop = asyncio.new_event_loop()
    seen = 0
    try:
        while True:
            skip, pieces, whole = seen, client.tail_job_logs(identifier), False
            try:
                while True:
                    piece = loop.run_until_complete(anext(pieces))
                    if skip < len(piece):
                        yield piece[skip:]
                    seen += max(0, len(piece) - skip)
                    skip = max(0, skip - len(piece))
            except StopAsyncIteration:
                whole = True
            except (RuntimeError, OSError):
                pass  # Ray's client raises these for a connection that was lost.
            # A proxy may close a connection in good order before the end.
            if whole and _STATES.get(_info(client, identifier, address).status.value) in _ENDED:
                return
            time.sleep(_POLL_SECONDS)
    finally:
        loop.close()
