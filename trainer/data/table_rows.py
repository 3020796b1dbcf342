"""The rows of a table on disk, each of one fixed size, and what is known of their columns."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# What a column may hold, and how a cell of it is stored. A missing number is NaN, a missing text
# is number 0 of the vocabulary, the empty one; whole numbers are never missing.
CELLS = {'number': '<f4', 'integer': '<i8', 'text': '<i4'}

ROWS, COLUMNS = 'rows.bin', 'columns.json'


def row_type(kinds: Sequence[str]) -> np.dtype:
    """Returns the type of a row: one vector for each kind, of its columns in their order."""
    return np.dtype([(kind, cell, (kinds.count(kind),)) for kind, cell in CELLS.items()])


@dataclasses.dataclass(frozen=True)
class Column:
    """What is known of a column.

    Attributes:
        kind: 'number', 'integer' or 'text'.
        place: its number among the columns of this kind.
        missing: how many values are missing.
        least, greatest: of the whole numbers in it; None for other kinds.
        vocabulary: all texts in it, each one once, the first of them ''; None for other kinds.
    """

    kind: str
    place: int
    missing: int
    least: int | None = None
    greatest: int | None = None
    vocabulary: tuple[str, ...] | None = None


class Rows:
    """What `table_build.build` has written.

    Attributes:
        columns: name -> `Column`.
        counts: rows of each file.
        array: the rows, of `row_type`, where they lie on disk.
        fingerprint: sha256 over names, kinds and values.
    """

    def __init__(self, directory: Path):
        known = json.loads((directory / COLUMNS).read_text(encoding='utf-8'))
        self.counts: list[int] = known['counts']
        self.fingerprint: str = known['fingerprint']
        self.columns: dict[str, Column] = {}
        kinds: list[str] = []
        for name, column in known['columns'].items():
            if column['kind'] == 'text':
                column['vocabulary'] = tuple(column['vocabulary'])
            self.columns[name] = Column(place=kinds.count(column['kind']), **column)
            kinds.append(column['kind'])
        shape = (sum(self.counts),)
        self.array = np.asarray(np.memmap(directory / ROWS, row_type(kinds), 'r', shape=shape))

    def cells(self, name: str) -> np.ndarray:
        """Returns a column: float32, int64, or int32 numbers in the vocabulary."""
        column = self.columns[name]
        return self.array[column.kind][:, column.place]
