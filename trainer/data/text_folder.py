"""Texts in files, one folder for each class, and texts as tokens of bytes for a classifier."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from trainer.data import files
from trainer.data.source import Features, Source
from trainer.errors import ConfigError, nearest

# The token of no byte; byte b is b + 1.
PADDING = 0


class TextFolder(Source):
    """A source over the files of a folder, read when they are asked for; see `text_folder`.

    Attributes:
        class_names: of the labels 0, 1, 2...
    """

    def __init__(
        self,
        directory: str,
        class_names: Sequence[str],
        listing: Sequence[tuple[str, int]],
        max_bytes: int | None,
    ):
        self.class_names = tuple(class_names)
        self._directory, self._max_bytes = directory, max_bytes
        numbers = {name: number for number, name in enumerate(class_names)}
        rows = sorted((numbers[name.partition('/')[0]], name, size) for name, size in listing)
        self._names = [name for _, name, _ in rows]
        self._labels = np.array([label for label, _, _ in rows], np.int64)
        self._sizes = [size for _, _, size in rows]

    @property
    def num_examples(self) -> int:
        return len(self._names)

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        return {'text': tf.TensorSpec([], tf.string), 'label': tf.TensorSpec([], tf.int64)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the classes, the names, sizes and edges of all files, and the settings."""
        digests = [files.fingerprint(self.where(i)) for i in range(self.num_examples)]
        known = [self.class_names, self._max_bytes, self._names, digests]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def fetch(self, indices: tf.Tensor) -> Features:
        def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sizes = [self._sizes[i] for i in indices]
            if self._max_bytes is not None:
                sizes = [min(size, self._max_bytes) for size in sizes]
            paths = [self.where(i) for i in indices]
            ranges = [files.Range(p, 0, s) for p, s in zip(paths, sizes, strict=True)]
            texts = np.empty(len(indices), object)
            texts[:] = files.read_ranges(ranges)
            return texts, self._labels[indices]

        # Called stateful, one batch at a time would be read.
        texts, labels = tf.numpy_function(read, [indices], [tf.string, tf.int64], stateful=False)
        shape = [indices.shape[0]]
        return {'text': tf.ensure_shape(texts, shape), 'label': tf.ensure_shape(labels, shape)}

    def where(self, index: int) -> str:
        """Returns the path of a record's file."""
        return f'{self._directory}/{self._names[index]}'

    def bounds(self, feature: str) -> tuple[float, float] | None:
        if feature != 'label':
            return None
        return float(self._labels.min()), float(self._labels.max())


def text_folder(
    directory: str | os.PathLike,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    max_bytes: int | None = None,
) -> TextFolder:
    """Reads texts from a folder for each class; whatever a file is called, it is a text.

    The label of `directory/spam/2024/1.txt` is the number of `spam` among the classes. Folders and
    files whose names begin with a dot are left out.

    Args:
        directory: the folder, or the URL of one in a store; with `split`, that of the splits.
        split: the folder in `directory` that is read, such as 'train' or 'test'. All splits have
            the classes of 'train'.
        classes: the names of the classes in the order of their labels. None takes the folders in
            order of their names.
        max_bytes: how much is read of a file, from its beginning; None is all.

    Returns:
        A source with `text` (string, the bytes of the file) and `label` (int64), in the order of
        labels and then of names.

    Raises:
        ConfigError: there is no such folder, it holds no texts, or other classes than are given.
    """
    directory = os.path.expanduser(os.fspath(directory)).rstrip('/')
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f'text_folder.max_bytes is {max_bytes}; it must be 1 or more, or None.')
    if split is not None:
        if classes is None and split != 'train':
            classes = _classes(_list(f'{directory}/train'))
        directory = f'{directory}/{split}'
    listing = _list(directory)
    found = _classes(listing)
    names = found if classes is None else list(classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ConfigError(
            f'{directory!r} holds the folder {unknown[0]!r}, which is none of the classes '
            f'{", ".join(map(repr, names))}.{nearest(unknown[0], names)}'
        )
    folder = TextFolder(directory, names, listing, max_bytes)
    logging.info('%s: %d texts of %d classes', directory, folder.num_examples, len(names))
    return folder


def _list(directory: str) -> list[tuple[str, int]]:
    """Returns the files in folders of classes, with their sizes in bytes."""
    try:
        found = files.walk(directory)
    except OSError as error:
        parent, there = os.path.dirname(directory), []
        if os.path.isdir(parent):
            there = [f'{parent}/{name}' for name in os.listdir(parent)]
        raise ConfigError(
            f'The folder of texts {directory!r} cannot be read: {error.strerror or error}.'
            f'{nearest(directory, there)}'
        ) from None
    within = [(name, size) for name, size in found if '/' in name]
    if not within:
        raise ConfigError(
            f'{directory!r} holds no folders with texts. Put them into a folder for each class, as '
            f'in {directory}/spam/1.txt.'
        )
    return within


def _classes(listing: Sequence[tuple[str, int]]) -> list[str]:
    return sorted({name.partition('/')[0] for name, _ in listing})


def byte_tokens(features: Features, feature: str = 'text', length: int = 256) -> Features:
    """Adds the bytes of texts as `tokens`, int32 [batch, length]; for `Data.preprocess`.

    Byte b is the token b + 1. What is longer is cut off, what is shorter filled up with `PADDING`.

    Args:
        features: a batch.
        feature: the texts, string [batch].
        length: how many bytes of each text are kept.

    Raises:
        ConfigError: there is no such feature, or it is no text.
    """
    if feature not in features or features[feature].dtype != tf.string:
        texts = [name for name, tensor in features.items() if tensor.dtype == tf.string]
        raise ConfigError(
            f'byte_tokens.feature names {feature!r}, but the features that are texts are {texts}.'
            f'{nearest(feature, texts)}'
        )
    # Each text is cut or filled up with zeros, which are bytes too: its length tells them apart.
    values = tf.io.decode_raw(features[feature], tf.uint8, fixed_length=length)
    is_byte = tf.range(length) < tf.strings.length(features[feature])[:, None]
    return {**features, 'tokens': tf.where(is_byte, tf.cast(values, tf.int32) + 1, PADDING)}
