"""What the sources of serialised records share: bytes by number, then parsing in the graph."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data import example
from trainer.data.source import Features, Source


class Records(Source):
    """A source of records that are serialised `tf.train.Example`s.

    Args:
        features: what the records hold, see `example.spec`.
        bounds: feature -> least and greatest value, where they are known.

    Raises:
        ConfigError: `features` cannot be.
    """

    def __init__(
        self,
        features: Mapping[str, Any],
        bounds: Mapping[str, Sequence[float]] | None = None,
    ):
        self._spec = example.spec(features)
        self._bounds = dict(bounds or {})

    @abc.abstractmethod
    def read(self, indices: np.ndarray) -> Sequence[bytes]:
        """Returns the serialised records of some numbers; called in several threads at once.

        Args:
            indices: int64 [B].

        Raises:
            BadRecord: one is damaged.
            OSError: a file is out of reach.
        """

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return example.element_spec(self._spec)

    def fetch(self, indices: tf.Tensor) -> Features:
        # To TensorFlow a stateful function is one whose calls it must not reorder: with op
        # determinism on, only one batch at a time would be read.
        serialized = tf.numpy_function(self._strings, [indices], tf.string, stateful=False)
        return example.parse(tf.ensure_shape(serialized, indices.shape[:1]), self._spec)

    def bounds(self, feature: str) -> tuple[float, float] | None:
        found = self._bounds.get(feature)
        return None if found is None else (float(found[0]), float(found[1]))

    def _strings(self, indices: np.ndarray) -> np.ndarray:
        # An array of objects: one of numpy's strings would lose zeros at the end.
        strings = np.empty(len(indices), object)
        strings[:] = self.read(indices)
        return strings
