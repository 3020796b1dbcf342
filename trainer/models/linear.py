"""Linear and logistic regression: one dense layer."""

import keras


class Linear(keras.Model):
    """Flattens its input and applies one dense layer: class logits, or a number.

    With softmax cross-entropy it is logistic regression, with the mean squared error ridge
    regression.

    Args:
        num_classes: number of logits; 1 to predict a number.
        l2: weight of the L2 penalty on the kernel.
        scale, offset: the outputs are multiplied by the one, and then the other is added: of the
            size of standard deviation and mean of what is predicted, where that is a number.
    """

    def __init__(
        self,
        num_classes: int,
        l2: float = 0.0,
        scale: float = 1.0,
        offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        penalty = keras.regularizers.L2(l2) if l2 else None
        self.logits = keras.layers.Dense(num_classes, dtype='float32', kernel_regularizer=penalty)
        self.scale, self.offset = scale, offset

    def call(self, inputs):
        """Maps float32 [batch, ...] to logits [batch, num_classes]."""
        return self.scale * self.logits(self.flatten(inputs)) + self.offset


def linear(
    num_classes: int, l2: float = 0.0, scale: float = 1.0, offset: float = 0.0
) -> keras.Model:
    """Builds a `Linear`; the shape of its input comes from the data."""
    return Linear(num_classes, l2, scale, offset, name='linear')
