"""Reading from far away: many parts at once, and again where the network or the store fails.

A part is asked for until it is there, with pauses that grow, for `PHALANX_READ_SECONDS` (45 if it
is not set, which is less than the launcher waits for a silent worker). Timeouts, broken
connections, 408, 429 and 5xx are tried again, and so is an answer that is shorter than the object
says: it is no data. What the store refuses (404, 403, no credentials) is not.

The dozen lines of it are our own: a library for retries would still have to be told all of this.
"""

import asyncio
import bisect
import contextlib
import glob
import itertools
import math
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from absl import logging

from trainer.data import stores
from trainer.data.files import Range, Stat
from trainer.data.stores import Refused, Store
from trainer.errors import ConfigError, ReadError, nearest, shown

_Result = TypeVar('_Result')

_SECONDS = 45.0
_SILENCE = 10.0  # Seconds without a byte after which another try is better; a quarter at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # Seconds, of which a random part is waited.
_WARN_EVERY = 60  # Seconds.
# Parts no farther apart than this are read by one request: the bytes between come faster than
# another answer. A request brings at most a piece, so that all that may be under way at a time
# come soon enough even by a line of 12 Mbit/s.
_GAP, _PIECE = 2**16, 2**20


class _Client:
    """What this process has open, and what it knows of the objects it reads."""

    def __init__(self):
        self.stores: dict[str, Store] = {}
        self.slots = asyncio.Semaphore(stores.AT_ONCE)
        self.known: dict[str, Stat] = {}

    def open(self, urls: Iterable[str]) -> None:
        """Called in the threads that wait, as libraries are loaded and credentials looked for."""
        for url in urls:
            if stores.kind(url) not in self.stores:
                self.stores[stores.kind(url)] = stores.open_store(
                    url, silence=min(_SILENCE, _seconds() / 4)
                )

    def store(self, url: str) -> Store:
        return self.stores[stores.kind(url)]


_client = _Client()
# A child has no thread that runs the event loop, and must not share connections.
os.register_at_fork(after_in_child=lambda: _client.__init__())


def expand(patterns: Sequence[str]) -> list[list[str]]:
    """Returns the objects that match each URL or glob pattern, in order of names.

    Raises:
        ConfigError: there is none, or the store does not let us see it.
        ReadError: the store cannot be reached.
    """
    _client.open(patterns)
    return _run(_all(_expand(pattern) for pattern in patterns))


def walk(directory: str) -> list[tuple[str, int]]:
    """Returns all objects below a URL, but those that begin with a dot: names in it, and sizes.

    Raises:
        ConfigError: there is no such place, or the store does not let us see it.
        ReadError: the store cannot be reached.
    """
    beginning = directory.rstrip('/') + '/'
    pattern = f'{glob.escape(beginning)}**'
    _client.open([pattern])
    found = [(url[len(beginning) :], url) for url in _run(_expand(pattern))]
    return [(name, _client.known[url].size) for name, url in found if '/.' not in f'/{name}']


