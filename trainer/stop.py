"""A polite end: SIGTERM and Ctrl-C become a request that the loop answers at its next pause."""

import signal
import threading


class StopRequest:
    """Records that the process was asked to stop; a second signal ends it at once.

    Where the block ends normally although a signal has come, it came too late to be answered, and
    is raised again for whoever handles it outside.

    Use it as a context manager, after the strategy exists: TensorFlow's coordination service
    catches SIGTERM for itself when it starts.

    Attributes:
        requested: whether a signal has come.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._number: int | None = None
        self._previous: dict[int, object] = {}

    def _record(self, number, frame) -> None:
        del frame
        self.requested, self._number = True, number
        # The handler does nothing else: a save or a collective in here could wait for ever.
        signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, kind, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if self._number is not None and kind is None:
            signal.raise_signal(self._number)
