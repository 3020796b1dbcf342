"""What a worker hangs in, from the stacks that `faulthandler` has written into its log."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

# Only the end of a log is looked at; a dump is some kilobytes.
_TAIL_BYTES = 200_000
_THREAD = re.compile(r'^(?:Current thread|Thread) 0x\w+.* \(most recent call first\):$')
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_TENSORFLOW = '/tensorflow/python/'
# Where TensorFlow calls a Python function of the input, in a thread of its own.
_CALLED_BY_INPUT = _TENSORFLOW + 'ops/script_ops.py'


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker is.

    Attributes:
        worker: its number.
        reads_data: whether it is in a Python function that the input calls.
        where: file, line and function, in words.
    """

    worker: int
    reads_data: bool
    where: str


def blame(logs: Sequence[Path]) -> Place | None:
    """Returns the worker that is in Python code, while the others wait in TensorFlow.

    Args:
        logs: of each worker, with the dump of its stacks at the end.
    """
    found = [_place(index, threads(log)) for index, log in enumerate(logs)]
    places = [place for place in found if place is not None]
    # If all are in Python, none of them waits for the others.
    return places[0] if places and (len(places) < len(logs) or len(logs) == 1) else None


def threads(log: Path) -> list[list[tuple[str, str, str]]]:
    """Returns the frames (file, line, function) of each thread of a log's last dump, innermost
    first; an empty list if there is no dump."""
    try:
        with open(log, 'rb') as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors='replace').splitlines()
    except OSError:
        return []  # Somebody has deleted it.
    found: list[list[tuple[str, str, str]]] = []
    for line in lines:
        if _THREAD.match(line):
            found.append([])
        elif found and (match := _FRAME.match(line)):
            found[-1].append(match.groups())
    # The thread that was asked, the main one, is written last.
    mains = [index for index, frames in enumerate(found) if _is_main(frames)]
    first = mains[-2] + 1 if len(mains) > 1 else 0
    return found[first : mains[-1] + 1] if mains else []


def _place(worker: int, stacks: Sequence[Sequence[tuple[str, str, str]]]) -> Place | None:
    for frames in stacks:
        file, line, function = frames[0] if frames else ('', '', '')
        called = any(each[0].endswith(_CALLED_BY_INPUT) for each in frames)
        outside = _TENSORFLOW not in file
        if outside and (called or _is_main(frames)):
            return Place(worker, called, f'{file}, line {line}, in {function}')
    return None


def _is_main(frames: Sequence[tuple[str, str, str]]) -> bool:
    return bool(frames) and frames[-1][2] in ('_run_module_as_main', '<module>')
