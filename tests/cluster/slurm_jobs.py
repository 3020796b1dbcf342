"""Jobs under a real Slurm whose tasks are stand-ins, see `tests.cluster.stand_in_task`."""

import dataclasses
import json
import sys
from pathlib import Path

from launch.backends.slurm import Slurm
from launch.job import Job, Policy
from launch.known import Submitted
from tests.processes import REPOSITORY


def stand_in_job(directory, end, /, *, variables=None, **more):
    """Returns a job on two hosts.

    Args:
        directory: for the job.
        end: what its tasks do.
        variables: more environment variables of its tasks.
        more: what is different in the job.
    """
    # All of Phalanx but its task.
    python = directory / 'python'
    task = REPOSITORY / 'tests' / 'cluster' / 'stand_in_task.py'
    python.write_text(
        f'#!/bin/bash\nif [ "$2" = launch.task ]; then shift 2; set -- {task} "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = Job(
        name='stand-in',
        model_dir=str(directory / 'run'),
        config='[]',
        workers=2,
        min_workers=2,
        policy=Policy(max_restarts=1),
        directory=str(directory),
        python=str(python),
        environment={'PYTHONPATH': str(REPOSITORY), 'END': end, **(variables or {})},
    )
    return dataclasses.replace(job, **more)


class Running:
    """A job that was submitted."""

    def __init__(self, cluster, job, options=None):
        self.slurm, self._cluster = Slurm(options), cluster
        self.submitted = Submitted(self.slurm.submit(job), job.model_dir)
        self.id = self.submitted.handle.rpartition('/')[2]
        self._dir = Path(job.model_dir)

    @property
    def state(self):
        return self.slurm.status(self.submitted).state

    def until(self, *states, seconds=60):
        """Waits until the job is in one of the states, and returns its status."""

        def reached():
            status = self.slurm.status(self.submitted)
            return status if status.state in states else None

        return self._cluster.until(reached, seconds)

    def until_told(self, count=1, rank=1):
        """Waits until a task, and the leader's, has told so often what it was given; returns what
        the task has told. A signal before that would find no handler."""

        def reached():
            found = self.told(rank)
            return found if min(len(found), len(self.told())) >= count else None

        return self._cluster.until(reached)

    def told(self, rank=0, what='host', element=''):
        path = self._dir / element / f'told-{rank}.jsonl'
        lines = path.read_text().splitlines() if path.exists() else []
        return [each for each in map(json.loads, lines) if what in each]

    def output(self):
        return ''.join(self.slurm.logs(self.submitted))
