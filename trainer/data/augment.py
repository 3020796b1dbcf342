"""Transformations of a batch in graph operations: random ones for `Data.augment`, and scaling.

A random transformation takes the features and `seeds`, the keys of the examples (int32 [B, 3], see
`order.example_seeds`), and draws all its numbers from them by `order.uniform`. What happens to an
example thus depends on the seed of the run and on its position in the run, and on nothing else.
Parameters are bound with `functools.partial` or gin; `chain` puts several into a row.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from trainer.data import order
from trainer.data.source import Features
from trainer.errors import ConfigError, nearest

Augmentation = Callable[[Features, tf.Tensor], Features]


def chain(augmentations: Sequence[Augmentation]) -> Augmentation:
    """Returns the augmentation that applies several in turn, each with random numbers of its own.

    Args:
        augmentations: Functions (features, seeds) -> features.
    """

    def apply(features: Features, seeds: tf.Tensor) -> Features:
        for number, augmentation in enumerate(augmentations):
            features = augmentation(features, order.fold(seeds, number))
        return features

    return apply


def random_shift(
    features: Features, seeds: tf.Tensor, *, max_pixels: int, feature: str = 'image'
) -> Features:
    """Moves each image by a whole number of pixels along each axis and fills up with zeros.

    Args:
        features: `feature` is numeric, [B, rows, columns, channels], of static shape.
        seeds: int32 [B, 3].
        max_pixels: The largest shift, in either direction; all shifts are equally likely.
        feature: The name of the images.

    Returns:
        The features with the moved images, same shape and dtype.

    Raises:
        ConfigError: There are no such images, or a shift could leave nothing of them.
    """
    images = _images(features, feature)
    rows, columns = images.shape[1:3]
    if not 0 <= max_pixels < min(rows, columns):
        raise ConfigError(
            f'random_shift.max_pixels is {max_pixels}, but images of {rows} x {columns} can move '
            f'by 0 to {min(rows, columns) - 1} pixels.'
        )

    def sources(draw: int, size: int) -> tf.Tensor:
        """Returns where in the padded axis each pixel comes from, int32 [B, size]."""
        first = tf.floor(order.uniform(seeds, draw, 0.0, 2.0 * max_pixels + 1.0))
        return tf.cast(first, tf.int32)[:, tf.newaxis] + tf.range(size)

    margin = [max_pixels, max_pixels]
    padded = tf.pad(images, [[0, 0], margin, margin, [0, 0]])
    moved = tf.gather(padded, sources(0, rows), axis=1, batch_dims=1)
    moved = tf.gather(moved, sources(1, columns), axis=2, batch_dims=1)
    return {**features, feature: moved}


def random_flip(features: Features, seeds: tf.Tensor, *, feature: str = 'image') -> Features:
    """Mirrors each image, left to right, with probability one half.

    Args:
        features: `feature` is [B, rows, columns, channels].
        seeds: int32 [B, 3].
        feature: The name of the images.

    Returns:
        The features with the mirrored images, same shape and dtype.

    Raises:
        ConfigError: There are no such images.
    """
    images = _images(features, feature)
    mirror = order.uniform(seeds, 0)[:, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
    return {**features, feature: tf.where(mirror, tf.reverse(images, axis=[2]), images)}


def scale_images(features: Features, *, feature: str = 'image', scale: float = 1 / 255) -> Features:
    """Turns stored pixel values into float32 and multiplies them; for `Data.preprocess`.

    Args:
        features: `feature` is numeric, of any shape.
        feature: The name of the images.
        scale: The factor; 1/255 maps bytes to [0, 1].

    Returns:
        The features with the scaled images.

    Raises:
        ConfigError: There is no such feature.
    """
    _expect(features, feature)
    return {**features, feature: tf.cast(features[feature], tf.float32) * scale}


def _expect(features: Features, feature: str) -> None:
    if feature not in features:
        raise ConfigError(
            f'There is no feature {feature!r} among {sorted(features)}.{nearest(feature, features)}'
        )


def _images(features: Features, feature: str) -> tf.Tensor:
    _expect(features, feature)
    images = features[feature]
    if images.shape.rank != 4:
        raise ConfigError(
            f'The feature {feature!r} is no batch of images: its shape is {images.shape} instead '
            'of [batch, rows, columns, channels].'
        )
    return images
