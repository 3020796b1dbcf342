"""Where each record of TFRecord files begins: found once, kept beside the files, mapped to memory.

A record is its length (uint64), a checksum of the length (uint32), the contents, and a checksum of
the contents (uint32), all little-endian
(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details). To find where
they begin one goes from each to the next, and nothing but the 16 bytes between two contents need
be read. The contents are not compared with their checksums: that is done whenever they are read,
and here it would more than double the time (0.9 us to 2.1 for a record of 2 kB in memory, 21 us to
160 for one of 100 kB).
"""

import functools
import hashlib
import struct
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data import files, kept
from trainer.errors import ConfigError

HEADER, FOOTER = 12, 4
_FRAME = HEADER + FOOTER
_THREADS = 16
# Parts of a file that are read at once. One that lies on this machine is read as a whole, in parts
# that stay in the processor's cache; of large records, little more than what is needed. Where each
# part is asked for over a network they are large.
_LOCAL_PART, _SMALL_PART, _REMOTE_PART = 2**20, 2**12, 2**23
_LARGE_RECORD = 2**17
_LENGTH = struct.Struct('<Q')


class Index(NamedTuple):
    """Where N records of F files lie, the files thought of as one after another.

    Attributes:
        positions: uint64 [N + 1], where each record begins, and the end of all; on disk.
        checksums: uint32 [N], of the contents, as the files have them; on disk.
        starts: int64 [F + 1], where each file begins, and the end of all.
        firsts: int64 [F + 1], the number of each file's first record, and of all records.
        fingerprint: sha256, in hex digits, over lengths and checksums of all records.
        file_fingerprints: the same of each file.
    """

    positions: np.ndarray
    checksums: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    fingerprint: str
    file_fingerprints: tuple[str, ...]


def index(paths: Sequence[str]) -> Index:
    """Returns the index of files, which is built if it has not been, or they have changed.

    Raises:
        ConfigError: a file is empty, compressed, cut off, damaged, or no TFRecord file at all.
        OSError: a file is out of reach.
    """
    directory = kept.keep('tfrecord-index-2', paths, functools.partial(_build, paths))
    prints = (directory / 'fingerprints').read_text(encoding='ascii').split()
    positions = np.memmap(directory / 'positions', '<u8', 'r')
    checksums = np.memmap(directory / 'checksums', '<u4', 'r')
    starts, firsts = np.load(directory / 'files.npy')
    if not len(positions) - 1 == len(checksums) == firsts[-1]:
        raise ConfigError(f'{directory} is damaged. Delete it; it will be made again.')
    # As plain arrays: a memmap does more than numpy at each access.
    return Index(
        np.asarray(positions), np.asarray(checksums), starts, firsts, prints[0], tuple(prints[1:])
    )


def file_fingerprint(path: str) -> str:
    """Returns what `Index.file_fingerprints` says of a file.

    Raises:
        ConfigError: see `index`.
        OSError: the file is out of reach.
    """
    return hashlib.sha256(_frames(*_scan(path))).hexdigest()


def masked_checksums(contents: Sequence[bytes]) -> np.ndarray:
    """Returns the checksums of some bytes as TFRecord files have them, uint32 [len(contents)].

    They are CRC32C, rotated and shifted so that those of data with checksums in them are sound.
    """
    crc = np.fromiter(map(_crc32c(), contents), np.uint32, len(contents))
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)


def _crc32c():
    try:
        import google_crc32c
    except ImportError:
        raise ConfigError(
            "To read TFRecord files google-crc32c is needed: pip install 'phalanx[records]'."
        ) from None
    return google_crc32c.value


def _build(paths: Sequence[str], directory: Path) -> None:
    digest, prints, starts, firsts = hashlib.sha256(), [], [0], [0]
    with (
        open(directory / 'positions', 'wb') as positions,
        open(directory / 'checksums', 'wb') as checksums,
        futures.ThreadPoolExecutor(_THREADS) as pool,
    ):
        positions.write(bytes(8))
        try:
            for lengths, sums in pool.map(_scan, paths):
                ends = np.cumsum(lengths + np.uint64(_FRAME)) + np.uint64(starts[-1])
                positions.write(ends.astype('<u8').tobytes())
                checksums.write(sums.astype('<u4').tobytes())
                frames = _frames(lengths, sums)
                digest.update(frames)
                prints.append(hashlib.sha256(frames).hexdigest())
                starts.append(int(ends[-1]))
                firsts.append(firsts[-1] + len(sums))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    np.save(directory / 'files.npy', np.array([starts, firsts], np.int64))
    prints.insert(0, digest.hexdigest())
    (directory / 'fingerprints').write_text('\n'.join(prints), encoding='ascii')


