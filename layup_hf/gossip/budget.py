"""How many peers a worker reads in a step: as many as it can for a given share of its time."""

from __future__ import annotations

import statistics
from collections import deque

from ..device import Mark

SHARE = 0.02
"""Of a step's time that merging may take."""

LEAST = 1 / 8
"""Offers per block and step that are made however long merges take: a block is exchanged in every eighth step."""

_KNOWN = 9  # times of which the median is taken


class ReadBudget:
    """Finds out how many offers a worker makes per block and step, so that merging takes a given share of a step.

    A merge costs the receiver, and the sender decides. But all workers do the same: in the mean, each is offered as
    many blocks per unit of time as it offers, also if it is slower than the others. So each offers what it could take.

    What a merge takes is measured where it runs, between two marks: on a GPU by its own clock. A step is measured from
    its beginning to that of the next one. Of both the median of the latest ones counts, so evaluations between two
    steps do not.

    Args:
        num_blocks: Of the model.
        most: Offers per block and step that there are peers for.
        share: Of the time.

    Attributes:
        peers: Offers per block and step, now; at most `most`, not necessarily whole. 1 until something is known.
    """

    def __init__(self, num_blocks: int, most: int, share: float = SHARE) -> None:
        self._share = share
        self.most = most
        self.peers = float(min(1, most))
        self._costs: list[deque[float]] = [deque(maxlen=_KNOWN) for _ in range(num_blocks)]
        self._steps: deque[float] = deque(maxlen=_KNOWN)
        self._began_at: float | None = None
        self._measured: deque[tuple[int, int, Mark, Mark]] = deque()
        # Blocks that are exchanged in some steps only begin at different ones, so that steps cost alike.
        golden = (5**0.5 - 1) / 2
        self._owed = [block * golden % 1 for block in range(num_blocks)]

    def begin_step(self, now: float) -> None:
        """An own step begins.

        Args:
            now: Seconds of any clock.
        """
        if self._began_at is not None:
            self._steps.append(now - self._began_at)
        self._began_at = now
        while self._measured and self._measured[0][3].is_done():
            block, merged, begin, end = self._measured.popleft()
            self._costs[block].append(end.seconds_since(begin) / merged)
        known = [statistics.median(costs) for costs in self._costs if costs]
        if known and self._steps:
            cost = sum(known) * len(self._costs) / len(known)
            affordable = self._share * statistics.median(self._steps) / max(cost, 1e-9)
            self.peers = min(max(affordable, LEAST), self.most)

    def note_merge(self, block: int, merged: int, begin: Mark, end: Mark) -> None:
        """So many peers have been merged between two marks."""
        self._measured.append((block, merged, begin, end))

    def due(self, block: int) -> int:
        """Offers of the block that are to be made in the step that it has just made."""
        self._owed[block] += min(self.peers, self.most)
        offers = int(self._owed[block])
        self._owed[block] -= offers
        return offers
