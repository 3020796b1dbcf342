"""Preprocessing that has learnt from data: what it has learnt is kept apart from what it does."""

import abc
from typing import Any

from trainer.data.source import Features


class Adapted(abc.ABC):
    """A function for `Data.preprocess` whose numbers were learnt from the training data.

    A run stores `state` in the manifest of every checkpoint. Who evaluates, exports or resumes
    takes the function from there, so that what was learnt once is what holds:

        preprocess = preprocess.with_state(manifest['preprocess'])
    """

    @property
    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """All that was learnt, as `json` writes it and reads it again without a difference.

        Asked for the first time it may take a pass over the data.
        """

    @property
    def resources(self) -> list:
        """Lookup tables and the like that it uses: what a SavedModel must be told to take along."""
        return []

    @abc.abstractmethod
    def with_state(self, state: dict[str, Any]) -> 'Adapted':
        """Returns the same function, with what was learnt earlier; no data is read.

        Raises:
            ConfigError: the state is of other features, or of other settings.
        """

    @abc.abstractmethod
    def __call__(self, features: Features) -> Features:
        """Maps a batch of features with graph operations, as `Data.preprocess` asks."""
