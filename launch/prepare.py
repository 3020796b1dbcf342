"""`phalanx prepare`: any data into files of records, written by several processes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch import data_flags, verb_flags
from launch.crew import Crew
from launch.interrupt import interruptible
from trainer import gin_files
from trainer.data import dataset
from trainer.errors import ConfigError, Preempted
from trainer.flags import rewrite_gin_flags
from trainer.unfinished import Unfinished

_FORMATS = ('array_record', 'tfrecord')
_ON_BAD_RECORD = ('stop', 'skip')


def prepare(argv: Sequence[str]) -> int:
    """Writes a data set, or goes on with it.

    Args:
        argv: the arguments of `phalanx prepare`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: a mistake in the flags, the configuration or the data.
        WriteError: the disk is full, or a process was killed.
        Preempted: Ctrl-C or SIGTERM.
    """
    own = data_flags.define()
    new = {'flag_values': own}
    flags.DEFINE_string('format', 'array_record', 'Of the files.', **new)
    flags.DEFINE_integer('shards', None, 'Files of each split.', 1, **new)
    flags.DEFINE_float('shard_mb', None, 'About how large they are.', 1e-3, **new)
    flags.DEFINE_integer('processes', None, 'At the same time.', 1, **new)
    flags.DEFINE_string('on_bad_record', 'stop', 'What is done then.', **new)
    rest = verb_flags.parse(own, 'prepare', rewrite_gin_flags(argv))
    data_flags.check_choice('format', own.format, _FORMATS)
    data_flags.check_choice('on_bad_record', own.on_bad_record, _ON_BAD_RECORD)
    if own.shards and own.shard_mb:
        raise ConfigError('--shards and --shard_mb say the same. Give one of them.')
    if len(rest) != 1 or not own.gin_file:
        raise ConfigError(
            'Where to, and of which data? Write: phalanx prepare DIR --gin_file=FILE, such as '
            '--gin_file=data/digits.gin.'
        )
    script = data_flags.read(own)
    unfinished = Unfinished(rest[0])
    _check_apart(unfinished.out, script)
    options = {'files': own.format, 'shards': own.shards, 'on_bad_record': own.on_bad_record}
    if own.shard_mb:
        options['shard_mb'] = own.shard_mb
    processes = own.processes or len(os.sched_getaffinity(0))
    with interruptible(), unfinished.lock():
        return _write(unfinished, script, options, processes)


def _write(
    unfinished: Unfinished, script: gin_files.Script, options: Mapping[str, Any], processes: int
) -> int:
    plan, written = None, {}
    try:
        with Crew(unfinished.path, script, options) as crew:
            plan = crew.plan()
            unfinished.begin(plan)
            if unfinished.finished:
                print(f'{unfinished.out} is finished already.')
                return _tell(unfinished.out)
            skips = options['on_bad_record'] == 'skip'
            written.update(unfinished.written(plan, incomplete=skips))
            with _Display(plan, written) as display:
                for message in crew.write(plan, written.keys(), processes):
                    if 'shard' in message:
                        unfinished.keep(message['shard'], message['record'])
                        written[message['shard']] = message['record']
                    display.show(message)
        unfinished.commit(plan, written)
        print(f'{unfinished.out} is finished.')
    except KeyboardInterrupt:
        total = sum(len(split['shards']) for split in plan['splits'].values()) if plan else 'no'
        raise Preempted(
            f'Stopped; {len(written)} of {total} shards are finished and kept. The same command '
            'goes on.'
        ) from None
    return _tell(unfinished.out)


def _tell(out: Path) -> int:
    """Prints what is in a finished directory."""
    for name, split in dataset.read(str(out))['splits'].items():
        size = sum(shard['bytes'] for shard in split['shards'])
        left_out = (
            f'; {len(split["left_out"]):,} damaged ones left out' if split['left_out'] else ''
        )
        print(
            f'{name}: {split["records"]:,} records in {len(split["shards"])} shard(s), '
            f'{size / 10**6:,.1f} MB{left_out}'
        )
    return 0


def _check_apart(out: Path, script: gin_files.Script) -> None:
    """Raises if the data set would be written into a directory that the configuration reads."""
    for binding in script.bindings:
        if not isinstance(binding.value, str) or binding.name == 'MODEL_DIR' or not binding.value:
            continue
        # A pattern with ** reads all that is below its beginning.
        name = binding.value.partition('**')[0]
        read = Path(os.path.abspath(os.path.expanduser(name)))
        if read.is_dir() and (out == read or read in out.parents):
            raise ConfigError(
                f'{out} lies in {read}, which {binding.name} names and which is read. Name a '
                'directory elsewhere.'
            )


class _Display:
    """How far it is: a bar for each split in a terminal, else a line for each shard."""

    def __init__(self, plan: Mapping[str, Any], written: Mapping[str, Any]):
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        if written:
            self._console.print(f'{len(written)} shard(s) are there already')
        self._tasks = {}
        for name, split in plan['splits'].items():
            done = sum(s['end'] - s['first'] for s in split['shards'] if s['file'] in written)
            total = split['source']['records']
            self._tasks[name] = self._progress.add_task(name, total=total, completed=done)

    def __enter__(self) -> '_Display':
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, message: Mapping[str, Any]) -> None:
        if 'read' in message:
            self._progress.advance(self._tasks[message['split']], message['read'])
        elif not self._console.is_terminal:
            record = message['record']
            self._console.print(
                f'{message["shard"]}: {record["records"]:,} records, {record["bytes"]:,} bytes',
                soft_wrap=True,
            )
