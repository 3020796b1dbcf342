"""Text for language models: windows of a fixed length over files that are read as one stream."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow as tf

from trainer.data import files as data_files
from trainer.data import kept
from trainer.data.source import Features, Source
from trainer.errors import BadRecord, ConfigError

# Comes before the bytes of each file.
SEPARATOR = 256


class Stream(Protocol):
    """Documents one after another as tokens, each with a separator before it.

    Attributes:
        files: the documents.
        size: the number of tokens.
        vocabulary_size: above each token.
        fingerprint: sha256 over what makes the tokens.
    """

    files: tuple[str, ...]
    size: int
    vocabulary_size: int
    fingerprint: str

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns the tokens from each start on, int32 [B, length]."""

    def where(self, token: int) -> str:
        """Returns the file and the byte where a token lies."""


class Text(Source):
    """A source of windows of a stream.

    Window i has the `length` tokens from token i * length on as `tokens`, and those that follow
    each of them as `targets`, both int32 [length]. So every token but the first is to be predicted
    once, but for less than `length` at the end, which make no window.

    Attributes:
        vocabulary_size: how many tokens there are.
    """

    def __init__(self, stream: Stream, length: int):
        self._stream, self._length = stream, length
        if length < 1:
            raise ConfigError(f'text.length is {length}; it must be 1 or more.')
        if stream.size <= length:
            raise ConfigError(
                f'{len(stream.files)} files from {stream.files[0]} on have {stream.size} tokens, '
                f'too few for a window of {length} and its targets. Set text.length to '
                f'{max(1, stream.size - 1)} or less.'
            )
        self.vocabulary_size = stream.vocabulary_size

    @property
    def num_examples(self) -> int:
        return (self._stream.size - 1) // self._length

    @property
    def element_spec(self) -> dict[str, tf.TensorSpec]:
        spec = tf.TensorSpec([self._length], tf.int32)
        return {'tokens': spec, 'targets': spec}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the stream and the length of the windows."""
        return hashlib.sha256(f'{self._stream.fingerprint} {self._length}'.encode()).hexdigest()

    @property
    def files(self) -> tuple[str, ...]:
        return self._stream.files

    def fetch(self, indices: tf.Tensor) -> Features:
        def read(indices: np.ndarray) -> np.ndarray:
            return self._stream.read(indices * self._length, self._length + 1)

        # Called stateful, one batch at a time would be read.
        tokens = tf.numpy_function(read, [indices], tf.int32, stateful=False)
        tokens = tf.ensure_shape(tokens, [indices.shape[0], self._length + 1])
        return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}

    def where(self, index: int) -> str:
        return self._stream.where(int(index) * self._length)

    def bounds(self, feature: str) -> tuple[float, float] | None:
        """Returns those of the vocabulary."""
        return 0, self.vocabulary_size - 1


class Bytes:
    """A stream of bytes, read where they lie; see `Stream`."""

    vocabulary_size = SEPARATOR + 1

    def __init__(self, paths: Sequence[str]):
        self.files = tuple(paths)
        directory = kept.keep('text-bytes-1', paths, self._index)
        known = json.loads((directory / 'index.json').read_text(encoding='utf-8'))
        self.fingerprint = known['fingerprint']
        # Where each file's separator lies in the stream, and where the last file ends.
        self._starts = np.cumsum([0] + [size + 1 for size in known['sizes']])
        self.size = int(self._starts[-1])

    def _index(self, directory: Path) -> None:
        sizes = [data_files.stat(path).size for path in self.files]
        # Their edges, which is all of most files, and would be too much of none.
        digests = [data_files.fingerprint(path) for path in self.files]
        known = {
            'sizes': sizes,
            'fingerprint': hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        }
        (directory / 'index.json').write_text(json.dumps(known), encoding='utf-8')

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        tokens = np.full([len(starts), length], SEPARATOR, np.int32)
        ranges, places = [], []
        firsts = np.searchsorted(self._starts, starts, side='right') - 1
        for row, (start, file) in enumerate(zip(starts.tolist(), firsts.tolist(), strict=True)):
            at = start
            while at < start + length:
                # The separator is there already.
                begin = max(at, int(self._starts[file]) + 1)
                end = min(start + length, int(self._starts[file + 1]))
                if begin < end:
                    offset = begin - int(self._starts[file]) - 1
                    ranges.append(data_files.Range(self.files[file], offset, end - begin))
                    places.append((row, begin - start, end - start))
                at, file = int(self._starts[file + 1]), file + 1
        contents = data_files.read_ranges(ranges)
        for (row, begin, end), part, content in zip(places, ranges, contents, strict=True):
            if len(content) < end - begin:
                raise BadRecord(f'{part.path} has become shorter since the run began')
            tokens[row, begin:end] = np.frombuffer(content, np.uint8)
        return tokens

    def where(self, token: int) -> str:
        file = int(np.searchsorted(self._starts, token, side='right')) - 1
        return f'{self.files[file]}, byte {max(0, token - int(self._starts[file]) - 1)}'


def text(
    files: str | Sequence[str],
    length: int,
    *,
    tokenizer: str | None = None,
    separator: str = '<|endoftext|>',
) -> Text:
    """Opens files as one text, each a document, in windows of a fixed length.

    Without a tokenizer the tokens are the bytes, 0 to 255, and 256 before each file; nothing is
    converted, and any file will do. With one the files are UTF-8, and their tokens are written
    once and kept as `trainer.data.kept` says.

    Args:
        files: paths, URLs or glob patterns; '**' is any folder.
        length: tokens in a window.
        tokenizer: the file tokenizer.json of one of Hugging Face's; None takes bytes.
        separator: the tokenizer's token that comes before each document.

    Raises:
        ConfigError: files are missing or, with a tokenizer, not UTF-8; all of them together are
            shorter than a window; the tokenizer cannot be read, or lacks the separator.
    """
    paths = data_files.expand(files)
    if tokenizer is None:
        return Text(Bytes(paths), length)
    try:
        from trainer.data.text_tokens import Tokens
    except ModuleNotFoundError as error:
        if error.name != 'tokenizers':
            raise
        raise ConfigError(
            "A tokenizer needs the package tokenizers: pip install 'phalanx[text]'."
        ) from None
    return Text(Tokens(paths, tokenizer, separator), length)
