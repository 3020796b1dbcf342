"""Where numbers stop being finite in an eager step: the layer, the operation, the records.

Compiled steps tell no more than that something was not finite. In an eager one, each layer can be
looked at as it is called, and each operation as it is done.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

# The public `tf.debugging.enable_check_numerics` ends a step at the first number that is not
# finite, a mask's as well as a mistake's, so nothing could be said about what follows from it.
from tensorflow.python.framework import op_callbacks

_LIBRARIES = tuple(os.path.dirname(module.__file__) + os.sep for module in (tf, keras))
_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass(frozen=True)
class Finding:
    """The first place of a replica where something was not finite that was before.

    Attributes:
        place: "the layer 'cnn/dense'", "the loss function" or "the batch's inputs".
        replica: on which replica.
        records: the record numbers of the rows that are not finite; empty where rows are not
            examples.
    """

    place: str
    replica: int
    records: tuple[int, ...] = ()

    def __str__(self) -> str:
        which = f' for record{"s" * (len(self.records) > 1)} ' if self.records else ''
        return f'{self.place}{which}{some(self.records)} (replica {self.replica})'


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation that made something that is not finite out of finite numbers.

    Attributes:
        name: TensorFlow's, such as 'Log'.
        place: as in `Finding`, or ''.
        where: file, line and function that called it, of neither TensorFlow nor Keras; or ''.
        backward: whether it belongs to the backward pass.
        replica: on which replica.
    """

    name: str
    place: str
    where: str
    backward: bool
    replica: int

    def __str__(self) -> str:
        way = ' of the backward pass' if self.backward else ''
        return f'{self.name}{way}{f", {self.where}" if self.where else ""}'


class Watch:
    """Looks at the layers, the loss function and the operations of one eager step.

    Attributes:
        findings: where it was seen, in order; only the first matters, others follow from it.
        operations: that made it, in order. Some may be meant, a mask's for one.
    """

    def __init__(self):
        self.findings: list[Finding] = []
        self.operations: list[Operation] = []
        self._calls: list[keras.Layer] = []
        self._here = threading.local()  # Replicas of one process run in threads.

    def replica(self, index: int, ids: np.ndarray) -> None:
        """Says which replica this thread now works for, and on which records, int64 [rows]."""
        self._here.index, self._here.all, self._here.stack, self._here.parts = index, ids, [], 0

    def next_part(self, count: int) -> None:
        """Says that the next of `count` parts of the replica's batch comes now."""
        self._here.ids = self._here.all.reshape(count, -1)[self._here.parts]
        self._here.parts += 1

    def batch(self, batch: dict) -> None:
        """Looks at what a replica is given, a dict of 'inputs', 'labels' and so on."""
        for role, tensors in batch.items():
            self._look(tensors, f"the batch's {role}")

    @contextlib.contextmanager
    def layers(self, model: keras.Model) -> Iterator[None]:
        """Looks at every call of a layer of `model`, and of an operation, within the block."""
        layers = list({id(layer): layer for layer in model._flatten_layers()}.values())
        for layer in layers:
            layer.call = self._watched_layer(layer, layer.call)
        op_callbacks.add_op_callback(self._operation)
        try:
            yield
        finally:
            op_callbacks.remove_op_callback(self._operation)
            for layer in layers:
                del layer.call  # The class has its own.

    def loss(self, function: Callable) -> Callable:
        """Returns a loss function that does the same and is looked at."""

        @functools.wraps(function)
        def watched(*args):
            self._stack.append('')
            try:
                losses = function(*args)
            finally:
                self._stack.pop()
            self._look(losses, 'the loss function')
            return losses

        return watched

    def cause(self) -> Operation | None:
        """Returns the operation that is most likely the first that went wrong."""
        forward = [each for each in self.operations if not each.backward]
        if not self.findings:  # All that is not finite came with the gradients.
            backward = [each for each in self.operations if each.backward]
            return (backward or forward or [None])[0]
        place, replica = self.findings[0].place, self.findings[0].replica
        inside = [each for each in forward if (each.place, each.replica) == (place, replica)]
        return inside[0] if inside else None

    def order(self) -> dict[str, int]:
        """Returns for the path of each variable when its layer was called."""
        # An outer layer is called before those within it, which are the ones that count.
        return {v.path: index for index, layer in enumerate(self._calls) for v in layer.weights}

    @property
    def _stack(self) -> list[str]:
        return self._here.stack

    def _place(self) -> str:
        stack = getattr(self._here, 'stack', None)
        if not stack:
            return ''
        return f'the layer {"/".join(stack)!r}' if stack[-1] else 'the loss function'

    def _watched_layer(self, layer: keras.Layer, call: Callable) -> Callable:
        @functools.wraps(call)
        def watched(*args, **kwargs):
            if self._stack:  # What the model itself is given was looked at.
                self._look((args, kwargs), self._place())
            self._stack.append(layer.name)
            self._calls.append(layer)
            try:
                outputs = call(*args, **kwargs)
                self._look(outputs, self._place())
            finally:
                self._stack.pop()
            return outputs

        return watched

    def _look(self, structure, place: str) -> None:
        index = self._here.index
        if any(each.replica == index for each in self.findings):
            return
        for tensor in tf.nest.flatten(structure):
            if not is_finite(tensor):
                self.findings.append(Finding(place, index, self._records(tensor)))
                return

    def _records(self, tensor: tf.Tensor) -> tuple[int, ...]:
        array, ids = np.asarray(tensor), self._here.ids
        if array.ndim == 0 or len(array) != len(ids):
            return ()
        good = np.isfinite(array.astype(np.float64)).reshape(len(ids), -1).all(axis=1)
        return tuple(int(number) for number in ids[~good])

    def _operation(self, op_type, inputs, attrs, outputs, op_name=None, graph=None) -> None:
        del attrs, op_name
        if graph is not None or all(is_finite(each) for each in outputs):
            return
        if not all(is_finite(each) for each in inputs):
            return  # It hands on what was there.
        name = op_type.decode() if isinstance(op_type, bytes) else op_type
        stack = traceback.extract_stack()
        self.operations.append(
            Operation(
                name,
                self._place(),
                _where(stack),
                any(f.name == 'gradient' and 'backprop' in f.filename for f in stack),
                getattr(self._here, 'index', 0),
            )
        )


def is_finite(value) -> bool:
    """Returns whether no number in an eager tensor is infinite or NaN; True for all else."""
    if not tf.is_tensor(value) or tf.is_symbolic_tensor(value) or not value.dtype.is_floating:
        return True
    if isinstance(value, tf.IndexedSlices):
        value = value.values
    return bool(np.isfinite(np.asarray(value).astype(np.float64, copy=False)).all())


def some(numbers: Sequence[int], at_most: int = 10) -> str:
    """Returns the first numbers of a row as text, and how many more there are."""
    more = f' and {len(numbers) - at_most} more' if len(numbers) > at_most else ''
    return f'{", ".join(map(str, numbers[:at_most]))}{more}'


def _where(stack: traceback.StackSummary) -> str:
    """The innermost line below the step that neither TensorFlow, nor Keras, nor the step has."""
    for frame in reversed(stack):
        folder, file = os.path.split(os.path.abspath(frame.filename))
        if folder == _HERE and file == 'step.py':
            break
        if folder != _HERE and not frame.filename.startswith(_LIBRARIES):
            return f'{frame.filename}, line {frame.lineno}, in {frame.name}'
    return ''
