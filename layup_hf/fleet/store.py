"""How workers reach what they share: keys and counters in the store of their job."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore

from . import channel
from .secret import SIGNATURE_BYTES, TOKEN_VARIABLE, given_token, is_signed, sign

logger = logging.getLogger(__name__)

WORKERS = "workers"
"""Counter: workers that are there."""

_PREFIX = "layup_hf"
_JOB = "job"
_ANSWER = 60.0
"""Seconds for an answer of the store."""

_CONNECT, _ATTEMPTS = 10.0, 5
"""Seconds to connect, and how often that is tried."""

_READ_BYTES = 1 << 16
_POLL = 0.005  # seconds between two looks at a key that is waited for

_START_KEEPER = """
import importlib, sys, types
package = types.ModuleType("layup_hf")  # an empty one: the real one brings torch, seconds and memory
package.__path__ = [sys.argv.pop(1)]
sys.modules["layup_hf"] = package
importlib.import_module("layup_hf.fleet.keeper").main()
"""


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
        self._patience = _ANSWER
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
        self._socket.settimeout(_ANSWER)
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


@dataclass(frozen=True)
class Job:
    """A job of several workers, as its store tells it.

    Attributes:
        host: Address of the store.
        port: Its port.
        workers: How many workers the job was started with: the steps of so many make one `global_step`.
        run: Unique name.
        lease_seconds: A worker that gives no sign of life for so long is done without.
        adapts: Or for longer, if its signs of life come late.
    """

    host: str
    port: int
    workers: int
    run: str
    lease_seconds: float
    adapts: bool = False

    def connect(self, token: bytes | None = None) -> JobStore:
        """A connection of its own; see `JobStore`.

        Raises:
            ValueError: This worker has another secret.
            ConnectionError: The store does not answer.
        """
        try:
            return JobStore(self.host, self.port, token)
        except (OSError, DistNetworkError) as error:
            place = f"{self.host}:{self.port}"
            raise ConnectionError(f"The store of the job at {place} does not answer: {error}") from error

    def announce(self, token: bytes, launcher: Store | None) -> None:
        """Say in the job's own store, and signed in the launcher's, what a worker needs that wants to join."""
        text = json.dumps(asdict(self))
        self.connect(token).set(_JOB, text)
        if launcher is not None:
            launcher.set(_JOB, text + sign(token, b"job", text.encode()).hex())

    @classmethod
    def find(cls, launcher: Store) -> Job | None:
        """What has been announced in the launcher's store, if anything, by who knows the secret.

        The launcher's store is open to everybody who reaches it: what is in it is believed if it is signed. A job
        without a given secret tells it at its own place, and there it is checked.
        """
        if not launcher.check([_JOB]):
            return None
        data, digits = launcher.get(_JOB), 2 * SIGNATURE_BYTES
        try:
            job = cls._of(json.loads(data[:-digits]))
            signature = bytes.fromhex(data[-digits:].decode())
            token = given_token() or job.connect().token
            if is_signed(token, signature, b"job", data[:-digits]):
                return job
        except ConnectionError:
            return None  # it has ended
        except WrongSecret:
            raise
        except (ValueError, TypeError, RecursionError):
            pass
        logger.warning(
            f"LayUp: what the launcher's store says of a running job is not signed with its secret ({TOKEN_VARIABLE}), "
            "and is not believed."
        )
        return None

    @classmethod
    def _of(cls, fields: Any) -> Job:
        """Of what was read; anything but a job is a `TypeError` or `ValueError`."""
        job = cls(**fields)
        kinds = {"host": str, "port": int, "workers": int, "run": str, "lease_seconds": float, "adapts": bool}
        if any(type(getattr(job, name)) is not kind for name, kind in kinds.items()):
            raise TypeError("This is no job.")
        if not (0 < job.port < 65536 and job.workers > 0 and job.lease_seconds > 0):
            raise ValueError("This is no job.")
        return job

    def is_running(self) -> bool:
        """Whether it has workers."""
        try:
            return self.connect().add(WORKERS, 0) > 0
        except OSError:
            return False

    @classmethod
    def at(cls, place: str) -> Job:
        """The job whose store is at HOST:PORT.

        Raises:
            ValueError: This is no place, there is no such job, or it has another secret.
        """
        host, colon, port = place.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError(
                f"join={place!r} is not the address of a job's store: give HOST:PORT, as the job's log says."
            )
        try:
            store = JobStore(host, int(port))
        except (OSError, DistNetworkError, TypeError, UnicodeError) as error:  # the last two: it cannot be a name
            raise ValueError(
                f"join={place!r}: no job answers there, as it has ended or is not reached from here. {error}"
            ) from error
        if not store.check([_JOB]):
            raise ValueError(f"join={place!r}: there is a store, but no job of layup_hf has been announced in it.")
        return cls._of(json.loads(store.get(_JOB)))


def start_keeper(address: str, token: bytes, *, is_open: bool, idle_seconds: float = 60.0) -> tuple[str, int]:
    """Start the process that holds a job's store, bound to one address alone; says where it listens.

    Args:
        address: Of this machine.
        token: The job's secret.
        is_open: No secret was given: whoever reaches the store may know this one.
        idle_seconds: How long it waits for the first worker.
    """
    listener = socket.create_server((address, 0))
    with listener:
        package = Path(__file__).parents[1]
        options = [str(package), str(listener.fileno()), str(idle_seconds), "open" if is_open else "closed"]
        keeper = subprocess.Popen(  # in a session of its own: a launcher ends a worker's whole process group
            [sys.executable, "-I", "-S", "-c", _START_KEEPER, *options],
            pass_fds=[listener.fileno()],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert keeper.stdin is not None
        with keeper.stdin:
            keeper.stdin.write(token)
        host, port = listener.getsockname()[:2]
        return host, port


def launcher_store() -> Store:
    """A connection to the store of the launcher. Everybody who reaches it can write there.

    `torchrun` and `accelerate launch` keep it in the launcher, so it answers whatever happens to a worker. With other
    launchers rank 0 keeps it.

    Raises:
        ValueError: The launcher has not said where the store is.
        ConnectionError: The store does not answer.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise ValueError(
            f"The environment variable {missing} is not set, so the store of the process group cannot be found. Start "
            "the workers with `accelerate launch` or `torchrun`."
        ) from missing
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER))
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"The store of the process group at {host}:{port} (MASTER_ADDR and MASTER_PORT) does not answer: {error}"
        ) from error
    return PrefixStore(_PREFIX, store)
