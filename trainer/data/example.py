"""What records hold, as `tf.train.Example`: named features of fixed dtype and shape, both ways.

A record is described by its features: {'image': ('uint8', (28, 28, 1)), 'label': ('int64', ())}.
A third word says how a feature is stored, where that is not the default:

* 'values': one number (or string) after another, in an int64_list, float_list or bytes_list.
* 'bytes': the memory of the tensor, little-endian, in C order, as one string. The default of
  uint8 arrays, and of float64 and uint64, which the lists do not hold exactly.
* 'image': an encoded image, JPEG, PNG, GIF or BMP, as one string. It is decoded and, where its
  size is another one, brought to the shape, as those of `image_folder` are: shrunk or enlarged,
  and cropped in the middle.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from trainer.data import image_decode
from trainer.data.source import Features
from trainer.errors import ConfigError, nearest

_STORAGES = ('values', 'bytes', 'image')
_INTEGERS = ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32')
_FLOATS = ('bfloat16', 'float16', 'float32')
_IN_BYTES_ONLY = ('float64', 'uint64')
_DTYPES = (*_INTEGERS, *_FLOATS, *_IN_BYTES_ONLY, 'string')
_KINDS = {tf.int64: 'int64_list', tf.float32: 'float_list', tf.string: 'bytes_list'}
# What `decode_raw` does not know is decoded as something of equal width.
_DECODED_AS = {'bool': 'uint8', 'uint32': 'int32', 'uint64': 'int64'}


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of each record; made by `spec`, which checks it.

    Attributes:
        dtype: the name of TensorFlow's dtype, such as 'uint8' or 'string'.
        shape: of one example, all dimensions known.
        storage: 'values', 'bytes' or 'image'.
    """

    dtype: str
    shape: tuple[int, ...]
    storage: str

    @property
    def tensor_spec(self) -> tf.TensorSpec:
        return tf.TensorSpec(self.shape, self.dtype)


Spec = dict[str, Feature]


def spec(features: Mapping[str, Any]) -> Spec:
    """Checks a description of records.

    Args:
        features: For each name (dtype, shape) or (dtype, shape, storage), as in gin or, with
            lists for tuples, in JSON; or a `tf.TensorSpec`, or a `Feature`.

    Returns:
        The features in order of names.

    Raises:
        ConfigError: something in it cannot be.
    """
    if not isinstance(features, Mapping) or not features:
        raise ConfigError(
            f'The features of the records are {features!r}. Name each with its dtype and shape: '
            "{'image': ('uint8', (28, 28, 1)), 'label': ('int64', ())}."
        )
    return {str(name): _feature(name, given) for name, given in sorted(features.items())}


def as_json(spec: Spec) -> dict[str, list]:
    """Returns what `json` can write, and the function `spec` makes the same of again."""
    return {name: [f.dtype, list(f.shape), f.storage] for name, f in spec.items()}


def element_spec(spec: Spec) -> dict[str, tf.TensorSpec]:
    """Returns the shape and dtype of each feature of one example."""
    return {name: feature.tensor_spec for name, feature in spec.items()}


def parse(serialized: tf.Tensor, spec: Spec) -> Features:
    """Turns serialised examples into tensors, in graph operations on the whole batch.

    Args:
        serialized: string [B], each a `tf.train.Example`; features not in `spec` are passed over.
        spec: what they hold.

    Returns:
        For each feature of `spec` a tensor [B, ...]. Where one record lacks a feature, or has it
        in another length or out of the range of its dtype, the graph raises InvalidArgumentError.
    """
    stored = tf.io.parse_example(serialized, {n: _stored_as(f) for n, f in spec.items()})
    return {name: _decode(name, stored[name], feature) for name, feature in spec.items()}


