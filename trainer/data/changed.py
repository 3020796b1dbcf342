"""What sources have in common that give the examples of another one, changed in some respect."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.data.source import Features, Source


class Changed(Source):
    """Another source under another name: what differs is for subclasses to say.

    Args:
        source: the other one, with random access.
    """

    def __init__(self, source: Source):
        self._source = source
        self.class_names = tuple(source.class_names)

    @property
    def num_examples(self) -> int:
        return self._source.num_examples

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return self._source.element_spec

    def fetch(self, indices: tf.Tensor) -> Features:
        return self._source.fetch(indices)

    def records(self, positions: tf.Tensor, *, seed: int) -> tf.Tensor:
        return self._source.records(positions, seed=seed)

    @property
    def has_own_order(self) -> bool:
        return type(self).records is not Changed.records or self._source.has_own_order

    @property
    def files(self) -> tuple[str, ...]:
        return self._source.files

    def where(self, index: int) -> str:
        return self._source.where(index)

    def stored(self, indices: np.ndarray) -> dict[str, Sequence[bytes]]:
        return self._source.stored(indices)

    def bounds(self, feature: str) -> tuple[float, float] | None:
        return self._source.bounds(feature)
