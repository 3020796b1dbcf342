"""What a job was and what came of it: `run.json`, enough to run it again and to compare.

Of the environment it holds what is named here and nothing else: variables hold secrets.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from launch.ledger import Ledger
from launch.local import intra_op_threads
from trainer.errors import ConfigError, Preempted
from trainer.gin_files import Script
from trainer.model_dir import ModelDir
from trainer.version import installed

FORMAT = 1
NAME = 'run.json'
_OUTCOMES = {0: 'finished', ConfigError.exit_code: 'mistake', Preempted.exit_code: 'stopped'}
_GIT_SECONDS = 10.0
_FROM_MANIFEST = ('step', 'state_sha256', 'metrics', 'data_fingerprint', 'topology', 'versions')


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        flags: of `phalanx run`, as they were given.
        workers: how many.
        workers_per_host: how many of them share a host.
        devices_per_worker: of `--devices_per_worker`, None if it was not given.
        mode, verbosity: of `python -m trainer`.
        policy: of the supervisor, by name.
        script: the whole configuration.
    """

    flags: Sequence[str]
    workers: int
    workers_per_host: int
    devices_per_worker: int | None
    mode: str
    verbosity: int
    policy: Mapping[str, Any]
    script: Script

    def describe(self) -> dict[str, Any]:
        """Returns all of it, and where it is about to run, for JSON."""
        return {
            'flags': list(self.flags),
            'workers': self.workers,
            'workers_per_host': self.workers_per_host,
            'devices_per_worker': self.devices_per_worker,
            'mode': self.mode,
            'verbosity': self.verbosity,
            'policy': dict(self.policy),
            'config_sha256': hashlib.sha256(self.script.text.encode()).hexdigest(),
            'imports': [module for module, _ in self.script.imports],
            'git': _git(Path.cwd()),
            'versions': installed(),
            'host': socket.gethostname(),
            'processor': _processor(),
            'cpus': len(os.sched_getaffinity(0)),
            'intra_op_threads': intra_op_threads(self.workers_per_host),
        }


class Record:
    """Writes the record of a model_dir, under the launcher's lock.

    What cannot be written is left out, as in the ledger: the job goes on.
    """

    def __init__(self, dirs: ModelDir, request: Request):
        self._dirs, self._request, self._began = dirs, request, 0.0
        self._before: Mapping[str, Any] | None = None
        self._written: Mapping[str, Any] | None = None

    def begin(self) -> None:
        """Adds a start of the launcher.

        As long as there is no checkpoint, a later start is the one that the run begins with.
        """
        self._began = time.time()
        newest, old = _newest(self._dirs), _load(self._dirs)
        self._before = old
        start = {'begun': _now(), 'from_step': newest.get('step', 0)}
        start.update(self._request.describe())
        kept = (
            old
            if old and newest
            else {'format': FORMAT, **start, 'config': self._request.script.text}
        )
        starts = [*(old or {}).get('starts', ()), start]
        submitted = {'submitted': old['submitted']} if old and 'submitted' in old else {}
        self._written = {**kept, 'starts': starts, 'outcome': None, 'result': None}
        _write(self._dirs, {**self._written, **submitted})

    def end(self, code: int) -> None:
        """Adds how this start ended, with which exit code."""
        if self._written is None:
            return
        events = Ledger(self._dirs.path / 'ledger.jsonl').read()
        # Whoever submits does not hold the lock, and may have put back what was there before.
        now = _load(self._dirs) or {}
        record = self._written | {n: now[n] for n in ('submitted',) if n in now}
        end = {
            'ended': _now(),
            'seconds': round(time.time() - self._began, 3),
            'code': code,
            'outcome': _OUTCOMES.get(code, 'failed'),
        }
        kinds = [each['event'] for each in events]
        attempts = kinds.count('attempt')
        begun = max((index for index, kind in enumerate(kinds) if kind == 'job'), default=0)
        record['starts'][-1].update(end, attempts=kinds[begun:].count('attempt'))
        done = {**record, **end, 'attempts': attempts, 'result': _result(self._dirs)}
        if code == ConfigError.exit_code and self._before:
            # A slip in the flags of another start changes nothing of what the run has come to.
            done = {**self._before, 'starts': record['starts']}
        _write(self._dirs, done)


def read(dirs: ModelDir) -> dict[str, Any]:
    """Returns the record of the job in a directory.

    Raises:
        ConfigError: there is none, or a newer version wrote it.
    """
    record = _load(dirs)
    if record is None:
        raise ConfigError(
            f'{str(dirs.path)!r} holds no {NAME}. Name the --model_dir of a job that was started '
            'with `phalanx run`.'
        )
    if record['format'] != FORMAT:
        raise ConfigError(
            f'{str(dirs.path / NAME)!r} is in format {record["format"]}, of another Phalanx; this '
            f'one reads {FORMAT}.'
        )
    return record


def note_submission(dirs: ModelDir, handle: str, script: Script) -> None:
    """Adds the handle of a job that a scheduler has taken, which will run in a directory.

    Raises:
        ConfigError: the directory cannot be written.
    """
    dirs.create()
    new = {'format': FORMAT, 'config': script.text, 'starts': [], 'outcome': None, 'result': None}
    old = _load(dirs) or new
    submitted = [*old.get('submitted', ()), {'handle': handle, 'time': _now()}]
    _write(dirs, {**old, 'submitted': submitted})


def _write(dirs: ModelDir, record: Mapping[str, Any]) -> None:
    path = dirs.path / NAME
    aside = path.with_name(f'.{NAME}.tmp')
    with contextlib.suppress(OSError):
        with open(aside, 'w', encoding='utf-8') as file:
            file.write(json.dumps(record, indent=2) + '\n')
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def _load(dirs: ModelDir) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((dirs.path / NAME).read_text(encoding='utf-8'))
        if isinstance(record, dict) and {'format', 'config', 'starts'} <= record.keys():
            return record
    return None


def _newest(dirs: ModelDir) -> dict[str, Any]:
    """The manifest of the newest checkpoint, empty without one."""
    with contextlib.suppress(OSError):
        for path in reversed(dirs.manifests().values()):
            with contextlib.suppress(OSError, ValueError):
                return dict(json.loads(path.read_text(encoding='utf-8')))
    return {}


def _result(dirs: ModelDir) -> dict[str, Any] | None:
    """What the run has come to, None without a checkpoint."""
    if not (newest := _newest(dirs)):
        return None
    samples = _sha256(dirs.path / 'samples.tsv')
    return {**{name: newest.get(name) for name in _FROM_MANIFEST}, 'sample_sha256': samples}


def _sha256(path: Path) -> str | None:
    try:
        with open(path, 'rb') as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return None


def _git(directory: Path) -> dict[str, Any] | None:
    """The revision of a checkout and whether its code is another; None outside of one."""
    revision = _ask_git(directory, 'rev-parse', 'HEAD')
    if revision is None:
        return None
    status = _ask_git(directory, 'status', '--porcelain', '--untracked-files=all') or ''
    # What a run leaves behind is no change of the code; a module that was not added yet is.
    changed = [x for x in status.splitlines() if x[:2] != '??' or x.rstrip('"').endswith('.py')]
    return {'revision': revision.strip(), 'dirty': bool(changed)}


def _ask_git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ['git', '--no-optional-locks', '-C', str(directory), *arguments],
            capture_output=True,
            text=True,
            errors='replace',
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _processor() -> str:
    # Kernels are chosen by it, so the bits depend on it.
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.machine()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
