"""The configuration of every attempt, written down, and what changed from one to the next."""

import difflib
from pathlib import Path

from absl import logging


def record_config(directory: Path, step: int, text: str) -> None:
    """Writes `config-<step>.gin` and logs how it differs from the record before it.

    A record that is there already is kept: a second start at the same step with another
    configuration gets a name of its own, `config-<step>-2.gin`.

    Args:
        directory: `model_dir/config`.
        step: the step the attempt starts at.
        text: the operative configuration.
    """
    records = sorted(directory.glob('config-*.gin'), key=lambda path: path.stat().st_mtime_ns)
    if records:
        previous = records[-1].read_text()
        if previous == text:
            return
        changes = difflib.unified_diff(
            previous.splitlines(), text.splitlines(), records[-1].name, 'now', n=0, lineterm=''
        )
        logging.info('the configuration has changed:\n%s', '\n'.join(changes))
    path, copy = directory / f'config-{step}.gin', 1
    while path.exists():
        copy += 1
        path = directory / f'config-{step}-{copy}.gin'
    path.write_text(text)
