"""What one batch adds to a run's figures: weighted losses and metrics, as sums.

A mean over a replica cannot be averaged over replicas once their weights differ; a sum can be
added. So everything that crosses replicas, steps or workers is a sum, and is divided at the end.
"""

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
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss
    losses = tf.cast(function(labels, outputs), tf.float32)
    if losses.shape.rank == 0:
        raise ConfigError(
            f'The loss {getattr(loss, "name", getattr(loss, "__name__", loss))!r} returns a '
            'scalar. Return one value an example, [batch] or [batch, ...]: Phalanx sums over the '
            'replicas and divides by the global batch.'
        )
    return losses, getattr(outputs, '_keras_mask', None)


def weigh(losses, weights, mask) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the weighted sum of losses and the sum of weights, both float32 scalars."""
    if weights is None and mask is None:
        return tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32)
    total = tf.ones_like(losses)
    for factor in (weights, mask):
        if factor is not None:
            factor = tf.cast(factor, tf.float32)
            extra = losses.shape.rank - factor.shape.rank
            total *= tf.reshape(factor, tf.concat([tf.shape(factor), [1] * extra], 0))
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
        self.metrics = list(metrics)
        self.shapes = [[v.shape for v in m.variables] for m in metrics]
        self.sizes = [tf.TensorShape(s).num_elements() for shapes in self.shapes for s in shapes]

    def increments(self, labels, outputs, weights) -> list[tf.Tensor]:
        """What one batch adds to each variable of each metric, flattened, as float32."""
        sums = []
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
