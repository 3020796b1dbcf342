"""Jobs from their flags on: `phalanx run`, and `phalanx check`, which rehearses one."""

import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from launch import asked, display, task
from launch.asked import Asked
from launch.board import tensorboard
from launch.job import Policy
from launch.lead import lead
from launch.place import Place, of_hosts
from launch.supervisor import Supervisor
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


def run(argv: Sequence[str], *, check: bool = False) -> int:
    """Brings a job to its end, or rehearses a part of it.

    Args:
        argv: flags of `phalanx run`; those that are not its own go to every worker.
        check: rehearse what one replica would do, in one process.

    Returns:
        The exit code of the job.

    Raises:
        ConfigError: a mistake in the flags or the configuration, or another launcher is at work.
        WriteError: the disk is full.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    asked.define(values)
    flags.DEFINE_list('hosts', [], 'Names of several hosts.', flag_values=values)
    flags.DEFINE_integer('rank', None, 'Which of them this is.', 0, flag_values=values)
    job = asked.read(values, argv)
    if job is None:
        return 0  # Help was asked for.
    if job.data_workers and (check or not job.trains):
        mode = '--dry_run' if job.options.dry_run else f'--mode={job.options.mode}'
        raise ConfigError(
            f'--data_workers is for runs that train: {"phalanx check" if check else mode} makes '
            'its batches itself. Leave it out.'
        )
    place = _place(values.hosts, values.rank, job)
    if check or not job.trains:
        if place:
            raise ConfigError('--hosts is for runs that train. Leave it out: one host will do.')
        return rehearse(job, check=check)
    with contextlib.ExitStack() as stack:
        if job.tensorboard and (place is None or place.rank == 0):
            address = stack.enter_context(tensorboard(ModelDir(job.model_dir).path))
            print(f'phalanx: TensorBoard at {address}', file=sys.stderr, flush=True)
        return task.perform(job, place, argv) if place else lead(job, argv)


def _place(hosts: Sequence[str], rank: int | None, job: Asked) -> Place | None:
    if bool(hosts) != (rank is not None):
        raise ConfigError(
            '--hosts and --rank belong together: run the same command on every host, with the '
            'same --hosts=A,B,C and its own --rank, from 0 on.'
        )
    if not hosts:
        return None
    return of_hosts(hosts, rank, job=str(ModelDir(job.model_dir).path))


def rehearse(job: Asked, *, check: bool) -> int:
    """Runs what does not train, or with `check` one step of one replica; returns the exit code.

    It has nothing to go on from, says nothing of how it gets on, and leaves no trace in the history
    of the run.
    """
    given, workers = [f'--model_dir={job.model_dir}', *job.rest], job.workers
    if check:
        given.append(f'--check_workers={workers}')
        workers = 1
    policy = Policy(
        max_restarts=0, grace_seconds=job.policy.grace_seconds, patience_seconds=math.inf
    )
    with tempfile.TemporaryDirectory(prefix='phalanx-') as aside:
        return Supervisor(
            given,
            job.script,
            workers=workers,
            dirs=ModelDir(aside),
            policy=policy,
            display=display.Display(job.logs, progress=False),
        ).run()
