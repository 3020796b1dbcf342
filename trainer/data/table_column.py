"""One column of a table while its files are read: what it holds, and where its cells are put."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data import table_rows
from trainer.errors import ConfigError

_NUMBER = r'^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$'
_MAX_VOCABULARY = 2**20
_MAX_TEXT_BYTES = 2**16
_MAX_NUMBER = float(np.finfo(np.float32).max)
# Beyond, float32 takes two whole numbers for one.
_EXACT = 2**24
_ROWS_AT_ONCE = 2**16


class Column:
    """What was seen of a column so far, and the file of its cells.

    A cell takes 8 bytes there: a number as it is, a text as its place in the vocabulary.

    Attributes:
        name: of the column.
        vocabulary: text -> its place; '' is at 0.
        missing: how many values are missing.

    Args:
        name: of the column.
        kind: what it must hold; None if that is to be found out.
        path: of the file.
        where: row -> where it lies.
        required: whether no value may be missing.
    """

    def __init__(
        self, name: str, kind: str | None, path: Path, where: Callable[[int], str], required: bool
    ):
        self.name, self._kind, self._where, self._required = name, kind, where, required
        self.vocabulary = {'': 0}
        self.missing = 0
        self._rows = self._present = self._numbers = self._truths = 0
        self._whole = self._exact = True
        self._odd: tuple[int, str] | None = None  # The first cell that is no number.
        self._gap: int | None = None  # The first row without a value.
        # What goes to the file; False from where texts follow upon numbers.
        self._writes: str | bool | None = 'text' if kind == 'text' else None
        # What lies in it from which row on: 'integer', 'number', 'text', or 'missing'.
        self._parts: list[tuple[int, str]] = []
        self._path = path
        self._file = open(path, 'wb')  # noqa: SIM115

    def close(self) -> None:
        """Ends the file of the cells."""
        self._file.close()

    def delete(self) -> None:
        """Deletes it."""
        self._path.unlink()

    def add(self, cells: pa.Array) -> None:
        """Takes the cells of the next rows."""
        if not len(cells):
            return
        cells = self._plain(cells)
        present = len(cells) - cells.null_count
        if cells.null_count:
            row = self._rows + int(np.argmax(cells.is_null().to_numpy(zero_copy_only=False)))
            self._gap = row if self._gap is None else self._gap
            if self._required:
                raise ConfigError(
                    f'{self._where(row)}: the label, {self.name!r}, is '
                    'missing. Give it one, or remove the row.'
                )
            if self._kind == 'integer':
                raise ConfigError(
                    f'{self._where(row)}: {self.name!r} is missing, but whole numbers are wanted. '
                    + self._declare('number')
                )
        if not present:
            self._write('missing', np.zeros(len(cells), np.int64))
        else:
            self._take(cells, present)
        self.missing += len(cells) - present
        self._present += present
        self._rows += len(cells)

    def decide(self) -> str:
        """Returns what the column holds, now that all is known.

        Raises:
            ConfigError: it holds both numbers and texts, or what float32 would blur.
        """
        if self._kind is not None:
            return self._kind
        if self._truths == self._present > 0:
            return 'number' if self.missing else 'integer'
        if self._numbers < self._present:
            if 2 * self._numbers > self._present:
                raise ConfigError(self._mixed())
            return 'text'
        if self._whole and not self.missing and self._present:
            return 'integer'
        if self._whole and not self._exact:
            raise ConfigError(
                f'{self._where(self._gap)}: {self.name!r} is missing, and elsewhere it holds whole '
                f'numbers above {_EXACT}, which float32 would blur. '
                + f"Set table.types = {{{self.name!r}: 'text'}} for identifiers, or 'number'."
            )
        return 'number'

    def is_kept(self, kind: str) -> bool:
        """Whether the file has all that a column of this kind needs."""
        return self._writes in ('text' if kind == 'text' else 'numbers', None)

    def blocks(self, kind: str) -> Iterator[np.ndarray]:
        """Yields the cells as they are stored in rows, `_ROWS_AT_ONCE` at a time."""
        fill = {'number': np.nan, 'integer': 0, 'text': 0}[kind]
        stored = np.memmap(self._path, np.int64, 'r') if self._rows else np.zeros(0, np.int64)
        ends = [start for start, _ in self._parts[1:]] + [self._rows]
        part = 0
        for first in range(0, self._rows, _ROWS_AT_ONCE):
            end = min(first + _ROWS_AT_ONCE, self._rows)
            block = np.full(end - first, fill, table_rows.CELLS[kind])
            at = first
            while at < end:
                held, stop = self._parts[part][1], min(end, ends[part])
                cells = stored[at:stop]
                if held != 'missing':
                    cells = cells.view(np.float64) if held == 'number' else cells
                    block[at - first : stop - first] = cells
                part += stop == ends[part]
                at = stop
            yield block

    def _plain(self, cells: pa.Array) -> pa.Array:
        """Returns the cells as strings, int64 or float64, with nulls where nothing is."""
        kind = cells.type
        if pa.types.is_dictionary(kind):
            cells, kind = cells.dictionary_decode(), kind.value_type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
            cells = cells.cast(pa.string())
            # An empty text is a missing one, whatever else the file calls missing.
            return pc.if_else(pc.equal(cells, ''), pa.scalar(None, pa.string()), cells)
        try:
            if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
                cells = cells.cast(pa.int64())
            elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
                cells = cells.cast(pa.float64())
                cells = pc.if_else(pc.is_nan(cells), pa.scalar(None, pa.float64()), cells)
            else:
                raise pa.ArrowInvalid('neither number nor text')
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f'{self._where(self._rows)}: the column {self.name!r} holds {kind}: {error}. Write '
                'what a model can use of it as columns of their own, or leave it out by naming '
                'the others in table.columns.'
            ) from None
        return cells.cast(pa.string()) if self._kind == 'text' else cells

    def _take(self, cells: pa.Array, present: int) -> None:
        """Looks at cells of which some are present, and writes them."""
        if self._kind == 'text':
            numbers = None
        elif pa.types.is_string(cells.type):
            numbers = self._say_numbers(cells, present)
        else:
            numbers, self._numbers = cells, self._numbers + present
        if numbers is not None:
            self._check_numbers(numbers)
        if self._writes is None:
            self._writes = 'text' if numbers is None else 'numbers'
        if self._writes == 'text':
            self._write('text', self._codes(cells.cast(pa.string())))
        elif numbers is None:
            self._writes = False
        elif self._writes and (numbers.null_count or pa.types.is_floating(numbers.type)):
            values = numbers.cast(pa.float64()).fill_null(np.nan)
            self._write('number', values.to_numpy(zero_copy_only=False))
        elif self._writes:
            self._write('integer', numbers.to_numpy(zero_copy_only=False))

    def _say_numbers(self, texts: pa.Array, present: int) -> pa.Array | None:
        """Returns the numbers that texts say, true and false as 1 and 0; None if one says none.

        Raises:
            ConfigError: the column must hold numbers.
        """
        numbers = _parsed(texts)
        if numbers is not None:
            self._numbers += present
            return numbers
        encoded = texts.dictionary_encode()
        distinct = encoded.dictionary
        are_numbers = pc.match_substring_regex(distinct, _NUMBER).to_numpy(zero_copy_only=False)
        if are_numbers.all():
            # Written as pyarrow does not read them.
            self._numbers += present
            return pa.array([float(text) for text in distinct.to_pylist()]).take(encoded.indices)
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if self._odd is None:
            row = int(np.argmax(~are_numbers[codes] & (codes >= 0)))
            self._odd = (self._rows + row, texts[row].as_py())
        if len(distinct) <= 6 and {t.lower() for t in distinct.to_pylist()} <= {'true', 'false'}:
            self._truths += present
            return pc.equal(pc.utf8_lower(texts), 'true').cast(pa.int64())
        self._numbers += int(np.sum(are_numbers[codes] & (codes >= 0)))
        if self._kind is not None:
            row, value = self._odd
            raise ConfigError(
                f'{self._where(row)}: {self.name!r} is {value!r}, which is no number. '
                + self._mend_odd()
            )
        return None

    def _check_numbers(self, numbers: pa.Array) -> None:
        least, greatest = (pc.min_max(numbers)[end].as_py() for end in ('min', 'max'))
        if not -_MAX_NUMBER <= least <= greatest <= _MAX_NUMBER:
            values = numbers.cast(pa.float64()).fill_null(0).to_numpy(zero_copy_only=False)
            place = int(np.argmax(np.abs(values) > _MAX_NUMBER))
            raise ConfigError(
                f'{self._where(self._rows + place)}: {self.name!r} is {values[place]:g}, beyond '
                'what float32 holds. Mend the value, or leave the cell empty if it is '
                'unknown.'
            )
        self._exact &= least >= -_EXACT and greatest <= _EXACT
        self._whole &= pa.types.is_integer(numbers.type)
        if self._kind == 'integer' and not self._whole:
            values = numbers.to_numpy(zero_copy_only=False)
            place = int(np.argmax(values != np.floor(values)))
            raise ConfigError(
                f'{self._where(self._rows + place)}: {self.name!r} is {values[place]:g}, but whole '
                'numbers are wanted. ' + self._declare('number')
            )

    def _codes(self, texts: pa.Array) -> np.ndarray:
        """Returns the place in the vocabulary of each text; a missing one is at 0."""
        encoded = texts.dictionary_encode()
        lengths = pc.max(pc.binary_length(encoded.dictionary)).as_py() or 0
        if lengths > _MAX_TEXT_BYTES:
            raise ConfigError(
                f'{self._where(self._rows)} or below: {self.name!r} holds a text of {lengths} '
                'bytes. Look for a quote that is opened and never closed; a column of long texts '
                'is left out by naming the others in table.columns.'
            )
        known = self.vocabulary
        places = [known.setdefault(t, len(known)) for t in encoded.dictionary.to_pylist()]
        if len(known) > _MAX_VOCABULARY:
            raise ConfigError(
                f'{self._where(self._rows)} or below: {self.name!r} has more than '
                f'{_MAX_VOCABULARY} different texts, so it is no category. Leave it out by naming '
                'the others in table.columns.'
            )
        codes = encoded.indices.fill_null(len(places)).to_numpy(zero_copy_only=False)
        return np.array([*places, 0], np.int64)[codes]

    def _write(self, kind: str, cells: np.ndarray) -> None:
        if self._writes is False:
            return
        if not self._parts or self._parts[-1][1] != kind:
            self._parts.append((self._rows, kind))
        self._file.write(np.ascontiguousarray(cells).data)

    def _mixed(self) -> str:
        row, value = self._odd
        return (
            f'{self._where(row)}: {self.name!r} is {value!r}, but {self._numbers} of the '
            f'{self._present} values in this column are numbers. ' + self._mend_odd()
        )

    def _mend_odd(self) -> str:
        return (
            'Mend the value; or, if it stands for a missing one, add it to table.missing; or, if '
            f"the column holds texts, set table.types = {{{self.name!r}: 'text'}}."
        )

    def _declare(self, kind: str) -> str:
        return f'Set table.types = {{{self.name!r}: {kind!r}}}.'


def _parsed(texts: pa.Array) -> pa.Array | None:
    """Returns the numbers that texts say, int64 or float64; None if one of them says none."""
    numbers = _cast(texts, pa.int64())
    if numbers is not None:
        # To pyarrow 0x1f is a number too.
        return None if pc.any(pc.match_substring_regex(texts, '[xX]')).as_py() else numbers
    numbers = _cast(texts, pa.float64())
    if (
        numbers is None
        and _look_like_numbers(texts.drop_null()[:100])
        and _look_like_numbers(texts)
    ):
        # There are blanks around them, or a sign that pyarrow does not expect.
        plain = pc.utf8_trim_whitespace(texts)
        numbers = _cast(plain, pa.int64())
        numbers = _cast(plain, pa.float64()) if numbers is None else numbers
    if numbers is not None and not pc.all(pc.is_finite(numbers)).as_py():
        # To pyarrow 'infinity' is a number too; and 1e999 is one, if too large.
        return numbers if _look_like_numbers(texts) else None
    return numbers


def _look_like_numbers(texts: pa.Array) -> bool:
    return bool(pc.all(pc.match_substring_regex(texts, _NUMBER)).as_py())


def _cast(texts: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Returns the numbers that texts say to pyarrow; None if one of them says none."""
    try:
        # An attempt that fails takes long, so a few have to do first.
        texts[:100].cast(kind)
        return texts.cast(kind)
    except pa.ArrowInvalid:
        return None
