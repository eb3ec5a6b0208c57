"""Who is offered to."""

from __future__ import annotations

import random
from collections.abc import Sequence

AUTO_PEERS = 7
"""With `peers_per_step` unset, a worker offers to all its peers up to this many."""


class PeerSampler:
    """Draws the peers that a block is offered to, uniformly and without repetition.

    The generator is private and seeded by rank: the Trainer seeds the global ones alike on all ranks.

    Args:
        rank: This worker.
        world_size: Number of workers.
        peers_per_step: Offers per block and step; None for all peers up to `AUTO_PEERS`.
        seed: Seed of the run.
    """

    def __init__(self, rank: int, world_size: int, peers_per_step: int | None = None, seed: int = 0) -> None:
        self.count = min(peers_per_step or AUTO_PEERS, world_size - 1)
        self._present = world_size - 1
        self._random = random.Random(f"{seed}/{rank}")

    def exclude_one(self) -> None:
        """There is one peer less."""
        self._present -= 1
        self.count = min(self.count, self._present)

    def sample(self, eligible: Sequence[int]) -> Sequence[int]:
        """Up to `count` of the `eligible` peers; fewer where there are not as many."""
        if len(eligible) <= self.count:
            return eligible
        return self._random.sample(eligible, self.count)
