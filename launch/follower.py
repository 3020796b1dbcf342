"""One attempt at a job, from the first word of its workers to the decision how it ends."""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import stacks
from launch.causes import likely_cause
from launch.data_workers import DataWorkers, Lost
from launch.display import Display
from launch.gang import GangWorkers
from launch.ledger import Ledger
from launch.local import Workers
from launch.watch import Stuck, Watch
from trainer.errors import ConfigError, Preempted

POLL_SECONDS = 0.1
PREEMPTED, MISTAKE = Preempted.exit_code, ConfigError.exit_code
# Workers that fail for the same reason end at nearly the same time.
_PEER_SECONDS = 0.3
_MISTAKE_SECONDS = 5.0
# How a worker ends that was asked to: after saving, or with nothing to save yet.
STOPPED = (PREEMPTED, -signal.SIGTERM, -signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended: 'finished', 'stopped', 'left', 'mistake' or 'failed'.

    'left' is 'stopped' for the sake of one host, which goes: the job goes on without a pause.
    """

    kind: str
    worker: int | None = None
    reason: str = ''
    log: Path | None = None
    cause: str = ''
    at: float = dataclasses.field(default_factory=time.time)


class Follower:
    """Follows the workers of an attempt; what happens to them goes into ledger and display.

    Args:
        workers: those of the attempt.
        data_workers: those that make batches for them.
        watch: what they say.
        signals: that have come to the launcher; more may be added at any time.
        grace_seconds: how long workers have to save after the first.
        newest_step: returns the step of the newest checkpoint.
        ledger, display: where to.
    """

    def __init__(
        self,
        workers: Workers | GangWorkers,
        watch: Watch,
        *,
        data_workers: DataWorkers,
        signals: Sequence[int],
        grace_seconds: float,
        newest_step: Callable[[], int],
        ledger: Ledger,
        display: Display,
    ):
        self._workers, self._watch, self._signals = workers, watch, signals
        self._data_workers = data_workers
        self._grace_seconds, self._newest_step = grace_seconds, newest_step
        self._ledger, self._display = ledger, display

    def follow(self) -> Outcome:
        """Returns how the attempt ends, as soon as that is decided; workers may still run."""
        workers, watch = self._workers, self._watch
        handed_on, asked_at, for_host = 0, 0.0, False
        while True:
            self.look()
            codes = workers.codes()
            if all(code == 0 for code in codes):
                return Outcome('finished')
            if len(self._signals) > handed_on:
                handed_on, asked_at = len(self._signals), asked_at or time.monotonic()
                if handed_on > 1:
                    return Outcome('stopped', reason='a second signal')
                self._ledger.write('signal', signal=self._signals[0])
                self._display.tell(
                    f'{signal.Signals(self._signals[0]).name}: the workers save and end; a second '
                    'signal ends them at once'
                )
                workers.signal(signal.SIGTERM)
            if not asked_at and workers.leaving():
                asked_at, for_host = time.monotonic(), True
                self._display.tell('a host is about to go: the workers save, and go on elsewhere')
                workers.signal(signal.SIGTERM)
            bad = [(index, code) for index, code in enumerate(codes) if code]
            if not asked_at and any(code in STOPPED for _, code in bad):
                # Someone stops the job by way of one of its workers.
                asked_at = time.monotonic()
                if all(code != PREEMPTED for _, code in bad):
                    workers.signal(signal.SIGTERM)
            if asked_at:
                if None not in codes:
                    outcome = self._stopped(codes)
                    leaves = for_host and handed_on == 0 and outcome.kind == 'stopped'
                    return dataclasses.replace(outcome, kind='left') if leaves else outcome
                if time.monotonic() - asked_at > self._grace_seconds:
                    self._display.tell(
                        f'not all workers have saved within {self._grace_seconds:g} s; '
                        f'ending them. The newest checkpoint is of step {self._newest_step()}.'
                    )
                    return Outcome('stopped', reason='the grace time is over')
            elif (lost := workers.lost()) is not None:
                return self._without_host(*lost)
            elif bad:
                # TensorFlow's heartbeat may give up on a stopped peer before this watch does.
                if (stuck := watch.stopped(workers.states())) is not None:
                    return self._stuck(stuck)
                # Who was killed comes before those that have noticed it.
                return self._judge(*min(bad, key=lambda each: each[1]))
            elif (lost := self._data_workers.lost()) is not None:
                return self._without_data(lost)
            elif (stuck := watch.stuck(workers.states())) is not None:
                return self._stuck(stuck)
            time.sleep(POLL_SECONDS)

    def look(self) -> None:
        """Takes in what the workers have said, and shows it."""
        for index, code in enumerate(self._workers.codes()):
            if code is not None and code < 0 and code not in STOPPED:
                self._display.only(index)
        self._watch.read()
        for told in self._watch.rollbacks:
            figures = {name: told[name] for name in ('rolled_back', 'to', 'windows')}
            self._ledger.write('rollback', **figures)
            self._display.tell(f'went back from step {told["rolled_back"]} to step {told["to"]}')
        self._watch.rollbacks.clear()
        self._data_workers.look()
        self._display.show()

    def _stopped(self, codes: Sequence[int]) -> Outcome:
        """Decides what an attempt that was asked to stop comes to when all have ended."""
        failed = [index for index, code in enumerate(codes) if code not in (0, *STOPPED)]
        if not failed:
            return Outcome('stopped')
        return self._failed(failed[0], codes[failed[0]])

    def _without_host(self, worker: int, reason: str) -> Outcome:
        self._display.tell(reason)
        self._ledger.write('lost', worker=worker, reason=reason)
        return Outcome('failed', worker, reason, self._workers.logs[worker])

    def _without_data(self, lost: Lost) -> Outcome:
        """Decides what an attempt comes to that has no data workers any more."""
        if lost.mistake:
            # Most mistakes are the workers' too, and better told by them.
            end = time.monotonic() + _MISTAKE_SECONDS
            while time.monotonic() < end and not any(self._workers.codes()):
                self._display.show()
                time.sleep(POLL_SECONDS)
            if bad := [(i, code) for i, code in enumerate(self._workers.codes()) if code]:
                return self._judge(*bad[0])
        self._display.tell(lost.reason)
        self._display.quote(f'data worker {lost.worker}', lost.log)
        kind = 'mistake' if lost.mistake else 'failed'
        return Outcome(kind, reason=lost.reason, log=lost.log)

    def _judge(self, index: int, code: int) -> Outcome:
        """Decides what an attempt comes to after a worker has ended badly."""
        end = time.monotonic() + (_MISTAKE_SECONDS if code == MISTAKE else _PEER_SECONDS)
        while time.monotonic() < end and None in self._workers.codes():
            self._display.show()
            time.sleep(POLL_SECONDS)
        codes = self._workers.codes()
        if MISTAKE not in codes:
            return self._failed(index, code)
        if (stuck := self._watch.silent(self._workers.states())) is not None:
            # The others have given up waiting for it; to them that is a mistake.
            return self._stuck(stuck)
        index = codes.index(MISTAKE)
        if not self._display.shows(index):
            self._display.quote(f'worker {index}', self._workers.logs[index])
        reason = f'worker {index} ended with exit code {MISTAKE}'
        return Outcome('mistake', index, reason, self._workers.logs[index])

    def _failed(self, index: int, code: int) -> Outcome:
        how = f'was ended by signal {-code}' if code < 0 else f'ended with exit code {code}'
        reason = f'worker {index} {how}'
        self._display.tell(reason)
        self._ledger.write('exit', worker=index, code=code)
        if code > 0 and not self._display.shows(index):
            self._display.quote(f'worker {index}', self._workers.logs[index])
        logs = self._workers.logs
        return Outcome('failed', index, reason, logs[index], likely_cause(index, code, logs))

    def _stuck(self, stuck: Stuck) -> Outcome:
        self._workers.dump_stacks()
        self._data_workers.doubt()
        place = stacks.blame(self._workers.logs)
        if place and not stuck.stopped and (stuck.phase == 'stepping' or place.reads_data):
            # All that wait in a step fell silent together; only their stacks tell for whom.
            phase = 'waiting for data' if place.reads_data else stuck.phase
            stuck = dataclasses.replace(stuck, worker=place.worker, phase=phase, where=place.where)
        elif place and stuck.phase == 'starting' and place.worker == stuck.worker:
            stuck = dataclasses.replace(stuck, where=place.where)
        self._display.tell(f'{stuck}; the stacks of all workers are in their logs')
        self._ledger.write('stuck', **dataclasses.asdict(stuck))
        return Outcome('failed', stuck.worker, str(stuck), self._workers.logs[stuck.worker])
