"""A program that `phalanx run` has started, bound to the life of its launcher."""

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # prctl(2)


def command(module: str, *arguments: str) -> Sequence[str]:
    """Returns the command line that runs `python -m module` as a child of this process."""
    return [sys.executable, '-m', 'launch.child', str(os.getpid()), module, *arguments]


def main() -> None:
    """Runs the module that the command line names."""
    _, launcher, module, *arguments = sys.argv
    # Even a launcher that is killed with SIGKILL leaves no child behind: the kernel ends it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        sys.exit(1)  # It ended before the line above.
    # A handler in C, which answers while Python waits for TensorFlow. To a copy of the log's
    # descriptor: while TensorFlow is imported, that of stderr is another file.
    faulthandler.register(signal.SIGUSR2, file=os.dup(2), all_threads=True)
    # Slurm sends the other to all processes of a step; it is meant for the task.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
