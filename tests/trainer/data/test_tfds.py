import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordWriter

from trainer.data.digits import digits
from trainer.data.tfds import tfds
from trainer.errors import ConfigError

FORMATS = ('tfrecord', 'array_record')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """The digits as the library writes them, in both formats, and texts of different lengths."""
    import tensorflow_datasets as library

    root = tmp_path_factory.mktemp('tfds')
    features = library.features.FeaturesDict(
        {
            'image': library.features.Image(shape=(8, 8, 1)),
            'label': library.features.ClassLabel(num_classes=10),
            'of': {'number': np.int64},
        }
    )

    def rows(split):
        number = digits(split).num_examples
        found = digits(split).fetch(tf.range(number, dtype=tf.int64))
        found['of'] = {'number': tf.range(number, dtype=tf.int64)}
        return tf.data.Dataset.from_tensor_slices(found)

    def write(name, features, splits, file_format):
        library.dataset_builders.store_as_tfds_dataset(
            name, '1.0.0', features, splits, data_dir=root / file_format, file_format=file_format
        )

    for file_format in FORMATS:
        splits = {split: rows(split) for split in ('train', 'test')}
        write('digits', features, splits, file_format)
    lengths = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3]], dtype=tf.int64))
    lengths = lengths.map(lambda row: {'row': row})
    features = library.features.FeaturesDict(
        {'row': library.features.Tensor(shape=(None,), dtype=np.int64)}
    )
    write('ragged', features, {'train': lengths}, 'tfrecord')
    return root


@pytest.fixture(params=FORMATS)
def directory(request, data_dir):
    return str(data_dir / request.param)


def numbers(source):
    everything = tf.range(source.num_examples, dtype=tf.int64)
    return source.fetch(everything)['of/number'].numpy()


def test_records_are_what_was_written_and_read_in_any_order(directory):
    source = tfds('digits', 'train', directory)
    assert source.num_examples == 1500
    assert source.element_spec['image'] == tf.TensorSpec([8, 8, 1], tf.uint8)
    wanted = np.array([7, 1499, 0, 7, 750])
    features = source.fetch(tf.constant(wanted, tf.int64))
    original = digits('train').fetch(features['of/number'])
    for name in ('image', 'label'):
        np.testing.assert_array_equal(features[name], original[name])
    assert sorted(numbers(source)) == list(range(1500))


def test_parts_and_sums_of_splits_are_those_of_the_library(directory):
    whole = numbers(tfds('digits', 'train', directory))
    np.testing.assert_array_equal(numbers(tfds('digits', 'train[:80%]', directory)), whole[:1200])
    np.testing.assert_array_equal(numbers(tfds('digits', 'train[10:20]', directory)), whole[10:20])
    both = numbers(tfds('digits', 'train[90%:]+test', directory))
    test = numbers(tfds('digits', 'test', directory))
    np.testing.assert_array_equal(both, [*whole[1350:], *test])


def test_the_fingerprint_tells_parts_apart_and_is_the_same_again(directory):
    splits = ('train', 'train[:80%]', 'train[80%:]', 'test')
    prints = [tfds('digits', split, directory).fingerprint for split in splits]
    assert len(set(prints)) == 4
    assert prints == [tfds('digits', split, directory).fingerprint for split in splits]


def test_the_bounds_of_labels_are_known_and_where_a_record_lies(directory):
    source = tfds('digits', 'test[5:]', directory)
    assert source.bounds('label') == (0.0, 9.0)
    assert source.bounds('of/number') is None
    assert 'digits-test' in source.where(0)
    assert 'record 5' in source.where(0)


def test_a_shard_without_its_last_record_is_told(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    for place in tmp_path.rglob('.phalanx'):
        shutil.rmtree(place)
    (path,) = map(str, tmp_path.rglob('digits-train*'))
    stored = tfds('digits', 'train', directory)._records.read(np.arange(1499))
    if path.rpartition('.')[2].startswith('tfrecord'):
        with tf.io.TFRecordWriter(path) as writer:
            list(map(writer.write, stored))
    else:
        writer = ArrayRecordWriter(path, 'group_size:1')
        list(map(writer.write, stored))
        writer.close()
    with pytest.raises(ConfigError, match=rf'{path} holds 1499 records, but 1500 by'):
        tfds('digits', 'train+test', str(tmp_path))


@pytest.mark.parametrize('split', ['train[:0]', 'train[10:10]', 'test[:0%]'])
def test_a_split_without_examples_is_told(data_dir, split):
    with pytest.raises(ConfigError, match=r'holds no examples; there are .*.train.: 1500'):
        tfds('digits', split, str(data_dir / 'tfrecord'))


@pytest.mark.parametrize('name', ['', 'digits:3', 'digits:1.0.0:x', '/'])
def test_what_is_no_name_of_a_data_set_is_told(data_dir, name):
    with pytest.raises(ConfigError, match=rf"tfds.name = '{name}' cannot be .*'mnist:3.0.1'"):
        tfds(name, 'train', str(data_dir / 'tfrecord'))


def test_mistakes_are_told(data_dir, monkeypatch):
    directory = str(data_dir / 'tfrecord')
    with pytest.raises(ConfigError, match=r"no data set 'digit' .*'digits'.*download_and_prepare"):
        tfds('digit', 'train', directory)
    with pytest.raises(ConfigError, match=r"no split 'trian'.*Did you mean 'train'"):
        tfds('digits', 'trian', directory)
    with pytest.raises(ConfigError, match=r"'row' of ragged/1.0.0 has no fixed shape"):
        tfds('ragged', 'train', directory)
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets.core', None)
    with pytest.raises(
        ConfigError, match=r'tensorflow_datasets.* is not installed.*phalanx\[tfds\]'
    ):
        tfds('digits', 'train', directory)
