"""From files to the rows of a table, the types of its columns decided over all the data.

The files are read once, in batches. The cells of each column go to a file of its own. When all is
read the types are known, and the columns are woven into rows, so that a record is read from one
place. Only a column that begins with numbers and turns out to hold texts is read a second time.
"""

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.data import table_files, table_rows
from trainer.data.table_column import Column
from trainer.errors import ConfigError


def build(
    directory: Path,
    paths: Sequence[str],
    form: table_files.Format,
    columns: Sequence[str],
    kinds: Mapping[str, str],
    required: str | None,
) -> None:
    """Writes the rows of files for `table_rows.Rows`.

    Args:
        directory: an empty one.
        paths: CSV and Parquet files.
        form: how they are written.
        columns: which columns.
        kinds: of some of them, column -> 'integer', 'number' or 'text'; the others are found out.
        required: the column in which no value may be missing.

    Raises:
        ConfigError: the files are damaged or empty, or hold what a table cannot.
    """
    found: dict[str, Column] = {}
    decided: dict[str, str] = {}
    while unread := [name for name in columns if name not in found]:
        cells = {name: directory / f'{columns.index(name)}.cells' for name in unread}
        reading = _Reading(cells, {**kinds, **decided}, required)
        counts = reading.read(paths, form)
        for column in reading.columns:
            decided[column.name] = column.decide()
            if column.is_kept(decided[column.name]):
                found[column.name] = column
    if not sum(counts):
        raise ConfigError(f'There are no rows in {", ".join(paths)}.')
    _weave(directory, [found[name] for name in columns], decided, counts)


class _Reading:
    """One pass over the files, for some of the columns."""

    def __init__(self, cells: Mapping[str, Path], kinds: Mapping[str, str], required: str | None):
        self._paths: list[str] = []
        self._firsts: list[int] = []  # The first row of each file begun, over all files.
        self.columns = [
            Column(name, kinds.get(name), path, self.where, name == required)
            for name, path in cells.items()
        ]

    def read(self, paths: Sequence[str], form: table_files.Format) -> list[int]:
        """Hands all cells to the columns; returns the number of rows of each file."""
        rows = 0
        for path in paths:
            self._paths.append(path)
            self._firsts.append(rows)
            for batch in table_files.batches(path, form, [column.name for column in self.columns]):
                for column, cells in zip(self.columns, batch.columns, strict=True):
                    column.add(cells)
                rows += batch.num_rows
        for column in self.columns:
            column.close()
        return np.diff([*self._firsts, rows]).tolist()

    def where(self, row: int) -> str:
        file = bisect.bisect_right(self._firsts, row) - 1
        return f'{self._paths[file]}, row {row - self._firsts[file] + 1}'


def _weave(
    directory: Path, columns: Sequence[Column], kinds: Mapping[str, str], counts: Sequence[int]
) -> None:
    """Writes the rows, and what is known of the columns; deletes the cells."""
    names = [column.name for column in columns]
    row_type = table_rows.row_type([kinds[name] for name in names])
    described, places = {}, []
    for column in columns:
        kind = kinds[column.name]
        places.append((kind, sum(k == kind for k, _ in places)))
        described[column.name] = {'kind': kind, 'missing': column.missing}
        if kind == 'text':
            described[column.name]['vocabulary'] = list(column.vocabulary)
    digest = hashlib.sha256(json.dumps(described).encode())
    with open(directory / table_rows.ROWS, 'wb') as file:
        for blocks in zip(*(c.blocks(kinds[c.name]) for c in columns), strict=True):
            rows = np.empty(len(blocks[0]), row_type)
            for name, (kind, place), block in zip(names, places, blocks, strict=True):
                rows[kind][:, place] = block
                if kind == 'integer':
                    known = described[name]
                    least, greatest = int(block.min()), int(block.max())
                    known['least'] = min(least, known.get('least', least))
                    known['greatest'] = max(greatest, known.get('greatest', greatest))
            file.write(rows.data)
            digest.update(rows.data)
    for column in columns:
        column.delete()
    known = {'counts': list(counts), 'fingerprint': digest.hexdigest(), 'columns': described}
    (directory / table_rows.COLUMNS).write_text(json.dumps(known), encoding='utf-8')
