"""Who is offered to."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

AUTO_PEERS = 7
"""With `peers_per_step` unset, a worker offers to all its peers up to this many."""

MOST_WAITING = 1
"""Offers of one block that may wait for peers on other hosts at a time.

A link carries what it can, however many offers wait for it. Mass that waits mixes nothing, and each of many that share
it is little when it comes. See "Which settings" in the README for what that makes of the consensus distance.
"""


class PeerSampler:
    """Draws the peers that a block is offered to, uniformly and without repetition.

    The generator is private and seeded by rank: the Trainer seeds the global ones alike on all ranks.

    Args:
        rank: This worker.
        world_size: Number of workers.
        peers_per_step: Offers per block and step; None for all peers up to `AUTO_PEERS`.
        seed: Seed of the run.
        remote: Peers on other hosts.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        peers_per_step: int | None = None,
        seed: int = 0,
        remote: Iterable[int] = (),
    ) -> None:
        self.count = min(peers_per_step or AUTO_PEERS, world_size - 1)
        self._present = world_size - 1
        self._remote = set(remote)
        self._random = random.Random(f"{seed}/{rank}")

    def exclude(self, peer: int) -> None:
        """The peer, not excluded before, is done without."""
        self._present -= 1
        self._remote.discard(peer)
        self.count = min(self.count, self._present)

    def sample(self, eligible: Sequence[int]) -> Sequence[int]:
        """Up to `count` of the `eligible` peers, among them no more on other hosts than there is room for.

        Args:
            eligible: Present peers for which no offer of this block waits.
        """
        if self._remote:
            eligible = self._without_excess(eligible)
        if len(eligible) <= self.count:
            return eligible
        return self._random.sample(eligible, self.count)

    def _without_excess(self, eligible: Sequence[int]) -> Sequence[int]:
        remote = [peer for peer in eligible if peer in self._remote]
        waiting = len(self._remote) - len(remote)
        room = min(max(MOST_WAITING - waiting, 0), len(remote))
        return [peer for peer in eligible if peer not in self._remote] + self._random.sample(remote, room)
