"""A run of `train` that takes a second and yet has everything in it that could go wrong.

Dropout, unsynchronised batch normalisation, augmentation, preprocessing, momentum, a schedule, and
batches that straddle epochs.
"""

import collections
import functools

import keras
import numpy as np
import tensorflow as tf

from trainer.checkpoint import Keep
from trainer.cluster import Cluster
from trainer.data.arrays import Arrays
from trainer.data.augment import random_shift, scale_images
from trainer.data.batch import Data
from trainer.train import train

CLASSES = 3
STEPS, BATCH = 40, 8


def model():
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Flatten(),
            layers.Dense(8, activation='relu'),
            layers.BatchNormalization(momentum=0.8),
            layers.Dropout(0.3),
            layers.Dense(CLASSES, dtype='float32'),
        ]
    )


def optimizer():
    decay = keras.optimizers.schedules.CosineDecay(0.05, STEPS)
    return keras.optimizers.SGD(decay, momentum=0.9)


def source(num_examples, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, num_examples)
    images = rng.integers(0, 100, (num_examples, 4, 4, 1)) + 70 * labels[:, None, None, None]
    return Arrays({'image': images.astype(np.uint8), 'label': labels})


@functools.cache
def train_data():
    augment = functools.partial(random_shift, max_pixels=1)
    return Data(source(30, 0), preprocess=scale_images, augment=augment)


@functools.cache
def eval_data():
    return Data(source(21, 1), preprocess=scale_images)


def accuracy():
    return keras.metrics.SparseCategoricalAccuracy(name='accuracy')


def run(strategy, model_dir, **changes):
    """Trains in `model_dir`; keeps every checkpoint unless told otherwise."""
    arguments = {
        'strategy': strategy,
        'cluster': Cluster(),
        'model_dir': str(model_dir),
        'model': model,
        'optimizer': optimizer,
        'loss': keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        'metrics': [accuracy()],
        'train_data': train_data(),
        'eval_data': eval_data(),
        'steps': STEPS,
        'batch_size': BATCH,
        'seed': 3,
        'log_every': 4,
        'save_every': 12,
        'eval_every': 6,
        'keep': Keep(last=100),
        **changes,
    }
    return train(**arguments)


def points(directory):
    """{tag: [(step, value), ...]} of all event files, in the order in which they were written."""
    found = collections.defaultdict(list)
    for path in sorted(directory.glob('*tfevents*')):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                found[value.tag].append((event.step, array.tolist()))
    return dict(found)
