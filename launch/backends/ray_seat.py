"""The place of one task of a Ray job, as its driver sees it."""

import sys
import time

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.backends import Task, ray_host
from launch.job import Job

_ENDS = {0: 'finished', 75: 'stopped'}


class Seat:
    """A bundle of the group, and the actor that has the task there.

    Attributes:
        rank: of the task.
        waits: the call that the actor has not answered yet; None after its end.
        place: what `Host.prepare` has returned; None before that.
        started: whether the task was started.
        code: its exit code; None before its end, and if it was lost with its host.
        reason: how it ended, in words.
    """

    def __init__(self, rank: int, group: PlacementGroup, job: Job, reason: str = ''):
        """Asks Ray for an actor there; it may have to wait for a host.

        Args:
            rank: of the task.
            group: that the job has.
            job: what is to run.
            reason: why there is no other there any more.
        """
        self.rank, self._job = rank, job
        bundle = dict(group.bundle_specs[rank])
        options = {
            'num_cpus': bundle.pop('CPU', 0),
            'num_gpus': bundle.pop('GPU', 0),
            'memory': bundle.pop('memory', 0),
            'scheduling_strategy': PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
            'max_concurrency': 4,  # One listens, others start and signal.
        }
        self._actor = ray.remote(ray_host.Host).options(**options).remote()
        self.waits = self._actor.prepare.remote(job.config)
        self.place: tuple[str, str, int, int, str] | None = None
        self.started, self.code, self._ended_at, self.reason = False, None, 0.0, reason
        self._line = b''

    @property
    def ended(self) -> bool:
        """Whether the task has ended or was lost."""
        return self.waits is None and self._ended_at > 0

    def silent_seconds(self) -> float:
        """Returns how long ago its end was heard of."""
        return time.monotonic() - self._ended_at

    def start(self, leader: tuple[str, str, int, int, str], hosts: int) -> None:
        """Starts the task, if there is a place for it and it was not started yet.

        Args:
            leader: the place of the task of rank 0.
            hosts: how many there are.
        """
        if self.place is None or self.started or self.ended:
            return
        _, _, _, pid, path = self.place
        python, _, module, *flags = self._job.command('ray', path)
        # Bound to the life of the actor, so that Ray ends both.
        command = [python, '-m', 'launch.child', str(pid), module, *flags]
        environment = {
            **self._job.environment,
            'PHALANX_RANK': str(self.rank),
            'PHALANX_HOSTS': str(hosts),
            'PHALANX_LEADER': leader[0],
            'PHALANX_PORT': str(leader[2]),
        }
        self._actor.start.remote(command, environment, self._job.directory)
        self.waits, self.started, self.reason = self._actor.listen.remote(), True, ''

    def hear(self) -> None:
        """Takes the answer that has come: a place, output, or an end."""
        try:
            answer = ray.get(self.waits)
        except ActorUnavailableError:
            # It may be heard of again; if not, the next call says so.
            self.waits = self._actor.listen.remote() if self.started else None
            if not self.started:
                self._end('its host is out of reach')
            return
        except RayError as error:
            self._end(_reason(error))
            return
        if isinstance(answer, tuple):
            self.place, self.waits = answer, None
        elif isinstance(answer, bytes):
            self._print(answer)
            self.waits = self._actor.listen.remote()
        else:
            self._print(b'', last=True)
            self.code = answer
            self._end(f'signal {-answer}' if answer < 0 else f'exit code {answer}')

    def signal(self, number: int) -> None:
        """Sends a signal to the task, if it runs."""
        if self.started and not self.ended:
            self._actor.signal.remote(number)

    def kill(self) -> None:
        """Ends the actor, and the task with it."""
        ray.kill(self._actor)

    def task(self) -> Task:
        """Returns what is known of the task."""
        if self.ended:
            state = _ENDS.get(self.code, 'failed')
        else:
            state = 'running' if self.started else 'pending'
        host = self.place[1] if self.place else ''
        return Task(self.rank, state, host, self.code, self.reason if self.code is None else '')

    def _end(self, reason: str) -> None:
        self.waits, self._ended_at, self.reason = None, time.monotonic(), reason

    def _print(self, text: bytes, last: bool = False) -> None:
        """Prints the whole lines of what the task has said, the leader's as they are."""
        *lines, self._line = (self._line + text).split(b'\n')
        if last and self._line:
            lines.append(self._line)
        prefix = b'task %d: ' % self.rank if self.rank else b''
        sys.stdout.buffer.write(b''.join(prefix + line + b'\n' for line in lines))
        sys.stdout.flush()


def _reason(error: RayError) -> str:
    """Returns what a message of Ray's says, without the numbers of its parts."""
    text = str(error).partition('Some common causes')[0]
    if 'node has died' in text:
        return 'its host is gone, says Ray'
    said = [line.strip() for line in text.splitlines() if line.strip().startswith('The actor ')]
    return (said[-1] if said else text.strip().partition('\n')[0])[:300] or type(error).__name__
