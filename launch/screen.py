"""What a launcher shows of its workers' logs and says itself."""

import codecs
import contextlib
import sys
from pathlib import Path
from typing import TextIO


class Screen:
    """Shows what is added to a log."""

    def __init__(self, log: Path):
        self._log, self._offset = log, 0
        self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

    def show(self) -> None:
        """Prints what is new."""
        with open(self._log, 'rb') as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        show(self._decoder.decode(text), sys.stdout)


def show(text: str, stream: TextIO) -> None:
    """Prints a text at once."""
    # A closed terminal or pipe must not end a job; all of it is in the logs too.
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()
