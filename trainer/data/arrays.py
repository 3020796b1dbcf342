"""Examples held in memory as numpy arrays, and their loading from .npz files."""

import functools
import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest


class Arrays(Source):
    """A source over arrays whose first dimension counts the examples.

    Args:
        arrays: For each feature a boolean, integer or floating-point array [N, ...]. They are
            not copied, and must not be changed afterwards.

    Raises:
        ConfigError: There are no arrays or examples, the lengths differ, or a dtype is one that
            TensorFlow cannot hold.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        if not arrays:
            raise ConfigError('The data has no features: pass at least one array.')
        self._arrays = {name: _native(name, array) for name, array in sorted(arrays.items())}
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(
                f'The arrays differ in their number of examples: {lengths}. The first dimension '
                'of every array counts the examples.'
            )
        self._num_examples = next(iter(lengths.values()))
        if not self._num_examples:
            raise ConfigError(f'The data holds no examples: {", ".join(lengths)} are empty.')

    @property
    def num_examples(self) -> int:
        return self._num_examples

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return {
            name: tf.TensorSpec(array.shape[1:], array.dtype)
            for name, array in self._arrays.items()
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the name, dtype, shape and bytes of every array, in order of names."""
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            digest.update(repr((name, array.dtype.name, array.shape)).encode())
            digest.update(array.data)
        return digest.hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        return {name: tf.gather(tensor, indices) for name, tensor in self._tensors.items()}

    def bounds(self, feature: str) -> tuple[float, float] | None:
        array = self._arrays[feature]
        if array.ndim > 1 or array.dtype.kind not in 'iu':
            return None
        return float(array.min()), float(array.max())

    @functools.cached_property
    def _tensors(self) -> Features:
        # Eager tensors made outside the graph under trace are captured as its inputs; made inside
        # they would be constants of it, copied at each trace and limited to 2 GB.
        with tf.init_scope(), tf.device('CPU:0'):
            return {name: tf.constant(array) for name, array in self._arrays.items()}


def npz(path: str | os.PathLike, split: str | None = None) -> Arrays:
    """Loads the arrays of a file written by `numpy.savez` or `numpy.savez_compressed`.

    Args:
        path: The file.
        split: Takes only the arrays named `<feature>_<split>`, as `x_train` and `y_train` in the
            data sets of Keras; the features are then called `x` and `y`. None takes all arrays.

    Returns:
        The source with one feature per array.

    Raises:
        ConfigError: The file is missing or damaged, has no such split, or its arrays do not fit
            together.
    """
    path = os.path.expanduser(path)
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError('it holds a single array')
        with file:
            names = _names_of_split(path, file.files, split)
            arrays = {feature: file[name] for feature, name in names.items()}
    except FileNotFoundError:
        mend = nearest(path, map(str, Path(path).parent.glob('*.npz')))
        raise ConfigError(f'The data file {path!r} does not exist.{mend}') from None
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'The data file {path!r} cannot be read as .npz ({error}). Write it with '
            'numpy.savez_compressed(path, image=..., label=...), without object arrays.'
        ) from error
    try:
        return Arrays(arrays)
    except ConfigError as error:
        raise ConfigError(f'The data file {path!r} is unusable. {error.message}') from error


def _names_of_split(path: str, names: list[str], split: str | None) -> dict[str, str]:
    if split is None:
        return {name: name for name in names}
    chosen = {name.removesuffix(f'_{split}'): name for name in names if name.endswith(f'_{split}')}
    if not chosen:
        splits = sorted({name.rpartition('_')[2] for name in names if '_' in name})
        raise ConfigError(
            f'The data file {path!r} has no split {split!r}: its arrays are {sorted(names)}, none '
            f'named <feature>_{split}.{nearest(split, splits)}'
        )
    return chosen


def _native(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim == 0:
        raise ConfigError(
            f'The array {name!r} is a single value; its first dimension must count the examples.'
        )
    try:
        supported = array.dtype.kind in 'biuf' and tf.as_dtype(array.dtype.newbyteorder('='))
    except TypeError:
        supported = None
    if not supported:
        raise ConfigError(
            f'The array {name!r} has dtype {array.dtype}, which cannot be trained on: convert it '
            'to a boolean, integer or floating-point array of at most 64 bits.'
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder('='))
