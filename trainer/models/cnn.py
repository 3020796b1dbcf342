"""The convolutional network of TensorFlow 2's introductory tutorials, as a Sequential model."""

import keras

from trainer.models.norm import make_norm


def cnn(
    num_classes: int,
    input_shape: tuple[int, ...] | None = None,
    filters: int = 32,
    units: int = 64,
    dropout: float = 0.1,
    l2: float = 1e-4,
    norm: str = 'batch',
) -> keras.Model:
    """Convolution, pooling, dropout, a dense layer with a norm, class logits.

    Args:
        num_classes: number of logits.
        input_shape: height, width and channels of an image; None takes them from the data.
        filters: channels of the 2x2 convolution.
        units: width of the dense layer.
        dropout: fraction of the flattened features dropped in training.
        l2: weight of the L2 penalty on the convolution's kernel.
        norm: of the dense layer, 'batch', 'sync_batch' or 'group'; see `make_norm`.

    Returns:
        A model from float32 images [batch, height, width, channels] to logits
        [batch, num_classes].

    Raises:
        ConfigError: there is no such norm.
    """
    layers = keras.layers
    head = [] if input_shape is None else [layers.Input(input_shape)]
    return keras.Sequential(
        [
            *head,
            layers.Conv2D(
                filters, 2, activation='relu', kernel_regularizer=keras.regularizers.L2(l2)
            ),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(dropout),
            layers.Dense(units, activation='relu'),
            make_norm(norm, units),
            layers.Dense(num_classes, dtype='float32'),
        ],
        name='cnn',
    )
