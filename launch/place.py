"""Where a task stands among the hosts of its job, from what its scheduler has told it."""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence

from launch import nodelist
from trainer.errors import ConfigError

SCHEDULERS = ('slurm', 'kubernetes', 'ray')
# Below those that systems take for outgoing connections.
_FIRST_PORT, _PORTS = 10_000, 20_000
# Of several candidates one is free. Far apart: what takes one port often takes its neighbours.
_CANDIDATES, _APART = 3, 4001


@dataclasses.dataclass(frozen=True)
class Place:
    """One task among those of its job, one a host.

    Attributes:
        rank: its number; 0 is the leader's.
        hosts: how many tasks there are.
        leader: the name or address of the leader's host, as others call it.
        ports: where it may listen; the first that is free.
        names: of the hosts by rank, as far as they are known.
        stays: whether a task that was asked to stop goes alone, since its scheduler puts another
            in its place, and the others stay. Else all end.
    """

    rank: int
    hosts: int
    leader: str
    ports: tuple[int, ...]
    names: tuple[str, ...] = ()
    stays: bool = False

    def name(self, rank: int) -> str:
        """Returns a host for people: 'host 2 (node7)'."""
        return f'host {rank} ({self.names[rank]})' if rank < len(self.names) else f'host {rank}'


def of_hosts(hosts: Sequence[str], rank: int, *, job: str) -> Place:
    """Returns the place of a task that a user has started.

    Args:
        hosts: the names of all hosts, the leader's first.
        rank: the number of this one.
        job: what tells this job from others of these hosts, such as its model_dir.

    Raises:
        ConfigError: the rank is none of the hosts', a host is named twice, or has no name.
    """
    if not all(hosts):
        raise ConfigError(
            f'--hosts={",".join(hosts)} has a comma too many: between two is a name, and none is '
            'empty.'
        )
    if twice := [host for host in hosts if hosts.count(host) > 1]:
        raise ConfigError(f'--hosts names {twice[0]} twice. A host has one task with all workers.')
    if not 0 <= rank < len(hosts):
        raise ConfigError(
            f'--rank={rank} is none of the {len(hosts)} hosts, which are counted from 0: '
            f'{",".join(hosts)}.'
        )
    return Place(rank, len(hosts), hosts[0], ports(job), tuple(hosts))


def of_scheduler(scheduler: str, environ: Mapping[str, str] = os.environ) -> Place:
    """Returns the place of a task that a scheduler has started.

    Args:
        scheduler: one of `SCHEDULERS`.
        environ: the environment variables of the task.

    Raises:
        ConfigError: a variable is missing or wrong.
    """
    if scheduler == 'slurm':
        return _of_slurm(environ)
    rank_variable = 'JOB_COMPLETION_INDEX' if scheduler == 'kubernetes' else 'PHALANX_RANK'
    rank, hosts = _number(environ, rank_variable), _number(environ, 'PHALANX_HOSTS')
    leader, port = _text(environ, 'PHALANX_LEADER'), _number(environ, 'PHALANX_PORT')
    if rank >= hosts:
        raise ConfigError(f'{rank_variable}={rank}, but there are {hosts} hosts, from 0 on.')
    return Place(rank, hosts, leader, (port,), stays=scheduler == 'kubernetes')


def _of_slurm(environ: Mapping[str, str]) -> Place:
    # Those of the step: after a requeue, and in a job of several steps, they differ from the job's.
    names = nodelist.expand(_text(environ, 'SLURM_STEP_NODELIST'))
    tasks, rank = _number(environ, 'SLURM_STEP_NUM_TASKS'), _number(environ, 'SLURM_PROCID')
    if tasks != len(names):
        raise ConfigError(
            f'The step has {tasks} tasks on {len(names)} hosts ({environ["SLURM_STEP_NODELIST"]}). '
            'Start one task a host, with srun --ntasks-per-node=1; it starts all workers of its '
            'host.'
        )
    # Other ports at each start: a host that was cut off may still have a task of the one before,
    # which shall not take the place of its successor.
    start = [environ.get(f'SLURM_{name}', '') for name in ('CLUSTER_NAME', 'RESTART_COUNT')]
    start += [_text(environ, 'SLURM_JOB_ID'), environ.get('SLURM_STEP_ID', '')]
    return Place(rank, len(names), names[0], ports('.'.join(start)), tuple(names))


def ports(job: str) -> tuple[int, ...]:
    """Returns where the leader of a job may listen: the same ports on all hosts."""
    first = zlib.crc32(job.encode())
    return tuple(_FIRST_PORT + (first + i * _APART) % _PORTS for i in range(_CANDIDATES))


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise ConfigError(
            f'{name} is not set. A task is started by its scheduler: see `phalanx submit`, or '
            '`phalanx run --hosts=A,B --rank=I` where there is none.'
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not text.isdecimal():
        raise ConfigError(f'{name}={text} is not a whole number from 0 on.')
    return int(text)
