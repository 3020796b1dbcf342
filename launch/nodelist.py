"""Node lists as Slurm writes them: 'node[1-3,7],gpu-a[01-03]-ib'."""

import itertools
import re
from collections.abc import Iterator

from trainer.errors import ConfigError

_MOST = 1_000_000
# Names and brackets with numbers in them, and nothing else.
_ITEM = re.compile(r'(?:[^][,\s]|\[[0-9,-]+\])+')
_RANGE = re.compile(r'([0-9]{1,18})(?:-([0-9]{1,18}))?')


def expand(text: str) -> list[str]:
    """Returns the names in a node list, in Slurm's order, which is that of its tasks.

    The numbers of several brackets in one name are combined, the last changing first.

    Args:
        text: a list as in SLURM_JOB_NODELIST; '' has no names.

    Raises:
        ConfigError: the list is malformed, or of more than a million names.
    """
    names: list[str] = []
    for item in _items(text):
        parts = [_numbers(text, part) for part in re.split(r'(\[[^]]*\])', item) if part]
        count = 1
        for part in parts:
            count *= len(part)
        _check_count(text, len(names) + count)
        names += map(''.join, itertools.product(*parts))
    return names


def _items(text: str) -> Iterator[str]:
    """Splits a list at those commas that are in no bracket."""
    at, text = 0, text.strip()
    while at < len(text):
        match = _ITEM.match(text, at)
        if not match:
            raise _malformed(text, f'a name is missing at {text[at : at + 20]!r}')
        yield match[0]
        at = match.end()
        if at < len(text):
            if text[at] != ',' or at + 1 == len(text):
                raise _malformed(text, f'{text[at : at + 20]!r} is out of place')
            at += 1


def _numbers(text: str, part: str) -> list[str]:
    """Returns what a bracket stands for; what is no bracket stands for itself."""
    if not part.startswith('['):
        return [part]
    numbers: list[str] = []
    for each in part[1:-1].split(','):
        match = _RANGE.fullmatch(each)
        if not match:
            raise _malformed(text, f'{each!r} in {part[:40]} is no number and no range')
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise _malformed(text, f'the range {each} runs backwards')
        _check_count(text, len(numbers) + int(last) - int(first) + 1)
        # Numbers are filled with zeros to the width of the first.
        numbers += [f'{number:0{len(first)}}' for number in range(int(first), int(last) + 1)]
    return numbers


def _check_count(text: str, count: int) -> None:
    if count > _MOST:
        raise ConfigError(f'The node list {_short(text)!r} has more than {_MOST:,} names.')


def _malformed(text: str, why: str) -> ConfigError:
    return ConfigError(
        f'{_short(text)!r} is no node list: {why}. A right one: node[1-3,7],gpu-a[01-03]-ib'
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else f'{text[:77]}...'
