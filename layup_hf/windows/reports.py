"""What peers on other hosts are told, and when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..ledger import Ledger
from .peers import Peer
from .wire import Report

REPEAT_EVERY = 1.0
"""Seconds after which everything is said again, whether it has changed or not."""

_LOOK_EVERY = 0.005  # seconds between two looks at whether a peer waits to hear of an exchange
_STEPS_EVERY = 0.1  # seconds between two reports of nothing but steps and masses


class Reporter:
    """Finds what has changed in a worker's ledger since each peer was last told.

    Offers and what was taken are told at once, as the peer waits for them; steps and masses from time to time. A report
    is a state, not a change: what is lost is made up for by the next one.

    Args:
        ledger: What is reported.
        peers: Who is told. Each keeps what it has been told.
    """

    def __init__(self, ledger: Ledger, peers: list[Peer]) -> None:
        self._ledger, self._peers = ledger, peers
        self._ranks = [peer.rank for peer in peers]
        self._exchanged = ledger.exchanged_with(self._ranks)  # as told
        self._next = 0.0

    def due(self, now: float) -> Iterator[tuple[Peer, Report]]:
        """Reports that are to be sent now; each counts as told."""
        if now < self._next:
            return
        self._next = now + _LOOK_EVERY
        news = (self._ledger.exchanged_with(self._ranks) != self._exchanged).any(axis=(0, 1))
        for column, peer in enumerate(self._peers):
            is_whole = now >= peer.whole_at
            has_news = (bool(news[column]) or now >= peer.steps_at) and not peer.is_silent(now)  # it would pile up
            if peer.is_connected and (is_whole or has_news):
                report = self._report(peer, is_whole, column)
                peer.steps_at = now + _STEPS_EVERY
                if is_whole:
                    peer.whole_at = now + REPEAT_EVERY
                if report is not None:
                    yield peer, report

    def _report(self, peer: Peer, is_whole: bool, column: int) -> Report | None:
        ledger = self._ledger
        settled, blocks = ledger.settled, ledger.report_to(peer.rank)
        scalars = (int(ledger.done[ledger.rank]), int(ledger.tokens[ledger.rank]))
        changed = blocks if is_whole or peer.told is None else blocks[blocks != peer.told]
        if not len(changed) and scalars == peer.told_scalars:
            return None
        peer.told, peer.told_scalars = blocks, scalars
        self._exchanged[0, :, column], self._exchanged[1, :, column] = blocks["offered"], blocks["taken"]
        return Report(settled, *scalars, ledger.loss(), np.ascontiguousarray(changed))
