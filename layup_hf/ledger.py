"""The numbers that workers tell each other. Every entry has one writer, so no entry needs a lock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .mixing import MODULUS, UNIT


class Account(NamedTuple):
    """Mass of one worker as it has written it down itself, in units; uint64, rows are blocks.

    Attributes:
        own: What it holds.
        offered: What it has offered to each worker since the start.
        taken: What it has taken from each worker since the start.
        lost: What excluded workers took from it, less what it took from them; modulo 2**64.
    """

    own: np.ndarray
    offered: np.ndarray
    taken: np.ndarray
    lost: np.ndarray


def effective_masses(accounts: Mapping[int, Account]) -> np.ndarray:
    """Own and untaken mass of each worker that gives an account, uint64 of shape (blocks, accounts).

    An offer counts with its sender until its receiver says that it has taken it; what was offered to a worker that
    gives no account has been taken back.

    Args:
        accounts: By rank, in ascending order.
    """
    return np.stack(
        [
            mine.own + sum(mine.offered[:, other] - its.taken[:, rank] for other, its in accounts.items())
            for rank, mine in accounts.items()
        ],
        axis=1,
    )


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
        self._present = np.ones(world_size, dtype=np.uint64)  # 0 for a peer that has been excluded
        self._lost = np.zeros(num_blocks, dtype=np.uint64)  # mass that excluded peers took from this worker, net
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
        """(peer, units) for every present peer whose offers this worker has not yet taken."""
        units = (self._offered[block, self.rank] - self._taken[block, self.rank]) * self._present
        return [(int(peer), int(units[peer])) for peer in np.flatnonzero(units)]

    def untaken(self, block: int) -> int:
        """Mass that this worker has offered and present peers have not yet taken."""
        units = self._offered[block, :, self.rank] - self._taken[block, :, self.rank]
        return int((units * self._present).sum())

    def eligible(self, block: int) -> list[int]:
        """Present peers that have taken every offer of this worker; the others are not offered to."""
        settled = (self._offered[block, :, self.rank] == self._taken[block, :, self.rank]) * self._present
        return [int(peer) for peer in np.flatnonzero(settled) if peer != self.rank]

    def offer(self, block: int, peer: int, units: int) -> None:
        """Move `units` of own mass into an offer to `peer`."""
        self._own[block, self.rank] = self.own(block) - units
        self._offered[block, peer, self.rank] = (int(self._offered[block, peer, self.rank]) + units) % MODULUS

    def take(self, block: int, peer: int, units: int) -> None:
        """Move `units` that `peer` offered into own mass."""
        self._taken[block, self.rank, peer] = (int(self._taken[block, self.rank, peer]) + units) % MODULUS
        self._own[block, self.rank] = self.own(block) + units

    def exclude(self, peer: int) -> None:
        """Have no more to do with a peer whose lease has run out: take back what it has not taken. Idempotent.

        What it has taken stays with it and is noted as lost, less what it gave; so mass stays accounted for to the
        unit, whatever the peer may still write.
        """
        if not self._present[peer]:
            return
        self._present[peer] = 0
        taken = self._taken[:, peer, self.rank].copy()  # as this worker knows it: the peer may write on
        self._own[:, self.rank] += self._offered[:, peer, self.rank] - taken
        self._lost += taken - self._taken[:, self.rank, peer]

    def is_present(self, peer: int) -> bool:
        """Whether the peer has not been excluded."""
        return bool(self._present[peer])

    def account(self) -> Account:
        """What this worker has to say about mass at a consensus point."""
        return Account(
            own=self._own[:, self.rank].copy(),
            offered=self._offered[:, :, self.rank].copy(),
            taken=self._taken[:, self.rank, :].copy(),
            lost=self._lost.copy(),
        )

    def count_step(self, block: int) -> None:
        """Say that this worker has just stepped the block."""
        self._steps[block, self.rank] += np.uint64(1)
        self._stamps[block, self.rank] = self._steps[block].sum()

    def staleness(self, block: int, peer: int) -> int:
        """Steps that all workers together have made on the block since `peer` last stepped it."""
        return max(0, int(self._steps[block].sum()) - int(self._stamps[block, peer]))

    def masses(self) -> np.ndarray:
        """Effective mass (own and untaken) in units, uint64 of shape (blocks, workers). Exact while nobody writes."""
        present = self._present[None, :, None]
        return (self._own + ((self._offered - self._taken) * present).sum(axis=1)) * self._present

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
