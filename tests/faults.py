"""A network that fails: a TCP proxy in front of an HTTP server that answers late, badly, or not."""

import asyncio
import contextlib
import itertools
import threading

# What can become of an answer.
ALL = ('slow', 'reset', 'unavailable', 'truncated', 'stalled')
_SLOW_SECONDS, _STALLED_SECONDS = 0.3, 60.0
_MOST_AT_A_TIME = 256


class Faults:
    """A proxy on loopback, in a thread of its own; a context manager.

    Each connection carries one request. Every `every`-th answer to a GET suffers one of `kinds` in
    turn.

    Attributes:
        port: where it listens.
        out: while it is true, connections are reset as soon as they are made.
        latency: seconds that every answer is late.
        requests, injected: how many there have been.
        most: how many answers have been waited for at the same time.
    """

    def __init__(self, port, every=0, kinds=ALL, latency=0.0):
        self._upstream, self._every, self.latency = port, every, latency
        self._kinds = itertools.cycle(kinds)
        self.out = False
        self.requests = self.injected = self.most = self._waiting = 0

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)))
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self, started):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._slots = asyncio.Semaphore(_MOST_AT_A_TIME)
        self._tasks = set()
        server = await asyncio.start_server(self._connected, '127.0.0.1', 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            async with self._slots:
                with contextlib.suppress(OSError, asyncio.CancelledError, EOFError):
                    await self._answer(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader, writer):
        if self.out:
            writer.transport.abort()
            return
        head = await reader.readuntil(b'\r\n\r\n')
        self.requests += 1
        kind = None
        if self._every and self.requests % self._every == 0:
            kind = next(self._kinds)
            self.injected += 1
        head, body = await self._forward(reader, head)
        self._waiting += 1
        self.most = max(self.most, self._waiting)
        await asyncio.sleep(self.latency)
        self._waiting -= 1
        if kind == 'unavailable':
            head, body = b'HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n', b''
        elif kind == 'slow':
            await asyncio.sleep(_SLOW_SECONDS)
        half = len(body) // 2 if kind in ('reset', 'truncated', 'stalled') else len(body)
        writer.write(head + body[:half])
        await writer.drain()
        if kind == 'stalled':
            await asyncio.sleep(_STALLED_SECONDS)
        if kind == 'reset':
            writer.transport.abort()

    async def _forward(self, reader, head):
        """Returns head and body of the true answer."""
        lines = head.split(b'\r\n')
        kept = [line for line in lines if not line.lower().startswith(b'connection:')]
        length = next((int(x[15:]) for x in kept if x.lower().startswith(b'content-length:')), 0)
        sent = b'\r\n'.join([kept[0], b'Connection: close', *kept[1:]])
        upstream, to_upstream = await asyncio.open_connection('127.0.0.1', self._upstream)
        try:
            to_upstream.write(sent + await reader.readexactly(length))
            answer = await upstream.read()
        finally:
            to_upstream.close()
        head, blank, body = answer.partition(b'\r\n\r\n')
        lines = [x for x in head.split(b'\r\n') if not x.lower().startswith(b'connection:')]
        return b'\r\n'.join([*lines, b'Connection: close']) + blank, body
