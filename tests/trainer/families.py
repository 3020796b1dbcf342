"""A tiny run of every family of models, for tests that ask the same of all of them."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer.data import mix, one_hot, paired
from trainer.data.arrays import Arrays
from trainer.data.augment import random_shift
from trainer.data.batch import Data
from trainer.groups import Group
from trainer.models import (
    application,
    cnn,
    gan,
    linear,
    mlp,
    resnet,
    simclr,
    text_classifier,
    transformer_lm,
    vit,
    wide_and_deep,
)

EXAMPLES, CLASSES = 48, 4
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Family:
    """What `trainer.train` needs of it, small enough to be compiled in a few seconds.

    Attributes:
        model: as for `trainer.train`.
        data: likewise, `EXAMPLES` examples.
        loss: likewise.
        more: further arguments of `trainer.train`.
    """

    model: Callable[[], keras.Model]
    data: Data
    loss: Callable = LOSS
    more: dict = dataclasses.field(default_factory=dict)


def fine_tuned_mobilenet():
    return lively(
        application.application(
            'MobileNet', CLASSES, (32, 32, 1), frozen='^(?!conv_pw_13$)', options={'alpha': 0.25}
        )
    )


def lively(model: keras.Model) -> keras.Model:
    """Gives a network that has seen no data statistics with which it does not come to nothing."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(keras.ops.full_like(layer.moving_variance, 0.05))
    return model


def families() -> dict[str, Family]:
    """Name -> a tiny run; models without what differs from replica to replica."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, EXAMPLES)
    images = rng.normal(size=(EXAMPLES, 8, 8, 1)).astype(np.float32)
    image_data = Data(Arrays({'image': images, 'label': label}))
    crosses = np.eye(5, dtype=np.float32)[rng.integers(0, 5, EXAMPLES)]
    rows = {'features': images[:, 0, :, 0], 'crosses': crosses, 'label': label}
    wide_data = Data(Arrays(rows), inputs=('features', 'crosses'))
    tokens = rng.integers(1, 257, (EXAMPLES, 13)).astype(np.int32)
    lengths = rng.integers(1, 13, (EXAMPLES, 1))
    texts = {'tokens': np.where(np.arange(12) < lengths, tokens[:, :-1], 0), 'label': label}
    windows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
    players = {
        'groups': [
            Group(
                '*/generator/*',
                loss='generator',
                optimizer=functools.partial(keras.optimizers.SGD, 0.05),
            ),
            Group('*/discriminator/*', loss='discriminator'),
        ]
    }
    shift = functools.partial(random_shift, max_pixels=1)
    return {
        'cnn': Family(
            functools.partial(cnn.cnn, CLASSES, filters=4, units=8, dropout=0.0, norm='sync_batch'),
            image_data,
        ),
        'resnet': Family(
            functools.partial(
                resnet.resnet, CLASSES, (8, 8, 1), filters=4, blocks=(1, 1), norm='sync_batch'
            ),
            image_data,
        ),
        'vit': Family(
            functools.partial(vit.vit, CLASSES, (8, 8, 1), patch=4, units=8, blocks=1, heads=2),
            image_data,
        ),
        # All but a convolution, so that no batch is normalised by a replica's own statistics.
        'application': Family(
            fine_tuned_mobilenet,
            Data(Arrays({'image': images.repeat(4, 1).repeat(4, 2), 'label': label})),
        ),
        'mlp': Family(functools.partial(mlp.mlp, CLASSES, units=8, dropout=0.0), image_data),
        'linear': Family(functools.partial(linear.linear, CLASSES, l2=0.01), image_data),
        'wide_and_deep': Family(
            functools.partial(wide_and_deep.wide_and_deep, CLASSES, units=(8, 4), dropout=0.0),
            wide_data,
        ),
        'transformer_lm': Family(
            functools.partial(transformer_lm.transformer_lm, 257, units=8, blocks=1, heads=2),
            Data(Arrays(windows), 'tokens', label='targets'),
        ),
        'text_classifier': Family(
            functools.partial(
                text_classifier.text_classifier, CLASSES, units=8, blocks=1, heads=2, dropout=0.0
            ),
            Data(Arrays(texts), 'tokens'),
        ),
        'simclr': Family(
            functools.partial(simclr.simclr, functools.partial(mlp.mlp, 6, 8, 1, 0.0), 4),
            Data(
                paired.paired(image_data.source),
                inputs=('image', 'view'),
                label=None,
                augment=paired.two_views(shift),
            ),
            simclr.nt_xent,
        ),
        # Its noise differs from replica to replica, so here it has none.
        'gan': Family(
            functools.partial(gan.gan, (8, 8, 1), 4, 4),
            Data(Arrays({'image': 0.5 + 0.1 * images}), label=None),
            noiseless_gan,
            players,
        ),
    }


def noiseless_gan(model, batch, training):
    """The losses of a GAN whose images are made of those it is given."""
    noise = tf.reshape(batch['inputs'], [-1, 64])[:, : model.latent]
    made = model.generator(noise, training=training)
    real, fake = (model.discriminator(x, training=training) for x in (batch['inputs'], made))
    return {
        'discriminator': tf.nn.softplus(-real) + tf.nn.softplus(fake),
        'generator': tf.nn.softplus(-fake),
    }


def family_of_all_techniques(name: str) -> Family:
    """A family that goes with accumulation on several replicas."""
    family = families()[name]
    if name != 'resnet':
        return family
    grouped = functools.partial(
        resnet.resnet, CLASSES, (8, 8, 1), filters=8, blocks=(1, 1), norm='group'
    )
    return dataclasses.replace(family, model=grouped)


def mixed_up(family: Family) -> Family:
    """The same with blended examples and smoothed labels."""
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    source = one_hot.one_hot(family.data.source, CLASSES)
    return dataclasses.replace(family, data=Data(source, augment=mix.mixup), loss=loss)


def elastic_families() -> dict[str, Family]:
    """Name -> a tiny run with all that is random or differs from shard to shard."""
    plain = families()
    return {
        'cnn': dataclasses.replace(
            plain['cnn'],
            model=functools.partial(cnn.cnn, CLASSES, filters=4, units=8, dropout=0.3),
        ),
        'transformer_lm': dataclasses.replace(
            plain['transformer_lm'],
            model=functools.partial(
                transformer_lm.transformer_lm, 257, units=8, blocks=1, heads=2, dropout=0.2
            ),
        ),
        'wide_and_deep': dataclasses.replace(
            plain['wide_and_deep'],
            model=functools.partial(
                wide_and_deep.wide_and_deep, CLASSES, units=(8, 4), dropout=0.3
            ),
        ),
    }
