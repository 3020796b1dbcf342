import colorsys

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import order
from trainer.data.augment_colour import random_colour
from trainer.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(60, 120, (400, 4, 6, 3), dtype=np.uint8)
GREY = IMAGES.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])


def keys(first=0, count=400, seed=0):
    return order.example_seeds(tf.range(first, first + count, dtype=tf.int64), seed=seed)


def changed(images=IMAGES, seed=0, **strengths):
    result = random_colour({'image': tf.constant(images)}, keys(seed=seed), **strengths)['image']
    assert result.dtype == images.dtype
    assert result.shape == images.shape
    return result.numpy()


def drawn(draw, low, high):
    return order.uniform(keys(), draw, low, high).numpy()[:, np.newaxis, np.newaxis, np.newaxis]


@pytest.mark.parametrize('images', [IMAGES, IMAGES.astype(np.float32), IMAGES[..., :1]])
def test_no_strength_leaves_images_as_they_are(images):
    np.testing.assert_array_equal(changed(images), images)


def test_brightness_multiplies_by_factors_that_are_equally_likely():
    result = changed(IMAGES.astype(np.float32), brightness=0.4)
    factors = result / IMAGES
    np.testing.assert_allclose(factors, np.broadcast_to(drawn(0, 0.6, 1.4), factors.shape), 1e-5)
    counts, _ = np.histogram(factors[:, 0, 0, 0], 8, (0.6, 1.4))
    assert np.sum((counts - 50) ** 2) / 50 < 7 + 4 * np.sqrt(14), counts


def test_contrast_multiplies_distances_from_the_mean_grey():
    result = changed(IMAGES.astype(np.float32), contrast=0.5)
    mean = GREY.mean(axis=(1, 2))[:, np.newaxis, np.newaxis, np.newaxis]
    wanted = mean + drawn(1, 0.5, 1.5) * (IMAGES - mean)
    np.testing.assert_allclose(result, wanted, rtol=1e-4)


def test_saturation_multiplies_distances_from_grey():
    result = changed(IMAGES.astype(np.float32), saturation=1.0)
    grey = GREY[..., np.newaxis]
    np.testing.assert_allclose(result, grey + drawn(2, 0, 2) * (IMAGES - grey), atol=0.01)


def test_hue_turns_colours_and_keeps_brightness_and_grey():
    result = changed(IMAGES.astype(np.float32), hue=0.5)
    np.testing.assert_allclose(result @ [0.299, 0.587, 0.114], GREY, rtol=1e-3)
    assert np.abs(result - IMAGES).mean() > 5
    flat = np.repeat(IMAGES[..., :1], 3, axis=3)
    np.testing.assert_allclose(changed(flat, hue=0.5), flat, atol=1)
    # The angles of the usual circle of colours, which has red at 0, are nearly the same.
    red = np.tile(np.float32([200, 0, 0]), (400, 2, 2, 1))
    angles = drawn(3, -0.5, 0.5)[:, 0, 0, 0]
    for angle, pixel in zip(angles, changed(red, hue=0.5)[:, 0, 0], strict=True):
        hue = colorsys.rgb_to_hsv(*pixel - pixel.min())[0]
        assert min((hue - angle) % 1, (angle - hue) % 1) < 0.1, (angle, hue)


def test_bytes_are_rounded_and_kept_in_their_range():
    strengths = {'brightness': 1.0, 'contrast': 0.8, 'saturation': 0.8, 'hue': 0.3}
    images = np.random.default_rng(0).integers(0, 256, (400, 4, 6, 3), dtype=np.uint8)
    floats = changed(images.astype(np.float32), **strengths)
    assert floats.max() > 300
    np.testing.assert_array_equal(changed(images, **strengths), floats.round().clip(0, 255))


def test_each_of_them_draws_numbers_of_its_own():
    draws = [order.uniform(keys(), draw).numpy() for draw in range(4)]
    correlations = np.corrcoef(draws)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(400)


@pytest.mark.parametrize('size', [1, 2, 7, 64])
def test_what_happens_to_an_image_depends_on_its_key_alone(size):
    images = np.random.default_rng(1).normal(size=(400, 9, 7, 3)).astype(np.float32)
    strengths = {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1}
    function = tf.function(lambda *part: random_colour({'image': part[0]}, part[1], **strengths))
    whole = function(images, keys())['image'].numpy()
    for first in range(0, 256, size):
        part = function(images[first : first + size], keys(first, size))['image']
        np.testing.assert_array_equal(part, whole[first : first + size])
    assert not np.array_equal(changed(images, seed=1, **strengths), whole)


@pytest.mark.parametrize(
    ('images', 'strengths', 'said'),
    [
        (IMAGES, {'hue': 0.6}, r'random_colour\.hue is 0\.6; it must be from 0 to 0\.5'),
        (IMAGES, {'brightness': -0.1}, r'brightness is -0\.1; it must be from 0 to 1'),
        (IMAGES[..., :1], {'saturation': 0.1}, r"'image' has 1 channel\(s\)"),
        (IMAGES[..., :2], {'brightness': 0.1}, r"'image' has 2 channel\(s\)"),
    ],
)
def test_what_cannot_be_done_is_refused(images, strengths, said):
    with pytest.raises(ConfigError, match=said):
        changed(images, **strengths)
