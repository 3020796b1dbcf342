import contextlib
import logging
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.cluster import Cluster
from trainer.errors import ConfigError
from trainer.meeting import meet


def free_addresses(count):
    """Addresses on loopback that are free now, below the ports of outgoing connections."""
    ports = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(('', port))
            ports += [port] if port not in ports else []
    return tuple(f'127.0.0.1:{port}' for port in ports)


def meet_all(addresses, *, digests=None, present=None, deadline_seconds=20.0):
    """Runs `meet` for the tasks in `present` at once; returns {index: error or None}."""
    present = range(len(addresses)) if present is None else present
    digests = digests or {}

    def task(index):
        try:
            return meet(
                Cluster(addresses, index),
                digest=digests.get(index, 'same'),
                deadline_seconds=deadline_seconds,
            )
        except ConfigError as error:
            return error.message

    with ThreadPoolExecutor(len(present)) as pool:
        return dict(zip(present, pool.map(task, present), strict=True))


def bind_strictly(address):
    host, port = address.split(':')
    with socket.socket() as server:  # Without SO_REUSEADDR: TIME_WAIT would be refused too.
        server.bind((host, int(port)))
        server.listen()


def test_a_cluster_of_one_meets_nobody_and_opens_nothing():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        address = f'127.0.0.1:{taken.getsockname()[1]}'
        meet(Cluster((address,)), digest='d', deadline_seconds=0.0)


def test_64_tasks_meet_quickly_and_leave_every_port_free():
    addresses = free_addresses(64)
    start = time.monotonic()
    assert set(meet_all(addresses).values()) == {None}
    assert time.monotonic() - start < 10
    for address in addresses:
        bind_strictly(address)


def test_workers_that_come_before_worker_0_wait_for_it():
    addresses = free_addresses(3)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(meet_all, addresses, present=(1, 2))
        time.sleep(0.5)
        assert meet_all(addresses, present=(0,)) == {0: None}
        assert early.result() == {1: None, 2: None}


def test_at_the_deadline_all_who_are_there_name_every_missing_worker(caplog):
    addresses = free_addresses(4)
    start = time.monotonic()
    errors = meet_all(addresses, present=(0, 2), deadline_seconds=1.0)
    assert 0.9 < time.monotonic() - start < 4
    assert errors[0] == errors[2]
    assert f'worker 1 ({addresses[1]}), worker 3 ({addresses[3]})' in errors[0]
    assert 'worker 2' not in errors[0]
    assert 'left again' not in caplog.text
    bind_strictly(addresses[0])


def test_workers_name_worker_0_when_it_never_comes():
    addresses = free_addresses(2)
    errors = meet_all(addresses, present=(1,), deadline_seconds=0.5)
    assert f'worker 0 ({addresses[0]}) has not come within 0.5 s' in errors[1]


def test_all_sides_name_the_workers_whose_configuration_differs():
    addresses = free_addresses(4)
    errors = meet_all(addresses, digests={1: 'x', 3: 'y'})
    assert len(set(errors.values())) == 1
    said = f'worker 1 ({addresses[1]}), worker 3 ({addresses[3]})'
    assert f'Another configuration than worker 0 has: {said}.' in errors[0]


@pytest.mark.parametrize('index', [0, 1])
def test_a_taken_port_is_reported_at_once(index):
    addresses = free_addresses(2)
    host, port = addresses[index].split(':')
    with socket.socket() as other:
        other.bind((host, int(port)))
        other.listen()
        errors = meet_all(addresses, present=(index,))
    assert f'worker {index} ({addresses[index]}) but cannot listen on port {port}' in errors[index]
    assert 'already in use' in errors[index]


def call(address, line):
    host, port = address.split(':')
    for _ in range(100):
        try:
            caller = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    caller.sendall(line)
    return caller


def test_stray_connections_are_logged_and_change_nothing(caplog):
    caplog.set_level(logging.INFO, 'absl')
    addresses = free_addresses(2)
    strays = []

    def intrude():
        for line in (
            b'GET / HTTP/1.1\r\n',
            b'{"index": 7, "digest": "same"}\n',
            b'{"index": [], "digest": "same"}\n',
            b'[' * 4000 + b'\n',
            b'x' * 100_000,
        ):
            strays.append(call(addresses[0], line))
        strays.append(call(addresses[0], b''))  # This one stays silent.

    with ThreadPoolExecutor(1) as pool:
        chief = pool.submit(meet_all, addresses, present=(0,))
        intrude()
        time.sleep(0.3)
        assert meet_all(addresses, present=(1,)) == {1: None}
        assert chief.result() == {0: None}
    for stray in strays:
        stray.close()
    ignored = [r for r in caplog.records if 'that is no worker' in r.getMessage()]
    assert len(ignored) == len(strays)
    assert not [r for r in caplog.records if r.name == 'asyncio']


@pytest.mark.parametrize('reset', [False, True])
def test_a_worker_that_leaves_while_waiting_can_come_again(reset):
    addresses = free_addresses(3)
    with ThreadPoolExecutor(2) as pool:
        chief = pool.submit(meet_all, addresses, present=(0,))
        leaver = call(addresses[0], b'{"index": 1, "digest": "same"}\n')
        time.sleep(0.2)
        if reset:  # As when the host loses its state: no orderly end of the connection.
            leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        leaver.close()
        time.sleep(0.2)
        rest = pool.submit(meet_all, addresses, present=(1, 2))
        assert chief.result() == {0: None}
        assert rest.result() == {1: None, 2: None}


def test_a_second_process_with_an_index_already_there_is_told_so():
    addresses = free_addresses(3)
    with ThreadPoolExecutor(3) as pool:
        chief = pool.submit(meet_all, addresses, present=(0,))
        first = pool.submit(meet_all, addresses, present=(1,))
        time.sleep(0.5)
        assert 'Two processes say that they are worker 1' in meet_all(addresses, present=(1,))[1]
        assert meet_all(addresses, present=(2,)) == {2: None}
        assert chief.result() == {0: None}
        assert first.result() == {1: None}


def test_worker_0_says_who_is_still_missing(caplog, monkeypatch):
    caplog.set_level(logging.INFO, 'absl')
    monkeypatch.setattr('trainer.meeting._PROGRESS_SECONDS', 0.2)
    addresses = free_addresses(2)
    meet_all(addresses, present=(0,), deadline_seconds=0.7)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith('Waiting')]
    assert len(lines) >= 2
    assert set(lines) == {f'Waiting for worker 1 ({addresses[1]}).'}


def test_a_program_that_is_not_worker_0_does_not_hold_a_worker_up():
    addresses = free_addresses(2)
    host, port = addresses[0].split(':')

    def serve(server):
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
            connection.close()

    with socket.create_server((host, int(port))) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        errors = meet_all(addresses, present=(1,), deadline_seconds=0.8)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert 'is not worker 0 of this job' in errors[1]
