"""What the driver of a Ray job notes for who asks how the job stands: a file in model_dir."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from launch.backends import Task
from trainer.model_dir import ModelDir


@dataclasses.dataclass
class Notes:
    """How a job stands, as its driver knows.

    Attributes:
        identifier: Ray's submission id; another job may write into the same directory later.
        waits_for: what the job needs to go on; '' if nothing.
        never: whether the cluster as it is can never give that.
        restarts: how often tasks were started again.
        code: what the job ended with; None before that.
        tasks: of each host.
    """

    identifier: str
    waits_for: str = ''
    never: bool = False
    restarts: int = 0
    code: int | None = None
    tasks: list[Task] = dataclasses.field(default_factory=list)

    def write(self, dirs: ModelDir) -> None:
        """Writes them down; what cannot be written is left out, the job goes on."""
        path = _path(dirs)
        aside = path.with_name(f'.{path.name}.tmp')
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(dataclasses.asdict(self)), encoding='utf-8')
            os.replace(aside, path)

    def remove(self, dirs: ModelDir) -> None:
        """Removes them, and the directory if it holds nothing else."""
        with contextlib.suppress(OSError):
            _path(dirs).unlink(missing_ok=True)
            dirs.logs.rmdir()
            dirs.path.rmdir()

    def copy(self) -> 'Notes':
        """Returns them as they are now."""
        return dataclasses.replace(self, tasks=list(self.tasks))

    @classmethod
    def read(cls, dirs: ModelDir, identifier: str) -> 'Notes | None':
        """Returns those of a job; None if there are none here."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(_path(dirs).read_text(encoding='utf-8'))
            if values['identifier'] == identifier:
                return cls(**values | {'tasks': [Task(**each) for each in values['tasks']]})
        return None


def _path(dirs: ModelDir) -> Path:
    return dirs.logs / 'ray.json'
