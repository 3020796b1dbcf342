"""Residual networks for images, small and large, as Functional models.

He et al., 'Deep Residual Learning for Image Recognition', https://arxiv.org/abs/1512.03385:
the networks for ImageNet of its table 1, and those for CIFAR of section 4.2.
"""

import keras

from trainer.errors import ConfigError, nearest
from trainer.models.norm import make_norm

STEMS = ('cifar', 'imagenet')


def resnet(
    num_classes: int,
    input_shape: tuple[int, int, int],
    filters: int = 16,
    blocks: tuple[int, ...] = (1, 1, 1),
    bottleneck: bool = False,
    stem: str = 'cifar',
    norm: str = 'batch',
    l2: float = 1e-4,
) -> keras.Model:
    """Builds a ResNet of 2 + 2 * sum(blocks) weighted layers, or 2 + 3 * sum(blocks).

    The last norm of each block begins with a scale of zero, so that every block begins as the
    identity (https://arxiv.org/abs/1706.02677, section 5.1). A bottleneck halves the image in its
    3x3 convolution, as all do since Facebook's implementation
    (https://github.com/facebookarchive/fb.resnet.torch).

    Args:
        num_classes: number of logits.
        input_shape: height, width and channels of an image.
        filters: channels of the first stage; each later stage has twice its predecessor's, and
            half its rows and columns.
        blocks: number of blocks in each stage.
        bottleneck: whether a block is three convolutions, 1x1, 3x3 and 1x1 to four times as many
            channels, instead of two 3x3.
        stem: 'cifar', a 3x3 convolution; or 'imagenet', a 7x7 one and max pooling, each of which
            halves the image.
        norm: 'batch', 'sync_batch' or 'group'; see `make_norm`.
        l2: weight of the L2 penalty on every kernel.

    Returns:
        A model from float32 images [batch, height, width, channels] to logits
        [batch, num_classes].

    Raises:
        ConfigError: there is no such stem or norm.
    """
    if stem not in STEMS:
        raise ConfigError(
            f'resnet.stem = {stem!r} is none of {", ".join(STEMS)}.{nearest(str(stem), STEMS)}'
        )
    layers = keras.layers
    l2_penalty = keras.regularizers.L2(l2)

    def conv_norm(x, channels, size, stride=1, **options):
        x = layers.Conv2D(
            channels,
            size,
            stride,
            'same',
            use_bias=False,
            kernel_initializer='he_normal',
            kernel_regularizer=l2_penalty,
        )(x)
        return make_norm(norm, channels, **options)(x)

    def block(x, channels, stride):
        width = 4 * channels if bottleneck else channels
        shortcut = x
        if stride != 1 or x.shape[-1] != width:
            shortcut = conv_norm(x, width, 1, stride)
        if bottleneck:
            x = layers.ReLU()(conv_norm(x, channels, 1))
        x = layers.ReLU()(conv_norm(x, channels, 3, stride))
        x = conv_norm(x, width, 1 if bottleneck else 3, gamma_initializer='zeros')
        return layers.ReLU()(layers.add([x, shortcut]))

    inputs = layers.Input(input_shape)
    if stem == 'imagenet':
        x = layers.ReLU()(conv_norm(inputs, filters, 7, 2))
        x = layers.MaxPooling2D(3, 2, 'same')(x)
    else:
        x = layers.ReLU()(conv_norm(inputs, filters, 3))
    for stage, depth in enumerate(blocks):
        for number in range(depth):
            x = block(x, filters * 2**stage, 2 if stage > 0 and number == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, dtype='float32', kernel_regularizer=l2_penalty)(x)
    return keras.Model(inputs, outputs, name='resnet')
