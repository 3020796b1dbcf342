"""Stores of objects for tests, each a process on loopback: S3, Google Cloud Storage, HTTP."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from launch.local import free_ports
from tests.processes import environment

BUCKET = 'bucket'
# No search for credentials on the network, and some that the stand-ins take.
CREDENTIALS = {
    'AWS_EC2_METADATA_DISABLED': 'true',
    'AWS_ACCESS_KEY_ID': 'test',
    'AWS_SECRET_ACCESS_KEY': 'test',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'NO_GCE_CHECK': 'true',
}


@contextlib.contextmanager
def s3(directory):
    """An S3-compatible server with the files of a directory in BUCKET; yields its port."""
    with _server(['moto_server', '-H', '127.0.0.1', '-p']) as port:
        _send(port, 'PUT', BUCKET)
        for path in _files(directory):
            _send(
                port, 'PUT', f'{BUCKET}/{urllib.parse.quote(path)}', (directory / path).read_bytes()
            )
        yield port


@contextlib.contextmanager
def gcs(directory):
    """An emulator of Google Cloud Storage with the files of a directory; yields its port."""
    command = ['gcp-storage-emulator', 'start', '--host=127.0.0.1', '--in-memory']
    with _server([*command, f'--default-bucket={BUCKET}', '--port']) as port:
        for path in _files(directory):
            query = urllib.parse.urlencode({'uploadType': 'media', 'name': path})
            _send(
                port,
                'POST',
                f'upload/storage/v1/b/{BUCKET}/o?{query}',
                (directory / path).read_bytes(),
            )
        yield port


@contextlib.contextmanager
def http(directory):
    """A server of files with ranges and listings; yields its port."""
    with _server([sys.executable, '-m', 'tests.servers', str(directory)]) as port:
        yield port


def clients(port):
    """Returns the variables that send each client to a port of this machine."""
    address = f'http://127.0.0.1:{port}'
    return {**CREDENTIALS, 'AWS_ENDPOINT_URL': address, 'STORAGE_EMULATOR_HOST': address}


def _files(directory):
    paths = (path for path in directory.rglob('*.*') if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    # What has been computed of the files is no part of them.
    return [name for name in names if not name.startswith('.')]


def _send(port, method, path, content=b''):
    request = urllib.request.Request(
        f'http://127.0.0.1:{port}/{path}',
        content,
        {'Content-Type': 'application/octet-stream'},  # Else the S3 server parses a form.
        method=method,
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


@contextlib.contextmanager
def _server(command):
    (port,) = free_ports(1)
    scripts = str(Path(sys.executable).parent)
    environ = environment(PATH=f'{scripts}:{os.environ["PATH"]}', **CREDENTIALS)
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    process = subprocess.Popen([*command, str(port)], env=environ, **quiet)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            assert process.poll() is None, f'{command} has ended'
            assert time.monotonic() < deadline, f'{command} does not listen'
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


if __name__ == '__main__':
    from aiohttp import web

    application = web.Application()
    application.router.add_static('/', sys.argv[1], show_index=True)
    web.run_app(application, host='127.0.0.1', port=int(sys.argv[2]), print=None)
