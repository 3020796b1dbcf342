"""What the command line of a job asks for: `phalanx run`, `check` and `submit`, and each task."""

import dataclasses
import re
from collections.abc import Sequence

from absl import flags

from launch import display
from launch.job import Policy
from trainer import gin_files
from trainer.errors import ConfigError, nearest
from trainer.flags import Options, parse, reason

_COUNT = re.compile(r'(?:([0-9]+)-)?([0-9]+)')


@dataclasses.dataclass(frozen=True)
class Asked:
    """A job, as its flags tell it.

    Attributes:
        workers: how many train together.
        least: how few will do.
        workers_per_host: how many of them share a host; all of them unless it is said.
        devices_per_worker: of each, None if that was not said.
        data_workers: processes that make batches.
        policy: of the supervisor.
        logs: whose output is shown.
        tensorboard: whether it is started with the job.
        options: of `python -m trainer`.
        script: the whole configuration.
        model_dir: where the run is written, as it was given.
    """

    workers: int
    least: int
    workers_per_host: int
    devices_per_worker: int | None
    data_workers: int
    policy: Policy
    logs: str
    tensorboard: bool
    options: Options
    script: gin_files.Script
    model_dir: str

    @property
    def rest(self) -> list[str]:
        """The flags of `python -m trainer` beside those of the configuration and of model_dir."""
        dry = ['--dry_run'] if self.options.dry_run else []
        return [f'--mode={self.options.mode}', f'--verbosity={self.options.verbosity}', *dry]

    @property
    def trains(self) -> bool:
        """Whether it is a job that leaves a trained model."""
        return self.options.mode in ('train', 'train_and_evaluate') and not self.options.dry_run


def define(values: flags.FlagValues) -> None:
    """Defines the flags of a job."""
    new, policy = {'flag_values': values}, Policy()
    flags.DEFINE_string('workers', None, 'Processes that train together, N or LEAST-N.', **new)
    flags.DEFINE_integer('workers_per_host', None, 'How many share a host.', 1, **new)
    flags.DEFINE_integer('devices_per_worker', None, 'Devices of each.', 1, **new)
    flags.DEFINE_integer('data_workers', 0, 'Processes that make batches.', 0, **new)
    flags.DEFINE_integer('max_restarts', policy.max_restarts, 'In a row.', 0, **new)
    flags.DEFINE_float('grace_seconds', policy.grace_seconds, 'To save.', 0.0, **new)
    flags.DEFINE_float('patience_seconds', policy.patience_seconds, 'Of silence.', 1.0, **new)
    flags.DEFINE_float('meeting_seconds', policy.meeting_seconds, 'For hosts.', 1.0, **new)
    flags.DEFINE_boolean('tensorboard', False, 'Show curves.', **new)
    flags.DEFINE_boolean('elastic', False, 'Go on with fewer.', **new)
    flags.DEFINE_string('logs', 'chief', 'Whose output is shown.', **new)


def read(values: flags.FlagValues, argv: Sequence[str]) -> Asked | None:
    """Reads the command line of a job and its configuration.

    Args:
        values: with the flags that `define` has defined, and the caller's own.
        argv: the arguments.

    Returns:
        What is asked for; None when help was, which is then printed.

    Raises:
        ConfigError: a mistake in the flags or the configuration.
    """
    own = list(values)
    try:
        rest = values(['phalanx', *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. phalanx --help lists the flags.') from None
    if values.logs not in display.LOGS:
        raise ConfigError(
            f'--logs={values.logs} is none of {", ".join(display.LOGS)}.'
            f'{nearest(values.logs, display.LOGS)}'
        )
    # A mistake is told once, here, and not by every worker.
    options = parse(rest, others=own)
    if options is None:
        return None
    if options.check_workers:
        raise ConfigError(
            '--check_workers is a flag of `python -m trainer`. Use `phalanx check --workers=N`.'
        )
    hosts = len(values.hosts) if 'hosts' in values and values.hosts else 1
    workers, least = _workers(values.workers or str(hosts * (values.workers_per_host or 1)))
    each = values.workers_per_host or max(1, workers // hosts)
    if hosts > 1 and workers != hosts * each:
        raise ConfigError(
            f'--workers={workers} cannot be shared equally by {hosts} hosts'
            + (f' of --workers_per_host={each} each.' if values.workers_per_host else '.')
        )
    script = _script(values, options)
    elastic = values.elastic or least < workers
    return Asked(
        workers=workers,
        least=least if least < workers or not elastic else 1,
        workers_per_host=each,
        devices_per_worker=values.devices_per_worker,
        data_workers=values.data_workers,
        policy=Policy(
            max_restarts=values.max_restarts,
            grace_seconds=values.grace_seconds,
            patience_seconds=values.patience_seconds,
            meeting_seconds=values.meeting_seconds,
            elastic=elastic,
        ),
        logs=values.logs,
        tensorboard=values.tensorboard,
        options=options,
        script=script,
        model_dir=_model_dir(script),
    )


def _script(values: flags.FlagValues, options: Options) -> gin_files.Script:
    bindings = list(options.gin_bindings)
    if values.devices_per_worker is not None:
        bindings.append(f'strategy.devices_per_worker = {values.devices_per_worker}')
    if options.gin_script and options.gin_files:
        raise ConfigError('Give either --gin_file or --gin_script, which is in place of files.')
    if options.gin_script:
        return gin_files.load(options.gin_script, bindings)
    if not options.gin_files:
        raise ConfigError(
            'Which configuration? Give --gin_file=FILE, such as --gin_file=runs/digits.gin.'
        )
    return gin_files.read(options.gin_files, bindings, options.gin_search_path)


def _workers(text: str) -> tuple[int, int]:
    """Returns how many workers are wanted, and how few will do."""
    match = _COUNT.fullmatch(text)
    most = int(match[2]) if match else 0
    least = int(match[1]) if match and match[1] else most
    if not 1 <= least <= most:
        raise ConfigError(
            f'--workers={text} is neither a number from 1 on, such as --workers=4, nor a range, '
            'such as --workers=2-4.'
        )
    return most, least


def _model_dir(script: gin_files.Script) -> str:
    """Where the configuration leads the run to."""
    bound = [each.value for each in script.bindings if each.name == 'MODEL_DIR']
    if not bound or not isinstance(bound[-1], str):
        raise ConfigError('Where shall the run be written? Set --model_dir=DIR.')
    return bound[-1]
