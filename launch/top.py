"""`phalanx top`: all jobs below a directory at a glance."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.account import account
from launch.board import tensorboard
from launch.ledger import Ledger, json_lines
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir
from trainer.observe.progress import duration

_LEDGER = 'ledger.jsonl'
# Below the root: sweeps and projects have directories of their own.
_DEEPEST = 4
_WIDEST = 1000
_REFRESH_SECONDS = 2.0
# A run that says nothing for so long is not called running: its host may be gone.
_SILENT_SECONDS = 300.0
_ENDS = {0: 'finished', 75: 'stopped', 2: 'refused'}


@dataclasses.dataclass(frozen=True)
class Line:
    """One job.

    Attributes:
        name: of its directory, below the root.
        state: 'running', 'silent', 'finished', 'stopped', 'refused' or 'failed'.
        step, last_step: taken, and of the whole job; 0 while they are not known.
        eta_seconds: until the last step, by the pace of the newest attempt; None if unknown.
        examples_per_second: of the chief's newest measurement; None if there is none.
        goodput: the share of the time in steps that count, from 0 to 1.
        workers: how many there are in the newest attempt.
        attempts: how many.
    """

    name: str
    state: str
    step: int
    last_step: int
    eta_seconds: float | None
    examples_per_second: float | None
    goodput: float
    workers: int
    attempts: int


def top(root: str, *, once: bool = False, curves: bool = False) -> None:
    """Shows all jobs below a directory, in a terminal until Ctrl-C.

    Args:
        root: the directory.
        once: show them once.
        curves: start TensorBoard over all of them, on loopback.

    Raises:
        ConfigError: there is no such directory, or no job in it.
    """
    directory = Path(os.path.abspath(os.path.expanduser(root)))
    if not directory.is_dir():
        raise ConfigError(f'{root!r} is no directory. Name one with the model_dirs of jobs in it.')
    if not any(_model_dirs(directory)):
        raise ConfigError(
            f'{root!r} holds no job: none of its directories has a {_LEDGER}, which `phalanx run` '
            'and submitted jobs write.'
        )
    console = Console()
    with contextlib.ExitStack() as stack:
        if curves:
            address = stack.enter_context(tensorboard(directory))
            print(f'phalanx: TensorBoard at {address}', file=sys.stderr, flush=True)
        if once or not (console.is_terminal or curves):
            # In a pipe a job is one line, however long.
            wide = {} if console.is_terminal else {'width': _WIDEST}
            console.print(table(directory), **wide)
            return
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(table(directory), console=console, auto_refresh=False) as live,
        ):
            while True:
                time.sleep(_REFRESH_SECONDS)
                live.update(table(directory), refresh=True)


def table(directory: Path) -> Table:
    """Returns the jobs below a directory for the terminal, those that run first."""
    found = Table(box=None, pad_edge=False)
    for name in ('job', 'state', 'step', 'ETA', 'examples/s', 'goodput', 'workers', 'attempts'):
        found.add_column(name, justify='left' if name in ('job', 'state') else 'right')
    for each in lines(directory):
        pace = each.examples_per_second
        found.add_row(
            each.name,
            each.state,
            f'{each.step:,}/{each.last_step:,}' if each.last_step else f'{each.step:,}',
            '' if each.eta_seconds is None else duration(each.eta_seconds),
            '' if pace is None or each.state != 'running' else f'{pace:,.0f}',
            f'{each.goodput:.0%}',
            str(each.workers),
            str(each.attempts),
            style='red' if each.state in ('failed', 'silent') else '',
        )
    return found


def lines(directory: Path) -> list[Line]:
    """Returns the jobs below a directory, those that run first, then by name."""
    found = []
    for path in _model_dirs(directory):
        with contextlib.suppress(ConfigError, OSError):
            found.append(_line(ModelDir(path), str(path.relative_to(directory))))
    return sorted(found, key=lambda each: (each.state != 'running', each.name))


def _model_dirs(directory: Path, depth: int = 0) -> Iterator[Path]:
    if (directory / _LEDGER).exists():
        yield directory
        return
    if depth == _DEEPEST:
        return
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith('.'):
                yield from _model_dirs(Path(entry.path), depth + 1)


def _line(dirs: ModelDir, name: str) -> Line:
    events = Ledger(dirs.path / _LEDGER).history()
    attempts = [each for each in events if each['event'] == 'attempt']
    said, steps = {}, []
    if attempts:
        path = dirs.attempt(attempts[-1]['number']) / 'worker-0.phases.jsonl'
        for each in json_lines(path):
            said |= each
            # Compiling is no part of the pace.
            if 'step' in each and 'time' in each and each.get('phase') != 'compiling':
                steps.append((each['time'], each['step']))
    step, last_step = said.get('step', dirs.newest_step()), said.get('last_step', 0)
    state = _state(events, said)
    return Line(
        name=name,
        state=state,
        step=step,
        last_step=last_step,
        eta_seconds=_eta(steps, last_step) if state == 'running' else None,
        examples_per_second=said.get('examples_per_second'),
        goodput=account(dirs).goodput,
        workers=attempts[-1]['workers'] if attempts else 0,
        attempts=len(attempts),
    )


def _state(events: list[dict], said: dict) -> str:
    last = events[-1]
    if last['event'] == 'end':
        return _ENDS.get(last['code'], 'failed')
    newest = max(last.get('time', 0.0), said.get('time', 0.0))
    return 'running' if time.time() - newest < _SILENT_SECONDS else 'silent'


def _eta(steps: list[tuple[float, int]], last_step: int) -> float | None:
    """By the pace of the newest minutes; what is lost to saving and evaluation counts."""
    recent = [each for each in steps if each[0] > steps[-1][0] - 300.0] if steps else []
    if len(recent) < 2 or recent[-1][1] <= recent[0][1]:
        return None
    (begin, first), (end, newest) = recent[0], recent[-1]
    return (last_step - newest) * (end - begin) / (newest - first)
