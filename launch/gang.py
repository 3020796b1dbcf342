"""The hosts of one job, as its leader sees them: who is there, and what their workers do.

On each host runs an agent (`launch.agent`), on the leader's too. A host is lost when its agent has
said nothing for `wire.LOST_SECONDS`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.place import Place
from launch.roster import Member, Roster, phases
from trainer.errors import ConfigError, Preempted

_POLL_SECONDS = 0.1
_TELL_SECONDS = 10.0
# How long an elastic job with enough hosts waits for more, once none has come for so long.
_SETTLE_SECONDS = 30.0
_KILL_SECONDS = 30.0
_NAMED = 20


class Missing(Exception):
    """Hosts have not come within the time given; the message names them."""


class Gang:
    """All hosts of a job; the leader listens for them until the block is left.

    Args:
        place: of the leader.
        digest: what all tasks must have alike.
        workers_per_host: how many workers each host has.
        seconds: how long is waited for those that are missing.
        tell: says a sentence to the user.

    Attributes:
        lock_seconds: how long to wait for another launcher to leave the directory: one whose host
            is cut off from the others, before it gives up.
    """

    def __init__(
        self,
        place: Place,
        digest: str,
        *,
        workers_per_host: int,
        seconds: float,
        tell: Callable[[str], None],
    ):
        self._place, self._each = place, workers_per_host
        self._seconds, self._tell = seconds, tell
        self.lock_seconds = 2 * seconds
        self.roster = Roster(place, digest, tell)
        # Who is to have the workers of the next attempt.
        self._chosen: list[Member] = []
        self._begun = self._ended = False

    def __enter__(self) -> 'Gang':
        self.roster.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.roster.__exit__(*exc)

    @property
    def port(self) -> int:
        """Where the leader listens."""
        return self.roster.port

    def when_asked(self, asked: Callable[[int, int], None]) -> None:
        """Has signals told that other hosts have got, see `launch.roster.Roster.asked`."""
        self.roster.asked = asked

    def check(self, workers: int) -> None:
        """GPUs are the business of each host's task."""

    def gather(
        self, workers: int, least: int, *, stop: Callable[[], bool], show: Callable[[], None]
    ) -> int:
        """Waits for the hosts of the next attempt; returns how many workers they have room for.

        Args:
            workers: how many are wanted.
            least: how few will do, once no more come.
            stop: whether to give up waiting; the result then is 0.
            show: called again and again.

        Raises:
            Missing: too few have come.
            ConfigError: one has another configuration.
        """
        begin = told = time.monotonic()
        before, since = 0, begin
        hosts = math.ceil(workers / self._each)
        while not stop():
            with self.roster.changed:
                self._check_refused()
                present = self.roster.present()
            # A host that is lost from here on is missed in the attempt, and not left out of it.
            self._chosen = [present[rank] for rank in sorted(present)]
            if len(present) != before:
                before, since = len(present), time.monotonic()
            room = min(workers, len(present) * self._each)
            now = time.monotonic()
            if len(present) >= hosts:
                return workers
            if 0 in present and least <= room and now - since > _SETTLE_SECONDS:
                return room
            missing = [rank for rank in range(self._place.hosts) if rank not in present]
            if now - begin > self._seconds:
                if 0 in present and least <= room:
                    return room
                raise Missing(
                    f'after {self._seconds:g} s these have not come: {self._names(missing)}. See '
                    'whether each was started, and can reach the leader, '
                    f'{self._place.name(0)}, at port {self.port}'
                )
            if now - told > _TELL_SECONDS:
                told = now
                self._tell(f'waiting for {self._names(missing)}')
            show()
            time.sleep(_POLL_SECONDS)
        return 0

    def start(
        self,
        flags: Sequence[str],
        count: int,
        directory: Path,
        *,
        wanted: int,
        variables: Mapping[str, str],
    ) -> 'GangWorkers':
        """Starts the workers of an attempt, see `launch.local.Host`. The agents have the flags.

        A host that is lost meanwhile shows in what is returned.
        """
        del flags, wanted, variables
        self._begun = True
        members = self._chosen[: math.ceil(count / self._each)]
        shares = [min(self._each, count - i * self._each) for i in range(len(members))]
        with self.roster.changed:
            for member, share in zip(members, shares, strict=True):
                member.ports = None
                self.roster.send([member], do='ports', count=share)
            self.roster.wait(lambda: all(m.ports is not None or m.lost for m in members))
            for member in members:
                if member.ports is None and not member.lost:
                    self.roster.drop(member, 'it does not answer')
            cluster = _cluster(members, shares)
            attempt = int(directory.name.rpartition('-')[2])
            first = 0
            for member, share in zip(members, shares, strict=True):
                member.attempt, member.directory = attempt, directory
                member.codes = [None] * share
                member.states, member.taken = ['running'] * share, []
                order = {'attempt': attempt, 'first': first, 'count': share, 'cluster': cluster}
                self.roster.send([member], do='start', **order)
                first += share
        return GangWorkers(self.roster, members, shares, directory)

    def end(self, code: int) -> None:
        """Tells all agents how the job has ended, once, and waits until they have gone."""
        if self._ended:
            return
        self._ended = True
        with self.roster.changed:
            # Those that stay have the next leader to wait for.
            members = self.roster.members.values()
            told = [m for m in members if not (self._stays(code) and m.rank)]
            self.roster.send(told, do='end', code=code)
            self.roster.wait(lambda: all(member.lost for member in told))

    def _stays(self, code: int) -> bool:
        return self._place.stays and code == Preempted.exit_code

    def _names(self, ranks: Sequence[int]) -> str:
        names = ', '.join(map(self._place.name, ranks[:_NAMED]))
        return names + (f' and {len(ranks) - _NAMED} more' if len(ranks) > _NAMED else '')

    def _check_refused(self) -> None:
        if self.roster.refused and not self._begun:
            rank, why = self.roster.refused.popitem()
            raise ConfigError(f'{self._place.name(rank)} {why}')


