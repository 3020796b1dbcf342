"""A small Vision Transformer, as a Functional model.

Dosovitskiy et al., 'An Image is Worth 16x16 Words', https://arxiv.org/abs/2010.11929, with what
Beyer et al., 'Better plain ViT baselines for ImageNet-1k', https://arxiv.org/abs/2205.01580, made
simpler: no class token but the mean over all patches, and positions that need not be learned.
"""

import keras
import numpy as np

from trainer.errors import ConfigError, nearest

POSITIONS = ('sincos', 'learned')


class Positions(keras.layers.Layer):
    """Adds to each patch of an image what tells where it is.

    Args:
        kind: 'sincos', sines and cosines of row and column; or 'learned'.
    """

    def __init__(self, kind: str, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def build(self, shape):
        """Makes the table for inputs of [batch, rows, columns, width]."""
        _, rows, columns, width = shape
        if self.kind == 'sincos':
            self.table = sincos(rows, columns, width)
        else:
            self.table = self.add_weight(
                (rows, columns, width), keras.initializers.TruncatedNormal(stddev=0.02)
            )

    def call(self, x):
        return x + keras.ops.cast(self.table, x.dtype)


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns positions of patches, float32 [rows, columns, width].

    A quarter of the numbers each are sines and cosines of the column, and of the row, at
    wavelengths from 2 pi to 20,000 pi, as in MoCo v3 (https://arxiv.org/abs/2104.02057).
    """
    frequencies = 1e-4 ** np.linspace(0.0, 1.0, width // 4)
    row, column = np.mgrid[:rows, :columns][..., np.newaxis] * frequencies
    waves = [wave(place) for place in (column, row) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)


def vit(
    num_classes: int,
    input_shape: tuple[int, int, int],
    patch: int = 16,
    units: int = 192,
    blocks: int = 12,
    heads: int = 3,
    positions: str = 'sincos',
    dropout: float = 0.0,
) -> keras.Model:
    """Builds a Transformer over the patches of an image; as it is set, ViT-Ti/16.

    Args:
        num_classes: number of logits.
        input_shape: height, width and channels of an image.
        patch: height and width of a patch, in pixels.
        units: width of the residual stream; the hidden layer of a block is four times as wide.
        blocks: number of blocks, each of which is attention and then two dense layers.
        heads: number of heads of an attention.
        positions: 'sincos' or 'learned'; see `Positions`.
        dropout: fraction of what each part of a block adds that is dropped in training.

    Returns:
        A model from float32 images [batch, height, width, channels] to logits
        [batch, num_classes].

    Raises:
        ConfigError: patches do not fill the image, heads the width, or there are no such
            positions.
    """
    _check(input_shape, patch, units, heads, positions)
    layers = keras.layers
    images = layers.Input(input_shape)
    x = layers.Conv2D(units, patch, patch, name='patches')(images)
    x = Positions(positions, name='positions')(x)
    x = layers.Reshape((-1, units))(x)
    for _ in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(heads, units // heads)(y, y)
        x = layers.add([x, layers.Dropout(dropout)(y)])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(4 * units, activation='gelu')(y)
        x = layers.add([x, layers.Dropout(dropout)(layers.Dense(units)(y))])
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, layers.Dense(num_classes, dtype='float32')(x), name='vit')


def _check(
    input_shape: tuple[int, int, int], patch: int, units: int, heads: int, positions: str
) -> None:
    rows, columns, _ = input_shape
    if patch < 1 or rows % patch or columns % patch:
        fitting = [n for n in range(1, min(rows, columns) + 1) if rows % n == columns % n == 0]
        raise ConfigError(
            f'vit.patch = {patch!r} does not divide images of {rows} x {columns}; '
            f'{", ".join(map(str, fitting))} do.'
        )
    if heads < 1 or units % heads:
        raise ConfigError(
            f'vit.heads = {heads!r} does not divide vit.units = {units!r}: a head takes an equal '
            'part of the width.'
        )
    if positions not in POSITIONS:
        raise ConfigError(
            f'vit.positions = {positions!r} is none of {", ".join(POSITIONS)}.'
            f'{nearest(str(positions), POSITIONS)}'
        )
    if positions == 'sincos' and (units % 4 or units < 8):
        raise ConfigError(
            f"vit.units = {units!r} is no multiple of 4 from 8 on, which vit.positions = 'sincos' "
            "takes: sines and cosines of row and column. Change it, or set 'learned'."
        )
