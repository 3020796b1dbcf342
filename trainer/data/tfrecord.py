"""TFRecord files with random access."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data import example
from trainer.data.compressed import plain
from trainer.data.files import Range, expand, read_ranges
from trainer.data.records import Records, Runs
from trainer.data.tfrecord_index import FOOTER, HEADER, index, masked_checksums
from trainer.errors import BadRecord


class TFRecords(Records):
    """A source over the records of TFRecord files, in the order of the files.

    Args:
        files: paths, glob patterns or URLs, see `files.expand`.
        features: what the records hold, see `example.spec`.

    Raises:
        ConfigError: `features` cannot be; a file is missing, empty, compressed or cut off, or its
            framing damaged; the first record holds something else than `features`.
        OSError: a file is out of reach.
    """

    def __init__(self, files: str | Sequence[str], features: Mapping[str, Any]):
        spec = example.spec(features)
        paths = expand(files)
        self._plain = plain(paths)
        self._index = index(self._plain)
        super().__init__(paths, self._index.firsts, spec)
        self._check()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the lengths and checksums of all records, as the files have them."""
        return self._index.fingerprint

    @property
    def file_fingerprints(self) -> tuple[str, ...]:
        return self._index.file_fingerprints

    def where(self, index: int) -> str:
        begin = int(self._index.positions[index])
        start = self._index.starts[np.searchsorted(self._index.starts, begin, 'right') - 1]
        return f'{super().where(index)} (byte {begin - start})'

    def _read(self, runs: Runs) -> Sequence[bytes]:
        begin = self._index.positions[runs.begin].astype(np.int64)
        end = self._index.positions[runs.end].astype(np.int64)
        offset = begin - self._index.starts[runs.file] + HEADER
        length = end - begin - HEADER - FOOTER
        paths = [self._plain[file] for file in runs.file.tolist()]
        contents = read_ranges(list(map(Range, paths, offset.tolist(), length.tolist())))
        numbers = runs.begin
        if (runs.end - runs.begin > 1).any():
            numbers = np.concatenate(list(map(np.arange, runs.begin, runs.end)))
            contents = [
                record
                for run, first, after in zip(contents, runs.begin, runs.end, strict=True)
                for record in self._cut(run, self._index.positions[first : after + 1])
            ]
        if (masked_checksums(contents) != self._index.checksums[numbers]).any():
            raise BadRecord('its contents do not fit their checksum')
        return contents

    @staticmethod
    def _cut(run: bytes, positions: np.ndarray) -> list[bytes]:
        """Returns the contents in what begins with the first of them and ends with the last."""
        offsets = (positions - positions[0]).tolist()
        return [run[begin : end - HEADER - FOOTER] for begin, end in itertools.pairwise(offsets)]


def tfrecord(files: str | Sequence[str], features: Mapping[str, Any]) -> TFRecords:
    """Reads TFRecord files of `tf.train.Example`s, of any number and size, in any order.

    Where each record begins is found at the first start, and kept beside the files.

    Args:
        files: paths, glob patterns or URLs: 'train-*.tfrecord'. Not compressed.
        features: name -> (dtype, shape), or (dtype, shape, 'values', 'bytes' or 'image').

    Returns:
        The source.

    Raises:
        ConfigError: a file is missing, empty, compressed or cut off, or its framing damaged.
    """
    return TFRecords(files, features)
