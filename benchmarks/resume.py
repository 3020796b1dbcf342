"""The time from nothing to the first batch, of a run that resumes late and of one that has begun.

Ours computes which records a step reads, so step 1,000,000 is as near as step 10. What is usual,
`Dataset.skip` behind `shuffle`, reads everything before; it is measured at step 10,000.
"""

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
EARLY, LATE, SKIPPED = 10, 1_000_000, 10_000


def main() -> None:
    options = pairs.arguments(__doc__, rounds=51)
    strategy = build_strategy(cluster=Cluster(), devices_per_worker=1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    labels = random.integers(0, 10, 60_000)
    data = Data(Arrays({'image': images, 'label': labels}), preprocess=scale_images)
    slices = tf.data.Dataset.from_tensor_slices((images, labels))

    def ours(step: int) -> float:
        def first_batch():
            batches = train_batches(
                data, strategy, seed=0, global_batch_size=BATCH_SIZE, start_step=step
            )
            return next(batches)['ids'].numpy()

        return 1e3 * pairs.seconds(first_batch)()

    def skip(step: int) -> float:
        def first_batch():
            dataset = slices.shuffle(60_000, seed=0).repeat().batch(BATCH_SIZE).skip(step)
            return next(iter(dataset))[1].numpy()

        return 1e3 * pairs.seconds(first_batch)()

    table = pairs.Table(
        'Resuming: time to the first batch, late against early',
        'late',
        'early',
        markdown=options.markdown,
    )
    late, early = pairs.alternate(lambda: ours(LATE), lambda: ours(EARLY), rounds=options.rounds)
    table.row(f'Phalanx, step {LATE:,} and {EARLY}', late, early, 'ms', '<= 1.1')
    late, early = pairs.alternate(lambda: skip(SKIPPED), lambda: skip(EARLY), rounds=5)
    table.row(f'Dataset.skip, step {SKIPPED:,} and {EARLY}', late, early, 'ms')


if __name__ == '__main__':
    main()
