"""The input pipeline against the usual `tf.data` one: batches a second, nothing else done.

Both read 60,000 images of 28x28 bytes and their labels from memory in a random order and deliver
batches of 128 float32 images, to a graph that does nothing but fetch them. `train_batches` gathers
whole batches by permuted index. The usual pipeline slices, shuffles all, repeats, and then either
batches and maps whole batches or maps single examples and batches them. Op determinism, which
takes `tf.data` its freedom of order, is left off here, and the shuffle's buffer is full when the
clock starts; both favour the usual pipeline.
"""

import functools
from collections.abc import Callable, Iterator

import pairs

# isort: split
import numpy as np
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.strategy import build_strategy

BATCH_SIZE = 128
WARM_UP = 500


def usual(images, labels, *, batch_first: bool) -> tf.data.Dataset:
    def scale(image, label):
        return {'inputs': tf.cast(image, tf.float32) / 255, 'labels': label}

    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(60_000).repeat()
    if batch_first:
        dataset = dataset.batch(BATCH_SIZE, drop_remainder=True)
        dataset = dataset.map(scale, num_parallel_calls=tf.data.AUTOTUNE)
    else:
        dataset = dataset.map(scale, num_parallel_calls=tf.data.AUTOTUNE)
        dataset = dataset.batch(BATCH_SIZE, drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def images_a_second(make_iterator: Callable[[], Iterator], count: int) -> float:
    """Fetches `count` batches from a new iterator, after some that fill buffers off the clock.

    A new one each time, or batches made while the other pipeline is measured would count.
    """
    iterator = make_iterator()
    fetch(iterator, tf.constant(WARM_UP))
    return pairs.rate(count * BATCH_SIZE, fetch, iterator, tf.constant(count))()


@tf.function(reduce_retracing=True)
def fetch(iterator, count):
    for _ in tf.range(count):
        batch = next(iterator)
        assert batch['inputs'].shape == (BATCH_SIZE, 28, 28, 1)
        assert batch['inputs'].dtype == tf.float32


def main() -> None:
    options = pairs.arguments(__doc__, rounds=15)
    strategy = build_strategy(cluster=Cluster(), devices_per_worker=1, deterministic=False)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    labels = random.integers(0, 10, 60_000)
    data = Data(Arrays({'image': images, 'label': labels}), preprocess=scale_images)

    def ours() -> Iterator:
        return train_batches(data, strategy, seed=0, global_batch_size=BATCH_SIZE, start_step=0)

    table = pairs.Table('Input pipeline', 'Phalanx', 'tf.data', markdown=options.markdown)
    for what, batch_first, count in (
        ('shuffle, batch, map', True, 4000),
        ('shuffle, map, batch', False, 1000),
    ):
        dataset = usual(images, labels, batch_first=batch_first)
        taken = pairs.alternate(
            functools.partial(images_a_second, ours, count),
            functools.partial(images_a_second, functools.partial(iter, dataset), count),
            rounds=options.rounds,
        )
        table.row(f'against {what}', *taken, 'images/s', '>= 5')


if __name__ == '__main__':
    main()
