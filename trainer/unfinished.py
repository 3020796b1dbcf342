"""A data set that is being written: its directory until it is complete, and what is done so far.

`OUT.partial/` holds the finished shards and, in `.progress/`, the plan, the lock, and what is known
of each finished shard. When all shards are there, dataset.json is written and the directory becomes
`OUT` by one rename: whoever reads `OUT` sees all of it or nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data import dataset, statistics
from trainer.errors import ConfigError, WriteError

PROGRESS = '.progress'


class Unfinished:
    """The directory of a data set that is being written.

    Attributes:
        out: where it will be.
        path: where it is until then.
    """

    def __init__(self, out: str | os.PathLike):
        """Names the directories; nothing is touched before `lock`.

        Raises:
            ConfigError: something else is there already.
        """
        self.out = Path(os.path.abspath(os.path.expanduser(out)))
        self.path = self.out.with_name(f'{self.out.name}.partial')
        self._progress = self.path / PROGRESS
        if os.path.ismount(self.out):
            # One rename makes the data set appear, and a mount point cannot be renamed to.
            raise ConfigError(f'{self.out} is a mount point. Name a directory in it.')
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f'{self.out} is a file. Name a new directory.')
        if not self.finished and self.out.is_dir() and any(self.out.iterdir()):
            raise ConfigError(
                f'{self.out} holds something else than a prepared data set. Name a new directory.'
            )

    @property
    def finished(self) -> bool:
        """Whether the data set is complete."""
        return (self.out / dataset.NAME).exists()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process until the block is left; makes it if need be.

        Raises:
            ConfigError: another process holds it, or it cannot be made.
        """
        if self.finished:
            try:
                yield
            finally:
                self._tidy()
            return
        try:
            self._progress.mkdir(parents=True, exist_ok=True)
            file = open(self._progress / 'lock', 'a', encoding='utf-8')  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f'{self.path} cannot be written: {error.strerror} ({error.filename}). Name a '
                'directory where this user may write.'
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f'{self.path} is being written by another `phalanx prepare`, or cannot be '
                    f'locked ({error.strerror}). Let that one finish, or name another directory.'
                ) from None
            if self.finished:  # Meanwhile, by another process.
                shutil.rmtree(self.path)
            else:
                for litter in [*self.path.glob('.tmp-*'), *self._progress.glob('.tmp-*')]:
                    litter.unlink()
            yield

    def begin(self, plan: dict[str, Any]) -> None:
        """Begins to write what is planned, or goes on with it.

        Raises:
            ConfigError: something else was planned.
            WriteError: the disk is full.
        """
        path = self._progress / 'plan.json'
        if self.finished:
            # What the plan has grown into.
            there, where = dataset.read(str(self.out)), self.out
            plan = {**plan, 'phalanx': there['phalanx']}
        elif path.exists():
            there, where = json.loads(path.read_text(encoding='utf-8')), self.path
        else:
            self._write_json(path, plan)
            return
        if wrong := _difference(there, plan):
            raise ConfigError(
                f'{where} was made of something else: {wrong}. Name another directory, or delete '
                'this one.'
            )

    def written(
        self, plan: dict[str, Any], *, incomplete: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Returns what is known of each shard that is as it was finished; deletes all others.

        Args:
            plan: what is to be written.
            incomplete: whether those count that lack damaged records.
        """
        found = {}
        for name in _files(plan):
            path, known = self.path / name, self._known(name)
            try:
                record = json.loads(known.read_text(encoding='utf-8'))
                is_good = not record['records'] or dataset.sha256(path) == record['sha256']
                if is_good and (incomplete or not record['left_out']):
                    found[name] = record
            except FileNotFoundError:
                pass
            if name not in found:
                path.unlink(missing_ok=True)
                known.unlink(missing_ok=True)
        return found

    def keep(self, name: str, record: dict[str, Any]) -> None:
        """Notes that a shard is finished.

        Raises:
            WriteError: the disk is full.
        """
        dataset.sync(self.path)
        self._write_json(self._known(name), record)

    def commit(self, plan: dict[str, Any], written: Mapping[str, dict[str, Any]]) -> None:
        """Completes the data set: from now on it is in `out`.

        Raises:
            ConfigError: no record of a split is left, or `out` is in use now.
            WriteError: the disk is full.
        """
        self._write_json(self.path / dataset.NAME, _combined(plan, written))
        try:
            os.rename(self.path, self.out)
        except OSError as error:
            raise ConfigError(
                f'{self.path} is complete, but cannot become {self.out}: {error.strerror}.'
            ) from None
        dataset.sync(self.out.parent)
        self._tidy()

    def _tidy(self) -> None:
        for litter in (self.out / PROGRESS, self.path):
            shutil.rmtree(litter, ignore_errors=True)

    def _known(self, name: str) -> Path:
        return self._progress / f'{name}.json'

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        aside = path.with_name(f'.tmp-{path.name}')
        try:
            with open(aside, 'w', encoding='utf-8') as file:
                json.dump(content, file, indent=1)
                file.write('\n')
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, path)
            dataset.sync(path.parent)
        except OSError as error:
            raise WriteError(
                f'{self.path} cannot be written: {error.strerror}. Once it can, run the same '
                'command again: finished shards are kept.'
            ) from error


def _combined(planned: dict[str, Any], written: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what dataset.json says.

    Args:
        planned: from `plan`.
        written: for the name of each file what `ShardWriter.write` has returned.

    Raises:
        ConfigError: no record of a split is left.
    """
    result = {**planned, 'splits': {}}
    for name, split in planned['splits'].items():
        numbers: dict[str, statistics.Numbers] = {}
        shards, left_out = [], []
        for shard in split['shards']:
            record = written[shard['file']]
            left_out += record['left_out']
            if record['records']:
                known = {key: record[key] for key in ('records', 'bytes', 'sha256', 'fingerprint')}
                shards.append({**shard, **known})
                of_shard = record['statistics'].items()
                numbers = statistics.together(
                    numbers, {feature: statistics.from_json(each) for feature, each in of_shard}
                )
        if not shards:
            raise ConfigError(
                f'All {len(left_out)} records of the split {name!r} are damaged, the first one at '
                f'{left_out[0]["where"]}: {left_out[0]["reason"]}. Is the configuration right?'
            )
        facts = json.dumps([split['features'], [shard['sha256'] for shard in shards]])
        result['splits'][name] = {
            'records': sum(shard['records'] for shard in shards),
            'fingerprint': hashlib.sha256(facts.encode()).hexdigest(),
            **split,
            'shards': shards,
            'left_out': left_out,
            'statistics': {feature: each.as_json for feature, each in numbers.items()},
        }
    return result


def _files(plan: dict[str, Any]) -> Iterator[str]:
    return (shard['file'] for split in plan['splits'].values() for shard in split['shards'])


def _difference(there: dict[str, Any], plan: dict[str, Any]) -> str:
    """What of a plan is another than what is there, in words; '' if nothing is."""
    for key in ('format', 'phalanx', 'files'):
        if there.get(key) != plan[key]:
            return f'{key} was {there.get(key)!r} and is {plan[key]!r} now'
    if there['splits'].keys() != plan['splits'].keys():
        return f'it has the splits {list(there["splits"])}, not {list(plan["splits"])}'
    for name, split in plan['splits'].items():
        was = there['splits'][name]
        for key in ('source', 'features'):
            if was[key] != split[key]:
                return f'{key} of the split {name!r} was {was[key]} and is {split[key]} now'
        files = [shard['file'] for shard in split['shards']]
        if not {shard['file'] for shard in was['shards']} <= set(files):
            return f'the split {name!r} was divided into another number of shards'
    return ''
