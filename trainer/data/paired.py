"""Two views of every image, for models that learn from images alone."""

import functools
import hashlib

import tensorflow as tf

from trainer.data import order
from trainer.data.augment import Augmentation, expect
from trainer.data.changed import Changed
from trainer.data.source import Features, Source, refuse_stream
from trainer.errors import ConfigError, nearest


class Paired(Changed):
    """Another source with one of its features twice; see `paired`."""

    def __init__(self, source: Source, feature: str = 'image', second: str = 'view'):
        refuse_stream(source, 'paired', 'let its elements have both.')
        spec = source.element_spec
        if feature not in spec:
            raise ConfigError(
                f'paired.feature names {feature!r}, but the features are {sorted(spec)}.'
                f'{nearest(feature, spec)}'
            )
        if second in spec:
            raise ConfigError(
                f'paired.second is {second!r}, which is a feature already. Give it another name.'
            )
        super().__init__(source)
        self._feature, self._second = feature, second

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        spec = self._source.element_spec
        return {**spec, self._second: spec[self._feature]}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the other source's, and the settings."""
        settings = f'paired {self._feature} {self._second} {self._source.fingerprint}'
        return hashlib.sha256(settings.encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        features = self._source.fetch(indices)
        return {**features, self._second: tf.identity(features[self._feature])}

    def bounds(self, feature: str) -> tuple[float, float] | None:
        return self._source.bounds(self._feature if feature == self._second else feature)


def paired(source: Source, feature: str = 'image', second: str = 'view') -> Paired:
    """Gives the examples of a source with one feature twice, for `two_views` to tell apart.

    Args:
        source: The examples.
        feature: Which feature.
        second: The name of the copy.

    Raises:
        ConfigError: There is no such feature, or the name is taken.
    """
    return Paired(source, feature, second)


def two_views(augment: Augmentation, feature: str = 'image', second: str = 'view') -> Augmentation:
    """Returns an augmentation that is applied to both copies of a feature, with other numbers.

    Args:
        augment: (features, seeds) -> features, which changes `feature`.
        feature, second: as for `paired`.
    """

    def apply(features: Features, seeds: tf.Tensor) -> Features:
        expect(features, second)
        one = augment(features, order.fold(seeds, 0))
        other = augment({**features, feature: features[second]}, order.fold(seeds, 1))
        return {**one, second: other[feature]}

    return apply
