"""The driver of a Ray job, `python -m launch.backends.ray_driver`: one task on each of its hosts.

The tasks look after their workers, restarts included. What they cannot do is to start a task again
whose host is gone; the driver does.
"""

import json
import os
import signal
import sys
import time
from types import FrameType

import ray
from ray.util.placement_group import PlacementGroup

from launch.backends import ray_host
from launch.backends.ray import JOB
from launch.backends.ray_group import Groups
from launch.backends.ray_notes import Notes
from launch.backends.ray_seat import Seat
from launch.job import Job, Policy, Resources
from trainer.errors import ConfigError, Preempted
from trainer.model_dir import ModelDir

STOPPED = Preempted.exit_code
_MISTAKE = ConfigError.exit_code
_POLL_SECONDS = 0.5
_SOON_SECONDS = 3.0  # In which Ray places what fits.
# For the other tasks to end after the first, and for all to end beyond their time to save.
_AFTERWARDS_SECONDS = 10.0


class Driver:
    """Brings one job to its end."""

    def __init__(self, job: Job, identifier: str):
        """Prepares a job.

        Args:
            job: what was submitted.
            identifier: Ray's submission id.
        """
        self._job, self._dirs, self._notes = job, ModelDir(job.model_dir), Notes(identifier)
        self._groups = Groups(job)
        self._seats: list[Seat] = []
        self._signals: list[int] = []
        self._losses: dict[int, int] = {}  # of each rank since the last new checkpoint
        self._step = self._newest_step()
        self._limit = float('inf')
        self._told = ''
        self._noted: object = None

    def note_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Has all tasks save and end; the second time, ends them at once."""
        del frame
        self._signals.append(number)

    def run(self) -> int:
        """Returns the exit code of the job: that of its leader, the task of rank 0."""
        code = None
        while code is None:
            group = self._wait_for_group()
            code = STOPPED if group is None else self._attempt(group)
        self._groups.remove()
        self._note(code=code)
        if code == _MISTAKE:
            # What was told before anything began leaves nothing behind.
            self._notes.remove(self._dirs)
        return code

    def _wait_for_group(self) -> PlacementGroup | None:
        """Waits until Ray has a place for all tasks; None if the job is to stop before that."""
        begun = time.monotonic()
        while (group := self._groups.whole(time.monotonic() - begun)) is None:
            if self._is_to_stop():
                return None
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - begun < _SOON_SECONDS:
                continue
            wants, never = self._groups.wants()
            self._note(waits_for=wants, never=never)
            if wants != self._told:
                tell(wants)
                self._told = wants
        self._note(waits_for='', never=False)
        if self._job.time_limit_seconds and self._limit == float('inf'):
            self._limit = time.monotonic() + self._job.time_limit_seconds
        return group

    def _attempt(self, group: PlacementGroup) -> int | None:
        """Runs all tasks; returns the exit code of the job, or None to start all of them again."""
        ranks = range(group.bundle_count)
        self._seats = [Seat(rank, group, self._job) for rank in ranks]
        try:
            code = self._follow(group)
            if self._seats[0].code in (0, 1, _MISTAKE, STOPPED):
                self._let_others_end()
        finally:
            for seat in self._seats:
                seat.kill()
        if code is not None:
            return code
        leader = self._seats[0]
        if leader.code in (0, 1, _MISTAKE):
            return leader.code
        if self._is_to_stop():
            return STOPPED if leader.code == STOPPED else 1
        if not self._can_replace(leader):
            return 1
        tell(f'starting all tasks again from step {self._newest_step()}')
        return None

    def _follow(self, group: PlacementGroup) -> int | None:
        """Until the leader has ended; returns an exit code if the job is over for other reasons."""
        deadline = float('inf')
        while not (leader := self._seats[0]).ended:
            if deadline == float('inf') and self._is_to_stop():
                if not any(seat.started for seat in self._seats):
                    return STOPPED
                why = '' if self._signals else ' at the time limit'
                tell(f'stopping{why}: all workers save')
                leader.signal(signal.SIGTERM)  # Which tells the others, once.
                deadline = time.monotonic() + self._job.policy.grace_seconds + _AFTERWARDS_SECONDS
            if len(self._signals) > 1 or time.monotonic() > deadline:
                return 1
            if leader.place and not self._is_to_stop():
                for seat in self._seats:
                    seat.start(leader.place, len(self._seats))
            self._look()
            for seat in self._seats[1:]:
                if not seat.ended or self._is_to_stop():
                    continue
                # Where the leader is about to end too, nothing is lost.
                wait = _AFTERWARDS_SECONDS / 2 if seat.code in (0, 1, _MISTAKE, STOPPED) else 0
                if seat.silent_seconds() < wait:
                    continue
                if seat.code in (1, _MISTAKE):
                    return seat.code
                if seat.code == 0:
                    continue
                if not self._can_replace(seat):
                    return 1
                seat.kill()
                self._seats[seat.rank] = Seat(seat.rank, group, self._job, seat.reason)
        return None

    def _let_others_end(self) -> None:
        end = time.monotonic() + _AFTERWARDS_SECONDS
        while time.monotonic() < end and any(s.started and not s.ended for s in self._seats):
            self._look()

    def _look(self) -> None:
        """Waits a moment for what the hosts say, prints it, and notes how they are."""
        waiting = {seat.waits: seat for seat in self._seats if seat.waits is not None}
        if waiting:
            references = list(waiting)
            ready, _ = ray.wait(references, timeout=_POLL_SECONDS)
            if ready:
                ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for reference in ready:
                waiting[reference].hear()
        else:
            time.sleep(_POLL_SECONDS)
        self._note(tasks=[seat.task() for seat in self._seats])

    def _can_replace(self, seat: Seat) -> bool:
        """Takes note of a task that is lost; returns whether it may be started once more."""
        newest = self._newest_step()
        if newest != self._step:
            self._losses.clear()
        self._step = newest
        count = self._losses[seat.rank] = self._losses.get(seat.rank, 0) + 1
        tell(f'task {seat.rank} is lost: {seat.reason.rstrip(".")}')
        most = self._job.policy.max_restarts
        if count > most:
            tell(f'given up: lost {count} times without a new checkpoint, where {most} are allowed')
            return False
        self._note(restarts=self._notes.restarts + 1)
        return True

    def _is_to_stop(self) -> bool:
        return bool(self._signals) or time.monotonic() > self._limit

    def _newest_step(self) -> int:
        """The step of the newest checkpoint, 0 if model_dir cannot be seen here."""
        try:
            return self._dirs.newest_step()
        except OSError:
            return 0

    def _note(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self._notes, name, value)
        if self._notes != self._noted:
            self._notes.write(self._dirs)
            self._noted = self._notes.copy()


def tell(text: str) -> None:
    """Says something about the job itself."""
    print(f'phalanx: {text}', flush=True)


def main() -> int:
    """Reads the job from the environment and runs it."""
    values = json.loads(os.environ[JOB])
    values['resources'] = Resources(**values['resources'])
    values['policy'] = Policy(**values['policy'])
    values['flags'] = tuple(values['flags'])
    ray.init(address='auto', log_to_driver=False, logging_level='WARNING')
    # By value, for Ray's processes on the hosts need not find this package.
    ray.cloudpickle.register_pickle_by_value(ray_host)
    metadata = json.loads(os.environ.get('RAY_JOB_CONFIG_JSON_ENV_VAR', '{}')).get('metadata', {})
    driver = Driver(Job(**values), metadata.get('job_submission_id', ''))
    for number in (signal.SIGTERM, signal.SIGINT):  # After Ray has set its own handlers.
        signal.signal(number, driver.note_signal)
    return driver.run()


if __name__ == '__main__':
    sys.exit(main())
