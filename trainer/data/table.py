"""Tables: the rows of CSV and Parquet files as examples, a feature for each column."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import kept
from trainer.data.files import expand
from trainer.data.source import Features, Source
from trainer.data.table_rows import CELLS, Rows
from trainer.errors import ConfigError, nearest, shown

_MISSING = ('', 'NA', 'N/A', 'n/a', 'NaN', 'nan', 'NULL', 'null', 'None')
_DTYPES = {'number': tf.float32, 'integer': tf.int64, 'text': tf.string}


class Table(Source):
    """A source over rows on disk; made by `table`.

    Attributes:
        rows: as they lie on disk.
        kinds: column -> 'number' (float32, NaN where missing), 'integer' (int64) or 'text'
            (string, '' where missing).
        label: the column that is predicted, or None.
        class_names: what the classes that `label` numbers are called, () if it holds numbers.
    """

    def __init__(
        self,
        rows: Rows,
        paths: Sequence[str],
        *,
        label: str | None,
        classes: Sequence[str] | None,
    ):
        self.rows, self.label, self._files = rows, label, tuple(paths)
        self.kinds = {name: column.kind for name, column in rows.columns.items()}
        if label is not None and self.kinds[label] == 'text':
            vocabulary = rows.columns[label].vocabulary[1:]
            self.class_names = tuple(sorted(vocabulary) if classes is None else classes)
            self._check_classes(vocabulary)

    @property
    def num_examples(self) -> int:
        return len(self.rows.array)

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        spec = {name: tf.TensorSpec([], _DTYPES[kind]) for name, kind in self.kinds.items()}
        if self.class_names:
            spec[self.label] = tf.TensorSpec([], tf.int64)
        return spec

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the columns' names, kinds and values, and the classes."""
        which = [self.rows.fingerprint, self.label, self.class_names or None]
        return hashlib.sha256(json.dumps(which).encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        kinds = list(CELLS)

        def gather(indices):
            rows = self.rows.array[indices]
            return [np.ascontiguousarray(rows[kind]) for kind in kinds]

        dtypes = [tf.as_dtype(np.dtype(CELLS[kind])) for kind in kinds]
        # Called stateful, one batch at a time would be read.
        cells = tf.numpy_function(gather, [indices], dtypes, stateful=False)
        features = {}
        for kind, vectors in zip(kinds, cells, strict=True):
            names = [name for name, its_kind in self.kinds.items() if its_kind == kind]
            vectors = tf.ensure_shape(vectors, [indices.shape[0], len(names)])
            features |= dict(zip(names, tf.unstack(vectors, axis=1), strict=True))
        for name, words in self._words.items():
            features[name] = tf.gather(words, features[name])
        return {name: features[name] for name in self.kinds}

    @property
    def files(self) -> tuple[str, ...]:
        return self._files

    def where(self, index: int) -> str:
        row = int(index)
        for path, count in zip(self.files, self.rows.counts, strict=True):
            if row < count:
                return f'{shown(path)}, row {row + 1}'
            row -= count
        raise IndexError(f'{index} of {self.num_examples}')

    def bounds(self, feature: str) -> tuple[float, float] | None:
        if feature == self.label and self.class_names:
            return 0, len(self.class_names) - 1
        column = self.rows.columns[feature]
        return None if column.least is None else (float(column.least), float(column.greatest))

    @functools.cached_property
    def _words(self) -> dict[str, tf.Tensor]:
        """What the numbers in the rows stand for: texts, and of the label the number of a class."""
        with tf.init_scope(), tf.device('CPU:0'):
            words: dict[str, Any] = {
                name: column.vocabulary
                for name, column in self.rows.columns.items()
                if column.kind == 'text'
            }
            if self.class_names:
                # No label is missing; the first of the vocabulary stands for none.
                numbers = {name: number for number, name in enumerate(self.class_names)}
                words[self.label] = [numbers.get(name, -1) for name in words[self.label]]
            return {
                name: tf.constant(list(of), tf.int64 if isinstance(of, list) else tf.string)
                for name, of in words.items()
            }

    def _check_classes(self, labels: Sequence[str]) -> None:
        unknown = [name for name in labels if name not in self.class_names]
        if unknown:
            place = self.rows.columns[self.label].vocabulary.index(unknown[0])
            cells = self.rows.cells(self.label)
            raise ConfigError(
                f'{self.where(np.argmax(cells == place))}: the label {self.label!r} is '
                f'{unknown[0]!r}, which is none of the classes {", ".join(self.class_names)}.'
                f'{nearest(unknown[0], self.class_names)}'
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

    Raises:
        ConfigError: files are missing, damaged, empty, or do not fit together; a value is not
            what the others in its column are; or the arguments do not fit the columns.
    """
    paths, classes, kinds = expand(files), None, dict(types or {})
    if like is not None:
        label, columns, kinds = like.label, (*like.kinds,), like.kinds
        classes = like.class_names or None
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
    directory = kept.keep('table-2', paths, build, json.dumps(settings))
    made = Table(Rows(directory), paths, label=label, classes=classes)
    _tell(made)
    return made


def _tell(made: Table) -> None:
    """Logs what the columns were taken for, and warns of those that may be names of rows."""
    texts = {
        name: len(column.vocabulary) - 1
        for name, column in made.rows.columns.items()
        if column.kind == 'text' and name != made.label
    }
    numbers = [name for name, kind in made.kinds.items() if kind != 'text']
    logging.info(
        '%s: %d rows; numbers: %s; texts (how many different): %s%s',
        shown(made.files[0]) if len(made.files) == 1 else f'{len(made.files)} files',
        made.num_examples,
        ', '.join(numbers) or 'none',
        ', '.join(f'{name} ({count})' for name, count in texts.items()) or 'none',
        ''
        if not made.class_names
        else f'; {len(made.class_names)} classes: '
        + ', '.join(f'{name} ({number})' for number, name in enumerate(made.class_names[:100])),
    )
    rows = made.num_examples
    unlike = [name for name, count in texts.items() if rows > 100 and count > rows / 2]
    if unlike:
        logging.warning(
            'Most texts in %s are different, as in a column of names or dates, so nothing can be '
            'learnt from them. Leave such columns out: name the others in table.columns.',
            ', '.join(map(repr, unlike)),
        )


def _build(directory, *, paths, label, columns, kinds, names, delimiter, missing) -> None:
    try:
        from trainer.data import table_build, table_files
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
    table_build.build(directory, paths, form, chosen, kinds, label)
