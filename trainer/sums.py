"""What one batch adds to a run's figures: weighted losses and metrics, as sums.

A mean over a replica cannot be averaged over replicas once their weights differ; a sum can be
added. So everything that crosses replicas, steps or workers is a sum, and is divided at the end.
"""

import functools
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from trainer.errors import ConfigError, nearest

Metrics = (
    Sequence[keras.metrics.Metric]
    | Mapping[str, keras.metrics.Metric | Sequence[keras.metrics.Metric]]
)


def per_example_loss(loss, labels, outputs) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Returns the losses, float32 [batch, ...], and the mask Keras put on the outputs, if any.

    Args:
        loss: a `keras.losses.Loss`, whose own reduction is ignored, or a function
            (labels, outputs) -> losses.
        labels, outputs: what the loss compares.

    Raises:
        ConfigError: the loss is a scalar: averaging over what, is then past knowing.
    """
    masks = [getattr(outputs, '_keras_mask', None)]
    function = loss
    if isinstance(loss, keras.losses.Loss):
        # Its own precision, float32, whatever the model computes in; Keras does the same.
        labels, outputs = tf.nest.map_structure(
            lambda tensor: tf.cast(tensor, loss.dtype), (labels, outputs)
        )
        labels, outputs = _columns(labels, outputs)
        function = loss.call
    losses = function(labels, outputs)
    masks.append(getattr(losses, '_keras_mask', None))  # of a class that the loss ignores
    losses = tf.cast(losses, tf.float32)
    if losses.shape.rank == 0:
        raise ConfigError(
            f'The loss {getattr(loss, "name", getattr(loss, "__name__", loss))!r} returns a '
            'scalar. Return one value an example, [batch] or [batch, ...]: Phalanx sums over the '
            'replicas and divides by the global batch.'
        )
    if not _fits(losses, labels) and not _fits(losses, outputs):
        raise ConfigError(
            f'The loss {getattr(loss, "name", getattr(loss, "__name__", loss))!r} returns '
            f'{losses.shape} of labels {labels.shape} and outputs {outputs.shape}, as if each '
            'example were compared with each. Give both one shape, such as outputs[:, 0].'
        )
    masks = [mask for mask in masks if mask is not None]
    return losses, functools.reduce(tf.logical_and, masks) if masks else None


def _fits(losses: tf.Tensor, compared) -> bool:
    """Whether losses may be those of elements of what was compared, as far as is known."""
    if not tf.is_tensor(compared) or compared.shape.rank is None:
        return True
    elements = losses.shape[1:]
    return compared.shape[1:][: len(elements)].is_compatible_with(elements)


def hide(batch: dict) -> dict:
    """Zeroes what is not finite in examples of weight 0: in gradients, 0 times NaN is NaN."""
    weights = batch.get('weights')
    if weights is None:
        return batch

    def finite(tensor):
        if not tensor.dtype.is_floating:
            return tensor
        hidden = _expand(tf.equal(weights, 0.0), tensor.shape.rank)
        return tf.where(hidden & ~tf.math.is_finite(tensor), tf.zeros_like(tensor), tensor)

    keys = batch.keys() & {'inputs', 'labels'}
    hidden = {key: tf.nest.map_structure(finite, batch[key]) for key in keys}
    return {**batch, **hidden}


def _expand(tensor, rank: int) -> tf.Tensor:
    """Appends dimensions of 1 up to a rank."""
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), [1] * (rank - tensor.shape.rank)], 0))


def weigh(losses, weights, mask) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the weighted sum of losses and the sum of weights, both float32 scalars."""
    if weights is None and mask is None:
        return tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32)
    total = tf.ones_like(losses)
    for factor in (weights, mask):
        if factor is not None:
            total *= _expand(tf.cast(factor, tf.float32), losses.shape.rank)
    # A zero weight hides a padded example's loss, even one that is not finite.
    return tf.reduce_sum(tf.math.multiply_no_nan(losses, total)), tf.reduce_sum(total)


