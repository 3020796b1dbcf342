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
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import stacks
from launch.ledger import Ledger
from launch.local import Workers, check_gpus
from launch.watch import Stuck, Watch
from trainer.model_dir import ModelDir

_POLL_SECONDS = 0.1
# Workers that fail for the same reason end at nearly the same time.
_PEER_SECONDS = 0.3
_MISTAKE_SECONDS = 5.0
_TAIL_LINES = 20
_LONGEST_WAIT_SECONDS = 60.0
_PREEMPTED, _MISTAKE = 75, 2


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the supervisor may do.

    Attributes:
        max_restarts: restarts in a row without a new checkpoint.
        grace_seconds: how long workers have to save after a signal.
        patience_seconds: for how long a worker may be silent in any phase.
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
        self, flags: Sequence[str], *, workers: int, dirs: ModelDir, policy: Policy | None = None
    ):
        """Prepares a job; nothing is written yet.

        Args:
            flags: of `python -m trainer`.
            workers: how many train together.
            dirs: where the flags lead the run to.
            policy: what may be done; the default is `Policy()`.
        """
        self._flags, self._count, self._dirs = list(flags), workers, dirs
        self._wanted = workers
        self._policy = policy or Policy()
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
        with locked, self._dirs.full_disk_is_told(), self._catching_signals():
            self._ledger.write(
                'job',
                workers=self._count,
                flags=self._flags,
                pid=os.getpid(),
                host=socket.gethostname(),
            )
            code = self._attempts()
            self._ledger.write('end', code=code)
        if code == _MISTAKE and not was_there and not self._newest_step():
            # What was told before anything began leaves nothing behind.
            shutil.rmtree(self._dirs.path, ignore_errors=True)
        return code

    def _attempts(self) -> int:
        failures: list[_Outcome] = []  # since the last new checkpoint
        while True:
            before = self._newest_step()
            outcome = self._attempt()
            newest = self._newest_step()
            if outcome.kind != 'failed':
                return {'finished': 0, 'stopped': _PREEMPTED, 'mistake': _MISTAKE}[outcome.kind]
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
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self._signals:
                    return _PREEMPTED
                time.sleep(_POLL_SECONDS)

    def _attempt(self) -> _Outcome:
        attempts = self._dirs.logs.glob('attempt-*')
        number = 1 + max((int(path.name.partition('-')[2]) for path in attempts), default=0)
        directory = self._dirs.logs / f'attempt-{number}'
        directory.mkdir()
        longest = self._read_longest()
        self._ledger.write('attempt', number=number, workers=self._count, step=self._newest_step())
        workers = Workers(self._flags, self._count, directory)
        watch = Watch(workers.phases, longest, self._policy.patience_seconds)
        screen = _Screen(workers.logs[0])
        try:
            outcome = self._follow(workers, watch, screen)
        finally:
            workers.kill()
            screen.show()
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

    def _follow(self, workers: Workers, watch: Watch, screen: '_Screen') -> _Outcome:
        """Watches an attempt until it is decided how it ends."""
        handed_on, asked_at = 0, 0.0
        while True:
            screen.show()
            watch.read()
            codes = workers.codes()
            if all(code == 0 for code in codes):
                return _Outcome('finished')
            if len(self._signals) > handed_on:
                handed_on, asked_at = len(self._signals), asked_at or time.monotonic()
                if handed_on > 1:
                    return _Outcome('stopped', reason='a second signal')
                self._ledger.write('signal', signal=self._signals[0])
                workers.signal(signal.SIGTERM)
            if asked_at and time.monotonic() - asked_at > self._policy.grace_seconds:
                self._say(
                    f'not all workers have saved within {self._policy.grace_seconds:g} s; ending '
                    f'them. The newest checkpoint is of step {self._newest_step()}.'
                )
                return _Outcome('stopped', reason='the grace time is over')
            ended = [(index, code) for index, code in enumerate(codes) if code is not None]
            if ended:
                return self._judge(workers, *self._first_bad(ended), asked=bool(asked_at))
            stuck = watch.stuck(workers.pids())
            if stuck is not None:
                return self._stuck(workers, stuck)
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def _first_bad(ended: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return next(((index, code) for index, code in ended if code), ended[0])

    def _judge(self, workers: Workers, index: int, code: int, *, asked: bool) -> _Outcome:
        """Decides what an attempt comes to after its first worker has ended."""
        saving = asked or code in (_PREEMPTED, -signal.SIGTERM, -signal.SIGINT)
        if saving and not asked and code != _PREEMPTED:
            workers.signal(signal.SIGTERM)  # Someone stops the job, one worker at a time.
        patience = self._policy.grace_seconds if saving or not code else _PEER_SECONDS
        end = time.monotonic() + (_MISTAKE_SECONDS if code == _MISTAKE else patience)
        while time.monotonic() < end and None in workers.codes():
            time.sleep(_POLL_SECONDS)
        codes = workers.codes()
        if all(each == 0 for each in codes):
            return _Outcome('finished')
        if not code:
            index, code = self._first_bad([(i, c) for i, c in enumerate(codes) if c is not None])
        if _MISTAKE in codes:
            index = codes.index(_MISTAKE)
            if index:  # Or the screen has it.
                self._tail(index, workers.logs[index])
            return _Outcome('mistake', index, 'a mistake in flags or configuration')
        if saving:
            return _Outcome('stopped', index)
        how = f'was ended by signal {-code}' if code < 0 else f'ended with exit code {code}'
        reason = f'worker {index} {how}'
        self._say(reason)
        self._ledger.write('exit', worker=index, code=code)
        if index and code > 0:
            self._tail(index, workers.logs[index])
        return _Outcome('failed', index, reason, workers.logs[index])

    def _stuck(self, workers: Workers, stuck: Stuck) -> _Outcome:
        workers.dump_stacks()
        place = stacks.blame(workers.logs)
        if place and not stuck.stopped and (stuck.phase == 'stepping' or place.reads_data):
            # All that wait in a step fell silent together; only their stacks tell for whom.
            phase = 'waiting for data' if place.reads_data else stuck.phase
            stuck = dataclasses.replace(stuck, worker=place.worker, phase=phase, where=place.where)
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

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _say(text: str) -> None:
        print(f'phalanx: {text}', file=sys.stderr, flush=True)

    @staticmethod
    def _tail(index: int, log: Path | None) -> None:
        lines = log.read_text(errors='replace').splitlines()[-_TAIL_LINES:] if log else []
        for line in lines:
            print(f'  worker {index}: {line}', file=sys.stderr, flush=True)


class _Screen:
    """Shows what is added to a log."""

    def __init__(self, log: Path):
        self._log, self._offset = log, 0

    def show(self) -> None:
        with open(self._log, 'rb') as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        sys.stdout.write(text.decode(errors='replace'))
        sys.stdout.flush()
