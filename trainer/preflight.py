"""Checks that model, loss and data fit together, made before anything expensive."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf

from trainer.data.batch import Data, batch_spec
from trainer.early_stop import EarlyStop
from trainer.errors import ConfigError, nearest
from trainer.retention import Keep


def check_batch_size(batch_size: int, num_replicas: int, accumulate: int = 1) -> None:
    """Raises ConfigError unless the global batch can be cut into equal parts.

    Args:
        batch_size: global batch size.
        num_replicas: over all workers.
        accumulate: micro-batches of each replica.
    """
    for name, value in (('batch size', batch_size), ('number of micro-batches', accumulate)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f'The {name} is {value!r}; it must be a whole number of 1 or more.')
    parts = num_replicas * accumulate
    if batch_size % parts:
        smaller = batch_size // parts * parts
        fitting = f'{smaller} or {smaller + parts}' if smaller else str(parts)
        cut = f' in {accumulate} micro-batches' if accumulate > 1 else ''
        raise ConfigError(
            f'The global batch of {batch_size} examples cannot be shared equally by '
            f'{num_replicas} replicas{cut}. Set BATCH_SIZE to a multiple of {parts}, such as '
            f'{fitting}.'
        )


def check_eval_data(train_data: Data, eval_data: Data) -> None:
    """Raises ConfigError unless evaluation gives the model the inputs that training gives it."""
    trained, evaluated = batch_spec(train_data)['inputs'], batch_spec(eval_data)['inputs']
    if _kinds(trained) != _kinds(evaluated):
        raise ConfigError(
            f'The inputs of training are {_shown(trained)}, those of evaluation '
            f'{_shown(evaluated)}. Set inputs, source and preprocess of both alike.'
        )


def _kinds(spec) -> dict:
    """Shapes, and dtypes as far as models tell them apart: they cast floating-point inputs."""
    specs = spec if isinstance(spec, dict) else {'': spec}
    return {
        name: (each.shape[1:].as_list(), 'float' if each.dtype.is_floating else each.dtype.name)
        for name, each in specs.items()
    }


def _shown(spec) -> str:
    if isinstance(spec, dict):
        return ', '.join(f'{name} {_shown(each)}' for name, each in sorted(spec.items()))
    return f'{spec.dtype.name}{list(spec.shape[1:])}'


def check_layers(
    model: keras.Model,
    num_replicas: int,
    *,
    jit_compile: bool = False,
    canonical: int | None = None,
    accumulate: int = 1,
) -> None:
    """Raises ConfigError if a layer adds up over replicas where that cannot be.

    Args:
        model: what is trained.
        num_replicas: over all workers.
        jit_compile, canonical, accumulate: `jit_compile`, `canonical_shards` and `accumulate` of
            `trainer.train`.
    """
    layers = [layer for layer in model._flatten_layers() if getattr(layer, 'synchronized', False)]
    if layers and canonical:
        raise ConfigError(
            f'train.canonical_shards does not go with the layer {layers[0].name!r}, which is '
            'synchronized: shards are computed one after the other. Set synchronized=False in the '
            'layer, which then takes the statistics of a shard, or use another normalisation.'
        )
    if layers and accumulate > 1 and num_replicas > 1:
        raise ConfigError(
            f'train.accumulate = {accumulate} does not go with the layer {layers[0].name!r}, which '
            'is synchronized: TensorFlow cannot reduce over replicas within a loop. Set '
            'synchronized=False in the layer, or use another normalisation (group, layer).'
        )
    if layers and jit_compile and num_replicas > 1:
        raise ConfigError(
            f'train.jit_compile does not go with the layer {layers[0].name!r}, which is '
            'synchronized: XLA cannot compile what reduces over replicas. Set '
            'train.jit_compile = False, or synchronized=False in the layer; norm does it in the '
            'models here.'
        )


def measured(
    trained: Sequence[str], evaluated: Sequence[str], metrics: Sequence[str], evaluates: bool
) -> list[str]:
    """Returns 'train/loss', 'eval/loss', ... for all that a run measures.

    Args:
        trained, evaluated: the names of losses in training and in evaluation.
        metrics: their names.
        evaluates: whether it has data for evaluation.

    Raises:
        ConfigError: a metric has the name of a loss.
    """
    taken = {*trained, *evaluated, 'gradient_norm'}
    for name in metrics:
        if name in taken:
            raise ConfigError(
                f'A metric is named {name!r}, as a loss or the norm of gradients is. Give it '
                'another name.'
            )
    found = [f'train/{name}' for name in (*trained, *metrics, 'gradient_norm')]
    return found + [f'eval/{name}' for name in (*evaluated, *metrics) if evaluates]


def check_metrics(keep: Keep, early_stop: EarlyStop | None, measured: Sequence[str]) -> None:
    """Raises ConfigError if something is decided by what this run never measures."""
    if early_stop is not None and early_stop.metric not in measured:
        raise ConfigError(
            f'EarlyStop.metric is {early_stop.metric!r}, which this run does not measure.'
            f'{nearest(early_stop.metric, measured)} It measures {", ".join(measured)}.'
        )
    if not keep.best:
        return
    if keep.metric not in measured:
        raise ConfigError(
            f'Keep.best = {keep.best} goes by Keep.metric = {keep.metric!r}, which this run does '
            f'not measure.{nearest(keep.metric, measured)} It measures {", ".join(measured)}.'
        )


def check_labels(data: Data, loss: Callable | Mapping[str, Callable], output_spec) -> int | None:
    """Raises ConfigError if class labels lie outside the classes that the model tells apart.

    On a GPU such a label makes the loss NaN without a word. Only sparse cross-entropies are looked
    at, and of several outputs with losses of their own only bounds that the source knows.

    Returns:
        What labels must be below, if the source does not know their bounds, or knows of some that
        are to be skipped: they are to be checked as they are read. None if all is well.
    """
    if isinstance(data.label, tuple) and isinstance(loss, Mapping):
        for name in loss:
            if name not in data.label:
                raise ConfigError(
                    f'There is a loss for the output {name!r}, but Data.label is {data.label}.'
                    f'{nearest(name, data.label)} Name the label of an output as the output.'
                )
    if not isinstance(data.label, str) and isinstance(loss, keras.losses.Loss):
        raise ConfigError(
            f'The loss {loss.name!r} compares one label, but Data.label is {data.label!r}. Give a '
            'dict with a loss for each output, or a function of your own.'
        )
    if isinstance(loss, Mapping):
        for name, each in loss.items():
            label = name if isinstance(data.label, tuple) else data.label
            if label and data.source.bounds(label):
                check_labels(dataclasses.replace(data, label=label), each, output_spec[name])
        return None
    # The bounds may be those of a class that the loss ignores.
    sparse = (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy) and loss.ignore_class is None
    )
    if not sparse or tf.nest.is_nested(output_spec) or not isinstance(data.label, str):
        return None
    classes = output_spec.shape[-1]
    if data.class_weights is not None and len(data.class_weights) != classes:
        raise ConfigError(
            f'Data.class_weights has {len(data.class_weights)} numbers, but the model has '
            f'{classes} outputs: give one for each class.'
        )
    bounds = data.source.bounds(data.label)
    if bounds is None:
        return classes
    least, greatest = bounds
    if least >= 0 and greatest < classes:
        return None
    if data.on_bad_record == 'stop':
        raise ConfigError(
            f'The labels {data.label!r} run from {least:g} to {greatest:g}, but the model has '
            f'{classes} outputs, for classes 0 to {classes - 1}. Set NUM_CLASSES = '
            f'{int(greatest) + 1}, or number the labels from 0.'
        )
    return classes
