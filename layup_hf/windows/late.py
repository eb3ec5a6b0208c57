"""Windows in which what is read is late on purpose."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..ledger import Ledger
from .base import PeerWindows
from .straggler import StragglerConfig, total_delay


class LateWindows:
    """Windows in which everything that a worker reads is late by its own and the peer's communication delay.

    A read that is asked for gives None until the delay has passed, then the peer's block as it is by then; the next one
    is late again. Delays are drawn by the number of the read, counted per peer and block: that is the "step" of a
    `StragglerConfig` here. Never waits.

    Args:
        windows: Read when the delay has passed. Whatever else this object is asked for comes from them.
        stragglers: The delays.
        rank: This worker.
        clock: Gives seconds.
    """

    def __init__(
        self,
        windows: PeerWindows,
        stragglers: Sequence[StragglerConfig],
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._windows = windows
        self._stragglers = stragglers
        self._rank = rank
        self._clock = clock
        self._due: dict[tuple[int, int], float] = {}
        self._reads: Counter[tuple[int, int]] = Counter()

    @property
    def ledger(self) -> Ledger:
        return self._windows.ledger

    def read(self, peer: int, block: int) -> list[Tensor] | None:
        """The peer's live block, or None while it is late or the windows themselves have none."""
        key, now = (peer, block), self._clock()
        if key not in self._due:
            mine, its = (self._delay(rank, self._reads[key]) for rank in (self._rank, peer))
            self._due[key] = now + mine + its
        tensors = self._windows.read(peer, block) if now >= self._due[key] else None
        if tensors is not None:
            self._reads[key] += 1
            del self._due[key]
        return tensors

    def _delay(self, rank: int, number: int) -> float:
        return total_delay(self._stragglers, "communication", rank, number)

    def close(self) -> None:
        self._windows.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._windows, name)
