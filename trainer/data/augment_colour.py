"""Random changes of the colours of images; see `augment` for what all augmentations share.

Brightness, contrast, saturation and hue are all linear in the three colours of a pixel, so for
each image they come down to one 3 x 3 matrix and one number, and to one pass over the pixels.
"""

import numpy as np
import tensorflow as tf

from trainer.data import augment, order
from trainer.data.source import Features
from trainer.errors import ConfigError

# From RGB to brightness and two axes of colour, YIQ (FCC 47 CFR 73.682): hue is an angle in it.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_GREY = np.tile(_YIQ[0], [3, 1])  # What takes a pixel to the grey of its brightness.
_COLOUR = np.eye(3) - _GREY  # What is left of it.
_QUARTER = np.linalg.inv(_YIQ) @ [[0, 0, 0], [0, 0, 1], [0, -1, 0]] @ _YIQ @ _COLOUR


def random_colour(
    features: Features,
    seeds: tf.Tensor,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    feature: str = 'image',
) -> Features:
    """Changes brightness, contrast, saturation and hue of each image.

    Args:
        features: `feature` is numeric, [B, rows, columns, channels] with 1 or 3 channels.
        seeds: int32 [B, 3].
        brightness: The image is multiplied by a factor of 1 - brightness to 1 + brightness.
        contrast: And so is each pixel's distance from the mean grey of the image,
        saturation: and from the grey of its own brightness.
        hue: All colours are turned by -hue to hue of the circle of colours, brightness as it was;
            0.5 is as far as it goes. All numbers in all ranges are equally likely.
        feature: The name of the images.

    Returns:
        The features with the changed images, same shape and dtype. Whole numbers are rounded and
        kept within what the dtype can hold; floats may leave the range that they had.

    Raises:
        ConfigError: There are no such images, a number is out of its range, or saturation or hue
            of grey images is to change.
    """
    images = augment.images_of(features, feature)
    channels = images.shape[3]
    most = {'brightness': 1.0, 'contrast': 1.0, 'saturation': 1.0, 'hue': 0.5}
    for (name, limit), value in zip(
        most.items(), (brightness, contrast, saturation, hue), strict=True
    ):
        if not 0 <= value <= limit:
            raise ConfigError(f'random_colour.{name} is {value!r}; it must be from 0 to {limit:g}.')
    if channels != 3 and (channels != 1 or saturation or hue):
        raise ConfigError(
            f'random_colour changes images of 3 channels, or brightness and contrast of 1, but '
            f'{feature!r} has {channels} channel(s).'
        )
    factors = [
        order.uniform(seeds, draw, 1 - strength, 1 + strength)
        for draw, strength in enumerate((brightness, contrast, saturation))
    ]
    angle = order.uniform(seeds, 3, -2 * np.pi * hue, 2 * np.pi * hue)
    cosine, sine = (augment.precisely(function, angle) for function in (tf.cos, tf.sin))
    numbers = (each[:, tf.newaxis, tf.newaxis] for each in (*factors, cosine, sine))
    light, spread, colour, cosine, sine = numbers
    size = tf.shape(images)
    pixels = tf.reshape(tf.cast(images, tf.float32), [size[0], -1, channels])
    changed = light * spread * pixels
    if saturation or hue:
        turned = cosine * _constant(_COLOUR) + sine * _constant(_QUARTER)
        matrix = light * spread * (_constant(_GREY) + colour * turned)
        changed = tf.matmul(pixels, matrix, transpose_b=True)
    if contrast:
        means = tf.reduce_mean(pixels, axis=1, keepdims=True)
        grey = tf.reduce_sum(means * _constant(_YIQ[0]), 2, True) if channels == 3 else means
        changed += (1 - spread) * light * grey
    changed = tf.reshape(changed, size)
    changed = tf.ensure_shape(changed, images.shape)
    return {**features, feature: augment.as_stored(changed, images.dtype)}


def _constant(values: np.ndarray) -> tf.Tensor:
    return tf.constant(values, tf.float32)
