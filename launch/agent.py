"""One host's share of a job: starts, watches and ends its workers as the leader says."""

import asyncio
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence

from launch import display, local
from launch.place import Place
from launch.share import Share
from launch.wire import BEAT_SECONDS, SAME_SIGNAL_SECONDS, Lost, Wire
from trainer.errors import ConfigError, Preempted, WriteError
from trainer.model_dir import ModelDir

_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_CALL_SECONDS = 5.0
_TELL_SECONDS = 10.0
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Agent:
    """The agent of a host.

    Args:
        place: of this task.
        digest: what all tasks must have alike.
        flags: of `python -m trainer`.
        dirs: where the run is written.
        workers_per_host: how many workers share the GPUs and cores of this host.
        seconds: how long the leader is looked for.
        tee: whether what workers print goes to stdout too.
    """

    def __init__(
        self,
        place: Place,
        digest: str,
        *,
        flags: Sequence[str],
        dirs: ModelDir,
        workers_per_host: int,
        seconds: float,
        tee: bool = False,
    ):
        self._place, self._digest, self._flags, self._dirs = place, digest, list(flags), dirs
        self._sharing, self._seconds, self._tee = workers_per_host, seconds, tee
        self._wire: Wire | None = None
        self._share: Share | None = None
        self._held: list[socket.socket] = []
        # Tells this process from others of its rank, and knows it again when it calls again.
        self._task = uuid.uuid4().hex
        self._asked, self._asked_at, self._left = 0, -math.inf, False

    def run(self, *, handles_signals: bool = True) -> int:
        """Serves the leader until the job has ended; returns the exit code of this task.

        Args:
            handles_signals: whether those that ask to stop come here; else they come to the leader,
                which is in the same process.

        Raises:
            ConfigError: the leader is of another job.
            Unmet: the leader has not come.
        """
        return asyncio.run(self._run(handles_signals))

    def leave(self) -> None:
        """Ends `run` soon, from another thread, once the leader has gone or if it never comes."""
        self._left = True

    async def _run(self, handles_signals: bool) -> int:
        self._loop = loop = asyncio.get_running_loop()
        if handles_signals:
            for number in _STOPS:
                loop.add_signal_handler(number, self._ask, number)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                loop.add_signal_handler(signal.SIGHUP, self._ask, signal.SIGHUP)
        try:
            while True:
                wire = await self._call()
                if wire is None:
                    return Preempted.exit_code
                self._wire = wire
                if self._asked:  # While it called.
                    self._tell_asked()
                try:
                    return await self._serve(wire)
                except Lost as error:
                    self._tell(f'lost the leader, {self._place.name(0)}: {error}')
                    self._end_share(f'lost the leader: {error}')
                    if self._asked or self._left:
                        return Preempted.exit_code
                finally:
                    wire.close()
        finally:
            self._end_share('the task has ended')

    def _ask(self, number: int) -> None:
        # Who closes a terminal or stops a service may send several at once, and means one.
        if time.monotonic() - self._asked_at < SAME_SIGNAL_SECONDS:
            return
        self._asked, self._asked_at, self._signal = self._asked + 1, time.monotonic(), number
        if self._asked > 1:  # A second signal ends all at once.
            self._end_share('a second signal')
        self._tell_asked()

    def _tell_asked(self) -> None:
        if self._wire:
            self._wire.say(asked=int(self._signal), times=self._asked)

    async def _call(self) -> Wire | None:
        """Returns a connection with the leader, None if this task is to stop.

        Raises:
            ConfigError: it has not answered in time.
        """
        end, told = time.monotonic() + self._seconds, time.monotonic()
        while True:
            why = ''
            for port in self._place.ports:
                if self._asked or self._left:
                    return None
                try:
                    return await self._greet(port)
                except Lost as error:
                    why = str(error)
                except (OSError, asyncio.TimeoutError) as error:
                    # Says less than what somebody has answered at another port.
                    why = why or getattr(error, 'strerror', None) or str(error) or 'no answer'
            now = time.monotonic()
            if now > end:
                raise Unmet(
                    f'{self._place.name(0)}, the leader, has not answered within '
                    f'{self._seconds:g} s ({why}). See whether its task was started, and can be '
                    f'reached at {self._place.leader}, port '
                    f'{" or ".join(map(str, self._place.ports))}.'
                )
            if now - told > _TELL_SECONDS:
                told = now
                self._tell(f'waiting for the leader, {self._place.name(0)}: {why}')
            await asyncio.sleep(_RETRY_SECONDS)

    async def _greet(self, port: int) -> Wire:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(self._place.leader, port, limit=Wire.limit), _CALL_SECONDS
        )
        wire = Wire(reader, writer)
        try:
            wire.say(
                rank=self._place.rank,
                digest=self._digest,
                name=f'{socket.gethostname()}, process {os.getpid()}',
                task=self._task,
            )
            answer = await wire.hear(_CALL_SECONDS)
            if 'busy' in answer:
                rank = self._place.name(self._place.rank)
                raise Lost(f'{rank} has another task in this job already: {answer["busy"]}')
            if 'refused' in answer:
                raise ConfigError(str(answer['refused']))
            if 'welcome' not in answer:
                raise Lost('another program answers')
        except BaseException:
            wire.close()
            raise
        return wire

    async def _serve(self, wire: Wire) -> int:
        beats = asyncio.ensure_future(self._report(wire))
        try:
            while True:
                message = await wire.hear()
                if message.get('do') == 'end':
                    return int(message['code'])
                await self._do(wire, message)
                if self._gone():
                    return Preempted.exit_code
        except (LookupError, TypeError, ValueError) as error:
            raise Lost(f'it says what cannot be understood: {error}') from None
        finally:
            beats.cancel()

    def _gone(self) -> bool:
        """Whether this host was asked to go, alone, and has saved."""
        return bool(
            self._asked and self._place.stays and (self._share is None or self._share.has_ended())
        )

    async def _do(self, wire: Wire, message: dict) -> None:
        what = message.get('do')
        if what == 'ports':
            self._let_go()
            self._held = [_bound() for _ in range(message['count'])]
            wire.say(ports=[held.getsockname()[1] for held in self._held])
        elif what == 'start':
            self._end_share('another attempt begins')
            self._let_go()  # No sooner: nobody else shall take them.
            try:
                self._share = Share(
                    message, self._flags, self._dirs, self._sharing, self._place.rank
                )
            except OSError as error:  # A full disk, no more processes.
                count = message['count']
                codes = {'codes': [WriteError.exit_code] * count, 'states': ['ended'] * count}
                wire.say(attempt=message['attempt'], cannot=str(error), **codes)
        elif what == 'signal' and self._share:
            self._share.workers.signal(message['number'])
        elif what == 'dump' and self._share:
            await asyncio.to_thread(self._share.dump)
            wire.say(dumped=True)
        elif what == 'kill':
            self._end_share('the attempt has ended')

    async def _report(self, wire: Wire) -> None:
        beat = time.monotonic()
        while True:
            if (share := self._share) is not None and (news := share.news()):
                wire.say(**news)
            if share is not None and self._tee:
                share.tee()
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                wire.say(beat=True)
            await asyncio.sleep(_POLL_SECONDS)

    def _end_share(self, reason: str) -> None:
        if self._share is not None:
            self._share.end(reason)
            if self._tee:
                self._share.tee()
            if self._wire:
                self._wire.say(**self._share.news())
            self._share = None

    def _let_go(self) -> None:
        for held in self._held:
            held.close()
        self._held = []

    def _tell(self, text: str) -> None:
        display.write(f'phalanx: {self._place.name(self._place.rank)}: {text}\n', sys.stderr)


class Unmet(Exception):
    """The leader has not come; it may when the task is started again."""


def _bound() -> socket.socket:
    """Holds a port that TensorFlow's server can have as soon as it is let go."""
    while True:
        (port,) = local.free_ports(1)
        held = socket.socket()
        try:
            held.bind(('', port))
        except OSError:
            held.close()
            continue
        return held
