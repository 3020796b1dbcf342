"""Gradient checkpointing: layers whose activations are computed again rather than kept.

Chen et al., 'Training Deep Nets with Sublinear Memory Cost', https://arxiv.org/abs/1604.06174.
"""

import difflib
import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

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
        kept = [v for v in variables if not v.trainable]
        flat = tf.nest.flatten((args, kwargs))
        is_tensor = [tf.is_tensor(each) for each in flat]

        @tf.recompute_grad
        def outputs_and_kept(*tensors):
            values, given = tensors[: len(variables)], iter(tensors[len(variables) :])
            rest = [next(given) if one else each for one, each in zip(is_tensor, flat, strict=True)]
            args, kwargs = tf.nest.pack_sequence_as(structure, rest)
            with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
                outputs = call(*args, **kwargs)
            return outputs, [tf.convert_to_tensor(scope.get_current_value(v)) for v in kept]

        structure = (args, kwargs)
        values = [tf.convert_to_tensor(v.value) for v in variables]
        tensors = [each for one, each in zip(is_tensor, flat, strict=True) if one]
        outputs, new = outputs_and_kept(*values, *tensors)
        for variable, value in zip(kept, new, strict=True):
            variable.assign(value)
        return outputs

    return forgetful