def check(record: bytes, spec: Spec, where: str) -> None:
    """Looks whether a record holds the features of `spec`, to tell mistakes before training.

    Args:
        record: as it is stored.
        spec: what it should hold.
        where: its place, for the message.

    Raises:
        ConfigError: it is no `tf.train.Example`, or it holds something else.
    """
    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise ConfigError(
            f'{where} is no tf.train.Example. Records of other kinds cannot be read.'
        ) from None
    for name, feature in spec.items():
        if name not in features:
            raise ConfigError(
                f'{where} has no feature {name!r}, but {sorted(features)}.{nearest(name, features)}'
            )
        kind = features[name].WhichOneof('kind')
        count = len(getattr(features[name], kind).value) if kind else 0
        stored = _stored_as(feature)
        expected = math.prod(stored.shape), _KINDS[stored.dtype]
        if (count, kind) != expected:
            raise ConfigError(
                f'{where} has the feature {name!r} as {count} value(s) in a {kind}, but '
                f"{feature.dtype} of shape {feature.shape}, stored as '{feature.storage}', are "
                f'{expected[0]} in a {expected[1]}.'
            )
        if feature.storage == 'bytes':
            length = len(features[name].bytes_list.value[0])
            if length != _num_bytes(feature):
                raise ConfigError(
                    f'{where} has {length} bytes as the feature {name!r}, but {feature.dtype} of '
                    f'shape {feature.shape} are {_num_bytes(feature)}.'
                )


def serialize(example: Mapping[str, Any], spec: Spec) -> bytes:
    """Turns one example into a serialised `tf.train.Example`: equal bytes from equal values.

    Args:
        example: For each feature of `spec` an array of its dtype and shape, or what numpy makes
            one of, at most rounding floating-point numbers; str or bytes for a string; for a
            feature stored as 'image' alternatively the encoded image, taken over as it is.
            Arrays are encoded as PNG, which loses nothing.
        spec: what it holds.

    Raises:
        ConfigError: a feature is missing, or has another shape or dtype.
    """
    for name in spec:
        if name not in example:
            raise ConfigError(
                f'The example has no feature {name!r}, only {sorted(example)}.'
                f'{nearest(name, example)}'
            )
    features = {name: _encode(name, example[name], feature) for name, feature in spec.items()}
    message = tf.train.Example(features=tf.train.Features(feature=features))
    return message.SerializeToString(deterministic=True)


def _feature(name: Any, given: Any) -> Feature:
    wrong = f'The feature {name!r} of the records is {given!r}'
    if not isinstance(name, str) or not name:
        raise ConfigError(f'{wrong}; its name must be a string.')
    if isinstance(given, Feature):
        given = (given.dtype, given.shape, given.storage)
    elif isinstance(given, tf.TensorSpec):
        if not given.shape.is_fully_defined():
            raise ConfigError(f'{wrong}; all dimensions must be known.')
        given = (given.dtype.name, tuple(given.shape))
    if isinstance(given, str) or not isinstance(given, Sequence) or not 2 <= len(given) <= 3:
        raise ConfigError(
            f"{wrong}; write its dtype and shape, ('uint8', (28, 28, 1)), and, if need be, how it "
            "is stored, ('uint8', (28, 28, 1), 'image')."
        )
    dtype, shape, *rest = given
    if dtype not in _DTYPES:
        raise ConfigError(
            f'{wrong}; there is no dtype {dtype!r}, but {", ".join(_DTYPES)}.'
            f'{nearest(str(dtype), _DTYPES)}'
        )
    if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n > 0 for n in shape):
        raise ConfigError(
            f'{wrong}; its shape must be a tuple of whole numbers above 0: () for a single value, '
            '(4,) for four in a row.'
        )
    in_bytes = dtype in _IN_BYTES_ONLY or (dtype == 'uint8' and shape)
    storage = rest[0] if rest else 'bytes' if in_bytes else 'values'
    if storage not in _STORAGES:
        raise ConfigError(
            f"{wrong}; it may be stored as 'values', 'bytes' or 'image', not {storage!r}."
            f'{nearest(str(storage), _STORAGES)}'
        )
    if storage == 'values' and dtype in _IN_BYTES_ONLY:
        raise ConfigError(
            f"{wrong}; the lists of tf.train.Example hold int64 and float32 only. Use 'float32' "
            "or 'int64', or store it as 'bytes'."
        )
    if dtype == 'string' and (shape or storage != 'values'):
        raise ConfigError(f"{wrong}; a string has the shape () and is stored as 'values'.")
    if storage == 'image' and (dtype != 'uint8' or len(shape) != 3 or shape[2] not in (1, 3)):
        raise ConfigError(
            f'{wrong}; an image is uint8 of shape (rows, columns, channels), with 1 or 3 channels.'
        )
    return Feature(dtype, tuple(shape), storage)


