"""How workers reach what they share: keys and counters in the store of their job."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistNetworkError, Store

from . import channel
from .secret import SIGNATURE_BYTES, TOKEN_VARIABLE, given_token

logger = logging.getLogger(__name__)

WORKERS = "workers"
"""Counter: workers that are there."""

ANSWER = 60.0
"""Seconds for an answer of the store."""

_CONNECT, _ATTEMPTS = 10.0, 5
"""Seconds to connect, and how often that is tried."""

_READ_BYTES = 1 << 16
_POLL = 0.005  # seconds between two looks at a key that is waited for


class WrongSecret(ValueError):
    """The store of a job does not accept this worker, as it has another LAYUP_TOKEN."""


class JobStore(Store):
    """A connection to the store of a job. What may be done is what c10d's stores can do.

    Args:
        host: Address of the store.
        port: Its port.
        token: The job's secret; None: from LAYUP_TOKEN, or if that is unset, from the store, if that tells it.

    Attributes:
        token: The job's secret.

    Raises:
        WrongSecret: The job has another secret, or only one of the two has any.
        ConnectionError: Nothing answers there, or something else.
    """

    def __init__(self, host: str, port: int, token: bytes | None = None) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._patience = ANSWER
        for attempt in itertools.count(1):
            self._socket = socket.create_connection((host, port), timeout=_CONNECT)
            try:
                nonces = self._prove(token)
                break
            except BaseException as error:
                self._socket.close()
                # Where others flood the store with connections, it may have closed this one for the next.
                if attempt == _ATTEMPTS or not isinstance(error, ConnectionResetError):
                    raise
        self._socket.settimeout(ANSWER)
        session = channel.Session.of(self.token, nonces)
        self._requests, self._answers = session.requests, session.answers

    def _prove(self, token: bytes | None) -> bytes:
        """Prove to know the secret, and let the store prove it; the nonces of the session."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = channel.Hello.unpack(self._receive_some(b"", channel.HELLO_BYTES))
        self.token = _token_for(hello, token)
        message, nonces = channel.request(self.token, hello)
        self._socket.sendall(message)
        answer = self._receive_some(b"", channel.ANSWER_BYTES)
        if answer == channel.REFUSAL:
            raise WrongSecret(f"This worker has another secret than the job. Set {TOKEN_VARIABLE} to the job's.")
        channel.require_answer(self.token, nonces, answer)
        return nonces

    # ---- What c10d's stores can do ----

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key.encode(), _bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        if not keys:
            return []
        end = time.monotonic() + self._patience
        while not (values := self._ask(b"get", *(key.encode() for key in keys))):
            self._wait_until(end, keys)
        return list(values)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", key.encode(), str(amount).encode())[0])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"compare_set", key.encode(), _bytes(expected), _bytes(desired))[0]

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(b"check", *(key.encode() for key in keys))[0] == b"1"

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        end = time.monotonic() + (self._patience if timeout is None else timeout.total_seconds())
        while not self.check(keys):
            self._wait_until(end, keys)

    def delete_key(self, key: str) -> bool:
        return self._ask(b"delete", key.encode())[0] == b"1"

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    def set_timeout(self, timeout: timedelta) -> None:
        self._patience = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._patience)

    def has_extended_api(self) -> bool:
        return False

    def clone(self) -> JobStore:
        """A connection of its own to the same store."""
        host, port = self._socket.getpeername()[:2]
        return JobStore(host, port, self.token)

    # ---- The connection ----

    def _ask(self, *parts: bytes) -> Sequence[bytes]:
        """One round trip. For any thread.

        Raises:
            DistNetworkError: The store does not answer, or what answers is not the store.
        """
        with self._lock:
            try:
                self._socket.sendall(self._requests.seal(channel.pack(parts)))
                head = channel.LENGTH.size
                data = self._receive_some(b"", head)
                end = head + channel.LENGTH.unpack_from(data)[0]
                if end > head + channel.MOST_BYTES:
                    raise channel.Refused("An answer is too long.")
                data = self._receive_some(data, end + SIGNATURE_BYTES)
                self._answers.check(data[head:end], data[end:])
                return channel.unpack(data[head:end])
            except OSError as error:
                self._socket.close()  # nothing that comes later would be in its place
                raise DistNetworkError(f"The store of the job does not answer: {error}") from error

    def _receive_some(self, data: bytes, least: int) -> bytes:
        """Receive until there are so many bytes; there are more only where the other end breaks the order of talk."""
        while len(data) < least:
            part = self._socket.recv(max(_READ_BYTES, least - len(data)))
            if not part:
                raise ConnectionResetError("It has closed the connection.")
            data += part
        return data

    def _wait_until(self, end: float, keys: Sequence[str]) -> None:
        if time.monotonic() > end:
            raise DistNetworkError(f"Nobody has set {', '.join(keys)} in the store of the job in time.")
        time.sleep(_POLL)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _token_for(hello: channel.Hello, token: bytes | None) -> bytes:
    token = token if token is not None else given_token()
    if token is not None and (hello.token is None or hello.token == token):
        return token
    if token is None and hello.token is not None:
        return hello.token
    has_none = "a job that has none" if token is not None else "a worker that has none"
    raise WrongSecret(
        f"The secret in {TOKEN_VARIABLE} was given to only one of the job and this worker ({has_none}). Give all "
        "workers of a job the same secret."
    )
