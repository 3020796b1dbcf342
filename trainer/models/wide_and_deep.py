"""A linear model and a deep one, trained together on the sum of their outputs.

Cheng et al., "Wide & Deep Learning for Recommender Systems" (https://arxiv.org/abs/1606.07792):
the wide part remembers combinations, the deep part generalises to those never seen.
"""

from collections.abc import Collection, Mapping, Sequence

import keras

from trainer.errors import ConfigError, nearest

FEATURES, CROSSES = 'features', 'crosses'


class WideAndDeep(keras.Model):
    """The sum of a linear model of all features and of a multi-layer perceptron without crosses.

    Args:
        num_classes: number of logits; 1 to predict a number.
        units: width of each hidden layer of the deep part.
        dropout: fraction of the units of each hidden layer dropped in training.
        l2: weight of the L2 penalty on the kernel of the wide part.
        scale, offset: the outputs are multiplied by the one, and then the other is added: of the
            size of standard deviation and mean of what is predicted, where that is a number.

    Raises:
        ConfigError: there is no hidden layer.
    """

    def __init__(
        self,
        num_classes: int,
        units: Sequence[int] = (64, 32),
        dropout: float = 0.1,
        l2: float = 0.0,
        scale: float = 1.0,
        offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not units:
            raise ConfigError(
                'wide_and_deep.units is empty. Give the deep part a layer, such as (64,), or take '
                'the model `linear`.'
            )
        penalty = keras.regularizers.L2(l2) if l2 else None
        self.flatten = keras.layers.Flatten()
        self.wide = keras.layers.Dense(num_classes, dtype='float32', kernel_regularizer=penalty)
        self.hidden = [keras.layers.Dense(width, activation='relu') for width in units]
        self.drops = [keras.layers.Dropout(dropout) for _ in units]
        # The bias is the wide part's.
        self.deep = keras.layers.Dense(num_classes, dtype='float32', use_bias=False)
        self.scale, self.offset = scale, offset

    def build(self, input_shape):
        """Checks what the inputs are called; the layers make their variables when first called.

        Raises:
            ConfigError: an input has another name, or there is none called 'features'.
        """
        if isinstance(input_shape, Mapping):
            _check_names(input_shape)
        super().build(input_shape)

    def call(self, inputs, training=False):
        """Maps features to logits [batch, num_classes].

        Args:
            inputs: float32 [batch, ...], which both parts see; or a dict of these, 'features', and
                'crosses', float32 [batch, places], which the wide part alone sees.
            training: whether units are dropped.
        """
        features, crosses = _parts(inputs)
        x = wide = self.flatten(features)
        if crosses is not None:
            wide = keras.ops.concatenate([x, keras.ops.cast(crosses, x.dtype)], axis=1)
        for hidden, drop in zip(self.hidden, self.drops, strict=True):
            x = drop(hidden(x), training=training)
        return self.scale * (self.wide(wide) + self.deep(x)) + self.offset


def wide_and_deep(
    num_classes: int,
    units: Sequence[int] = (64, 32),
    dropout: float = 0.1,
    l2: float = 0.0,
    scale: float = 1.0,
    offset: float = 0.0,
) -> keras.Model:
    """Builds a `WideAndDeep`; the shape of its input comes from the data."""
    return WideAndDeep(num_classes, units, dropout, l2, scale, offset, name='wide_and_deep')


def _parts(inputs):
    if isinstance(inputs, Mapping):
        return inputs[FEATURES], inputs.get(CROSSES)
    return inputs, None


def _check_names(names: Collection[str]) -> None:
    mend = "Set Data.inputs = ('features', 'crosses')."
    for name in names:
        if name not in (FEATURES, CROSSES):
            raise ConfigError(
                f'wide_and_deep takes the inputs {FEATURES!r} and {CROSSES!r}, not {name!r}.'
                f'{nearest(name, (FEATURES, CROSSES))} {mend}'
            )
    if FEATURES not in names:
        raise ConfigError(f'wide_and_deep lacks the input {FEATURES!r}. {mend}')
