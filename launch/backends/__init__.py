"""What submits jobs to clusters: one module a scheduler, all with the same five verbs."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from launch.job import Job
from launch.known import Submitted

# What a job may be, in every scheduler.
STATES = ('pending', 'running', 'finished', 'failed', 'stopped', 'cancelled', 'unknown')


@dataclasses.dataclass(frozen=True)
class Task:
    """What is known of one task of a job: of one host's share.

    Attributes:
        rank: its number, from 0.
        state: one of `STATES`.
        host: where it runs or ran last.
        code: its exit code, or that of its first worker that failed; None while it runs.
        reason: more of it, such as 'out of memory'.
    """

    rank: int
    state: str
    host: str = ''
    code: int | None = None
    reason: str = ''


@dataclasses.dataclass(frozen=True)
class Status:
    """How a job stands.

    Attributes:
        state: one of `STATES`.
        reason: in the scheduler's words, and why it waits.
        never: whether it waits for what will not come, unless someone changes the job or the
            cluster.
        restarts: how often the scheduler has started it again.
        tasks: what is known of its tasks, by rank.
    """

    state: str
    reason: str = ''
    never: bool = False
    restarts: int = 0
    tasks: tuple[Task, ...] = ()


class Backend(Protocol):
    """A scheduler. An object of it holds the user's options for it, and no connection."""

    def plan(self, job: Job) -> str:
        """Returns exactly what `submit` sends. Nothing is looked up, so the same job and options
        give the same text on any machine.

        Raises:
            ConfigError: the scheduler cannot run such a job.
        """

    def submit(self, job: Job) -> str:
        """Sends the plan and returns the handle of the job, such as 'slurm://cluster/123'.

        Nothing that can fail comes after the scheduler has taken the job.

        Raises:
            ConfigError: the scheduler refuses the job, in its own words.
            Unreachable: the scheduler cannot be asked.
        """

    def status(self, submitted: Submitted) -> Status:
        """Returns how a job stands, as far as the scheduler knows; see also `launch.exits`.

        Raises:
            ConfigError: there is no such job, and no trace of one.
            Unreachable: the scheduler cannot be asked.
        """

    def logs(
        self, submitted: Submitted, worker: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Yields what a worker prints, or the whole job without `worker`, in pieces of text as they
        come; with `follow` until the job has ended, waiting for its start if need be."""

    def cancel(self, submitted: Submitted) -> None:
        """Has a job save and end; does nothing if it has ended. Returns without waiting."""


class Unreachable(Exception):
    """A scheduler cannot be asked: a program is missing, or a server does not answer."""

    exit_code = 1
