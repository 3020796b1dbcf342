"""The hosts of one job, as its leader sees them: who is there, and what their workers do.

On each host runs an agent (`launch.agent`), on the leader's too. A host is lost when its agent has
said nothing for `wire.LOST_SECONDS`.
"""

import asyncio
import contextlib
import dataclasses
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.place import Place
from launch.wire import BEAT_SECONDS, Lost, Wire
from trainer.errors import ConfigError, Preempted

_POLL_SECONDS = 0.1
_TELL_SECONDS = 10.0
# How long an elastic job with enough hosts waits for more, once none has come for so long.
_SETTLE_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_KILL_SECONDS = 30.0


class Missing(Exception):
    """Hosts have not come within the time given; the message names them."""


@dataclasses.dataclass
class _Member:
    """An agent that is connected, and what it has said last.

    Of its workers, by their place on the host: exit codes, states, taken ports.
    """

    rank: int
    name: str
    wire: Wire
    directory: Path | None = None
    lost: str = ''
    leaving: bool = False
    ports: list[int] | None = None
    attempt: int = 0
    codes: list[int | None] = dataclasses.field(default_factory=list)
    states: list[str] = dataclasses.field(default_factory=list)
    taken: list[int] = dataclasses.field(default_factory=list)
    dumps: int = 0


