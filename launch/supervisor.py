"""Brings one job to its end: attempt after attempt, each from the newest checkpoint.

TensorFlow cannot mend a job that has lost a worker ("Restart your program to reset"), so an
attempt whose worker died or is stuck is ended as a whole, and the next one has new processes.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.data_workers import DataWorkers
from launch.display import Attempt, Display
from launch.follower import MISTAKE, POLL_SECONDS, PREEMPTED, Follower, Outcome
from launch.gang import Gang, Missing
from launch.job import Policy
from launch.ledger import Ledger
from launch.local import Host
from launch.record import Record
from launch.watch import Watch
from launch.wire import SAME_SIGNAL_SECONDS
from trainer.errors import Preempted
from trainer.gin_files import Script
from trainer.model_dir import ModelDir

_LONGEST_WAIT_SECONDS = 60.0


class Supervisor:
    """Runs the attempts of one job."""

    def __init__(
        self,
        flags: Sequence[str],
        script: Script,
        *,
        workers: int,
        dirs: ModelDir,
        least: int | None = None,
        hosts: Host | Gang | None = None,
        data_workers: int = 0,
        policy: Policy | None = None,
        display: Display | None = None,
        record: Record | None = None,
    ):
        """Prepares a job; nothing is written yet.

        Args:
            flags: of `python -m trainer`, but for the configuration.
            script: the configuration; it stays the same in all attempts, whatever becomes of files.
            workers: how many train together.
            dirs: where the flags lead the run to.
            least: how few will do where some are missing; the default is `workers`.
            hosts: where they run; the default is this host.
            data_workers: how many others make batches for them.
            policy: what may be done; the default is `Policy()`.
            display: what is shown of it; the default is `Display()`.
            record: where it is written down, if it is.
        """
        self._given, self._script, self._count, self._dirs = list(flags), script, workers, dirs
        self._wanted, self._data_count = workers, data_workers
        self._least, self._hosts = least or workers, hosts or Host()
        self._policy = policy or Policy()
        self._display = display or Display()
        self._restarts = 0
        self._record = record
        self._ledger = Ledger(dirs.path / 'ledger.jsonl')
        self._signals: list[int] = []  # that have come
        self._newest = 0
        self._waits = False

    def run(self) -> int:
        """Returns the exit code: 0 finished, 2 a mistake, 75 stopped after saving, 1 failed.

        Raises:
            ConfigError: the directory cannot be written, another launcher holds it, or this host
                has too few GPUs.
            Preempted: it was asked to stop while another launcher held the directory.
            WriteError: the disk is full.
        """
        self._hosts.check(self._count)
        was_there = self._dirs.path.exists()
        self._dirs.create()
        seconds = self._hosts.lock_seconds
        locked = self._dirs.lock('logs/lock', seconds=seconds, waiting=self._wait_for)
        # Not in model_dir, whose disk may be full, and whose logs may be deleted.
        aside = tempfile.TemporaryDirectory(prefix='phalanx-')
        told = self._dirs.full_disk_is_told()
        with aside as directory, self._catching_signals(), locked, told, self._display:
            config = Path(directory) / 'config.json'
            self._script.save(config)
            self._flags = [*self._given, f'--gin_script={config}']
            self._ledger.write(
                'job',
                workers=self._count,
                flags=self._given,
                pid=os.getpid(),
                host=socket.gethostname(),
            )
            if self._record:
                self._record.begin()
            with DataWorkers(
                self._flags,
                self._data_count,
                self._dirs.logs,
                ledger=self._ledger,
                display=self._display,
            ) as self._data_workers:
                try:
                    code = self._attempts()
                except Missing as error:
                    self._display.tell(f'{error}. To be started again (exit code {PREEMPTED})')
                    code = PREEMPTED
            self._ledger.write('end', code=code)
            self._hosts.end(code)
            if self._record:
                self._record.end(code)
            if code == MISTAKE and not was_there and not self._newest_step():
                # What was told before anything began leaves nothing behind.
                shutil.rmtree(self._dirs.path, ignore_errors=True)
        return code

    def _wait_for(self, holder: str) -> None:
        if self._signals:
            raise Preempted(f'asked to stop while {holder} was still at work there')
        if not self._waits:
            self._waits = True
            self._display.tell(
                f'waiting for {holder} to leave {self._dirs.path}, for '
                f'{self._hosts.lock_seconds:g} s at most'
            )

    def _attempts(self) -> int:
        failures: list[Outcome] = []  # since the last new checkpoint
        first = True
        while True:
            before = self._newest_step()
            room = self._hosts.gather(
                self._count,
                self._least_fitting(),
                stop=lambda: bool(self._signals),
                show=(lambda: None) if first else self._display.show,
            )
            if self._signals:
                return PREEMPTED
            if room < self._count:
                self._count = self._fitting(room) or room
                self._display.tell(f'going on with {self._count} of {self._wanted} workers')
            outcome = self._attempt(first)
            newest, first = self._newest_step(), False
            if outcome.kind == 'left':
                self._count = self._wanted
                continue
            if outcome.kind != 'failed':
                return {'finished': 0, 'stopped': PREEMPTED, 'mistake': MISTAKE}[outcome.kind]
            if self._signals:
                return 1  # Stopped, but not all have saved.
            if newest != before:  # It may have gone back, too.
                failures.clear()
                self._count = self._wanted  # They may be there again.
            failures.append(outcome)
            fewer = self._fewer() if self._policy.elastic and len(failures) > 1 else 0
            if fewer >= self._least:
                self._display.tell(f'going on with {fewer} workers instead of {self._count}')
                self._count = fewer
            if len(failures) > self._policy.max_restarts:
                self._give_up(failures)
                return 1
            wait = 0.0
            if len(failures) > 1:
                wait = min(_LONGEST_WAIT_SECONDS, 2.0 ** (len(failures) - 2))
                wait *= random.uniform(0.5, 1.5)
            self._display.tell(
                f'starting again from step {newest}'
                f'{f" in {wait:.0f} s" if wait else ""} '
                f'(restart {len(failures)} of {self._policy.max_restarts} without a new checkpoint)'
            )
            self._ledger.write('wait', seconds=round(wait, 3), failures=len(failures))
            self._restarts += 1
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self._signals:
                    return PREEMPTED
                self._data_workers.look()
                self._display.show()
                time.sleep(POLL_SECONDS)

    def _attempt(self, first: bool) -> Outcome:
        number = self._next_number()
        directory = self._dirs.attempt(number)
        directory.mkdir(parents=True)
        longest = self._read_longest()
        self._ledger.write('attempt', number=number, workers=self._count, step=self._newest_step())
        variables = self._data_workers.begin()
        workers = self._hosts.start(
            self._flags, self._count, directory, wanted=self._wanted, variables=variables
        )
        watch = Watch(workers.phases, longest, self._policy.patience_seconds)
        attempt = Attempt(
            number, self._restarts, workers.logs, watch, workers.codes, self._newest_step
        )
        follower = Follower(
            workers,
            watch,
            data_workers=self._data_workers,
            signals=self._signals,
            grace_seconds=self._policy.grace_seconds,
            newest_step=self._newest_step,
            ledger=self._ledger,
            display=self._display,
        )
        try:
            self._display.begin(attempt)
            outcome = follower.follow()
        finally:
            try:
                follower.look()
            finally:
                workers.kill()
                self._display.end()
        if outcome.kind == 'mistake' and (taken := workers.taken_port()):
            # Between choosing it and the worker's start. The next attempt chooses others.
            reason = f'port {taken[1]} of worker {taken[0]} was taken by another process'
            self._display.tell(reason)
            outcome = dataclasses.replace(outcome, kind='failed', worker=taken[0], reason=reason)
        if outcome.kind == 'mistake' and (watch.compiling or not first):
            # The flags were good enough once: something else has changed, perhaps for a moment.
            outcome = dataclasses.replace(outcome, kind='failed')
        self._ledger.write(
            'attempt_end',
            number=number,
            outcome=outcome.kind,
            reason=outcome.reason,
            worker=outcome.worker,
            codes=workers.codes(),
            step=self._newest_step(),
        )
        with contextlib.suppress(OSError):
            (self._dirs.logs / 'longest_phases.json').write_text(json.dumps(longest))
        if outcome.kind == 'mistake':
            shutil.rmtree(directory, ignore_errors=True)
        return outcome

    def _give_up(self, failures: Sequence[Outcome]) -> None:
        first = failures[0]
        at = time.strftime('%H:%M:%S', time.localtime(first.at))
        self._display.tell(
            f'giving up: {len(failures)} attempts in a row ended without a new checkpoint. The '
            f'first of them, at {at}: {first.reason}. '
            + (f'The likely cause: {first.cause.rstrip(".")}. ' if first.cause else '')
            + f'Its log is {first.log}'
        )
        who = 'a data worker' if first.worker is None else f'worker {first.worker}'
        self._display.quote(who, first.log)

    def _fewer(self) -> int:
        """The next smaller number of workers that can share the global batch equally, or 0."""
        return self._fitting(self._count - 1)

    def _least_fitting(self) -> int:
        """The smallest number of workers that will do and can share the global batch equally."""
        least = min(self._least, self._count)
        if not self._fitting(self._count):
            return least  # Nothing is known yet.
        counts = range(least, self._count)
        return next((n for n in counts if self._fitting(n) == n), self._count)

    def _fitting(self, most: int) -> int:
        """The largest number of workers that can share the global batch equally, or 0."""
        try:
            manifest = json.loads(self._dirs.manifests()[self._newest_step()].read_text())
            each = manifest['topology']['replicas_per_worker']
            batch = manifest['global_batch_size']
        except (OSError, ValueError, KeyError):
            return 0  # Before the first checkpoint nothing is known of the run.
        fitting = [count for count in range(1, most + 1) if batch % (count * each) == 0]
        return max(fitting, default=0)

    def _next_number(self) -> int:
        """The number of the next attempt; one that left no directory keeps its number too."""
        numbers = self._dirs.attempts()
        numbers += [each['number'] for each in self._ledger.read() if each['event'] == 'attempt']
        return 1 + max(numbers, default=0)

    def _newest_step(self) -> int:
        """The step of the newest checkpoint, as far as the file system tells."""
        with contextlib.suppress(OSError):
            self._newest = self._dirs.newest_step()
        return self._newest

    def _read_longest(self) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self._dirs.logs / 'longest_phases.json').read_text()))
        return {}

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        last, count = -math.inf, 0

        def note(number: int, frame: object) -> None:
            nonlocal last, count
            del frame
            # Who closes a terminal or stops a service may send several at once, and means one.
            if time.monotonic() - last > SAME_SIGNAL_SECONDS:
                last, count = time.monotonic(), count + 1
                if count > len(self._signals):
                    self._signals.append(number)

        def note_elsewhere(number: int, times: int) -> None:
            # A scheduler sends one to every host, and they come here one after the other.
            if times > len(self._signals):
                self._signals.append(number)

        # Schedulers send the last when the time is nearly over.
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        self._hosts.when_asked(note_elsewhere)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
