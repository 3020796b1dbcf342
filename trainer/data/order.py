"""Which record each position of a training run reads: pure functions of (seed, position).

Position p = step * global_batch_size + row counts the examples of a run over all epochs and
replicas. Every epoch is a permutation of all records of its own, computed for any position without
the ones before it, so a run can start at any step, and the order is the same on any topology.

Everything rests on `RandomIndexShuffle`, a block cipher of the Simon family made to fit any range
by cycle walking (Black and Rogaway, 'Ciphers with Arbitrary Finite Domains', 2002; Beaulieu et al.,
'The Simon and Speck Families', 2013). Two of its properties, measured on TensorFlow 2.21, shape
what follows:

* With its default of 4 rounds, neighbouring indices get correlated results (by 24 standard
  deviations at 60,000 records, 400 at a million), and so do neighbouring keys up to 12. From 14 on
  no test we made tells it from chance, down to two records; a round costs 3 ns.
* Of each of the three words of a key it sees only the lowest bits: 8 up to 65,536 records, 16 up
  to 2**32. Seeds or epochs that are a multiple of 256 apart would read in the same order, so keys
  are hashed first, by the cipher itself over a range that takes all 31 bits.

The public wrapper, `tf.random.experimental.index_shuffle`, is wrong for a batch of keys, hence the
raw operation. A block has at least 16 bits, so below some 1,000 records a walk is long: an index
takes 65,536 / num_examples * 30 ns.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Ranges [first, end) of positions, ascending.
Windows = Sequence[tuple[int, int]]

_ROUNDS = 16
_BITS = 62  # The widest range that is a power of two: no cycle walking.
_WORD = 2**31
# One key serves several purposes; each hashes another index, so that none sees another's numbers.
_EPOCH_INDEX = 2**60
_FOLD_INDEX = 2**61


def positions(step: tf.Tensor | int, global_batch_size: int) -> tf.Tensor:
    """Returns the positions of a step's rows, int64 [global_batch_size].

    Args:
        step: int64 scalar, counted from 0.
        global_batch_size: Examples in a step, over all replicas.
    """
    first = tf.cast(step, tf.int64) * global_batch_size
    return first + tf.range(global_batch_size, dtype=tf.int64)


def used(positions: tf.Tensor, left_out: Windows) -> tf.Tensor:
    """Returns the positions that are read in place of the given ones, int64 [B].

    Args:
        positions: int64 [B], counted without what is left out.
        left_out: windows of positions that are never read, from `leave_out`.
    """
    for first, end in left_out:
        positions = tf.where(positions >= first, positions + (end - first), positions)
    return positions


def leave_out(left_out: Windows, first: int, end: int) -> Windows:
    """Returns the windows with one more: ascending, apart from each other.

    Args:
        left_out: the windows so far.
        first, end: of the new one, counted without what is left out so far.
    """
    for low, high in left_out:
        first, end = (p + (high - low) if p >= low else p for p in (first, end - 1))
        end += 1
    merged: list[tuple[int, int]] = []
    for low, high in sorted([*left_out, (first, end)]):
        if merged and low <= merged[-1][1]:
            low, high = merged[-1][0], max(high, merged.pop()[1])
        merged.append((low, high))
    return tuple(merged)


def records(positions: tf.Tensor, *, num_examples: int, seed: int) -> tf.Tensor:
    """Returns the record at each position; each epoch's positions give each record once.

    Args:
        positions: int64 [B]; they may lie in several epochs.
        num_examples: The number of records.
        seed: In [0, 2**31).

    Returns:
        int64 [B], in [0, num_examples).
    """
    epochs, epoch_of = tf.unique(positions // num_examples, out_idx=tf.int64)
    keys = _key(_hash(example_seeds(epochs, seed=seed), _EPOCH_INDEX))
    index, keys, last = positions % num_examples, tf.gather(keys, epoch_of), num_examples - 1
    if last < 2**16 or last & (last - 1):
        return _shuffle(index, keys, last)
    # With a power of two as last index the operation takes a block too narrow to hold it, and
    # gives some results twice. One index more is right, and walking past it takes one more step.
    shuffled = _shuffle(index, keys, num_examples)
    beyond = _shuffle(
        tf.fill(tf.shape(index), tf.constant(num_examples, tf.int64)), keys, num_examples
    )
    return tf.where(shuffled == num_examples, beyond, shuffled)


def example_seeds(positions: tf.Tensor, *, seed: int) -> tf.Tensor:
    """Returns the keys of all randomness of the examples at some positions.

    Args:
        positions: int64 [B], each below 2**62.
        seed: In [0, 2**31).

    Returns:
        int32 [B, 3], the seed and the high and low 31 bits of the position.
    """
    words = [tf.zeros_like(positions) + seed, positions // _WORD, positions % _WORD]
    return tf.cast(tf.stack(words, axis=1), tf.int32)


def uniform(seeds: tf.Tensor, draw: int, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
    """Returns a pseudo-random number for each example, uniform in [low, high).

    Args:
        seeds: int32 [B, 3], from `example_seeds` or `fold`.
        draw: Which number of the example, 0, 1, 2...; different ones are independent.
        low: The least value.
        high: The bound above, never reached.

    Returns:
        float32 [B], with 24 random bits.
    """
    unit = tf.cast(_hash(seeds, draw) // 2 ** (_BITS - 24), tf.float32) * 2.0**-24
    # Rounding may carry low + (high - low) * unit up to high.
    below = np.nextafter(np.float32(high), np.float32(low))
    return tf.minimum(low + (high - low) * unit, below)


def fold(seeds: tf.Tensor, number: int) -> tf.Tensor:
    """Returns new keys, int32 [B, 3], independent of `seeds` and of those of other numbers.

    Args:
        seeds: int32 [B, 3].
        number: In [0, 2**60).
    """
    return _key(_hash(seeds, _FOLD_INDEX + number))


def other_seed(seed: int, purpose: str) -> int:
    """Returns a seed for another purpose, in [0, 2**31), from that of a run or a split."""
    digest = hashlib.sha256(f'{seed} {purpose}'.encode()).digest()
    return int.from_bytes(digest[:4], 'big') % _WORD


def _shuffle(index: tf.Tensor, keys: tf.Tensor, max_index: int) -> tf.Tensor:
    return tf.raw_ops.RandomIndexShuffle(
        index=index, seed=keys, max_index=tf.constant(max_index, tf.int64), rounds=_ROUNDS
    )


def _hash(keys: tf.Tensor, index: int) -> tf.Tensor:
    """Returns 62 pseudo-random bits of each key, int64 [B]."""
    indices = tf.zeros_like(keys[:, 0], tf.int64) + index
    return _shuffle(indices, keys, 2**_BITS - 1)


def _key(bits: tf.Tensor) -> tf.Tensor:
    """Spreads 62 bits, int64 [B], over a key, int32 [B, 3], whose words share few low bits."""
    words = [bits % _WORD, bits // 2**16 % _WORD, bits // _WORD]
    return tf.cast(tf.stack(words, axis=1), tf.int32)
