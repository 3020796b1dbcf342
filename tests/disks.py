"""Small file systems, to be filled up."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(mount, size):
    """Mounts a file system of so many bytes ('200k', '4m') on a new directory; skips where this
    user may not."""
    mount.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'phalanx-test', str(mount)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('this user may not mount a file system')
    try:
        yield mount
    finally:
        subprocess.run(['umount', '--lazy', str(mount)], check=True)
