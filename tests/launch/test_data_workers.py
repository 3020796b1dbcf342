"""Data workers of a job are replaced when they can be of no use any more."""

import socket
import sys
import time

import pytest

from launch import child, data_workers
from launch.data_workers import VARIABLE, DataWorkers
from launch.display import Display
from launch.ledger import Ledger
from launch.local import free_ports

# Listens as a data worker does, whose libraries take seconds to load.
LISTEN = """
import signal, socket, sys

address = next(a for a in sys.argv if a.startswith('--listen=')).partition('=')[2]
host, port = address.split(':')
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    server.bind((host, int(port)))
except OSError:
    sys.exit(2)
server.listen()
print('listening', flush=True)
signal.pause()
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two data workers, not yet started."""
    command = [sys.executable, '-c', LISTEN]
    monkeypatch.setattr(child, 'command', lambda module, *flags: [*command, *flags])
    ledger = Ledger(tmp_path / 'ledger.jsonl')
    with DataWorkers([], 2, tmp_path, ledger=ledger, display=Display('none')) as processes:
        yield processes


def until(condition):
    end = time.monotonic() + 30
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


def ports(variables):
    return [int(address.rpartition(':')[2]) for address in variables[VARIABLE].split(',')]


def listening(tmp_path):
    return sum(log.read_text().count('listening') for log in tmp_path.glob('data-worker-?.log'))


def test_a_port_that_was_taken_from_the_beginning_is_left_for_another(two, tmp_path, monkeypatch):
    with socket.socket() as taker:
        taker.bind(('127.0.0.1', 0))
        taker.listen()
        taken = taker.getsockname()[1]
        with monkeypatch.context() as patch:
            patch.setattr(data_workers, 'free_ports', lambda count: [free_ports(1)[0], taken])
            before = ports(two.begin())
        assert before[1] == taken
        lost = until(lambda: two.look() or two.lost())
        assert (lost.worker, lost.mistake) == (1, False)
        assert lost.reason == f'port {taken} of data worker 1 was taken by another process'
        after = ports(two.begin())
        assert (after[0], after[1] == taken) == (before[0], False)
        until(lambda: listening(tmp_path) == 2)
        two.look()
        assert two.lost() is None


def test_one_that_may_hang_is_replaced_for_the_next_attempt(two, tmp_path):
    two.begin()
    until(lambda: listening(tmp_path) == 2)
    two.begin()  # As they all run, nothing is done.
    two.doubt()
    two.look()
    assert listening(tmp_path) == 2
    two.begin()
    until(lambda: listening(tmp_path) == 4)
    two.look()
    assert not (tmp_path / 'ledger.jsonl').exists()  # None has died.
    assert two.lost() is None
