"""The order in which examples were really read, one line a step, to prove that it is the same."""

import hashlib
import os
from pathlib import Path

import numpy as np


class SampleLog:
    """Appends to `samples.tsv`: the step, then the record numbers of its global batch.

    The file tells what made the current weights: on a resume, the lines of steps that a killed
    attempt took after its last checkpoint are dropped, for they will be taken again.

    Args:
        directory: of the run.
        resume_step: the step the run goes on from.
    """

    def __init__(self, directory: Path, *, resume_step: int):
        self._path = Path(directory) / 'samples.tsv'
        kept = self._path.with_suffix('.tmp')
        with open(kept, 'w') as out:
            if self._path.exists():
                with open(self._path) as lines:
                    for line in lines:
                        step = line.split('\t', 1)[0]
                        if line.endswith('\n') and int(step) < resume_step:
                            out.write(line)
        os.replace(kept, self._path)
        self._file = open(self._path, 'a')  # noqa: SIM115 (closed by close)

    def write(self, first_step: int, ids: np.ndarray) -> None:
        """Writes the record numbers, int64 [steps, global batch], of steps from `first_step` on."""
        for offset, row in enumerate(ids):
            self._file.write(f'{first_step + offset}\t{" ".join(map(str, row))}\n')
        self._file.flush()

    def sha256(self) -> str:
        """Returns the digest of the whole log."""
        return hashlib.sha256(self._path.read_bytes()).hexdigest()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
