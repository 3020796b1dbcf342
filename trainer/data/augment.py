"""Transformations of a batch in graph operations: random ones for `Data.augment`, and scaling.

Here are those that move or cover pixels, in `augment_colour` those that change colours, in `mix`
those that blend examples.

A random transformation takes the features and `seeds`, the keys of the examples (int32 [B, 3], see
`order.example_seeds`), and draws all its numbers from them by `order.uniform`. What happens to an
example thus depends on the seed of the run and on its position in the run, and on nothing else.
Parameters are bound with `functools.partial` or gin; `chain` puts several into a row.
"""

import math
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
    images = images_of(features, feature)
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
    images = images_of(features, feature)
    mirror = order.uniform(seeds, 0)[:, tf.newaxis, tf.newaxis, tf.newaxis] < 0.5
    return {**features, feature: tf.where(mirror, tf.reverse(images, axis=[2]), images)}


def random_resized_crop(
    features: Features,
    seeds: tf.Tensor,
    *,
    area: tuple[float, float] = (0.25, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    feature: str = 'image',
) -> Features:
    """Takes a random part of each image and enlarges it, bilinearly, to the size of the whole.

    Args:
        features: `feature` is numeric, [B, rows, columns, channels].
        seeds: int32 [B, 3].
        area: The least and the largest part of the image's area, in (0, 1].
        aspect: By which factor the part is wider than the image, for its height: the least and
            the largest. All are equally likely on a logarithmic scale. Where the part would be
            longer than the image, it is as long.
        feature: The name of the images.

    Returns:
        The features with the enlarged parts, same shape and dtype.

    Raises:
        ConfigError: There are no such images, or the ranges are none.
    """
    images = images_of(features, feature)
    _check_range('random_resized_crop.area', area, most=1.0)
    _check_range('random_resized_crop.aspect', aspect)
    part = order.uniform(seeds, 0, *area)
    wider = precisely(tf.exp, order.uniform(seeds, 1, *map(math.log, aspect)))
    height = tf.minimum(precisely(tf.sqrt, part / wider), 1.0)
    width = tf.minimum(precisely(tf.sqrt, part * wider), 1.0)
    top = order.uniform(seeds, 2) * (1.0 - height)
    left = order.uniform(seeds, 3) * (1.0 - width)
    cropped = tf.image.crop_and_resize(
        images,
        tf.stack([top, left, top + height, left + width], axis=1),
        tf.range(tf.shape(images)[0]),
        images.shape[1:3],
    )
    return {**features, feature: as_stored(cropped, images.dtype)}


def random_cutout(
    features: Features, seeds: tf.Tensor, *, pixels: int, feature: str = 'image'
) -> Features:
    """Sets a square of each image to zero, centred anywhere in it (https://arxiv.org/abs/1708.04552).

    Args:
        features: `feature` is [B, rows, columns, channels], of static shape.
        seeds: int32 [B, 3].
        pixels: The length of the square's sides; a part of it may lie outside.
        feature: The name of the images.

    Returns:
        The features with the covered images, same shape and dtype.

    Raises:
        ConfigError: There are no such images, or the square could cover all of one.
    """
    images = images_of(features, feature)
    rows, columns = images.shape[1:3]
    if not 0 <= pixels < min(rows, columns):
        raise ConfigError(
            f'random_cutout.pixels is {pixels}; in images of {rows} x {columns} it can be 0 to '
            f'{min(rows, columns) - 1}.'
        )
    firsts = (
        tf.floor(order.uniform(seeds, draw, 0.0, size)) - pixels // 2
        for draw, size in enumerate((rows, columns))
    )
    covered = rectangles(*((first, first + pixels) for first in firsts), (rows, columns))
    return {**features, feature: tf.where(covered, tf.zeros([], images.dtype), images)}


def scale_images(
    features: Features, *, feature: str | Sequence[str] = 'image', scale: float = 1 / 255
) -> Features:
    """Turns stored pixel values into float32 and multiplies them; for `Data.preprocess`.

    Args:
        features: `feature` is numeric, of any shape.
        feature: The name of the images, or several.
        scale: The factor; 1/255 maps bytes to [0, 1].

    Returns:
        The features with the scaled images.

    Raises:
        ConfigError: There is no such feature.
    """
    scaled = dict(features)
    for name in (feature,) if isinstance(feature, str) else feature:
        expect(features, name)
        scaled[name] = tf.cast(features[name], tf.float32) * scale
    return scaled


def rectangles(
    down: tuple[tf.Tensor, tf.Tensor], across: tuple[tf.Tensor, tf.Tensor], size: Sequence[int]
) -> tf.Tensor:
    """Returns which pixels lie in a rectangle of each image, bool [B, rows, columns, 1].

    Args:
        down, across: The first row and the one after the last, and so of columns, float32 [B].
        size: Rows and columns of the images.
    """

    def inside(first: tf.Tensor, end: tf.Tensor, count: int) -> tf.Tensor:
        numbers = tf.range(count, dtype=tf.float32)
        return (numbers >= first[:, tf.newaxis]) & (numbers < end[:, tf.newaxis])

    in_rows, in_columns = inside(*down, size[0]), inside(*across, size[1])
    return (in_rows[:, :, tf.newaxis] & in_columns[:, tf.newaxis, :])[..., tf.newaxis]


def precisely(function: Callable[[tf.Tensor], tf.Tensor], values: tf.Tensor) -> tf.Tensor:
    """Returns function(values), float32, by way of float64.

    TensorFlow's kernels for exp, sin, cos and others compute most of a vector in wide registers,
    and what is left over one by one, with other last bits: in float32 an example's numbers would
    depend on its place in a batch, and so on the number of replicas.
    """
    return tf.cast(function(tf.cast(values, tf.float64)), tf.float32)


def as_stored(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns floats as another dtype; whole numbers are rounded and kept within its range."""
    return tf.saturate_cast(tf.round(values), dtype) if dtype.is_integer else tf.cast(values, dtype)


def expect(features: Features, feature: str) -> None:
    """Raises ConfigError if there is no such feature."""
    if feature not in features:
        raise ConfigError(
            f'There is no feature {feature!r} among {sorted(features)}.{nearest(feature, features)}'
        )


def images_of(features: Features, feature: str) -> tf.Tensor:
    """Returns a batch of images.

    Raises:
        ConfigError: There is no such feature, or it has another number of dimensions.
    """
    expect(features, feature)
    images = features[feature]
    if images.shape.rank != 4:
        raise ConfigError(
            f'The feature {feature!r} is no batch of images: its shape is {images.shape} instead '
            'of [batch, rows, columns, channels].'
        )
    return images


def _check_range(name: str, bounds: tuple[float, float], most: float = float('inf')) -> None:
    numbers = isinstance(bounds, list | tuple) and len(bounds) == 2
    if not numbers or not 0 < bounds[0] <= bounds[1] <= most:
        limit = '' if most == float('inf') else f' and not above {most:g}'
        raise ConfigError(
            f'{name} is {bounds!r}; it must be two numbers above 0{limit}, the lesser first.'
        )
