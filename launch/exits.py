"""How the workers of each host ended: a file for each host in the logs of an attempt.

They are written on that host, so that what went wrong first is known even where the scheduler keeps
no accounts and the leader's host is gone.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from trainer.model_dir import ModelDir


@dataclasses.dataclass(frozen=True)
class Exit:
    """The end of one host's part in an attempt.

    Attributes:
        attempt: its number.
        rank: of the host's task.
        host: its name.
        codes: of its workers by their number, exit codes, negative for a signal, None for one that
            ran on.
        begun, ended: seconds since 1970; `ended` is of the first worker that ended badly.
        reason: why the host ended them, if it did.
    """

    attempt: int
    rank: int
    host: str
    codes: Mapping[int, int | None]
    begun: float
    ended: float
    reason: str = ''


def write(dirs: ModelDir, end: Exit) -> None:
    """Writes the record of a host; what cannot be written is left out."""
    path = dirs.attempt(end.attempt) / f'host-{end.rank}.json'
    aside = path.with_name(f'.{path.name}.tmp')
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps(dataclasses.asdict(end)), encoding='utf-8')
        os.replace(aside, path)


def read(dirs: ModelDir, attempt: int) -> list[Exit]:
    """Returns the records of an attempt, those that ended first first."""
    found = []
    for path in dirs.attempt(attempt).glob('host-*.json'):
        if (end := _load(path)) is not None:
            found.append(end)
    return sorted(found, key=lambda each: each.ended)


def _load(path: Path) -> Exit | None:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        values = json.loads(path.read_text(encoding='utf-8'))
        codes = {int(index): code for index, code in values.pop('codes').items()}
        return Exit(codes=codes, **values)
    return None
