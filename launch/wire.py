"""What the tasks of a job say to each other: JSON objects, one a line, over TCP.

Neither side runs anything that it is told: a leader says when to start and whom to signal, and what
is started is in the agent's own command line. Still, whoever reaches the port can end the job, as
with TensorFlow's own servers: the network between the hosts must be trusted.
"""

import asyncio
import contextlib
import json
import socket

# Both sides say something at least so often, and believe the other lost after so long.
BEAT_SECONDS = 2.0
LOST_SECONDS = 20.0
# Signals that come to a task within so long of each other are one.
SAME_SIGNAL_SECONDS = 0.5
_LINE_BYTES = 2**24


class Lost(Exception):
    """The other side has gone, or says nothing that can be understood."""


class Wire:
    """One connection."""

    limit = _LINE_BYTES

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        connection = writer.get_extra_info('socket')
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def address(self) -> str:
        """Returns this side's own address, under which the other has reached it."""
        return _plain(self._writer.get_extra_info('sockname')[0])

    def peer(self) -> str:
        """Returns the address of the other side."""
        return _plain(self._writer.get_extra_info('peername')[0])

    def say(self, **message: object) -> None:
        """Sends a message; a lost connection shows when the next is waited for."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(json.dumps(message).encode() + b'\n')

    async def hear(self, seconds: float = LOST_SECONDS) -> dict:
        """Returns the next message.

        Raises:
            Lost: none came for so long, the connection has ended, or it is of another program.
        """
        try:
            line = await asyncio.wait_for(self._reader.readline(), seconds)
            if not line.endswith(b'\n'):
                raise Lost('it has gone')
            message = json.loads(line)
        except asyncio.TimeoutError:
            raise Lost(f'no word for {seconds:g} s') from None
        except OSError as error:
            raise Lost(str(error) or 'it has gone') from None
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Lost('it is another program')
        return message

    def close(self) -> None:
        """Ends the connection, at once."""
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.close()


def _plain(address: str) -> str:
    """Returns an address of IPv4 as such where a socket of IPv6 has taken the call."""
    return address.removeprefix('::ffff:')
