"""One checkpoint on disk, written so that it can prove later that every bit of it is right.

A checkpoint is a directory with the files of a name-based TensorFlow checkpoint, readable by
`tf.train.load_checkpoint`, and `manifest.json`, which says what they must hold. The content is
not trusted: it is read as JSON and numeric tensors, never unpickled.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ConfigError

FORMAT = 1
MANIFEST = 'manifest.json'
_PREFIX = 'state'
_SELF = 'manifest_sha256'
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


class CheckpointDamaged(RuntimeError):
    """A checkpoint does not hold what its manifest says."""


def state_sha256(tensors: Mapping[str, Any]) -> str:
    """Returns the sha256, in hex, over every variable's path, dtype, shape and bytes.

    Args:
        tensors: path -> numeric tensor or array of any shape; their order does not matter.
    """
    digest = hashlib.sha256()
    for path in sorted(tensors):
        array = np.asarray(tensors[path])
        header = [path, array.dtype.name, list(array.shape)]
        digest.update(json.dumps(header).encode() + b'\n')
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def write(directory: Path, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes a checkpoint complete or not at all, durably, with one rename at the end.

    Args:
        directory: where it shall be; must not exist.
        tensors: path -> host tensor or array.
        manifest: JSON-compatible, with at least `step` and `state_sha256` of the tensors.

    Raises:
        OSError, tf.errors.OpError: it could not be written; nothing of it is left.
    """
    temporary = directory.with_name(f'.tmp-{directory.name}-{os.getpid()}')
    # In a container every attempt may have the same process id.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_tensors(temporary, tensors)
        files = {}
        for path in sorted(temporary.iterdir()):
            _fsync(path)
            files[path.name] = {'size': path.stat().st_size, 'sha256': _file_sha256(path)}
        complete = {**manifest, 'format': FORMAT, 'files': files}
        complete[_SELF] = _manifest_sha256(complete)
        (temporary / MANIFEST).write_text(json.dumps(complete, indent=2) + '\n', encoding='utf-8')
        _fsync(temporary / MANIFEST)
        _fsync(temporary)
        os.rename(temporary, directory)
        _fsync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest after checking it and the sizes of the files, but not their content.

    Raises:
        CheckpointDamaged: it is not whole.
        ConfigError: a newer version wrote it, or it may not be read.
    """
    with _unreadable_is_damage(directory):
        _size(directory / MANIFEST)
        text = (directory / MANIFEST).read_bytes()
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f'{MANIFEST} is no JSON ({error})') from error
    if not isinstance(manifest, dict) or manifest.get(_SELF) != _manifest_sha256(manifest):
        raise CheckpointDamaged(f'{MANIFEST} does not agree with its own checksum')
    # Every format has to keep the checksum above, so that a flipped bit is no newer version.
    found = manifest.get('format')
    if isinstance(found, int) and found > FORMAT:
        raise ConfigError(
            f'{str(directory)!r} was written in format {found} by a newer Phalanx; this one reads '
            f'{FORMAT}. Install the newer version, or use another model_dir.'
        )
    files = manifest.get('files')
    if found != FORMAT or not isinstance(files, dict) or not files:
        raise CheckpointDamaged(f'{MANIFEST} is incomplete')
    if manifest.get('step') != int(directory.name.removeprefix('step-')):
        raise CheckpointDamaged(f'{MANIFEST} is of step {manifest.get("step")}')
    for name, entry in files.items():
        if name in ('', '.', '..') or os.path.basename(name) != name:
            raise CheckpointDamaged(f'{MANIFEST} names a file outside the checkpoint: {name!r}')
        if not isinstance(entry, dict) or not {'size', 'sha256'} <= entry.keys():
            raise CheckpointDamaged(f'{MANIFEST} is incomplete')
        with _unreadable_is_damage(directory):
            size = _size(directory / name)
        if size != entry['size']:
            raise CheckpointDamaged(f'{name} has {size} bytes in place of {entry["size"]}')
    return manifest


def load(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the manifest after checking every bit of them.

    Raises:
        CheckpointDamaged: something does not agree with the manifest.
        ConfigError: a newer version wrote it, or it may not be read.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest['files'].items():
        with _unreadable_is_damage(directory):
            if _file_sha256(directory / name) != entry['sha256']:
                raise CheckpointDamaged(f'the sha256 of {name} is not that in the manifest')
    try:
        tensors = dict(_read_tensors(directory))
    except tf.errors.ResourceExhaustedError:
        raise
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise CheckpointDamaged(f'TensorFlow cannot read it ({error})') from error
    if state_sha256(tensors) != manifest.get('state_sha256'):
        raise CheckpointDamaged('the state_sha256 of the tensors is not that in the manifest')
    return tensors, manifest


def _write_tensors(directory: Path, tensors: Mapping[str, Any]) -> None:
    names = sorted(tensors)
    with tf.device('CPU:0'):
        tf.raw_ops.SaveV2(
            prefix=str(directory / _PREFIX),
            tensor_names=names,
            shape_and_slices=[''] * len(names),
            tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
        )
    # Older checkpoints are deleted in trust of this one, so read it back: TensorFlow compares
    # each tensor with the CRC32C that it took of the memory.
    for _ in _read_tensors(directory):
        pass


def _read_tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    reader = tf.train.load_checkpoint(str(directory / _PREFIX))
    for name in sorted(reader.get_variable_to_shape_map()):
        yield name, np.asarray(reader.get_tensor(name))


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != _SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointDamaged(f'{path.name} is no regular file')
    return status.st_size


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _unreadable_is_damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            f'The checkpoint {str(directory)!r} may not be read: {error.strerror} '
            f'({error.filename}). Give this user the right to read it.'
        ) from error
    except OSError as error:
        # Anything else (out of memory, a stale handle) says nothing about the checkpoint.
        if error.errno not in _DAMAGE:
            raise
        name = Path(error.filename or directory).name
        raise CheckpointDamaged(f'{name}: {error.strerror}') from error
