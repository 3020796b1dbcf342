"""The meeting of all workers before TensorFlow starts, with a deadline and names for the absent."""

import asyncio
import json
import os
import socket
import time

from absl import logging

from trainer.cluster import Cluster
from trainer.errors import ConfigError

_LINE_BYTES = 4096
_HELLO_SECONDS = 10.0
_PROGRESS_SECONDS = 10.0
_RETRY_SECONDS = 0.2
# What reading a line of an unknown program can raise: not JSON, too long, or of other members.
_NO_LINE_OF_OURS = (ValueError, LookupError, TypeError, RecursionError)


def meet(cluster: Cluster, *, digest: str, deadline_seconds: float) -> None:
    """Returns when all workers are there and run the same configuration.

    Call it before TensorFlow starts. The constructor of a multi-worker strategy waits for a
    missing peer for ever, holding the interpreter lock, so that not even SIGTERM is answered.

    Worker 0 listens on its own address and the others call. A worker that waits for worker 0
    gives up after `deadline_seconds`; once worker 0 is there its deadline is the one that counts.
    All sockets are closed on return, so that TensorFlow's server can have the port.

    Args:
        cluster: the workers; with fewer than two there is nobody to meet.
        digest: what every worker must have alike, such as the sha256 of the configuration.
        deadline_seconds: how long to wait.

    Raises:
        ConfigError: a worker did not come, has another digest, or this worker's port is taken.
    """
    if cluster.num_workers == 1:
        return
    _check_port(cluster)
    role = _host if cluster.is_chief else _join
    asyncio.run(role(cluster, digest, deadline_seconds))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def _bound(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _check_port(cluster: Cluster) -> None:
    host, port = _split(cluster.workers[cluster.index])
    try:
        # On all interfaces, because that is where TensorFlow's server will listen.
        _bound(('::' if ':' in host else '', port)).close()
    except OSError as error:
        raise ConfigError(
            f'This process is {cluster.names([cluster.index])} but cannot listen on port {port}: '
            f'{error.strerror}. End the process that holds the port (ss -ltnp shows it), or give '
            'this worker a free one in TF_CONFIG, best below 32768 where systems take no '
            'port for outgoing connections.'
        ) from None


def _listener(address: str) -> socket.socket:
    host, port = _split(address)
    try:
        return _bound((host, port))
    except OSError:
        # The name is one that others use for this host: a service, a balancer, a translated one.
        return _bound(('', port))


async def _host(cluster: Cluster, digest: str, deadline_seconds: float) -> None:
    others = set(range(1, cluster.num_workers))
    present: dict[int, tuple[str, asyncio.StreamWriter]] = {}
    settled = asyncio.Event()
    guests: dict[asyncio.Task, asyncio.StreamWriter] = {}

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        guests[asyncio.current_task()] = writer
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), _HELLO_SECONDS))
            index, theirs = hello['index'], hello['digest']
            if index not in others or not isinstance(theirs, str):
                raise ValueError(f'no worker has index {index!r}')
            if index in present:
                _say(writer, error=f'Two processes say that they are {cluster.names([index])}.')
                return
            present[index] = theirs, writer
            if len(present) == len(others):
                settled.set()
            try:
                await reader.read(1)  # Ends when the worker goes, answered or not.
            finally:
                if not settled.is_set():
                    del present[index]
                    logging.warning('%s came and left again.', cluster.names([index]))
        except (OSError, *_NO_LINE_OF_OURS, asyncio.TimeoutError) as error:
            peer = writer.get_extra_info('peername')
            logging.warning('Ignored a connection from %s that is no worker: %r', peer, error)
        finally:
            writer.close()

    listener = _listener(cluster.workers[0])
    server = await asyncio.start_server(
        greet, sock=listener, limit=_LINE_BYTES, backlog=max(100, cluster.num_workers)
    )
    end = time.monotonic() + deadline_seconds
    while not settled.is_set() and (left := end - time.monotonic()) > 0:
        try:
            await asyncio.wait_for(settled.wait(), min(left, _PROGRESS_SECONDS))
        except asyncio.TimeoutError:
            logging.info('Waiting for %s.', cluster.names(others - present.keys()))
    server.close()
    settled.set()

    problems = []
    if missing := others - present.keys():
        problems.append(
            f'After {deadline_seconds:g} s these have not come: {cluster.names(missing)}. See '
            'whether each was started, with this TF_CONFIG, and can reach worker 0 at '
            f'{cluster.workers[0]}.'
        )
    if differing := [i for i, (theirs, _) in present.items() if theirs != digest]:
        problems.append(
            f'Another configuration than worker 0 has: {cluster.names(differing)}. All workers '
            'need the same files, flags and bindings.'
        )
    answer = {'error': ' '.join(problems)} if problems else {'go': True}
    for _, writer in present.values():
        _say(writer, **answer)
    if guests:
        # Workers close first: the side that does keeps the port in TIME_WAIT.
        _, silent = await asyncio.wait(guests, timeout=1.0)
        for task in silent:
            guests[task].close()
            await task
    if problems:
        raise ConfigError(answer['error'])


async def _join(cluster: Cluster, digest: str, deadline_seconds: float) -> None:
    host, port = _split(cluster.workers[0])
    start = time.monotonic()
    problem = 'nothing answers there'
    logging.info('Calling %s.', cluster.names([0]))
    while (left := start + deadline_seconds - time.monotonic()) > 0:
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(host, port, limit=_LINE_BYTES * 64), min(left, 5.0)
            )
        except (OSError, asyncio.TimeoutError) as error:
            # Asyncio hides the system's plain words behind some of its own.
            plain = os.strerror(error.errno) if (getattr(error, 'errno', 0) or 0) > 0 else ''
            problem = plain or str(error) or 'it does not answer'
            await asyncio.sleep(min(left, _RETRY_SECONDS))
            continue
        try:
            # Linux lets a call to a free ephemeral port of this host answer itself.
            if writer.get_extra_info('sockname') != writer.get_extra_info('peername'):
                _say(writer, index=cluster.index, digest=digest)
                # Worker 0 answers by its own deadline, which began before it took this call.
                line = await asyncio.wait_for(reader.readline(), deadline_seconds + 5.0)
                answer = json.loads(line)
                if answer == {'go': True}:
                    return
                raise ConfigError(str(answer['error']))
        except ConfigError:
            raise
        except (OSError, *_NO_LINE_OF_OURS, asyncio.TimeoutError):
            problem = 'what answers there is not worker 0 of this job, or it went away'
        finally:
            writer.close()
        await asyncio.sleep(_RETRY_SECONDS)
    raise ConfigError(
        f'{cluster.names([0])} has not come within {deadline_seconds:g} s ({problem}). See '
        'whether it was started, with this TF_CONFIG, and can be reached from '
        f'{cluster.names([cluster.index])}.'
    )


def _say(writer: asyncio.StreamWriter, **message: object) -> None:
    writer.write(json.dumps(message).encode() + b'\n')