class GangWorkers:
    """The workers of an attempt on all hosts, see `launch.local.Workers`."""

    def __init__(
        self, roster: Roster, members: Sequence[Member], shares: Sequence[int], directory: Path
    ):
        self._roster, self._members = roster, list(members)
        numbers = range(sum(shares))
        self.logs = [directory / f'worker-{number}.log' for number in numbers]
        self.phases = [phases(directory, number) for number in numbers]

    def codes(self) -> list[int | None]:
        """Returns each worker's exit code, negative for a signal, None as far as is known."""
        with self._roster.changed:
            return [code for member in self._members for code in member.codes]

    def states(self) -> list[str]:
        """Returns what each worker is: 'running', 'stopped' or 'ended'."""
        with self._roster.changed:
            return [state for member in self._members for state in member.states]

    def lost(self) -> tuple[int, str] | None:
        """Returns the first worker of a host that is lost, and what there is to say of it."""
        first = 0
        with self._roster.changed:
            for member in self._members:
                if member.lost and None in member.codes:
                    return first, f'{self._roster.name(member)} is lost: {member.lost}'
                first += len(member.codes)
        return None

    def leaving(self) -> bool:
        """Whether a host is about to go, and its task will come again elsewhere."""
        with self._roster.changed:
            return any(member.leaving for member in self._members)

    def signal(self, number: int) -> None:
        """Sends a signal to all that run."""
        self._roster.send(self._members, do='signal', number=int(number))

    def dump_stacks(self) -> None:
        """Has every worker write what all its Python threads do into its log."""
        with self._roster.changed:
            before = {id(member): member.dumps for member in self._members}
            self._roster.send(self._members, do='dump')
            self._roster.wait(lambda: all(m.lost or m.dumps > before[id(m)] for m in self._members))

    def taken_port(self) -> tuple[int, int] | None:
        """Returns a worker and its port if that is another process's; ask once all have ended."""
        first = 0
        with self._roster.changed:
            for member in self._members:
                for index, port in member.taken:
                    return first + index, port
                first += len(member.codes)
        return None

    def kill(self) -> None:
        """Ends all that run and waits for them; a host that does not answer counts as lost."""
        with self._roster.changed:
            self._roster.send(self._members, do='kill')
            self._roster.wait(
                lambda: all(m.lost or None not in m.codes for m in self._members), _KILL_SECONDS
            )
            for member in self._members:
                if not member.lost and None in member.codes:
                    self._roster.drop(member, 'it does not end its workers')


def _cluster(members: Sequence[Member], shares: Sequence[int]) -> list[str]:
    """Returns the address of every worker, for TF_CONFIG.

    Each host has the address that its agent calls from, and the leader's, whose agent calls itself,
    the one that the others call.
    """
    called = next((member.wire.address() for member in members if member.rank), '127.0.0.1')
    addresses = []
    for member, share in zip(members, shares, strict=True):
        host = member.wire.peer() if member.rank else called
        host = f'[{host}]' if ':' in host else host
        # Without an answer it is lost, and no worker will start.
        ports = member.ports or range(1, share + 1)
        addresses += [f'{host}:{port}' for port in ports]
    return addresses
