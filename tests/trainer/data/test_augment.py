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


def bilinear(image, box):
    """A part of an image, top, left, bottom, right, at the size of the whole, in numpy."""
    image = image.astype(float)
    for axis in (0, 1):
        size = image.shape[axis]
        at = np.linspace(box[axis], box[axis + 2], size) * (size - 1)
        low = np.minimum(at.astype(int), size - 2)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = (1 - share) * image.take(low, axis) + share * image.take(low + 1, axis)
    return image


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_a_random_part_is_enlarged_bilinearly(dtype):
    images = IMAGES.astype(dtype)
    result = apply(augment.random_resized_crop, images, area=(0.2, 0.8), aspect=(0.5, 2.0))
    part = order.uniform(keys(), 0, 0.2, 0.8).numpy()
    wider = np.exp(order.uniform(keys(), 1, np.log(0.5), np.log(2.0)))
    height, width = np.minimum(np.sqrt([part / wider, part * wider]), 1)
    top = order.uniform(keys(), 2).numpy() * (1 - height)
    left = order.uniform(keys(), 3).numpy() * (1 - width)
    for image, after, *box in zip(
        images, result, top, left, top + height, left + width, strict=True
    ):
        wanted = bilinear(image, box)
        np.testing.assert_allclose(after, wanted, atol=0.51 if dtype == np.uint8 else 0.01)


def test_parts_are_of_all_areas_shapes_and_places():
    # What an image says of where its pixels come from: its rows and columns as numbers.
    rows, columns = np.meshgrid(np.arange(5) / 4, np.arange(7) / 6, indexing='ij')
    where = np.broadcast_to(np.stack([rows, columns], -1), IMAGES.shape).astype(np.float32)
    result = apply(augment.random_resized_crop, where, area=(0.3, 0.6), aspect=(0.8, 1.25))
    (top, left), (bottom, right) = result[:, 0, 0].T, result[:, -1, -1].T
    area, aspect = (bottom - top) * (right - left), (right - left) / (bottom - top)
    for values, low, high in (
        (area, 0.3, 0.6),
        (np.log(aspect), np.log(0.8), np.log(1.25)),
        (top / (1 - (bottom - top)), 0, 1),
        (left / (1 - (right - left)), 0, 1),
    ):
        assert values.min() > low - 1e-3
        assert values.max() < high + 1e-3
        counts, _ = np.histogram(values, 6, (low - 1e-3, high + 1e-3))
        assert np.sum((counts - 100) ** 2) / 100 < 5 + 4 * np.sqrt(10), counts


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.float16, np.float32])
def test_the_whole_as_a_part_leaves_images_as_they_are(dtype):
    images = IMAGES.astype(dtype)
    result = apply(augment.random_resized_crop, images, area=(1.0, 1.0), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(result, images)


@pytest.mark.parametrize(
    ('ranges', 'said'),
    [
        ({'area': (0.5, 1.1)}, r'area is \(0\.5, 1\.1\); .* above 0 and not above 1'),
        ({'area': (0.5, 0.2)}, 'the lesser first'),
        ({'area': 0.5}, 'two numbers'),
        ({'aspect': (0.0, 1.0)}, 'aspect is .* above 0, the lesser'),
    ],
)
def test_ranges_that_are_none_are_refused(ranges, said):
    with pytest.raises(ConfigError, match=said):
        apply(augment.random_resized_crop, **ranges)


def test_a_square_anywhere_is_covered():
    result = apply(augment.random_cutout, pixels=3)
    centres = np.zeros([5, 7], int)
    for before, after in zip(IMAGES, result, strict=True):
        covered = ~np.all(after == before, axis=2)
        assert not after[covered].any()
        found = [
            (row, column)
            for row in range(5)
            for column in range(7)
            if np.array_equal(
                covered,
                np.add.outer(abs(np.arange(5) - row) > 1, abs(np.arange(7) - column) > 1) == 0,
            )
        ]
        assert len(found) == 1
        centres[found[0]] += 1
    expected = 600 / 35
    assert np.sum((centres - expected) ** 2) / expected < 34 + 4 * np.sqrt(68), centres


def test_no_square_leaves_images_as_they_are():
    np.testing.assert_array_equal(apply(augment.random_cutout, pixels=0), IMAGES)


@pytest.mark.parametrize('pixels', [-1, 5])
def test_a_square_that_could_cover_everything_is_refused(pixels):
    with pytest.raises(ConfigError, match='in images of 5 x 7 it can be 0 to 4'):
        apply(augment.random_cutout, pixels=pixels)


@pytest.mark.parametrize(
    'function',
    [
        functools.partial(augment.random_shift, max_pixels=2),
        augment.random_flip,
        augment.random_resized_crop,
        functools.partial(augment.random_cutout, pixels=3),
    ],
    ids=['shift', 'flip', 'crop', 'cutout'],
)
def test_what_happens_to_an_example_depends_on_its_key_alone(function):
    images = np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
    whole = apply(function, images)
    for count in (1, 2, 7, 30):
        for first in range(0, 210, count):
            rows = slice(first, first + count)
            part = function({'image': tf.constant(images[rows])}, keys(first, count))['image']
            np.testing.assert_array_equal(part, whole[rows])
    assert not np.array_equal(apply(function, images, seed=1), whole)


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
        [
            functools.partial(augment.random_shift, max_pixels=1),
            augment.random_flip,
            augment.random_resized_crop,
            functools.partial(augment.random_cutout, pixels=1),
        ]
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
        augment.random_resized_crop,
        functools.partial(augment.random_cutout, pixels=1),
        lambda features, seeds, feature: augment.scale_images(features, feature=feature),
    ],
    ids=['shift', 'flip', 'crop', 'cutout', 'scale'],
)
def test_a_feature_that_does_not_exist_is_refused(function):
    with pytest.raises(ConfigError, match=r"no feature 'imag'.*Did you mean 'image'"):
        apply(function, feature='imag')


def test_what_is_no_image_is_refused():
    with pytest.raises(ConfigError, match=r"'label' is no batch of images: its shape is \(600,\)"):
        apply(augment.random_flip, feature='label')
