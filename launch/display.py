"""What a job shows while it runs: what its workers print, and how far it is, in plain lines.

A terminal gets the live display of `launch.live` instead, on the same grounds.
"""

import codecs
import contextlib
import dataclasses
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from launch.standing import Standing
from launch.watch import Watch

# Whose output is shown.
LOGS = ('chief', 'all', 'none')
_EVERY_SECONDS = 60.0
_TAIL_LINES = 20
# The first steps pay for compiling: their pace is not the job's.
_FIRST_SECONDS = 10.0
# What `trainer.observe.report` logs every `train.log_every`.
_PROGRESS = re.compile(r'\d\d:\d\d:\d\d I step [\d,]+/[\d,]+ \(\d+ %\)')


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attempt at a job, as far as it is shown.

    Attributes:
        number: over all launchers of the job, from 1.
        restarts: those of this launcher so far.
        logs: of each worker, what it prints.
        watch: what each says of itself.
        codes: returns each worker's exit code, None while it runs.
        checkpoint: returns the step of the newest checkpoint, 0 if there is none.
    """

    number: int
    restarts: int
    logs: Sequence[Path]
    watch: Watch
    codes: Callable[[], Sequence[int | None]]
    checkpoint: Callable[[], int]


class Display:
    """Shows a job in plain lines, for a file, a pipe or a simple terminal.

    Instead of the chief's lines of progress there is one of the whole job, at most every 60 s and
    before what ends an attempt. All else that the chosen workers print passes through.
    """

    def __init__(
        self,
        logs: str = 'chief',
        *,
        progress: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares a display; nothing is shown yet.

        Args:
            logs: whose output is shown, one of `LOGS`.
            progress: whether the job says how far it is; if not, all output passes through.
            clock: seconds, never going back.
        """
        self._logs, self._tells_progress, self._clock = logs, progress, clock
        self._standing = Standing(clock)
        self._attempt: Attempt | None = None
        self._codes: Sequence[int | None] = ()
        self._only: int | None = None
        self._ended = False
        self._tails: dict[int, _Tail] = {}
        self._told_at, self._told_step = -_EVERY_SECONDS, None
        self._due = float('inf')

    def __enter__(self) -> 'Display':
        return self

    def __exit__(self, *exc: object) -> None:
        """Leaves the last state behind."""

    def shows(self, worker: int) -> bool:
        """Whether a worker's output is shown."""
        return self._logs == 'all' or (self._logs == 'chief' and worker == 0)

    def begin(self, attempt: Attempt) -> None:
        """Shows an attempt from now on."""
        self._attempt, self._due = attempt, float('inf')
        self._codes, self._ended = attempt.codes(), False
        self._standing.begin()
        self._only = None
        self._tails = {
            index: _Tail(log) for index, log in enumerate(attempt.logs) if self.shows(index)
        }
        if self._tells_progress:
            self.tell(
                f'attempt {attempt.number}: {count(len(attempt.logs), "worker")}; '
                f'logs in {attempt.logs[0].parent}'
            )

    def show(self) -> None:
        """Shows what is new. Call it often, after `Watch.read`, and before workers are killed."""
        if not self._ended:  # Else they are those that the launcher has brought about.
            self._codes = self._attempt.codes()
        self._standing.take(self._attempt.watch.newest[0])
        if self._tells_progress:
            self._tell_when_due()
        self._print(self._new_lines())

    def end(self) -> None:
        """Shows the last of an attempt whose workers have ended or have been killed."""
        self._ended = True
        self._tell()
        self._print(self._new_lines(end=True))

    def only(self, worker: int) -> None:
        """Shows of this attempt no more than what one worker says, if that is shown at all.

        What the others say when they have lost it is long, and in their logs.
        """
        self._only = worker

    def say(self, text: str) -> None:
        """Shows a message of the launcher, after the progress that it was made at."""
        self._tell()
        write(f'{text}\n', sys.stderr)

    def tell(self, text: str) -> None:
        """Shows a message of the launcher as that."""
        self.say(f'phalanx: {text}')

    def quote(self, who: str, log: Path | None) -> None:
        """Shows the end of somebody's log, if there is one."""
        lines: list[str] = []
        with contextlib.suppress(OSError):  # Somebody may have deleted it.
            lines = log.read_text(errors='replace').splitlines()[-_TAIL_LINES:] if log else []
        if lines:
            self.say('\n'.join(f'  {who}: {line}' for line in lines))

    def _new_lines(self, end: bool = False) -> list[str]:
        return [
            f'worker {index}: {text}' if self._logs == 'all' else text
            for index, tail in self._tails.items()
            for text in tail.read(end)
            if self._only in (None, index)
            if not (self._tells_progress and _PROGRESS.match(text))
        ]

    def _print(self, lines: Sequence[str]) -> None:
        if lines:
            write(''.join(f'{text}\n' for text in lines), sys.stdout)

    def _tell_when_due(self) -> None:
        standing, now = self._standing, self._clock()
        if standing.stepping and self._due == float('inf'):
            self._due = max(self._told_at + _EVERY_SECONDS, now + _FIRST_SECONDS)
        if now >= self._due or (standing.stepping and standing.step >= standing.last_step):
            self._tell()

    def _tell(self) -> None:
        """Writes a line of progress, if there is any since the last one."""
        standing, attempt = self._standing, self._attempt
        if not (self._tells_progress and standing.stepping and standing.step != self._told_step):
            return
        text = f'{time.strftime("%H:%M:%S")} I {standing.line()}'
        text += f'  {count(len(attempt.logs), "worker")}'
        if attempt.restarts:
            text += f'  {count(attempt.restarts, "restart")}'
        self._told_at, self._told_step = self._clock(), standing.step
        self._due = self._told_at + _EVERY_SECONDS
        write(f'{text}\n', sys.stdout)


def for_stdout(logs: str) -> Display:
    """Returns the display of a training job: live in a terminal that can show it, else plain."""
    simple = os.environ.get('TERM', '').lower() in ('dumb', 'unknown')
    if sys.stdout is None or not sys.stdout.isatty() or simple:
        return Display(logs)
    # Rich takes its time to import.
    from launch.live import Live

    return Live(logs)


def count(number: int, what: str) -> str:
    """Returns such as '1 worker' or '2 workers'."""
    return f'{number} {what}{"" if number == 1 else "s"}'


def write(text: str, stream: TextIO | None) -> None:
    """Writes to a stream as well as it takes it."""
    if stream is None:
        return
    # A closed terminal or pipe must not end a job; all of it is in the logs too.
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, 'replace').decode(stream.encoding))
        stream.flush()
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            # Python would try again at the end, and make the exit code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Tail:
    """The lines that are added to a log."""

    def __init__(self, log: Path):
        self._log, self._offset, self._rest = log, 0, ''
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def read(self, end: bool = False) -> list[str]:
        """Returns the new lines, with `end` also one that is not complete."""
        try:
            with open(self._log, 'rb') as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []  # A log may be deleted; the job goes on.
        self._offset += len(text)
        *lines, self._rest = (self._rest + self._decoder.decode(text)).split('\n')
        if end and self._rest:
            lines.append(self._rest)
            self._rest = ''
        return lines
