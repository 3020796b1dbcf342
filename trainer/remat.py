"""Gradient checkpointing: layers whose activations are computed again rather than kept.

Chen et al., 'Training Deep Nets with Sublinear Memory Cost', https://arxiv.org/abs/1604.06174.
"""

import difflib
import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope

from trainer.errors import ConfigError
from trainer.groups import matches


def rematerialise(model: keras.Model, patterns: Sequence[str]) -> None:
    """Has layers forget what they have computed on the way, and compute it again backwards.

    Of each call of such a layer only the inputs are kept. Its random masks are the same the second
    time. `keras.RematScope` does not do here: it takes gradients with respect to variables, and a
    step is a function of their values.

    Args:
        model: built; its layers are changed in place. A layer within another that is chosen too
            is left alone.
        patterns: glob patterns of the names of layers, such as 'block_*'.

    Raises:
        ConfigError: a pattern matches no layer.
    """
    layers = [each for each in model._flatten_layers() if each is not model]
    names = sorted({layer.name for layer in layers})
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern.replace('*', ''), names, 3, 0.3) or names[:3]
            raise ConfigError(
                f'train.remat names {pattern!r}, which is no layer of the model. The nearest are '
                f'{", ".join(close)}.'
            )
    inner: set[int] = set()
    for layer in layers:  # Outer ones come before those within them.
        if matches(layer.name, patterns) and id(layer) not in inner:
            inner.update(id(each) for each in layer._flatten_layers())
            layer.call = _forgetful(layer, layer.call)


def _forgetful(layer: keras.Layer, call: Callable) -> Callable:
    @functools.wraps(call)
    def forgetful(*args, **kwargs):
        variables = layer.variables
        given = _Tensors((args, kwargs))
        # Of the first time; the second is traced alike.
        made: dict = {}

        @tf.recompute_grad
        def compute(*tensors):
            values, inputs = tensors[: len(variables)], tensors[len(variables) :]
            args, kwargs = given.filled(inputs)
            pairs = list(zip(variables, values, strict=True))
            # Backwards it is not within the layer's own call, which has set what it computes in.
            with _own_precision(layer), keras.StatelessScope(pairs, collect_losses=True) as scope:
                outputs = _Tensors(call(*args, **kwargs))
            if scope.losses:
                raise ConfigError(
                    f'train.remat names the layer {layer.name!r}, which adds losses of its own '
                    '(add_loss, activity_regularizer). They cannot be computed again: leave it out.'
                )
            masks = [getattr(each, '_keras_mask', None) for each in outputs.tensors]
            new = {
                index: scope.get_current_value(variable)
                for index, (variable, value) in enumerate(pairs)
                if scope.get_current_value(variable) is not value
            }
            made.update(outputs=outputs, masks=[m is not None for m in masks], new=list(new))
            return [*outputs.tensors, *(m for m in masks if m is not None), *new.values()]

        with AutocastScope(None):  # As they are, and not in half precision.
            values = [tf.convert_to_tensor(v.value) for v in variables]
        found = iter(compute(*values, *given.tensors))
        outputs = [next(found) for _ in made['outputs'].tensors]
        for output, has_mask in zip(outputs, made['masks'], strict=True):
            if has_mask:
                output._keras_mask = next(found)
        for index in made['new']:
            variables[index].assign(next(found))
        return made['outputs'].filled(outputs)

    return forgetful


class _Tensors:
    """The tensors in a structure, and the rest of it."""

    def __init__(self, structure):
        self._structure, flat = structure, tf.nest.flatten(structure)
        self._rest = [None if tf.is_tensor(each) else (each,) for each in flat]
        self.tensors = [each for each in flat if tf.is_tensor(each)]

    def filled(self, tensors: Sequence[tf.Tensor]):
        """Returns the structure with other tensors in place of its own."""
        given = iter(tensors)
        flat = [next(given) if rest is None else rest[0] for rest in self._rest]
        return tf.nest.pack_sequence_as(self._structure, flat)


def _own_precision(layer: keras.Layer) -> AutocastScope:
    """What `Layer.__call__` has its variables read in."""
    differs = layer.autocast and layer.compute_dtype != layer.variable_dtype
    return AutocastScope(layer.compute_dtype if differs else None)
