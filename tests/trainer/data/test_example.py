import json

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import example
from trainer.errors import ConfigError

INTEGERS = ('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32')
FLOATS = ('bfloat16', 'float16', 'float32')


def round_trip(values, features, *, read_as=None):
    """The values, serialised as `features` say, read as `read_as` say, in a batch of two."""
    record = example.serialize(values, example.spec(features))
    batch = example.parse(tf.constant([record, record]), example.spec(read_as or features))
    return {name: tensor.numpy() for name, tensor in batch.items()}


@pytest.mark.parametrize('shape', [(), (3, 2)], ids=['one value', 'six values'])
@pytest.mark.parametrize(
    ('dtype', 'storage'),
    [
        *((dtype, 'values') for dtype in ('bool', *INTEGERS, *FLOATS)),
        *((dtype, 'bytes') for dtype in ('bool', *INTEGERS, 'uint64', *FLOATS, 'float64')),
    ],
)
def test_values_come_back_as_they_were(dtype, storage, shape):
    numpy_type = tf.as_dtype(dtype).as_numpy_dtype
    if dtype in FLOATS or dtype == 'float64':
        values = np.random.default_rng(0).normal(size=shape)
    elif dtype == 'bool':
        values = np.resize([True, False], shape)
    else:
        limits = np.iinfo(dtype)
        values = np.resize(np.array([limits.max, limits.min, 1], dtype), shape)
    values = np.asarray(values).astype(numpy_type)
    found = round_trip({'x': values}, {'x': (dtype, shape, storage)})['x']
    assert found.dtype == numpy_type
    np.testing.assert_array_equal(found, np.stack([values, values]))


@pytest.mark.parametrize('text', ['', 'Füße', b'\x00\xff\x00'])
def test_strings_come_back_as_bytes(text):
    found = round_trip({'x': text}, {'x': ('string', ())})['x']
    assert list(found) == [text.encode() if isinstance(text, str) else text] * 2


@pytest.mark.parametrize('channels', [1, 3])
def test_an_array_stored_as_an_image_loses_nothing(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    found = round_trip({'x': image}, {'x': ('uint8', image.shape, 'image')})['x']
    np.testing.assert_array_equal(found[1], image)


def test_an_encoded_image_is_stored_as_it_is_and_brought_to_the_shape():
    image = np.full((20, 30, 3), 77, np.uint8)
    jpeg = tf.io.encode_jpeg(image).numpy()
    features = example.spec({'x': ('uint8', (8, 8, 3), 'image')})
    record = example.serialize({'x': jpeg}, features)
    assert jpeg in record
    found = example.parse(tf.constant([record]), features)['x']
    np.testing.assert_array_equal(found, np.full((1, 8, 8, 3), 77))


def test_features_that_are_not_asked_for_are_passed_over():
    stored = {'x': ('int64', ()), 'y': ('float32', (2,))}
    found = round_trip({'x': 1, 'y': [0.5, 2]}, stored, read_as={'y': ('float32', (2,))})
    assert list(found) == ['y']


def test_equal_values_make_equal_bytes_in_whatever_order_they_come():
    features = example.spec({'a': ('int64', ()), 'b': ('uint8', (2,)), 'c': ('string', ())})
    values = {'a': 1, 'b': np.array([2, 3], np.uint8), 'c': 'text'}
    backwards = dict(reversed(values.items()))
    assert example.serialize(values, features) == example.serialize(backwards, features)


def test_how_features_are_stored_has_defaults():
    found = example.spec(
        {
            'image': ('uint8', (28, 28, 1)),
            'byte': ('uint8', ()),
            'label': ('int64', ()),
            'exact': ('float64', (2,)),
            'like': tf.TensorSpec([3], tf.float32),
        }
    )
    assert {name: feature.storage for name, feature in found.items()} == {
        'byte': 'values',
        'exact': 'bytes',
        'image': 'bytes',
        'label': 'values',
        'like': 'values',
    }
    assert example.element_spec(found)['image'] == tf.TensorSpec([28, 28, 1], tf.uint8)


def test_a_description_survives_json():
    features = example.spec({'a': ('uint8', (4, 4, 3), 'image'), 'b': ('int64', ())})
    assert example.spec(json.loads(json.dumps(example.as_json(features)))) == features
    assert example.spec(features) == features


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (('unit8', ()), "no dtype 'unit8'.*Did you mean 'uint8'"),
        (('int64',), 'write its dtype and shape'),
        ('int64', 'write its dtype and shape'),
        (('int64', (), 'values', 1), 'write its dtype and shape'),
        (('int64', 3), r'\(4,\) for four in a row'),
        (('int64', (None,)), 'whole numbers above 0'),
        (('int64', (0,)), 'whole numbers above 0'),
        (('uint8', (2,), 'byte'), "not 'byte'. Did you mean 'bytes'"),
        (('float64', (), 'values'), "Use 'float32'"),
        (('string', (2,)), r'a string has the shape \(\)'),
        (('string', (), 'bytes'), r'a string has the shape \(\)'),
        (('uint8', (4, 4), 'image'), r'\(rows, columns, channels\)'),
        (('uint8', (4, 4, 4), 'image'), 'with 1 or 3'),
        (('float32', (4, 4, 3), 'image'), 'an image is uint8'),
        (tf.TensorSpec([None], tf.int64), 'all dimensions must be known'),
    ],
)
def test_a_description_that_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=f"feature 'x' .*{said}"):
        example.spec({'x': given})


