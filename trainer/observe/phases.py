"""What this worker does just now, a line in a file for each change, for the launcher to watch.

Without a launcher there is no file and nothing happens. A line is a JSON object: 'time' (seconds
since 1970), 'phase' (one of `PHASES`), and what else is known, such as 'step'.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence

# The environment variable with the name of the file.
VARIABLE = 'PHALANX_PHASES'
PHASES = (
    'starting',
    'indexing',
    'building',
    'restoring',
    'compiling',
    'stepping',
    'evaluating',
    'saving',
    'exporting',
    'ending',
    'serving',
)


def enter(phase: str, **figures: float | Sequence[str]) -> None:
    """Says that a phase begins or, in the phase that is on, that there is progress.

    Args:
        phase: one of `PHASES`.
        **figures: the step, measurements of the time since the line before, what is measured.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = json.dumps({'time': round(time.time(), 3), 'phase': phase, **figures})
    # To be watched is no reason to fail, least of all on a full disk.
    with contextlib.suppress(OSError), open(path, 'a', encoding='utf-8') as file:
        file.write(line + '\n')


@contextlib.contextmanager
def within_steps(phase: str, **figures: float) -> Iterator[None]:
    """Holds a phase between two calls of the compiled step."""
    enter(phase, **figures)
    yield
    enter('stepping')
