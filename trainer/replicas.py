"""What a loss may ask of the other replicas."""

import contextlib
import contextvars
from collections.abc import Iterator

import tensorflow as tf

from trainer.errors import ConfigError

_in_parts: contextvars.ContextVar[bool] = contextvars.ContextVar('in_parts', default=False)


@contextlib.contextmanager
def in_parts(they_are: bool) -> Iterator[None]:
    """Says that what is traced within the block sees a part of a batch, or cannot reduce."""
    token = _in_parts.set(they_are)
    try:
        yield
    finally:
        _in_parts.reset(token)


def gather(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a tensor of every replica, in the order of the global batch; differentiable.

    For losses that compare the examples of a batch with each other, such as `trainer.models.simclr`
    has one: with it they do not depend on how many replicas share the batch.

    Args:
        tensor: floating-point [B / R, ...], of the same shape on all R replicas.

    Returns:
        [B, ...]; outside a strategy's `run` the tensor itself.

    Raises:
        ConfigError: there is no whole batch at a time, because of `train.accumulate`,
            `train.canonical_shards` or `train.jit_compile`.
    """
    if _in_parts.get():
        raise ConfigError(
            'The loss compares examples of the whole batch (trainer.replicas.gather), which does '
            'not go with train.accumulate, train.canonical_shards or train.jit_compile. Unset them.'
        )
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensor
    return context.all_gather(tensor, axis=0)