class MetricSums:
    """Keras metrics as vectors: what a batch adds to their variables, and what a sum means.

    Args:
        metrics: metrics of (labels, outputs); or a dict of them, output -> metrics of this output
            of a model whose outputs are a dict, whose names then begin with the output's.
    """

    def __init__(self, metrics: Metrics = ()):
        self._of: list[str | None] = [None] * len(metrics)
        if isinstance(metrics, Mapping):
            pairs = [(output, m) for output, of in metrics.items() for m in _several(of)]
            self._of, metrics = [output for output, _ in pairs], [metric for _, metric in pairs]
        names = [_joined(of, m.name) for of, m in zip(self._of, metrics, strict=True)]
        if len({*names, 'loss'}) <= len(names):
            raise ConfigError(
                f"The names of metrics must differ, and not be 'loss'; got {names}. "
                'Give each its own name=.'
            )
        for metric in metrics:
            if not metric.variables:
                raise ConfigError(
                    f'The metric {metric.name!r} has no variables before it sees data, so nothing '
                    'can be summed. Where it is made, call its update_state on any batch, then '
                    'its reset_state.'
                )
        self.metrics = list(metrics)
        self.shapes = [[v.shape for v in m.variables] for m in metrics]
        self.sizes = [tf.TensorShape(s).num_elements() for shapes in self.shapes for s in shapes]

    @property
    def names(self) -> list[str]:
        """The names of all results; a metric may have several."""
        return list(self.results(tf.zeros([sum(self.sizes)], tf.float64)))

    def increments(self, labels, outputs, weights) -> list[tf.Tensor]:
        """What one batch adds to each variable of each metric, flattened, as float32."""
        sums = []
        if self.metrics and outputs is None:
            raise ConfigError(
                'There are metrics, but no outputs for them: let the function of the losses return '
                '(losses, outputs), or set METRICS = [].'
            )
        for of, metric in zip(self._of, self.metrics, strict=True):
            zeros = [tf.zeros(v.shape, v.dtype) for v in metric.variables]
            y, predicted, weight = _of_output(of, labels, outputs, weights)
            for v in metric.stateless_update_state(zeros, y, predicted, sample_weight=weight):
                sums.append(tf.reshape(tf.cast(v, tf.float32), [-1]))
        return sums

    def results(self, sums: tf.Tensor) -> dict[str, float]:
        """The metrics of everything that was summed; `sums` is float64 [sum(sizes)]."""
        parts = iter(tf.split(sums, self.sizes) if self.sizes else [])
        values: dict[str, float] = {}
        for of, metric, shapes in zip(self._of, self.metrics, self.shapes, strict=True):
            state = [
                tf.cast(tf.reshape(next(parts), shape), variable.dtype)
                for shape, variable in zip(shapes, metric.variables, strict=True)
            ]
            result = metric.stateless_result(state)
            named = result if isinstance(result, dict) else {metric.name: result}
            values.update({_joined(of, name): float(value) for name, value in named.items()})
        return values


def part_of(labels, output: str):
    """Returns the labels of one output: its own where labels are a dict that has them."""
    return labels[output] if isinstance(labels, dict) and output in labels else labels


def _several(metrics) -> Sequence[keras.metrics.Metric]:
    return [metrics] if isinstance(metrics, keras.metrics.Metric) else metrics


def _joined(output: str | None, name: str) -> str:
    return name if output is None else f'{output}_{name}'


def _of_output(output: str | None, labels, outputs, weights) -> tuple:
    """What a metric is given: labels, outputs, weights."""
    if output is not None:
        if not isinstance(outputs, dict) or output not in outputs:
            has = sorted(outputs) if isinstance(outputs, dict) else []
            raise ConfigError(
                f'There is a metric for the output {output!r}, but the outputs are '
                f'{", ".join(map(repr, has)) or "no dict"}.{nearest(output, has)}'
            )
        labels, outputs = part_of(labels, output), outputs[output]
    mask = getattr(outputs, '_keras_mask', None)
    if mask is not None and weights is not None:
        # Keras refuses weights of examples [batch] beside a mask of elements [batch, time].
        weights = _expand(weights, mask.shape.rank) * tf.cast(mask, tf.float32)
        outputs = tf.identity(outputs)  # without the mask
    return *_columns(labels, outputs), weights


def _columns(labels, outputs) -> tuple:
    """Gives one number an example, [batch], as [batch, 1].

    What is Keras's takes the last axis for one of an example, and would average over the batch.
    """
    if not (tf.is_tensor(labels) and tf.is_tensor(outputs)):
        return labels, outputs
    if labels.shape.rank != 1 or outputs.shape.rank != 1:
        return labels, outputs
    return labels[:, tf.newaxis], outputs[:, tf.newaxis]


def first_replica(strategy, value):
    """A value that is equal on all replicas, taken from one of this worker's."""
    return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], value)
