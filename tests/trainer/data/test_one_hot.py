import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays
from trainer.data.digits import digits
from trainer.data.one_hot import one_hot
from trainer.errors import ConfigError


def test_labels_become_one_number_for_each_class_and_the_rest_stays():
    plain = digits('test')
    source = one_hot(plain, 12)
    assert source.element_spec == {**plain.element_spec, 'label': tf.TensorSpec([12], tf.float32)}
    assert source.num_examples == plain.num_examples
    rows = tf.constant([5, 0, 200], tf.int64)
    found, before = source.fetch(rows), plain.fetch(rows)
    np.testing.assert_array_equal(found['image'], before['image'])
    np.testing.assert_array_equal(found['label'], np.eye(12)[before['label']])
    assert source.where(3) == plain.where(3)
    assert source.bounds('label') is None
    positions = tf.range(10, dtype=tf.int64)
    np.testing.assert_array_equal(
        source.records(positions, seed=2), plain.records(positions, seed=2)
    )


def test_the_fingerprint_tells_data_and_settings_apart():
    sources = [digits('test'), one_hot(digits('test'), 10), one_hot(digits('test'), 11)]
    sources.append(one_hot(digits('train'), 10))
    assert len({source.fingerprint for source in sources}) == 4
    assert one_hot(digits('test'), 10).fingerprint == sources[1].fingerprint


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'num_classes': 9}, 'run from 0 to 9, but one_hot.num_classes is 9. Set NUM_CLASSES = 10'),
        ({'num_classes': 10, 'label': 'lable'}, r"names 'lable'.*Did you mean 'label'"),
        ({'num_classes': 10, 'label': 'image'}, r"'image' is uint8 of shape \[8, 8, 1\]"),
    ],
)
def test_labels_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        one_hot(digits('test'), **settings)


def test_a_label_that_is_no_class_fails_when_it_is_read():
    class Unknown(Arrays):
        def bounds(self, feature):
            return None

    source = one_hot(Unknown({'label': np.array([0, 1, 2, 3])}), 3)
    assert source.fetch(tf.constant([2], tf.int64))['label'].shape == (1, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match='not one of the classes 0 to 2'):
        source.fetch(tf.constant([0, 3], tf.int64))
