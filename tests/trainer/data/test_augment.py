import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import augment, order
from trainer.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(1, 256, (600, 5, 7, 2), dtype=np.uint8)
LABELS = np.arange(600)


def keys(first=0, count=600, seed=0):
    return order.example_seeds(tf.range(first, first + count, dtype=tf.int64), seed=seed)


def apply(function, images=IMAGES, seed=0, **parameters):
    features = {'image': tf.constant(images), 'label': tf.constant(LABELS)}
    result = function(features, keys(seed=seed), **parameters)
    np.testing.assert_array_equal(result['label'], LABELS)
    assert result['image'].dtype == images.dtype
    return result['image'].numpy()


def moved(image, down, right):
    """What a shift should make of an image, by slicing."""
    rows, columns = image.shape[:2]
    result = np.zeros_like(image)
    result[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)] = image[
        max(-down, 0) : rows + min(-down, 0), max(-right, 0) : columns + min(-right, 0)
    ]
    return result


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_images_move_by_every_shift_equally_often_and_fill_up_with_zeros(dtype):
    images = IMAGES.astype(dtype)
    result = apply(augment.random_shift, images, max_pixels=1)
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    found = [
        next(shift for shift in shifts if np.array_equal(after, moved(before, *shift)))
        for before, after in zip(images, result, strict=True)
    ]
    counts = [found.count(shift) for shift in shifts]
    assert np.sum((np.array(counts) - 600 / 9) ** 2) / (600 / 9) < 8 + 4 * 4, counts


def test_no_shift_leaves_images_as_they_are():
    np.testing.assert_array_equal(apply(augment.random_shift, max_pixels=0), IMAGES)


@pytest.mark.parametrize('max_pixels', [-1, 5])
def test_a_shift_that_could_leave_nothing_is_refused(max_pixels):
    with pytest.raises(ConfigError, match='images of 5 x 7 can move by 0 to 4 pixels'):
        apply(augment.random_shift, max_pixels=max_pixels)


def test_about_half_of_the_images_are_mirrored():
    result = apply(augment.random_flip)
    flipped = np.array([np.array_equal(r, i[:, ::-1]) for r, i in zip(result, IMAGES, strict=True)])
    np.testing.assert_array_equal(result[~flipped], IMAGES[~flipped])
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(600)


@pytest.mark.parametrize(
    'function',
    [functools.partial(augment.random_shift, max_pixels=2), augment.random_flip],
    ids=['shift', 'flip'],
)
def test_what_happens_to_an_example_depends_on_its_key_alone(function):
    whole = apply(function)
    part = function({'image': tf.constant(IMAGES[100:110])}, keys(100, 10))['image']
    np.testing.assert_array_equal(part, whole[100:110])
    assert not np.array_equal(apply(function, seed=1), whole)


def test_a_chain_applies_one_after_another_with_numbers_of_their_own():
    shift = functools.partial(augment.random_shift, max_pixels=2)
    chained = apply(augment.chain([shift, augment.random_flip]))
    features = {'image': tf.constant(IMAGES)}
    features = shift(features, order.fold(keys(), 0))
    np.testing.assert_array_equal(
        chained, augment.random_flip(features, order.fold(keys(), 1))['image']
    )


def test_two_of_a_kind_in_a_chain_do_not_repeat_each_other():
    twice = apply(augment.chain([augment.random_flip, augment.random_flip]))
    unchanged = np.all(twice == IMAGES, axis=(1, 2, 3))
    assert abs(unchanged.mean() - 0.5) < 4 * 0.5 / np.sqrt(600)


def test_static_shapes_are_kept_in_a_graph():
    chained = augment.chain(
        [functools.partial(augment.random_shift, max_pixels=1), augment.random_flip]
    )
    graph = tf.function(chained).get_concrete_function(
        {'image': tf.TensorSpec([8, 5, 7, 2], tf.uint8)}, tf.TensorSpec([8, 3], tf.int32)
    )
    assert graph.structured_outputs['image'].shape == [8, 5, 7, 2]


def test_images_are_scaled_to_floats():
    scaled = augment.scale_images({'image': tf.constant(IMAGES), 'label': LABELS})
    assert scaled['image'].dtype == tf.float32
    np.testing.assert_allclose(scaled['image'], IMAGES / 255.0, rtol=1e-6)
    assert scaled['label'] is LABELS
    assert augment.scale_images({'x': tf.constant([8])}, feature='x', scale=0.5)['x'] == 4


@pytest.mark.parametrize(
    'function',
    [
        functools.partial(augment.random_shift, max_pixels=1),
        augment.random_flip,
        lambda features, seeds, feature: augment.scale_images(features, feature=feature),
    ],
    ids=['shift', 'flip', 'scale'],
)
def test_a_feature_that_does_not_exist_is_refused(function):
    with pytest.raises(ConfigError, match=r"no feature 'imag'.*Did you mean 'image'"):
        apply(function, feature='imag')


def test_what_is_no_image_is_refused():
    with pytest.raises(ConfigError, match=r"'label' is no batch of images: its shape is \(600,\)"):
        apply(augment.random_flip, feature='label')
