"""The data workers of a job: started with it, replaced when they die, ended with it."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from launch import child
from launch.display import Display, count
from launch.ledger import Ledger
from launch.local import free_ports, is_taken
from trainer.errors import ConfigError
from trainer.observe import phases

# The environment variable of `trainer.data.workers`, which would load TensorFlow here.
VARIABLE = 'PHALANX_DATA_WORKERS'
# One that ends sooner after its start has ended early. So many times in a row, and it is given up.
_EARLY_SECONDS = 60.0
_EARLY_ENDS = 5


@dataclasses.dataclass(frozen=True)
class Lost:
    """The last of the data workers, when all have been given up.

    Attributes:
        worker: its number.
        reason: why there is no other.
        mistake: whether that is one of flags, configuration or data.
        log: what it has printed.
    """

    worker: int
    reason: str
    mistake: bool
    log: Path


class DataWorkers:
    """Processes that make batches for the workers, over all attempts of a job.

    What they do, they do for any of the workers and keep nothing. So one that has died is started
    again at the same address, and the attempt goes on.
    """

    def __init__(
        self,
        flags: Sequence[str],
        number: int,
        directory: Path,
        *,
        ledger: Ledger,
        display: Display,
    ):
        """Prepares data workers; none is started yet.

        Args:
            flags: of `python -m trainer`, with the configuration; the mode is added.
            number: how many; with 0 nothing happens.
            directory: where their logs go; it exists.
            ledger, display: where it is told what happens to them.
        """
        self._flags = list(flags)
        self._ledger, self._display = ledger, display
        self._doubted = False
        self._processes = [
            _Process(index, directory / f'data-worker-{index}.log') for index in range(number)
        ]

    def __enter__(self) -> 'DataWorkers':
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            process.kill()

    def begin(self) -> dict[str, str]:
        """Has all of them there for an attempt; returns environment variables for its workers."""
        if not self._processes:
            return {}  # There may be some that another program has started.
        if self._doubted:
            self._display.tell('the data workers are replaced too: one of them may hang')
            for process in self._processes:
                process.kill()
        self._doubted = False
        lost = [each for each in self._processes if not each.runs()]
        for process, port in zip(lost, free_ports(len(lost)), strict=True):
            process.begin(port)
            process.start(self._flags)
        return {VARIABLE: ','.join(f'127.0.0.1:{each.port}' for each in self._processes)}

    def doubt(self) -> None:
        """Has others there for the next attempt: one that hangs does not show it."""
        self._doubted = True

    def look(self) -> None:
        """Starts those again that have died, after a while if they do so again and again."""
        for process in self._processes:
            if process.runs() or process.given_up:
                continue
            if process.ended is None:
                code = process.note_end()
                how = f'was ended by signal {-code}' if code < 0 else f'ended with exit code {code}'
                told = f'data worker {process.index} {how}'
                self._ledger.write('data_worker', worker=process.index, code=code)
                self._display.tell(told if process.given_up else f'{told}; starting another')
            elif time.monotonic() >= process.due:
                process.start(self._flags)

    def lost(self) -> 'Lost | None':
        """Returns what became of the last one, if all have been given up.

        One whose port another process has taken is enough: the next attempt, which has only to
        begin, chooses others.
        """
        for each in self._processes:
            if each.has_no_port:
                whose = f'port {each.port} of data worker {each.index}'
                reason = f'{whose} was taken by another process'
                return Lost(each.index, reason, False, each.log)
        if not self._processes or not all(each.given_up for each in self._processes):
            return None
        last = max(self._processes, key=lambda each: each.ended)
        ends = 'a mistake' if last.mistake else f'{count(last.early_ends, "end")} in a row'
        reason = f'data worker {last.index} is given up: {ends}'
        return Lost(last.index, reason, last.mistake, last.log)


class _Process:
    """One data worker, and those that have taken its place."""

    def __init__(self, index: int, log: Path):
        self.index, self.log = index, log
        self._process: subprocess.Popen | None = None

    def begin(self, port: int) -> None:
        """Takes a port, with nothing held against it."""
        self.port, self.early_ends, self.mistake, self.given_up = port, 0, False, False
        self.has_no_port, self._is_first = False, True

    def start(self, flags: Sequence[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ('TF_CONFIG', VARIABLE)}
        environment['CUDA_VISIBLE_DEVICES'] = '-1'  # The GPUs are the workers'.
        environment[phases.VARIABLE] = str(self.log.with_suffix('.phases.jsonl').absolute())
        own = ['--mode=serve_data', f'--listen=127.0.0.1:{self.port}']
        with open(self.log, 'ab') as log:
            self._process = subprocess.Popen(
                child.command('trainer', *flags, *own),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.ended: float | None = None
        self._started = time.monotonic()

    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def note_end(self) -> int:
        """Decides when there is another, after one has ended with the code returned."""
        self.ended, code = time.monotonic(), self._process.returncode
        self.kill()  # What it has started may have outlived it.
        early = self.ended - self._started < _EARLY_SECONDS
        self.early_ends = self.early_ends + 1 if early else 0
        # To a mistake another try makes no difference. A port that was taken between two tries may
        # come back; one that was taken before the first is another's.
        taken = code == ConfigError.exit_code and is_taken(self.port)
        self.has_no_port, self._is_first = taken and self._is_first, False
        self.mistake = code == ConfigError.exit_code and not taken
        self.given_up = self.mistake or self.has_no_port or self.early_ends >= _EARLY_ENDS
        self.due = self.ended + (2.0 ** (self.early_ends - 2) if self.early_ends > 1 else 0.0)
        return code

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
