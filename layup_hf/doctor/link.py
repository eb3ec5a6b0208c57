"""How fast the network between two machines is: by one TCP connection, for a second at most."""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time

from ..fleet.secret import is_signed, sign

_PURPOSE = b"doctor link"
_PINGS = 20
_SECONDS = 0.5  # of sending
_MOST_BYTES = 256 * 2**20
_CHUNK = bytes(256 * 1024)
_BUFFER = 2**20  # what is on its way when sending ends
_COUNT = struct.Struct("<Q")
_SIGNATURE_BYTES = 16


class Sink:
    """Lets one peer that knows the secret measure the way here. Gone after `seconds`, whatever happens.

    Args:
        address: Of the interface that is used.
        token: The job's secret.
        seconds: How long it is there.
    """

    def __init__(self, address: str, token: bytes, seconds: float) -> None:
        self._listener = socket.create_server((address, 0))
        self._listener.settimeout(seconds)
        self._token, self._seconds = token, seconds
        self.place: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._serve, name="layup-doctor-sink", daemon=True).start()

    def _serve(self) -> None:
        end = time.monotonic() + self._seconds
        with self._listener, contextlib.suppress(OSError, EOFError):
            while time.monotonic() < end:
                connection, _ = self._listener.accept()
                with connection:
                    connection.settimeout(self._seconds)
                    if self._receive(connection):
                        return

    def _receive(self, connection: socket.socket) -> bool:
        """Whether this was the peer that is waited for."""
        if not is_signed(self._token, _exactly(connection, _SIGNATURE_BYTES), _PURPOSE):
            return False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PINGS):
            connection.sendall(_exactly(connection, 1))
        total, buffer = 0, bytearray(2**20)
        while total <= _MOST_BYTES + len(_CHUNK) and (got := connection.recv_into(buffer)):
            total += got
        connection.sendall(_COUNT.pack(total))
        return True


class Probe:
    """The other end of a `Sink`. A context manager.

    Args:
        place: Of the sink.
        token: The job's secret.
        seconds: How long anything may take.

    Raises:
        OSError: It is not reached; here, and in the methods, each of which is called once, in this order.
    """

    def __init__(self, place: tuple[str, int], token: bytes, seconds: float) -> None:
        self._connection = socket.create_connection(place, timeout=seconds)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sendall(sign(token, _PURPOSE))

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def round_trip(self) -> float:
        """Seconds there and back, the median of some."""
        times = []
        for _ in range(_PINGS):
            began = time.perf_counter()
            self._connection.sendall(b"?")
            self._answer(1)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def rate(self) -> float:
        """Bytes a second."""
        began, sent = time.perf_counter(), 0
        while time.perf_counter() - began < _SECONDS and sent < _MOST_BYTES:
            sent += self._connection.send(_CHUNK)
        self._connection.shutdown(socket.SHUT_WR)
        (received,) = _COUNT.unpack(self._answer(_COUNT.size))
        return received / (time.perf_counter() - began)

    def _answer(self, count: int) -> bytes:
        try:
            return _exactly(self._connection, count)
        except EOFError as error:
            raise ConnectionError("the other side has closed the connection") from error


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: There are fewer.
    """
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
