import hashlib

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays, npz
from trainer.errors import ConfigError

IMAGES = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2)
LABELS = np.array([3, 1, 4, 1, 5])


@pytest.fixture
def source():
    return Arrays({'label': LABELS, 'image': IMAGES})


def test_examples_are_fetched_by_number_in_any_order(source):
    batch = source.fetch(tf.constant([4, 0, 4], tf.int64))
    np.testing.assert_array_equal(batch['image'], IMAGES[[4, 0, 4]])
    np.testing.assert_array_equal(batch['label'], [5, 3, 5])


def test_the_spec_is_that_of_one_example(source):
    assert source.num_examples == 5
    assert source.element_spec == {
        'image': tf.TensorSpec([2, 2], tf.uint8),
        'label': tf.TensorSpec([], tf.int64),
    }


def test_arrays_are_inputs_of_a_graph_and_not_constants_in_it():
    large = Arrays({'image': np.zeros([1000, 100], np.float32)})
    fetch = tf.function(large.fetch).get_concrete_function(tf.TensorSpec([4], tf.int64))
    assert fetch.graph.as_graph_def().ByteSize() < 10_000
    assert [tensor.shape for tensor in fetch.captured_inputs] == [[1000, 100]]


def test_tensors_are_made_once(source):
    fetch = tf.function(source.fetch)
    first, second = (
        fetch.get_concrete_function(tf.TensorSpec([size], tf.int64)).captured_inputs[0]
        for size in (2, 3)
    )
    assert first is second


def test_the_fingerprint_is_of_names_dtypes_shapes_and_bytes(source):
    expected = hashlib.sha256()
    for name, array in (('image', IMAGES), ('label', LABELS)):
        expected.update(repr((name, str(array.dtype), array.shape)).encode() + array.tobytes())
    assert source.fingerprint == expected.hexdigest()


@pytest.mark.parametrize(
    'changed',
    [
        {'picture': IMAGES, 'label': LABELS},
        {'image': IMAGES, 'label': LABELS.astype(np.int32)},
        {'image': IMAGES.reshape(5, 4), 'label': LABELS},
        {'image': IMAGES ^ 1, 'label': LABELS},
        {'image': IMAGES[::-1], 'label': LABELS},
    ],
    ids=['name', 'dtype', 'shape', 'bytes', 'order'],
)
def test_any_change_changes_the_fingerprint(source, changed):
    assert Arrays(changed).fingerprint != source.fingerprint


def test_layout_in_memory_does_not_change_the_fingerprint(source):
    other = {'label': LABELS.astype('>i8'), 'image': np.asfortranarray(IMAGES)}
    assert Arrays(other).fingerprint == source.fingerprint
    np.testing.assert_array_equal(Arrays(other).fetch(tf.constant([2]))['label'], [4])


def test_bounds_are_known_for_whole_numbers_only():
    source = Arrays({'label': LABELS, 'image': IMAGES, 'weight': np.ones(5)})
    assert source.bounds('label') == (1, 5)
    assert source.bounds('image') is None
    assert source.bounds('weight') is None


@pytest.mark.parametrize(
    ('arrays', 'said'),
    [
        ({}, 'no features'),
        ({'image': IMAGES, 'label': LABELS[:4]}, "'image': 5, 'label': 4"),
        ({'image': IMAGES[:0]}, 'no examples: image'),
        ({'image': np.array(1)}, "'image' is a single value"),
        ({'name': np.array(['a', 'b'])}, "'name' has dtype <U1"),
        ({'name': np.array([None, 1])}, "'name' has dtype object"),
        ({'wide': np.ones(3, np.longdouble)}, "'wide' has dtype .* at most 64 bits"),
    ],
)
def test_unusable_arrays_are_refused(arrays, said):
    with pytest.raises(ConfigError, match=said):
        Arrays(arrays)


def test_a_file_holds_the_features_by_name(tmp_path, source):
    np.savez_compressed(tmp_path / 'a.npz', image=IMAGES, label=LABELS)
    assert npz(tmp_path / 'a.npz').fingerprint == source.fingerprint


def test_a_file_may_hold_several_splits(tmp_path):
    arrays = {'x_train': IMAGES, 'y_train': LABELS, 'x_test': IMAGES[:2], 'y_test': LABELS[:2]}
    np.savez(tmp_path / 'a.npz', **arrays)
    test = npz(tmp_path / 'a.npz', split='test')
    assert test.num_examples == 2
    assert sorted(test.element_spec) == ['x', 'y']
    with pytest.raises(ConfigError, match=r"no split 'trian'.*Did you mean 'train'"):
        npz(tmp_path / 'a.npz', split='trian')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'missing\.npz. does not exist'):
        npz(tmp_path / 'missing.npz')


def test_a_file_of_unequal_arrays_is_named(tmp_path):
    np.savez(tmp_path / 'a.npz', image=IMAGES, label=LABELS[:4])
    with pytest.raises(ConfigError, match=r"a\.npz' is unusable.*differ in their number"):
        npz(tmp_path / 'a.npz')


def truncated(path):
    np.savez(path, image=IMAGES)
    path.write_bytes(path.read_bytes()[:-30])


def flipped(path):
    np.savez(path, image=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content.replace(IMAGES.tobytes(), (IMAGES ^ 1).tobytes()))


@pytest.mark.parametrize(
    'write',
    [
        truncated,
        flipped,
        lambda path: path.write_bytes(b''),
        lambda path: path.write_text('hello'),
        lambda path: path.mkdir(),
        lambda path: np.save(path.open('wb'), IMAGES),
        lambda path: np.savez(path, image=np.array([None])),
    ],
    ids=['truncated', 'flipped', 'empty', 'text', 'directory', 'npy', 'pickled'],
)
def test_a_damaged_file_is_refused(tmp_path, write):
    write(tmp_path / 'a.npz')
    with pytest.raises(ConfigError, match=r"a\.npz' cannot be read as \.npz"):
        npz(tmp_path / 'a.npz')
