"""The jobs that this user has submitted from this machine: a file with one a line."""

import dataclasses
import json
import os
from pathlib import Path

from launch.ledger import json_lines


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job that a scheduler has taken.

    Attributes:
        handle: names it among all jobs of all clusters, such as 'slurm://cluster/123'.
        model_dir: where it writes, as its hosts see it; '' if that is not known.
        name: that it was given.
        workers: how many.
        time: when, in seconds since 1970.
    """

    handle: str
    model_dir: str = ''
    name: str = ''
    workers: int = 1
    time: float = 0.0

    @property
    def scheme(self) -> str:
        """Which scheduler: 'slurm', 'k8s' or 'ray'."""
        return self.handle.partition('://')[0]


def path() -> Path:
    """Returns the file, whether it is there or not."""
    state = os.environ.get('XDG_STATE_HOME') or Path.home() / '.local' / 'state'
    return Path(state) / 'phalanx' / 'jobs.jsonl'


def add(submitted: Submitted) -> None:
    """Adds a job.

    Raises:
        OSError: the file cannot be written.
    """
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'a', encoding='utf-8') as opened:
        opened.write(json.dumps(dataclasses.asdict(submitted)) + '\n')


def jobs() -> list[Submitted]:
    """Returns all of them, in the order of their submission."""
    names = {field.name for field in dataclasses.fields(Submitted)}
    lines = [each for each in json_lines(path()) if isinstance(each.get('handle'), str)]
    return [Submitted(**{k: v for k, v in each.items() if k in names}) for each in lines]


def find(text: str) -> Submitted | None:
    """Returns the newest job of that handle or model_dir; an unknown handle is one all the same."""
    directory = os.path.abspath(os.path.expanduser(text))
    for each in reversed(jobs()):
        if each.handle == text or (each.model_dir and each.model_dir == directory):
            return each
    return Submitted(text) if '://' in text else None
