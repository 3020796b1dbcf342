"""Part of a source, such as what is held out for evaluation."""

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.data import order
from trainer.data.changed import Changed
from trainer.data.source import Features, Source, refuse_stream
from trainer.errors import ConfigError


class Subset(Changed):
    """The examples from one fraction to another of a source in a fixed random order.

    Subsets of the same source and seed whose ranges do not overlap have no example in common, and
    ranges that follow each other leave none out, so 10 % are held out by `end=0.1` for evaluation
    and `begin=0.1` for training. Which examples these are depends on their number and the seed.

    Args:
        source: the whole.
        begin, end: fractions from 0 to 1, rounded to whole examples.
        seed: of the split, in [0, 2**31); it has nothing to do with the seed of a run.

    Raises:
        ConfigError: the range is not one, or holds no example; or the source is a stream.
    """

    def __init__(self, source: Source, begin: float = 0.0, end: float = 1.0, seed: int = 0):
        if not 0 <= begin < end <= 1:
            raise ConfigError(
                f'A subset from {begin!r} to {end!r} is none: begin and end are fractions from 0 '
                'to 1, and begin is the smaller one.'
            )
        if not 0 <= seed < 2**31:
            raise ConfigError(f'subset.seed is {seed!r}; it must be from 0 to 2**31 - 1.')
        refuse_stream(source, 'subset', 'make a stream of each part.')
        if source.has_own_order:
            raise ConfigError(
                f'A {type(source).__name__} has an order of its own, of which no part can be '
                'taken. Take subsets of what it is made of.'
            )
        total = source.num_examples
        super().__init__(source)
        self._seed = seed
        self._first, self._end = round(begin * total), round(end * total)
        if self._first == self._end:
            raise ConfigError(
                f'The subset from {begin} to {end} of {total} examples holds none of them.'
            )

    @property
    def num_examples(self) -> int:
        return self._end - self._first

    @property
    def fingerprint(self) -> str:
        """SHA-256 over that of the whole, and which part it is."""
        part = (self._source.fingerprint, self._first, self._end, self._seed)
        return hashlib.sha256(repr(part).encode()).hexdigest()

    @property
    def has_own_order(self) -> bool:
        return False

    def records(self, positions: tf.Tensor, *, seed: int) -> tf.Tensor:
        # Every epoch a permutation of the part, and not what the whole would read.
        return Source.records(self, positions, seed=seed)

    def fetch(self, indices: tf.Tensor) -> Features:
        return self._source.fetch(self._in_source(indices))

    def stored(self, indices: np.ndarray) -> dict[str, Sequence[bytes]]:
        return self._source.stored(self._in_source(tf.constant(indices, tf.int64)).numpy())

    def where(self, index: int) -> str:
        return self._source.where(int(self._in_source(tf.constant([index], tf.int64))[0]))

    def _in_source(self, indices: tf.Tensor) -> tf.Tensor:
        # The order of a run's first epoch, under another seed.
        return order.records(
            indices + self._first,
            num_examples=self._source.num_examples,
            seed=order.other_seed(self._seed, 'subset'),
        )


def subset(source: Source, begin: float = 0.0, end: float = 1.0, seed: int = 0) -> Subset:
    """Returns part of a source, see `Subset`."""
    return Subset(source, begin, end, seed)
