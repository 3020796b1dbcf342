"""The agents of a job that are connected with its leader, and what each has said last."""

import asyncio
import contextlib
import dataclasses
import resource
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.place import Place
from launch.wire import BEAT_SECONDS, Lost, Wire
from trainer.errors import ConfigError

_ANSWER_SECONDS = 10.0
# Files that a leader has open besides the connections.
_OTHER_FILES = 256


@dataclasses.dataclass
class Member:
    """An agent that is connected, and what it has said last.

    Of its workers, by their place on the host: exit codes, states, taken ports.

    Attributes:
        task: tells this process from others of its rank.
    """

    rank: int
    name: str
    task: str
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


class Roster:
    """Listens for the agents of a job until the block is left, in a thread.

    Args:
        place: of the leader.
        digest: what all tasks must have alike.
        tell: says a sentence to the user.

    Attributes:
        port: where it listens.
        members: by rank, those that are lost too.
        refused: by rank, why the newest task that was sent away was.
        changed: guards all of this and what members say; told of every change.
        asked: is told of a signal that another host has got, and the how manyth of that host it is.
    """

    def __init__(self, place: Place, digest: str, tell: Callable[[str], None]):
        self._place, self._digest, self._tell = place, digest, tell
        self.members: dict[int, Member] = {}
        self.refused: dict[int, str] = {}
        self.changed = threading.Condition()
        self.asked: Callable[[int, int], None] = lambda number, times: None

    def __enter__(self) -> 'Roster':
        _allow_files(self._place.hosts + _OTHER_FILES)
        listener, self.port = _listen(self._place)
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._serve, args=(listener, ready), name='roster', daemon=True
        )
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def present(self) -> dict[int, Member]:
        """Returns those that can be given work; the caller holds `changed`."""
        return {r: m for r, m in self.members.items() if not m.lost and not m.leaving}

    def name(self, member: Member) -> str:
        """Returns a host for people."""
        place = self._place
        return place.name(member.rank) if place.names else f'host {member.rank} ({member.name})'

    def send(self, members: Sequence[Member], **message: object) -> None:
        """Tells agents something; those that are lost do not hear it."""
        for member in members:
            self._loop.call_soon_threadsafe(lambda wire=member.wire: wire.say(**message))

    def wait(self, done: Callable[[], bool], seconds: float = _ANSWER_SECONDS) -> None:
        """Waits until something is so, but not for ever; the caller holds `changed`."""
        self.changed.wait_for(done, seconds)

    def drop(self, member: Member, why: str) -> None:
        """Counts an agent as lost; it may come again. The caller holds `changed`."""
        member.lost = why
        self._loop.call_soon_threadsafe(member.wire.close)

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
        for member in self.members.values():
            member.wire.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            for member in list(self.members.values()):
                if not member.lost:
                    member.wire.say(beat=True)
            await asyncio.sleep(BEAT_SECONDS)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            member = self._admit(wire, await wire.hear())
            while member:
                message = await wire.hear()
                if 'phases' in message and message['attempt'] == member.attempt:
                    # In a thread: a file server that stalls keeps nobody waiting for a beat.
                    await asyncio.to_thread(_write, member.directory, message['phases'])
                with self.changed:
                    self._take(member, message)
                    self.changed.notify_all()
        except (Lost, AttributeError, LookupError, TypeError, ValueError) as error:
            with self.changed:
                for member in self.members.values():
                    if member.wire is wire:
                        member.lost = member.lost or str(error)
                self.changed.notify_all()
        finally:
            wire.close()

    def _admit(self, wire: Wire, hello: Mapping[str, object]) -> Member | None:
        rank, name, task = int(hello['rank']), str(hello['name']), str(hello['task'])
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
                self.refused[rank] = why
            return None
        with self.changed:
            before = self.members.get(rank)
            if before and not before.lost:
                # Of two tasks of one rank that took turns, neither would ever get on. One that
                # has died without a word is lost soon.
                if before.task != task:
                    wire.say(busy=before.name)
                    return None
                before.lost = 'it has called again'
                before.wire.close()
            member = self.members[rank] = Member(rank, name, task, wire)
            self.changed.notify_all()
        wire.say(welcome=True)
        return member

    def _take(self, member: Member, message: Mapping) -> None:
        if 'asked' in message:
            if self._place.stays:
                member.leaving = True
            else:
                self.asked(int(message['asked']), int(message['times']))
        if 'ports' in message:
            member.ports = [int(port) for port in message['ports']]
        if 'dumped' in message:
            member.dumps += 1
        if message.get('attempt') != member.attempt:
            return  # Of one that is over.
        if 'cannot' in message:
            self._tell(f'{self.name(member)} cannot start its workers: {message["cannot"]}')
        if 'codes' in message:
            member.codes, member.states = list(message['codes']), list(message['states'])
            member.taken = list(message.get('taken', ()))


def phases(directory: Path, number: int) -> Path:
    """The record of phases of a worker, as the leader keeps it."""
    return directory / f'worker-{number}.phases.jsonl'


def _write(directory: Path, texts: Mapping[str, str]) -> None:
    for number, text in texts.items():
        path = phases(directory, int(number))
        with contextlib.suppress(OSError), open(path, 'a', encoding='utf-8') as file:
            file.write(text)


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


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
