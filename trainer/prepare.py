"""From any sources to files of records: what goes into which file, and the writing of one file.

Which bytes are in which file depends on the sources and on the options alone, so several processes
may write one file each, in any order, and begin again where others have been killed.
"""

import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.data import dataset, example, statistics
from trainer.data.bad_record_list import Damage
from trainer.data.batch import Data
from trainer.data.scan import Batch, Scan, spread
from trainer.data.source import Source
from trainer.errors import ConfigError, WriteError
from trainer.version import __version__

# So many records tell what the others are like: how large, how encoded.
_SAMPLED = 64
# One record a group, so that one can be read without its neighbours.
_ARRAY_RECORD_OPTIONS = 'group_size:1'


def splits(train: Data | None = None, test: Data | None = None) -> dict[str, Source]:
    """Returns the sources of the splits that there are."""
    given = {'train': train, 'test': test}
    return {name: data.source for name, data in given.items() if data is not None}


@dataclasses.dataclass(frozen=True)
class Options:
    """How records become files.

    Attributes:
        files: 'array_record' or 'tfrecord'.
        shards: how many files each split has, at most one a record; None lets sizes tell.
        shard_mb: about how large they are then, in 10**6 bytes.
        on_bad_record: 'stop' at a damaged record, or 'skip' it.
    """

    files: str = 'array_record'
    shards: int | None = None
    shard_mb: float = 200.0
    on_bad_record: str = 'stop'


