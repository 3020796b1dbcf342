"""The columns of a table as numbers that a model can compute with, by what the training data say.

TensorFlow's own operations do the work, and not the preprocessing layers of Keras, which would
compute in the precision that is set for the model.
"""

import collections
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data import kept
from trainer.data.preprocess import Adapted
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest

# Quantiles are those of about so many rows, evenly spaced.
_QUANTILE_ROWS = 2**20
_ROWS_AT_ONCE = 2**16


class TableFeatures(Adapted):
    """Made by `table_features`, which says what it does.

    Args:
        settings: what was asked for.
        source: what to learn from; None where `state` is given.
        state: the settings, and of each column what `_learn` finds out.
    """

    def __init__(self, settings: dict[str, Any], source: Source | None, state: dict | None = None):
        self._settings, self._source, self._state = settings, source, state

    @property
    def state(self) -> dict[str, Any]:
        if self._state is None:
            self._state = self._learnt()
        return self._state

    def _learnt(self) -> dict[str, Any]:
        source = self._source

        def learn() -> str:
            columns = _learn(source, self._settings)
            return json.dumps({'settings': self._settings, 'columns': columns})

        def build(directory: Path) -> None:
            (directory / 'state.json').write_text(learn(), encoding='utf-8')

        if not source.files:
            return json.loads(learn())
        which = json.dumps([source.fingerprint, self._settings])
        directory = kept.keep('table-features-3', source.files, build, which)
        return json.loads((directory / 'state.json').read_text(encoding='utf-8'))

    def with_state(self, state: dict[str, Any]) -> 'TableFeatures':
        # Checkpoints of older versions know no crosses apart.
        if {'crosses_apart': False, **state.get('settings', {})} != self._settings:
            raise ConfigError(
                f'The checkpoint was trained with the settings {state.get("settings")} of '
                f'table_features, but now they are {self._settings}. Restore the ones it was '
                'trained with, or use another model_dir.'
            )
        return TableFeatures(self._settings, None, state)

    @property
    def resources(self) -> list[tf.lookup.StaticHashTable]:
        return list(self._lookups.values())

    def __call__(self, features: Features) -> Features:
        """Returns `features`, float32 [B, width], and what is kept apart from them.

        That is the indexed columns, int64 [B], and `crosses`, float32 [B, places].
        """
        self._check(features)
        known = {n: column for n, column in self.state['columns'].items() if n in features}
        parts, apart = [], {}
        numbers = [name for name, column in known.items() if 'mean' in column]
        if numbers:
            parts += _scaled([features[n] for n in numbers], [known[n] for n in numbers])
        for name, column in known.items():
            if name in numbers:
                continue
            index, size = self._index(name, features[name]), _num_indices(column)
            if name in self._settings['indexed']:
                apart[name] = index
            else:
                # What training never saw has no weights of its own: its vector is zero.
                first = 0 if column['others'] else 1
                parts.append(tf.one_hot(index - first, size - first))
        crosses = []
        for names in self._settings['crosses']:
            words = [self._word(name, features[name]) for name in names]
            # No text holds the separator but by ill will.
            buckets = tf.strings.to_hash_bucket_fast(
                tf.strings.join(words, '\x1f'), self._settings['cross_buckets']
            )
            crosses.append(tf.one_hot(buckets, self._settings['cross_buckets']))
        if self._settings['crosses_apart']:
            apart['crosses'] = tf.concat(crosses, axis=1)
        else:
            parts += crosses
        return {**({'features': tf.concat(parts, axis=1)} if parts else {}), **apart}

    def _check(self, features: Features) -> None:
        """Raises ConfigError for columns unknown to the state, or used but withheld."""
        learnt = self.state['columns']
        for name in features:
            if name not in learnt:
                raise ConfigError(
                    f'table_features has learnt from {", ".join(learnt)}, among which there is no '
                    f'{name!r}.{nearest(name, learnt)} Data of the same columns must be read.'
                )
        for name in (name for names in self._settings['crosses'] for name in names):
            if name not in features:
                raise ConfigError(
                    f'table_features.crosses names {name!r}, which the model does not get to see: '
                    'it is the label or the weight. Leave it out.'
                )

    def _index(self, name: str, cells: tf.Tensor) -> tf.Tensor:
        """Returns which category each cell is of, int64 [B] from 1 on; 0 is any other."""
        column = self.state['columns'][name]
        if 'vocabulary' in column:
            cells = cells if column['kind'] == 'text' else tf.cast(cells, tf.int64)
            return self._lookups[name].lookup(cells)
        values = tf.cast(cells, tf.float32)
        buckets = 1 + tf.raw_ops.Bucketize(input=values, boundaries=column['boundaries'])
        return tf.cast(tf.where(tf.math.is_nan(values), 0, buckets), tf.int64)

    def _word(self, name: str, cells: tf.Tensor) -> tf.Tensor:
        if 'boundaries' in self.state['columns'][name]:
            cells = self._index(name, cells)
        return cells if cells.dtype == tf.string else tf.strings.as_string(cells)

    @functools.cached_property
    def _lookups(self) -> dict[str, tf.lookup.StaticHashTable]:
        """column -> from categories to their indices."""
        # Outside of the graph under trace, so that all graphs share them.
        with tf.init_scope(), tf.device('CPU:0'):
            return {
                name: _lookup(column['vocabulary'], column['kind'])
                for name, column in self.state['columns'].items()
                if 'vocabulary' in column
            }


