"""The networks of `keras.applications` by name, with a new head, whole or in part frozen."""

import re
import sys
from collections.abc import Callable
from typing import Any

import keras

from trainer.errors import ConfigError, nearest
from trainer.models.layer_weights import load_layer_weights

_FROM_KERAS = (
    'Nothing is downloaded here. Where there is a network, make a file of it with\n'
    "  keras.applications.{name}(weights='imagenet', include_top=False)"
    ".save_weights('{name}.weights.h5')\n"
    "and set application.weights = '{name}.weights.h5'."
)


class Preprocess(keras.layers.Layer):
    """Turns images into what a network of `keras.applications` was trained on.

    Args:
        function: the network's own `preprocess_input`, of images in which white is 255.
        white: what it is in the images that come.
    """

    def __init__(self, function: Callable, white: float, **kwargs):
        # Shades are lost if 255 of them are told apart in half precision.
        super().__init__(dtype='float32', **kwargs)
        self.function, self.white = function, white

    def call(self, images):
        """Maps images [batch, height, width, 1 or 3] to float32 [batch, height, width, 3]."""
        if images.shape[-1] == 1:
            images = keras.ops.repeat(images, 3, axis=-1)
        return self.function(keras.ops.cast(images, 'float32') * (255.0 / self.white))


class Frozen(keras.layers.Layer):
    """Calls a network as in inference, whatever the model around it does.

    Said in a Functional model, `training=False` is overruled when the model is called.
    """

    def __init__(self, network: keras.Model, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        network.trainable = False

    def call(self, images):
        return self.network(images, training=False)


def application(
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    weights: str | None = None,
    frozen: bool | int | str = False,
    white: float = 1.0,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
) -> keras.Model:
    """Builds a network of `keras.applications` (https://keras.io/api/applications/) anew.

    Its head is replaced by the mean over the image, dropout, and one dense layer. What the network
    wants done to images first (its `preprocess_input`) is part of the model.

    A layer that is frozen stays as it is, the statistics of a batch normalisation included. Where
    all are, the network as a whole does what it does in inference
    (https://keras.io/guides/transfer_learning/).

    Args:
        name: of the network, such as 'MobileNetV2'.
        num_classes: number of logits.
        input_shape: height, width and channels of an image. One channel is taken for grey.
        weights: path of a .weights.h5, .keras or .h5 file; None begins with random ones. Layers
            are found by name, and what did not fit is logged. It is read whenever the model is
            built, to evaluate or export it too, and then overruled by the checkpoint.
        frozen: what is not trained. True: all but the new head; False: nothing; a number n: the
            layers `layers[:n]` of the network, so the first n, or with -20 all but the last 20; a
            text: the layers in whose names this regular expression is found.
        white: what white is in the images that come: 1.0 after `scale_images`, 255.0 as stored.
        dropout: fraction of the network's features that are dropped before the head in training.
        options: further arguments of the network, such as {'alpha': 0.35}.

    Returns:
        A model from images [batch, height, width, channels] to logits [batch, num_classes].

    Raises:
        ConfigError: there is no such network, option or file, nothing in the file fits, or
            `frozen` names no layer.
    """
    network = _network(name)
    if weights == 'imagenet':
        raise ConfigError(f"application.weights = 'imagenet'. {_FROM_KERAS.format(name=name)}")
    if input_shape[-1] not in (1, 3):
        raise ConfigError(
            f'application.input_shape = {input_shape!r}, but the networks of keras.applications '
            'see 3 channels, or 1 that is taken for grey.'
        )
    try:
        body = network(
            include_top=False,
            weights=None,
            input_shape=(*input_shape[:2], 3),
            pooling='avg',
            **(options or {}),
        )
    except TypeError as error:
        raise ConfigError(
            f'application.options = {options!r} are not those of {name}: {error}.'
        ) from None
    if weights is not None:
        load_layer_weights(body, weights)
    if frozen is True:
        body = Frozen(body, name='frozen')
    elif frozen is not False:
        _freeze(body, frozen)

    layers = keras.layers
    images = layers.Input(input_shape)
    prepare = sys.modules[network.__module__].preprocess_input
    x = Preprocess(prepare, white, name='preprocess')(images)
    x = layers.Dropout(dropout)(body(x))
    outputs = layers.Dense(num_classes, dtype='float32', name='head')(x)
    return keras.Model(images, outputs, name='application')


def _network(name: str) -> Callable[..., keras.Model]:
    networks = {key: value for key, value in vars(keras.applications).items() if callable(value)}
    if name not in networks:
        raise ConfigError(
            f'application.name = {name!r} is no network of keras.applications.'
            f'{nearest(str(name), networks)} There are {", ".join(sorted(networks))}.'
        )
    return networks[name]


def _freeze(body: keras.Model, frozen: int | str) -> None:
    if isinstance(frozen, int):
        count = len(body.layers)
        if not 0 < abs(frozen) < count:
            raise ConfigError(
                f'application.frozen = {frozen}, but {body.name!r} has {count} layers: give 1 to '
                f'{count - 1} to freeze so many at the beginning, -1 to {1 - count} to train so '
                'many at the end, or True or False.'
            )
        for layer in body.layers[:frozen]:
            layer.trainable = False
        return
    try:
        chosen = [layer for layer in body.layers if layer.weights and re.search(frozen, layer.name)]
    except re.error as error:
        raise ConfigError(
            f'application.frozen = {frozen!r} is no regular expression: {error}.'
        ) from None
    if not chosen:
        names = [layer.name for layer in body.layers if layer.weights]
        raise ConfigError(
            f'application.frozen = {frozen!r} is found in the name of no layer of {body.name!r}.'
            f'{nearest(frozen, names)} It has {", ".join(names[:3])}, ..., {names[-1]}.'
        )
    for layer in chosen:
        layer.trainable = False
