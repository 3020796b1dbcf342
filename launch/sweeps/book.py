"""What a sweep is, and how its trials stand: `sweep.json`, written anew at every change."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.sweeps.plan import Plan
from trainer.errors import ConfigError
from trainer.gin_files import Script
from trainer.model_dir import ModelDir

FORMAT = 1
NAME = 'sweep.json'
CONFIG = 'config.json'
# Those that are not run again.
ENDED = ('finished', 'stopped', 'failed')


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        number: from 1 on.
        parameters: their values, as they are written in a .gin file.
        state: 'running', also while the sweep does not; 'finished'; 'stopped', because others did
            better; or 'failed'.
        step: steps taken, 0 while that is not known.
        value: of the metric, at the last evaluation; None if there is none.
        stop_at: the step after which it was decided to stop it, None if that was not.
        code: the exit code of its last start, None while it runs.
        reason: why it failed, or was stopped.
    """

    number: int
    parameters: Mapping[str, str]
    state: str = 'running'
    step: int = 0
    value: float | None = None
    stop_at: int | None = None
    code: int | None = None
    reason: str = ''

    @property
    def name(self) -> str:
        """What its directory is called."""
        return f'trial-{self.number:03d}'


class Book:
    """The trials of the sweep in a directory.

    Attributes:
        trials: those that have begun, by their numbers.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.trials: dict[int, Trial] = {}
        self._head: dict[str, Any] = {}

    @property
    def plan(self) -> Mapping[str, Any]:
        """What the sweep was begun with, see `Plan.describe`; and 'trials', how many."""
        return self._head['plan']

    @property
    def config(self) -> Path:
        """The configuration that all trials share, for `--gin_script`."""
        return self.directory / CONFIG

    def dirs(self, trial: Trial) -> ModelDir:
        """The directory of a trial's run."""
        return ModelDir(self.directory / trial.name)

    def begin(self, plan: Plan, script: Script) -> None:
        """Begins the sweep, or goes on with it.

        Raises:
            ConfigError: another sweep, or a run, is in the directory.
        """
        described = json.loads(json.dumps({**plan.describe(), 'trials': plan.trials}))
        config_sha256 = hashlib.sha256(script.text.encode()).hexdigest()
        if not (self.directory / NAME).exists():
            if (self.directory / 'ledger.jsonl').exists():
                raise ConfigError(
                    f'{str(self.directory)!r} holds a run. Give the sweep another --model_dir.'
                )
            script.save(self.config)
            self._head = {'format': FORMAT, 'plan': described, 'config_sha256': config_sha256}
            self._write()
            return
        self.load()
        begun = self.plan
        free = {'trials'}
        if all(t.value is None and t.state not in ENDED for t in self.trials.values()):
            free |= {'metric', 'mode'}  # As nothing was compared yet.
        for name in described:
            if name not in free and described[name] != begun[name]:
                raise ConfigError(
                    f'The sweep in {str(self.directory)!r} was begun with sweep.{name} = '
                    f'{begun[name]!r}, but now it is {described[name]!r}. Restore it, or give '
                    'another --model_dir. Only sweep.trials may grow.'
                )
        if described['trials'] < begun['trials']:
            raise ConfigError(
                f'The sweep in {str(self.directory)!r} was begun with sweep.trials = '
                f'{begun["trials"]}, but now there are {described["trials"]}. They may only grow.'
            )
        if config_sha256 != self._head['config_sha256']:
            raise ConfigError(
                f'The configuration of the sweep in {str(self.directory)!r} has changed since it '
                'was begun, so its trials could not be compared. Restore the .gin files and the '
                '--gin flags, or give another --model_dir.'
            )
        self._head['plan'] = described
        self._write()

    def load(self) -> None:
        """Reads what was written.

        Raises:
            ConfigError: there is none, it is damaged, or a newer version wrote it.
        """
        path = self.directory / NAME
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            trials = [Trial(**each) for each in content.pop('trials')]
            form = content['format']
        except FileNotFoundError:
            raise ConfigError(
                f'{str(self.directory)!r} holds no {NAME}. Name the --model_dir of a sweep.'
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f'{str(path)!r} is damaged: {error}.') from None
        if form != FORMAT:
            raise ConfigError(
                f'{str(path)!r} is in format {form}, of another Phalanx; this one reads {FORMAT}.'
            )
        self._head, self.trials = content, {each.number: each for each in trials}

    def note(self, trial: Trial, **changes: Any) -> Trial:
        """Writes down how a trial stands, and returns it."""
        changed = dataclasses.replace(trial, **changes)
        if self.trials.get(trial.number) != changed:
            self.trials[trial.number] = changed
            self._write()
        return changed

    def _write(self) -> None:
        trials = [dataclasses.asdict(each) for _, each in sorted(self.trials.items())]
        aside = self.directory / f'.{NAME}.tmp'
        with open(aside, 'w', encoding='utf-8') as file:
            file.write(json.dumps({**self._head, 'trials': trials}, indent=2) + '\n')
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.directory / NAME)


def is_sweep(directory: Path) -> bool:
    """Whether a sweep was begun in a directory."""
    return (directory / NAME).exists()
