"""What a loss may ask of the other replicas."""

import tensorflow as tf


def gather(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a tensor of every replica, in the order of the global batch; differentiable.

    For losses that compare the examples of a batch with each other, such as `trainer.models.simclr`
    has one: with it they do not depend on how many replicas share the batch. With
    `train.accumulate` it is the micro-batches of one number that are gathered.

    Args:
        tensor: floating-point [B / R, ...], of the same shape on all R replicas.

    Returns:
        [B, ...]; outside a strategy's `run` the tensor itself.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensor
    return context.all_gather(tensor, axis=0)
