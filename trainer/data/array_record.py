"""ArrayRecord files, which are made for random access: the end of each says where its records are.

The format and its library are https://github.com/google/array_record. Each record, or group of
them, is a chunk with checksums of its own, which the library compares whenever it reads one.
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from trainer.data import example, kept
from trainer.data import files as data_files
from trainer.data.records import Records, Runs
from trainer.errors import BadRecord, ConfigError, ReadError

_THREADS = 16
# Nothing is read ahead: the next record asked for lies elsewhere.
_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
_BUFFER = 2**12
# Bytes at the beginning, up to the first record's size and checksum; and those at the end that say
# where the list of all records begins, which is behind the last of them.
_HEAD, _END = 104, 2**16
# The library raises the same error for damage and for what the system refuses: 'pread() failed:'.
_SYSTEM_FAILED = re.compile(r'\b\w+\(\) failed: ')


class ArrayRecords(Records):
    """A source over the records of ArrayRecord files, in the order of the files.

    A file is opened when it is first read from. It then takes memory for where its records are,
    8 bytes for each.

    Args:
        files: paths or glob patterns. The library reads paths of this machine only, no URLs.
        features: what the records hold, see `example.spec`.

    Raises:
        ConfigError: `features` cannot be; a file is missing, cut off, damaged at its end, without
            records, a URL, or no ArrayRecord file; the first record holds something else than
            `features`.
    """

    def __init__(self, files: str | Sequence[str], features: Mapping[str, Any]):
        spec = example.spec(features)
        _library()
        for path in [files] if isinstance(files, str) else files:
            if data_files.is_url(path):
                raise ConfigError(
                    f'{path!r} is a URL, and ArrayRecord files are read by paths only. Mount what '
                    'it names as a directory, or use TFRecord files, which are read by URL.'
                )
        paths = data_files.expand(files)
        directory = kept.keep('array-record-2', paths, functools.partial(_build, paths))
        firsts = np.load(directory / 'firsts.npy')
        super().__init__(paths, firsts, spec)
        self._fingerprint, *prints = (directory / 'fingerprints').read_text('ascii').split()
        self._file_fingerprints = tuple(prints)
        self._readers = data_files.HeldOpen(_open)
        self._check()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `files.fingerprint` of all files; their ends say where records lie."""
        return self._fingerprint

    @property
    def file_fingerprints(self) -> tuple[str, ...]:
        return self._file_fingerprints

    def _read(self, runs: Runs) -> Sequence[bytes]:
        begins = (runs.begin - self._firsts[runs.file]).tolist()
        ends = (runs.end - self._firsts[runs.file]).tolist()
        records: list[bytes] = []
        paths = [self._paths[file] for file in runs.file.tolist()]
        for path, begin, end in zip(paths, begins, ends, strict=True):
            try:
                # Of a range, as for a list of numbers the library goes through all chunks of the
                # file: 0.4 ms for each call with 200,000 records.
                records += self._readers.get(path).read(begin, end)
            except (RuntimeError, IndexError) as error:
                if _SYSTEM_FAILED.search(str(error)):
                    raise ReadError(f'{path} could not be read: {error}') from error
                raise BadRecord(str(error)) from error
        return records


def array_record(files: str | Sequence[str], features: Mapping[str, Any]) -> ArrayRecords:
    """Reads ArrayRecord files of `tf.train.Example`s, of any number and size, in any order.

    Args:
        files: paths or glob patterns: 'train-*.array_record'. No URLs.
        features: name -> (dtype, shape), or (dtype, shape, 'values', 'bytes' or 'image').

    Returns:
        The source.

    Raises:
        ConfigError: a file is missing, cut off, damaged at its end, without records, or no
            ArrayRecord file.
    """
    return ArrayRecords(files, features)


def _library() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise ConfigError(
            "To read ArrayRecord files array_record is needed: pip install 'phalanx[records]'."
        ) from None
    return array_record_module


def _open(path: str) -> Any:
    """Returns a reader, which several threads may use at once.

    Raises:
        OSError: the file is out of reach.
        RuntimeError: it is no ArrayRecord file, or its end is damaged.
    """
    reader = _library().ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        with open(path, 'rb'):  # A more telling error, if it is not there at all.
            pass
        reader.read([0])  # It is by reading that one is told why.
    return reader


def _build(paths: Sequence[str], directory: Path) -> None:
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        counts = list(pool.map(_count, paths))
        edges = list(pool.map(data_files.fingerprint, paths))
        prints = list(pool.map(file_fingerprint, paths))
    np.save(directory / 'firsts.npy', np.cumsum([0, *counts], dtype=np.int64))
    prints.insert(0, hashlib.sha256('\n'.join(edges).encode()).hexdigest())
    (directory / 'fingerprints').write_text('\n'.join(prints), encoding='ascii')


def file_fingerprint(path: str) -> str:
    """Returns a sha256, in hex digits, of what says how large the records are and what is first.

    Of no record the contents are in it, so damage to them does not change it.

    Raises:
        OSError: the file is out of reach.
    """
    size = data_files.stat(path).size
    end = max(0, size - _END)
    parts = [data_files.Range(path, 0, min(_HEAD, size)), data_files.Range(path, end, size - end)]
    contents = b''.join(data_files.read_ranges(parts))
    return hashlib.sha256(b'%d\n' % size + contents).hexdigest()


def _count(path: str) -> int:
    try:
        reader = _open(path)
    except RuntimeError as error:
        if _SYSTEM_FAILED.search(str(error)):
            raise ReadError(f'{path} could not be read: {error}') from error
        raise ConfigError(
            f'{path} is no ArrayRecord file, or cut off or damaged at its end ({error}). Fetch or '
            'write it again.'
        ) from error
    if not reader.num_records():
        raise ConfigError(f'{path} holds no records. Leave it out, or write it again.')
    group = re.search(r'group_size:(\d+)', reader.writer_options_string())
    if group and group[1] != '1':
        logging.warning(
            '%s was written in groups of %s records: to read one, all of its group are read. '
            "Written with 'group_size:1' it can be read faster.",
            path,
            group[1],
        )
    return reader.num_records()
