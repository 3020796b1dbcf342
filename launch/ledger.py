"""What happened to a job, over all its attempts: `ledger.jsonl`, one JSON object a line."""

import contextlib
import json
import time
from pathlib import Path

from trainer.errors import ConfigError


class Ledger:
    """Appends events to the ledger of a model_dir.

    Each has 'time' (seconds since 1970) and 'event': 'job' (the launcher begins), 'attempt' (its
    workers start), 'signal', 'stuck', 'exit' (a worker ended, with its code), 'attempt_end' (its
    outcome and the newest checkpoint), 'lost' (a host, with its first worker), 'data_worker' (one
    ended, with its code, and is started again), 'rollback' (training went astray: from which step
    to which, and what is left out), 'wait' (before the next attempt), 'end' (the exit code).
    """

    def __init__(self, path: Path):
        self._path = path

    def write(self, event: str, **fields: object) -> None:
        """Appends an event; what cannot be written is left out, the job goes on."""
        line = json.dumps({'time': round(time.time(), 3), 'event': event, **fields})
        with contextlib.suppress(OSError), open(self._path, 'a', encoding='utf-8') as file:
            file.write(line + '\n')

    def read(self) -> list[dict]:
        """Returns all events, in order."""
        return json_lines(self._path)

    def history(self) -> list[dict]:
        """Returns all events of a job that was started.

        Raises:
            ConfigError: no job has run there.
        """
        if events := self.read():
            return events
        raise ConfigError(
            f'{str(self._path.parent)!r} holds no {self._path.name}: no job has begun there. Name '
            'the --model_dir of one that was started with `phalanx run` or `phalanx submit`.'
        )


def json_lines(path: Path) -> list[dict]:
    """Returns the objects of a file with one a line; a line that a crash or a full disk has cut
    short is left out, and a file that is not there has none."""
    try:
        text = path.read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return []
    return parse_lines(text)


def parse_lines(text: str) -> list[dict]:
    """Returns the JSON objects among the lines of a text."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
