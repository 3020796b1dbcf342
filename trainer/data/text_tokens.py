"""Text as the tokens of a tokenizer of Hugging Face's: written once, read where they lie."""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from trainer.data import files as data_files
from trainer.data import kept
from trainer.errors import ConfigError, nearest, shown

_PIECE_BYTES = 2**18
_PIECES_AT_ONCE = 64


class Piece(NamedTuple):
    """What is tokenized by itself: a part of a file that ends with a line, or with the file.

    Attributes:
        file: its number.
        offset: in bytes.
        text: the piece itself.
    """

    file: int
    offset: int
    text: str


class Tokens:
    """A stream of tokens; see `text.Stream`.

    The tokenizer works on pieces of 256 kB or the line's end after that, on all cores.
    """

    def __init__(self, paths: Sequence[str], tokenizer: str, separator: str):
        self.files = tuple(paths)
        content = data_files.read(*data_files.expand(tokenizer))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The library raises no other.
            raise ConfigError(
                f'{tokenizer} cannot be read as the tokenizer.json of the package tokenizers: '
                f'{error}.'
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._separator = self._tokenizer.token_to_id(separator)
        if self._separator is None:
            special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
            raise ConfigError(
                f'{tokenizer} has no token {separator!r} to put before each document.'
                f'{nearest(separator, special)} Set text.separator to one it has'
                + (f', such as {", ".join(special[:5])}.' if special else '.')
            )
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self._kind = np.dtype('<u2' if self.vocabulary_size <= 2**16 else '<u4')
        settings = f'{hashlib.sha256(content).hexdigest()} {separator}'
        directory = kept.keep('text-tokens-1', paths, self._build, settings)
        self.fingerprint = json.loads((directory / 'index.json').read_text())['fingerprint']
        # First token, file and offset of each piece.
        self._pieces = np.load(directory / 'pieces.npy', mmap_mode='r')
        self._tokens = np.asarray(np.memmap(directory / 'tokens.bin', self._kind, 'r'))
        self.size = len(self._tokens)

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self._tokens[starts[:, np.newaxis] + np.arange(length)].astype(np.int32)

    def where(self, token: int) -> str:
        number = int(np.searchsorted(self._pieces[:, 0], token, side='right')) - 1
        first, file, offset = self._pieces[number].tolist()
        path = self.files[file]
        last = number + 1 == len(self._pieces) or self._pieces[number + 1, 1] != file
        length = None if last else int(self._pieces[number + 1, 2]) - offset
        text = data_files.read(path, offset, length).decode()
        # The first token of a file is the separator.
        place = max(0, token - first - (offset == 0))
        characters = self._encode([text])[0].offsets[place][0] if token > first else 0
        return f'{shown(path)}, byte {offset + len(text[:characters].encode())}'

    def _encode(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _build(self, directory: Path) -> None:
        digest, size, pieces = hashlib.sha256(self._kind.str.encode()), 0, []
        with open(directory / 'tokens.bin', 'wb') as file:
            for batch in _batches(_pieces(self.files)):
                encoded = self._encode([piece.text for piece in batch])
                for piece, encoding in zip(batch, encoded, strict=True):
                    before = [self._separator] if piece.offset == 0 else []
                    tokens = np.array([*before, *encoding.ids], self._kind)
                    pieces.append((size, piece.file, piece.offset))
                    size += len(tokens)
                    digest.update(tokens.data)
                    file.write(tokens.data)
        np.save(directory / 'pieces.npy', np.array(pieces, np.int64))
        known = {'fingerprint': digest.hexdigest()}
        (directory / 'index.json').write_text(json.dumps(known), encoding='utf-8')


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _PIECES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _pieces(paths: Sequence[str]) -> Iterator[Piece]:
    """Cuts files into pieces; an empty file is one empty piece.

    Raises:
        ConfigError: a file is not UTF-8.
    """
    for number, path in enumerate(paths):
        offset, size = 0, data_files.stat(path).size
        while True:
            content = data_files.read(path, offset, min(2 * _PIECE_BYTES, size - offset))
            line_end = content.find(b'\n', _PIECE_BYTES)
            content = content[: line_end + 1] if line_end >= 0 else content
            at_end = offset + len(content) >= size
            try:
                # Where no line ends, a character may be cut in two; then it is left for the next.
                text, used = codecs.utf_8_decode(content, 'strict', at_end)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f'{path}, byte {offset + error.start}: this is not UTF-8 ({error.reason}). '
                    'Convert the file, or set text.tokenizer = None to read bytes.'
                ) from None
            yield Piece(number, offset, text)
            if at_end:
                break
            offset += used
