"""Images in files, one folder for each class."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import files, image_decode
from trainer.data.image_decode import Shape
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest, shown

ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif')

# So many files have their contents looked at for the fingerprint.
_SAMPLED = 256
_THREADS = 16
# Of a JPEG file so large no more than the beginning is read here, where its header is, and all by
# the operation that decodes it: Python and NumPy would each make a copy.
_LARGE, _HEAD = 2**20, 2**16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Goes up when the same files are decoded to other bits.
_VERSION = 2


class ImageFolder(Source):
    """A source over the images of a folder, decoded when they are read; see `image_folder`.

    Attributes:
        class_names: of the labels 0, 1, 2...
    """

    def __init__(
        self,
        directory: str,
        class_names: Sequence[str],
        listing: Sequence[tuple[str, int]],
        shape: Shape,
        fit: str,
    ):
        self.class_names = tuple(class_names)
        self._directory, self._shape, self._fit = directory, shape, fit
        numbers = {name: number for number, name in enumerate(class_names)}
        listing = sorted(listing)
        labels = np.array([numbers[name.partition('/')[0]] for name, _ in listing], np.int64)
        order = np.argsort(labels, kind='stable')
        # Of millions of files: their names one after another, and where each ends.
        names = [os.fsencode(listing[i][0]) for i in order.tolist()]
        self._names = b''.join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        self._labels = labels[order]
        self._sizes = np.array([size for _, size in listing], np.int64)[order]
        if (self._sizes >= _LARGE).any():
            _keep_freed_memory()

    @property
    def num_examples(self) -> int:
        return len(self._labels)

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return {
            'image': tf.TensorSpec(self._shape, tf.uint8),
            'label': tf.TensorSpec([], tf.int64),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, names and sizes of all files, contents of some, and the settings.

        The contents are those of 256 files, spread evenly, or of all if there are no more:
        beginning and end of each. A file changed without a change of its size may go unnoticed.
        """
        settings = [_VERSION, self.class_names, self._shape, self._fit]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for part in (self._names, self._ends, self._labels, self._sizes):
            digest.update(part)
        chosen = np.linspace(0, self.num_examples - 1, min(_SAMPLED, self.num_examples))
        with ThreadPoolExecutor(_THREADS) as threads:
            for sample in threads.map(files.fingerprint, map(self.where, chosen.astype(int))):
                digest.update(sample.encode())
        return digest.hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        # Stateless, that batches are made side by side where operations are deterministic, too.
        contents, plans, labels = tf.numpy_function(
            self._read, [indices], [tf.string, tf.int32, tf.int64], stateful=False
        )
        contents.set_shape(indices.shape)
        plans.set_shape([*indices.shape, image_decode.PLAN_SIZE])
        return {'image': image_decode.decode(contents, plans, self._shape), 'label': labels}

    def where(self, index: int) -> str:
        """Returns the path of a record's file."""
        name = os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])
        return f'{self._directory}/{name}'

    def bounds(self, feature: str) -> tuple[float, float] | None:
        if feature != 'label':
            return None
        return float(self._labels.min()), float(self._labels.max())

    def stored(self, indices: np.ndarray) -> dict[str, list[bytes]]:
        sizes = self._sizes[indices].tolist()
        ranges = [files.Range(self.where(i), 0, s) for i, s in zip(indices, sizes, strict=True)]
        return {'image': files.read_ranges(ranges)}

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        large = (self._sizes[indices] >= _LARGE) & (not files.is_url(self._directory))
        sizes = np.where(large, _HEAD, self._sizes[indices]).tolist()
        paths = [self.where(i) for i in indices]
        heads = files.read_ranges([files.Range(p, 0, s) for p, s in zip(paths, sizes, strict=True)])
        for place in np.flatnonzero(large):
            if not image_decode.has_whole_header(heads[place]):
                large[place] = False
                heads[place] = self.stored(indices[place : place + 1])['image'][0]
        contents, plans = image_decode.plan(heads, self._shape, self._fit)
        strings = np.empty(len(contents), object)
        strings[:] = contents
        for place in np.flatnonzero(large):
            strings[place] = os.fsencode(paths[place])
        plans[:, -1] = large
        return strings, plans, self._labels[indices]