class Gang:
    """All hosts of a job; the leader listens for them until the block is left.

    Args:
        place: of the leader.
        digest: what all tasks must have alike.
        workers_per_host: how many workers each host has.
        seconds: how long is waited for those that are missing.
        tell: says a sentence to the user.

    Attributes:
        port: where it listens.
        lock_seconds: how long to wait for another launcher to leave the directory: one whose host
            is cut off from the others, before it gives up.
        asked: is told of signals that other hosts have got.
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
        self._place, self._digest, self._each = place, digest, workers_per_host
        self._seconds, self._tell = seconds, tell
        self.lock_seconds = 2 * seconds
        self._members: dict[int, _Member] = {}
        self._refused: dict[int, str] = {}
        # Guards all of the above, and what members say; told of every change.
        self.changed = threading.Condition()
        self.asked: Callable[[int], None] = lambda number: None
        self._begun = self._ended = False

    def __enter__(self) -> 'Gang':
        listener, self.port = _listen(self._place)
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._serve, args=(listener, ready), name='gang', daemon=True
        )
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

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
            with self.changed:
                self._check_refused()
                present = self._present()
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
        with self.changed:
            ranks = sorted(self._present())[: math.ceil(count / self._each)]
            members = [self._members[rank] for rank in ranks]
            shares = [min(self._each, count - i * self._each) for i in range(len(members))]
            for member, share in zip(members, shares, strict=True):
                member.ports = None
                self._send(member, do='ports', count=share)
            self.wait(lambda: all(m.ports is not None or m.lost for m in members))
            cluster = _cluster(members, shares)
            attempt = int(directory.name.rpartition('-')[2])
            first = 0
            for member, share in zip(members, shares, strict=True):
                member.attempt, member.directory = attempt, directory
                member.codes = [None] * share
                member.states, member.taken = ['running'] * share, []
                self._send(
                    member, do='start', attempt=attempt, first=first, count=share, cluster=cluster
                )
                first += share
        return GangWorkers(self, members, shares, directory)

    def end(self, code: int) -> None:
        """Tells all agents how the job has ended, once, and waits until they have gone."""
        if self._ended:
            return
        self._ended = True
        with self.changed:
            # Those that stay have the next leader to wait for.
            told = [m for m in self._members.values() if not (self._stays(code) and m.rank)]
            self.send(told, do='end', code=code)
            self.wait(lambda: all(member.lost for member in told))

    def send(self, members: Sequence[_Member], **message: object) -> None:
        """Tells agents something; those that are lost do not hear it."""
        for member in members:
            self._send(member, **message)

    def wait(self, done: Callable[[], bool], seconds: float = _ANSWER_SECONDS) -> None:
        """Waits until something is so, but not for ever; the caller holds `changed`."""
        self.changed.wait_for(done, seconds)

    def _stays(self, code: int) -> bool:
        return self._place.stays and code == Preempted.exit_code

    def _present(self) -> dict[int, _Member]:
        return {r: m for r, m in self._members.items() if not m.lost and not m.leaving}

    def _names(self, ranks: Sequence[int]) -> str:
        return ', '.join(map(self._place.name, ranks))

    def _check_refused(self) -> None:
        if self._refused and not self._begun:
            rank, why = self._refused.popitem()
            raise ConfigError(f'{self._place.name(rank)} {why}')

    def name(self, member: _Member) -> str:
        """Returns a host for people."""
        place = self._place
        return place.name(member.rank) if place.names else f'host {member.rank} ({member.name})'

    def drop(self, member: _Member) -> None:
        """Ends the connection with an agent; it may come again."""
        self._loop.call_soon_threadsafe(member.wire.close)

    def _send(self, member: _Member, **message: object) -> None:
        self._loop.call_soon_threadsafe(lambda: member.wire.say(**message))

    # What follows runs in the thread.

    def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen(listener, ready))
        self._loop.close()

    async def _listen(self, listener: socket.socket, ready: threading.Event) -> None:
        self._stop = asyncio.Event()
        backlog = max(100, self._place.hosts)
        server = await asyncio.start_server(
            self._greet, sock=listener, limit=Wire.limit, backlog=backlog
        )
        ready.set()
        beats = asyncio.ensure_future(self._beat())
        await self._stop.wait()
        beats.cancel()
        server.close()
        for member in self._members.values():
            member.wire.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            for member in list(self._members.values()):
                if not member.lost:
                    member.wire.say(beat=True)
            await asyncio.sleep(BEAT_SECONDS)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            member = self._admit(wire, await wire.hear())
            while member:
                message = await wire.hear()
                with self.changed:
                    self._take(member, message)
                    self.changed.notify_all()
        except (Lost, LookupError, TypeError, ValueError) as error:
            with self.changed:
                for member in self._members.values():
                    if member.wire is wire:
                        member.lost = member.lost or str(error)
                self.changed.notify_all()
        finally:
            wire.close()

    def _admit(self, wire: Wire, hello: Mapping[str, object]) -> '_Member | None':
        rank, name = int(hello['rank']), str(hello['name'])
        why = ''
        if not 0 <= rank < self._place.hosts:
            why = f'says that it is host {rank} of a job that has {self._place.hosts}'
        elif hello['digest'] != self._digest:
            why = (
                f'({name}) has another configuration or other flags than the leader. All tasks '
                'need the same.'
            )
        if why:
            wire.say(refused=f'{self._place.name(rank)} {why}')
            with self.changed:
                self._refused[rank] = why
            return None
        member = _Member(rank, name, wire)
        with self.changed:
            if (before := self._members.get(rank)) and not before.lost:
                before.lost = 'another task of its rank has come'
                before.wire.close()
            self._members[rank] = member
            self.changed.notify_all()
        wire.say(welcome=True)
        return member

    def _take(self, member: _Member, message: Mapping) -> None:
        if 'asked' in message:
            if self._place.stays:
                member.leaving = True
            else:
                self.asked(int(message['asked']))
        if 'ports' in message:
            member.ports = [int(port) for port in message['ports']]
        if 'dumped' in message:
            member.dumps += 1
        if message.get('attempt') != member.attempt:
            return  # Of one that is over.
        if 'codes' in message:
            member.codes, member.states = list(message['codes']), list(message['states'])
            member.taken = list(message.get('taken', ()))
        for number, text in message.get('phases', {}).items():
            path = _phases(member.directory, int(number))
            with contextlib.suppress(OSError), open(path, 'a', encoding='utf-8') as file:
                file.write(text)


class GangWorkers:
    """The workers of an attempt on all hosts, see `launch.local.Workers`."""

    def __init__(
        self, gang: Gang, members: Sequence[_Member], shares: Sequence[int], directory: Path
    ):
        self._gang, self._members = gang, list(members)
        numbers = range(sum(shares))
        self.logs = [directory / f'worker-{number}.log' for number in numbers]
        self.phases = [_phases(directory, number) for number in numbers]

    def codes(self) -> list[int | None]:
        """Returns each worker's exit code, negative for a signal, None as far as is known."""
        with self._gang.changed:
            return [code for member in self._members for code in member.codes]

    def states(self) -> list[str]:
        """Returns what each worker is: 'running', 'stopped' or 'ended'."""
        with self._gang.changed:
            return [state for member in self._members for state in member.states]

    def lost(self) -> tuple[int, str] | None:
        """Returns the first worker of a host that is lost, and what there is to say of it."""
        first = 0
        with self._gang.changed:
            for member in self._members:
                if member.lost and None in member.codes:
                    return first, f'{self._gang.name(member)} is lost: {member.lost}'
                first += len(member.codes)
        return None

    def leaving(self) -> bool:
        """Whether a host is about to go, and its task will come again elsewhere."""
        with self._gang.changed:
            return any(member.leaving for member in self._members)

    def signal(self, number: int) -> None:
        """Sends a signal to all that run."""
        self._gang.send(self._members, do='signal', number=int(number))

    def dump_stacks(self) -> None:
        """Has every worker write what all its Python threads do into its log."""
        with self._gang.changed:
            before = {id(member): member.dumps for member in self._members}
            self._gang.send(self._members, do='dump')
            self._gang.wait(lambda: all(m.lost or m.dumps > before[id(m)] for m in self._members))

    def taken_port(self) -> tuple[int, int] | None:
        """Returns a worker and its port if that is another process's; ask once all have ended."""
        first = 0
        with self._gang.changed:
            for member in self._members:
                for index, port in member.taken:
                    return first + index, port
                first += len(member.codes)
        return None

    def kill(self) -> None:
        """Ends all that run and waits for them; a host that does not answer counts as lost."""
        with self._gang.changed:
            self._gang.send(self._members, do='kill')
            self._gang.wait(
                lambda: all(m.lost or None not in m.codes for m in self._members), _KILL_SECONDS
            )
            for member in self._members:
                if not member.lost and None in member.codes:
                    member.lost = 'it does not end its workers'
                    self._gang.drop(member)


def _phases(directory: Path, number: int) -> Path:
    return directory / f'worker-{number}.phases.jsonl'


def _cluster(members: Sequence[_Member], shares: Sequence[int]) -> list[str]:
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


def _listen(place: Place) -> tuple[socket.socket, int]:
    """Listens at the first port that is free, on all interfaces: the hosts have a network.

    Raises:
        ConfigError: none is.
    """
    for port in place.ports:
        with contextlib.suppress(OSError):
            if socket.has_dualstack_ipv6():
                family = {'family': socket.AF_INET6, 'dualstack_ipv6': True}
            else:
                family = {}
            return socket.create_server(('', port), **family), port
    ports = ', '.join(map(str, place.ports))
    raise ConfigError(
        f'{place.name(0)} cannot listen at any of the ports {ports}: other processes do. '
        '`ss -ltnp` shows them; is another job of the same directory running?'
    )
