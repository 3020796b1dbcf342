"""The checkpoints of one run: saved in the background, found again, never lost in silence.

`trainer.proof` says what one checkpoint is, `trainer.retention` which ones may go; here is the
order in which things happen. One process, the chief, writes; all others only read.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import proof
from trainer.errors import ConfigError, WriteError
from trainer.model_dir import STEP, numbered
from trainer.proof import CheckpointDamaged, state_sha256
from trainer.resume import check_unchanged
from trainer.retention import Info, Keep, to_delete

__all__ = [
    'CheckpointDamaged',
    'CheckpointWriteError',
    'Checkpoints',
    'Keep',
    'check_unchanged',
    'state_sha256',
]

# A full disk or a file server that restarts is often back within this time.
RETRY_SECONDS = (1.0, 5.0)


class CheckpointWriteError(WriteError):
    """So many saves failed that the run is in danger of losing its work."""


class Checkpoints:
    """Saves and finds the checkpoints in one directory.

    Args:
        directory: where they lie, `ModelDir.checkpoints`.
        keep: which ones are not deleted; the default is `Keep()`.
        asynchronous: write in a thread while training goes on.
        max_failures: so many saves in a row may fail before an error is raised, at least 1.
        writer: whether this process, holding the directory's lock, may change anything in it.
        way_back: how many steps back from the newest one there has to be one, see `to_delete`.
        clock: seconds since the epoch.

    Attributes:
        directory: as above.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: Keep | None = None,
        asynchronous: bool = True,
        max_failures: int = 3,
        writer: bool = True,
        way_back: int = 0,
        clock: Callable[[], float] = time.time,
    ):
        if not isinstance(max_failures, int) or max_failures < 1:
            raise ConfigError(f'max_failures = {max_failures!r} must be an integer of at least 1.')
        self.directory = Path(directory)
        self._quarantine = self.directory / 'quarantine'
        self._keep = keep or Keep()
        self._asynchronous = asynchronous
        self._max_failures = max_failures
        self._writer = writer
        self._way_back = way_back
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._newest: int | None = None
        self._failures = 0
        self._failure = ''
        self._bug: BaseException | None = None
        self._loaded: tuple[int, dict[str, np.ndarray], dict[str, Any]] | None = None

    def save(self, tensors: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Begins to save, once the save before has ended.

        Args:
            tensors: path -> host tensor or array, which nobody changes any more.
            manifest: what to record, JSON-compatible; at least `step`. Numbers that are not
                finite become null.

        Raises:
            CheckpointWriteError: `max_failures` saves in a row have failed.
        """
        assert self._writer, 'Only the chief saves.'
        # Serialised here: the caller may change its dict, and sees a mistake in it at once.
        record = json.loads(
            json.dumps(dict(manifest), default=np.generic.item), parse_constant=lambda _: None
        )
        self.wait()
        self._loaded = None
        # Not a daemon: an interpreter that exits waits for the thread.
        self._thread = threading.Thread(
            target=self._save, args=(dict(tensors), record), name=f'save-{record["step"]}'
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Blocks until no save is in progress.

        Raises:
            CheckpointWriteError: `max_failures` saves in a row have failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
        if self._failures >= self._max_failures:
            raise CheckpointWriteError(self._failure_message())

    def close(self) -> None:
        """Waits for the last save.

        Raises:
            CheckpointWriteError: it failed, and no later one will make up for it.
        """
        self.wait()
        if self._failures:
            raise CheckpointWriteError(self._failure_message())

    def path(self, step: int) -> Path:
        """Returns where the checkpoint of a step is, or would be."""
        return self.directory / f'step-{step:08d}'

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, ascending, without looking into them."""
        return [step for step, _ in numbered(self.directory, STEP)]

    def newest_good(self) -> int | None:
        """Returns the newest step whose checkpoint is right in every bit.

        A writer moves the damaged ones that it meets to quarantine. What was loaded is kept for
        the `read` that follows.

        Returns:
            None only where nothing was ever saved: the run may begin at step 0.

        Raises:
            ConfigError: there is something, but nothing that can be used.
        """
        self.wait()
        damaged = []
        for step in reversed(self.steps()):
            try:
                self._loaded = (step, *proof.load(self.path(step)))
            except CheckpointDamaged as error:
                if not self._writer and step not in self.steps():
                    return self.newest_good()  # The writer deleted it meanwhile: it has newer ones.
                damaged.append(step)
                logging.warning('The checkpoint of step %d is damaged: %s.', step, error)
                if self._writer:
                    self._set_aside(step)
                continue
            if damaged:
                logging.warning(
                    'Step %d is the newest good checkpoint; step %d was lost.', step, damaged[0]
                )
            self._newest = step
            return step
        aside = sorted(os.listdir(self._quarantine)) if self._quarantine.is_dir() else []
        if not damaged and not aside:
            return None
        names = aside if self._writer or not damaged else [self.path(s).name for s in damaged]
        raise ConfigError(
            f'{str(self.directory)!r} holds no checkpoint that can be used, only damaged ones '
            f'({", ".join(names)}), and a run that had come that far is not begun again at step 0 '
            'by accident. To begin again, use another model_dir or remove this folder.'
        )

    def newest_manifest(self) -> dict[str, Any]:
        """Returns the newest manifest that can be read, {} if there is none.

        The files it vouches for are not looked at: it says what the run is, not where it stands.
        """
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointDamaged, ConfigError):
                return proof.read_manifest(self.path(step))
        return {}

    def choose(self, step: int | Literal['best'] | None) -> int:
        """Returns `step` if there is a checkpoint of it; for None, the newest good one's.

        'best' is the one with the best metric, by `Keep.metric` and `Keep.mode` of the run.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if step == 'best':
            return self._best()
        steps = self.steps()
        if step in steps:
            return step
        newest = self.newest_good() if step is None else None
        if newest is not None:
            return newest
        which, held = ('', '') if step is None else (f' of step {step}', ', '.join(map(str, steps)))
        mend = f'It holds {held}.' if held else 'Train first, or correct --model_dir.'
        raise ConfigError(f'{str(self.directory)!r} holds no checkpoint{which}. {mend}')

    def _best(self) -> int:
        by = self.newest_manifest().get('keep') or {}
        found = []
        for step in self.steps():
            with contextlib.suppress(CheckpointDamaged, ConfigError):
                manifest = proof.read_manifest(self.path(step))
                value = manifest.get('metrics', {}).get(by.get('metric'))
                if value is not None:
                    found.append((value if by['mode'] == 'min' else -value, -step))
        if not found:
            raise ConfigError(
                f'No checkpoint in {str(self.directory)!r} has the metric {by.get("metric")!r}, so '
                'none is the best. Set Keep.metric and Keep.best for training.'
            )
        return -min(found)[1]  # Of equals the newest, which is also the one that is kept.

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the tensors (path -> array) and the manifest of a step, all verified.

        Raises:
            ConfigError: there is no such checkpoint, or a newer version wrote it.
            CheckpointDamaged: it does not hold what its manifest says.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded[0] == step:
            return loaded[1:]
        try:
            return proof.load(self.path(step))
        except CheckpointDamaged as error:
            steps = self.steps()
            if step in steps:
                raise CheckpointDamaged(
                    f'The checkpoint {str(self.path(step))!r} is damaged: {error}.'
                ) from error
            known = ', '.join(map(str, steps)) or 'none'
            raise ConfigError(
                f'There is no checkpoint of step {step} in {str(self.directory)!r}. There are: '
                f'{known}.'
            ) from error

    def go_back(self, to: int, at_most: int) -> int | None:
        """Makes an earlier good checkpoint the newest, by moving those behind it to quarantine.

        Args:
            to: the step to go back to, or before it.
            at_most: where there is no good checkpoint so early, the first up to here will do.

        Returns:
            The step of that checkpoint; None, and nothing is moved, if there is none.
        """
        assert self._writer, 'Only the chief goes back.'
        self.wait()
        steps = self.steps()
        early = [step for step in reversed(steps) if step <= to]
        for chosen in (*early, *(step for step in steps if to < step <= at_most)):
            try:
                self._loaded = (chosen, *proof.load(self.path(chosen)))
            except CheckpointDamaged as error:
                logging.warning('The checkpoint of step %d is damaged: %s.', chosen, error)
                continue
            for step in steps:
                if step > chosen:
                    self._set_aside(step)
            return chosen
        return None

    def clean(self) -> None:
        """Removes what killed saves and deletions have left; only under the directory's lock."""
        assert self._writer, 'Only the chief cleans.'
        self.wait()
        for pattern in ('.tmp-*', '.trash-*'):
            for path in self.directory.glob(pattern):
                logging.info('Removing %s, left by a killed process.', path)
                _remove(path)

    def _save(self, tensors: Mapping[str, Any], record: dict[str, Any]) -> None:
        step = record['step']
        begin = time.monotonic()
        try:
            record['state_sha256'] = state_sha256(tensors)
            record['created'] = datetime.fromtimestamp(self._clock(), timezone.utc).isoformat()
            self._write_with_retries(step, tensors, record)
            self._newest, self._failures = step, 0
            logging.info('Saved step %d in %.1f s.', step, time.monotonic() - begin)
            self._delete_old()
        except (OSError, tf.errors.OpError) as error:
            self._failures += 1
            self._failure = f'step {step}: {_reason(error)}'
            logging.error('Step %d was not saved: %s.', step, _reason(error))
        except BaseException as error:  # A mistake in the program: raised by the next wait().
            self._bug = error

    def _write_with_retries(self, step, tensors, record) -> None:
        for delay in (*RETRY_SECONDS, None):
            try:
                if not self._exists(step, record['state_sha256']):
                    proof.write(self.path(step), tensors, record)
                return
            except (OSError, tf.errors.OpError) as error:
                if delay is None:
                    raise
                logging.warning(
                    'Saving step %d failed, next try in %g s: %s.', step, delay, _reason(error)
                )
                time.sleep(delay)

    def _exists(self, step: int, sha256: str) -> bool:
        if step not in self.steps():
            return False
        try:
            _, manifest = proof.load(self.path(step))
        except CheckpointDamaged as error:
            logging.warning('The checkpoint of step %d is damaged: %s.', step, error)
            self._set_aside(step)
            return False
        if manifest['state_sha256'] == sha256:
            logging.info('Step %d is saved already.', step)
        else:
            logging.warning('Step %d is saved already, with another state; that one stays.', step)
        return True

    def _set_aside(self, step: int) -> None:
        source = self.path(step)
        self._quarantine.mkdir(exist_ok=True)
        target, copies = self._quarantine / source.name, 0
        while os.path.lexists(target):
            copies += 1
            target = self._quarantine / f'{source.name}-{copies}'
        os.rename(source, target)
        logging.warning('Moved %s to %s.', source, target)

    def _delete_old(self) -> None:
        infos = []
        for step in self.steps():
            try:
                infos.append(self._info(step))
            except (CheckpointDamaged, ConfigError, OSError) as error:
                logging.warning('Step %d is left alone: %s.', step, error)
        for step in to_delete(infos, self._keep, self._clock(), self._way_back):
            trash = self.directory / f'.trash-{self.path(step).name}-{os.getpid()}'
            try:
                # A reader sees a whole checkpoint or none.
                os.rename(self.path(step), trash)
            except OSError as error:
                logging.warning('Step %d could not be deleted: %s.', step, error)
            else:
                _remove(trash)

    def _info(self, step: int) -> Info:
        manifest = proof.read_manifest(self.path(step))
        metric = manifest.get('metrics', {}).get(self._keep.metric)
        return Info(step, datetime.fromisoformat(manifest['created']).timestamp(), metric)

    def _failure_message(self) -> str:
        # From memory: the directory may be what is broken.
        newest = 'no step' if self._newest is None else f'step {self._newest}'
        return (
            f'Saves that failed in a row: {self._failures}, the last of {self._failure}. The '
            f'newest good checkpoint in {str(self.directory)!r} is of {newest}. Free space there '
            'or mend the file system, then run again.'
        )


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        logging.warning('%s could not be removed: %s.', path, error)


def _reason(error: Exception) -> str:
    # TensorFlow's messages begin and end with names of its own inside.
    text = re.sub(r'\{\{.*?\}\}\s*|\s*\[Op:\w+\]', '', str(error))
    return text.splitlines()[0] if text else type(error).__name__
