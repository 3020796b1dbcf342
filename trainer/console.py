"""What reaches the screen of all that the program and its libraries say."""

import contextlib
import logging as std_logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

_TALKATIVE = {'tensorflow', 'botocore', 'aiobotocore'}


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Keeps back what TensorFlow's C++ code prints when it is loaded, unless loading fails."""
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(screen, kept.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def set_up_logging(verbosity: int) -> None:
    """Gives each message one short line, and leaves out what is news to nobody.

    Args:
        verbosity: absl's; with details, above 0, nothing is left out.
    """
    handler = logging.get_absl_handler()
    handler.setFormatter(
        std_logging.Formatter('%(asctime)s %(levelname).1s %(message)s', '%H:%M:%S')
    )
    if verbosity <= logging.INFO:
        handler.addFilter(_is_ours_or_a_warning)


def _is_ours_or_a_warning(record: std_logging.LogRecord) -> bool:
    """Leaves out the news of libraries, which are about their insides."""
    return record.levelno > std_logging.INFO or not _TALKATIVE & {*Path(record.pathname).parts}
