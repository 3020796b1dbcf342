"""What one batch adds to a run's figures: weighted losses and metrics, as sums.

A mean over a replica cannot be averaged over replicas once their weights differ; a sum can be
added. So everything that crosses replicas, steps or workers is a sum, and is divided at the end.
"""

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.errors import ConfigError


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
    masks = [mask for mask in masks if mask is not None]
    return losses, functools.reduce(tf.logical_and, masks) if masks else None


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

    hidden = {key: tf.nest.map_structure(finite, batch[key]) for key in ('inputs', 'labels')}
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
    """Keras metrics as vectors: what a batch adds to their variables, and what a sum means."""

    def __init__(self, metrics: Sequence[keras.metrics.Metric]):
        names = [metric.name for metric in metrics]
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
        mask = getattr(outputs, '_keras_mask', None)
        if mask is not None and weights is not None:
            # Keras refuses weights of examples [batch] beside a mask of elements [batch, time].
            weights = _expand(weights, mask.shape.rank) * tf.cast(mask, tf.float32)
            outputs = tf.identity(outputs)  # without the mask
        for metric in self.metrics:
            zeros = [tf.zeros(v.shape, v.dtype) for v in metric.variables]
            for v in metric.stateless_update_state(zeros, labels, outputs, sample_weight=weights):
                sums.append(tf.reshape(tf.cast(v, tf.float32), [-1]))
        return sums

    def results(self, sums: tf.Tensor) -> dict[str, float]:
        """The metrics of everything that was summed; `sums` is float64 [sum(sizes)]."""
        parts = iter(tf.split(sums, self.sizes) if self.sizes else [])
        values: dict[str, float] = {}
        for metric, shapes in zip(self.metrics, self.shapes, strict=True):
            state = [
                tf.cast(tf.reshape(next(parts), shape), variable.dtype)
                for shape, variable in zip(shapes, metric.variables, strict=True)
            ]
            result = metric.stateless_result(state)
            named = result if isinstance(result, dict) else {metric.name: result}
            values.update({name: float(value) for name, value in named.items()})
        return values


def first_replica(strategy, value):
    """A value that is equal on all replicas, taken from one of this worker's."""
    return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], value)
