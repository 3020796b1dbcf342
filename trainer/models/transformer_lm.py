"""A language model: a decoder-only Transformer, which generates text with a cache of its keys.

The weights that embed a token are those that tell how likely it is next (Press and Wolf,
https://arxiv.org/abs/1608.05859).
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.data.text import SEPARATOR
from trainer.errors import ConfigError
from trainer.models.transformer import HIDDEN, Block, Cache, rotation

# In rows of tokens: nothing, after the last one.
NONE = -1


class TransformerLM(keras.Model):
    """Tells the next token from those before it, and goes on by itself; see `transformer_lm`."""

    def __init__(
        self,
        num_classes: int,
        units: int,
        blocks: int,
        heads: int,
        hidden: int | None,
        dropout: float,
        window: int | None,
        of_bytes: bool,
        **kwargs,
    ):
        super().__init__(**kwargs)
        hidden = 8 * units // 3 if hidden is None else hidden
        self.num_classes, self.heads, self.width = num_classes, heads, units // heads
        self.window, self.of_bytes = window, of_bytes
        self.embedding = keras.layers.ReversibleEmbedding(
            num_classes,
            units,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            reverse_dtype='float32',
            name='embedding',
        )
        self.blocks = [
            Block(units, heads, hidden, blocks, dropout, name=f'block_{i}') for i in range(blocks)
        ]
        self.norm = keras.layers.RMSNormalization(name='norm')

    def call(self, tokens, training=False):
        """Maps tokens, int32 [batch, length], to logits, float32 [batch, length, num_classes]."""
        positions = tf.range(tf.shape(tokens)[1])
        x, _ = self._read(tokens, positions, positions, training=training)
        return self.embedding(x, reverse=True)

    def _read(self, tokens, positions, seen, caches=(), training=False):
        """Runs the blocks.

        Args:
            tokens: int32 [batch, length].
            positions: int32 [length], of the tokens.
            seen: int32 [length of the keys], the positions of all that may be looked at.
            caches: of each block, of what came before; if any, `tokens` are added.
            training: whether to drop.

        Returns:
            Normalised vectors, [batch, length, units], and the caches.
        """
        turn = rotation(positions, self.width)
        back = positions[:, None] - seen
        visible = back >= 0
        if self.window is not None:
            visible &= back < self.window
        bias = tf.where(visible, 0.0, HIDDEN)
        x, after = self.embedding(tokens), []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, cache = block(x, turn, bias, positions, cache, training=training)
            after.append(cache)
        return self.norm(x), after

    def generate(
        self,
        tokens: tf.Tensor,
        max_new_tokens: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        seed: tf.Tensor,
        end: tf.Tensor,
    ) -> tf.Tensor:
        """Goes on with rows of tokens, each by itself.

        What all rows have is read at once, and the rest a token a step, whether it is a row's own
        or one that was chosen: so shorter rows begin earlier, and no row sees another's length.
        Every block keeps keys and values, so a step computes one position only.

        Args:
            tokens: int32 [batch, length], each row 1 token or more and then `NONE`.
            max_new_tokens: int32, 1 or more: how many to add.
            temperature: float32: 0 takes the likeliest token, 1 draws as the model says.
            top_k: int32: of so many likeliest tokens one is drawn; 0 is all.
            seed: int32, of the draws.
            end: int32: the token at which a row ends; `NONE` for none.

        Returns:
            int32 [batch, max_new_tokens], what was added to each row; from `end` on `NONE`.
        """
        batch = tf.shape(tokens)[0]
        lengths = tf.reduce_sum(tf.cast(tokens != NONE, tf.int32), axis=1)
        common, longest = tf.reduce_min(lengths), tf.reduce_max(lengths)
        total = longest + max_new_tokens
        # A row may be of any length; what lies behind it is overwritten before it is read.
        rows = tf.pad(tokens[:, :longest], [[0, 0], [0, max_new_tokens]], constant_values=NONE)
        seen = tf.range(total)
        empty = tf.zeros([total, batch, self.heads, self.width], self.compute_dtype)
        caches = [Cache(empty, empty) for _ in self.blocks]

        def choose(x, caches, rows, at, done):
            """Writes the tokens at `at`, given the vectors of those before them."""
            logits = self.embedding(x[:, -1], reverse=True)
            chosen = _draw(logits, temperature, top_k, tf.stack([seed, at]))
            done |= (at >= lengths) & (chosen == end)
            done |= at >= lengths + max_new_tokens
            chosen = tf.where(at < lengths, rows[:, at], tf.where(done, NONE, chosen))
            return caches, tf.where(seen == at, chosen[:, None], rows), at + 1, done

        def step(caches, rows, at, done):
            # A row that has ended goes on with anything.
            last = tf.maximum(rows[:, at - 1 : at], 0)
            x, caches = self._read(last, tf.reshape(at - 1, [1]), seen, caches)
            return choose(x, caches, rows, at, done)

        x, caches = self._read(rows[:, :common], tf.range(common), seen, caches)
        _, rows, _, _ = tf.while_loop(
            lambda caches, rows, at, done: (at < total) & ~tf.reduce_all(done),
            step,
            choose(x, caches, rows, common, tf.zeros([batch], tf.bool)),
        )
        new = lengths[:, None] + tf.range(max_new_tokens)
        return tf.gather(rows, new, axis=1, batch_dims=1)

    def signatures(self) -> dict[str, tuple[Callable, dict[str, Any]]]:
        """Offers `generate` to `trainer.export.saved_model.export`.

        For bytes it takes `prompt`, string [batch], each the beginning of a document, and returns
        `text`, string [batch], what follows up to the end of the document. For a tokenizer's tokens
        it takes `tokens` and `end` and returns `tokens`; see the method `generate`.
        """
        scalars = [
            tf.TensorSpec([], tf.int32, 'max_new_tokens'),
            tf.TensorSpec([], tf.float32, 'temperature'),
            tf.TensorSpec([], tf.int32, 'top_k'),
            tf.TensorSpec([], tf.int32, 'seed'),
        ]
        example = {'max_new_tokens': 4, 'temperature': 0.0, 'top_k': 0, 'seed': 0}
        if self.of_bytes:

            @tf.function(input_signature=[tf.TensorSpec([None], tf.string, 'prompt'), *scalars])
            def generate(prompt, max_new_tokens, temperature, top_k, seed):
                count = _checked(max_new_tokens, temperature, top_k)
                tokens = bytes_to_tokens(prompt)
                new = self.generate(tokens, count, temperature, top_k, seed, SEPARATOR)
                return {'text': tokens_to_bytes(new)}

            return {'generate': (generate, {'prompt': ['import ', 'def f(x'], **example})}

        tokens = tf.TensorSpec([None, None], tf.int32, 'tokens')
        end = tf.TensorSpec([], tf.int32, 'end')

        @tf.function(input_signature=[tokens, *scalars, end])
        def generate(tokens, max_new_tokens, temperature, top_k, seed, end):
            count = _checked(max_new_tokens, temperature, top_k, tokens)
            return {'tokens': self.generate(tokens, count, temperature, top_k, seed, end)}

        rows = [[0, 1, 2], [1, NONE, NONE]]
        return {'generate': (generate, {'tokens': rows, **example, 'end': NONE})}


def bytes_to_tokens(texts: tf.Tensor) -> tf.Tensor:
    """Returns rows of a separator and the bytes of a text, int32 [batch, length], then `NONE`.

    Args:
        texts: string [batch].
    """
    split = tf.strings.bytes_split(texts)
    values = tf.cast(tf.io.decode_raw(split.flat_values, tf.uint8)[:, 0], tf.int32)
    rows = split.with_flat_values(values).to_tensor(NONE)
    return tf.pad(rows, [[0, 0], [1, 0]], constant_values=SEPARATOR)


def tokens_to_bytes(tokens: tf.Tensor) -> tf.Tensor:
    """Returns the bytes among tokens, int32 [batch, length], as string [batch]."""
    table = tf.constant([bytes([byte]) for byte in range(256)] + [b''])
    is_byte = (tokens >= 0) & (tokens < 256)
    return tf.strings.reduce_join(tf.gather(table, tf.where(is_byte, tokens, 256)), axis=1)


def _draw(logits, temperature, top_k, seed) -> tf.Tensor:
    """Returns a token of each row of logits, int32 [batch]."""
    classes = logits.shape[-1]
    kept = tf.where(top_k > 0, tf.minimum(top_k, classes), classes)
    least = tf.math.top_k(logits, kept).values[:, -1:]
    drawn = tf.random.stateless_categorical(
        tf.where(logits >= least, logits, HIDDEN) / tf.maximum(temperature, 1e-6),
        1,
        seed,
        dtype=tf.int32,
    )[:, 0]
    likeliest = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return tf.where(temperature > 0, drawn, likeliest)


def _checked(max_new_tokens, temperature, top_k, tokens=None) -> tf.Tensor:
    """Returns `max_new_tokens`, once all settings are known to make sense."""
    checks = [
        tf.debugging.assert_positive(max_new_tokens, 'max_new_tokens must be 1 or more'),
        tf.debugging.assert_non_negative(temperature, 'temperature must be 0 or more'),
        tf.debugging.assert_non_negative(top_k, 'top_k must be 0, which is all, or more'),
    ]
    if tokens is not None:
        begins = 'each row of tokens must begin with a token'
        checks.append(tf.debugging.assert_non_negative(tokens[:, :1], begins))
    with tf.control_dependencies(checks):
        return tf.identity(max_new_tokens)


def transformer_lm(
    num_classes: int,
    units: int = 128,
    blocks: int = 4,
    heads: int = 2,
    hidden: int | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    tokenizer: str | None = None,
) -> TransformerLM:
    """Builds a Transformer that tells the next token from those before it.

    Args:
        num_classes: number of tokens.
        units: width of the residual stream, a multiple of `2 * heads`.
        blocks: number of blocks.
        heads: number of heads of a block's attention.
        hidden: width of a block's hidden layer; None takes 8/3 of `units`, by which a block has
            the weights of one with a hidden layer of `4 * units` and no gate.
        dropout: fraction of what each part of a block adds that is dropped in training.
        window: how many tokens back a token looks in each block, itself included; None is all. The
            length of the windows of training, so that what is generated may be longer.
        tokenizer: the file of the tokenizer whose tokens these are; None says that they are the
            bytes of `trainer.data.text`, and then the exported model generates text from text.

    Returns:
        A model from tokens, int32 [batch, length], to logits, float32 [batch, length,
        num_classes], those at a position being of the token after it.

    Raises:
        ConfigError: `units` is no multiple of `2 * heads`, or the tokens are not those of bytes.
    """
    if tokenizer is None and num_classes <= SEPARATOR:
        raise ConfigError(
            f'transformer_lm.num_classes is {num_classes}, but there are {SEPARATOR + 1} tokens of '
            'bytes. For those of a tokenizer, set transformer_lm.tokenizer.'
        )
    sizes: Sequence = (num_classes, units, blocks, heads, hidden, dropout, window)
    return TransformerLM(*sizes, of_bytes=tokenizer is None, name='transformer_lm')
