"""One host's task of a Ray job: an actor that runs it as a process.

Ray's processes on the hosts need not find Phalanx: the driver sends this module by value. So it
imports nothing but the standard library and Ray.
"""

import contextlib
import os
import queue
import random
import socket
import subprocess
import tempfile
import threading

# Of the driver alone, and large.
_NOT_INHERITED = ('PHALANX_JOB',)
_LONGEST_PIECE = 1 << 16
_AFTER_THE_END_SECONDS = 2.0


class Host:
    """Runs one task, and answers the driver's calls, several at a time."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._said: queue.Queue[bytes | int] = queue.Queue()

    def prepare(self, config: str) -> tuple[str, str, int, int, str]:
        """Writes the configuration into a file of this host.

        Returns:
            The host's address as seen from others, its name, a port that nothing listens on, the
            number of this process, and the path of the file.
        """
        import ray

        descriptor, self._path = tempfile.mkstemp(prefix='phalanx-', suffix='.json')
        with open(descriptor, 'w', encoding='utf-8') as file:
            file.write(config)
        address = ray.util.get_node_ip_address()
        return address, socket.gethostname(), _free_port(), os.getpid(), self._path

    def start(self, command: list[str], environment: dict[str, str], directory: str) -> None:
        """Starts the task.

        Args:
            command: its command line.
            environment: variables beside those of this process.
            directory: where it runs; '' for that of this process.
        """
        # By this thread, which waits for it: a task that is bound to the life of this process is
        # ended by the kernel when the thread that has started it ends.
        arguments = (command, environment, directory)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def listen(self) -> bytes | int:
        """Returns what the task has said since the last call, or its exit code after all that.

        Waits until there is something.
        """
        piece = self._said.get()
        if isinstance(piece, int):
            self._said.put(piece)  # For who asks again, if this answer is lost on its way.
            return piece
        pieces = [piece]
        while sum(map(len, pieces)) < _LONGEST_PIECE:
            try:
                piece = self._said.get_nowait()
            except queue.Empty:
                break
            if isinstance(piece, int):
                self._said.put(piece)  # It stays the last one.
                break
            pieces.append(piece)
        return b''.join(pieces)

    def signal(self, number: int) -> None:
        """Sends a signal to the task."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _run(self, command: list[str], environment: dict[str, str], directory: str) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        try:
            self._process = subprocess.Popen(
                command,
                env={**kept, **environment},
                cwd=directory or None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except (OSError, ValueError) as error:
            self._said.put(f'phalanx: the task cannot be started: {error}\n'.encode())
            self._said.put(2)
            return
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        code = self._process.wait()
        # A process that the task has left behind may hold the pipe open.
        reader.join(_AFTER_THE_END_SECONDS)
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._said.put(code)

    def _read(self) -> None:
        while piece := os.read(self._process.stdout.fileno(), _LONGEST_PIECE):
            self._said.put(piece)


def _free_port() -> int:
    # Below those of outgoing connections.
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(('', port))
            return port
