import numpy as np
import pytest
import tensorflow as tf

from trainer.data.digits import digits
from trainer.errors import ConfigError


def test_the_splits_are_the_whole_set_in_its_order():
    train, test = digits(), digits('test')
    assert (train.num_examples, test.num_examples) == (1500, 297)
    # The first labels and the sums are those of sklearn.datasets.load_digits.
    first = train.fetch(tf.range(12))['label']
    np.testing.assert_array_equal(first, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    batches = [source.fetch(tf.range(source.num_examples)) for source in (train, test)]
    assert sum(int(np.sum(batch['label'])) for batch in batches) == 8070
    assert sum(int(np.sum(batch['image'], dtype=int)) for batch in batches) == 561718


def test_images_and_labels_are_as_promised():
    source = digits('test')
    assert source.element_spec == {
        'image': tf.TensorSpec([8, 8, 1], tf.uint8),
        'label': tf.TensorSpec([], tf.int64),
    }
    assert source.bounds('label') == (0, 9)
    assert np.max(source.fetch(tf.range(297))['image']) == 16


def test_another_split_is_refused():
    with pytest.raises(ConfigError, match=r"not 'tset'\. Did you mean 'test'"):
        digits('tset')
