"""When a block is offered to which peer on another host: one after the other."""

from __future__ import annotations

from collections.abc import Sequence

WIDER_AFTER = 8
"""So many times in turn all offers of a block have to be taken by the next step, before it is offered to one peer more
at a time."""


class Turns:
    """Decides whom on other hosts a block is offered to next.

    A link carries what it can, however many offers wait for it. What waits is mixed by nobody, and counts as its
    worker's own mass in what that worker merges. So the more offers wait, the less each of them moves: with two peers a
    merge weighs about a quarter, with one about two fifths, for the same bytes. So a block is offered to one peer at a
    time, to each in its turn.

    Nobody waits for a peer whose link is slow: when this worker has itself merged the block with a peer on another host
    since the last offer, the next peer has its turn, too. And where links carry a block more than once in a step, one
    peer at a time would be too few: after `WIDER_AFTER` times that all had taken what they were offered by the next
    step, one more is offered to at a time; one again as soon as some have not.

    Used by one thread at a time for each block.

    Args:
        blocks: Number of blocks.
        peers: On other hosts, whom blocks are offered to, the first one first.
    """

    def __init__(self, blocks: int, peers: Sequence[int]) -> None:
        self._order = [list(peers) for _ in range(blocks)]  # whose turn it is comes first
        self._offered: list[dict[int, int]] = [
            {} for _ in range(blocks)
        ]  # by peer: merges by the time of the last offer
        self._merges = [0] * blocks
        self._at_once, self._in_time = [1] * blocks, [0] * blocks

    def due(self, block: int, eligible: Sequence[int]) -> list[int]:
        """Whom the block may be offered to now; to be asked each time that it may be.

        Args:
            block: Its index.
            eligible: Peers that have taken the last offer of it.

        Returns:
            Of the eligible ones: all that have no turns, such as those on this host, and then those whose turn it is.
        """
        order = self._order[block]
        waiting = [peer for peer in order if peer not in eligible]
        self._count(block, are_taken=not waiting)
        turns = self._at_once[block]
        if waiting:
            has_merged = all(self._merges[block] > self._offered[block].get(peer, -1) for peer in waiting)
            turns = 1 if has_merged else 0
        free = [peer for peer in order if peer in eligible]
        return [peer for peer in eligible if peer not in order] + free[:turns]

    def note_offered(self, block: int, peers: Sequence[int]) -> None:
        """The block has been offered to these: their next turn comes after all others'."""
        order = self._order[block]
        for peer in peers:
            if peer in order:
                order.remove(peer)
                order.append(peer)
                self._offered[block][peer] = self._merges[block]

    def note_merged(self, block: int, peer: int) -> None:
        """The block has been merged with a peer's."""
        self._merges[block] += peer in self._order[block]

    def exclude(self, peer: int) -> None:
        """Do without a peer. Idempotent."""
        for order in self._order:
            if peer in order:
                order.remove(peer)

    def _count(self, block: int, are_taken: bool) -> None:
        """Find out whether links carry more than one offer of a block for each step."""
        if not are_taken:
            self._at_once[block], self._in_time[block] = 1, 0
        elif self._offered[block]:
            self._in_time[block] += 1
            if self._in_time[block] == WIDER_AFTER:
                self._at_once[block] = min(self._at_once[block] + 1, max(len(self._order[block]), 1))
                self._in_time[block] = 0
