"""Brings one job on this host to its end: attempt after attempt, each from the newest checkpoint.

TensorFlow cannot mend a job that has lost a worker ("Restart your program to reset"), so an
attempt whose worker died or is stuck is ended as a whole, and the next one has new processes.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import stacks
from launch.display import Attempt, Display
from launch.ledger import Ledger
from launch.local import Workers, check_gpus
from launch.record import Record
from launch.watch import Stuck, Watch
from trainer.errors import ConfigError, Preempted
from trainer.model_dir import ModelDir

_POLL_SECONDS = 0.1
# Workers that fail for the same reason end at nearly the same time.
_PEER_SECONDS = 0.3
_MISTAKE_SECONDS = 5.0
_TAIL_LINES = 20
_LONGEST_WAIT_SECONDS = 60.0
_PREEMPTED, _MISTAKE = Preempted.exit_code, ConfigError.exit_code
# How a worker ends that was asked to: after saving, or with nothing to save yet.
_STOPPED = (_PREEMPTED, -signal.SIGTERM, -signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the supervisor may do.

    Attributes:
        max_restarts: restarts in a row without a new checkpoint.
        grace_seconds: how long workers have to save after a signal.
        patience_seconds: the measure of how long a worker may be silent, see `launch.watch`.
        elastic: go on with fewer workers where all cannot be brought back.
    """

    max_restarts: int = 3
    grace_seconds: float = 60.0
    patience_seconds: float = 60.0
    elastic: bool = False


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """How an attempt ended: 'finished', 'stopped', 'mistake' or 'failed'."""

    kind: str
    worker: int | None = None
    reason: str = ''
    log: Path | None = None