def stat(url: str) -> Stat:
    """Returns size and version of an object; if it was expanded, as it was then.

    Raises:
        ReadError: it cannot be reached.
    """
    _client.open([url])
    return _run(_stat(url))


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Returns parts of objects, all asked for at once; shorter at the end of an object only.

    Raises:
        ReadError: one cannot be read, or is not of the object that it was before.
    """
    _client.open(part.path for part in ranges)
    spans = _spans(ranges)
    contents = _run(_read_all(spans))
    result = []
    for part in ranges:
        # The last one that begins no later; `_spans` sees to it that it holds all of the part.
        number = bisect.bisect_right(spans, (part.path, part.offset, sys.maxsize)) - 1
        first = part.offset - spans[number].offset
        result.append(contents[number][first : first + part.length])
    return result


def _spans(ranges: Sequence[Range]) -> list[Range]:
    """Returns what covers all parts: neighbours become one, in order of objects and offsets."""
    spans: list[Range] = []
    for part in sorted(set(ranges)):
        if spans and spans[-1].path == part.path:
            path, offset, length = spans[-1]
            end = part.offset + part.length
            if part.offset <= offset + length + _GAP and end - offset <= _PIECE:
                spans[-1] = Range(path, offset, max(length, end - offset))
                continue
        spans.append(part)
    return spans


async def _expand(pattern: str) -> list[str]:
    store = _client.store(pattern)
    try:
        if not re.search(store.magic, pattern):
            await _learn(pattern)
            return [pattern]
        found = await _tried(pattern, lambda: store.glob(pattern))
        await _all(_learn(url, told) for url, told in found.items())
    except ReadError as error:
        refused = error.__cause__
        if not isinstance(refused, Refused):
            raise
        if not refused.missing:
            raise ConfigError(f'{pattern} cannot be read: {refused}') from None
        found = {}
    if not found:
        there = await _beside(store, pattern)
        raise ConfigError(f'There is no data file {pattern!r}.{nearest(pattern, there)}')
    return sorted(found)


async def _beside(store: Store, pattern: str) -> list[str]:
    """Returns what lies where an object was looked for, if the store tells."""
    folder = pattern.rpartition('/')[0]
    with contextlib.suppress(ReadError):
        return list(await _tried(folder, lambda: store.glob(f'{folder}/*')))
    return []


async def _read_all(spans: Sequence[Range]) -> list[bytes]:
    await _all(_stat(url) for url in {span.path for span in spans})
    return await _all(_read(span) for span in spans)


async def _read(span: Range) -> bytes:
    known = await _stat(span.path)
    end = min(span.offset + span.length, known.size)
    pieces = [
        Range(span.path, first, min(_PIECE, end - first))
        for first in range(span.offset, end, _PIECE)
    ]
    return b''.join(await _all(_piece(piece, known) for piece in pieces))


async def _piece(piece: Range, known: Stat) -> bytes:
    store = _client.store(piece.path)

    async def attempt() -> bytes:
        content, version = await store.get(*piece)
        if version and known.version and version != known.version:
            raise Refused('it is not the object any more that it was when the job began')
        if len(content) != piece.length:
            raise OSError(f'{len(content)} bytes came of {piece.length}')
        return content

    return await _tried(piece.path, attempt)


async def _stat(url: str) -> Stat:
    """Returns what is known of an object; asks only for what was never asked."""
    if url not in _client.known:
        await _learn(url)
    return _client.known[url]


async def _learn(url: str, told: Stat | None = None) -> None:
    store = _client.store(url)
    _client.known[url] = told or await _tried(url, lambda: store.stat(url))


def _seconds() -> float:
    text = os.environ.get('PHALANX_READ_SECONDS') or str(_SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ConfigError(f'PHALANX_READ_SECONDS is {text!r}; it must be a number of seconds above 0.')


async def _tried(url: str, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
    """Returns what an attempt comes to, made again and again until the time is over."""
    seconds = _seconds()
    began = 0.0
    for tries in itertools.count(1):
        async with _client.slots:
            began = began or time.monotonic()
            left = began + seconds - time.monotonic()
            try:
                return await asyncio.wait_for(attempt(), max(1.0, left))
            except (AttributeError, LookupError, TypeError):
                raise  # Nobody's fault but ours.
            except Exception as error:
                last = error
        took = time.monotonic() - began
        reason = str(last) or 'no answer in time'
        if isinstance(last, Refused) or took >= seconds:
            raise ReadError(
                f'{url} could not be read, in {tries} {"try" if tries == 1 else "tries"} '
                f'and {took:.1f} s: {reason}'
            ) from last
        pause = random.uniform(0.0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**tries))
        logging.log_every_n_seconds(
            logging.WARNING,
            '%s cannot be read (%s); it is tried again, for up to %.0f s',
            _WARN_EVERY,
            shown(url),
            shown(reason),
            seconds,
        )
        await asyncio.sleep(min(pause, seconds - took))
    raise AssertionError('unreachable')


async def _all(coroutines: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Returns all results; the first failure ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Returns what a coroutine comes to on the event loop that the file systems share."""
    import fsspec.asyn

    future = asyncio.run_coroutine_threadsafe(coroutine, fsspec.asyn.get_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # Where Ctrl-C ended the wait.
