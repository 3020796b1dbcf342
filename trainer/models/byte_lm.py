"""A small language model: dilated causal convolutions, after WaveNet.

van den Oord et al., 'WaveNet: A Generative Model for Raw Audio', https://arxiv.org/abs/1609.03499.
"""

import keras


def byte_lm(
    num_classes: int, units: int = 128, blocks: int = 6, kernel: int = 3, dropout: float = 0.0
) -> keras.Model:
    """Builds a model that tells the next token from those before it.

    Args:
        num_classes: number of tokens.
        units: width of the residual stream.
        blocks: number of residual blocks. Block k looks 2**k tokens apart, so the last token seen
            lies (kernel - 1) * (2**blocks - 1) back.
        kernel: how many tokens a block looks at.
        dropout: fraction of hidden units dropped in training.

    Returns:
        A model from tokens, int32 [batch, length], to logits, float32 [batch, length,
        num_classes], those at a position being of the token after it.
    """
    layers = keras.layers
    tokens = layers.Input((None,), dtype='int32')
    x = layers.Embedding(num_classes, units)(tokens)
    for block in range(blocks):
        y = layers.LayerNormalization()(x)
        y = layers.Conv1D(
            units, kernel, padding='causal', dilation_rate=2**block, activation='relu'
        )(y)
        y = layers.Dropout(dropout)(layers.Dense(units)(y))
        x = layers.Add()([x, y])
    logits = layers.Dense(num_classes, dtype='float32')(layers.LayerNormalization()(x))
    return keras.Model(tokens, logits, name='byte_lm')
