"""Random reads by URL: records a second by latency, against a local file.

The store is an HTTP server on this machine, behind a proxy that makes every answer late. Each call
asks for 64 records of 10 kB at random, as a batch does; so do 1 thread, and then 4.

    python benchmarks/remote_reads.py
"""

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pairs  # noqa: F401

# isort: split
import numpy as np

from tests import faults, servers
from trainer.data import files

_SIZE, _LENGTH, _RECORDS = 200_000_000, 10_000, 64
_LATENCIES = (0.0, 0.01, 0.05, 0.2)
_SECONDS = 5.0


def rate(url: str, threads: int) -> float:
    """Returns how many records a second are read."""
    files.expand(url)
    counts, lock, end = [0], threading.Lock(), time.monotonic() + _SECONDS

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while time.monotonic() < end:
            offsets = rng.integers(0, _SIZE - _LENGTH, _RECORDS)
            files.read_ranges([files.Range(url, int(offset), _LENGTH) for offset in offsets])
            with lock:
                counts[0] += _RECORDS

    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    return counts[0] / (time.monotonic() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / 'shard.bin'
        path.write_bytes(np.random.default_rng(0).bytes(_SIZE))
        print(f'local file: {rate(str(path), 1):,.0f} records/s')
        with servers.http(Path(directory)) as port:
            for latency in _LATENCIES:
                with faults.Faults(port, latency=latency) as proxy:
                    place = f'http://127.0.0.1:{proxy.port}/shard.bin'
                    rates = [f'{rate(place, threads):,.0f}' for threads in (1, 4)]
                    found = ', '.join(rates)
                    print(f'{latency * 1000:.0f} ms late: {found} records/s', flush=True)


if __name__ == '__main__':
    main()
