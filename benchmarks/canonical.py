"""Training with `train.canonical_shards=4`, the same bits on 1, 2 and 4 replicas, and without.

The tiny model and the CNN of `loop.py`, batch 128, on logical CPU devices. The ratio is the pace
with shards over the pace without.
"""

import functools

import pairs

# isort: split
import loop

from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.strategy import build_strategy

SHARDS = 4


def main() -> None:
    options = pairs.arguments(__doc__, rounds=9, devices=1)
    strategy = build_strategy(cluster=Cluster(), devices_per_worker=options.devices)
    title = f'Steps with canonical shards, {options.devices} replicas'
    table = pairs.Table(title, f'{SHARDS} shards', 'without', markdown=options.markdown)
    for name in ('tiny', 'CNN'):
        model, rows = loop.MODELS[name]
        data = Data(Arrays(loop.arrays(rows)), preprocess=scale_images)
        batches = train_batches(
            data, strategy, seed=0, global_batch_size=loop.BATCH_SIZE, start_step=0
        )
        make = functools.partial(loop.our_loop, strategy, model, (rows, rows, 1), batches)
        loops = [make(canonical_shards=SHARDS), make()]
        for take in loops:
            take(50)
        steps = max(1, round(50 * loop.SECONDS_PER_CALL / pairs.seconds(loops[1], 50)()))
        takes = [pairs.rate(steps, take, steps) for take in loops]
        taken = pairs.alternate(*takes, rounds=options.rounds)
        table.row(f'{name}, {options.devices} replicas', *taken, 'steps/s', '')


if __name__ == '__main__':
    main()