@pytest.mark.parametrize('given', [{}, ['image'], None])
def test_no_description_is_refused(given):
    with pytest.raises(ConfigError, match='Name each with its dtype and shape'):
        example.spec(given)


@pytest.mark.parametrize(
    ('values', 'stored', 'read_as', 'said'),
    [
        (1, ('int64', ()), {'y': ('int64', ())}, 'Feature: y .* could not be found'),
        ([1, 2], ('int64', (2,)), {'x': ('int64', ())}, 'Key: x.* Values size: 2'),
        ([1, 2], ('int64', (2,)), {'x': ('int64', (3,))}, 'Key: x.* Values size: 2'),
        (1, ('int64', ()), {'x': ('float32', ())}, "Key: x.* Data types don't match"),
        (300, ('int64', ()), {'x': ('uint8', ())}, 'Feature: x.*out of the range of uint8:.*300'),
        (2, ('int64', ()), {'x': ('bool', ())}, 'Feature: x.*out of the range of bool:.*2'),
        (
            np.zeros(5, np.uint8),
            ('uint8', (5,)),
            {'x': ('uint8', (2, 2))},
            r'Feature: x. Its bytes are not the 4 of uint8 \(2, 2\):.*5',
        ),
    ],
)
def test_records_that_hold_something_else_raise_and_say_what(values, stored, read_as, said):
    with pytest.raises(tf.errors.InvalidArgumentError, match=f'(?s){said}'):
        round_trip({'x': values}, {'x': stored}, read_as=read_as)


def test_what_is_no_image_raises():
    features = example.spec({'x': ('uint8', (2, 2, 1), 'image')})
    record = example.serialize({'x': b'no image'}, features)
    parse = tf.function(lambda records: example.parse(records, features), autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match='no JPEG, PNG, GIF or BMP'):
        parse(tf.constant([record]))


def test_what_is_no_example_raises():
    with pytest.raises(tf.errors.InvalidArgumentError, match='Could not parse example'):
        example.parse(tf.constant([b'text']), example.spec({'x': ('int64', ())}))


@pytest.mark.parametrize(
    ('value', 'feature', 'said'),
    [
        (300, ('uint8', ()), 'is int64 of shape .*cannot be stored as uint8'),
        (0.5, ('int64', ()), 'is float64 .*cannot be stored as int64'),
        ([1, 2], ('int64', ()), r'of shape \(2,\), and cannot be stored as int64 of shape \(\)'),
        ('1', ('int64', ()), 'cannot be stored as int64'),
        (1, ('string', ()), 'must be a string, but is 1'),
    ],
)
def test_values_of_another_kind_are_not_stored(value, feature, said):
    with pytest.raises(ConfigError, match=f"feature 'x' .*{said}"):
        example.serialize({'x': value}, example.spec({'x': feature}))


def test_a_feature_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"no feature 'label'.*Did you mean 'labels'"):
        example.serialize({'labels': 1}, example.spec({'label': ('int64', ())}))
