"""`phalanx submit`: hands a job to a scheduler, or prints what it would hand over."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence

from absl import flags

from launch import asked, known, record, schedulers
from launch.asked import Asked
from launch.job import Job, Resources, name_of
from launch.run import rehearse
from trainer.errors import ConfigError
from trainer.flags import reason
from trainer.model_dir import ModelDir

_UNITS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86400}


def submit(argv: Sequence[str]) -> int:
    """Hands a job over, prints its handle, and returns the exit code.

    Args:
        argv: flags of `phalanx run` and those of `phalanx submit`.

    Raises:
        ConfigError: a mistake in the flags or the configuration, or the scheduler refuses the job.
        Unreachable: the scheduler cannot be asked.
    """
    scheduler = _scheduler(argv)
    module = schedulers.module(scheduler)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    asked.define(values)
    _define(values)
    module.define_flags(values)
    request = asked.read(values, argv)
    if request is None:
        return 0
    backend = schedulers.backend(scheduler, module.from_flags(values))
    job = _job(values, request)
    if values.dry_run:
        sys.stdout.write(backend.plan(job))
        return 0
    if values.check and (code := rehearse(request, check=True)):
        return code
    handle = backend.submit(job)
    print(handle, flush=True)  # Before anything else can fail.
    dirs = ModelDir(job.model_dir)
    # A pod's directories are not this machine's, unless they are there by chance or design.
    if scheduler != 'kubernetes' or dirs.path.is_dir():
        with contextlib.suppress(ConfigError):
            record.note_submission(dirs, handle, request.script)
    try:
        known.add(known.Submitted(handle, job.model_dir, job.name, job.workers, time.time()))
    except OSError as error:
        print(
            f'phalanx: `phalanx list` will not know this job: {known.path()} cannot be written: '
            f'{error.strerror}',
            file=sys.stderr,
        )
    return 0


def submit_help(argv: Sequence[str]) -> str:
    """Returns the help on the flags of a scheduler.

    Raises:
        ConfigError: there is no such scheduler.
    """
    scheduler = _scheduler([each for each in argv if each not in ('-h', '--help')])
    values = flags.FlagValues()
    _define(values)
    schedulers.module(scheduler).define_flags(values)
    lines = [f'phalanx submit --scheduler={scheduler}, besides the flags of `phalanx run`:', '']
    return '\n'.join(lines + [f'  --{name}: {values[name].help}' for name in values])


def _define(values: flags.FlagValues) -> None:
    new = {'flag_values': values}
    flags.DEFINE_string('scheduler', None, 'Who gets the job.', **new)
    flags.DEFINE_string('name', None, 'Of the job; default: that of model_dir.', **new)
    flags.DEFINE_integer('cpus_per_worker', None, 'Cores.', 1, **new)
    flags.DEFINE_integer('memory_mb_per_worker', None, 'Memory in MiB.', 1, **new)
    flags.DEFINE_integer('gpus_per_worker', 0, 'GPUs.', 0, **new)
    flags.DEFINE_string('time_limit', None, 'Such as 90m, 12h, 2d or HH:MM:SS.', **new)
    flags.DEFINE_multi_string('env', [], 'NAME=VALUE for the workers.', **new)
    flags.DEFINE_string('workdir', None, 'Where the tasks start; default: here.', **new)
    flags.DEFINE_string('python', None, 'The interpreter; default: this one.', **new)
    flags.DEFINE_boolean('dry_run', False, 'Print what would be handed over.', **new)
    flags.DEFINE_boolean('check', False, 'Rehearse one step here first.', **new)


def _scheduler(argv: Sequence[str]) -> str:
    """Returns the one flag that decides which others there are."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string('scheduler', None, 'Who gets the job.', flag_values=values)
    try:
        values(['phalanx', *argv], known_only=True)
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. phalanx --help lists the flags.') from None
    if values.scheduler is None:
        raise ConfigError(
            f'Which scheduler? Give --scheduler=NAME, one of {", ".join(schedulers.NAMES)}.'
        )
    return values.scheduler


def _job(values: flags.FlagValues, request: Asked) -> Job:
    if not request.trains:
        raise ConfigError(
            f'--mode={request.options.mode} is not submitted: jobs train. Use `phalanx run`.'
        )
    for name in ('tensorboard', 'data_workers'):
        if getattr(request, name):
            raise ConfigError(f'--{name} is a flag of `phalanx run`, on one host. Leave it out.')
    remote = values.scheduler == 'kubernetes'
    model_dir = request.model_dir
    if remote and not model_dir.startswith('/'):
        raise ConfigError(
            f'--model_dir={model_dir} must be an absolute path: it is a directory of the pods.'
        )
    path = str(ModelDir(model_dir).path)
    each = values.workers_per_host or 1
    least = request.least if request.policy.elastic else request.workers
    if '-' not in (values.workers or ''):
        least = max(least, each)  # With --elastic alone, a host is the least there can be.
    return Job(
        name=values.name or name_of(os.path.basename(path)),
        model_dir=path,
        config=request.script.saved,
        flags=(*request.rest, f'--logs={request.logs}'),
        workers=request.workers,
        min_workers=least,
        workers_per_host=each,
        resources=Resources(
            cpus=values.cpus_per_worker,
            memory_mb=values.memory_mb_per_worker,
            gpus=values.gpus_per_worker,
        ),
        policy=request.policy,
        time_limit_seconds=_seconds(values.time_limit),
        environment=dict(_variable(each) for each in values.env),
        directory=values.workdir or ('/' if remote else os.getcwd()),
        python=values.python or ('python3' if remote else sys.executable),
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition('=')
    if not equals:
        raise ConfigError(f'--env={text} has no value. Write --env={text}=VALUE.')
    return name, value


def _seconds(text: str | None) -> int | None:
    if text is None:
        return None
    if match := re.fullmatch(r'(\d+)([smhd]?)', text):
        seconds = int(match[1]) * _UNITS[match[2]]
    elif match := re.fullmatch(r'(?:(\d+)-)?(\d+):(\d\d):(\d\d)', text):
        days, hours, minutes, rest = (int(each or 0) for each in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    else:
        seconds = 0
    if not seconds:
        raise ConfigError(
            f'--time_limit={text} is no time. Write 90m, 12h, 2d, HH:MM:SS or D-HH:MM:SS.'
        )
    return seconds
