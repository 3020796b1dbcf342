"""Checks that model, loss and data fit together, made before anything expensive."""

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.data.pipeline import Data
from trainer.errors import ConfigError


def check_accumulate(accumulate: int, batch_size: int, num_replicas: int) -> None:
    """Raises ConfigError unless each replica's batch can be cut into `accumulate` equal parts."""
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError(f'train.accumulate = {accumulate!r} must be a whole number, 1 or more.')
    per_replica = batch_size // num_replicas
    if per_replica % accumulate:
        fitting = [k for k in range(1, per_replica + 1) if per_replica % k == 0]
        raise ConfigError(
            f'train.accumulate = {accumulate} does not divide the {per_replica} examples of a '
            f'replica (batch_size {batch_size} on {num_replicas} replicas). '
            f'{", ".join(map(str, fitting))} do.'
        )


def check_labels(data: Data, loss: Callable, output_spec) -> None:
    """Raises ConfigError if class labels lie outside the classes that the model tells apart.

    On a GPU such a label makes the loss NaN without a word. Only sparse cross-entropies on a
    single output are looked at, and only where the source knows the bounds of its labels.
    """
    sparse = isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    bounds = data.source.bounds(data.label)
    if not sparse or bounds is None or tf.nest.is_nested(output_spec):
        return
    least, greatest = bounds
    classes = output_spec.shape[-1]
    if least < 0 or greatest >= classes:
        raise ConfigError(
            f'The labels {data.label!r} run from {least:g} to {greatest:g}, but the model has '
            f'{classes} outputs, for classes 0 to {classes - 1}. Set NUM_CLASSES = '
            f'{int(greatest) + 1}, or number the labels from 0.'
        )
