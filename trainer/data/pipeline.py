"""Batches for each replica: which rows of the global batch it gets, and when."""

import atexit
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from trainer.data import order
from trainer.data.batch import PADDING, Batch, Data, batch_spec, eval_batch, train_batch
from trainer.data.workers import DataWorkers
from trainer.errors import ConfigError

_living: weakref.WeakSet[Iterator] = weakref.WeakSet()


def train_batches(
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int,
    left_out: order.Windows = (),
    num_classes: int | None = None,
    workers: DataWorkers | None = None,
) -> Iterator:
    """Returns an endless iterator over the batches of training, in the order of `order`.

    Replica r of R gets rows [r * B / R, (r + 1) * B / R) of each global batch of B, whichever
    worker it lives on, and each worker reads its own rows only. Batches may straddle epochs.

    Args:
        data: What to read.
        strategy: The strategy whose replicas the batches are for.
        seed: Of the order and of augmentation, in [0, 2**31).
        global_batch_size: Examples in a step over all replicas, B.
        start_step: The step of the first batch.
        left_out: Positions that are not read, see `order.used`.
        num_classes: What labels must be below; others are damage. None if there is no such bound.
        workers: Who makes the batches; None makes them here. The bits are the same.

    Returns:
        An iterator whose elements are for `strategy.run`. Each replica gets a dict of `inputs`,
        `labels`, `ids` (int64 [B / R], record numbers; -2 - n for a record n that is damaged) and,
        if anything is weighted or may be skipped, `weights` (float32 [B / R]).

    Raises:
        ConfigError: The batch size does not fit the strategy, `data` does not fit together, or
            the data workers are not there or of another run.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f'The seed is {seed!r}; it must be a whole number from 0 to 2**31 - 1.')
    _check_batch_size(global_batch_size, strategy)

    def read_at(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        positions = order.used(positions, left_out)
        return positions, data.source.records(positions, seed=seed)

    batch = train_batch(data, seed=seed, num_classes=num_classes)
    come = None
    if data.source.in_order_only:
        come = functools.partial(
            data.source.from_position, start_step * global_batch_size, left_out
        )
    if workers is not None:
        batch = workers.remote('train', batch, data, seed=seed, num_classes=num_classes)
    calls = workers and workers.calls
    return _distribute(data, strategy, global_batch_size, start_step, read_at, batch, come, calls)


def train_records(
    data: Data,
    steps: Iterable[int],
    *,
    seed: int,
    global_batch_size: int,
    left_out: order.Windows = (),
) -> Iterator[np.ndarray]:
    """Yields the record numbers, int64 [B], of the global batch of each of some steps."""
    for step in steps:
        positions = order.used(order.positions(step, global_batch_size), left_out)
        yield data.source.records(positions, seed=seed).numpy()


def eval_batches(
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    global_batch_size: int,
    num_classes: int | None = None,
    workers: DataWorkers | None = None,
) -> tuple[Iterator, int]:
    """Returns an iterator over the examples in the order of the source, each exactly once.

    Rows are divided among replicas as in `train_batches`. The last batch is filled up with rows
    of `ids` PADDING and weight 0. The iterator has no end, which saves the workers from agreeing on
    one before every step, and starts over after each pass, so it may serve many.

    Args:
        data: What to read; its `augment` is not applied.
        strategy: The strategy whose replicas the batches are for.
        global_batch_size: Examples in a step over all replicas.
        num_classes: As for `train_batches`.
        workers: Who makes the batches; None makes them here. The bits are the same.

    Returns:
        The iterator, whose elements are as in training with `weights` always there, and the
        number of steps in a pass.

    Raises:
        ConfigError: As for `train_batches`.
    """
    _check_batch_size(global_batch_size, strategy)
    num_examples = data.source.num_examples
    if num_examples is None:
        raise ConfigError('Evaluation needs to know how many examples there are: num_examples.')
    num_steps = -(-num_examples // global_batch_size)

    def read_at(positions: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        in_pass = positions % (num_steps * global_batch_size)
        return positions, tf.where(in_pass < num_examples, in_pass, PADDING)

    batch = eval_batch(data, num_classes=num_classes)
    come = None
    if data.source.in_order_only:
        come = functools.partial(data.source.passes, num_steps * global_batch_size, PADDING)
    if workers is not None:
        batch = workers.remote('eval', batch, data, num_classes=num_classes)
    calls = workers and workers.calls
    made = _distribute(data, strategy, global_batch_size, 0, read_at, batch, come, calls)
    return made, num_steps


def shares(
    numbers: tf.Tensor,
    *,
    global_batch_size: int,
    num_replicas: int,
    num_local: int,
    first_replica: int,
) -> tf.Tensor:
    """Returns the positions that a worker reads for its replicas, one row per step and replica.

    Args:
        numbers: int64 [n], of the worker's rows: replica after replica, step after step.
        global_batch_size: Examples in a step over all replicas, B.
        num_replicas: Of all workers, R.
        num_local: Replicas of this worker.
        first_replica: The first of them.

    Returns:
        int64 [n, B / R].
    """
    size = global_batch_size // num_replicas
    replicas = first_replica + numbers % num_local
    firsts = numbers // num_local * global_batch_size + replicas * size
    return firsts[:, tf.newaxis] + tf.range(size, dtype=tf.int64)


def _distribute(
    data: Data,
    strategy: tf.distribute.Strategy,
    global_batch_size: int,
    start_step: int,
    read_at: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
    batch: Batch,
    come: Callable[[], tf.data.Dataset] | None,
    calls: int | None,
) -> Iterator:
    """Builds the iterator of batch(*read_at(positions)) for each step and replica.

    `read_at` returns where the order leads: the positions that are read in place of those given,
    and their records, both int64 [n]. Of a stream, `come` returns all its elements instead. `calls`
    of `batch` run side by side, None as many as pays; all of them may wait at the same time.
    """
    num_replicas = strategy.num_replicas_in_sync
    size = global_batch_size // num_replicas
    batch_spec(data)  # Raises for mistakes in `data`, before threads and devices take part.

    def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        num_local = num_replicas // context.num_input_pipelines
        first_replica = context.input_pipeline_id * num_local
        # The order of some batches at a time: its many small operations cost more than its work.
        together = max(1, min(16, 2048 // size))

        @tf.autograph.experimental.do_not_convert
        def rows(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            positions = shares(
                number + tf.range(together, dtype=tf.int64),
                global_batch_size=global_batch_size,
                num_replicas=num_replicas,
                num_local=num_local,
                first_replica=first_replica,
            )
            positions, ids = read_at(tf.reshape(positions, [together * size]))
            return tf.reshape(positions, [together, size]), tf.reshape(ids, [together, size])

        def is_mine(position: tf.Tensor) -> tf.Tensor:
            replica = position % global_batch_size // size - first_replica
            return (replica >= 0) & (replica < num_local)

        if come is None:
            # One row per step and local replica: the strategy deals them out in turn.
            read = tf.data.Dataset.counter(start_step * num_local, together).map(rows).unbatch()
        else:
            first = start_step * global_batch_size
            some = is_mine if num_local < num_replicas else None
            read = data.source.share(come(), some, first, size)
        options = tf.data.Options()
        # Batches are made side by side; more threads within each would only get in their way.
        options.threading.max_intra_op_parallelism = 1
        options.experimental_warm_start = True
        if calls is not None:
            # A call that waits for its data worker holds a thread, which others would wait for.
            options.threading.private_threadpool_size = calls
        return (
            read.map(
                tf.autograph.experimental.do_not_convert(batch),
                num_parallel_calls=calls or tf.data.AUTOTUNE,
                deterministic=True,
            )
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )

    devices = strategy.extended.worker_devices
    if len(devices) == 1 and tf.DeviceSpec.from_string(devices[0]).device_type == 'CPU':
        # There is nothing to deal out or to copy, and the strategy's iterator would hand each
        # batch from thread to thread for 0.17 ms.
        resolver = strategy.cluster_resolver
        worker = resolver.task_id if resolver is not None else None
        made = iter(dataset(tf.distribute.InputContext(num_replicas, worker or 0, num_replicas)))
    else:
        made = iter(strategy.distribute_datasets_from_function(dataset))
    _living.add(made)
    return made


@atexit.register
def _end() -> None:
    """Ends the iterators that are left, while their threads can still call Python.

    An iterator waits for its calls when it goes. Python, when it ends, ends threads that call it:
    whoever goes after that waits for ever.
    """
    for iterator in list(_living):
        vars(iterator).clear()
    gc.collect()


def _check_batch_size(global_batch_size: int, strategy: tf.distribute.Strategy) -> None:
    if isinstance(global_batch_size, bool) or not isinstance(global_batch_size, int):
        raise ConfigError(f'The batch size is {global_batch_size!r}; it must be a whole number.')
    num_replicas = strategy.num_replicas_in_sync
    if global_batch_size < 1 or global_batch_size % num_replicas:
        below = global_batch_size // num_replicas * num_replicas
        sizes = [str(size) for size in (below, below + num_replicas) if size > 0]
        raise ConfigError(
            f'The batch size, {global_batch_size}, cannot be divided among {num_replicas} '
            f'replica(s). Use {" or ".join(sizes) or num_replicas}.'
        )
