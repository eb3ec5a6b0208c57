"""When a block is offered to which peer on another host: one after the other."""

from __future__ import annotations

from collections.abc import Sequence

WIDER_AFTER = 8
"""So many times in turn all offers of a block have to be taken by the next step, before it is offered to one peer more
at a time."""

PATIENCE = 8
"""A peer that takes so many times as long as the quickest one keeps nobody waiting."""


class Turns:
    """Decides whom on other hosts a block is offered to next.

    A link carries what it can, however many offers wait for it. What waits is mixed by nobody, and counts as its
    worker's own mass in what that worker merges. So the more offers wait, the less each of them moves: a merge weighs a
    quarter with two peers and a fifth with three, but a third with one, for the same bytes. So a block is offered to
    one peer at a time, to each in its turn.

    Nobody waits for a peer that is slow or gone: the next one has its turn, too, when this worker has itself merged the
    block with a peer on another host since the last offer, or when that has waited for `PATIENCE` times as many steps
    as the last one to the quickest peer. And where links carry a block more than once in a step, one peer at a time
    would be too few: after `WIDER_AFTER` times that all had taken what they were offered by the next step, one more is
    offered to at a time; one again as soon as some have not.

    Used by one thread at a time for each block.

    Args:
        blocks: Number of blocks.
        peers: On other hosts, whom blocks are offered to, the first one first.
    """

    def __init__(self, blocks: int, peers: Sequence[int]) -> None:
        self._blocks = [_Block(list(peers)) for _ in range(blocks)]

    def due(self, block: int, eligible: Sequence[int]) -> list[int]:
        """Whom the block may be offered to now; to be asked each time that it may be, which is once a step.

        Args:
            block: Its index.
            eligible: Peers that have taken the last offer of it.

        Returns:
            Of the eligible ones: all that have no turns, such as those on this host, and then those whose turn it is.
        """
        this = self._blocks[block]
        if not this.order:
            return list(eligible)
        free = [peer for peer in this.order if peer in eligible]
        return [peer for peer in eligible if peer not in this.order] + free[: this.turns(free)]

    def note_offered(self, block: int, peers: Sequence[int]) -> None:
        """The block has been offered to these: their next turn comes after all others'."""
        for peer in peers:
            self._blocks[block].note_offered(peer)

    def note_merged(self, block: int, peer: int) -> None:
        """The block has been merged with a peer's."""
        self._blocks[block].merges += peer in self._blocks[block].order

    def exclude(self, peer: int) -> None:
        """Do without a peer. Idempotent."""
        for block in self._blocks:
            block.exclude(peer)


class _Block:
    """Whose turn it is with one block.

    Attributes:
        order: Peers; whose turn it is comes first.
        merges: How often the block was merged with one of them.
    """

    def __init__(self, order: list[int]) -> None:
        self.order, self.merges = order, 0
        self._asked = 0  # how often whose turn it is
        self._offered: dict[int, tuple[int, int]] = {}  # by peer that has not been seen to take it: merges, and asked
        self._waits: dict[int, int] = {}  # by peer: how often it was asked until the last offer was seen to be taken
        self._at_once, self._in_time = 1, 0

    def turns(self, free: Sequence[int]) -> int:
        """To how many of those that have taken the last offer the next ones may go."""
        self._asked += 1
        are_taken = len(free) == len(self.order)
        for peer in [peer for peer in self._offered if peer in free]:
            self._waits[peer] = self._asked - self._offered.pop(peer)[1]
        if not are_taken:
            self._at_once, self._in_time = 1, 0
            return 1 if all(self._is_slow(*offered) for offered in self._offered.values()) else 0
        self._in_time += bool(self._waits)
        if self._in_time == WIDER_AFTER:
            self._at_once, self._in_time = min(self._at_once + 1, max(len(self.order), 1)), 0
        return self._at_once

    def _is_slow(self, merges: int, asked: int) -> bool:
        """Whether an offer that was made then keeps nobody waiting."""
        usual = min(self._waits.values(), default=None)
        return self.merges > merges or (usual is not None and self._asked - asked > PATIENCE * usual)

    def note_offered(self, peer: int) -> None:
        if peer in self.order:
            self.order.remove(peer)
            self.order.append(peer)
            self._offered[peer] = (self.merges, self._asked)

    def exclude(self, peer: int) -> None:
        if peer in self.order:
            self.order.remove(peer)
        self._offered.pop(peer, None)
        self._waits.pop(peer, None)