class Supervisor:
    """Runs the attempts of one job."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        workers: int,
        dirs: ModelDir,
        policy: Policy | None = None,
        display: Display | None = None,
        record: Record | None = None,
    ):
        """Prepares a job; nothing is written yet.

        Args:
            flags: of `python -m trainer`.
            workers: how many train together.
            dirs: where the flags lead the run to.
            policy: what may be done; the default is `Policy()`.
            display: what is shown of it; the default is `Display()`.
            record: where it is written down, if it is.
        """
        self._flags, self._count, self._dirs = list(flags), workers, dirs
        self._wanted = workers
        self._policy = policy or Policy()
        self._display = display or Display()
        self._restarts = 0
        self._record = record
        self._ledger = Ledger(dirs.path / 'ledger.jsonl')
        self._signals: list[int] = []  # that have come

    def run(self) -> int:
        """Returns the exit code: 0 finished, 2 a mistake, 75 stopped after saving, 1 failed.

        Raises:
            ConfigError: the directory cannot be written, another launcher holds it, or this host
                has too few GPUs.
            WriteError: the disk is full.
        """
        check_gpus(self._count)
        was_there = self._dirs.path.exists()
        self._dirs.create()
        locked = self._dirs.lock('logs/lock')
        with locked, self._dirs.full_disk_is_told(), self._catching_signals(), self._display:
            self._ledger.write(
                'job',
                workers=self._count,
                flags=self._flags,
                pid=os.getpid(),
                host=socket.gethostname(),
            )
            if self._record:
                self._record.begin()
            code = self._attempts()
            self._ledger.write('end', code=code)
            if self._record:
                self._record.end()
        if code == _MISTAKE and not was_there and not self._newest_step():
            # What was told before anything began leaves nothing behind.
            shutil.rmtree(self._dirs.path, ignore_errors=True)
        return code

    def _attempts(self) -> int:
        failures: list[_Outcome] = []  # since the last new checkpoint
        first = True
        while True:
            before = self._newest_step()
            outcome = self._attempt(first)
            newest, first = self._newest_step(), False
            if outcome.kind != 'failed':
                return {'finished': 0, 'stopped': _PREEMPTED, 'mistake': _MISTAKE}[outcome.kind]
            if self._signals:
                return 1  # Stopped, but not all have saved.
            if newest > before:
                failures.clear()
                self._count = self._wanted  # They may be there again.
            failures.append(outcome)
            if self._policy.elastic and len(failures) > 1 and (fewer := self._fewer()):
                self._say(f'going on with {fewer} workers instead of {self._count}')
                self._count = fewer
            if len(failures) > self._policy.max_restarts:
                self._give_up(failures)
                return 1
            wait = 0.0
            if len(failures) > 1:
                wait = min(_LONGEST_WAIT_SECONDS, 2.0 ** (len(failures) - 2))
                wait *= random.uniform(0.5, 1.5)
            self._say(
                f'starting again from step {newest}'
                f'{f" in {wait:.0f} s" if wait else ""} '
                f'(restart {len(failures)} of {self._policy.max_restarts} without a new checkpoint)'
            )
            self._ledger.write('wait', seconds=round(wait, 3), failures=len(failures))
            self._restarts += 1
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self._signals:
                    return _PREEMPTED
                self._display.show()
                time.sleep(_POLL_SECONDS)

    def _attempt(self, first: bool) -> _Outcome:
        number = self._next_number()
        directory = self._dirs.logs / f'attempt-{number}'
        directory.mkdir()
        longest = self._read_longest()
        self._ledger.write('attempt', number=number, workers=self._count, step=self._newest_step())
        workers = Workers(self._flags, self._count, directory, wanted=self._wanted)
        watch = Watch(workers.phases, longest, self._policy.patience_seconds)
        attempt = Attempt(
            number, self._restarts, workers.logs, watch, workers.codes, self._newest_step
        )
        try:
            self._display.begin(attempt)
            outcome = self._follow(workers, watch)
        finally:
            watch.read()
            self._note_rollbacks(watch)
            self._display.show()
            workers.kill()
            self._display.end()
        if outcome.kind == 'mistake' and (taken := workers.taken_port()):
            # Between choosing it and the worker's start. The next attempt chooses others.
            reason = f'port {taken[1]} of worker {taken[0]} was taken by another process'
            self._say(reason)
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

    def _follow(self, workers: Workers, watch: Watch) -> _Outcome:
        """Watches an attempt until it is decided how it ends."""
        handed_on, asked_at = 0, 0.0
        while True:
            watch.read()
            self._note_rollbacks(watch)
            self._display.show()
            codes = workers.codes()
            if all(code == 0 for code in codes):
                return _Outcome('finished')
            if len(self._signals) > handed_on:
                handed_on, asked_at = len(self._signals), asked_at or time.monotonic()
                if handed_on > 1:
                    return _Outcome('stopped', reason='a second signal')
                self._ledger.write('signal', signal=self._signals[0])
                self._say(
                    f'{signal.Signals(self._signals[0]).name}: the workers save and end; a second '
                    'signal ends them at once'
                )
                workers.signal(signal.SIGTERM)
            bad = [(index, code) for index, code in enumerate(codes) if code]
            if not asked_at and any(code in _STOPPED for _, code in bad):
                # Someone stops the job by way of one of its workers.
                asked_at = time.monotonic()
                if all(code != _PREEMPTED for _, code in bad):
                    workers.signal(signal.SIGTERM)
            if asked_at:
                if None not in codes:
                    return self._stopped(workers, codes)
                if time.monotonic() - asked_at > self._policy.grace_seconds:
                    self._say(
                        f'not all workers have saved within {self._policy.grace_seconds:g} s; '
                        f'ending them. The newest checkpoint is of step {self._newest_step()}.'
                    )
                    return _Outcome('stopped', reason='the grace time is over')
            elif bad:
                # TensorFlow's heartbeat may give up on a stopped peer before this watch does.
                if (stuck := watch.stopped(workers.pids())) is not None:
                    return self._stuck(workers, stuck)
                return self._judge(workers, watch, *bad[0])
            elif (stuck := watch.stuck(workers.pids())) is not None:
                return self._stuck(workers, stuck)
            time.sleep(_POLL_SECONDS)

    def _note_rollbacks(self, watch: Watch) -> None:
        for told in watch.rollbacks:
            figures = {name: told[name] for name in ('rolled_back', 'to', 'windows')}
            self._ledger.write('rollback', **figures)
            self._say(f'went back from step {told["rolled_back"]} to step {told["to"]}')
        watch.rollbacks.clear()

    def _stopped(self, workers: Workers, codes: Sequence[int]) -> _Outcome:
        """Decides what an attempt that was asked to stop comes to when all have ended."""
        failed = [index for index, code in enumerate(codes) if code not in (0, *_STOPPED)]
        if not failed:
            return _Outcome('stopped')
        return self._failed(workers, failed[0], codes[failed[0]])

    def _judge(self, workers: Workers, watch: Watch, index: int, code: int) -> _Outcome:
        """Decides what an attempt comes to after a worker has ended badly."""
        end = time.monotonic() + (_MISTAKE_SECONDS if code == _MISTAKE else _PEER_SECONDS)
        while time.monotonic() < end and None in workers.codes():
            self._display.show()
            time.sleep(_POLL_SECONDS)
        codes = workers.codes()
        if _MISTAKE not in codes:
            return self._failed(workers, index, code)
        if (stuck := watch.silent(workers.pids())) is not None:
            # The others have given up waiting for it; to them that is a mistake.
            return self._stuck(workers, stuck)
        index = codes.index(_MISTAKE)
        if not self._display.shows(index):
            self._tail(index, workers.logs[index])
        reason = f'worker {index} ended with exit code {_MISTAKE}'
        return _Outcome('mistake', index, reason, workers.logs[index])

    def _failed(self, workers: Workers, index: int, code: int) -> _Outcome:
        how = f'was ended by signal {-code}' if code < 0 else f'ended with exit code {code}'
        reason = f'worker {index} {how}'
        self._say(reason)
        self._ledger.write('exit', worker=index, code=code)
        if code > 0 and not self._display.shows(index):
            self._tail(index, workers.logs[index])
        return _Outcome('failed', index, reason, workers.logs[index])

    def _stuck(self, workers: Workers, stuck: Stuck) -> _Outcome:
        workers.dump_stacks()
        place = stacks.blame(workers.logs)
        if place and not stuck.stopped and (stuck.phase == 'stepping' or place.reads_data):
            # All that wait in a step fell silent together; only their stacks tell for whom.
            phase = 'waiting for data' if place.reads_data else stuck.phase
            stuck = dataclasses.replace(stuck, worker=place.worker, phase=phase, where=place.where)
        elif place and stuck.phase == 'starting' and place.worker == stuck.worker:
            stuck = dataclasses.replace(stuck, where=place.where)
        self._say(f'{stuck}; the stacks of all workers are in their logs')
        self._ledger.write('stuck', **dataclasses.asdict(stuck))
        return _Outcome('failed', stuck.worker, str(stuck), workers.logs[stuck.worker])

    def _give_up(self, failures: Sequence[_Outcome]) -> None:
        first = failures[0]
        self._say(
            f'giving up: {len(failures)} attempts in a row ended without a new checkpoint. The '
            f'first of them: {first.reason}. Its log is {first.log}'
        )
        self._tail(first.worker or 0, first.log)

    def _fewer(self) -> int:
        """The next smaller number of workers that can share the global batch equally, or 0."""
        path = self._dirs.checkpoints / f'step-{self._newest_step():08d}' / 'manifest.json'
        try:
            manifest = json.loads(path.read_text())
            each = manifest['topology']['replicas_per_worker']
            batch = manifest['global_batch_size']
        except (OSError, ValueError, KeyError):
            return 0  # Before the first checkpoint nothing is known of the run.
        fitting = [count for count in range(1, self._count) if batch % (count * each) == 0]
        return max(fitting, default=0)

    def _next_number(self) -> int:
        """The number of the next attempt; one that left no directory keeps its number too."""
        numbers = [int(path.name.partition('-')[2]) for path in self._dirs.logs.glob('attempt-*')]
        numbers += [each['number'] for each in self._ledger.read() if each['event'] == 'attempt']
        return 1 + max(numbers, default=0)

    def _newest_step(self) -> int:
        """The step of the newest committed checkpoint, 0 if there is none."""
        steps = self._dirs.checkpoints.glob('step-*/manifest.json')
        return max((int(path.parent.name[5:]) for path in steps), default=0)

    def _read_longest(self) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self._dirs.logs / 'longest_phases.json').read_text()))
        return {}

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            del frame
            self._signals.append(number)

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        self._display.say(f'phalanx: {text}')

    def _tail(self, index: int, log: Path | None) -> None:
        lines = log.read_text(errors='replace').splitlines()[-_TAIL_LINES:] if log else []
        if lines:
            self._display.say('\n'.join(f'  worker {index}: {line}' for line in lines))