def plan(sources: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """Returns what is to be written, as JSON: equal from equal sources and options.

    Raises:
        ConfigError: a feature cannot be stored, or the library that writes is missing.
    """
    if options.files == 'array_record':
        _array_record()
    planned = {}
    for name, source in sources.items():
        spec, count = _spec(source, name), source.num_examples
        number = options.shards or _shards_by_size(source, spec, options.shard_mb * 10**6)
        number = min(number, count)
        bounds = [count * k // number for k in range(number + 1)]
        planned[name] = {
            'source': {'records': count, 'fingerprint': source.fingerprint},
            'features': example.as_json(spec),
            'shards': [
                {
                    'file': dataset.shard_name(name, k, number, options.files),
                    'first': bounds[k],
                    'end': bounds[k + 1],
                }
                for k in range(number)
            ],
        }
        if source.class_names:
            planned[name]['class_names'] = [str(each) for each in source.class_names]
    return {
        'format': dataset.FORMAT,
        'phalanx': __version__,
        'files': options.files,
        'splits': planned,
    }


class ShardWriter:
    """Writes shards of one split.

    Args:
        source: the records.
        split: its name.
        options: as in the plan.
    """

    def __init__(self, source: Source, split: str, options: Options):
        self._source, self._split, self._options = source, split, options
        self._spec = _spec(source, split)
        self._scan = Scan(source)

    def write(
        self, path: Path, first: int, end: int, progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Writes records [first, end) into a file that appears when it is complete.

        Args:
            path: of the file; beside it comes a temporary one.
            first, end: which records of the source.
            progress: is told how many records more have been read, now and then.

        Returns:
            What dataset.json says of the shard, with the statistics of its records and those left
            out. A shard that has no record left is not written.

        Raises:
            ConfigError: a record is damaged, and damaged ones are not to be left out.
            WriteError: the file cannot be written.
            OSError: the source cannot be reached.
        """
        aside = path.with_name(f'.tmp-{path.name}')
        left_out: list[Damage] = []
        numbers: dict[str, statistics.Numbers] = {}
        written = 0
        with _Records(aside, self._options.files) as records:
            for batch in self._scan.batches(first, end):
                found = self._scan.read(batch)
                if found.bad and self._options.on_bad_record == 'stop':
                    raise ConfigError(_damaged(self._split, found.bad[0]))
                left_out += found.bad
                for record in _serialized(self._source, found, self._spec):
                    records.write(record)
                written += len(found.records)
                if len(found.records):
                    numbers = statistics.together(numbers, statistics.of_features(found.features))
                progress(len(batch))
        record = {
            'records': written,
            'bytes': aside.stat().st_size,
            'sha256': dataset.sha256(aside),
            'fingerprint': _fingerprint(aside, self._options.files) if written else '',
            'statistics': {name: each.as_json for name, each in numbers.items()},
            'left_out': [bad._asdict() for bad in left_out],
        }
        if written:
            os.rename(aside, path)
        else:
            aside.unlink()
        return record


class _Records:
    """A new file of records; on the disk when the block is left."""

    def __init__(self, path: Path, file_format: str):
        self._path, self._format = path, file_format

    def __enter__(self) -> '_Records':
        with self._told():
            self._path.unlink(missing_ok=True)
            if self._format == 'array_record':
                self._writer = _array_record().ArrayRecordWriter(
                    str(self._path), _ARRAY_RECORD_OPTIONS
                )
            else:
                self._writer = tf.io.TFRecordWriter(str(self._path))
        return self

    def write(self, record: bytes) -> None:
        with self._told():
            self._writer.write(record)

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            with self._told():
                self._writer.close()
                dataset.sync(self._path)
        except WriteError:
            if kind is None:  # Else something has gone wrong before.
                self._path.unlink(missing_ok=True)
                raise
        if kind is not None:
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, tf.errors.OpError) as error:
            raise WriteError(
                f'{self._path.parent} cannot be written: {error}. Once it can, run the same '
                'command again: finished shards are kept.'
            ) from error


def _fingerprint(path: Path, file_format: str) -> str:
    if file_format == 'array_record':
        from trainer.data.array_record import file_fingerprint
    else:
        from trainer.data.tfrecord_index import file_fingerprint
    return file_fingerprint(str(path))


def _array_record() -> types.ModuleType:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise ConfigError(
            'Writing ArrayRecord needs array_record, which is not installed. Run: pip install '
            "'phalanx[records]', or give --format=tfrecord."
        ) from None
    return array_record_module


def _spec(source: Source, split: str) -> example.Spec:
    """Returns how the features are stored: images encoded, if they keep all their pixels so."""
    try:
        spec = example.spec(source.element_spec)
    except ConfigError as error:
        raise ConfigError(f'The split {split!r} cannot be stored. {error.message}') from None
    batch = Scan(source).read(spread(source, _SAMPLED))
    if len(batch.records):
        for name, contents in source.stored(batch.records).items():
            encoded = dataclasses.replace(spec[name], storage='image')
            if all(_decodes_to(contents, batch.features[name], encoded)):
                spec[name] = encoded
    return spec


def _decodes_to(
    contents: Sequence[bytes], images: np.ndarray, feature: example.Feature
) -> list[bool]:
    """Returns of each encoded image whether it gives these pixels when it is read again."""
    spec = {'image': feature}
    serialized = [example.serialize({'image': each}, spec) for each in contents]
    try:
        decoded = _decoder(feature)(tf.constant(serialized)).numpy()
    except tf.errors.InvalidArgumentError:
        if len(contents) == 1:
            return [False]
        rows = range(len(contents))
        return [_decodes_to(contents[r : r + 1], images[r : r + 1], feature)[0] for r in rows]
    return [np.array_equal(*pair) for pair in zip(decoded, images, strict=True)]


@functools.cache
def _decoder(feature: example.Feature) -> Callable[[tf.Tensor], tf.Tensor]:
    return tf.function(
        lambda serialized: example.parse(serialized, {'image': feature})['image'],
        input_signature=[tf.TensorSpec([None], tf.string)],
        autograph=False,
    )


def _shards_by_size(source: Source, spec: example.Spec, shard_bytes: float) -> int:
    """How many shards of about this size there would be, by some records from all over."""
    batch = Scan(source).read(spread(source, _SAMPLED))
    sizes = list(map(len, _serialized(source, batch, spec)))
    return max(1, round(source.num_examples * float(np.mean(sizes)) / shard_bytes)) if sizes else 1


def _serialized(source: Source, batch: Batch, spec: example.Spec) -> list[bytes]:
    """Returns what is written of each record that could be read."""
    if not len(batch.records):
        return []
    features = dict(batch.features)
    if any(feature.storage == 'image' for feature in spec.values()):
        for name, contents in source.stored(batch.records).items():
            if spec[name].storage == 'image':
                # What would change is encoded anew, as PNG, which loses nothing.
                same = _decodes_to(contents, features[name], spec[name])
                features[name] = [
                    content if is_same else image
                    for content, image, is_same in zip(contents, features[name], same, strict=True)
                ]
    rows = zip(*features.values(), strict=True)
    return [example.serialize(dict(zip(features, row, strict=True)), spec) for row in rows]


def _damaged(split: str, bad: Damage) -> str:
    return (
        f'A record of the split {split!r} is damaged: {bad.where}: {bad.reason}. Mend it, or leave '
        'out what is damaged with --on_bad_record=skip. Finished shards are kept.'
    )
