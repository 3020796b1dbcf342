"""dataset.json: what a directory that `phalanx prepare` has written says of itself.

Read without TensorFlow. All of it is described in docs/data/prepare.md.
"""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from trainer.data import files
from trainer.errors import ConfigError, nearest

NAME = 'dataset.json'
FORMAT = 1
# What shards are called, by the format of the files.
SUFFIXES = {'array_record': 'array_record', 'tfrecord': 'tfrecord'}

# What is raised where JSON does not hold what it should.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)

_BLOCK = 2**22  # Bytes that are read at a time.
_AGAIN = 'Run `phalanx prepare` again into another directory, or copy the directory again.'


def shard_name(split: str, number: int, count: int, file_format: str) -> str:
    """Returns the name of a shard, numbered from 0."""
    return f'{split}-{number:05d}-of-{count:05d}.{SUFFIXES[file_format]}'


def read(directory: str) -> dict[str, Any]:
    """Returns what dataset.json of a directory, a path or a URL, says.

    Raises:
        ConfigError: there is none, or it is not what `phalanx prepare` writes.
    """
    path = join(directory, NAME)
    try:
        content = files.read(path)
    except (FileNotFoundError, NotADirectoryError):
        mend = ''
        if os.path.isdir(f'{directory}.partial'):
            mend = f' {directory}.partial is unfinished: run its `phalanx prepare` again.'
        elif not files.is_url(directory):
            parent = os.path.dirname(os.path.abspath(directory))
            mend = nearest(directory, (os.path.dirname(p) for p in glob.glob(f'{parent}/*/{NAME}')))
        raise ConfigError(
            f'{directory!r} is no prepared data set: it has no {NAME}.{mend}'
        ) from None
    try:
        dataset = json.loads(content)
        written = dataset['format']
        if written == FORMAT:
            _check(dataset)
    except MALFORMED as error:
        raise damaged(directory, error) from None
    if written != FORMAT:
        raise ConfigError(
            f'{path} has format {written}; this version of Phalanx reads format {FORMAT}. Prepare '
            'the data again, or use the version that has written it.'
        )
    return dataset


def damaged(directory: str, error: Exception) -> ConfigError:
    """Returns what to raise where dataset.json cannot be understood."""
    path = join(directory, NAME)
    return ConfigError(f'{path} is damaged: {type(error).__name__} {error}. {_AGAIN}')


def _check(dataset: dict[str, Any]) -> None:
    """Raises some error if not all is there, or a shard lies elsewhere."""
    _ = dataset['phalanx'], SUFFIXES[dataset['files']]
    for split in dataset['splits'].values():
        for key in ('records', 'fingerprint', 'features', 'source', 'left_out'):
            _ = split[key]
        _ = split['statistics'].items(), split['source']['records']
        for shard in split['shards']:
            _ = shard['bytes'], shard['sha256']
            if '/' in shard['file']:
                raise ValueError(f'{shard["file"]!r} is no name of a shard')


def split_of(dataset: dict[str, Any], split: str, directory: str) -> dict[str, Any]:
    """Returns what is said of one split.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in dataset['splits']:
        known = ', '.join(map(repr, dataset['splits']))
        raise ConfigError(
            f'{directory!r} has no split {split!r}, only {known}.'
            f'{nearest(str(split), dataset["splits"])}'
        )
    return dataset['splits'][split]


def shards(dataset: dict[str, Any], split: str, directory: str) -> list[str]:
    """Returns the paths of the shards of a split, all of which have the size they should.

    Raises:
        ConfigError: a shard is missing, has another size, or is one too many.
        OSError: the files cannot be reached.
    """
    known = {shard['file']: shard for shard in split_of(dataset, split, directory)['shards']}
    for shard in known.values():
        if wrong := wrong_with(shard, directory):
            raise ConfigError(f'{wrong} {_AGAIN}')
    for path in files.expand(
        join(glob.escape(directory), f'{split}-*-of-*.{SUFFIXES[dataset["files"]]}')
    ):
        if path.rpartition('/')[2] not in known:
            raise ConfigError(
                f'{path} is no shard of {join(directory, NAME)}: it came later, or from another '
                'data set. Remove it.'
            )
    return [join(directory, name) for name in known]


def check_same(split: dict[str, Any], paths: Sequence[str], fingerprints: Sequence[str]) -> None:
    """Raises ConfigError if a shard is not the one that was written, though it has its size.

    Args:
        split: from `split_of`.
        paths: of its shards.
        fingerprints: of what is there now.
    """
    for path, shard, now in zip(paths, split['shards'], fingerprints, strict=True):
        # Descriptions were written without it once.
        if shard.get('fingerprint', now) != now:
            raise ConfigError(
                f'{path} is not the shard that {NAME} describes, but another of the same size. '
                + _AGAIN
            )


def wrong_with(shard: dict[str, Any], directory: str) -> str:
    """Returns what is wrong with the size of a shard, in a sentence; '' if nothing is.

    Raises:
        OSError: the file cannot be reached.
    """
    path = join(directory, shard['file'])
    try:
        size = files.stat(path).size
    except FileNotFoundError:
        return f'{path}, a shard of {NAME}, is missing.'
    if size != shard['bytes']:
        return f'{path} has {size:,} bytes instead of {shard["bytes"]:,}.'
    return ''


def sha256(path: str | os.PathLike) -> str:
    """Returns the sha256 of a file, a path or a URL, in hex digits.

    Raises:
        OSError: it cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    if files.is_url(os.fspath(path)):
        while block := files.read(path, done, _BLOCK):
            digest.update(block)
            done += len(block)
        return digest.hexdigest()
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Returns when a file, or what names are in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def join(directory: str, name: str) -> str:
    """Returns the path of a file in a directory, either a path or a URL."""
    return f'{directory.rstrip("/")}/{name}'
