"""Sums that do not depend on how many replicas there are: elastic bits.

A global batch is divided into a fixed number of shards, a power of two, whatever the number of
replicas. What each shard adds is computed by itself, and added to that of the others in the order
of a fixed binary tree:

    shards       0   1   2   3   4   5   6   7
                  \\ /     \\ /     \\ /     \\ /
    a replica      +       +       +       +         of eight, four, two ... shards
                    \\_____/         \\_____/
    all replicas       +               +
                        \\_____________/
                               +

A replica with a power of two of neighbouring shards sums a whole subtree. So only what it comes to
crosses the network, and not every shard: each replica gets R partial sums and adds these itself.
Floating-point addition is commutative, though not associative, so the bits are those of the tree.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from trainer.errors import ConfigError


def check(shards: int, replicas: int) -> None:
    """Raises ConfigError unless the replicas can share the shards equally."""
    powers = isinstance(shards, int) and shards > 0 and not shards & (shards - 1)
    if not powers:
        raise ConfigError(
            f'train.canonical_shards = {shards!r} is no power of two. Set it to the largest number '
            'of replicas that the run may ever have, such as 8.'
        )
    if shards % replicas or replicas & (replicas - 1):
        raise ConfigError(
            f'train.canonical_shards = {shards} cannot be shared equally by {replicas} replicas in '
            'powers of two. Use 1, 2, 4 ... replicas, and at most as many as there are shards.'
        )


def sum_of(shard: Callable[[tf.Tensor], Sequence[tf.Tensor]], count: int) -> list[tf.Tensor]:
    """Computes shards one after the other, and sums them as a tree.

    Args:
        shard: number of the shard, int64 scalar -> float32 tensors.
        count: how many shards.
    """
    shapes: list[tf.Tensor] = []

    def body(index, rows):
        tensors = shard(index)
        shapes[:] = [t.shape for t in tensors]
        return index + 1, rows.write(tf.cast(index, tf.int32), _packed(tensors))

    # The loop is a function of its own, which is compiled alike for any count: were it unrolled,
    # what is optimised would cross from shard to shard.
    _, rows = tf.while_loop(
        lambda index, _: index < count,
        body,
        (tf.zeros([], tf.int64), tf.TensorArray(tf.float32, size=count)),
        parallel_iterations=1,
    )
    return _unpacked(_tree_sum(rows.stack(), count), shapes)


def over_replicas(tensors: Sequence[tf.Tensor], replicas: int) -> list[tf.Tensor]:
    """Sums float32 tensors over all replicas as a tree; the same on each of them."""
    if replicas == 1:
        return list(tensors)
    context = tf.distribute.get_replica_context()
    rows = context.all_gather(_packed(tensors)[tf.newaxis], axis=0)
    return _unpacked(_tree_sum(rows, replicas), [t.shape for t in tensors])


def _tree_sum(rows: tf.Tensor, count: int) -> tf.Tensor:
    """Sums [count, n] to [n], neighbours first; `count` is a power of two."""
    while count > 1:
        rows, count = rows[0::2] + rows[1::2], count // 2
    return rows[0]


def _packed(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def _unpacked(packed: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> list[tf.Tensor]:
    parts = tf.split(packed, [shape.num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
