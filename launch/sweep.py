"""`phalanx sweep`: many runs with other values of some parameters, and which was the best."""

import contextlib
import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import asked, child, display
from launch.asked import Asked
from launch.board import tensorboard
from launch.sweeps import search
from launch.sweeps.book import Book, is_sweep
from launch.sweeps.plan import Plan, read
from launch.sweeps.runner import Runner
from launch.sweeps.slots import slots
from trainer import gin_files
from trainer.errors import ConfigError
from trainer.model_dir import ModelDir


def sweep(argv: Sequence[str]) -> int:
    """Runs the trials of a sweep, or those of them that have not ended.

    Args:
        argv: flags of `phalanx sweep`; the others are those of `phalanx run`, for each trial.

    Returns:
        0 if all trials have ended and one did not fail, 1 if all failed, 75 if it was stopped.

    Raises:
        ConfigError: a mistake in the flags, the file of the sweep or the configuration of a
            trial; or another sweep is at work in the directory.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    asked.define(values)
    flags.DEFINE_string('sweep_file', None, 'What is swept over.', flag_values=values)
    flags.DEFINE_integer('parallel', None, 'Trials at a time.', 1, flag_values=values)
    job = asked.read(values, argv)
    if job is None:
        return 0  # Help was asked for.
    if not values.sweep_file:
        raise ConfigError('Over what? Give --sweep_file=FILE.')
    if not job.trains:
        raise ConfigError('A sweep trains. Leave out --mode and --dry_run.')
    plan = read(values.sweep_file, job.options.gin_search_path)
    search.check(plan)
    places = slots(values.parallel, job.workers * (job.devices_per_worker or 1))
    directory = ModelDir(job.model_dir)
    _make(directory.path)
    with directory.lock(), directory.full_disk_is_told():
        book = Book(directory.path)
        if not is_sweep(directory.path):
            check(plan, job)
        book.begin(plan, job.script)
        return _run(plan, book, job, places, directory.path)


def _run(plan: Plan, book: Book, job: Asked, places, directory: Path) -> int:
    with contextlib.ExitStack() as stack:
        if job.tensorboard:
            _tell(f'TensorBoard at {stack.enter_context(tensorboard(directory))}')
        code = Runner(plan, book, _flags(job), places, _tell).run()
    # Rich takes its time to import.
    from launch.sweeps.report import save_png, show

    show(book)
    png = directory / 'sweep.png'
    try:
        save_png(book, png)
        _tell(f'plot: {png}')
    except ConfigError as error:
        _tell(f'no plot: {error.message}')
    _tell(f'TensorBoard: tensorboard --logdir {directory}')
    return code


def check(plan: Plan, job: Asked) -> None:
    """Checks every value of every parameter before the first trial.

    Raises:
        ConfigError: the configuration is wrong, or becomes so with a value.
    """
    usual = {name: domain.ends[0] for name, domain in plan.parameters.items()}
    cases = [
        {**usual, name: text} for name, domain in plan.parameters.items() for text in domain.ends
    ]
    unused = ','.join(['evaluate', *(['export'] if job.options.mode == 'train' else [])])
    with tempfile.TemporaryDirectory(prefix='phalanx-') as aside:
        saved = []
        for values in cases:
            own = gin_files.read([], [f'{name} = {text}' for name, text in values.items()])
            script = dataclasses.replace(job.script, parts=[*job.script.parts, *own.parts])
            saved.append(Path(aside) / f'{len(saved)}.json')
            script.save(saved[-1])
        done = subprocess.run(
            child.command('launch.sweeps.check', unused, *map(str, saved)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(_located(done.stdout.strip(), plan))
    if done.returncode:
        raise RuntimeError(f'The check of the sweep failed:\n{done.stderr}')


def _located(message: str, plan: Plan) -> str:
    """Has a message name the file of the sweep where the trials get a value by a flag."""
    where, _, rest = message.partition(': ')
    if where == 'the command line' and rest.startswith(tuple(plan.parameters)):
        return f'{plan.where}: {rest}'
    return message


def _flags(job: Asked) -> list[str]:
    """The flags of `phalanx run` for a trial, beside those of its configuration."""
    policy = job.policy
    workers = f'{job.least}-{job.workers}' if policy.elastic else str(job.workers)
    given = [
        f'--workers={workers}',
        f'--data_workers={job.data_workers}',
        f'--max_restarts={policy.max_restarts}',
        f'--grace_seconds={policy.grace_seconds}',
        *job.rest,
    ]
    if math.isfinite(policy.patience_seconds):
        given.append(f'--patience_seconds={policy.patience_seconds}')
    if job.devices_per_worker is not None:
        given.append(f'--devices_per_worker={job.devices_per_worker}')
    return given


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'--model_dir={directory} cannot be made: {error.strerror}. Give a directory that this '
            'user may write to.'
        ) from error


def _tell(text: str) -> None:
    display.write(f'phalanx: {text}\n', sys.stderr)
