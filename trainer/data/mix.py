"""Augmentations that blend each example with another one; see `augment` for what all share.

The other one is its neighbour in the batch: row 0 goes with row 1, row 2 with row 3. Replicas get
whole rows from an even one on if their share of the batch is even, so pairs are the same on any
number of them. Labels are blended as the images are, which needs labels with one number for each
class (see `one_hot`), and a loss that takes them, `CategoricalCrossentropy`.
"""

import functools

import numpy as np
import tensorflow as tf

from trainer.data import augment, order
from trainer.data.source import Features
from trainer.errors import ConfigError

_CELLS = 4096  # Of the table of a distribution.


def mixup(
    features: Features,
    seeds: tf.Tensor,
    *,
    alpha: float = 0.2,
    feature: str = 'image',
    label: str = 'label',
) -> Features:
    """Averages each example with its neighbour (https://arxiv.org/abs/1710.09412).

    Args:
        features: `feature` is numeric, [B, ...], `label` floating-point, [B, classes]; B is even.
        seeds: int32 [B, 3].
        alpha: An example's own share is drawn from the distribution Beta(alpha, alpha): near 0 or
            1 for an alpha near 0, near a half for a large one.
        feature: The name of the images.
        label: The name of the labels.

    Returns:
        The features with blended images and labels, same shapes and dtypes. Nothing else is
        blended: an example keeps its weight.

    Raises:
        ConfigError: There are no such features, the batch is odd, or alpha is not above 0.
    """
    augment.expect(features, feature)
    values = features[feature]
    _check(features, label, values, 'mixup', alpha)
    share = _beta(order.uniform(seeds, 0), alpha)
    floats = tf.cast(values, tf.float32)
    mixed = _blend(floats, _neighbours(floats), share)
    labels = features[label]
    return {
        **features,
        feature: augment.as_stored(mixed, values.dtype),
        label: _blend(labels, _neighbours(labels), share),
    }


def cutmix(
    features: Features,
    seeds: tf.Tensor,
    *,
    alpha: float = 1.0,
    feature: str = 'image',
    label: str = 'label',
) -> Features:
    """Covers a rectangle of each image with its neighbour's (https://arxiv.org/abs/1905.04899).

    Args:
        features: `feature` is [B, rows, columns, channels], `label` floating-point, [B, classes];
            B is even.
        seeds: int32 [B, 3].
        alpha: The part of the image outside of the rectangle is drawn from the distribution
            Beta(alpha, alpha). The rectangle is centred anywhere, and cut off at the edges.
        feature: The name of the images.
        label: The name of the labels.

    Returns:
        The features with such images, and labels blended by the areas, same shapes and dtypes.

    Raises:
        ConfigError: As `mixup`, or these are no images.
    """
    images = augment.images_of(features, feature)
    _check(features, label, images, 'cutmix', alpha)
    rows, columns = images.shape[1:3]
    side = augment.precisely(tf.sqrt, 1.0 - _beta(order.uniform(seeds, 0), alpha))
    edges = []
    for draw, size in ((1, rows), (2, columns)):
        centre = order.uniform(seeds, draw, 0.0, size)
        half = side * size / 2
        edges.append([tf.clip_by_value(tf.round(centre + s * half), 0.0, size) for s in (-1, 1)])
    covered = augment.rectangles(*edges, (rows, columns))
    area = (edges[0][1] - edges[0][0]) * (edges[1][1] - edges[1][0])
    labels = features[label]
    return {
        **features,
        feature: tf.where(covered, _neighbours(images), images),
        label: _blend(labels, _neighbours(labels), 1.0 - area / (rows * columns)),
    }


def _check(features: Features, label: str, values: tf.Tensor, name: str, alpha: float) -> None:
    augment.expect(features, label)
    labels = features[label]
    if not 0 < alpha < float('inf'):
        raise ConfigError(f'{name}.alpha is {alpha!r}; it must be a number above 0.')
    if labels.shape.rank != 2 or not labels.dtype.is_floating:
        raise ConfigError(
            f'{name} blends labels with one number for each class, but {label!r} is '
            f'{labels.dtype.name} of shape {labels.shape}. Read the data through one_hot: '
            'Data.source = @one_hot(), one_hot.source = the source as it is, one_hot.num_classes = '
            '%NUM_CLASSES. The loss is CategoricalCrossentropy then.'
        )
    size = values.shape[0]
    if size is not None and size % 2:
        raise ConfigError(
            f'{name} blends examples in pairs, but the share of a replica in the batch is odd, '
            f'{size}. Set BATCH_SIZE to a multiple of twice the number of replicas.'
        )


def _neighbours(values: tf.Tensor) -> tf.Tensor:
    """Exchanges rows 0 and 1, 2 and 3, and so on."""
    pairs = tf.reshape(values, tf.concat([[-1, 2], tf.shape(values)[1:]], 0))
    return tf.ensure_shape(tf.reshape(pairs[:, ::-1], tf.shape(values)), values.shape)


def _blend(own: tf.Tensor, other: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    share = tf.cast(tf.reshape(share, [-1, *[1] * (own.shape.rank - 1)]), own.dtype)
    return share * own + (1 - share) * other


def _beta(uniform: tf.Tensor, alpha: float) -> tf.Tensor:
    """Returns numbers distributed as Beta(alpha, alpha), from such as are uniform in [0, 1)."""
    table = tf.constant(_quantiles(float(alpha)), tf.float32)
    at = uniform * _CELLS
    cell = tf.cast(at, tf.int32)
    low, high = tf.gather(table, cell), tf.gather(table, cell + 1)
    return low + (high - low) * (at - tf.floor(at))


@functools.cache
def _quantiles(alpha: float) -> np.ndarray:
    """Returns the quantiles 0, 1 / _CELLS, ..., 1 of Beta(alpha, alpha), by halving intervals."""
    wanted = np.arange(_CELLS // 2 + 1) / _CELLS
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    with tf.init_scope(), tf.device('CPU:0'):
        a = tf.constant(alpha, tf.float64)
        for _ in range(50):
            middle = (low + high) / 2
            below = tf.math.betainc(a, a, tf.constant(middle)).numpy() < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
    # The distribution is symmetric.
    return np.concatenate([high, 1 - high[-2::-1]])
