"""Several sources as one, each with its share of every batch."""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import tensorflow as tf

from trainer.data import order
from trainer.data.source import Features, Source, refuse_stream
from trainer.errors import ConfigError

# Shares are multiples of one in so many. Small blocks would mix no better, and cost more: see
# `order` about permutations of few numbers.
_LARGEST_BLOCK = 1024


class Mixture(Source):
    """Examples of several sources, mixed in fixed proportions.

    Training reads blocks of some thousand positions in which each source has exactly its share, in
    a random pattern that is the same for all blocks of a run. Each source is read epoch after
    epoch by itself: the small ones come round more often. Which record a position reads is
    computed, as everywhere, so resuming takes no time and no topology changes it.

    An epoch of the mixture is as many examples as all sources hold together. Evaluation reads
    each of them once, whatever the weights.

    Args:
        sources: at least one; all with the same features.
        weights: their shares, positive numbers in any unit; None gives each a share by its number
            of examples.

    Raises:
        ConfigError: the sources or the weights do not fit together, or one is a stream.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None):
        if not sources:
            raise ConfigError('A mixture needs at least one source.')
        self._sources = list(sources)
        for source in self._sources:
            refuse_stream(source, 'mixture', 'let one stream mix the elements by itself.')
        spec = self._sources[0].element_spec
        for number, source in enumerate(self._sources[1:], 2):
            if source.element_spec != spec:
                raise ConfigError(
                    f'The sources of a mixture must have the same features: the first one has '
                    f'{_shown(spec)}, number {number} has {_shown(source.element_spec)}.'
                )
        for number, source in enumerate(self._sources, 1):
            names = tuple(source.class_names)
            if names and self.class_names and names != self.class_names:
                raise ConfigError(
                    'The sources of a mixture must number the same classes alike: those of the '
                    f'first one are {", ".join(self.class_names)}, of number {number} '
                    f'{", ".join(names)}.'
                )
            self.class_names = self.class_names or names
        sizes = [source.num_examples for source in self._sources]
        self._offsets = np.cumsum([0, *sizes])
        self._slots = _slots(sizes if weights is None else weights, len(sizes))

    @property
    def num_examples(self) -> int:
        return int(self._offsets[-1])

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return self._sources[0].element_spec

    @property
    def fingerprint(self) -> str:
        """SHA-256 over those of the sources and their shares."""
        parts = [[source.fingerprint for source in self._sources], self._slots]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def records(self, positions: tf.Tensor, *, seed: int) -> tf.Tensor:
        pattern, turns = self._pattern(seed)
        block, place = positions // len(pattern), positions % len(pattern)
        whose, turn = tf.gather(pattern, place), tf.gather(turns, place)
        result = tf.zeros_like(positions)
        for number, source in enumerate(self._sources):
            mine = whose == number
            own = tf.where(mine, block * self._slots[number] + turn, 0)
            ids = source.records(own, seed=order.other_seed(seed, f'mixture/{number}'))
            result = tf.where(mine, ids + int(self._offsets[number]), result)
        return result

    def _pattern(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns whose turn each place of a block is, and how many it had in the block before."""
        with tf.init_scope():
            places = order.records(
                tf.range(sum(self._slots), dtype=tf.int64),
                num_examples=sum(self._slots),
                seed=order.other_seed(seed, 'mixture'),
            ).numpy()
        pattern = np.searchsorted(np.cumsum(self._slots), places, side='right')
        turns = np.zeros_like(pattern)
        for number in range(len(self._slots)):
            turns[pattern == number] = np.arange(self._slots[number])
        return pattern.astype(np.int64), turns.astype(np.int64)

    def fetch(self, indices: tf.Tensor) -> Features:
        rows, parts = [], []
        for number, source in enumerate(self._sources):
            first, end = (int(offset) for offset in self._offsets[number : number + 2])
            mine = tf.where((indices >= first) & (indices < end))[:, 0]
            own = tf.gather(indices, mine) - first
            rows.append(tf.cast(mine, tf.int32))
            parts.append(self._fetch_some(source, own))
        return {
            name: tf.dynamic_stitch(rows, [part[name] for part in parts])
            for name in self.element_spec
        }

    def _fetch_some(self, source: Source, indices: tf.Tensor) -> Features:
        """Reads any number of records, none included, of which sources need know nothing."""

        def nothing() -> Features:
            return {
                name: tf.zeros([0, *spec.shape], spec.dtype)
                for name, spec in self.element_spec.items()
            }

        def something() -> Features:
            return {
                name: tf.ensure_shape(tensor, [None, *self.element_spec[name].shape])
                for name, tensor in source.fetch(indices).items()
            }

        return tf.cond(tf.size(indices) > 0, something, nothing)

    def bounds(self, feature: str) -> tuple[float, float] | None:
        bounds = [source.bounds(feature) for source in self._sources]
        if None in bounds:
            return None
        return min(low for low, _ in bounds), max(high for _, high in bounds)

    def where(self, index: int) -> str:
        number = int(np.searchsorted(self._offsets, index, side='right')) - 1
        return self._sources[number].where(index - int(self._offsets[number]))


def mixture(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Mixture:
    """Returns several sources as one, see `Mixture`."""
    return Mixture(sources, weights)


def _slots(weights: Sequence[float], count: int) -> list[int]:
    """Returns how many places of a block each source has."""
    if len(weights) != count:
        raise ConfigError(f'The mixture has {count} sources but {len(weights)} weights.')
    for weight in weights:
        if isinstance(weight, bool) or not 0 < weight < math.inf:
            raise ConfigError(
                f'The weights of a mixture are {list(weights)}; {weight!r} is not above 0.'
            )
    # 0.1 as it is written, and not as it is stored.
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    exact_block = math.lcm(*(share.denominator for share in shares))
    block = max(1, _LARGEST_BLOCK // exact_block) * min(exact_block, _LARGEST_BLOCK)
    slots = [int(share * block) for share in shares]
    by_remainder = sorted(range(count), key=lambda i: slots[i] - shares[i] * block)
    for number in by_remainder[: block - sum(slots)]:
        slots[number] += 1
    if not all(slots):
        raise ConfigError(
            f'The weights of a mixture are {list(weights)}: the smallest share is less than one in '
            f'{_LARGEST_BLOCK}, and would never be read.'
        )
    return slots


def _shown(spec: dict[str, tf.TensorSpec]) -> str:
    return ', '.join(f'{name} {s.dtype.name}{list(s.shape)}' for name, s in sorted(spec.items()))
