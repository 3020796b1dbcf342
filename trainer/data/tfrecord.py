"""TFRecord files with random access."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data.files import Range, expand, read_ranges
from trainer.data.records import Records
from trainer.data.tfrecord_index import FOOTER, HEADER, index, masked_checksums
from trainer.errors import BadRecord


class TFRecords(Records):
    """A source over the records of TFRecord files, in the order of the files.

    Args:
        files: paths, glob patterns or URLs, see `files.expand`.
        features: what the records hold, see `example.spec`.
        bounds: feature -> least and greatest value, where they are known.

    Raises:
        ConfigError: a file is missing, empty, compressed, cut off, or its framing damaged.
        OSError: a file is out of reach.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        features: Mapping[str, Any],
        bounds: Mapping[str, Sequence[float]] | None = None,
    ):
        super().__init__(features, bounds)
        self._paths = expand(files)
        self._index = index(self._paths)

    @property
    def num_examples(self) -> int:
        return len(self._index.checksums)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the lengths and checksums of all records, as the files have them."""
        return self._index.fingerprint

    def read(self, indices: np.ndarray) -> Sequence[bytes]:
        # In the order in which they lie, neighbours at once.
        order = np.argsort(indices)
        sorted_indices = indices[order]
        contents = self._read_sorted(sorted_indices)
        wrong = masked_checksums(contents) != self._index.checksums[sorted_indices]
        if wrong.any():
            bad = int(sorted_indices[np.argmax(wrong)])
            raise BadRecord(f'{self.where(bad)}: the contents do not fit their checksum')
        unsorted = np.empty(len(order), object)
        unsorted[order] = contents
        return unsorted

    def where(self, index: int) -> str:
        begin = int(self._index.positions[index])
        file = int(np.searchsorted(self._index.starts, begin, 'right')) - 1
        start = self._index.starts[file]
        first = int(np.searchsorted(self._index.positions, np.uint64(start)))
        return f'{self._paths[file]}, record {index - first} (byte {begin - start})'

    def _read_sorted(self, indices: np.ndarray) -> list[bytes]:
        starts = self._index.starts
        begins = self._index.positions[indices].astype(np.int64)
        ends = self._index.positions[indices + 1].astype(np.int64)
        file_of = np.searchsorted(starts, begins, 'right') - 1
        alone = (begins[1:] != ends[:-1]) | (file_of[1:] != file_of[:-1])
        first = np.flatnonzero(np.concatenate([[True], alone]))
        last = np.append(first[1:], len(indices)) - 1
        offsets = begins + HEADER - starts[file_of]
        lengths = ends - begins - HEADER - FOOTER
        paths = map(self._paths.__getitem__, file_of[first].tolist())
        extents = ends[last] - begins[first] - HEADER - FOOTER
        runs = read_ranges(list(map(Range, paths, offsets[first].tolist(), extents.tolist())))
        if len(runs) == len(indices):
            return runs
        contents = []
        at = (begins - np.repeat(begins[first], last - first + 1)).tolist()
        run_of = np.repeat(np.arange(len(runs)), last - first + 1).tolist()
        for run, begin, length in zip(run_of, at, lengths.tolist(), strict=True):
            contents.append(runs[run][begin : begin + length])
        return contents


def tfrecord(files: str | Sequence[str], features: Mapping[str, Any]) -> TFRecords:
    """Reads TFRecord files of `tf.train.Example`s, of any number and size, in any order.

    Where each record begins is found at the first start, and kept beside the files.

    Args:
        files: paths, glob patterns or URLs: 'train-*.tfrecord'. Not compressed.
        features: name -> (dtype, shape), or (dtype, shape, 'values', 'bytes' or 'image').

    Returns:
        The source.

    Raises:
        ConfigError: a file is missing, empty, compressed, cut off, or its framing damaged.
    """
    return TFRecords(files, features)
