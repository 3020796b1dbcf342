"""Compressed TFRecord files as plain ones: for who reads all of them anyway, and once.

No record of a compressed file can be read without all those before it, so training refuses such
files. `phalanx prepare` decompresses them into a directory that is gone when it has finished.
"""

import contextlib
import contextvars
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.data import files
from trainer.data.tfrecord_index import masked_checksums
from trainer.errors import ConfigError

_BLOCK = 2**22  # Bytes that are read at a time.
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_directory: contextvars.ContextVar[Path | None] = contextvars.ContextVar('directory', default=None)


@contextlib.contextmanager
def decompressing(directory: str | os.PathLike) -> Iterator[None]:
    """Has compressed files of sources that are made in the block decompressed into a directory."""
    token = _directory.set(Path(directory))
    try:
        yield
    finally:
        _directory.reset(token)


def plain(paths: Sequence[str]) -> tuple[str, ...]:
    """Returns files to read in place of some files: themselves, unless they are decompressed.

    Raises:
        ConfigError: a compressed file is damaged or cut off.
        OSError: a file is out of reach, or the disk is full.
    """
    directory = _directory.get()
    if directory is None:
        return tuple(paths)
    return tuple(_plain(path, directory) if is_compressed(path) else path for path in paths)


def is_compressed(path: str) -> bool:
    """Whether a file begins as gzip or zlib data do, and not with the length of a record."""
    head = files.read(path, 0, 12)
    is_zlib = head[:1] == b'\x78' and int.from_bytes(head[:2], 'big') % 31 == 0
    if head[:2] != b'\x1f\x8b' and not is_zlib:
        return False
    return masked_checksums([head[:8]])[0].astype('<u4').tobytes() != head[8:]


def _plain(path: str, directory: Path) -> str:
    stat = files.stat(path)
    name = hashlib.sha256(f'{path} {stat.size} {stat.version}'.encode()).hexdigest()[:16]
    target = directory / f'{name}.tfrecord'
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f'.tmp-{name}-{os.getpid()}'
        try:
            with open(aside, 'wb') as file:
                for block in _decompressed(path, stat.size):
                    file.write(block)
            os.rename(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    return str(target)


def _decompressed(path: str, size: int) -> Iterator[bytes]:
    stream, done = zlib.decompressobj(_GZIP_OR_ZLIB), 0
    try:
        while done < size and (block := files.read(path, done, _BLOCK)):
            done += len(block)
            while block:
                # No more at a time, as a thousand times as much may come of it.
                yield stream.decompress(block, _BLOCK)
                block = stream.unconsumed_tail
                if stream.eof and stream.unused_data:
                    # A gzip file may consist of several, one after another.
                    block = stream.unused_data
                    stream = zlib.decompressobj(_GZIP_OR_ZLIB)
        yield stream.flush()
    except zlib.error as error:
        raise ConfigError(
            f'{path} is damaged: it cannot be decompressed, somewhere before byte {done:,} '
            f'({error}). Fetch or write it again.'
        ) from None
    if not stream.eof:
        raise ConfigError(f'{path} is cut off at byte {done:,}. Fetch or write it again.')
