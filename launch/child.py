"""One worker of `phalanx run`: the trainer's program, bound to the life of its launcher."""

import ctypes
import faulthandler
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(argv: list[str]) -> int:
    """Runs the trainer; `argv` is the launcher's process id and then the trainer's flags."""
    launcher, *flags = argv
    # Even a launcher that is killed with SIGKILL leaves no worker behind: the kernel ends it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        return 1  # It ended before the line above.
    # A handler in C, which answers while Python waits for TensorFlow.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    from trainer.__main__ import main as trainer

    return trainer(flags)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
