"""Mistakes that are found before anything expensive is done."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.errors import ConfigError, nearest
from trainer.objective import Objective
from trainer.preflight import check_batch_size, check_labels, check_layers

LOSS = keras.losses.SparseCategoricalCrossentropy()


class Own(keras.losses.Loss):
    pass


LOGITS = tf.TensorSpec([None, 4], tf.float32)


def labelled(*labels):
    return Data(Arrays({'image': np.zeros([len(labels), 2]), 'label': np.array(labels)}))


@pytest.mark.parametrize(('size', 'replicas', 'accumulate'), [(8, 1, 1), (8, 4, 2), (9, 3, 3)])
def test_a_batch_that_can_be_cut_into_equal_parts_passes(size, replicas, accumulate):
    check_batch_size(size, replicas, accumulate)


@pytest.mark.parametrize(
    ('size', 'replicas', 'accumulate', 'mend'),
    [
        (30, 4, 1, '30 examples .* by 4 replicas. Set BATCH_SIZE .* of 4, such as 28 or 32'),
        (12, 4, 2, '4 replicas in 2 micro-batches. Set BATCH_SIZE .* of 8, such as 8 or 16'),
        (3, 4, 1, 'such as 4[.]'),
    ],
)
def test_a_batch_that_cannot_be_shared_names_the_sizes_that_can(size, replicas, accumulate, mend):
    with pytest.raises(ConfigError, match=mend):
        check_batch_size(size, replicas, accumulate)


@pytest.mark.parametrize('value', [0, -8, 8.0, True, '8', None])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ConfigError, match=r'batch size is .*; it must be a whole number of 1'):
        check_batch_size(value, 1)
    with pytest.raises(ConfigError, match=r'micro-batches is .*; it must be a whole number of 1'):
        check_batch_size(8, 1, value)


@pytest.mark.parametrize(
    ('labels', 'mend'),
    [
        ((0, 4), r'run from 0 to 4, .* 4 outputs, for classes 0 to 3. Set NUM_CLASSES = 5'),
        ((-1, 3), r'run from -1 to 3, .* or number the labels from 0'),
    ],
)
def test_labels_outside_the_classes_are_refused_with_both_ranges_and_the_mend(labels, mend):
    with pytest.raises(ConfigError, match=mend):
        check_labels(labelled(*labels), LOSS, LOGITS)


def test_labels_that_are_all_classes_pass():
    check_labels(labelled(0, 1, 2, 3), LOSS, LOGITS)


class Unbounded(Arrays):
    """A source that does not know the bounds of what it holds."""

    def bounds(self, feature):
        return None


@pytest.mark.parametrize(
    ('data', 'loss', 'outputs'),
    [
        (Data(Unbounded({'image': np.zeros([1, 2]), 'label': np.array([9])})), LOSS, LOGITS),
        (Data(Arrays({'image': np.zeros([1, 2]), 'label': np.array([9.5])})), LOSS, LOGITS),
        (labelled(9), keras.losses.MeanSquaredError(), LOGITS),
        (labelled(9), keras.losses.SparseCategoricalCrossentropy(ignore_class=9), LOGITS),
        (labelled(9), LOSS, {'a': LOGITS, 'b': LOGITS}),
    ],
    ids=['unknown bounds', 'not whole', 'another loss', 'an ignored class', 'several outputs'],
)
def test_what_cannot_be_known_is_not_refused(data, loss, outputs):
    check_labels(data, loss, outputs)


@pytest.mark.parametrize(
    ('loss', 'mend'),
    [(keras.losses.Hinge, 'LOSS = @keras.losses.Hinge()'), (Own, 'LOSS = @Own()')],
)
def test_a_loss_given_uncalled_is_told_how_to_write_it(loss, mend):
    with pytest.raises(ConfigError, match=re.escape(mend)):
        Objective(loss)


def normalised(synchronized):
    return keras.Sequential([keras.layers.BatchNormalization(synchronized=synchronized)])


def test_synchronised_statistics_do_not_go_with_xla_on_several_replicas():
    with pytest.raises(ConfigError, match=r"'batch_normalization.*', which is synchronized.*Set"):
        check_layers(normalised(True), 2, jit_compile=True, canonical=None)
    check_layers(normalised(True), 1, jit_compile=True, canonical=None)
    check_layers(normalised(False), 2, jit_compile=True, canonical=None)


def test_the_nearest_name_is_found_in_any_case():
    names = ['Nadam', 'Adam', 'SGD']
    assert nearest('adam', names) == " Did you mean 'Adam'?"
    assert nearest('lion', names) == ''