def image_folder(
    directory: str | os.PathLike,
    shape: Shape = (224, 224, 3),
    split: str | None = None,
    classes: Sequence[str] | None = None,
    fit: str = 'crop',
) -> ImageFolder:
    """Reads JPEG, PNG, GIF (its first frame) and BMP images from a folder for each class.

    The label of `directory/cat/indoors/1.jpg` is the number of `cat` among the classes. Folders and
    files whose names begin with a dot are left out, and so are files with other endings than
    `ENDINGS`, in small or capital letters. A photograph is turned upright as its EXIF data say;
    transparency is left out; of 16 bits a channel the upper 8 are taken.

    Args:
        directory: The folder, or the URL of one in a store; with `split`, that of the splits.
        shape: Rows, columns and channels, 1 or 3, of the images to be made.
        split: The folder in `directory` that is read, such as 'train' or 'test'. All splits have
            the classes of 'train'.
        classes: The names of the classes in the order of their labels, for folders that must
            agree. None takes the folders in order of their names.
        fit: How an image of another aspect ratio is brought to `shape`: 'crop' takes the largest
            part from its middle, 'pad' fills up with black, 'stretch' distorts it.

    Returns:
        A source with `image` (uint8 [rows, columns, channels]) and `label` (int64), in the order
        of labels and then of names. Every start lists the folder anew.

    Raises:
        ConfigError: There is no such folder, it is on a server of the web, it holds no images, a
            class has none, or the classes are not as given.
    """
    directory = os.fspath(directory)
    if directory.startswith(('http://', 'https://')):
        raise ConfigError(
            f'image_folder.directory is {shown(directory)!r}, but servers of the web do not list '
            'what they have. Copy the images to a local folder or to a store (s3://, gs://), or '
            'read shards that `phalanx prepare` has made of them.'
        )
    if not files.is_url(directory):
        directory = os.path.expanduser(directory)
    directory = directory.rstrip('/')
    _check_settings(shape, classes, fit)
    if split is not None:
        _check_split(directory, split)
        if classes is None and split != 'train':
            _check_split(directory, 'train')
            classes = _classes(f'{directory}/train')
        directory = f'{directory}/{split}'
    found, listing = _list(directory)
    given = classes is not None
    names = tuple(classes if given else found)
    _check_classes(directory, names, found, listing, given=given)
    folder = ImageFolder(directory, names, listing, shape, fit)
    logging.info(
        '%s: %d images of %d classes: %s',
        directory,
        folder.num_examples,
        len(names),
        ', '.join(f'{name} ({number})' for number, name in enumerate(names)),
    )
    return folder


