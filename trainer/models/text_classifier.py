"""A classifier of texts: a Transformer over groups of tokens, which takes no notice of padding."""

import keras
import tensorflow as tf

from trainer.data.text_folder import PADDING
from trainer.models.transformer import HIDDEN, Block, rotation

# A convolution makes one position of so many tokens, and looks at as many again around them.
_GROUP = 4


class TextClassifier(keras.Model):
    """Tells the class of a text; see `text_classifier`."""

    def __init__(
        self,
        num_classes: int,
        vocabulary: int,
        units: int,
        blocks: int,
        heads: int,
        dropout: float,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.width = units // heads
        self.embedding = keras.layers.Embedding(vocabulary, units, name='embedding')
        self.group = keras.layers.Conv1D(
            units, 2 * _GROUP, strides=_GROUP, activation='gelu', name='group'
        )
        self.blocks = [
            Block(units, heads, 8 * units // 3, blocks, dropout, name=f'block_{i}')
            for i in range(blocks)
        ]
        self.norm = keras.layers.RMSNormalization(name='norm')
        self.drop = keras.layers.Dropout(dropout, name='drop')
        self.logits = keras.layers.Dense(num_classes, dtype='float32', name='logits')

    def call(self, tokens, training=False):
        """Maps int32 [batch, length] to logits, float32 [batch, num_classes]."""
        tokens = tf.pad(tokens, [[0, 0], [0, -tf.shape(tokens)[1] % _GROUP]])
        is_there = tokens != PADDING
        x = self.embedding(tokens)
        x = tf.where(is_there[..., None], x, tf.zeros_like(x))
        # What lies behind a text is zero, as what lies before it: its length is not seen.
        x = self.group(tf.pad(x, [[0, 0], [_GROUP // 2, _GROUP // 2], [0, 0]]))
        shape = tf.shape(x)
        is_there = tf.reduce_any(tf.reshape(is_there, [shape[0], shape[1], _GROUP]), axis=2)
        turn = rotation(tf.range(shape[1]), self.width)
        # In half precision it is infinite, and a row in which all is hidden would be NaN.
        seen = is_there | ~tf.reduce_any(is_there, axis=1, keepdims=True)
        bias = tf.where(seen, 0.0, HIDDEN)[:, None, None, :]
        for block in self.blocks:
            x, _ = block(x, turn, bias, training=training)
        kept = tf.cast(is_there, x.dtype)[..., None]
        mean = tf.math.divide_no_nan(
            tf.reduce_sum(self.norm(x) * kept, axis=1), tf.reduce_sum(kept, axis=1)
        )
        return self.logits(self.drop(mean, training=training))


def text_classifier(
    num_classes: int,
    vocabulary: int = 257,
    units: int = 96,
    blocks: int = 2,
    heads: int = 3,
    dropout: float = 0.1,
) -> TextClassifier:
    """Builds a classifier of texts of unequal lengths.

    A convolution makes one position of four tokens; blocks of a Transformer, in which every
    position sees all others, follow; the logits are of the mean over the positions. Padding is
    looked at nowhere: a text has the same logits however far it is filled up.

    Args:
        num_classes: number of logits.
        vocabulary: number of tokens, `PADDING`, which is 0, among them.
        units: width of the residual stream, a multiple of `2 * heads`.
        blocks: number of blocks.
        heads: number of heads of a block's attention.
        dropout: fraction of what each part of a block adds, and of the mean, that is dropped.

    Returns:
        A model from tokens, int32 [batch, length], to logits, float32 [batch, num_classes].

    Raises:
        ConfigError: `units` is no multiple of `2 * heads`.
    """
    sizes = num_classes, vocabulary, units, blocks, heads, dropout
    return TextClassifier(*sizes, name='text_classifier')
