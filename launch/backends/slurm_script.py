"""The batch script of a job, from its first line to its last."""

import dataclasses
import hashlib
import math
import re
import shlex
from collections.abc import Iterator, Sequence

from launch.backends.slurm_options import OF_SBATCH, SlurmOptions
from launch.job import Job
from trainer.errors import ConfigError

# How much earlier than asked Slurm may send the signal before the time limit, and how long the
# tasks need to end once all have saved.
_SIGNAL_EARLY_SECONDS, _END_SECONDS = 60, 60
# How long a step goes on when its first task has ended: a leader that has finished reports.
_STEP_END_SECONDS = 30
# Stands for the number of an element; no argument of a program can hold it.
_ELEMENT = '\0'


class Plan:
    """The batch script of a job.

    Attributes:
        config: the path of the file that the configuration has to be written to.
        script: the text.
    """

    def __init__(self, job: Job, options: SlurmOptions):
        self._job, self._options = job, options
        digest = hashlib.sha256(job.config.encode()).hexdigest()[:16]
        self.config = f'{job.model_dir}/config/submitted-{digest}.json'
        lines = [f'#SBATCH {option}' for option in self._options_of_sbatch()]
        lines += [f'export {k}={_quote(v)}' for k, v in sorted(job.environment.items())]
        lines.append(f'cd -- {_quote(job.directory)} || exit 2')
        lines += self._elements()
        command = _broken([*map(_quote, self._command())])
        own = ' "$@"' if options.sweep else ''
        text = '\n'.join(['#!/bin/bash', *lines, f'exec {command}{own}\n'])
        self.script = text.replace(_ELEMENT, '"$SLURM_ARRAY_TASK_ID"')

    def _options_of_sbatch(self) -> Iterator[str]:
        job, options = self._job, self._options
        least, most = job.min_hosts, job.hosts
        yield f'--job-name={job.name}'
        # Without --ntasks-per-node, which has Slurm take the fewest hosts of a range.
        yield f'--nodes={least}-{most}' if least < most else f'--nodes={most}'
        yield from _per_host(job, options)
        if job.time_limit_seconds is not None:
            yield f'--time={math.ceil(job.time_limit_seconds / 60)}'
        yield f'--signal=B:USR1@{self._signal_seconds()}'
        yield '--requeue'
        yield '--open-mode=append'
        logs = job.model_dir.replace('%', '%%') + '/logs/slurm-'
        yield f'--output={_option(logs + ("%A_%a" if options.sweep else "%j") + ".out")}'
        if options.sweep:
            at_once = f'%{options.sweep_at_once}' if options.sweep_at_once else ''
            yield f'--array=0-{len(options.sweep) - 1}{at_once}'
        for name in OF_SBATCH:
            value = getattr(options, name)
            if value is not None:
                yield f'--{name}={_option(value)}'
        yield from map(_one_line, options.sbatch)

    def _signal_seconds(self) -> int:
        """How long before the time limit the tasks are told."""
        job = self._job
        seconds = math.ceil(job.policy.grace_seconds) + _END_SECONDS
        least = seconds + _SIGNAL_EARLY_SECONDS
        if job.time_limit_seconds is not None and job.time_limit_seconds <= least:
            raise ConfigError(
                f'--time_limit: {job.time_limit_seconds} s leave no time to train. Tasks are told '
                f'to save {seconds} s before the limit (--grace_seconds and {_END_SECONDS} s), and '
                f'Slurm may do so {_SIGNAL_EARLY_SECONDS} s earlier. Give the job more than '
                f'{least} s.'
            )
        return seconds

    def _elements(self) -> Iterator[str]:
        """Sets the arguments of the script to the flags of its element of a sweep."""
        if self._options.sweep:
            yield 'case "$SLURM_ARRAY_TASK_ID" in'
            for index, element in enumerate(self._options.sweep):
                yield f'  {index}) set -- {" ".join(map(_quote, element))} ;;'
            yield 'esac'

    def _command(self) -> list[str]:
        job, options = self._job, self._options
        model_dir = job.model_dir
        if options.sweep:
            model_dir = f'{model_dir}/{_ELEMENT}'
            job = dataclasses.replace(job, model_dir=model_dir)
        srun = [
            'srun',
            '--ntasks-per-node=1',
            '--kill-on-bad-exit=0',
            f'--wait={_STEP_END_SECONDS}',
        ]
        srun += ['--mpi=none', '--export=ALL']
        if job.resources.cpus is not None:
            # Steps do not inherit it since 22.05.
            srun.append(f'--cpus-per-task={_cpus(job)}')
        else:
            srun.append('--cpu-bind=none')
        return [
            job.python,
            '-m',
            'launch.backends.slurm_step',
            f'--model_dir={model_dir}',
            f'--max_restarts={job.policy.max_restarts}',
            f'--grace_seconds={job.policy.grace_seconds:g}',
            '--',
            *srun,
            *self._container(),
            *job.command(
                'slurm',
                self.config,
                interpreter=options.container_python if options.container else None,
            ),
        ]

    def _container(self) -> list[str]:
        job, options = self._job, self._options
        if options.container is None:
            return []
        paths = list(dict.fromkeys([job.model_dir, job.directory, *options.container_mounts]))
        paths = [path if ':' in path else f'{path}:{path}' for path in paths if path != '/']
        for path in paths:
            if ',' in path or path.count(':') > 1:
                raise ConfigError(f'{path!r} cannot be mounted: it holds a comma or colons.')
        if options.container_by == 'apptainer':
            gpus = ['--nv'] if job.resources.gpus else []
            binds = [f'--bind={path}' for path in paths]
            return ['apptainer', 'exec', *gpus, *binds, f'--pwd={job.directory}', options.container]
        return [
            f'--container-image={options.container}',
            f'--container-mounts={",".join(paths)}',
            f'--container-workdir={job.directory}',
        ]


