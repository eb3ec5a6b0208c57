"""A job as others find it: announced in its own store and the launcher's, and the process that keeps its store."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, Store, TCPStore

from .secret import SIGNATURE_BYTES, TOKEN_VARIABLE, given_token, is_signed, sign
from .store import ANSWER, WORKERS, JobStore, WrongSecret

logger = logging.getLogger(__name__)

_PREFIX = "layup_hf"
_JOB = "job"

_START_KEEPER = """
import importlib, sys, types
package = types.ModuleType("layup_hf")  # an empty one: the real one brings torch, seconds and memory
package.__path__ = [sys.argv.pop(1)]
sys.modules["layup_hf"] = package
importlib.import_module("layup_hf.fleet.keeper").main()
"""


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
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER))
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"The store of the process group at {host}:{port} (MASTER_ADDR and MASTER_PORT) does not answer: {error}"
        ) from error
    return PrefixStore(_PREFIX, store)
