"""A wide-area network between the hosts of a test: packets come late, get lost, and queue.

This is the work of `tc netem`, which many kernels lack. Each host gets a TUN device, whose packets
a process of its own reads, holds back and hands on. Run as `python -m tests.cluster.router
NAMESPACE=ADDRESS ...` it is that process, and takes its orders as lines of JSON.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.hosts import Hosts

DEVICE = 'wan0'
# As on Ethernet, so that a share of the packets is a share of the bytes.
_MTU = 1500
_MOST_BYTES = 1 << 16
# A packet that would queue for longer is dropped, as by the buffer of a real router.
_LONGEST_QUEUE_SECONDS = 0.1
_PACKETS_A_TURN = 64
# From linux/if_tun.h and sched.h.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


@dataclasses.dataclass(frozen=True)
class Link:
    """What happens to the packets between any two hosts.

    Attributes:
        delay_seconds: of each packet, on its way there.
        loss: the share of the packets that get lost, from 0 to 1.
        bytes_per_second: that each host can send; 0 for no limit.
        cut: the numbers of hosts that nothing comes from or goes to.
    """

    delay_seconds: float = 0.0
    loss: float = 0.0
    bytes_per_second: float = 0.0
    cut: tuple[int, ...] = ()


class Network:
    """The network between some hosts, beside the one that they have.

    Args:
        hosts: that it connects.
        net: the first three numbers of their addresses in it.
    """

    def __init__(self, hosts: Hosts, *, net: str):
        self._hosts, self._net = hosts, net

    def address(self, index: int) -> str:
        """The address of a host, numbered from 1."""
        return f'{self._net}.{index}'

    def __enter__(self) -> 'Network':
        numbers = range(1, self._hosts.count + 1)
        ends = [f'{self._hosts.namespace(index)}={self.address(index)}' for index in numbers]
        self._router = subprocess.Popen(
            [sys.executable, '-m', 'tests.cluster.router', *ends],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not self._router.stdout.readline():
            raise AssertionError(f'the router ended with {self._router.wait()}')
        return self

    def __exit__(self, *exc: object) -> None:
        self._router.stdin.close()  # It ends then.
        self._router.wait()
        self._router.stdout.close()

    def set(self, link: Link) -> None:
        """Changes what happens to all packets that are sent from now on."""
        self._router.stdin.write(json.dumps(dataclasses.asdict(link)) + '\n')
        self._router.stdin.flush()
        self._router.stdout.readline()  # It has.


class _Router:
    """Hands packets from one TUN device to another."""

    def __init__(self, devices: dict[bytes, int]):
        """Prepares a router.

        Args:
            devices: the descriptor of each host's device, by its address.
        """
        self._devices, self._link = devices, Link()
        self._cut: set[bytes] = set()
        # Packets on their way: when they arrive, a number that keeps their order, where, what.
        self._underway: list[tuple[float, int, bytes, bytes]] = []
        self._count = 0
        self._free = dict.fromkeys(devices, 0.0)  # when a host can send its next packet

    def run(self) -> None:
        """Works until stdin is closed."""
        poll = select.poll()
        for descriptor in (*self._devices.values(), sys.stdin.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll(self._deliver()):
                if descriptor != sys.stdin.fileno():
                    self._take(descriptor)
                elif line := sys.stdin.readline():
                    self._obey(line)
                else:
                    return

    def _obey(self, line: str) -> None:
        self._link = Link(**json.loads(line))
        addresses = list(self._devices)
        self._cut = {addresses[index - 1] for index in self._link.cut}
        print('done', flush=True)

    def _take(self, descriptor: int) -> None:
        """Takes what a host sends."""
        for _ in range(_PACKETS_A_TURN):
            try:
                packet = os.read(descriptor, _MOST_BYTES)
            except BlockingIOError:
                return
            # IPv4: the version is in the first byte, the addresses are in the header.
            source, target = packet[12:16], packet[16:20]
            if packet[0] >> 4 != 4 or target not in self._devices:
                continue
            if source in self._cut or target in self._cut:
                continue
            if self._link.loss and random.random() < self._link.loss:
                continue
            at = now = time.monotonic()
            if self._link.bytes_per_second:
                at = max(now, self._free[source])
                if at - now > _LONGEST_QUEUE_SECONDS:
                    continue
                at += len(packet) / self._link.bytes_per_second
                self._free[source] = at
            self._count += 1
            arrival = (at + self._link.delay_seconds, self._count, target, packet)
            heapq.heappush(self._underway, arrival)

    def _deliver(self) -> float:
        """Hands over what has arrived; returns the milliseconds until the next arrival."""
        while self._underway and self._underway[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(self._underway)
            with contextlib.suppress(OSError):  # Its queue is full, or the host is gone.
                os.write(self._devices[target], packet)
        if not self._underway:
            return 1000.0
        return max(0.0, 1000 * (self._underway[0][0] - time.monotonic()))


def _open(namespace: str, address: str) -> int:
    """Makes the device of a host and returns its descriptor, which works from any namespace."""
    here = os.open('/proc/self/ns/net', os.O_RDONLY)
    there = os.open(f'/var/run/netns/{namespace}', os.O_RDONLY)
    _enter(there)
    try:
        descriptor = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
        name = struct.pack('16sH', DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, name)
        up = ['mtu', str(_MTU), 'txqueuelen', '2000', 'up']
        subprocess.run(['ip', 'addr', 'add', f'{address}/24', 'dev', DEVICE], check=True)
        subprocess.run(['ip', 'link', 'set', DEVICE, *up], check=True)
    finally:
        _enter(here)
        os.close(here)
        os.close(there)
    return descriptor


def _enter(namespace: int) -> None:
    # os.setns is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), 'setns')


def main() -> None:
    """Runs the router between the hosts that the command line names."""
    ends = [end.partition('=') for end in sys.argv[1:]]
    router = _Router({socket.inet_aton(address): _open(name, address) for name, _, address in ends})
    print('ready', flush=True)
    router.run()


if __name__ == '__main__':
    main()
