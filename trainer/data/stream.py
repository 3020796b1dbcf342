"""Data without random access: a generator or a tf.data.Dataset of the user's own, read in order."""

import collections
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import example, order
from trainer.data.bad_records import reason
from trainer.data.source import Features, Source
from trainer.errors import BadRecord, ConfigError

# Elements whose bytes stand for the whole stream in its fingerprint.
_FIRST = 32
# Bytes read last, kept for those who ask for them once more: the search for a bad element does.
_KEPT = 2**24
_TENSOR = 256  # Of a tensor, without its contents.
# So many elements ahead are read through; for one farther off the stream is begun anew.
_AHEAD = 4096

Element = Any  # A tensor, or a structure of tensors.


class Stream(Source):
    """Examples in the order in which they come, one after another, epoch after epoch.

    Position p of a run reads the p-th element. Every worker goes through all elements as they
    come and parses those that its replicas need, so the order is the same on any topology. Who
    resumes passes over all that has been read of the epoch, unparsed.

    Args:
        name: stands for the contents, of which only the first elements are looked at.
        elements: returns a new tf.data.Dataset or, if there are `features`, an iterable of dicts;
            the same elements in the same order whenever it is called, in every process.
        features: what the dicts hold: name -> (dtype, shape).
        parse: element -> features, in graph operations; None takes dicts of tensors as they are.
        num_examples: how many elements there are; None if that is not known. Evaluation and
            lengths in epochs need it.

    Raises:
        ConfigError: these do not fit together; later, when it is read, that an element is not as
            it should be, or that there are none.
    """

    in_order_only = True

    def __init__(
        self,
        name: str,
        elements: Callable[[], tf.data.Dataset | Iterable[Mapping[str, Any]]],
        *,
        features: Mapping[str, Any] | None = None,
        parse: Callable[[Element], Features] | None = None,
        num_examples: int | None = None,
    ):
        if num_examples is not None and num_examples < 1:
            raise ConfigError(f'The stream {name!r} has {num_examples} examples: it needs one.')
        self._name, self._elements, self._num_examples = name, elements, num_examples
        self._features = None if features is None else example.spec(features)
        self._parse = parse or (lambda element: element)
        self._cursor = _Cursor(self._endless)

    @property
    def num_examples(self) -> int | None:
        return self._num_examples

    @functools.cached_property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        parsed = self._raw().enumerate().map(lambda _, element: self._parse(element)).element_spec
        whole = isinstance(parsed, dict) and all(
            isinstance(spec, tf.TensorSpec) and spec.shape.is_fully_defined()
            for spec in parsed.values()
        )
        if not whole:
            raise ConfigError(
                f'The stream {self._name!r} must give a dict of tensors of fixed shapes, but gives '
                f'{parsed}. Let `parse` return one; tf.ensure_shape makes a shape known.'
            )
        return parsed

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the name, the number of elements, what they are, and the first ones."""
        digest = hashlib.sha256(repr((self._name, self._num_examples)).encode())
        digest.update(repr(sorted(self.element_spec.items())).encode())
        read = 0
        try:
            for element in self._raw().take(_FIRST).as_numpy_iterator():
                for part in map(np.asarray, tf.nest.flatten(element)):
                    digest.update(repr((part.dtype.str, part.shape, part.tolist())).encode())
                read += 1
        except tf.errors.OpError as error:
            where = self.where(read)
            raise ConfigError(f'{where} cannot be used: {reason(error)}.') from error
        if not read:
            raise ConfigError(f'The stream {self._name!r} has no elements.')
        return digest.hexdigest()

    def records(self, positions: tf.Tensor, *, seed: int) -> tf.Tensor:
        del seed
        return positions % self._num_examples if self._num_examples else positions

    def where(self, index: int) -> str:
        return f'element {index} of the stream {self._name!r}'

    def fetch(self, indices: tf.Tensor) -> Features:
        """Reads some elements again, from the beginning; for all that is not training itself."""
        spec = self.element_spec
        tensors = tf.numpy_function(
            self._read, [indices], [each.dtype for each in spec.values()], stateful=False
        )
        return {
            name: tf.ensure_shape(tensor, [indices.shape[0], *each.shape])
            # Outside a graph TensorFlow returns one tensor as itself and not in a list.
            for (name, each), tensor in zip(spec.items(), tf.nest.flatten(tensors), strict=True)
        }

    def from_position(self, first: int, left_out: order.Windows) -> tf.data.Dataset:
        """Returns (position, element number, element) from the first-th of training on, endless.

        Args:
            first: counted without what is left out.
            left_out: positions that are not read.
        """
        first = int(order.used(tf.constant([first], tf.int64), left_out)[0])
        passed_over = int(self._id(first))
        if passed_over:
            logging.info(
                'the stream %r: passing over %d elements, unparsed', self._name, passed_over
            )
        numbered = self._endless(passed_over).enumerate(first)
        for begin, end in left_out:
            numbered = numbered.filter(
                lambda position, _, begin=begin, end=end: (position < begin) | (position >= end)
            )
        return numbered.map(lambda position, element: (position, self._id(position), element))

    def passes(self, size: int, padding: int) -> tf.data.Dataset:
        """Returns (position, element number, element) of one pass after another, endless.

        Args:
            size: of a pass; what there are too few elements for is filled up with the first one.
            padding: the element number of those.
        """
        raw = self._raw()
        elements = raw.enumerate().map(lambda number, element: (number, element))
        fill = raw.take(1).repeat(size - self._num_examples)
        padded = elements.concatenate(
            fill.map(lambda element: (tf.constant(padding, tf.int64), element))
        )
        return padded.repeat().enumerate().map(lambda position, pair: (position, *pair))

    def share(
        self,
        numbered: tf.data.Dataset,
        is_mine: Callable[[tf.Tensor], tf.Tensor] | None,
        first: int,
        size: int,
    ) -> tf.data.Dataset:
        """Returns the rows of a worker's replicas: positions, element numbers, features.

        Args:
            numbered: of `from_position` or `passes`.
            is_mine: whether the rows at some positions, counted without what is left out, are;
                None if all are.
            first: the first of these positions.
            size: rows of a replica in a step.
        """
        if is_mine is not None:
            numbered = (
                numbered.enumerate(first)
                .filter(lambda place, _: is_mine(place))
                .map(lambda _, row: row)
            )
        return numbered.map(
            lambda position, number, element: (position, number, self._parse(element)),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        ).batch(size, drop_remainder=True)

    def _id(self, position: tf.Tensor | int) -> tf.Tensor | int:
        return position % self._num_examples if self._num_examples else position

    def _read(self, indices: np.ndarray) -> list[np.ndarray]:
        try:
            with tf.device('CPU:0'):
                parsed = [self._parse(self._cursor.element(int(index))) for index in indices]
        except tf.errors.OpError as error:
            raise BadRecord(reason(error)) from None
        return [
            np.stack(
                [
                    np.asarray(features[name].numpy(), object if each.dtype == tf.string else None)
                    for features in parsed
                ]
            )
            for name, each in self.element_spec.items()
        ]

    def _raw(self, first: int = 0) -> tf.data.Dataset:
        """Returns the elements once, as many as there have to be.

        Args:
            first: of Python's dicts, how many are passed over.
        """
        if self._features is None:
            elements = self._elements()
            if not isinstance(elements, tf.data.Dataset):
                raise ConfigError(
                    f'The stream {self._name!r} gives {type(elements).__name__}: `elements` must '
                    'return a tf.data.Dataset, or dicts that `features` describes.'
                )
            if self._num_examples:
                whole = tf.data.experimental.assert_cardinality(self._num_examples)
                elements = elements.apply(whole)
            return elements
        signature = example.element_spec(self._features)
        return tf.data.Dataset.from_generator(
            functools.partial(self._checked, signature, first), output_signature=signature
        )

    def _endless(self, first: int) -> tf.data.Dataset:
        """Returns all elements from the first-th on, pass after pass."""
        if self._features is not None or self._num_examples:
            # Python passes over some without TensorFlow, a hundred times faster.
            begun = self._raw(first) if self._features is not None else self._raw().skip(first)
            return begun.concatenate(self._raw().repeat())
        return self._raw().repeat().skip(first)

    def _checked(
        self, signature: dict[str, tf.TensorSpec], first: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the user's dicts from the first-th on, each with a word on what is wrong."""
        place = number = 0  # In the run, and in this pass.
        iterator = iter(self._elements())
        while True:
            try:
                element = next(iterator)
            except StopIteration:
                if self._num_examples and number < self._num_examples:
                    raise BadRecord(
                        f'the stream has ended after {number} elements, not {self._num_examples}'
                    ) from None
                if place >= first or not number:
                    return
                iterator, number = iter(self._elements()), 0
                continue
            except Exception as error:
                raise BadRecord(f'it raised {type(error).__name__}: {error}') from error
            if number == self._num_examples:
                raise BadRecord(f'the stream goes on after its {number} elements')
            if place >= first:
                yield _as(signature, element)
            place, number = place + 1, number + 1


