import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import order
from trainer.data.batch import Data
from trainer.data.digits import digits
from trainer.data.mix import cutmix, mixup
from trainer.data.one_hot import one_hot
from trainer.data.pipeline import train_batches
from trainer.errors import ConfigError

COUNT = 2000
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 6, 3), dtype=np.uint8)
LABELS = np.eye(10, dtype=np.float32)[np.random.default_rng(1).integers(0, 10, COUNT)]
OTHER = np.arange(COUNT) ^ 1  # The number of each row's neighbour.


def keys(first=0, count=COUNT, seed=0):
    return order.example_seeds(tf.range(first, first + count, dtype=tf.int64), seed=seed)


def features(images=IMAGES, labels=LABELS):
    return {'image': tf.constant(images), 'label': tf.constant(labels), 'weight': tf.range(COUNT)}


def apply(function, images=IMAGES, labels=LABELS, **parameters):
    result = function(features(images, labels), keys(), **parameters)
    np.testing.assert_array_equal(result['weight'], np.arange(COUNT))
    for name, before in (('image', images), ('label', labels)):
        assert result[name].dtype == before.dtype
        assert result[name].shape == before.shape
    return result['image'].numpy(), result['label'].numpy()


def shares(labels):
    """The share that each example has in its label, NaN where both are of the same class."""
    own = np.argmax(LABELS, axis=1)
    found = labels[np.arange(COUNT), own]
    return np.where(own == own[OTHER], np.nan, found)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_mixup_blends_images_and_labels_of_neighbours_alike(dtype):
    before = IMAGES.astype(dtype)
    images, labels = apply(mixup, before, alpha=1.0)
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    found = shares(labels)
    known = ~np.isnan(found)
    share = found[known, np.newaxis, np.newaxis, np.newaxis]
    wanted = share * before[known] + (1 - share) * before[OTHER][known].astype(float)
    np.testing.assert_allclose(images[known], wanted, atol=0.51 if dtype == np.uint8 else 1e-3)


@pytest.mark.parametrize('alpha', [0.2, 0.4, 1.0, 3.0])
def test_shares_are_distributed_as_beta(alpha):
    _, labels = apply(mixup, alpha=alpha)
    found = np.sort(shares(labels)[~np.isnan(shares(labels))])
    a = tf.constant(alpha, tf.float64)
    expected = tf.math.betainc(a, a, tf.constant(found.astype(np.float64).clip(0, 1))).numpy()
    # Kolmogorov and Smirnov's test, at one in ten thousand.
    steps = np.arange(len(found) + 1) / len(found)
    distance = max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))
    assert distance < 2.23 / np.sqrt(len(found))


def test_a_tiny_alpha_leaves_examples_as_they_are_or_exchanges_them():
    images, _ = apply(mixup, alpha=1e-4)
    kept = np.all(images == IMAGES, axis=(1, 2, 3))
    exchanged = np.all(images == IMAGES[OTHER], axis=(1, 2, 3))
    assert np.mean(kept | exchanged) > 0.99
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / np.sqrt(COUNT)


def test_cutmix_puts_a_rectangle_of_the_neighbour_into_each_image():
    own, other = np.uint8([10, 200])
    images = np.where(np.arange(COUNT) % 2, other, own)[:, np.newaxis, np.newaxis, np.newaxis]
    images = np.broadcast_to(images, IMAGES.shape).copy()
    mixed, labels = apply(cutmix, images)
    foreign = mixed != images
    found = shares(labels)
    known = ~np.isnan(found)
    np.testing.assert_allclose(found[known], 1 - foreign[known].mean(axis=(1, 2, 3)), atol=1e-6)
    for mask in foreign[..., 0]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, rows[:, np.newaxis] & columns)
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # One piece.
    # Alpha is 1, so areas are uniform but for what the edges cut off.
    assert 0.15 < foreign.mean() < 0.5
    covered = foreign[..., 0].mean(axis=0)
    assert covered.std() < 0.1  # All of the image is reached.


MIXES = pytest.mark.parametrize('function', [mixup, cutmix], ids=['mixup', 'cutmix'])


@MIXES
@pytest.mark.parametrize('size', [2, 6, 32])
def test_what_happens_to_an_example_depends_on_its_pair_alone(function, size):
    traced = tf.function(
        lambda image, label, seeds: function({'image': image, 'label': label}, seeds, alpha=1.0)
    )
    images = IMAGES.astype(np.float32)
    whole = traced(images, LABELS, keys())
    for first in range(0, 192, size):
        rows = slice(first, first + size)
        part = traced(images[rows], LABELS[rows], keys(first, size))
        for name in part:
            np.testing.assert_array_equal(part[name], whole[name][rows])
    other = traced(images, LABELS, keys(seed=1))
    assert not np.array_equal(other['image'], whole['image'])


@MIXES
def test_blended_batches_are_equal_on_one_device_and_several_replicas(function, make_strategy):
    data = Data(one_hot(digits('test'), 10), augment=functools.partial(function, alpha=1.0))
    batches = []
    for replicas in (1, 2, 4):
        strategy = make_strategy(replicas)
        batch = next(train_batches(data, strategy, seed=3, global_batch_size=24, start_step=5))
        parts = tf.nest.map_structure(strategy.experimental_local_results, batch)
        batches.append({name: np.concatenate(part) for name, part in parts.items()})
    assert np.count_nonzero(batches[0]['labels'], axis=1).max() == 2
    for other in batches[1:]:
        for name, value in batches[0].items():
            np.testing.assert_array_equal(other[name], value)


@MIXES
def test_an_odd_share_of_the_batch_is_refused_before_training(function, make_strategy):
    data = Data(one_hot(digits('test'), 10), augment=function)
    with pytest.raises(ConfigError, match=r'odd, 3\. Set BATCH_SIZE to a multiple of twice'):
        next(train_batches(data, make_strategy(2), seed=0, global_batch_size=6, start_step=0))


@MIXES
def test_class_numbers_as_labels_are_refused(function):
    with pytest.raises(ConfigError, match=r"'label' is int64 of shape \(2000,\)\. Read .* one_hot"):
        apply(function, labels=np.argmax(LABELS, axis=1))


@MIXES
@pytest.mark.parametrize('alpha', [0, -1.0, float('inf')])
def test_an_alpha_that_is_not_above_0_is_refused(function, alpha):
    with pytest.raises(ConfigError, match=r'alpha is .*; it must be a number above 0'):
        apply(function, alpha=alpha)


def test_features_that_are_no_images_can_be_blended_too():
    points = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
    mixed, labels = apply(mixup, points, alpha=1.0)
    share = shares(labels)
    known = ~np.isnan(share)
    wanted = share[:, np.newaxis] * points + (1 - share)[:, np.newaxis] * points[OTHER]
    np.testing.assert_allclose(mixed[known], wanted[known], atol=1e-5)
    with pytest.raises(ConfigError, match='is no batch of images'):
        apply(cutmix, points)
