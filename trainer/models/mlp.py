"""A multi-layer perceptron with residual blocks, as a subclassed model."""

import keras


class Residual(keras.layers.Layer):
    """Layer normalisation, a dense ReLU layer, dropout, a dense layer, added to the input."""

    def __init__(self, units: int, dropout: float, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.LayerNormalization()
        self.widen = keras.layers.Dense(2 * units, activation='relu')
        self.drop = keras.layers.Dropout(dropout)
        self.narrow = keras.layers.Dense(units)

    def call(self, x, training=False):
        return x + self.narrow(self.drop(self.widen(self.norm(x)), training=training))


class MLP(keras.Model):
    """Flattens its input, projects it, applies residual blocks, and returns class logits.

    Args:
        num_classes: number of logits; 1 to predict a number.
        units: width of the residual stream.
        blocks: number of residual blocks.
        dropout: fraction of hidden units dropped in training.
        scale, offset: the outputs are multiplied by the one, and then the other is added: of the
            size of standard deviation and mean of what is predicted, where that is a number.
    """

    def __init__(
        self,
        num_classes: int,
        units: int = 64,
        blocks: int = 2,
        dropout: float = 0.1,
        scale: float = 1.0,
        offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        self.project = keras.layers.Dense(units)
        self.blocks = [Residual(units, dropout) for _ in range(blocks)]
        self.norm = keras.layers.LayerNormalization()
        self.logits = keras.layers.Dense(num_classes, dtype='float32')
        self.scale, self.offset = scale, offset

    def call(self, inputs, training=False):
        """Maps float32 [batch, ...] to logits [batch, num_classes]."""
        x = self.project(self.flatten(inputs))
        for block in self.blocks:
            x = block(x, training=training)
        return self.scale * self.logits(self.norm(x)) + self.offset


def mlp(
    num_classes: int,
    units: int = 64,
    blocks: int = 2,
    dropout: float = 0.1,
    scale: float = 1.0,
    offset: float = 0.0,
) -> keras.Model:
    """Builds an `MLP`; the shape of its input comes from the data."""
    return MLP(num_classes, units, blocks, dropout, scale, offset, name='mlp')
