"""What the sources of serialised records in files share: runs of neighbours, parsing, places."""

import abc
import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data import example
from trainer.data.source import Features, Source
from trainer.errors import BadRecord, shown


class Runs(NamedTuple):
    """R runs of neighbouring records of one file each.

    Attributes:
        file: int64 [R], the numbers of the files.
        begin, end: int64 [R], record numbers, the end exclusive.
    """

    file: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Records(Source):
    """A source of records in files, each a serialised `tf.train.Example`.

    Args:
        paths: the files.
        firsts: int64 [len(paths) + 1], the number of each file's first record, and of all records.
        features: what the records hold, from `example.spec`.
    """

    def __init__(self, paths: Sequence[str], firsts: np.ndarray, features: example.Spec):
        self._paths, self._firsts, self._features = paths, firsts, features

    def _check(self) -> None:
        """Raises ConfigError if the first record does not hold what the features say."""
        with contextlib.suppress(BadRecord):  # Whether it may be damaged is for others to say.
            example.check(self.read(np.array([0]))[0], self._features, self.where(0))

    @abc.abstractmethod
    def _read(self, runs: Runs) -> Sequence[bytes]:
        """Returns the records of all runs, one after another; called in several threads at once.

        Raises:
            BadRecord: one is damaged.
            OSError: a file is out of reach.
        """

    @property
    @abc.abstractmethod
    def file_fingerprints(self) -> tuple[str, ...]:
        """What tells each file from others of its size, even where some records are damaged."""

    @property
    def num_examples(self) -> int:
        return int(self._firsts[-1])

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return example.element_spec(self._features)

    def fetch(self, indices: tf.Tensor) -> Features:
        # Called stateful, TensorFlow would keep the calls in order: with op determinism on, only
        # one batch at a time would be read.
        serialized = tf.numpy_function(self.read, [indices], tf.string, stateful=False)
        return example.parse(tf.ensure_shape(serialized, indices.shape[:1]), self._features)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns records as they are stored, in the order asked for.

        Args:
            indices: int64 [B], B at least 1.

        Returns:
            [B], an array of `bytes`: one of numpy's strings would lose zeros at the end.

        Raises:
            BadRecord: one is damaged.
            OSError: a file is out of reach.
        """
        order = np.argsort(indices)
        ordered = indices[order]
        file = np.searchsorted(self._firsts, ordered, 'right') - 1
        apart = (np.diff(ordered) != 1) | (np.diff(file) != 0)
        begin = np.concatenate([[0], np.flatnonzero(apart) + 1])
        end = np.append(begin[1:], len(ordered))
        contents = self._read(Runs(file[begin], ordered[begin], ordered[end - 1] + 1))
        records = np.empty(len(order), object)
        records[order] = contents
        return records

    def stored(self, indices: np.ndarray) -> dict[str, Sequence[bytes]]:
        images = [name for name, each in self._features.items() if each.storage == 'image']
        if not images:
            return {}
        wanted = {name: tf.io.FixedLenFeature([], tf.string) for name in images}
        found = tf.io.parse_example(self.read(indices), wanted)
        return {name: found[name].numpy().tolist() for name in images}

    def where(self, index: int) -> str:
        file = int(np.searchsorted(self._firsts, index, 'right')) - 1
        return f'{shown(self._paths[file])}, record {index - int(self._firsts[file])}'
