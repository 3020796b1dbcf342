"""Tables: the rows of CSV and Parquet files as examples, a feature for each column."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data import kept
from trainer.data.files import expand
from trainer.data.source import Features, Source
from trainer.data.table_rows import CELLS, Rows
from trainer.errors import ConfigError, nearest

_MISSING = ('', 'NA', 'N/A', 'n/a', 'NaN', 'nan', 'NULL', 'null', 'None')
_DTYPES = {'number': tf.float32, 'integer': tf.int64, 'text': tf.string}
_SPLITS = ('train', 'test')


class Table(Source):
    """A source over rows on disk; made by `table`.

    Attributes:
        rows: all of them, those of the other split too.
        kinds: column -> 'number' (float32, NaN where missing), 'integer' (int64) or 'text'
            (string, '' where missing).
        label: the column that is predicted, or None.
        classes: what the classes that `label` numbers are called; None if it holds numbers.
        files: the rows are of.
    """

    def __init__(
        self,
        rows: Rows,
        paths: Sequence[str],
        *,
        label: str | None,
        classes: Sequence[str] | None,
        split: str | None,
        test_every: int,
    ):
        self.rows, self.files, self.label = rows, tuple(paths), label
        self.kinds = {name: column.kind for name, column in rows.columns.items()}
        self._split, self._every = split, test_every
        self.classes = None
        if label is not None and self.kinds[label] == 'text':
            vocabulary = rows.columns[label].vocabulary[1:]
            self.classes = tuple(sorted(vocabulary) if classes is None else classes)
            self._check_classes(vocabulary)
        if not self.num_examples:
            raise ConfigError(
                f'{", ".join(paths)} has {len(rows.array)} rows, too few to hold out one in '
                f'{test_every}. Set table.split = None.'
            )

    @property
    def num_examples(self) -> int:
        total = len(self.rows.array)
        held_out = total // self._every
        return {None: total, 'test': held_out, 'train': total - held_out}[self._split]

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        spec = {name: tf.TensorSpec([], _DTYPES[kind]) for name, kind in self.kinds.items()}
        if self.classes is not None:
            spec[self.label] = tf.TensorSpec([], tf.int64)
        return spec

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the columns' names, kinds and values, the classes and the split."""
        which = [self.rows.fingerprint, self.label, self.classes, self._split, self._every]
        return hashlib.sha256(json.dumps(which).encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        kinds = list(CELLS)

        def gather(indices):
            rows = self.rows.array[self._row(indices)]
            return [np.ascontiguousarray(rows[kind]) for kind in kinds]

        cells = tf.numpy_function(
            gather, [indices], [tf.as_dtype(np.dtype(CELLS[kind])) for kind in kinds]
        )
        features = {}
        for kind, vectors in zip(kinds, cells, strict=True):
            names = [name for name, its_kind in self.kinds.items() if its_kind == kind]
            vectors = tf.ensure_shape(vectors, [indices.shape[0], len(names)])
            features |= dict(zip(names, tf.unstack(vectors, axis=1), strict=True))
        for name, words in self._words.items():
            features[name] = tf.gather(words, features[name])
        return {name: features[name] for name in self.kinds}

    def where(self, index: int) -> str:
        return self._where_row(int(self._row(np.array([index]))[0]))

    def bounds(self, feature: str) -> tuple[float, float] | None:
        if feature == self.label and self.classes is not None:
            return 0, len(self.classes) - 1
        column = self.rows.columns[feature]
        return None if column.least is None else (float(column.least), float(column.greatest))

    def blocks(self):
        """Yields the rows of this split, from first to last and some megabytes at a time."""
        size = max(1, 2**24 // self.rows.array.itemsize)
        for first in range(0, self.num_examples, size):
            last = min(first + size, self.num_examples)
            yield self.rows.array[self._row(np.arange(first, last))]

    @functools.cached_property
    def _words(self) -> dict[str, tf.Tensor]:
        """What the numbers in the rows stand for: texts, and of the label the number of a class."""
        with tf.init_scope(), tf.device('CPU:0'):
            words: dict[str, Any] = {
                name: column.vocabulary
                for name, column in self.rows.columns.items()
                if column.kind == 'text'
            }
            if self.classes is not None:
                # No label is missing; the first of the vocabulary stands for none.
                numbers = {name: number for number, name in enumerate(self.classes)}
                words[self.label] = [numbers.get(name, -1) for name in words[self.label]]
            return {
                name: tf.constant(list(of), tf.int64 if isinstance(of, list) else tf.string)
                for name, of in words.items()
            }

    def _row(self, indices: np.ndarray) -> np.ndarray:
        """Returns which rows examples are: of each `test_every` rows, one by chance is held out."""
        if self._split is None:
            return indices
        others = self._every - 1
        block = indices if self._split == 'test' else indices // others
        # Of what is no whole block nothing is held out.
        whole = block < len(self.rows.array) // self._every
        held_out = _scatter(block) % self._every
        if self._split == 'test':
            return block * self._every + held_out
        place = indices % others
        place = np.where(whole & (place >= held_out), place + 1, place)
        rest = len(self.rows.array) // self._every
        return np.where(whole, block * self._every + place, indices + rest)

    def _where_row(self, row: int) -> str:
        for path, count in zip(self.files, self.rows.counts, strict=True):
            if row < count:
                return f'{path}, row {row + 1}'
            row -= count
        raise IndexError(row)

    def _check_classes(self, labels: Sequence[str]) -> None:
        unknown = [name for name in labels if name not in self.classes]
        if unknown:
            place = self.rows.columns[self.label].vocabulary.index(unknown[0])
            cells = self.rows.cells(self.rows.array, self.label)
            raise ConfigError(
                f'{self._where_row(int(np.argmax(cells == place)))}: the label {self.label!r} is '
                f'{unknown[0]!r}, which is none of the classes {", ".join(self.classes)}.'
                f'{nearest(unknown[0], self.classes)}'
            )


def table(
    files: str | Sequence[str],
    *,
    label: str | None = None,
    columns: Sequence[str] | None = None,
    types: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
    delimiter: str | None = None,
    missing: Sequence[str] = _MISSING,
    like: Table | None = None,
    split: str | None = None,
    test_every: int = 5,
) -> Table:
    """Opens the rows of CSV or Parquet files, one feature a column, of any size.

    When a file is read for the first time its rows are kept as `trainer.data.kept` says, in a form
    that can be read in any order. What a column holds is decided over all of them: whole numbers,
    numbers, or texts; true and false are 1 and 0.

    Args:
        files: paths, URLs or glob patterns. CSV is UTF-8, and may end in .gz; .tsv has tabs.
        label: the column that is predicted. No value of it may be missing. Texts become classes,
            int64 numbers in the order of the alphabet.
        columns: which to read beside the label; None reads all.
        types: column -> 'integer', 'number' or 'text', where it shall not be found out.
        names: of all columns, where CSV files have no header line.
        delimiter: between two cells; None takes tabs in .tsv and commas in other files.
        missing: what stands in CSV files for a value that is not there.
        like: the table of the training data, where this one is to evaluate: its columns, types
            and classes hold here too.
        split: 'train' leaves out one row in `test_every`, by chance; 'test' has those rows alone.
        test_every: see `split`.

    Raises:
        ConfigError: files are missing, damaged, empty, or do not fit together; a value is not
            what the others in its column are; or the arguments do not fit the columns.
    """
    if split is not None and split not in _SPLITS:
        raise ConfigError(
            f"table.split is 'train' or 'test', not {split!r}.{nearest(str(split), _SPLITS)}"
        )
    if test_every < 2:
        raise ConfigError(f'table.test_every is {test_every}; it must be 2 or more.')
    paths, classes, kinds = expand(files), None, dict(types or {})
    if like is not None:
        label, columns, kinds, classes = like.label, (*like.kinds,), like.kinds, like.classes
    for name, kind in kinds.items():
        if kind not in CELLS:
            raise ConfigError(
                f"table.types makes {name!r} {kind!r}; a column is 'integer', 'number' or 'text'."
                f'{nearest(str(kind), CELLS)}'
            )
    settings = {
        'label': label,
        'columns': columns and list(columns),
        'kinds': kinds,
        'names': names and list(names),
        'delimiter': delimiter,
        'missing': list(missing),
    }
    build = functools.partial(_build, paths=paths, **settings)
    directory = kept.keep('table-1', paths, build, json.dumps(settings))
    return Table(
        Rows(directory), paths, label=label, classes=classes, split=split, test_every=test_every
    )


def _build(directory, *, paths, label, columns, kinds, names, delimiter, missing) -> None:
    try:
        from trainer.data import table_columns, table_files
    except ModuleNotFoundError as error:
        if error.name != 'pyarrow':
            raise
        raise ConfigError("Tables are read by pyarrow: pip install 'phalanx[arrow]'.") from None
    form = table_files.Format(names, delimiter, tuple(missing))
    wanted = {'table.types': [*kinds], 'table.label': [] if label is None else [label]}
    if columns is not None:
        wanted['table.columns'] = columns
    there = table_files.column_names(paths, form, wanted)
    chosen = [n for n in there if columns is None or n in columns or n == label]
    table_columns.build(directory, paths, form, chosen, kinds, label)


def _scatter(numbers: np.ndarray) -> np.ndarray:
    """Returns pseudo-random numbers, one for each: the finalizer of SplitMix64.

    Steele, Lea and Flood, 'Fast Splittable Pseudorandom Number Generators', 2014.
    """
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
