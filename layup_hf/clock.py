"""The progress of all workers together, in one counter that they draw from."""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

_CALL = 1 << 48  # above the steps: how many workers have called a meeting
_FAILURE = 1 << 60  # above the calls: whether a worker has failed


class WorkerFailure(RuntimeError):
    """Another worker has ended with an error, and said so."""


class ProgressClock:
    """Counts the optimizer steps that all workers together have begun.

    A worker draws once before each of its steps and gets the number of steps drawn before it, so the numbers are
    consecutive over all workers, and a slow worker draws fewer. The counter lives in c10d's store, which the launcher
    holds: no worker waits for another one to draw, also not for a frozen one. A draw is one round trip to the store
    (median 0.06 to 0.1 ms on one host). The same counter tells that a worker has called a meeting, or has failed, so
    the others learn of it at no cost.

    Args:
        store: A store that all workers share, with nothing in it yet.
        start: Steps that earlier runs have made, for the worker that sets the counter; None for the others, which may
            draw only after it has been set.

    Attributes:
        called: Whether a worker waited for all others to meet when this worker last looked.
    """

    def __init__(self, store: Store, start: int | None = None) -> None:
        self.called = False
        self._store = store
        if start is not None:
            store.add("clock", start)

    def draw(self) -> int:
        """Begin a step: the number of steps that all workers had begun before.

        Raises:
            WorkerFailure: A worker has failed.
        """
        return (self._read(1) - 1) % _CALL

    def look(self) -> None:
        """Find out whether a meeting has been called, without beginning a step.

        Raises:
            WorkerFailure: A worker has failed.
        """
        self._read(0)

    def call_meeting(self) -> None:
        """Ask every worker to come to a meeting after the step that it is making."""
        self._store.add("clock", _CALL)

    def answer_calls(self) -> None:
        """Take back every call. For one worker, while all are in the meeting."""
        self._store.add("clock", -(self._read(0) // _CALL * _CALL))

    def report_failure(self, message: str) -> None:
        """Tell the others why this worker ends."""
        self._store.set("failure", message)
        if self._store.add("failures", 1) == 1:  # a mark for each would overflow the counter
            self._store.add("clock", _FAILURE)

    def failure(self) -> str | None:
        """What a failed worker has reported, if one has."""
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None

    def _read(self, steps: int) -> int:
        value = self._store.add("clock", steps)
        if value >= _FAILURE:
            raise WorkerFailure(self.failure())
        self.called = value >= _CALL
        return value


def connect_store(run: str) -> Store:
    """A connection of this worker's own to the store of the process group, under a prefix that only this run uses.

    `torchrun` and `accelerate launch` keep the store in the launcher, so it answers whatever happens to a worker. With
    other launchers rank 0 keeps it.

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
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"The store of the process group at {host}:{port} (MASTER_ADDR and MASTER_PORT) does not answer: {error}"
        ) from error
    return PrefixStore(f"layup_hf/{run}", store)