def table_features(
    source: Source,
    *,
    categories: Sequence[str] = (),
    max_categories: int = 1000,
    buckets: Mapping[str, int] | None = None,
    indexed: Sequence[str] = (),
    crosses: Sequence[Sequence[str]] = (),
    cross_buckets: int = 64,
    crosses_apart: bool = False,
) -> TableFeatures:
    """Makes the features of a table: one vector for each row, all of whose numbers are of size 1.

    Numbers are shifted and scaled to mean 0 and variance 1; a missing one becomes 0, and a column
    with missing values gets a second number that says which are. Texts are categories: each has a
    place in the vector that is 1 for it and else 0. A missing text is a category. One that the
    training data do not have is 0 everywhere.

    All that has to be known for this is learnt from the training data, in one pass.

    Args:
        source: the training data, also where others are preprocessed: @train/subset(). All its
            features but label and weight are single values; NaN is a missing number.
        categories: columns of whole numbers that are categories too.
        max_categories: of a column with more categories, the rarest share one place.
        buckets: column of numbers -> how many intervals, of equally many rows each, to cut it
            into; they are categories then.
        indexed: categories that do not go into the vector but become features of their own, for
            an embedding: int64, from 1 on; 0 is for all that have no number.
        crosses: pairs, or more, of columns whose combinations are categories as well.
        cross_buckets: for each cross, how many places its combinations share by their hashes.
        crosses_apart: whether the crosses do not go into the vector but become a feature of their
            own, `crosses`, for the wide part of a model: float32 [crosses * cross_buckets].

    Raises:
        ConfigError: a column is not there, or does not hold what it would have to.
    """
    buckets = dict(buckets or {})
    named = {
        'categories': categories,
        'buckets': [*buckets],
        'indexed': indexed,
        'crosses': [name for names in crosses for name in names],
    }
    kinds = {name: _kind(name, spec) for name, spec in source.element_spec.items()}
    all_categories = [n for n, k in kinds.items() if k == 'text' or n in {*categories, *buckets}]
    fitting = {
        'categories': [name for name, kind in kinds.items() if kind == 'integer'],
        'buckets': [n for n, kind in kinds.items() if kind != 'text' and n not in categories],
        'indexed': all_categories,
        'crosses': all_categories,
    }
    for setting, names in named.items():
        for name in names:
            if name not in fitting[setting]:
                raise ConfigError(
                    f'table_features.{setting} names {name!r}, which '
                    + ('is not fit for it' if name in kinds else 'does not exist')
                    + f'; it may name {", ".join(fitting[setting]) or "none here"}.'
                    + nearest(name, fitting[setting])
                )
    counts = {'max_categories': max_categories, 'cross_buckets': cross_buckets}
    counts |= {f'buckets[{name!r}]': count for name, count in buckets.items()}
    for setting, count in counts.items():
        if count < 2:
            raise ConfigError(f'table_features.{setting} is {count}; it must be 2 or more.')
    if crosses_apart and not crosses:
        raise ConfigError(
            'table_features.crosses_apart is True, but there are no crosses. Name columns in '
            'table_features.crosses.'
        )
    for name in ('features', *(['crosses'] if crosses_apart else ())):
        if name in indexed:
            raise ConfigError(
                f'table_features.indexed names {name!r}, which is what the vector of '
                f'{"crosses" if name == "crosses" else "all others"} is called. Rename the column.'
            )
    settings = {
        'categories': list(categories),
        'max_categories': max_categories,
        'buckets': buckets,
        'indexed': list(indexed),
        'crosses': [list(names) for names in crosses],
        'cross_buckets': cross_buckets,
        'crosses_apart': crosses_apart,
    }
    return TableFeatures(settings, source)


def _scaled(cells: Sequence[tf.Tensor], columns: Sequence[dict[str, Any]]) -> list[tf.Tensor]:
    """Returns columns with mean 0 and variance 1, and those that say where one is missing."""
    # In float32 the year 2000 and a day more would be one.
    values = tf.stack([tf.cast(column, tf.float64) for column in cells], axis=1)
    mean, std = (np.array([column[what] for column in columns]) for what in ('mean', 'std'))
    missing = tf.math.is_nan(values)
    scaled = tf.where(missing, tf.zeros_like(values), (values - mean) / std)
    told = [number for number, column in enumerate(columns) if column['missing']]
    parts = [tf.cast(scaled, tf.float32)]
    return parts + ([tf.cast(tf.gather(missing, told, axis=1), tf.float32)] if told else [])


