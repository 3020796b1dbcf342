"""The workers of one job as processes of this host, on loopback."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_POLL_SECONDS = 0.1
# After a signal the others save as well; after a failure they only notice.
_GRACE_SECONDS = 60.0
_PEER_SECONDS = 5.0
_TAIL_LINES = 20


def run(flags: Sequence[str], *, workers: int = 1) -> int:
    """Starts `python -m trainer` with the flags in every worker and waits for all of them.

    The chief writes to this program's output, the others to files of a temporary directory that
    is shown when one of them fails. When one worker fails the others, which wait for it in a
    collective, are ended. SIGTERM and Ctrl-C are handed on, once.

    Args:
        flags: of `python -m trainer`.
        workers: how many processes.

    Returns:
        The exit code: 0, or that of the first worker that ended otherwise.
    """
    command = [sys.executable, '-m', 'trainer', *flags]
    with tempfile.TemporaryDirectory(prefix='phalanx-') as directory:
        processes, logs = [], []
        try:
            for index, environment in enumerate(_environments(workers)):
                logs.append(Path(directory) / f'worker-{index}.log' if index else None)
                with open(logs[-1], 'wb') if index else contextlib.nullcontext() as output:
                    processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdout=output,
                            stderr=subprocess.STDOUT if output else None,
                            # Out of the terminal's group: Ctrl-C comes from here, and once.
                            start_new_session=True,
                        )
                    )
            return _wait(processes, logs)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _environments(workers: int) -> list[dict[str, str]]:
    """Each worker's environment variables."""
    # TF_CONFIG of an outer job is that job's business.
    common = {name: value for name, value in os.environ.items() if name != 'TF_CONFIG'}
    if workers == 1:
        return [common]
    # Each worker would otherwise start a thread for every core of the host.
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    common.setdefault('TF_NUM_INTRAOP_THREADS', str(threads))
    cluster = {'worker': [f'127.0.0.1:{port}' for port in free_ports(workers)]}
    tasks = [{'type': 'worker', 'index': index} for index in range(workers)]
    return [
        {**common, 'TF_CONFIG': json.dumps({'cluster': cluster, 'task': task})} for task in tasks
    ]


def free_ports(count: int) -> list[int]:
    """Returns TCP ports of loopback that nothing listens on, below those of outgoing calls."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(('127.0.0.1', port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _wait(processes: Sequence[subprocess.Popen], logs: Sequence[Path | None]) -> int:
    """Returns the first bad exit code once all have ended, or soon after one has failed."""
    asked = False

    def hand_on(number: int, frame: object) -> None:
        nonlocal asked
        del frame
        asked = True
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        deadline, first_bad = float('inf'), 0
        while any(process.poll() is None for process in processes):
            bad = [index for index, process in enumerate(processes) if process.poll()]
            if bad and not first_bad:
                first_bad = processes[bad[0]].returncode
                deadline = time.monotonic() + (_GRACE_SECONDS if asked else _PEER_SECONDS)
                if not asked:
                    _tell(bad[0], first_bad, logs[bad[0]])
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        code = first_bad or next((p.returncode for p in processes if p.returncode), 0)
        return code if code >= 0 else 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(index: int, code: int, log: Path | None) -> None:
    how = f'was ended by signal {-code}' if code < 0 else f'ended with exit code {code}'
    print(f'phalanx: worker {index} {how}; ending the others', file=sys.stderr)
    if log:
        tail = log.read_text(errors='replace').splitlines()[-_TAIL_LINES:]
        print(*(f'  worker {index}: {line}' for line in tail), sep='\n', file=sys.stderr)