def _keep_freed_memory() -> None:
    """Has the C library keep some of what is freed for the next large file.

    By default it gives blocks of this size back to the system, and to get them again, page by page,
    takes a tenth of the time of decoding (mallopt(3); not in every C library).
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**26)


def _check_settings(shape: Shape, classes: Sequence[str] | None, fit: str) -> None:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    if len(sizes) != 3 or not whole or sizes[2] not in (1, 3):
        raise ConfigError(
            f'image_folder.shape is {shape!r}; it must be rows, columns and channels (1 or 3), '
            'such as (224, 224, 3).'
        )
    if classes is not None and not (
        isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    ):
        raise ConfigError(
            f"image_folder.classes is {classes!r}; it must be a list such as ['cat', 'dog']."
        )
    if fit not in image_decode.FITS:
        raise ConfigError(
            f'image_folder.fit is {fit!r}; it must be one of {", ".join(image_decode.FITS)}.'
            f'{nearest(str(fit), image_decode.FITS)}'
        )


def _classes(directory: str) -> list[str]:
    """Returns the folders of classes, without a look into them where that will do."""
    if files.is_url(directory):
        return _list(directory)[0]
    with _told(directory):
        return sorted(_folders(directory))


def _check_split(directory: str, split: str) -> None:
    beside = _names(PurePath(directory))
    if files.is_url(directory) or not beside or split in beside:
        return
    raise ConfigError(
        f'{directory!r} has no folder {split!r}; it holds {_few(sorted(beside))}.'
        f'{nearest(split, beside)} To divide one folder of classes instead, set '
        'image_folder.split = None and take a part of it with @subset(): see '
        'docs/data/images.md.'
    )


def _list(directory: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Returns the folders of classes, those without images too, and the images with their sizes."""
    with _told(directory):
        found = files.walk(directory)
        folders = [] if files.is_url(directory) else _folders(directory)
    listing = [each for each in found if each[0].lower().endswith(ENDINGS)]
    within = [each for each in listing if '/' in each[0]]
    others = []
    if len(listing) < len(found):
        others = [name for name, _ in found if not name.lower().endswith(ENDINGS)]
    if not listing:
        raise ConfigError(
            f'{directory!r} holds no images. Those read are called *{", *".join(ENDINGS)}'
            + (f'; it holds {len(others)} files such as {min(others)!r}.' if others else '.')
        )
    if not within:
        raise ConfigError(
            f'{directory!r} holds {len(listing)} images, but no folders of them. Put them into a '
            f'folder for each class, as in {directory}/cat/{listing[0][0]}.'
        )
    beside = [name for name, _ in listing if '/' not in name] + others
    if beside:
        logging.warning(
            '%s: %d files such as %r are left out: no images, or in no folder of a class',
            directory,
            len(beside),
            min(beside),
        )
    return sorted({*folders, *(name.partition('/')[0] for name, _ in within)}), within


@contextlib.contextmanager
def _told(directory: str) -> Iterator[None]:
    """Turns the errors of a directory that is none into sentences."""
    try:
        yield
    except NotADirectoryError:
        raise ConfigError(f'{directory!r} is a file, and no folder of images.') from None
    except FileNotFoundError as error:
        path = PurePath(error.filename or directory)
        beside = [f'{path.parent}/{n}' for n in _names(path.parent)]
        raise ConfigError(
            f'There is no image folder {str(path)!r}.{nearest(str(path), beside)}'
        ) from None


def _folders(directory: str) -> list[str]:
    with os.scandir(directory) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith('.')]


def _names(directory: PurePath) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _check_classes(
    directory: str,
    classes: Sequence[str],
    found: Sequence[str],
    listing: Sequence[tuple[str, int]],
    *,
    given: bool,
) -> None:
    spelt: dict[str, str] = {}
    for name in classes:
        if name.casefold() in spelt:
            raise ConfigError(
                f'{directory!r}: the classes {spelt[name.casefold()]!r} and {name!r} are one class '
                'given twice. Put their images into one folder.'
            )
        spelt[name.casefold()] = name
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ConfigError(
            f'{directory!r} holds the folder {unknown[0]!r}, which is none of the {len(classes)} '
            f'classes {_few(classes)}.{nearest(unknown[0], classes)}'
        )
    filled = {name.partition('/')[0] for name, _ in listing}
    empty = [name for name in classes if name not in filled]
    if empty and given:
        logging.warning('%s has no images of %d classes: %s', directory, len(empty), _few(empty))
    elif empty:
        raise ConfigError(
            f'{directory!r} has no images of the class {empty[0]!r}. Add some, delete the folder, '
            'or name the classes that there shall be: image_folder.classes = '
            f'{[name for name in classes if name not in empty][:3]}.'
        )
    if len(classes) == 1 and not given:
        raise ConfigError(
            f'{directory!r} holds one class only, {classes[0]!r}: there is nothing to tell apart. '
            f'If that is meant, say image_folder.classes = [{classes[0]!r}].'
        )


def _few(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:10])) + (', ...' if len(names) > 10 else '')
