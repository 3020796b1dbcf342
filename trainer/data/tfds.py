"""TensorFlow Datasets that lie on disk, in our own order: https://www.tensorflow.org/datasets."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data.array_record import ArrayRecords
from trainer.data.records import Records
from trainer.data.source import Features, Source
from trainer.data.tfrecord import TFRecords
from trainer.errors import ConfigError, nearest

# What the records hold is the library's business; the readers must be told something.
_OPAQUE = {'record': ('string', ())}


class _TFRecords(TFRecords):
    def _check(self) -> None:
        pass


class _ArrayRecords(ArrayRecords):
    def _check(self) -> None:
        pass


_READERS = {'tfrecord': _TFRecords, 'array_record': _ArrayRecords}


class TFDS(Source):
    """A split of a data set that `tensorflow_datasets` has written.

    The library says which files there are and what a record means, and decodes it. Which record is
    read when is decided here, as for all sources.

    Args:
        info: the library's `DatasetInfo`.
        split: see `tfds`.

    Raises:
        ConfigError: there is no such split, or it is empty; its files are of another format, or do
            not hold as many records as the library noted; or a feature has no fixed shape.
    """

    def __init__(self, info: Any, split: str):
        try:
            parts = info.splits[split].file_instructions
        except (ValueError, KeyError, AssertionError) as error:
            raise ConfigError(
                f'{info.full_name} has no split {split!r} ({error}): there are '
                f"{sorted(info.splits)}, parts of them such as 'train[:80%]', and sums such as "
                f"'train+test'.{nearest(str(split), info.splits)}"
            ) from None
        if not parts:
            sizes = {name: each.num_examples for name, each in info.splits.items()}
            raise ConfigError(
                f'The split {split!r} of {info.full_name} holds no examples; there are {sizes}.'
            )
        file_format = info.file_format.value if info.file_format else 'tfrecord'
        if file_format not in _READERS:
            raise ConfigError(
                f'The files of {info.full_name} are of the format {file_format!r}; '
                f'{" and ".join(_READERS)} can be read.'
            )
        declared = {part.filename: part.examples_in_shard for part in parts}
        paths = list(declared)
        self._records: Records = _READERS[file_format](paths, _OPAQUE)
        # Else the numbers of a split would run on into the next file.
        for path, found in zip(paths, np.diff(self._records._firsts).tolist(), strict=True):
            if found != declared[path]:
                raise ConfigError(
                    f'{path} holds {found} records, but {declared[path]} by the dataset_info.json '
                    f'beside it. Fetch or prepare {info.full_name} again.'
                )
        firsts = self._records._firsts[[paths.index(part.filename) for part in parts]]
        self._starts = firsts + [part.skip for part in parts]
        self._firsts = np.cumsum([0, *(part.take for part in parts)])
        self._features = info.features
        self._spec = _flat(info.features.get_tensor_spec())
        for name, spec in self._spec.items():
            if not isinstance(spec, tf.TensorSpec) or not spec.shape.is_fully_defined():
                raise ConfigError(
                    f'The feature {name!r} of {info.full_name} has no fixed shape: {spec}. '
                    'Examples of different shapes do not fit into a batch.'
                )

    @property
    def num_examples(self) -> int:
        return int(self._firsts[-1])

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return self._spec

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over that of the files, which of their records are read, and what they hold."""
        parts = (self._starts.tolist(), self._firsts.tolist(), self._spec)
        return hashlib.sha256(f'{self._records.fingerprint}{parts}'.encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        serialized = tf.numpy_function(
            lambda numbers: self._records.read(self._stored(numbers)),
            [indices],
            tf.string,
            stateful=False,
        )
        return tf.map_fn(
            lambda record: _flat(self._features.deserialize_example(record)),
            tf.ensure_shape(serialized, indices.shape[:1]),
            fn_output_signature=self._spec,
        )

    def where(self, index: int) -> str:
        return self._records.where(int(self._stored(np.array([index]))[0]))

    def bounds(self, feature: str) -> tuple[float, float] | None:
        num_classes = getattr(_flat(self._features).get(feature), 'num_classes', None)
        return None if num_classes is None else (0.0, float(num_classes - 1))

    def _stored(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the number among the records of all files of each of the split's."""
        part = np.searchsorted(self._firsts, numbers, 'right') - 1
        return self._starts[part] + numbers - self._firsts[part]


def tfds(name: str, split: str = 'train', data_dir: str | None = None) -> TFDS:
    """Opens a data set of TensorFlow Datasets that is on disk; nothing is downloaded.

    Args:
        name: such as 'mnist', 'mnist:3.0.1' or 'glue/cola'.
        split: 'train', a part of it such as 'train[:80%]' or 'train[1000:]', or a sum of those.
        data_dir: where the data sets are; None takes TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
        ConfigError: the library is not installed, there are no such data on disk, or they cannot
            be read.
    """
    try:
        from tensorflow_datasets.core import read_only_builder, registered
    except ImportError as error:
        raise ConfigError(
            f"{error.name or error} is not installed. Run: pip install 'phalanx[tfds]'"
        ) from None
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        place = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
        there = [path.name for path in Path(place).expanduser().glob('*') if path.is_dir()]
        given = f', data_dir={data_dir!r}' if data_dir else ''
        raise ConfigError(
            f'There is no data set {name!r} in {place}.{nearest(name, there)} This would download '
            f'and prepare it: python -c "import tensorflow_datasets as tfds; '
            f'tfds.builder({name!r}{given}).download_and_prepare()"'
        ) from None
    except ValueError as error:
        reason = str(error).partition('\n')[0]
        raise ConfigError(
            f'tfds.name = {name!r} cannot be opened ({reason}). Names are such as '
            "'mnist', 'mnist:3.0.1', 'mnist:3.*.*' or 'glue/cola'."
        ) from None
    return TFDS(builder.info, split)


def _flat(features: Any, above: str = '') -> dict[str, Any]:
    """Returns features within features under names such as 'objects/label'."""
    flat = {}
    for name in sorted(features):
        inner = features[name]
        if hasattr(inner, 'keys') and not isinstance(inner, tf.TensorSpec):
            flat |= _flat(inner, f'{above}{name}/')
        else:
            flat[f'{above}{name}'] = inner
    return flat
