"""What is computed once from data files and kept beside them: indices, columns, tokens.

It lies in `.phalanx/` beside the first of the files or, where that cannot be written or is a URL,
in the user's cache directory (`PHALANX_CACHE`, or ~/.cache/phalanx).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import logging

from trainer.data import files
from trainer.observe import phases

_HOUR, _DAY = 3600.0, 86400.0  # Seconds.
# Of URLs that are signed for some time: what differs from one to the next for the same object.
_KEY = re.compile(
    r'(?i)x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id'
)


def keep(
    what: str, paths: Sequence[str], build: Callable[[Path], None], settings: str = ''
) -> Path:
    """Returns the directory of what `build` makes of files; it is called once for all processes.

    It is made anew when a file's size or version has changed. What was made of the files as they
    were is deleted then, if nobody has asked for it within an hour; readers that have it open do
    not feel it. So is what builders have left that were killed, after a day.

    Args:
        what: a name, with a version number that changes with the format: 'tfrecord-index-1'.
        paths: the files it is made of.
        build: fills the empty directory that it is given. What it raises is passed on.
        settings: whatever else the result depends on.
    """
    stats = [files.stat(path) for path in paths]
    same = [_identity(path) for path in paths]
    names = _digest([what, settings, *same])[:16]
    version = _digest([f'{s.size} {s.version}' for s in stats])[:16]
    home = _home(paths[0], same[0])
    target = home / f'{what}-{names}-{version}'
    if not _found(target):
        with _lock(home / f'{what}-{names}.lock'):
            if not _found(target):  # Else another process has built it meanwhile.
                logging.info('building %s, once', target)
                phases.enter('indexing')
                _build(target, build)
                phases.enter('building')
                for old in home.glob(f'{what}-{names}-*'):
                    if old != target:
                        _delete_unused(old, _HOUR)
                for aside in home.glob('.tmp-*'):
                    _delete_unused(aside, _DAY)
    return target


def _identity(path: str) -> str:
    """Returns the same however a file is named: absolute, without links; no keys of a URL."""
    if not files.is_url(path):
        return str(Path(path).resolve())
    if not path.startswith('http'):
        return path
    url = urllib.parse.urlsplit(path)
    said = [each for each in url.query.split('&') if not _KEY.fullmatch(each.partition('=')[0])]
    host = url.netloc.rpartition('@')[2]
    return url._replace(netloc=host, query='&'.join(said)).geturl()


def _found(target: Path) -> bool:
    """Whether it is there; if so, notes that it is used.

    Its reader opens it only after that, and meanwhile another process, which has found the files
    changed, may look what to delete.
    """
    with contextlib.suppress(OSError):
        os.utime(target)
    return target.is_dir()


def _delete_unused(directory: Path, seconds: float) -> None:
    with contextlib.suppress(OSError):
        used = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
        if time.time() - used > seconds:
            shutil.rmtree(directory, ignore_errors=True)


def _build(target: Path, build: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix='.tmp-', dir=target.parent))
    try:
        build(aside)
        for file in aside.iterdir():
            with open(file, 'rb+') as opened:
                os.fsync(opened.fileno())
        os.chmod(aside, 0o755)
        try:
            os.rename(aside, target)
        except OSError:
            # Without a lock another process may have been faster.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _home(path: str, identity: str) -> Path:
    if not files.is_url(path):
        home = Path(identity).parent / '.phalanx'
        with contextlib.suppress(OSError):
            home.mkdir(exist_ok=True)
            if os.access(home, os.W_OK):
                return home
    cache = os.environ.get('PHALANX_CACHE') or Path.home() / '.cache' / 'phalanx'
    home = Path(cache) / _digest([os.path.dirname(identity)])[:16]
    home.mkdir(parents=True, exist_ok=True)
    return home


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, 'w', encoding='utf-8') as file:
        # Where the file system has no locks, several processes build the same.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