def _frames(lengths: np.ndarray, sums: np.ndarray) -> np.ndarray:
    both = np.empty(len(sums), [('length', '<u8'), ('checksum', '<u4')])
    both['length'], both['checksum'] = lengths, sums
    return both


def _scan(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths, uint64 [n], and checksums, uint32 [n], of the contents in a file."""
    size = files.stat(path).size
    if not size:
        raise ConfigError(f'{path} is empty. Leave it out, or write it again.')
    parts = list(_parts(path, size))
    lengths, sums = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return lengths, sums[1:]  # Before the first record there is none.


def _parts(path: str, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the lengths of records, and the checksums of those before each, part by part.

    At the end there is no length but one more checksum.
    """
    whole = _REMOTE_PART if files.is_url(path) else _LOCAL_PART
    number, begin, part_size = 0, 0, whole
    while begin < size:
        # From the last checksum on, of which there is none before the first record.
        part = files.read(path, max(0, begin - FOOTER), part_size)
        part = part if begin else bytes(FOOTER) + part
        heads, at, last = [], FOOTER, len(part) - HEADER
        while at <= last:
            heads.append(at)
            at += _FRAME + _LENGTH.unpack_from(part, at)[0]
        if not heads:
            raise _cut_off(path, number, begin, size)
        frames = np.frombuffer(part, np.uint8)[np.array(heads)[:, None] + np.arange(-FOOTER, 12)]
        lengths = frames[:, 4:12].copy().view('<u8')[:, 0]
        _check_lengths(path, frames, lengths, number, begin)
        begin, number = begin + at - FOOTER, number + len(heads)
        if begin > size:
            byte = begin - int(lengths[-1]) - _FRAME
            raise _cut_off(path, number - 1, byte, size, begin)
        yield lengths, frames[:, :4].copy().view('<u4')[:, 0]
        large = whole == _LOCAL_PART and lengths.mean() > _LARGE_RECORD
        part_size = _SMALL_PART if large else whole
    yield np.empty(0, np.uint64), np.frombuffer(files.read(path, size - FOOTER, FOOTER), '<u4')


def _check_lengths(
    path: str, frames: np.ndarray, lengths: np.ndarray, number: int, begin: int
) -> None:
    """Compares lengths with their checksums; the first that does not fit is told."""
    there = frames[:, 12:].copy().view('<u4')[:, 0]
    # Most files have records of few lengths, or one.
    distinct, which = np.unique(lengths, return_inverse=True)
    expected = masked_checksums([length.tobytes() for length in distinct.astype('<u8')])[which]
    wrong = np.flatnonzero(there != expected)
    if not len(wrong):
        return
    first = int(wrong[0])
    byte = begin + int(np.sum(lengths[:first] + np.uint64(_FRAME)))
    if number + first:
        raise ConfigError(
            f'{path} is damaged: the length of record {number + first} (byte {byte}) does not fit '
            'its checksum, so that nothing behind it can be found. Fetch or write it again.'
        )
    head = frames[0, 4:6].tobytes()
    if head == b'\x1f\x8b' or (head[0] == 0x78 and int.from_bytes(head, 'big') % 31 == 0):
        raise ConfigError(
            f'{path} is compressed ({"gzip" if head[0] == 0x1F else "zlib"}): no record in it can '
            "be read without all those before it. Write it anew with 'phalanx prepare', or "
            'without compression.'
        )
    raise ConfigError(
        f'{path} is no TFRecord file, or damaged at its very beginning: it begins with '
        f'{frames[0, 4:].tobytes().hex(" ")}, which is no length with its checksum.'
    )


def _cut_off(path: str, number: int, byte: int, size: int, end: int | None = None) -> ConfigError:
    missing = f' of {end}' if end else ''
    return ConfigError(
        f'{path} is cut off in record {number} (byte {byte}): it has {size}{missing} bytes. Fetch '
        'or write it again.'
    )
