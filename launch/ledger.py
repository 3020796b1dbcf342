"""What happened to a job, over all its attempts: `ledger.jsonl`, one JSON object a line."""

import json
import time
from pathlib import Path


class Ledger:
    """Appends events to the ledger of a model_dir.

    Each has 'time' (seconds since 1970) and 'event': 'job' (the launcher begins), 'attempt' (its
    workers start), 'signal', 'stuck', 'exit' (a worker ended, with its code), 'attempt_end' (its
    outcome and the newest checkpoint), 'wait' (before the next attempt), 'end' (the exit code).
    """

    def __init__(self, path: Path):
        self._path = path

    def write(self, event: str, **fields: object) -> None:
        """Appends an event; what cannot be written is left out, the job goes on."""
        line = json.dumps({'time': round(time.time(), 3), 'event': event, **fields})
        try:
            with open(self._path, 'a', encoding='utf-8') as file:
                file.write(line + '\n')
        except OSError:
            pass

    def read(self) -> list[dict]:
        """Returns all events, in order; a line that a crash has cut short is left out."""
        events = []
        try:
            lines = self._path.read_text(encoding='utf-8').splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events
