"""Jobs from their flags on: `phalanx run`, and `phalanx check`, which rehearses one."""

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from launch import display
from launch.board import tensorboard, write_text
from launch.record import Job, Record
from launch.supervisor import Policy, Supervisor
from trainer import gin_files
from trainer.errors import ConfigError, nearest
from trainer.flags import parse, reason
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
    own = flags.FlagValues()
    own.set_gnu_getopt(True)
    new = {'flag_values': own}
    policy = Policy()
    flags.DEFINE_integer('workers', 1, 'Processes that train together.', 1, **new)
    flags.DEFINE_integer('devices_per_worker', None, 'Devices of each.', 1, **new)
    flags.DEFINE_integer('data_workers', 0, 'Processes that make batches.', 0, **new)
    flags.DEFINE_integer('max_restarts', policy.max_restarts, 'In a row.', 0, **new)
    flags.DEFINE_float('grace_seconds', policy.grace_seconds, 'To save.', 0.0, **new)
    flags.DEFINE_float('patience_seconds', policy.patience_seconds, 'Of silence.', 1.0, **new)
    flags.DEFINE_boolean('tensorboard', False, 'Show curves.', **new)
    flags.DEFINE_boolean('elastic', False, 'Go on with fewer.', **new)
    flags.DEFINE_string('logs', 'chief', 'Whose output is shown.', **new)
    mine = list(own)
    try:
        rest = own(['phalanx', *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. phalanx --help lists the flags.') from None
    if own.logs not in display.LOGS:
        raise ConfigError(
            f'--logs={own.logs} is none of {", ".join(display.LOGS)}.'
            f'{nearest(own.logs, display.LOGS)}'
        )
    # A mistake is told once, here, and not by every worker.
    options = parse(rest, others=mine)
    if options is None:
        return 0  # Help was asked for.
    if options.check_workers or options.gin_script:
        name = 'check_workers' if options.check_workers else 'gin_script'
        mend = 'Use `phalanx check --workers=N`.' if options.check_workers else 'Use --gin_file.'
        raise ConfigError(f'--{name} is a flag of `python -m trainer`. {mend}')
    if not options.gin_files:
        raise ConfigError(
            'Which configuration? Give --gin_file=FILE, such as --gin_file=runs/digits.gin.'
        )
    bindings = list(options.gin_bindings)
    if own.devices_per_worker is not None:
        bindings.append(f'strategy.devices_per_worker = {own.devices_per_worker}')
    script = gin_files.read(options.gin_files, bindings, options.gin_search_path)
    model_dir, workers = _model_dir(script), own.workers
    dirs = ModelDir(model_dir)
    # The configuration itself comes from the supervisor.
    given = [f'--model_dir={model_dir}', f'--mode={options.mode}']
    given += [f'--verbosity={options.verbosity}', *(['--dry_run'] if options.dry_run else [])]
    trains = options.mode in ('train', 'train_and_evaluate') and not options.dry_run and not check
    if own.data_workers and not trains:
        mode = '--dry_run' if options.dry_run else f'--mode={options.mode}'
        raise ConfigError(
            f'--data_workers is for runs that train: {"phalanx check" if check else mode} makes '
            'its batches itself. Leave it out.'
        )
    if check:
        given.append(f'--check_workers={workers}')
        workers = 1
    elif trains:
        policy = Policy(
            max_restarts=own.max_restarts,
            grace_seconds=own.grace_seconds,
            patience_seconds=own.patience_seconds,
            elastic=own.elastic,
        )
        with contextlib.ExitStack() as stack:
            if own.tensorboard:
                address = stack.enter_context(tensorboard(dirs.path))
                print(f'phalanx: TensorBoard at {address}', file=sys.stderr, flush=True)
            job = Job(
                flags=list(argv),
                workers=workers,
                devices_per_worker=own.devices_per_worker,
                mode=options.mode,
                verbosity=options.verbosity,
                policy=dataclasses.asdict(policy),
                script=script,
            )
            code = Supervisor(
                given,
                script,
                workers=workers,
                data_workers=own.data_workers,
                dirs=dirs,
                policy=policy,
                display=display.for_stdout(own.logs),
                record=Record(dirs, job),
            ).run()
        if code != ConfigError.exit_code:
            _tell_verdict(dirs)
        return code
    # What does not train has nothing to go on from, says nothing of how it gets on, and leaves
    # no trace in the history of the run.
    policy = Policy(max_restarts=0, grace_seconds=own.grace_seconds, patience_seconds=math.inf)
    with tempfile.TemporaryDirectory(prefix='phalanx-') as aside:
        return Supervisor(
            given,
            script,
            workers=workers,
            dirs=ModelDir(aside),
            policy=policy,
            display=display.Display(own.logs, progress=False),
        ).run()


def _tell_verdict(dirs: ModelDir) -> None:
    lines = []
    # The job has ended, and nothing here may make its exit code another: neither Ctrl-C, nor a
    # disk that was too full for all events.
    try:
        # Rich takes its time to import.
        from launch.account import account
        from launch.report import markdown, verdict

        result = account(dirs)
        lines = [
            *verdict(result),
            f'{result.wall:,.0f} s in {result.attempts} attempt(s), {result.goodput:.0%} of them '
            f'in steps that count; `phalanx report {dirs.path}` tells more',
        ]
        write_text(dirs.job, result.step, 'report', markdown(result))
    except (Exception, KeyboardInterrupt) as error:
        lines.append(f'no report: {error or type(error).__name__}')
    for line in lines:
        display.write(f'phalanx: {line}\n', sys.stderr)


def _model_dir(script: gin_files.Script) -> str:
    """Where the configuration leads the run to."""
    bound = [each.value for each in script.bindings if each.name == 'MODEL_DIR']
    if not bound or not isinstance(bound[-1], str):
        raise ConfigError('Where shall the run be written? Set --model_dir=DIR.')
    return bound[-1]
