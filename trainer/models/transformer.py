"""The block of a Transformer, for models that read sequences of tokens.

Vaswani et al., 'Attention Is All You Need', https://arxiv.org/abs/1706.03762, in the form that has
become usual since: normalisation before each part and by the root mean square alone (Zhang and
Sennrich, https://arxiv.org/abs/1910.07467), positions by rotation (Su et al.,
https://arxiv.org/abs/2104.09864), a gated hidden layer (SwiGLU; Shazeer,
https://arxiv.org/abs/2002.05202), and no biases.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from trainer.errors import ConfigError

# Added to a score, it leaves nothing of it.
HIDDEN = -1e9


class Cache(NamedTuple):
    """Keys and values of the positions a block has seen, each [length, batch, heads, width]."""

    keys: tf.Tensor
    values: tf.Tensor


def rotation(positions: tf.Tensor, width: int, base: float = 10000.0) -> tuple[tf.Tensor, ...]:
    """Returns cosine and sine of the angles by which `rotate` turns, float32 [length, width / 2].

    Args:
        positions: int [length].
        width: of a head, even.
        base: pair i turns by base ** (-2 i / width) from one position to the next.
    """
    powers = -2.0 * tf.range(width // 2, dtype=tf.float32) / width
    angles = tf.cast(positions, tf.float32)[:, None] * tf.pow(base, powers)
    return tf.cos(angles), tf.sin(angles)


def rotate(x: tf.Tensor, turn: tuple[tf.Tensor, ...]) -> tf.Tensor:
    """Turns pairs of numbers of queries or keys by angles that grow with the position.

    So the product of a query and a key depends on how far apart they are, and not on where.
    Number i is the partner of number i + width / 2.

    Args:
        x: [batch, length, ..., heads, width].
        turn: from `rotation`.
    """
    shape = [-1, *[1] * (x.shape.rank - 3), x.shape[-1] // 2]
    cos, sin = (tf.cast(tf.reshape(part, shape), x.dtype) for part in turn)
    a, b = tf.split(x, 2, axis=-1)
    return tf.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(keras.layers.Layer):
    """Self-attention of several heads.

    Args:
        units: width of what comes in and of what goes out; a multiple of twice `heads`.
        heads: number of heads.
        depth: number of blocks in the model, by which what goes out is made small at first.
    """

    def __init__(self, units: int, heads: int, depth: int, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width = heads, units // heads
        self.project = keras.layers.Dense(
            3 * units, use_bias=False, kernel_initializer=_normal(), name='project'
        )
        self.merge = keras.layers.Dense(
            units, use_bias=False, kernel_initializer=_normal(depth), name='merge'
        )

    def call(self, x, turn, bias, positions=None, cache=None):
        """Mixes positions.

        Args:
            x: [batch, length, units].
            turn: from `rotation`, of the positions of x.
            bias: float, added to the scores: 0 where a query may look and `HIDDEN`
                elsewhere; broadcast to [batch, heads, length, length of the keys].
            positions: int32 [length], where in `cache` the keys and values of x go.
            cache: of earlier positions, which x looks at too.

        Returns:
            What was mixed, [batch, length, units], and the cache with x in it.
        """
        qkv = self.project(x)
        parts = tf.shape(qkv)
        qkv = tf.reshape(qkv, [parts[0], parts[1], 3, self.heads, self.width])
        turned = rotate(qkv[:, :, :2], turn)
        query, key, value = turned[:, :, 0], turned[:, :, 1], qkv[:, :, 2]
        query = tf.transpose(query * self.width**-0.5, [0, 2, 1, 3])
        if cache is None:
            key, value = tf.transpose(key, [0, 2, 3, 1]), tf.transpose(value, [0, 2, 1, 3])
        else:
            cache = Cache(
                *(
                    tf.tensor_scatter_nd_update(
                        kept, positions[:, None], tf.transpose(new, [1, 0, 2, 3])
                    )
                    for kept, new in zip(cache, (key, value), strict=True)
                )
            )
            key = tf.transpose(cache.keys, [1, 2, 3, 0])
            value = tf.transpose(cache.values, [1, 2, 0, 3])
        scores = tf.cast(tf.matmul(query, key), tf.float32) + tf.cast(bias, tf.float32)
        mixed = tf.matmul(tf.cast(tf.nn.softmax(scores), value.dtype), value)
        mixed = tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), tf.shape(x))
        return self.merge(mixed), cache


class Block(keras.layers.Layer):
    """Attention and a gated hidden layer, each after a normalisation and added to its input.

    Args:
        units, heads, depth: see `Attention`.
        hidden: width of the hidden layer.
        dropout: fraction of what each part adds that is dropped in training.
    """

    def __init__(self, units: int, heads: int, hidden: int, depth: int, dropout: float, **kwargs):
        super().__init__(**kwargs)
        if units % (2 * heads):
            raise ConfigError(
                f'A Transformer of {units} units cannot have {heads} heads of an even width. Set '
                f'units to a multiple of {2 * heads}.'
            )
        self.norm = keras.layers.RMSNormalization(name='norm')
        self.attention = Attention(units, heads, depth, name='attention')
        self.hidden_norm = keras.layers.RMSNormalization(name='hidden_norm')
        self.widen = keras.layers.Dense(
            2 * hidden, use_bias=False, kernel_initializer=_normal(), name='widen'
        )
        self.narrow = keras.layers.Dense(
            units, use_bias=False, kernel_initializer=_normal(depth), name='narrow'
        )
        self.drop = keras.layers.Dropout(dropout, name='drop')

    def call(self, x, turn, bias, positions=None, cache=None, training=False):
        """Maps [batch, length, units] to the same; see `Attention.call`."""
        mixed, cache = self.attention(self.norm(x), turn, bias, positions, cache)
        x = x + self.drop(mixed, training=training)
        gate, value = tf.split(self.widen(self.hidden_norm(x)), 2, axis=-1)
        return x + self.drop(self.narrow(tf.nn.silu(gate) * value), training=training), cache


def _normal(depth: int | None = None) -> keras.initializers.Initializer:
    """As GPT-2: what is added to the stream `2 * depth` times is made as much smaller."""
    return keras.initializers.RandomNormal(stddev=0.02 / (2 * depth) ** 0.5 if depth else 0.02)
