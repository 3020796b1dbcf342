"""What keeps activations of one size: batch normalisation and its alternatives."""

import math

import keras

from trainer.errors import ConfigError, nearest

NORMS = ('batch', 'sync_batch', 'group')
# Groups of so many channels did as well as 32 groups: table 3 of https://arxiv.org/abs/1803.08494.
_GROUP = 16


def make_norm(norm: str, channels: int, **options) -> keras.layers.Layer:
    """Returns a layer that normalises inputs [batch, ..., channels].

    Args:
        norm: 'batch' takes mean and variance over a replica's share of the batch
            (https://arxiv.org/abs/1502.03167), 'sync_batch' over the global batch, and 'group'
            over groups of channels of each example by itself (https://arxiv.org/abs/1803.08494),
            for which it is the same how large the batch is and who computes it.
        channels: of the inputs.
        **options: further arguments of the layer.

    Raises:
        ConfigError: there is no such norm.
    """
    if norm not in NORMS:
        raise ConfigError(
            f'norm = {norm!r} is none of {", ".join(NORMS)}.{nearest(str(norm), NORMS)}'
        )
    if norm == 'group':
        return keras.layers.GroupNormalization(channels // math.gcd(channels, _GROUP), **options)
    return keras.layers.BatchNormalization(synchronized=norm == 'sync_batch', **options)
