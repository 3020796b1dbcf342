"""Reads logs while they are written."""

import codecs
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_SECONDS = 0.5
_ASK_POLLS = 4  # How many of them lie between two questions to a scheduler.
_PIECE_BYTES = 1 << 16


def tail(newest: Callable[[], Path | None], ended: Callable[[], bool]) -> Iterator[str]:
    """Yields what is in a log, and what comes to it, in pieces of text.

    Args:
        newest: returns the file to read, None before there is one. When it returns another one,
            that is read from its beginning, after the rest of the one before.
        ended: whether nothing more will be written; asked once in a while.
    """
    path: Path | None = None
    position, polls, last = 0, 0, False
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    while True:
        current = newest()
        path = path or current
        if path is not None:
            for piece in _read(path, position):
                position += len(piece)
                if text := decoder.decode(piece):
                    yield text
        if path != current:
            path, position = current, 0
            decoder.reset()
        elif last:
            return
        elif polls % _ASK_POLLS == 0 and ended():
            last = True  # What was written before that is read once more.
        else:
            time.sleep(_POLL_SECONDS)
        polls += 1


def _read(path: Path, position: int) -> Iterator[bytes]:
    try:
        with open(path, 'rb') as file:
            file.seek(position)
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except FileNotFoundError:
        return
