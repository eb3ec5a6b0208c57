"""The numbers that workers tell each other. Every entry has one writer, so no entry needs a lock."""

from __future__ import annotations

import numpy as np

from .mixing import MODULUS, UNIT


class Ledger:
    """Offers, masses and step counts of all workers, as seen by one of them.

    `offered` and `taken` are cumulative: the sender adds to the first, the receiver to the second, and what is between
    them is still to be taken. Both may wrap around.

    Args:
        memory: uint64 words of shape (size(num_blocks, world_size),), shared with the peers, zero at first.
        num_blocks: Number of blocks of the model.
        world_size: Number of workers.
        rank: This worker; it writes only its own entries.

    Attributes:
        done: Optimizer steps that each worker has made, uint64 of shape (workers,). A worker writes its own entry.
        tokens: Input tokens that each worker has seen, likewise.
    """

    def __init__(self, memory: np.ndarray, num_blocks: int, world_size: int, rank: int) -> None:
        if memory.dtype != np.uint64 or memory.shape != (self.size(num_blocks, world_size),):
            raise ValueError(f"A ledger of {num_blocks} blocks and {world_size} workers does not fit {memory.shape}.")
        self.rank = rank
        pair, single = num_blocks * world_size * world_size, num_blocks * world_size
        ends = np.cumsum([pair, pair, single, single, single, world_size, world_size])
        offered, taken, own, steps, stamps, losses, done, tokens = np.split(memory, ends)
        self._offered = offered.reshape(num_blocks, world_size, world_size)  # [block, receiver, sender]
        self._taken = taken.reshape(num_blocks, world_size, world_size)  # [block, receiver, sender]
        self._own = own.reshape(num_blocks, world_size)
        self._steps = steps.reshape(num_blocks, world_size)
        self._stamps = stamps.reshape(num_blocks, world_size)
        self._losses = losses.view(np.float64)
        self.done = done
        self.tokens = tokens
        self._own[:, rank] = UNIT
        self._losses[rank] = np.nan

    @staticmethod
    def size(num_blocks: int, world_size: int) -> int:
        """Number of 8-byte words that a ledger takes."""
        return num_blocks * world_size * (2 * world_size + 3) + 3 * world_size

    def own(self, block: int) -> int:
        """Mass that this worker holds and has offered to nobody."""
        return int(self._own[block, self.rank])

    def pending(self, block: int) -> list[tuple[int, int]]:
        """(peer, units) for every peer whose offers this worker has not yet taken."""
        units = self._offered[block, self.rank] - self._taken[block, self.rank]
        return [(int(peer), int(units[peer])) for peer in np.flatnonzero(units)]

    def untaken(self, block: int) -> int:
        """Mass that this worker has offered and its peers have not yet taken."""
        return int((self._offered[block, :, self.rank] - self._taken[block, :, self.rank]).sum())

    def eligible(self, block: int) -> list[int]:
        """Peers that have taken every offer of this worker; the others are not offered to again."""
        settled = self._offered[block, :, self.rank] == self._taken[block, :, self.rank]
        return [int(peer) for peer in np.flatnonzero(settled) if peer != self.rank]

    def offer(self, block: int, peer: int, units: int) -> None:
        """Move `units` of own mass into an offer to `peer`."""
        self._own[block, self.rank] = self.own(block) - units
        self._offered[block, peer, self.rank] = (int(self._offered[block, peer, self.rank]) + units) % MODULUS

    def take(self, block: int, peer: int, units: int) -> None:
        """Move `units` that `peer` offered into own mass."""
        self._taken[block, self.rank, peer] = (int(self._taken[block, self.rank, peer]) + units) % MODULUS
        self._own[block, self.rank] = self.own(block) + units

    def count_step(self, block: int) -> None:
        """Say that this worker has just stepped the block."""
        self._steps[block, self.rank] += np.uint64(1)
        self._stamps[block, self.rank] = self._steps[block].sum()

    def staleness(self, block: int, peer: int) -> int:
        """Steps that all workers together have made on the block since `peer` last stepped it."""
        return max(0, int(self._steps[block].sum()) - int(self._stamps[block, peer]))

    def masses(self) -> np.ndarray:
        """Effective mass (own and untaken) in units, uint64 of shape (blocks, workers). Exact while nobody writes."""
        return self._own + (self._offered - self._taken).sum(axis=1)

    def settle(self) -> None:
        """Take every pending offer without merging, and hold one `UNIT`. Part of a consensus point."""
        self._taken[:, self.rank] = self._offered[:, self.rank]
        self._own[:, self.rank] = UNIT

    def report_loss(self, loss: float) -> None:
        """Publish this worker's latest mean training loss."""
        self._losses[self.rank] = loss

    def mean_loss(self) -> float:
        """Mean over workers of the latest training loss that each has published."""
        return float(np.nanmean(self._losses))
