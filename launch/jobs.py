"""Jobs that a scheduler has: how they stand, what they say, their end, and which there are."""

import contextlib
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from launch import exits, known, schedulers
from launch import status as local
from launch.backends import Status, Unreachable
from launch.follower import STOPPED
from launch.known import Submitted
from launch.ledger import Ledger
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

_ASKED_AT_ONCE = 8
_WIDEST = 1000
_LISTED = 20
_ENDED = ('finished', 'failed', 'stopped', 'cancelled')


def status(text: str) -> str:
    """Returns some lines on a job.

    Args:
        text: its handle, or its model_dir.

    Raises:
        ConfigError: there is no such job.
        Unreachable: its scheduler cannot be asked, and its directory is not here.
    """
    submitted, dirs = _find(text)
    lines = []
    if submitted:
        try:
            lines += _of_scheduler(submitted, schedulers.of(submitted).status(submitted))
        except (ConfigError, Unreachable) as error:
            if not dirs:
                raise
            # It may have ended so long ago that its scheduler has forgotten it.
            lines.append(f'{submitted.handle}: {error}')
    if dirs:
        lines += [local.status(dirs), *_first_failure(dirs)]
    elif not submitted:
        lines.append(local.status(ModelDir(text)))
    return '\n'.join(lines)


def logs(text: str, worker: int | None, *, follow: bool) -> None:
    """Prints what a worker of a job says; without `worker`, what the job says as a whole.

    Raises:
        ConfigError: there is no such job or log.
        Unreachable: its scheduler cannot be asked.
    """
    submitted, _ = _find(text)
    if submitted is None:
        local.logs(ModelDir(text), worker or 0, follow=follow)
        return
    for piece in schedulers.of(submitted).logs(submitted, worker, follow):
        sys.stdout.write(piece)
        sys.stdout.flush()


def cancel(text: str) -> None:
    """Has a job save and end.

    Raises:
        ConfigError: there is no such job, or its launcher runs on another host.
        Unreachable: its scheduler cannot be asked.
    """
    submitted, _ = _find(text)
    if submitted:
        # What has ended may have left something behind that goes now.
        before = _state(submitted)
        schedulers.of(submitted).cancel(submitted)
        told = f'has ended: {before}' if before in _ENDED else 'is asked to save and end'
        print(f'{submitted.handle} {told}', file=sys.stderr)
        return
    pid = local.launcher(ModelDir(text))
    if pid is None:
        print(f'{text}: the job has ended', file=sys.stderr)
        return
    os.kill(pid, signal.SIGTERM)
    print(f'process {pid} is asked to save and end', file=sys.stderr)


def listing(*, everything: bool = False) -> None:
    """Prints the jobs that were submitted from here, the newest first, and how they stand."""
    # Rich takes its time to import.
    from rich.console import Console
    from rich.table import Table

    jobs = known.jobs()[::-1]
    shown = jobs if everything else jobs[:_LISTED]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
        states = list(threads.map(_state, shown))
    table = Table(box=None, pad_edge=False)
    for name in ('job', 'name', 'state', 'workers', 'submitted', 'model_dir'):
        table.add_column(name, overflow='fold', justify='right' if name == 'workers' else 'left')
    for each, state in zip(shown, states, strict=True):
        when = time.strftime('%Y-%m-%d %H:%M', time.localtime(each.time))
        table.add_row(each.handle, each.name, state, str(each.workers), when, each.model_dir)
    # In a pipe a job is one line, however long.
    Console(width=None if sys.stdout.isatty() else _WIDEST).print(table)
    if len(shown) < len(jobs):
        print(f'and {len(jobs) - len(shown)} older ones: phalanx list --all', file=sys.stderr)


def _find(text: str) -> tuple[Submitted | None, ModelDir | None]:
    """Returns the job that a scheduler has, and its directory if that is here and has a ledger."""
    submitted = known.find(text)
    path = submitted.model_dir if submitted else text
    if not path:
        return submitted, None
    dirs = ModelDir(path)
    return submitted, dirs if Ledger(dirs.path / 'ledger.jsonl').read() else None


def _state(submitted: Submitted) -> str:
    try:
        return schedulers.of(submitted).status(submitted).state
    except (ConfigError, Unreachable):
        return 'unknown'


def _of_scheduler(submitted: Submitted, found: Status) -> list[str]:
    head = f'{submitted.handle}: {found.state}'
    if found.reason:
        head += f' ({found.reason})'
    if found.restarts:
        head += f', started again {found.restarts} times'
    lines = [head]
    if found.never:
        lines.append('it can never start like this: cancel it, and ask for what there is')
    for task in found.tasks:
        line = f'host {task.rank}: {task.state}'
        line += f' on {task.host}' if task.host else ''
        line += f', exit code {task.code}' if task.code is not None else ''
        lines.append(line + (f' ({task.reason})' if task.reason else ''))
    return lines


def _first_failure(dirs: ModelDir) -> list[str]:
    """Says which worker of the newest attempt ended badly first, by the records of the hosts."""
    with contextlib.suppress(OSError):
        for attempt in dirs.attempts()[-1:]:
            for end in exits.read(dirs, attempt):
                for number, code in end.codes.items():
                    if code and code not in STOPPED:
                        how = f'signal {-code}' if code < 0 else f'exit code {code}'
                        return [f'the first to end badly: worker {number} on {end.host}, {how}']
    return []
