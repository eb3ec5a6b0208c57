"""The process that holds the store of a job: keys and counters for all workers, and for nobody else.

Rank 0 starts it, apart from itself, so that the store outlives every worker and its launcher. It imports nothing but
the standard library, and begins to serve in no time. It ends when the last worker has gone, or if none comes.

c10d's own store would do as well, were it not open to everybody who reaches its port: whoever does can change counters,
delete keys and fill the memory of its process.
"""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence

from . import channel

_PROOF_SECONDS = 10.0
"""For a client to prove that it knows the secret."""

_MOST_UNPROVEN = 128
"""Connections that have not proved anything yet: one more closes the oldest."""

_LOOK_SECONDS = 0.5
_LINGER_SECONDS = 5.0
"""After the last client has gone: one may come again."""

_READ_BYTES = 1 << 16

_MOST_COUNT = (1 << 63) - 1
_DIGITS = 20  # more than such a number has, with its sign


class Values:
    """Keys and values in memory, with the operations of c10d's stores. All in bytes; a counter is a decimal number.

    Who counts is never stopped by what somebody else has written: a counter stays a number, and stays one of 64 bits.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._counters: set[bytes] = set()

    def set(self, key: bytes, value: bytes) -> Sequence[bytes]:
        if key in self._counters:
            value = _decimal(int(value))  # who wants to write anything else is refused
        self._values[key] = value
        return ()

    def get(self, *keys: bytes) -> Sequence[bytes]:
        """The values in the order of the keys; nothing at all while one is missing."""
        if not all(key in self._values for key in keys):
            return ()
        return [self._values[key] for key in keys]

    def add(self, key: bytes, amount: bytes) -> Sequence[bytes]:
        if key not in self._counters:
            self._counters.add(key)
            if not self._values.get(key, b"").removeprefix(b"-").isdigit():
                self._values[key] = b"0"
        value = _decimal(int(self._values.get(key, b"0")[:_DIGITS]) + int(amount[:_DIGITS]))
        self._values[key] = value
        return (value,)

    def compare_set(self, key: bytes, expected: bytes, desired: bytes) -> Sequence[bytes]:
        value = self._values.get(key)
        if value == expected or (value is None and not expected):
            self.set(key, desired)
            value = desired
        return (expected if value is None else value,)

    def check(self, *keys: bytes) -> Sequence[bytes]:
        return (b"1" if all(key in self._values for key in keys) else b"0",)

    def delete(self, key: bytes) -> Sequence[bytes]:
        return (b"0" if self._values.pop(key, None) is None else b"1",)

    def count(self) -> Sequence[bytes]:
        return (str(len(self._values)).encode(),)

    def operations(self) -> dict[bytes, Callable[..., Sequence[bytes]]]:
        """By the names that clients give."""
        known = (self.set, self.get, self.add, self.compare_set, self.check, self.delete, self.count)
        return {operation.__name__.encode(): operation for operation in known}


def _decimal(number: int) -> bytes:
    """A counter's value, which goes no further than c10d's."""
    return str(max(-_MOST_COUNT, min(number, _MOST_COUNT))).encode()


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket, token: bytes, hello: channel.Hello) -> None:
        self._token, self._hello = token, hello
        self._session: channel.Session | None = None
        self._received, self._unsent = bytearray(), bytearray()
        self.connection, self.since = connection, time.monotonic()
        connection.setblocking(False)
        for level, name, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # a machine that has lost its power says no goodbye
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
        ):
            connection.setsockopt(level, name, value)
        self.send(hello.pack())

    @property
    def is_proven(self) -> bool:
        """Whether it has proved to know the secret."""
        return self._session is not None

    @property
    def has_unsent(self) -> bool:
        """Whether the connection did not take all that there is to say."""
        return bool(self._unsent)

    def send(self, data: bytes = b"") -> None:
        """Send what there is, as far as the connection takes it."""
        self._unsent += data
        with contextlib.suppress(BlockingIOError):
            del self._unsent[: self.connection.send(self._unsent)]

    def serve(self, operations: dict[bytes, Callable[..., Sequence[bytes]]]) -> None:
        """Answer what has come.

        Raises:
            OSError: The connection is over, or the other end says what cannot be.
        """
        with contextlib.suppress(BlockingIOError):
            data = self.connection.recv(_READ_BYTES)
            if not data:
                raise channel.Refused("The client has gone.")
            self._received += data
        if self._session is None:
            self._be_proven()
        while self._session is not None and (payload := self._next_message(self._session)) is not None:
            operation, *parts = channel.unpack(payload)
            answer = operations[operation](*parts) if operation in operations else ()
            self.send(self._session.answers.seal(channel.pack(answer)))

    def _be_proven(self) -> None:
        size = channel.REQUEST_BYTES
        if len(self._received) < size:
            return
        nonces = channel.nonces_of(self._token, self._hello, bytes(self._received[:size]))
        if nonces is None:
            self.send(channel.REFUSAL)
            raise channel.Refused("The client does not know the secret.")
        del self._received[:size]
        self._session = channel.Session.of(self._token, nonces)
        self.send(channel.answer(self._token, nonces))

    def _next_message(self, session: channel.Session) -> bytes | None:
        head = channel.LENGTH.size
        if len(self._received) < head:
            return None
        end = head + channel.LENGTH.unpack_from(self._received)[0]
        if end > head + channel.MOST_BYTES:
            raise channel.Refused("A message is too long.")
        if len(self._received) < end + channel.SIGNATURE_BYTES:
            return None
        payload = bytes(self._received[head:end])
        session.requests.check(payload, bytes(self._received[end : end + channel.SIGNATURE_BYTES]))
        del self._received[: end + channel.SIGNATURE_BYTES]
        return payload


class Keeper:
    """Serves a store to clients that know the job's secret.

    Args:
        listener: A socket that listens already.
        token: The secret.
        is_open: No secret was given to the job: this one was drawn, and whoever connects is told it.
    """

    def __init__(self, listener: socket.socket, token: bytes, is_open: bool) -> None:
        self._listener, self._token, self._is_open = listener, token, is_open
        self._operations = Values().operations()
        self._clients: list[Client] = []
        self._selector = selectors.DefaultSelector()
        listener.listen(1024)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self, idle_seconds: float) -> None:
        """Serve until the last client has gone, or none has come for so long."""
        patience, since = idle_seconds, time.monotonic()
        while time.monotonic() - since < patience:
            for key, events in self._selector.select(_LOOK_SECONDS):
                if key.data is None:
                    self._accept()
                elif key.data in self._clients:  # it may have been closed meanwhile
                    self._mind(key.data, events)
            self._close_unproven(time.monotonic() - _PROOF_SECONDS)
            if any(client.is_proven for client in self._clients):
                patience, since = _LINGER_SECONDS, time.monotonic()

    def _accept(self) -> None:
        connection = None
        try:
            connection, _ = self._listener.accept()
            client = Client(connection, self._token, channel.Hello.make(self._token if self._is_open else None))
        except OSError:  # it has gone already, or there are too many
            if connection is not None:
                connection.close()
            self._close_unproven(most=_MOST_UNPROVEN // 2)
            return
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._close_unproven(most=_MOST_UNPROVEN)

    def _mind(self, client: Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                client.send()
            if events & selectors.EVENT_READ:
                client.serve(self._operations)
        except (OSError, ValueError, TypeError):
            self._close(client)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.has_unsent else 0)
        if self._selector.get_key(client.connection).events != wanted:
            self._selector.modify(client.connection, wanted, client)

    def _close_unproven(self, before: float | None = None, most: int = _MOST_UNPROVEN) -> None:
        """Close those who have not proved anything: who came before a time, and the oldest of too many."""
        unproven = [client for client in self._clients if not client.is_proven]
        for number, client in enumerate(unproven):
            if len(unproven) - number > most or (before is not None and client.since < before):
                self._close(client)

    def _close(self, client: Client) -> None:
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()


def main() -> None:
    """Keep a store.

    Arguments: the listening socket, seconds to wait for the first client, "open" if everybody is told the secret.
    Standard input: the secret.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each worker has several connections
    token = sys.stdin.buffer.read(channel.TOKEN_BYTES)
    Keeper(socket.socket(fileno=int(sys.argv[1])), token, is_open=sys.argv[3] == "open").serve(float(sys.argv[2]))
