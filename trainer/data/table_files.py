"""Rows of CSV and Parquet files, some megabytes at a time, with every mistake located.

It reads by pyarrow, local files and URLs alike.
"""

import codecs
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from trainer.data import files
from trainer.errors import ConfigError, nearest

# pyarrow reads some 30 of them ahead. A row must fit into one.
_BLOCK_BYTES = 2**22
_BATCH_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class Format:
    """How the files are written.

    Attributes:
        names: of the columns, where CSV files have no header line.
        delimiter: between two cells of a CSV file; None goes by the name of the file.
        missing: what stands in a CSV file for a value that is not there.
    """

    names: tuple[str, ...] | None
    delimiter: str | None
    missing: tuple[str, ...]


def column_names(
    paths: Sequence[str], form: Format, wanted: Mapping[str, Sequence[str]]
) -> list[str]:
    """Returns the names of all columns of the first file, in their order.

    Args:
        paths: the files.
        form: how they are written.
        wanted: parameter -> the columns it names. With 'table.columns' among them, files may have
            other columns besides; else all must have the same.

    Raises:
        ConfigError: a file is empty or damaged, a name stands twice, or a column is not there.
    """
    first: list[str] = []
    for path in paths:
        names = _names(path, form)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f'{path}: two columns are called {twice[0]!r}. Rename one.')
        first = first or names
        for parameter, columns in wanted.items():
            for name in columns:
                if name not in names:
                    raise ConfigError(
                        f'{parameter} names {name!r}, which is no column of {path}. Its columns '
                        f'are {", ".join(names)}.{_hint(names) or nearest(name, names)}'
                    )
        differing = {*first} ^ {*names}
        if differing and 'table.columns' not in wanted:
            name = min(differing)
            there, not_there = (path, paths[0]) if name in names else (paths[0], path)
            raise ConfigError(
                f'The files have different columns: {name!r} is in {there}, but not in '
                f'{not_there}. Name the columns to be read, which all must have, in table.columns.'
            )
    return first


def _hint(names: Sequence[str]) -> str:
    found = [sign for sign in (';', '\t', '|') if len(names) == 1 and sign in names[0]]
    return f' If cells are separated by {found[0]!r}, set table.delimiter.' if found else ''


def batches(path: str, form: Format, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields some of the columns of a file; all cells of a CSV file as text, missing ones null.

    Raises:
        ConfigError: the file is damaged.
        OSError: it cannot be read.
    """
    with _mistakes_located(path, form):
        if _is_parquet(path):
            with pa.parquet.ParquetFile(_open(path)) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                    yield batch.select(list(columns))
        else:
            yield from _open_csv(path, form, columns)


def _names(path: str, form: Format) -> list[str]:
    with _mistakes_located(path, form):
        if _is_parquet(path):
            with pa.parquet.ParquetFile(_open(path)) as file:
                return file.schema_arrow.names
        return _open_csv(path, form, ()).schema.names


@contextlib.contextmanager
def _mistakes_located(path: str, form: Format) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # Out of reach, which is no mistake in the file.
        raise ConfigError(_located(path, form, error)) from None


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(('.parquet', '.pq'))


def _open_csv(
    path: str,
    form: Format,
    columns: Sequence[str],
    on_bad_row: Callable[[pa.csv.InvalidRow], str] | None = None,
) -> pa.csv.CSVStreamingReader:
    """Opens a CSV file; without `columns` for the sake of its header."""
    delimiter = form.delimiter
    if delimiter is None:
        delimiter = '\t' if path.lower().removesuffix('.gz').endswith(('.tsv', '.tab')) else ','
    return pa.csv.open_csv(
        _open(path),
        pa.csv.ReadOptions(
            block_size=_BLOCK_BYTES,
            column_names=form.names,
            # Only one thread counts the rows.
            use_threads=on_bad_row is None,
        ),
        pa.csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_bad_row
        ),
        pa.csv.ConvertOptions(
            include_columns=list(columns),
            column_types={name: pa.string() for name in columns},
            null_values=list(form.missing),
            strings_can_be_null=True,
        ),
    )


def _open(path: str) -> pa.NativeFile:
    if files.is_url(path):
        opened = pa.PythonFile(io.BufferedReader(_Remote(path), 2**20), 'r')
    else:
        opened = pa.OSFile(path)
    return pa.CompressedInputStream(opened, 'gzip') if path.lower().endswith('.gz') else opened


class _Remote(io.RawIOBase):
    """A URL as the file that pyarrow asks for."""

    def __init__(self, path: str):
        self._path, self._size, self._at = path, files.stat(path).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        content = files.read(self._path, self._at, length) if length else b''
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _located(path: str, form: Format, error: Exception) -> str:
    """Says where in a file the mistake lies that pyarrow complains about."""
    said = ' '.join(str(error).split())
    if 'Empty CSV file' in said:
        return f'{path} is empty.'
    if 'straddling' in said:
        return (
            f'{path} has a row of more than {_BLOCK_BYTES} bytes. Look for a quote that is opened '
            'and never closed.'
        )
    if 'invalid UTF8' in said or isinstance(error, UnicodeDecodeError):
        return (
            f'{path}{_first_bad_byte(path)} is not UTF-8. Convert the file, for example with '
            'iconv --from-code=LATIN1 --to-code=UTF-8.'
        )
    row = _first_bad_row(path, form) if 'Expected' in said else None
    if row is None:
        return f'{path} cannot be read: {said}. Fetch or write it again.'
    number = row.number - (form.names is None)
    return (
        f'{path}, row {number}: {row.actual_columns} cells instead of {row.expected_columns}: '
        f'{row.text[:100]!r}. Mend the row, or say with table.delimiter what stands between cells.'
    )


def _first_bad_row(path: str, form: Format) -> pa.csv.InvalidRow | None:
    bad = []

    def note(row: pa.csv.InvalidRow) -> str:
        bad.append(row)
        return 'error'

    with contextlib.suppress(pa.ArrowInvalid):
        for _ in _open_csv(path, form, (), note):
            pass
    return bad[0] if bad else None


def _first_bad_byte(path: str) -> str:
    decoder, line, offset = codecs.getincrementaldecoder('utf-8')(), 1, 0
    with _open(path) as file:
        while chunk := file.read(_BLOCK_BYTES):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                # Counted from what the decoder still held of the chunk before.
                at = offset - held + error.start
                return f', line {line + chunk.count(10, 0, error.start)}, byte {at}'
            line += chunk.count(b'\n')
            offset += len(chunk)
    return ''
