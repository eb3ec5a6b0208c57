"""The progress of all workers together, in one counter that they draw from."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import Store

from .ahead import Ahead

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

    Over a network a round trip may take as long as a step, so numbers can be drawn ahead (`draw_ahead`): then a worker
    holds a few, and uses them in their order. They are still consecutive over all workers.

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
        self._ahead: Ahead[int] | None = None
        if start is not None:
            store.add("clock", start)

    def draw_ahead(self, store: Store, make_ahead: Callable[[Callable[[], int]], Ahead[int]]) -> None:
        """From here on, draw in the background.

        Args:
            store: Another connection to the same store, for the thread that draws.
            make_ahead: Makes an `Ahead` for a question.
        """
        self._ahead = make_ahead(lambda: self._read(1, store))

    def draw(self) -> int:
        """Begin a step: the number of steps that all workers had begun before it, when it was drawn.

        Raises:
            WorkerFailure: A worker has failed.
        """
        value = self._read(1) if self._ahead is None else self._ahead.take()
        return (value - 1) % _CALL

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

    def forget_calls(self) -> None:
        """After a meeting: what was drawn ahead during it may still tell of calls that have been answered."""
        if self._ahead is not None:
            self._ahead.held()
            self.called = False

    def report_failure(self, message: str) -> None:
        """Tell the others why this worker ends."""
        self._store.set("failure", message)
        if self._store.add("failures", 1) == 1:  # a mark for each would overflow the counter
            self._store.add("clock", _FAILURE)

    def failure(self) -> str | None:
        """What a failed worker has reported, if one has."""
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None

    def _read(self, steps: int, store: Store | None = None) -> int:
        value = (store or self._store).add("clock", steps)
        if value >= _FAILURE:
            raise WorkerFailure(self.failure())
        self.called = value >= _CALL
        return value
