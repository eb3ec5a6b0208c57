"""How the workers of a look talk to each other: through the launcher's store, and never without a limit of time.

Collectives of a process group would hang with a worker that hangs.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from ..fleet import data
from ..fleet.job import launcher_store
from ..fleet.started import has_launcher
from .attempt import NoAnswer
from .finding import Finding

_POLL = 0.02  # seconds between two looks at who has come
_SHORT = 2.0  # seconds for who has missed something, or where the launcher ends the worker

_hosted: list[Store] = []  # kept for as long as the process lives


@dataclass(frozen=True)
class Outcome:
    """What has come of a look, as one worker sees it.

    Attributes:
        findings: Of each worker that has answered, by rank.
        is_mine: Whether this worker is the one that reports.
        has_failed: What the one that reports has made of it, if another does.
        late: Who has answered in the end, but not in time before.
    """

    findings: dict[int, list[Finding]]
    is_mine: bool
    has_failed: bool = False
    late: frozenset[int] = frozenset()


def connect() -> Store:
    """A connection of its own to the launcher's store; rank 0 makes the store where the launcher has none.

    Raises:
        ValueError: The launcher has not said where the store is.
        ConnectionError: The store does not answer.
    """
    if not has_launcher() and os.environ.get("RANK") == "0" and not _hosted and "MASTER_PORT" in os.environ:
        place = os.environ.get("MASTER_ADDR", ""), int(os.environ["MASTER_PORT"])
        _hosted.append(TCPStore(*place, is_master=True, wait_for_workers=False))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"doctor/{attempt}", launcher_store())


class Meeting:
    """All workers of a look, as one of them reaches them.

    Args:
        store: Of the launcher; for this object alone.
        rank: This worker.
        world_size: Number of workers.
        seconds: How long a worker has for each answer.
        is_ended: Set when the launcher ends this worker: nothing is waited for any more, but a moment.
    """

    def __init__(self, store: Store, rank: int, world_size: int, seconds: float, is_ended: threading.Event) -> None:
        self._store, self._rank, self._world_size, self._seconds = store, rank, world_size, seconds
        self._is_ended = is_ended
        self._silent: set[int] = set()

    def gathering(self, stage: str) -> Callable[[Any], list[Any]]:
        """Makes what collects one object from every worker, in the order of ranks, again and again. Collective.

        It raises `NoAnswer` on all as soon as somebody has been missed, in this stage or in another.

        Args:
            stage: What it is for, a name of its own: who has left a stage is in nobody's way in the next.
        """
        calls = 0

        def gather(item: Any) -> list[Any]:
            nonlocal calls
            calls += 1
            name = f"{stage}/{calls}"
            self._store.set(f"{name}/{self._rank}", _packed(item))
            missing = self._await(name, set(range(self._world_size)), self._seconds)
            if missing:
                self._silent |= missing
                for rank in missing:
                    self._store.set(f"silent/{rank}", "")
                self._store.add("silences", 1)  # last: who sees it reads the names
            elif self._store.add("silences", 0):
                self._learn()
            if self._silent:
                raise NoAnswer(self.missed())
            return [_unpacked(self._store.get(f"{name}/{rank}")) for rank in range(self._world_size)]

        return gather

    def missed(self) -> str:
        """Who has not answered."""
        ranks = ", ".join(map(str, sorted(self._silent)))
        return f"rank {ranks} {'have' if len(self._silent) > 1 else 'has'} not answered within {self._seconds:g} s"

    def conclude(self, findings: list[Finding]) -> Outcome:
        """Exchange findings, and choose who reports: rank 0, or who comes after it where that does not answer."""
        self._store.set(f"last/{self._rank}", _packed(findings))
        first = min(set(range(self._world_size)) - self._silent, default=self._rank)
        if self._rank != first:
            self._await("verdict", {0}, 2 * self._seconds, ends_early=False, short=4 * _SHORT)
            if self._store.check(["verdict/0"]):
                self._store.add("left", 1)
                return Outcome({}, False, self._store.get("verdict/0") != b"well")
        everybody = set(range(self._world_size))
        missing = self._await("last", everybody - self._silent, self._seconds, ends_early=False)
        missing |= self._await("last", everybody & self._silent, _SHORT, ends_early=False)
        answers = {rank: _unpacked(self._store.get(f"last/{rank}")) for rank in sorted(everybody - missing)}
        late = frozenset(self._silent & set(answers))
        return Outcome(answers, self._store.add("reporter", 1) == 1, has_failed=True, late=late)

    def tell(self, has_failed: bool, others: int) -> None:
        """Say what has come of it, and wait a moment for so many others to hear it: the store may end with this."""
        self._store.set("verdict/0", "ill" if has_failed else "well")
        end = time.monotonic() + _SHORT
        while self._store.add("left", 0) < others and time.monotonic() < end and not self._is_ended.is_set():
            time.sleep(_POLL)

    def _await(
        self, name: str, ranks: set[int], seconds: float, *, ends_early: bool = True, short: float = _SHORT
    ) -> set[int]:
        """Wait for these to say something under a name; who has not."""
        end = time.monotonic() + seconds
        missing = set(ranks)
        while missing:
            missing -= {rank for rank in missing if self._store.check([f"{name}/{rank}"])}
            left = end - time.monotonic()
            if self._is_ended.is_set():
                end = min(end, time.monotonic() + short)
            if not missing or left < 0 or (ends_early and self._store.add("silences", 0)):
                break
            time.sleep(_POLL)
        if missing and ends_early and self._store.add("silences", 0):
            self._learn()
            return set()
        return missing

    def _learn(self) -> None:
        """Who has been missed by others."""
        self._silent |= {rank for rank in range(self._world_size) if self._store.check([f"silent/{rank}"])}


def _packed(item: Any) -> str:
    return base64.b64encode(data.encode(item)).decode()


def _unpacked(text: bytes) -> Any:
    return data.decode(base64.b64decode(text))
