"""A job for a cluster: what to run, on how many hosts, and what each worker needs."""

import dataclasses
import re
from collections.abc import Mapping

from trainer.errors import ConfigError

# DNS-1123, less what a scheduler appends: pods are called NAME-workers-0-1023-abcde.
_NAME = re.compile(r'[a-z0-9]([-a-z0-9]*[a-z0-9])?')
_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the supervisor may do.

    Attributes:
        max_restarts: restarts in a row without a new checkpoint.
        grace_seconds: how long workers have to save after a signal.
        patience_seconds: the measure of how long a worker may be silent, see `launch.watch`.
        meeting_seconds: how long the hosts of a job wait for each other.
        elastic: go on with fewer workers where all cannot be brought back.
    """

    max_restarts: int = 3
    grace_seconds: float = 60.0
    patience_seconds: float = 60.0
    meeting_seconds: float = 300.0
    elastic: bool = False


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one worker needs; None leaves it to the scheduler.

    Attributes:
        cpus: cores.
        memory_mb: memory, in MiB.
        gpus: devices.
    """

    cpus: int | None = None
    memory_mb: int | None = None
    gpus: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is submitted to a scheduler.

    On each host runs one task, `python -m launch.task`, which has the workers of that host.

    Attributes:
        name: lower-case letters, digits and dashes, 40 at most.
        model_dir: the absolute path of the run's directory, as the hosts see it.
        config: the whole configuration, the text that `trainer.gin_files.Script.save` writes.
        flags: of `phalanx run`, but for the configuration, the workers and the policy.
        workers: how many train together, at most.
        min_workers: how few will do; equal to `workers` unless the job is elastic.
        workers_per_host: how many of them share a host; divides both.
        resources: what each worker needs.
        policy: of the supervisor.
        time_limit_seconds: after which the scheduler ends the job, None for its default.
        environment: variables of the workers, beside those of the host.
        directory: the working directory, as the hosts see it.
        python: the interpreter, as the hosts see it.
    """

    name: str
    model_dir: str
    config: str
    flags: tuple[str, ...] = ()
    workers: int = 1
    min_workers: int = 1
    workers_per_host: int = 1
    resources: Resources = Resources()
    policy: Policy = Policy()
    time_limit_seconds: int | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    directory: str = '/'
    python: str = 'python3'

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise ConfigError(
                f'--name={self.name} is no name for a job: use lower-case letters, digits and '
                f'dashes, {_LONGEST_NAME} at most, such as --name={name_of(self.name)}.'
            )
        for what, count in (('--workers', self.workers), ('its least', self.min_workers)):
            if count % self.workers_per_host:
                raise ConfigError(
                    f'{what}, {count}, cannot be divided among hosts of '
                    f'--workers_per_host={self.workers_per_host} each.'
                )
        for name in self.environment:
            if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]*', name):
                raise ConfigError(f'--env={name}=... is no name of an environment variable.')

    @property
    def hosts(self) -> int:
        """How many hosts, at most."""
        return self.workers // self.workers_per_host

    @property
    def min_hosts(self) -> int:
        """How few hosts will do."""
        return self.min_workers // self.workers_per_host

    def command(self, scheduler: str, config: str, *, interpreter: str | None = None) -> list[str]:
        """Returns the command line of one task.

        Args:
            scheduler: under which it runs, see `launch.task`.
            config: the path of a file with `config`, as the hosts see it.
            interpreter: in place of `python`.
        """
        count = f'{self.min_workers}-' if self.min_workers < self.workers else ''
        policy = dataclasses.asdict(self.policy)
        elastic = policy.pop('elastic')
        return [
            interpreter or self.python,
            '-m',
            'launch.task',
            f'--scheduler={scheduler}',
            f'--gin_script={config}',
            f'--model_dir={self.model_dir}',
            f'--workers={count}{self.workers}',
            f'--workers_per_host={self.workers_per_host}',
            *(f'--{name}={value:.15g}' for name, value in policy.items()),
            *(['--elastic'] if elastic else []),
            *self.flags,
        ]


def name_of(text: str) -> str:
    """Returns a name for a job that is as near to a text as a scheduler allows."""
    name = re.sub('[^a-z0-9]+', '-', text.lower())[:_LONGEST_NAME].strip('-')
    return name or 'phalanx'
