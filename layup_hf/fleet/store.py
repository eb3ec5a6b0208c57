"""How workers reach what they share: counters and keys in a c10d store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d as c10d

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


class GroupStore:
    """The store of the process group; where workers cannot connect to that, one that rank 0 keeps while this lives.

    A group may have been made without a launcher's store: through a file, as by accelerate's `debug_launcher` and
    `notebook_launcher`, or at another place than the environment says.

    Args:
        rank: This worker.
        gather: Collects one object from every worker.
        machine: What tells this machine from others.

    Raises:
        ValueError: The group has no store to connect to, and its workers are on several hosts; on every worker.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]], machine: str) -> None:
        self._place = _place_of_group()
        self._server: TCPStore | None = None
        if all(gather(self._place)):
            return
        if len(set(gather(machine))) > 1:
            raise ValueError(
                "The process group has been made without a store that workers of several hosts can connect to, through "
                "a file say. Start the workers with `accelerate launch` or `torchrun`."
            )
        if rank == 0:
            listener = socket.create_server(("127.0.0.1", 0))
            self._place = host, port = listener.getsockname()
            self._server = TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._place = gather(self._place)[0]

    def connect(self, run: str) -> Store:
        """A connection of this worker's own, under a prefix that only this run uses.

        Raises:
            ConnectionError: The store does not answer.
        """
        assert self._place is not None
        return PrefixStore(run, PrefixStore(PREFIX, _client(*self._place, "The store of the process group")))


def _place_of_group() -> tuple[str, int] | None:
    """Host and port of the store by which the present process group was made; None if it is of another kind."""
    store = c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, TCPStore) else None
