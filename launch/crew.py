"""The processes of `phalanx prepare`: they are given shards to write, and say what they do."""

import collections
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import child
from trainer import gin_files
from trainer.errors import ConfigError, WriteError

_MODULE = 'trainer.prepare_worker'
# Of what a process has printed before it failed.
_TAIL_CHARACTERS = 2000


class Crew:
    """Processes that write shards into a directory; all are ended when the block is left.

    Args:
        directory: where to.
        script: the configuration of the data.
        options: the fields of `trainer.prepare.Options` that have been chosen.
    """

    def __init__(self, directory: Path, script: gin_files.Script, options: Mapping[str, Any]):
        self._directory, self._script, self._options = directory, script, options
        self._members: list[_Member] = []
        self._said: queue.Queue = queue.Queue()

    def __enter__(self) -> 'Crew':
        self._aside = tempfile.TemporaryDirectory(prefix='phalanx-')
        self._script.save(Path(self._aside.name) / 'script.json')
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:
            member.end()
        self._aside.cleanup()

    def plan(self) -> dict[str, Any]:
        """Returns what is to be written; one process looks at the data for that.

        Raises:
            ConfigError: a mistake in the configuration or in the data.
        """
        self._start(1)
        _, message = self._next()
        return message['plan']

    def write(
        self, plan: Mapping[str, Any], without: Collection[str], processes: int
    ) -> Iterator[dict[str, Any]]:
        """Has shards written.

        Args:
            plan: from `plan`.
            without: the names of shards that are there already.
            processes: how many may be written at a time.

        Yields:
            {'read': so many records, 'split': of it}, and, once a shard is there, {'shard': its
            name, 'record': what is known of it}.

        Raises:
            ConfigError: the data is damaged, or has changed.
            WriteError: it cannot be written, or a process was killed.
        """
        waiting = collections.deque(
            {'split': name, **shard}
            for name, split in plan['splits'].items()
            for shard in split['shards']
            if shard['file'] not in without
        )
        left = len(waiting)
        self._start(min(processes, left))
        if waiting:
            self._members[0].give(waiting.popleft())
        while left:
            member, message = self._next()
            if message.get('plan', plan) != plan:
                raise ConfigError(
                    'The data has changed while it was looked at. Run the same command again.'
                )
            if 'read' in message:
                yield {**message, 'split': member.shard['split']}
                continue
            if 'shard' in message:
                left -= 1
                yield message
            if waiting:
                member.give(waiting.popleft())

    def _start(self, count: int) -> None:
        while len(self._members) < count:
            arguments = [self._directory, Path(self._aside.name) / 'script.json']
            command = child.command(_MODULE, *map(str, arguments), json.dumps(self._options))
            self._members.append(_Member(command, self._said))

    def _next(self) -> tuple['_Member', dict[str, Any]]:
        member, message = self._said.get()
        if message is None:
            raise WriteError(member.verdict())
        if 'error' in message:
            kind = ConfigError if message['code'] == ConfigError.exit_code else WriteError
            raise kind(message['error'])
        return member, message


class _Member:
    """One process.

    Attributes:
        shard: what it was given last.
    """

    def __init__(self, command: list[str], said: queue.Queue):
        self.shard: Mapping[str, Any] = {}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed by `end`
        environment = {name: value for name, value in os.environ.items() if name != 'TF_CONFIG'}
        # Decoding is the CPU's; a GPU may be at work for another job.
        environment['CUDA_VISIBLE_DEVICES'] = '-1'
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding='utf-8',
            errors='replace',
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, args=[said], daemon=True)
        self._reader.start()

    def give(self, shard: Mapping[str, Any]) -> None:
        self.shard = shard
        try:
            self._process.stdin.write(json.dumps(shard) + '\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended; the reader finds out.

    def verdict(self) -> str:
        """What became of it, after its end."""
        code = self._process.wait()
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors='replace')
        # What libraries say while they are loaded comes before.
        tail = text[max(0, text.find('Traceback (most recent call last)')) :]
        tail = tail[-_TAIL_CHARACTERS:].strip()
        cause = f'was killed by signal {-code}' if code < 0 else f'ended with code {code}'
        mend = ' Out of memory? Use fewer --processes.' if code == -9 else ''
        doing = f' while it wrote {self.shard["file"]}' if self.shard else ''
        return f'A process {cause}{doing}.{mend} The same command goes on with what is left.' + (
            f' Its last words:\n{tail}' if tail else ''
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()

    def _read(self, said: queue.Queue) -> None:
        try:
            for line in self._process.stdout:
                if (message := _message(line)) is not None:
                    said.put((self, message))
        finally:
            said.put((self, None))


def _message(line: str) -> dict[str, Any] | None:
    """Returns what a process says; None for what anything printed while Python started."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