def _per_host(job: Job, options: SlurmOptions) -> Iterator[str]:
    """What a host must have."""
    each = job.resources
    if each.cpus is not None:
        yield f'--cpus-per-task={_cpus(job)}'
    if options.exclusive:
        yield '--exclusive'
    if each.memory_mb is not None:
        yield f'--mem={each.memory_mb * job.workers_per_host}M'
    if each.gpus:
        count = each.gpus * job.workers_per_host
        kind = [options.gpu_type] if options.gpu_type else []
        words = ['gpu'] if options.gpus_by == 'gres' else []
        yield f'--{options.gpus_by}={_option(":".join([*words, *kind, str(count)]))}'


def _cpus(job: Job) -> int:
    return job.resources.cpus * job.workers_per_host


def _broken(words: Sequence[str]) -> str:
    """Joins words, with a line for each option and for each program."""
    text, after_option = words[0], False
    for word in words[1:]:
        is_option = bool(re.match(r"\$?'?--", word))
        text += (' \\\n  ' if is_option or after_option else ' ') + word
        after_option = is_option and word != '--'
    return text


def _quote(value: str) -> str:
    """Quotes a word for bash, in one line: sbatch takes no script with carriage returns."""
    parts = []
    for part in value.split(_ELEMENT):
        if re.search(r'[\x01-\x1f\x7f]', part):
            text = part.replace('\\', '\\\\').replace("'", "\\'")
            text = re.sub(r'[\x01-\x1f\x7f]', lambda found: f'\\x{ord(found[0]):02x}', text)
            parts.append(f"$'{text}'")
        else:
            parts.append(shlex.quote(part) if part or value == '' else '')
    return _ELEMENT.join(parts)


def _option(value: str) -> str:
    """Quotes the value of an option for a line of #SBATCH, which no shell reads."""
    if re.fullmatch(r'[\w./:,=@%+\[\]&|*!()-]+', _one_line(value)):
        return value
    escaped = value.replace('\\', '\\\\').replace('"', '\\"')
    return f'"{escaped}"'


def _one_line(value: str) -> str:
    if re.search(r'[\x00-\x1f\x7f]', value):
        raise ConfigError(f'{value!r} cannot be told to sbatch: it does not fit on one line.')
    return value
