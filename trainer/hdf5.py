"""Reading the HDF5 files of strangers: what lies outside the file is never looked at.

Links and data sets of HDF5 may name other files of the host, whose contents would then end up in a
model. Only what a file itself holds is read.
"""

import contextlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator

import h5py
import numpy as np

from trainer.errors import ConfigError

_WEIGHTS = 'model.weights.h5'  # Among the members of a .keras file.


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Opens an HDF5 file, or that within a .keras file, for reading.

    Raises:
        ConfigError: it is neither, or damaged, or what is read of it within the block is.
    """
    try:
        source = path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                source = io.BytesIO(archive.read(_WEIGHTS))
        with h5py.File(source, 'r') as file:
            yield file
    except ConfigError:
        raise
    except (
        *(OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ConfigError(
            f'{str(path)!r} is no file of weights, or damaged: {error}. Copy it again, or give '
            'another .weights.h5, .keras or .h5 file that Keras has written.'
        ) from error


def member(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset:
    """Returns what a group has under a path of names, through hard links alone.

    Raises:
        KeyError: there is nothing.
        ValueError: the path leads through another kind of link.
    """
    for name in path.split('/'):
        # Of h5py's own look-ups even those that ask for the kind of a link follow it first.
        if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f'{path!r} refers to another place or file, which is not followed')
        group = group[name]
    return group


def array(group: h5py.Group, path: str) -> np.ndarray:
    """Returns the array that a group has under a path of names.

    Raises:
        KeyError: there is nothing.
        ValueError: it is no array, or not held by this file.
    """
    found = member(group, path)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f'{path!r} is no array')
    if found.external or found.is_virtual:
        raise ValueError(f'{path!r} refers to other files, which is not allowed')
    return np.asarray(found[()])
