"""Metrics that Keras does not have."""

import math

import keras

from trainer.data.text import SEPARATOR
from trainer.errors import ConfigError


class BitsPerByte(keras.metrics.Metric):
    """How many bits a model of bytes takes for a byte of text, on average.

    It is the sum of the cross-entropies of all tokens in bits, separators of documents among them,
    over the number of bytes: what an arithmetic coder that asks the model would come to.

    Labels are int [batch, length], outputs logits [batch, length, 257].

    Raises:
        ConfigError: the outputs are not those of bytes. How many bytes a tokenizer's tokens stand
            for, they do not say.
    """

    def __init__(self, name: str = 'bits_per_byte', **kwargs):
        super().__init__(name=name, **kwargs)
        self.bits = self.add_variable((), initializer='zeros', name='bits')
        self.bytes = self.add_variable((), initializer='zeros', name='bytes')

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch; a weight is one of an example, [batch], or of a token."""
        ops = keras.ops
        if y_pred.shape[-1] != SEPARATOR + 1:
            raise ConfigError(
                f'BitsPerByte is for models of bytes, with {SEPARATOR + 1} outputs; this one has '
                f'{y_pred.shape[-1]}. Leave it out of METRICS.'
            )
        losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        weights = ops.ones_like(losses)
        if sample_weight is not None:
            given = ops.cast(sample_weight, losses.dtype)
            rest = (1,) * (len(losses.shape) - len(given.shape))
            weights *= ops.reshape(given, (*ops.shape(given), *rest))
        is_byte = ops.cast(ops.not_equal(y_true, SEPARATOR), losses.dtype)
        self.bits.assign_add(ops.sum(weights * losses) / math.log(2))
        self.bytes.assign_add(ops.sum(weights * is_byte))

    def result(self):
        """Returns bits per byte, 0 before there is a byte."""
        return keras.ops.divide_no_nan(self.bits, self.bytes)
