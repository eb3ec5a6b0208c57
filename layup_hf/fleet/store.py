"""How workers reach what they share: counters and keys in a c10d store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

from .keeper import PREFIX, WORKERS
from .network import Network

_JOB = "job"
_ANSWER = timedelta(seconds=60)


@dataclass(frozen=True)
class Job:
    """A job whose workers are started by several launches, as its store tells it.

    Attributes:
        host: Address of the store.
        port: Its port.
        workers: How many workers the job was started with: the steps of so many make one `global_step`.
        run: Unique name.
        lease_seconds: A worker that gives no sign of life for so long is done without.
    """

    host: str
    port: int
    workers: int
    run: str
    lease_seconds: float

    def connect(self) -> Store:
        """A connection of its own, which one thread at a time may use.

        Raises:
            ConnectionError: The store does not answer.
        """
        return PrefixStore(PREFIX, _client(self.host, self.port, "The store of the job"))

    def announce(self, launcher: Store | None) -> None:
        """Say in the job's own store, and in the launcher's, what a worker needs that wants to join."""
        text = json.dumps(asdict(self))
        self.connect().set(_JOB, text)
        if launcher is not None:
            launcher.set(_JOB, text)

    @classmethod
    def find(cls, store: Store) -> Job | None:
        """What has been announced in a store, if anything."""
        return cls(**json.loads(store.get(_JOB))) if store.check([_JOB]) else None

    def is_running(self) -> bool:
        """Whether it has workers."""
        try:
            _require_listener(self.host, self.port)
            return self.connect().add(WORKERS, 0) > 0
        except OSError:
            return False

    @classmethod
    def at(cls, place: str) -> Job:
        """The job whose store is at HOST:PORT.

        Raises:
            ValueError: This is no place, or there is no such job.
        """
        host, colon, port = place.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"join={place!r} is no place of a job: give HOST:PORT, as the job's log says.")
        try:
            _require_listener(host, int(port))
            job = cls.find(PrefixStore(PREFIX, _client(host, int(port), "The store of the job to join")))
        except OSError as error:
            raise ValueError(
                f"join={place!r}: no job answers there, as it has ended or is not reached from here. {error}"
            ) from error
        if job is None:
            raise ValueError(f"join={place!r}: there is a store, but no job of layup_hf has been announced in it.")
        return job


def start_keeper(network: Network, lease_seconds: float) -> tuple[str, int]:
    """Start the process that holds the job's store, bound to the network's address alone; says where it listens."""
    listener = socket.create_server((network.address, 0))
    with listener:
        command = [sys.executable, str(Path(__file__).with_name("keeper.py")), str(listener.fileno())]
        subprocess.Popen(  # in a session of its own: a launcher ends a worker's whole process group
            [*command, str(60 + 4 * lease_seconds)],
            pass_fds=[listener.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        return listener.getsockname()


def launcher_store() -> Store:
    """A connection to the store of the launcher.

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
    what = "The store of the process group"
    return PrefixStore(PREFIX, _client(host, port, what, " (MASTER_ADDR and MASTER_PORT)"))


def _require_listener(host: str, port: int) -> None:
    """Say no quickly: torch's client would try again for long."""
    socket.create_connection((host, port), timeout=10).close()


def _client(host: str, port: int, what: str, origin: str = "") -> TCPStore:
    try:
        return TCPStore(host, port, is_master=False, timeout=_ANSWER)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"{what} at {host}:{port}{origin} does not answer: {error}") from error


def connect_store(run: str) -> Store:
    """A connection of this worker's own to the launcher's store, under a prefix that only this run uses.

    Raises:
        ValueError: The launcher has not said where the store is.
        ConnectionError: The store does not answer.
    """
    return PrefixStore(run, launcher_store())