def _stored_as(feature: Feature) -> tf.io.FixedLenFeature:
    if feature.storage != 'values' or feature.dtype == 'string':
        return tf.io.FixedLenFeature([], tf.string)
    in_list = tf.int64 if feature.dtype in _INTEGERS else tf.float32
    return tf.io.FixedLenFeature(feature.shape, in_list)


def _decode(name: str, stored: tf.Tensor, feature: Feature) -> tf.Tensor:
    """Returns the tensor [B, ...] of what `parse_example` gave for a feature."""
    if feature.storage == 'image':
        return _images(stored, feature.shape)
    dtype = tf.as_dtype(feature.dtype)
    if feature.storage == 'bytes':
        size = _num_bytes(feature)
        lengths = tf.strings.length(stored)
        wrong = f'Feature: {name}. Its bytes are not the {size} of {dtype.name} {feature.shape}:'
        with tf.control_dependencies([_check(lengths == size, wrong, lengths)]):
            raw = tf.io.decode_raw(stored, _DECODED_AS.get(dtype.name, dtype))
        if raw.dtype != dtype:
            raw = raw != 0 if dtype == tf.bool else tf.bitcast(raw, dtype)
        return tf.reshape(raw, [-1, *feature.shape])
    if stored.dtype == tf.int64 != dtype:
        low, high = (0, 1) if dtype == tf.bool else (dtype.min, dtype.max)
        within = (stored >= low) & (stored <= high)
        wrong = f'Feature: {name}. Its values are out of the range of {dtype.name}:'
        with tf.control_dependencies([_check(within, wrong, stored)]):
            return tf.cast(stored, dtype)
    return tf.cast(stored, dtype)


def _num_bytes(feature: Feature) -> int:
    return math.prod(feature.shape) * tf.as_dtype(feature.dtype).size


def _check(holds: tf.Tensor, wrong: str, values: tf.Tensor) -> tf.Operation:
    values = tf.reshape(values, [-1])
    failing = tf.boolean_mask(values, tf.reshape(~holds, [-1]))
    message = tf.strings.join([f'{wrong} ', tf.strings.format('{}', failing, summarize=3)])
    return tf.debugging.Assert(tf.reduce_all(holds), [message])


def _images(files: tf.Tensor, shape: image_decode.Shape) -> tf.Tensor:
    def plan(contents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        contents, plans = image_decode.plan(contents, shape, 'crop')
        return np.array(contents, object), plans

    contents, plans = tf.numpy_function(plan, [files], [tf.string, tf.int32], stateful=False)
    contents.set_shape(files.shape)
    plans.set_shape([*files.shape, image_decode.PLAN_SIZE])
    return image_decode.decode(contents, plans, shape)


def _encode(name: str, value: Any, feature: Feature) -> tf.train.Feature:
    if feature.dtype == 'string':
        value = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
        data = value.encode() if isinstance(value, str) else value
        if not isinstance(data, bytes):
            raise ConfigError(f'The feature {name!r} must be a string, but is {value!r}.')
        return _bytes(data)
    if feature.storage == 'image' and isinstance(value, bytes):
        return _bytes(value)
    dtype = tf.as_dtype(feature.dtype).as_numpy_dtype
    given = np.asarray(value)
    with np.errstate(all='ignore'):
        array = given.astype(dtype) if given.dtype.kind not in 'OSU' else None
    # Rounding is what floating-point numbers are about; anything else would be another value.
    kept = (_inexact(array) and _inexact(given)) or np.array_equal(array, given)
    if given.shape != feature.shape or not kept:
        raise ConfigError(
            f'The feature {name!r} is {given.dtype} of shape {given.shape}, and cannot be stored '
            f'as {feature.dtype} of shape {feature.shape}.'
        )
    if feature.storage == 'image':
        return _bytes(tf.io.encode_png(array).numpy())
    if feature.storage == 'bytes':
        return _bytes(array.astype(array.dtype.newbyteorder('<'), copy=False).tobytes())
    if feature.dtype in _INTEGERS:
        integers = array.astype(np.int64).ravel()
        return tf.train.Feature(int64_list=tf.train.Int64List(value=integers))
    floats = array.astype(np.float32).ravel()
    return tf.train.Feature(float_list=tf.train.FloatList(value=floats))


def _inexact(array: np.ndarray | None) -> bool:
    return array is not None and (array.dtype.kind == 'f' or array.dtype.name == 'bfloat16')


def _bytes(data: bytes) -> tf.train.Feature:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))