def _as(signature: dict[str, tf.TensorSpec], element: Any) -> dict[str, np.ndarray]:
    """Returns a dict of arrays as they should be.

    Raises:
        BadRecord: it cannot be.
    """
    if not isinstance(element, Mapping) or element.keys() != signature.keys():
        what = sorted(element) if isinstance(element, Mapping) else type(element).__name__
        raise BadRecord(f'it is {what} instead of a dict of {sorted(signature)}')
    result = {}
    for name, spec in signature.items():
        # As objects, strings keep zeros at their ends; so in `Stream._read`.
        array = np.asarray(element[name], object if spec.dtype == tf.string else None)
        if spec.dtype != tf.string:
            dtype = spec.dtype.as_numpy_dtype
            if not np.can_cast(array.dtype, dtype, 'same_kind'):
                raise BadRecord(f'{name!r} is {array.dtype.name} and not {spec.dtype.name}')
            array = array.astype(dtype)
        if array.shape != tuple(spec.shape):
            raise BadRecord(f'{name!r} has the shape {array.shape} and not {tuple(spec.shape)}')
        result[name] = array
    return result


class _Cursor:
    """Elements by number for those who ask in order, or for the last ones again; any thread."""

    def __init__(self, elements: Callable[[int], tf.data.Dataset]):
        self._elements = elements
        self._lock = threading.Lock()
        self._iterator: Iterator | None = None
        self._next = 0
        self._last: collections.OrderedDict[int, Element] = collections.OrderedDict()
        self._bytes = 0  # Of the last ones.

    def element(self, number: int) -> Element:
        """Returns an element.

        Raises:
            tf.errors.OpError: it cannot be read.
        """
        with self._lock:
            if number in self._last:
                return self._last[number]
            if self._iterator is None or not self._next <= number < self._next + _AHEAD:
                self._iterator, self._next = iter(self._elements(number)), number
                self._last.clear()
                self._bytes = 0
            try:
                while self._next <= number:
                    element = next(self._iterator)
                    self._last[self._next] = element
                    self._bytes += _size(element)
                    self._next += 1
                    while self._bytes > _KEPT and len(self._last) > 1:
                        self._bytes -= _size(self._last.popitem(last=False)[1])
            except tf.errors.OpError:
                self._iterator = None
                raise
            return self._last[number]


def _size(element: Element) -> int:
    """Returns about how many bytes the tensors of an element take."""
    return sum(
        _TENSOR + sum(map(len, tensor.numpy().flat if tensor.shape.rank else [tensor.numpy()]))
        if tensor.dtype == tf.string
        else _TENSOR + tensor.dtype.size * tensor.shape.num_elements()
        for tensor in tf.nest.flatten(element, expand_composites=True)
    )
