"""The damaged records that a process has met: listed, counted, and whether they are too many."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from trainer.data.source import Source
from trainer.errors import BadRecord

# Beyond this share of what was read it is not damage: these are not the data that were meant.
_MOST, _AT_LEAST = 0.1, 100
_SHOWN = 20


class Damage(NamedTuple):
    """What is wrong with one record."""

    record: int
    where: str
    reason: str


class Listing:
    """The damaged records that this process has met, and a file with a line for each.

    Attributes:
        count: of different records, those in the file at the start included.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._known: set[tuple[str, str]] = set()
        # Of each source, how many records were read, and how many of these were bad.
        self._counts: dict[int, tuple[int, int]] = {}
        self._left_to_others = False

    @property
    def count(self) -> int:
        return len(self._known)

    @contextlib.contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Lists in a file, which is made when there is something to list."""
        with self._lock:
            self._path, self._known, self._counts = path, set(), {}
            if path.exists():
                lines = path.read_text(encoding='utf-8').splitlines()
                # The last line may have been cut off.
                cells = [line.split('\t') for line in lines]
                self._known = {(each[0], each[1]) for each in cells if len(each) == 3}
        try:
            yield
        finally:
            if self._known:
                logging.warning('%d damaged record(s) left out, listed in %s', self.count, path)
            with self._lock:
                self._path = None

    def has(self, record: int, where: str) -> bool:
        """Whether a record is listed; its number alone may be that of another source's too."""
        return (str(record), _in_line(where)) in self._known

    def leave_to_others(self) -> None:
        """Lists and counts nothing from now on, because who gets the batches does."""
        self._left_to_others = True

    def read(self, source: Source, count: int, bad: int) -> None:
        """Counts records read of a source and bad ones among them.

        Raises:
            BadRecord: too many are bad.
        """
        if self._left_to_others:
            return
        with self._lock:
            so_far, bad_so_far = self._counts.get(id(source), (0, 0))
            self._counts[id(source)] = so_far + count, bad_so_far + bad
        if bad and self.is_too_much:
            raise BadRecord(self.complaint())

    @property
    def is_too_much(self) -> bool:
        read, bad = self._worst
        return bad >= _AT_LEAST and bad > _MOST * read

    @property
    def _worst(self) -> tuple[int, int]:
        counts = [each for each in self._counts.values() if each[1]]
        return max(counts, key=lambda each: each[1] / each[0], default=(0, 0))

    def complaint(self) -> str:
        read, bad = self._worst
        where = f' They are listed in {self._path}.' if self._path else ''
        return (
            f'{bad} of {read} records read so far are damaged, more than one in ten. '
            f'Are these the right data, and Data and the source set as they are?{where}'
        )

    def add(self, damage: Damage) -> None:
        """Lists a record, once."""
        with self._lock:
            record, where = cells = str(damage.record), _in_line(damage.where)
            if cells in self._known or self._left_to_others:
                return
            self._known.add(cells)
            count = len(self._known)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, 'a', encoding='utf-8') as file:
                    file.write(f'{record}\t{where}\t{_in_line(damage.reason)}\n')
        if count <= _SHOWN:
            more = '; the next ones are only listed' if count == _SHOWN else ''
            logging.warning('left out %s: %s%s', damage.where, damage.reason, more)


def _in_line(text: str) -> str:
    return re.sub(r'\s+', ' ', text)


# One for the process, as the readers run in threads of TensorFlow's.
listing = Listing()
