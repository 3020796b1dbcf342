"""Images in the IDX format of MNIST, and of the sets that took over its file names.

The format is described at http://yann.lecun.com/exdb/mnist/: two zero bytes, a byte for the type,
a byte for the number of dimensions, each dimension as a big-endian uint32, then the values.
"""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from trainer.data.arrays import Arrays
from trainer.errors import ConfigError, nearest

_UNSIGNED_BYTE = 0x08
# EMNIST calls its test files 'test', all others call theirs 't10k'.
_STEMS = {'train': ('train',), 'test': ('t10k', 'test')}


def idx(directory: str | os.PathLike, split: str = 'train', name: str = '') -> Arrays:
    """Loads MNIST, Fashion-MNIST, KMNIST, EMNIST or another set in the same format.

    Args:
        directory: Holds the images and labels under their usual names, such as
            'train-images-idx3-ubyte' or 'train-images.idx3-ubyte', plain or ending in '.gz'.
        split: 'train' or 'test'.
        name: What the file names begin with, such as 'emnist-letters-'. The images of EMNIST are
            stored with rows and columns exchanged; those of a name that begins with 'emnist' are
            turned upright.

    Returns:
        A source with `image` (uint8 [rows, columns, 1], 28 x 28 in all of the above) and `label`
        (int64).

    Raises:
        ConfigError: A file is missing or damaged, or images and labels differ in number.
    """
    if split not in _STEMS:
        raise ConfigError(
            f"The split is 'train' or 'test', not {split!r}." + nearest(str(split), _STEMS)
        )
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ConfigError(f'The data directory {str(directory)!r} does not exist.')
    image_file = _find(directory, name, split, 'images', 3)
    label_file = _find(directory, name, split, 'labels', 1)
    images, labels = _parse(image_file, 3), _parse(label_file, 1)
    if len(images) != len(labels):
        raise ConfigError(
            f'{image_file} holds {len(images)} images but {label_file} {len(labels)} labels: the '
            'two files are not of the same set.'
        )
    if name.startswith('emnist'):
        images = images.transpose(0, 2, 1)
    return Arrays({'image': images[..., np.newaxis], 'label': labels.astype(np.int64)})


def _find(directory: Path, prefix: str, split: str, kind: str, rank: int) -> Path:
    names = [
        f'{prefix}{stem}-{kind}{separator}idx{rank}-ubyte{suffix}'
        for stem in _STEMS[split]
        for separator in '-.'
        for suffix in ('', '.gz')
    ]
    for candidate in names:
        if (directory / candidate).is_file():
            return directory / candidate
    present = [path.name for path in directory.iterdir()]
    raise ConfigError(
        f'{str(directory)!r} has no file {names[0]!r} (nor with a dot before idx{rank}, nor ending '
        f'in .gz).{nearest(names[0], present)} A prefix such as "emnist-letters-" goes into `name`.'
    )


def _parse(path: Path, rank: int) -> np.ndarray:
    """Returns the uint8 array [d1, ..., d_rank] of a file, which must be exactly one."""
    try:
        content = path.read_bytes()
        if path.suffix == '.gz':
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f'{path} cannot be read ({error}). Fetch it again.') from error
    header = 4 + 4 * rank
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTE, rank]) or len(content) < header:
        raise ConfigError(
            f'{path} is no IDX file of unsigned bytes in {rank} dimension(s): it begins with '
            f'{content[:4].hex(" ") or "nothing"} instead of 00 00 08 {rank:02x}. Fetch it again; '
            'if it is compressed, its name must end in .gz.'
        )
    shape = struct.unpack(f'>{rank}I', content[4:header])
    if len(content) - header != math.prod(shape):
        raise ConfigError(
            f'{path} announces {" x ".join(map(str, shape))} = {math.prod(shape)} values but holds '
            f'{len(content) - header}. Fetch it again.'
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
