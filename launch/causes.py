"""Why an attempt failed, in a sentence: from exit codes and from the last words of the workers."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path

_TAIL_BYTES = 50_000
# The last line of a traceback, or what the program says of an error that it knows.
_ERROR = re.compile(r'^(?:error: .+|(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Diverged)(?:: .*)?)$')
# What TensorFlow says on a worker whose peer has gone: it is not the cause.
_OF_A_PEER = re.compile(
    r'Collective ops is aborted|oordination service|Connection re(?:set|fused)|Socket closed|'
    r'UnavailableError|task .* unavailable'
)
_SIGNALS = {
    signal.SIGKILL: 'somebody killed it, or the kernel did for lack of memory; `dmesg` tells',
    signal.SIGSEGV: 'a crash in native code: a library, a driver or the hardware',
    signal.SIGABRT: 'native code gave up; its log says why',
    signal.SIGBUS: 'a file that was mapped into memory has become shorter, or /dev/shm is full',
    signal.SIGILL: 'TensorFlow or a library was built for another processor',
}


def likely_cause(worker: int, code: int | None, logs: Sequence[Path]) -> str:
    """Returns the likely cause, or '' if there is none to be seen.

    Args:
        worker: the one that ended first, as far as that could be told.
        code: its exit code, negative for a signal; None if it did not end by itself.
        logs: of all workers of the attempt.
    """
    if code is not None and -code in _SIGNALS:
        return _SIGNALS[signal.Signals(-code)]
    # It may have ended only because of another one.
    for index in sorted(range(len(logs)), key=lambda index: index != worker):
        if error := _last_error(logs[index]):
            return error if index == worker else f'worker {index}: {error}'
    return ''


def _last_error(log: Path) -> str:
    try:
        with open(log, 'rb') as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors='replace').splitlines()
    except OSError:
        return ''
    for line in reversed(lines):
        if _ERROR.match(line) and not _OF_A_PEER.search(line):
            return line
    return ''
