"""A small residual network for images, as a Functional model.

The layout is that of the CIFAR networks in He et al., "Deep Residual Learning for Image
Recognition" (https://arxiv.org/abs/1512.03385), section 4.2: stages of basic blocks, each stage
after the first halving the image and doubling the channels.
"""

import keras


def resnet(
    num_classes: int,
    input_shape: tuple[int, int, int],
    filters: int = 16,
    blocks: tuple[int, ...] = (1, 1, 1),
    l2: float = 1e-4,
    synchronized: bool = False,
) -> keras.Model:
    """Builds a ResNet of 2 + 2 * sum(blocks) weighted layers.

    Args:
        num_classes: number of logits.
        input_shape: height, width and channels of an image.
        filters: channels of the first stage; each later stage has twice its predecessor's.
        blocks: number of basic blocks in each stage.
        l2: weight of the L2 penalty on every kernel.
        synchronized: whether batch normalisation uses the statistics of the global batch.

    Returns:
        A model from float32 images [batch, height, width, channels] to logits
        [batch, num_classes].
    """
    layers = keras.layers
    l2_penalty = keras.regularizers.L2(l2)

    def conv_norm(x, channels, size, stride):
        x = layers.Conv2D(
            channels, size, stride, 'same', use_bias=False, kernel_regularizer=l2_penalty
        )(x)
        return layers.BatchNormalization(synchronized=synchronized)(x)

    def basic_block(x, channels, stride):
        shortcut = x
        if stride != 1 or x.shape[-1] != channels:
            shortcut = conv_norm(x, channels, 1, stride)
        x = layers.ReLU()(conv_norm(x, channels, 3, stride))
        return layers.ReLU()(layers.add([conv_norm(x, channels, 3, 1), shortcut]))

    inputs = layers.Input(input_shape)
    x = layers.ReLU()(conv_norm(inputs, filters, 3, 1))
    for stage, depth in enumerate(blocks):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            x = basic_block(x, filters * 2**stage, stride)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, dtype='float32', kernel_regularizer=l2_penalty)(x)
    return keras.Model(inputs, outputs, name='resnet')
