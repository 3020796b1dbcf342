import gzip
import os
import struct

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.idx import idx
from trainer.errors import ConfigError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
LABELS = np.array([5, 0, 4, 1, 9, 2, 255], np.uint8)


def encoded(array):
    return struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def directory(tmp_path):
    (tmp_path / 'train-images-idx3-ubyte').write_bytes(encoded(IMAGES))
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(encoded(LABELS))
    return tmp_path


def read(source):
    batch = source.fetch(tf.range(source.num_examples))
    return batch['image'].numpy(), batch['label'].numpy()


def test_images_and_labels_are_read(directory):
    source = idx(directory)
    assert source.element_spec == {
        'image': tf.TensorSpec([28, 28, 1], tf.uint8),
        'label': tf.TensorSpec([], tf.int64),
    }
    images, labels = read(source)
    np.testing.assert_array_equal(images[..., 0], IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize('separator', '-.')
@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize(
    ('split', 'name', 'stem'),
    [
        ('train', '', 'train'),
        ('test', '', 't10k'),
        ('train', 'kuzushiji-', 'kuzushiji-train'),
        ('test', 'kuzushiji-', 'kuzushiji-test'),
    ],
)
def test_all_usual_file_names_are_found(tmp_path, split, name, stem, separator, suffix):
    compress = gzip.compress if suffix else bytes
    for kind, array in ((f'images{separator}idx3', IMAGES), (f'labels{separator}idx1', LABELS)):
        (tmp_path / f'{stem}-{kind}-ubyte{suffix}').write_bytes(compress(encoded(array)))
    np.testing.assert_array_equal(read(idx(tmp_path, split, name))[0][..., 0], IMAGES)


def test_emnist_is_turned_upright(directory):
    for path in list(directory.iterdir()):
        path.rename(directory / f'emnist-letters-{path.name}')
    images, labels = read(idx(directory, name='emnist-letters-'))
    np.testing.assert_array_equal(images[..., 0], IMAGES.transpose(0, 2, 1))
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (b'', 'begins with nothing'),
        (b'\x00\x00\x08', 'begins with 00 00 08 instead of 00 00 08 03'),
        (b'<html>404</html>', 'begins with 3c 68 74 6d'),
        (encoded(IMAGES)[:10], 'is no IDX file'),
        (encoded(IMAGES[0]), 'instead of 00 00 08 03'),
        (b'\x00\x00\x0d\x03' + encoded(IMAGES)[4:], 'begins with 00 00 0d 03'),
        (encoded(IMAGES)[:-1], '7 x 28 x 28 = 5488 values but holds 5487'),
        (encoded(IMAGES) + b'\x00', 'but holds 5489'),
        (gzip.compress(encoded(IMAGES)), 'its name must end in .gz'),
        (encoded(IMAGES[:6]), 'holds 6 images but .*labels-idx1-ubyte 7 labels'),
    ],
)
def test_a_damaged_file_is_refused_by_name(directory, content, said):
    (directory / 'train-images-idx3-ubyte').write_bytes(content)
    with pytest.raises(ConfigError, match=f'train-images-idx3-ubyte.*{said}'):
        idx(directory)


@pytest.mark.parametrize(
    'damage',
    [lambda c: c[:-20], lambda c: encoded(LABELS), lambda c: c[:50] + b'\xff' * 9 + c[59:]],
    ids=['truncated', 'not compressed', 'overwritten'],
)
def test_a_damaged_gzip_file_is_refused_by_name(directory, damage):
    path = directory / 'train-labels-idx1-ubyte'
    path.unlink()
    damaged = damage(gzip.compress(encoded(np.tile(LABELS, 50))))
    path.with_name(path.name + '.gz').write_bytes(damaged)
    with pytest.raises(ConfigError, match=r'labels-idx1-ubyte\.gz cannot be read.*Fetch it again'):
        idx(directory)


def test_a_missing_file_is_named(directory):
    (directory / 'train-labels-idx1-ubyte').rename(directory / 'train-labels-idx1-ubyt')
    with pytest.raises(ConfigError, match=r"no file 'train-labels-idx1-ubyte'.*-ubyt'\?"):
        idx(directory)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match="/mnist' does not exist"):
        idx(tmp_path / 'mnist')


def test_another_split_is_refused(directory):
    with pytest.raises(ConfigError, match=r"not 'tests'\. Did you mean 'test'"):
        idx(directory, 'tests')


@pytest.mark.skipif(
    'PHALANX_MNIST_DIR' not in os.environ,
    reason='PHALANX_MNIST_DIR, a directory with the files of MNIST, is not set',
)
def test_mnist_itself_is_read():
    for split, count, first in (
        ('train', 60_000, [5, 0, 4, 1, 9]),
        ('test', 10_000, [7, 2, 1, 0, 4]),
    ):
        source = idx(os.environ['PHALANX_MNIST_DIR'], split)
        assert (source.num_examples, source.bounds('label')) == (count, (0, 9))
        np.testing.assert_array_equal(source.fetch(tf.range(5))['label'], first)
