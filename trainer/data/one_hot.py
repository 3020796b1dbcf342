"""Labels as one number for each class, for losses and augmentations that need them so."""

import functools
import hashlib

import tensorflow as tf

from trainer.data.changed import Changed
from trainer.data.source import Features, Source, refuse_stream
from trainer.errors import ConfigError, nearest


class OneHot(Changed):
    """Another source with its labels one-hot; see `one_hot`."""

    def __init__(self, source: Source, num_classes: int, label: str = 'label'):
        refuse_stream(source, 'one_hot', 'let its elements, or its `parse`, have such labels.')
        spec = source.element_spec
        if label not in spec:
            raise ConfigError(
                f'one_hot.label names {label!r}, but the features are {sorted(spec)}.'
                f'{nearest(label, spec)}'
            )
        if spec[label].shape.rank or not spec[label].dtype.is_integer:
            raise ConfigError(
                f'The feature {label!r} is {spec[label].dtype.name} of shape '
                f'{list(spec[label].shape)}; one_hot takes class numbers.'
            )
        least, greatest = source.bounds(label) or (0, 0)
        if least < 0 or greatest >= num_classes:
            raise ConfigError(
                f'The labels {label!r} run from {least:g} to {greatest:g}, but one_hot.num_classes '
                f'is {num_classes}. Set NUM_CLASSES = {int(greatest) + 1}, or number the labels '
                'from 0.'
            )
        super().__init__(source)
        self._num_classes, self._label = num_classes, label

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        one_hot = tf.TensorSpec([self._num_classes], tf.float32)
        return {**self._source.element_spec, self._label: one_hot}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the other source's, and the settings."""
        settings = f'one-hot {self._label} {self._num_classes} {self._source.fingerprint}'
        return hashlib.sha256(settings.encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        features = self._source.fetch(indices)
        labels = features[self._label]
        # Else a label that is no class would become no class at all, without a word.
        inside = tf.reduce_all((labels >= 0) & (labels < self._num_classes))
        message = f'a label is not one of the classes 0 to {self._num_classes - 1}'
        with tf.control_dependencies([tf.debugging.Assert(inside, [message])]):
            return {**features, self._label: tf.one_hot(labels, self._num_classes)}

    def bounds(self, feature: str) -> tuple[float, float] | None:
        return None if feature == self._label else self._source.bounds(feature)


def one_hot(source: Source, num_classes: int, label: str = 'label') -> OneHot:
    """Gives the examples of a source with their labels as one number for each class.

    Args:
        source: The examples.
        num_classes: The length of the new labels.
        label: The feature, whole numbers in [0, num_classes).

    Returns:
        A source whose `label` is float32 [num_classes]: 1 for its class and 0 for the others.

    Raises:
        ConfigError: There is no such feature, or its values do not fit.
    """
    return OneHot(source, num_classes, label)
