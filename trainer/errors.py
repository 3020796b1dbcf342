"""The ways in which a run ends before its time, each with its own exit code."""

import difflib
import re
from collections.abc import Iterable

_WEB_URL = re.compile(
    r'\b(https?://)(?:[^\s/?#"\']*@)?([^\s?#"\'<>]*)(\?[^\s"\'<>]*?(?=[,.;:)]*(?:[\s"\'<>]|$)))?'
)


def shown(text: str) -> str:
    """Returns a text with the URLs of the web in it without passwords, keys and signatures."""
    return _WEB_URL.sub(lambda url: f'{url[1]}{url[2]}{"?..." if url[3] else ""}', text)


class ConfigError(ValueError):
    """A mistake in flags, configuration, data or environment that a retry cannot mend.

    The program prints `message` alone, without a traceback, and exits with 2. The message says
    what is wrong, the value, the nearest valid name if there is one, and how to mend it.
    """

    exit_code = 2
    # AutoGraph leaves it as it is, instead of raising a StagingError in its place.
    ag_pass_through = True

    def __init__(self, message: str):
        # Gin wraps exceptions and appends to str(error); this stays what was said.
        self.message = shown(message)
        super().__init__(self.message)


class Preempted(Exception):
    """The run was asked to stop and has saved its state; run it again to go on (exit code 75)."""

    exit_code = 75


class Diverged(RuntimeError):
    """The training produced too many bad steps in a row (exit code 1).

    Attributes:
        first_step: the first of them, counted from 0.
        end_step: the one after the last.
    """

    exit_code = 1

    def __init__(self, message: str, *, first_step: int, end_step: int):
        super().__init__(message)
        self.first_step, self.end_step = first_step, end_step


class WriteError(RuntimeError):
    """What a run must leave behind could not be written (exit code 1)."""

    exit_code = 1


class ReadError(OSError):
    """Data are out of reach, however often they were asked for (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(shown(message))


class BadRecord(ValueError):
    """A record of the data is damaged. Raised where records are read; says what is wrong with it.

    TensorFlow turns it into InvalidArgumentError, which its own operations raise for the same.
    """

    def __init__(self, message: str):
        super().__init__(shown(message))


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the name most like `name`, or '' when none is close."""
    # What differs in case alone is the nearest there is.
    spelt = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.6)
    return f' Did you mean {spelt[found[0]]!r}?' if found else ''
