"""Copies of peers' blocks that are made beside the computation, and merged when they are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..device import Mark, Queues
from ..ledger import Ledger
from .layout import Layout

Source = Callable[[int, int], Tensor | None]
"""The bytes of a peer's block, where they are; None: it is not to be read."""


class _Slot:
    """Room for one block, on this worker's device."""

    def __init__(self, layout: Layout) -> None:
        self.buffer = layout.new_buffer()
        self.views = [layout.views(self.buffer, block) for block in range(len(layout.ends))]
        self.holds: tuple[int, int] | None = None  # peer and block
        self.settled = -1  # how often this worker had settled when the copy began
        self.copied: Mark | None = None
        self.used: Mark | None = None


class PeerCopies:
    """A few slots, into which blocks of peers are copied; the training thread merges what has come and never waits.

    Memory: the slots, each of the size of the largest block.

    Args:
        layout: How blocks lie in memory.
        queues: Of this worker's device.
        ledger: What is offered.
        source: Where a peer's block is.
        count: Number of slots.
    """

    def __init__(self, layout: Layout, queues: Queues, ledger: Ledger, source: Source, count: int) -> None:
        self._layout, self._queues, self._ledger, self._source = layout, queues, ledger, source
        self._slots = [_Slot(layout) for _ in range(count)]
        self._turn = 0
        self._merged = [0] * len(layout.ends)  # the turn in which the block was last given back

    def take(self, peer: int, block: int) -> list[Tensor] | None:
        """The copy, if it has come; if none is under way, one is begun where there is room."""
        slot = self._slot_of(peer, block)
        if slot is None:
            self._begin(peer, block)
            return None
        if slot.settled != self._ledger.settled:  # from before a consensus point
            slot.holds = None
            self._begin(peer, block)
            return None
        return slot.views[block] if slot.copied is not None and slot.copied.is_done() else None

    def release(self, peer: int, block: int) -> None:
        """What `take` gave is used by what has been queued for computing."""
        slot = self._slot_of(peer, block)
        if slot is not None:
            slot.used, slot.holds = self._queues.mark(), None
            self._turn += 1
            self._merged[block] = self._turn

    def begin_waiting(self, peers: Sequence[int], is_free: Callable[[int], bool]) -> None:
        """Copy ahead what is offered: first of blocks that may be merged at any moment, then what has waited longest.

        Args:
            peers: Who is read through copies.
            is_free: Whether the block with this index may be written now.
        """
        free = sum(slot.holds is None for slot in self._slots)
        if not free or not peers:
            return
        blocks, columns = np.nonzero(self._ledger.waiting_from(list(peers)))
        waiting = [
            (not is_free(block), self._merged[block], block, peers[column])
            for block, column in zip(blocks.tolist(), columns.tolist(), strict=True)
            if self._ledger.is_present(peers[column]) and self._slot_of(peers[column], block) is None
        ]
        for _, _, block, peer in sorted(waiting)[:free]:
            self._begin(peer, block)

    def ready(self) -> list[int]:
        """Blocks whose copies have come."""
        return [
            slot.holds[1]
            for slot in self._slots
            if slot.holds is not None and slot.copied is not None and slot.copied.is_done()
        ]

    def drop(self, peer: int) -> None:
        """Have no more to do with a peer: what is under way from it is not used."""
        for slot in self._slots:
            if slot.holds is not None and slot.holds[0] == peer:
                slot.holds = None

    def _slot_of(self, peer: int, block: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == (peer, block)), None)

    def _begin(self, peer: int, block: int) -> None:
        slot = next((slot for slot in self._slots if slot.holds is None), None)
        source = self._source(peer, block) if slot is not None else None
        if slot is None or source is None:
            return
        with self._queues.copying(after=[mark for mark in (slot.copied, slot.used) if mark is not None]):
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
        slot.holds, slot.settled = (peer, block), self._ledger.settled
        slot.copied, slot.used = self._queues.mark_copies(), None
