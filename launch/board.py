"""A TensorBoard beside a job, for this host's eyes only."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launch import child
from launch.local import free_ports


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Runs TensorBoard on a directory until the block is left; gives its address.

    It listens on loopback alone: whoever reaches TensorBoard can read all that is in `logdir`.
    """
    (port,) = free_ports(1)
    arguments = (f'--logdir={logdir}', '--host=127.0.0.1', f'--port={port}')
    process = subprocess.Popen(
        child.command('tensorboard.main', *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f'http://127.0.0.1:{port}/'
    finally:
        process.kill()
        process.wait()
