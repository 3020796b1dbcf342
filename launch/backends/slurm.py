"""Submits jobs to Slurm, version 20.11 and later.

A job is one batch script. It runs one step, with a task on each host, and asks for its requeue when
the tasks were stopped, see `launch.backends.slurm_step`. Only Slurm's programs are used.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.backends import Status, Task, Unreachable
from launch.backends.slurm_options import OF_SBATCH, SlurmOptions, define_flags, from_flags
from launch.backends.slurm_queue import Record, accounts, cluster_name, jobs, run
from launch.backends.slurm_script import Plan
from launch.backends.tail import tail
from launch.job import Job
from launch.known import Submitted
from launch.nodelist import expand
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir

__all__ = ['Slurm', 'SlurmOptions', 'define_flags', 'from_flags']

# Variables that lead Slurm's programs to the cluster. All others of Slurm would override the plan.
_KEPT = ('SLURM_CONF', 'SLURM_CONF_SERVER', 'SLURM_CLUSTERS', 'SLURM_JWT', 'SBATCH_CLUSTERS')


class Slurm:
    """The back end, see `launch.backends.Backend`."""

    def __init__(self, options: SlurmOptions | None = None):
        self._options = options or SlurmOptions()

    def plan(self, job: Job) -> str:
        """Returns the batch script."""
        return Plan(job, self._options).script

    def submit(self, job: Job) -> str:
        """Writes the configuration into model_dir, and has Slurm take the script."""
        plan = Plan(job, self._options)
        cluster = cluster_name()
        dirs = ModelDir(job.model_dir)
        dirs.create()
        aside = f'{plan.config}.{os.getpid()}.tmp'
        Path(aside).write_text(job.config, encoding='utf-8')
        os.replace(aside, plan.config)
        done = run(
            ['sbatch', '--parsable'],
            text=plan.script,
            environment={k: v for k, v in os.environ.items() if self._is_passed_on(k)},
        )
        if done.returncode:
            # Whether it has not answered or has refused, it says so at length.
            words = re.sub(r'(?m)^sbatch: (error: )?', '', done.stderr.strip())
            kind = Unreachable if re.search('contact|connect|timed out', words) else ConfigError
            raise kind(f'Slurm has not taken the job: {words}')
        # 'id;cluster' where there are several.
        job_id, _, other = done.stdout.strip().partition(';')
        return f'slurm://{other or cluster}/{job_id}'

    def status(self, submitted: Submitted) -> Status:
        """Asks the controller, and the accounts for what it has forgotten."""
        job_id, cluster = _parse(submitted.handle)
        records = jobs(job_id, cluster) or accounts(job_id, cluster)
        if records is None:
            return Status(
                'unknown', 'Slurm has forgotten the job, and keeps no accounts on this cluster'
            )
        if not records:
            raise ConfigError(f'There is no job {submitted.handle}.')
        if '_' not in job_id and any(each.elements for each in records):
            return _status_of_sweep(records)
        record = records[-1]
        hosts = expand(record.nodes)
        tasks = tuple(Task(rank, record.state, host) for rank, host in enumerate(hosts))
        return Status(record.state, _reason(record), record.never, record.restarts, tasks)

    def logs(
        self, submitted: Submitted, worker: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """Reads the files in model_dir."""
        job_id, cluster = _parse(submitted.handle)

        def ended() -> bool:
            found = jobs(job_id, cluster)
            return not any(each.state in ('pending', 'running') for each in found)

        output = self._output(submitted, job_id, cluster)
        if worker is None:
            newest = lambda: output  # noqa: E731
        else:
            dirs = ModelDir(output.parents[1] / job_id.partition('_')[2])
            newest = lambda: _worker_log(dirs, worker)  # noqa: E731
        path = newest()
        if not follow and not (path and path.exists()):
            status = self.status(submitted)
            raise ConfigError(
                f'There is no log {str(path or dirs.logs)!r} yet: the job is {status.state}'
                f'{f" ({status.reason})" if status.reason else ""}.'
            )
        return tail(newest, ended if follow else lambda: True)

    def cancel(self, submitted: Submitted) -> None:
        """Has a job that runs save and end; one that has been told so before is ended at once."""
        job_id, cluster = _parse(submitted.handle)
        for record in jobs(job_id, cluster):
            here = [*cluster, record.job_id]
            if record.state == 'pending':
                # Of an array those elements alone that wait.
                waiting = ['--state=PENDING'] if record.elements else []
                run(['scancel', *waiting, *here])
            elif record.state == 'running':
                # What may not be requeued is known to be cancelled, see `slurm_step`.
                change = ['scontrol', *cluster, 'update', f'JobId={record.job_id}', 'Requeue=0']
                if record.requeue and not run(change).returncode:
                    run(['scancel', '--batch', '--signal=USR1', *here])
                else:
                    run(['scancel', *here])

    def _is_passed_on(self, name: str) -> bool:
        if not name.startswith(('SLURM_', 'SBATCH_')) or name in _KEPT:
            return True
        # What a user has set for all jobs is for those that do not say otherwise.
        option = name.partition('_')[2].lower()
        return option in OF_SBATCH and name.startswith('SBATCH_') and not self._has(option)

    def _has(self, option: str) -> bool:
        return getattr(self._options, option) is not None

    def _output(self, submitted: Submitted, job_id: str, cluster: Sequence[str]) -> Path:
        """The output file of a job, as it was planned or, if model_dir is unknown, from Slurm."""
        found = jobs(job_id, cluster)
        if len(found) > 1 or (found and found[0].elements and '_' not in job_id):
            raise ConfigError(
                f'{submitted.handle} is a sweep: name one of its elements, such as '
                f'{submitted.handle}_0.'
            )
        if submitted.model_dir:
            return Path(submitted.model_dir) / 'logs' / f'slurm-{job_id}.out'
        if found and found[0].output:
            return Path(found[0].output)
        raise ConfigError(
            f'Slurm has forgotten where {submitted.handle} wrote. Name its model_dir instead.'
        )


def _status_of_sweep(records: Sequence[Record]) -> Status:
    """Sums the elements up: each stands as a task."""
    tasks, by_state = [], {}
    for record in records:
        by_state.setdefault(record.state, []).append(record)
        for element in record.elements:
            host = ','.join(expand(record.nodes)[:1])
            tasks.append(Task(element, record.state, host, reason=_reason(record)))
    order = ('running', 'pending', 'failed', 'stopped', 'cancelled', 'unknown', 'finished')
    state = next(each for each in order if each in by_state)
    first = by_state[state][0]
    return Status(
        state,
        _reason(first),
        all(each.never for each in by_state[state]),
        sum(each.restarts for each in records),
        tuple(sorted(tasks, key=lambda task: task.rank)),
    )


def _reason(record: Record) -> str:
    """Why a job is as it is, in Slurm's words."""
    if record.state == 'pending':
        return record.reason
    if record.state in ('running', 'finished', 'cancelled'):
        return ''
    code = f'signal {-record.code}' if record.code < 0 else f'exit code {record.code}'
    return ', '.join(filter(None, [record.word, record.reason, code]))


def _worker_log(dirs: ModelDir, worker: int) -> Path | None:
    attempts = dirs.attempts()
    return dirs.attempt(attempts[-1]) / f'worker-{worker}.log' if attempts else None


def _parse(handle: str) -> tuple[str, list[str]]:
    """Returns the number of a job, and the options that lead Slurm's programs to its cluster."""
    match = re.fullmatch(r'slurm://([^/]+)/(\d+(?:_\d+)?)', handle)
    if not match:
        raise ConfigError(f'{handle!r} names no job of Slurm. A right one: slurm://cluster/123')
    return match[2], [] if match[1] in ('local', cluster_name()) else [f'--clusters={match[1]}']
