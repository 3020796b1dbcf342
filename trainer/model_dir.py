"""The directory that a run leaves behind: where everything in it is, and who may write it."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from trainer.errors import ConfigError, WriteError

# Names of what is numbered; a copy beside it has another.
STEP = r'step-(\d{8}|[1-9]\d{8,})'
ATTEMPT = r'attempt-(\d+)'
_LOCK_POLL_SECONDS = 0.5


class ModelDir:
    """The paths below one run's directory.

    Attributes:
        path: the absolute path of the directory itself; every worker sees the same one.
    """

    def __init__(self, path: str | os.PathLike):
        r"""Names the directory; nothing is touched before `create`.

        Raises:
            ConfigError: the path is empty, a URL, or holds one of `[]*?\`.
        """
        text = os.fspath(path)
        if not text:
            raise ConfigError('model_dir is empty. Give the run a directory: --model_dir=DIR.')
        if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
            raise ConfigError(
                f'model_dir = {text!r} is a URL. A checkpoint is committed by an atomic rename, so '
                'model_dir must be a path on a POSIX file system that all workers share (a local '
                'disk, NFS, Lustre, a mounted bucket that renames atomically).'
            )
        if found := re.search(r'[][*?\\]', text):
            raise ConfigError(
                f'model_dir = {text!r} holds {found[0]!r}, and TensorFlow takes the name of a '
                'checkpoint for a pattern. Use a name without [ ] * ? and backslash.'
            )
        self.path = Path(os.path.abspath(os.path.expanduser(text)))

    @property
    def checkpoints(self) -> Path:
        """The committed states, see `trainer.checkpoint`."""
        return self.path / 'checkpoints'

    @property
    def quarantine(self) -> Path:
        """The damaged states; exists only once there was one."""
        return self.checkpoints / 'quarantine'

    @property
    def train(self) -> Path:
        """TensorBoard event files of training."""
        return self.path / 'train'

    @property
    def eval(self) -> Path:
        """TensorBoard event files of evaluation."""
        return self.path / 'eval'

    @property
    def job(self) -> Path:
        """TensorBoard event files of the launcher: its report."""
        return self.path / 'job'

    @property
    def export(self) -> Path:
        """Exported models, one directory a step."""
        return self.path / 'export'

    def bad_records(self, worker: int) -> Path:
        """The damaged records that a worker has left out, one a line: number, place, reason."""
        return self.path / 'bad-records' / f'worker-{worker}.tsv'

    def manifests(self) -> dict[int, Path]:
        """Returns the manifest of each committed checkpoint by its step, ascending; unread.

        Raises:
            OSError: the directory cannot be read.
        """
        found = {
            step: self.checkpoints / name / 'manifest.json'
            for step, name in numbered(self.checkpoints, STEP)
        }
        return {step: path for step, path in found.items() if path.exists()}

    def newest_step(self) -> int:
        """Returns the step of the newest committed checkpoint, 0 if there is none.

        Raises:
            OSError: the directory cannot be read.
        """
        return max(self.manifests(), default=0)

    def attempts(self) -> list[int]:
        """Returns the numbers of the attempts that have left logs, ascending.

        Raises:
            OSError: the directory cannot be read.
        """
        return [number for number, _ in numbered(self.logs, ATTEMPT)]

    def attempt(self, number: int) -> Path:
        """The logs of the workers of an attempt."""
        return self.logs / f'attempt-{number}'

    @property
    def config(self) -> Path:
        """The operative configurations."""
        return self.path / 'config'

    @property
    def logs(self) -> Path:
        """The workers' logs, one directory an attempt."""
        return self.path / 'logs'

    def create(self) -> None:
        """Makes the tree and proves that it can be written; all workers may call it at once.

        Raises:
            ConfigError: a file is in the way, or the directory cannot be made or written.
        """
        tree = (self.checkpoints, self.train, self.eval, self.export, self.config, self.logs)
        try:
            for directory in tree:
                directory.mkdir(parents=True, exist_ok=True)
            # Permission bits lie (root, read-only mounts, quotas): only a write proves it.
            with tempfile.TemporaryFile(dir=self.checkpoints) as probe:
                probe.write(b'x')
                probe.flush()
                os.fsync(probe.fileno())
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f'model_dir = {str(self.path)!r} cannot be made: '
                f'{_file_in_the_way(error.filename)} is a file. '
                'Move it away, or give another --model_dir.'
            ) from error
        except OSError as error:
            raise ConfigError(
                f'model_dir = {str(self.path)!r} cannot be written: {error.strerror} '
                f'({error.filename or self.path}). Give --model_dir a directory that this user may '
                'write to and that has space left.'
            ) from error

    @contextlib.contextmanager
    def full_disk_is_told(self) -> Iterator[None]:
        """Raises WriteError, which names the directory, where the block finds a disk full."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WriteError(
                f'model_dir = {str(self.path)!r} cannot be written: {error.strerror}. Free some '
                'space there, then run again: the run goes on from its newest checkpoint.'
            ) from error

    @contextlib.contextmanager
    def lock(
        self,
        name: str = 'lock',
        seconds: float = 0.0,
        waiting: Callable[[str], None] = lambda holder: None,
    ) -> Iterator[None]:
        """Holds the directory for one writer, in one process, until the block is left.

        The kernel frees the lock when its holder dies, however it dies.

        Args:
            name: of the file that is locked; writers of different things have different ones.
            seconds: how long to wait for another holder to leave.
            waiting: is told meanwhile, again and again, who holds it.

        Raises:
            ConfigError: another process holds it, or the file system has no locks.
        """
        path = self.path / name
        try:
            opened = open(path, 'a+', encoding='utf-8')  # noqa: SIM115, closed below
        except PermissionError as error:
            raise ConfigError(
                f'{str(path)!r} may not be written by this user. Give --model_dir a directory of '
                'your own.'
            ) from error
        with opened as file:
            end = time.monotonic() + seconds
            try:
                while not _locked(file, wait=time.monotonic() < end):
                    waiting(_holder(path))
                    time.sleep(_LOCK_POLL_SECONDS)
            except BlockingIOError as error:
                raise ConfigError(
                    f'model_dir = {str(self.path)!r} is in use by {_holder(path)}. Stop that run, '
                    'or give this one another --model_dir.'
                ) from error
            except OSError as error:
                raise ConfigError(
                    f'{str(path)!r} cannot be locked: {error.strerror}. Two runs in one directory '
                    'would destroy each other: put --model_dir on a file system with flock.'
                ) from error
            file.truncate(0)
            holder = {
                'host': socket.gethostname(),
                'pid': os.getpid(),
                'started': datetime.now(timezone.utc).isoformat(timespec='seconds'),
            }
            file.write(json.dumps(holder) + '\n')
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def numbered(directory: Path, pattern: str) -> list[tuple[int, str]]:
    """Returns number and name of all that is in a directory and has such a name, ascending.

    Args:
        directory: one that is not there, or is a file, holds nothing.
        pattern: a regular expression for the whole name, whose first group is the number.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = ((re.fullmatch(pattern, name), name) for name in names)
    return sorted((int(match[1]), name) for match, name in found if match)


def _file_in_the_way(path: str) -> str:
    for parent in (Path(path), *Path(path).parents):
        if parent.exists() and not parent.is_dir():
            return repr(str(parent))
    return repr(path)


def _locked(file: TextIO, *, wait: bool) -> bool:
    """Tries to lock a file; while it is to be waited for, one that is taken is no error."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        return False
    return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding='utf-8'))
        return f'process {holder["pid"]} on {holder["host"]}, started {holder["started"]}'
    except (OSError, ValueError, KeyError, TypeError):
        return 'another process'  # It has the lock but has not yet written who it is.
