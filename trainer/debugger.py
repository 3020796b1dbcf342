"""A debugger for one step, in the thread of whichever replica comes first."""

import bdb
import inspect
import os
import pdb
import threading
from collections.abc import Callable

import keras


def in_debugger(model: keras.Model, run: Callable, step: int) -> Callable:
    """Returns `run`, which stops at its beginning, and again where the model is called.

    Args:
        model: whose `call`, if it is not Keras's own, gets a breakpoint.
        run: what to debug; returns something that is not None.
        step: which is announced.

    Returns:
        A function that does the same, or raises `bdb.BdbQuit` where the user quits.
    """
    debugger = pdb.Pdb()
    code = inspect.unwrap(type(model).call).__code__
    # Of a Sequential or Functional model the call is Keras's, and no code to look at.
    own = not code.co_filename.startswith(os.path.dirname(keras.__file__) + os.sep)
    if own:
        debugger.set_break(
            code.co_filename, code.co_firstlineno, temporary=True, funcname=code.co_name
        )

    def debugged(*args):
        then = "goes to the model's call" if own else 'goes on; set breakpoints with `b FILE:LINE`'
        print(f'pdb stops before step {step}; `c` {then}', flush=True)
        # The threads in which several replicas run are started within.
        threading.settrace(debugger.trace_dispatch)
        try:
            result = debugger.runcall(run, *args)
        finally:
            threading.settrace(None)
        if result is None:
            raise bdb.BdbQuit  # Which pdb keeps to itself.
        return result

    return debugged
