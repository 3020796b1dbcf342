"""Files wherever they lie: paths of this machine, or URLs such as s3://bucket/train-*.tfrecord."""

import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from trainer.errors import ConfigError, nearest

# Files held open: that many in any case, and up to a quarter of so many if the system lets us.
_FEW_FILES, _MANY_FILES = 200, 2**16
# Of what is looked at side by side.
_THREADS = 16
# Seconds for a part, and for a byte of it, that memory does not take.
_SLOW, _SLOW_BYTE = 2e-5, 1e-9

T = TypeVar('T')


class Stat(NamedTuple):
    """What tells whether a file is the one it was.

    Attributes:
        size: in bytes.
        version: changes when the contents do: the time of the last change, or the store's tag;
            empty where a server tells neither.
    """

    size: int
    version: str


class Range(NamedTuple):
    """A part of a file: `length` bytes from byte `offset` on."""

    path: str
    offset: int
    length: int


def is_url(path: str) -> bool:
    """Whether a path is a URL, which fsspec reads, and not one of this machine."""
    return '://' in path


def expand(paths: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the files of one or several paths or glob patterns, each pattern's in order of names.

    Raises:
        ConfigError: a path or pattern matches no file.
    """
    patterns = [paths] if isinstance(paths, str) else paths
    urls = [pattern for pattern in patterns if is_url(pattern)]
    if urls:
        from trainer.data import remote

        urls = dict(zip(urls, remote.expand(urls), strict=True))
    found = [
        path for each in patterns for path in (urls[each] if each in urls else _expand_local(each))
    ]
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise ConfigError(f'The data file {twice!r} is named twice.')
    return tuple(found)


def _expand_local(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    plain = not glob.has_magic(pattern) or os.path.exists(pattern)
    matches = [pattern] if plain else sorted(glob.glob(pattern, recursive=True))
    matches = [path for path in matches if os.path.isfile(path)]
    if not matches:
        there = map(str, Path(pattern).parent.glob('*'))
        raise ConfigError(f'There is no data file {pattern!r}.{nearest(pattern, there)}')
    return matches


def walk(directory: str) -> list[tuple[str, int]]:
    """Returns all files below a directory: their paths in it, with '/' between, and sizes in bytes.

    What begins with a dot is left out; links are followed. Folders and files are looked at side
    by side, which is worth it where a disk is far away.

    Raises:
        OSError: a folder cannot be read, or a link leads nowhere.
    """
    if is_url(directory):
        from trainer.data import remote

        return remote.walk(directory)
    names: list[str] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        folders = ['']
        while folders:
            lists = list(threads.map(functools.partial(_look_into, directory), folders))
            names += [name for within, _ in lists for name in within]
            folders = [name for _, within in lists for name in within]
        parts = [names[first : first + 1000] for first in range(0, len(names), 1000)]
        sizes = threads.map(lambda part: [os.stat(f'{directory}/{n}').st_size for n in part], parts)
        return list(zip(names, itertools.chain.from_iterable(sizes), strict=True))


def _look_into(directory: str, folder: str) -> tuple[list[str], list[str]]:
    """Returns the files and the folders in a folder, as paths in `directory`."""
    found: tuple[list[str], list[str]] = ([], [])
    path = f'{directory}/{folder}'
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            is_folder = entry.is_dir()
            if is_folder and entry.is_symlink() and _leads_up(path, entry.path):
                raise OSError(errno.ELOOP, 'The link leads to a folder that it lies in', entry.path)
            found[is_folder].append(f'{folder}/{entry.name}' if folder else entry.name)
    return found


def _leads_up(folder: str, link: str) -> bool:
    inside, target = os.path.realpath(folder), os.path.realpath(link)
    return os.path.commonpath([inside, target]) == target


def stat(path: str) -> Stat:
    """Returns the size and version of a file.

    Raises:
        OSError: it cannot be reached.
    """
    if is_url(path):
        from trainer.data import remote

        return remote.stat(path)
    result = os.stat(path)
    _opened.forget(path)  # Another file may have taken its name since.
    return Stat(result.st_size, str(result.st_mtime_ns))


def read(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """Returns part of a file, or all of it; fewer bytes than asked for only at its end.

    Raises:
        OSError: it cannot be read; of a URL, after several tries.
    """
    if length is None:
        length = stat(path).size - offset
    return read_ranges([Range(path, offset, length)])[0]


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Returns parts of files, read side by side where that is worth it.

    Raises:
        OSError: one cannot be read; of a URL, after several tries.
    """
    far = [each for each in ranges if is_url(each.path)]
    if not far:
        return _disk.read(ranges)
    from trainer.data import remote

    came = iter(remote.read_ranges(far))
    read = iter(_disk.read([each for each in ranges if not is_url(each.path)]))
    return [next(came if is_url(each.path) else read) for each in ranges]


def fingerprint(path: str, edge: int = 2**16) -> str:
    """Returns a sha256, in hex digits, over size, beginning and end of a file, `edge` bytes each.

    It tells files apart without reading all of them; two that differ only in between are equal.
    """
    size = stat(path).size
    parts = [Range(path, 0, min(edge, size)), Range(path, max(0, size - edge), min(edge, size))]
    return hashlib.sha256(b'%d\n' % size + b''.join(read_ranges(parts))).hexdigest()


class _Disk:
    """Reads local files, and tells the system beforehand what, if they do not lie in memory.

    A disk serves many requests at once, but a thread that reads makes one at a time. Told of 128
    records beforehand, a disk here gave one or two threads nearly twice as many a second. Where
    all lies in memory, telling would only cost time.
    """

    def __init__(self):
        self._is_slow = False

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        begin = time.perf_counter()
        if self._is_slow and len(ranges) > 1:
            for path, offset, length in ranges:
                _opened.get(path).expect(offset, length)
        contents = [_opened.get(path).read(offset, length) for path, offset, length in ranges]
        size = sum(map(len, contents))
        self._is_slow = time.perf_counter() - begin > _SLOW * len(ranges) + _SLOW_BYTE * size
        return contents


class HeldOpen(Generic[T]):
    """Files held open for all threads, the longest open given up when there are too many.

    Args:
        opener: opens a path. What it returns closes itself when nobody refers to it any more.
    """

    def __init__(self, opener: Callable[[str], T]):
        self._opener = opener
        self._lock = threading.Lock()
        self._held: OrderedDict[str, T] = OrderedDict()

    def get(self, path: str) -> T:
        # A look without the lock, as millions of small records are read one by one.
        held = self._held.get(path)
        return self._open(path) if held is None else held

    def forget(self, path: str) -> None:
        with self._lock:
            self._held.pop(path, None)

    def _open(self, path: str) -> T:
        opened = self._opener(path)
        with self._lock:
            if len(self._held) >= _FEW_FILES and len(self._held) >= _limit():
                self._held.popitem(last=False)
            return self._held.setdefault(path, opened)


@functools.cache
def _limit() -> int:
    """Returns how many files may be held open for one purpose, a quarter of what a process may.

    The usual limit of 1,024 is from when programs could not count further. Each process may raise
    its own as far as the system lets it, and one that reads that many files does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft == resource.RLIM_INFINITY:
        return wanted // 4
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    return soft // 4


class _Descriptor:
    """A file open for positional reads."""

    def __init__(self, path: str):
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        content = os.pread(self._number, length, offset)
        while len(content) < length:  # At the end, or more than one call may return.
            more = os.pread(self._number, length - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def expect(self, offset: int, length: int) -> None:
        if hasattr(os, 'posix_fadvise'):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._number, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self, close=os.close):
        if self._number >= 0:
            close(self._number)


_opened = HeldOpen(_Descriptor)
_disk = _Disk()
os.register_at_fork(after_in_child=functools.partial(HeldOpen.__init__, _opened, _Descriptor))
