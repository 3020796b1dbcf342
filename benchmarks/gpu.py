"""The training loop on one GPU, against a loop written by hand and against Keras's `fit`.

What is compared is what `loop.py` compares on CPUs, with larger models and batches beside the small
ones: the CNN of `trainer.models.cnn` on 28x28 images, and the residual network of
`trainer.models.resnet` with 64 filters and two blocks a stage on 32x32 images in colour. Adam, no
augmentation. TensorFlow's defaults hold, so float32 products on an NVIDIA GPU are TF32.

With --xla=1 op determinism is off, and XLA compiles Phalanx's forward pass and gradients. It
compiles nothing for the other two: the loop by hand does not ask for it, and Keras never does under
`tf.distribute`. So these rows say what XLA is worth, not what the loop is.
"""

import functools
import os

import pairs

# `pairs` has hidden all GPUs. GPU=1 in the environment chooses another than the first.
os.environ['CUDA_VISIBLE_DEVICES'] = os.environ.get('GPU', '0')

# isort: split
import keras
import loop
import numpy as np
import tensorflow as tf

from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import scale_images
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.models.cnn import cnn
from trainer.models.resnet import resnet
from trainer.state import PRECISIONS
from trainer.strategy import build_strategy

SECONDS_PER_TAKE = 0.5

# Name -> model, shape of its images.
MODELS = {
    'tiny': (functools.partial(loop.mlp, 128, 'tiny'), (28, 28, 1)),
    'CNN': (functools.partial(cnn, 10), (28, 28, 1)),
    'ResNet': (functools.partial(resnet, 10, (32, 32, 3), 64, (2, 2, 2)), (32, 32, 3)),
}


def arrays(shape, examples: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        'image': random.integers(0, 256, (examples, *shape), np.uint8),
        'label': random.integers(0, 10, examples),
    }


def case(strategy, name: str, batch_size: int, precision: str, jit_compile: bool, rounds: int):
    """Returns what fit was given, and steps a second of Phalanx, of the bare loop and of fit."""
    model, shape = MODELS[name]
    keras.config.set_dtype_policy(PRECISIONS[precision])
    data = Data(Arrays(arrays(shape, 60_000)), preprocess=scale_images)
    batches = train_batches(data, strategy, seed=0, global_batch_size=batch_size, start_step=0)
    ours = loop.our_loop(strategy, model, shape, batches, precision, jit_compile=jit_compile)
    bare = loop.bare_loop(strategy, model, shape, batches, batch_size)
    takes = []
    for take in (ours, bare):
        take(20)
        quickest = min(pairs.seconds(take, 20)() for _ in range(3))
        steps = max(1, round(20 * SECONDS_PER_TAKE / quickest))
        takes.append(pairs.rate(steps, take, steps))
    # An epoch has some work of its own: it is made as long as the data allow, up to a second.
    in_epoch = min(60_000 // batch_size, 2 * steps)
    features = arrays(shape, in_epoch * batch_size)
    ways = dict(loop.ways_to_fit(strategy, model, features, 1, batch_size))
    for fit in ways.values():
        fit()
    took = {how: min(pairs.seconds(fit)() for _ in range(2)) for how, fit in ways.items()}
    how = min(took, key=took.get)
    takes.append(pairs.rate(in_epoch, ways[how]))
    return how, pairs.alternate(*takes, rounds=rounds)


CASES = [
    ('tiny', 128, 'float32'),
    ('CNN', 128, 'float32'),
    ('CNN', 1024, 'float32'),
    ('ResNet', 128, 'float32'),
    ('ResNet', 1024, 'float32'),
    ('ResNet', 1024, 'bfloat16'),
]


def main() -> None:
    options = pairs.arguments(__doc__, rounds=9, xla=0, cases='')
    gpus = tf.config.list_physical_devices('GPU')
    if not gpus:
        print('TensorFlow finds no GPU here.')
        return
    name = tf.config.experimental.get_device_details(gpus[0]).get('device_name', 'a GPU')
    strategy = build_strategy(cluster=Cluster(), kind='one_device', deterministic=not options.xla)
    kind = 'Phalanx alone with XLA' if options.xla else 'op determinism'
    table = pairs.Table(
        f'Training loop on {name}, {kind}', 'Phalanx', 'alternative', markdown=options.markdown
    )
    cases = [CASES[int(number)] for number in options.cases.split(',') if number] or CASES
    for name, batch_size, precision in cases:
        how, (ours, bare, fit) = case(
            strategy, name, batch_size, precision, bool(options.xla), options.rounds
        )
        what = f'{name}, batch {batch_size}, {precision}'
        ours, bare, fit = ([rate * batch_size for rate in rates] for rates in (ours, bare, fit))
        table.row(f'{what}: by hand', ours, bare, 'images/s')
        table.row(f'{what}: fit ({how})', ours, fit, 'images/s')


if __name__ == '__main__':
    main()
