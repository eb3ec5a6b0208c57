"""Who is offered to."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

AUTO_PEERS = 7
"""With `peers_per_step` unset, a worker offers to all its neighbours up to this many; on GPUs, at most."""


def neighbours(rank: int, world_size: int, remote: Iterable[int] = ()) -> set[int]:
    """Whom a worker offers to: all peers on its host, and of those on other hosts the ones 1, 2, 4, 8, ... ranks on.

    Reads on one host are cheap. A link carries what it can, however many offers wait for it; mass that waits mixes
    nothing, and each of many that share it is little when it comes. So over a network few are offered to, and these one
    after the other (see `Turns`), by a graph in which information comes from anyone to anyone in at most
    log2(world_size) exchanges (the exponential graph of Assran et al., arXiv 1811.10792). "Which settings" in
    `docs/tuning.md` has what that makes of the consensus distance.

    Args:
        rank: This worker.
        world_size: Number of workers.
        remote: Peers on other hosts.
    """
    distances = {2**k for k in range((world_size - 1).bit_length())}
    distant = {peer for peer in remote if (peer - rank) % world_size not in distances}
    return set(range(world_size)) - distant - {rank}


class PeerSampler:
    """Draws the neighbours that a block is offered to, uniformly and without repetition.

    The generator is private and seeded by rank: the Trainer seeds the global ones alike on all ranks.

    Args:
        rank: This worker.
        world_size: Number of workers.
        peers_per_step: Offers per block and step; None for all neighbours up to `AUTO_PEERS`.
        seed: Seed of the run.
        remote: Peers on other hosts: see `neighbours`.

    Attributes:
        count: Offers per block and step, as far as there are neighbours; with a `ReadBudget`, the most.
        remote: Neighbours on other hosts, the nearest one further on first.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        peers_per_step: int | None = None,
        seed: int = 0,
        remote: Iterable[int] = (),
    ) -> None:
        remote = set(remote)
        self._neighbours = neighbours(rank, world_size, remote)
        self.remote = sorted(self._neighbours & remote, key=lambda peer: (peer - rank) % world_size)
        self.count = min(peers_per_step or AUTO_PEERS, len(self._neighbours))
        self._random = random.Random(f"{seed}/{rank}")

    def exclude(self, peer: int) -> None:
        """The peer is done without."""
        self._neighbours.discard(peer)
        self.count = min(self.count, len(self._neighbours))

    def sample(self, eligible: Sequence[int], count: int | None = None) -> Sequence[int]:
        """Up to `count` of those of the `eligible` peers that are neighbours; fewer where there are not as many.

        Args:
            eligible: Who has taken the last offer.
            count: None for as many as in every step.
        """
        count = self.count if count is None else count
        eligible = [peer for peer in eligible if peer in self._neighbours]
        if len(eligible) <= count:
            return eligible
        return self._random.sample(eligible, count)
