"""All records of a source one after another, as numpy arrays, with the damaged ones apart."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data.bad_record_list import Damage
from trainer.data.bad_records import DAMAGE, reason
from trainer.data.source import Source

_BATCH_BYTES = 2**24
_LARGEST_BATCH = 256
# Of a string, whose length a spec does not tell.
_STRING_BYTES = 2**10


class Batch(NamedTuple):
    """Neighbouring records.

    Attributes:
        records: int64 [B], the numbers of those that could be read, ascending.
        features: for each feature an array [B, ...].
        bad: those between them that could not.
    """

    records: np.ndarray
    features: dict[str, np.ndarray]
    bad: list[Damage]


class Scan:
    """Reads records of a source outside of any training; may be used by several threads.

    Attributes:
        batch_size: how many records are read at a time, a matter of the source alone.
    """

    def __init__(self, source: Source):
        self._source = source
        spec = source.element_spec
        sizes = [
            _STRING_BYTES if s.dtype == tf.string else s.dtype.size * (s.shape.num_elements() or 1)
            for s in spec.values()
        ]
        self._nothing = {
            n: np.empty([0, *s.shape], s.dtype.as_numpy_dtype) for n, s in spec.items()
        }
        self.batch_size = max(1, min(_LARGEST_BATCH, _BATCH_BYTES // max(1, sum(sizes))))
        self._fetch = tf.function(
            source.fetch, input_signature=[tf.TensorSpec([None], tf.int64)], autograph=False
        ).get_concrete_function()

    def fetch(self, records: np.ndarray) -> dict[str, np.ndarray]:
        """Returns each feature, [B, ...], of records, int64 [B].

        Raises:
            tf.errors.OpError: see `read`, whatever kind it is.
        """
        with tf.device('CPU:0'):
            features = self._fetch(tf.constant(records, tf.int64))
        return {name: tensor.numpy() for name, tensor in features.items()}

    def read(self, records: np.ndarray) -> Batch:
        """Returns records, int64 [B] ascending, damaged ones apart.

        Raises:
            OSError: the files cannot be reached.
        """
        try:
            return Batch(records, self.fetch(records), [])
        except DAMAGE as error:
            if len(records) == 1:
                number = int(records[0])
                bad = Damage(number, self._source.where(number), reason(error))
                return Batch(records[:0], self._nothing, [bad])
        except tf.errors.OpError as error:
            raise OSError(reason(error)) from error
        parts = [self.read(records[i : i + 1]) for i in range(len(records))]
        return Batch(
            np.concatenate([part.records for part in parts]),
            {
                name: np.concatenate([part.features[name] for part in parts])
                for name in parts[0].features
            },
            [bad for part in parts for bad in part.bad],
        )

    def batches(self, first: int, end: int) -> Iterator[np.ndarray]:
        """Yields the records in [first, end) in batches: int64 [B]."""
        for start in range(first, end, self.batch_size):
            yield np.arange(start, min(start + self.batch_size, end))


def spread(source: Source, count: int) -> np.ndarray:
    """Returns the numbers of at most so many records from all over a source: int64, ascending."""
    last = source.num_examples - 1
    return np.unique(np.linspace(0, last, min(count, last + 1)).astype(np.int64))