def _lookup(vocabulary: list, kind: str) -> tf.lookup.StaticHashTable:
    """Returns the table from categories to their indices, from 1 on; 0 for any other."""
    if kind == 'text':
        vocabulary = [category.encode(errors='surrogateescape') for category in vocabulary]
    keys = tf.constant(vocabulary, tf.string if kind == 'text' else tf.int64)
    indices = tf.range(1, len(vocabulary) + 1, dtype=tf.int64)
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, indices), 0)


def _num_indices(column: dict[str, Any]) -> int:
    """The number of categories and one, for all others."""
    if 'vocabulary' in column:
        return len(column['vocabulary']) + 1
    return len(column['boundaries']) + 2


def _kind(name: str, spec: tf.TensorSpec) -> str:
    if spec.shape.rank or not (
        spec.dtype.is_floating or spec.dtype.is_integer or (spec.dtype in (tf.bool, tf.string))
    ):
        raise ConfigError(
            f'table_features takes single numbers and texts, but {name!r} is {spec.dtype.name} of '
            f'shape {spec.shape}.'
        )
    if spec.dtype == tf.string:
        return 'text'
    return 'number' if spec.dtype.is_floating else 'integer'


def _learn(source: Source, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what is to be known of each column, from one pass over the examples.

    'mean', 'std' and 'missing' (whether any is) of numbers; of categories 'kind' and 'vocabulary',
    of buckets the 'boundaries' between them, and of both 'others': whether any has no number.
    """
    learners: dict[str, Any] = {}
    stride = -(-source.num_examples // _QUANTILE_ROWS)
    for name, spec in source.element_spec.items():
        kind = _kind(name, spec)
        if kind == 'text' or name in settings['categories']:
            learners[name] = _Counts(kind, settings['max_categories'])
        elif name in settings['buckets']:
            learners[name] = _Quantiles(settings['buckets'][name], stride)
        else:
            learners[name] = _Moments()
    with tf.init_scope(), tf.device('CPU:0'):
        indices = tf.data.Dataset.range(source.num_examples).batch(_ROWS_AT_ONCE)
        parts = indices.map(source.fetch, num_parallel_calls=2, deterministic=True)
        for rows in parts.as_numpy_iterator():
            for name, learner in learners.items():
                learner.add(rows[name])
    return {name: learner.result() for name, learner in learners.items()}


class _Moments:
    """Mean and variance, by Chan, Golub and LeVeque's way of adding up parts (1979)."""

    def __init__(self):
        self._count = self._rows = 0
        self._mean = self._squares = 0.0

    def add(self, cells: np.ndarray) -> None:
        self._rows += len(cells)
        values = cells.astype(np.float64)
        values = values[~np.isnan(values)]
        if not len(values):
            return
        count, mean = self._count + len(values), values.mean()
        apart = mean - self._mean
        self._squares += np.sum((values - mean) ** 2)
        self._squares += apart**2 * self._count * len(values) / count
        self._mean += apart * len(values) / count
        self._count = count

    def result(self) -> dict[str, Any]:
        std = float(np.sqrt(self._squares / max(1, self._count)))
        missing = self._count < self._rows
        return {'mean': float(self._mean), 'std': std or 1.0, 'missing': missing}


class _Quantiles:
    """What cuts a column into intervals of equally many rows."""

    def __init__(self, count: int, stride: int):
        self._count, self._stride, self._rows, self._missing = count, stride, 0, False
        self._values: list[np.ndarray] = []

    def add(self, cells: np.ndarray) -> None:
        values = cells.astype(np.float32)
        self._missing |= bool(np.isnan(values).any())
        self._values.append(values[-self._rows % self._stride :: self._stride])
        self._rows += len(cells)

    def result(self) -> dict[str, Any]:
        values = np.concatenate(self._values)
        values = values[~np.isnan(values)]
        cuts = np.quantile(values, np.arange(1, self._count) / self._count) if len(values) else []
        return {'boundaries': np.unique(cuts).tolist(), 'others': self._missing}


class _Counts:
    """How often each category occurs."""

    def __init__(self, kind: str, limit: int):
        self._kind, self._limit = kind, limit
        self._counts: collections.Counter = collections.Counter()

    def add(self, cells: np.ndarray) -> None:
        self._counts.update(cells.tolist())

    def result(self) -> dict[str, Any]:
        # The most frequent first, and then by name: whatever order the rows are in.
        ranked = sorted((-count, category) for category, count in self._counts.items())
        known = [category for _, category in ranked[: self._limit]]
        if self._kind == 'text':
            known = [category.decode(errors='surrogateescape') for category in known]
        return {
            'kind': self._kind,
            'vocabulary': known,
            'others': len(ranked) > self._limit,
        }
