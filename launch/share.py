"""One host's workers in one attempt: what they say and how they ended, for the leader."""

import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import display, exits, local
from trainer.model_dir import ModelDir


class Share:
    """The workers of this host in one attempt.

    Args:
        order: the leader's: the attempt, how many workers, the number of the first, the cluster.
        flags: of `python -m trainer`.
        dirs: where the run is written.
        sharing: how many workers share this host, when all are there.
        rank: of this host.

    Raises:
        OSError: they cannot be started: a full disk, no more processes.
    """

    def __init__(self, order: dict, flags: Sequence[str], dirs: ModelDir, sharing: int, rank: int):
        self._dirs, self._rank = dirs, rank
        self._attempt, self._first, count = order['attempt'], order['first'], order['count']
        self._begun, self._ended = time.time(), 0.0
        self._said: dict = {}
        # What workers say of their phases goes through the leader: on a shared file system it
        # would show there late.
        self._aside = tempfile.TemporaryDirectory(prefix='phalanx-', ignore_cleanup_errors=True)
        directory = dirs.attempt(self._attempt)
        directory.mkdir(parents=True, exist_ok=True)
        self.workers = local.Workers(
            flags,
            local.environments(order['cluster'], self._first, count, sharing),
            directory,
            first=self._first,
            phases_directory=Path(self._aside.name),
        )
        self._offsets = [0] * count
        self._shown = [0] * count

    def news(self) -> dict:
        """Returns what is new for the leader, {} if nothing is."""
        codes = self.workers.codes()
        if not self._ended and any(codes):
            self._ended = time.time()
        said = {'codes': codes, 'states': self.workers.states()}
        if None not in codes and (taken := self.workers.taken_port()):
            said['taken'] = [taken]
        texts = {}
        for index, path in enumerate(self.workers.phases):
            text = _since(path, self._offsets[index], whole_lines=True)
            self._offsets[index] += len(text)
            if text:
                texts[self._first + index] = text.decode(errors='replace')
        news = {} if said == self._said else dict(said)
        self._said = said
        if texts:
            news['phases'] = texts
        return {'attempt': self._attempt, **news} if news else {}

    def has_ended(self) -> bool:
        return None not in self.workers.codes()

    def dump(self) -> None:
        """Has the stacks of all workers in their logs, where the leader's host can read them."""
        self.workers.dump_stacks()
        for path in self.workers.logs:
            with contextlib.suppress(OSError), open(path, 'rb') as file:
                os.fsync(file.fileno())

    def tee(self) -> None:
        """Prints what the workers have said."""
        for index, path in enumerate(self.workers.logs):
            text = _since(path, self._shown[index])
            self._shown[index] += len(text)
            if text:
                display.write(text.decode(errors='replace'), sys.stdout)

    def end(self, reason: str) -> None:
        """Ends the workers and leaves the record of how they have ended."""
        codes = self.workers.codes()
        self.workers.kill()
        self._aside.cleanup()
        exits.write(
            self._dirs,
            exits.Exit(
                attempt=self._attempt,
                rank=self._rank,
                host=socket.gethostname(),
                codes={self._first + index: code for index, code in enumerate(codes)},
                begun=self._begun,
                ended=self._ended or time.time(),
                reason=reason if None in codes else '',
            ),
        )


def _since(path: Path, offset: int, *, whole_lines: bool = False) -> bytes:
    try:
        with open(path, 'rb') as file:
            file.seek(offset)
            text = file.read(2**20)
    except OSError:
        return b''
    return text[: text.rfind(b'\n') + 1] if whole_lines else text
