"""The numbers that workers tell each other. Every entry has one writer, so no entry needs a lock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from .mixing import MODULUS, UNIT

REPORT = np.dtype(
    [("block", "<u4"), ("offered", "<u8"), ("taken", "<u8"), ("mass", "<u8"), ("steps", "<u8"), ("stamp", "<u8")]
)
"""What a worker reports of one block to a peer on another host; see `Ledger.report_to`."""


class Account(NamedTuple):
    """Mass of one worker as it has written it down itself, in units; uint64, rows are blocks.

    Attributes:
        own: What it holds.
        offered: What it has offered to each worker since the start.
        taken: What it has taken from each worker since the start.
        lost: What excluded workers took from it, less what it took from them; modulo 2**64.
        settled: How often it has settled.
    """

    own: np.ndarray
    offered: np.ndarray
    taken: np.ndarray
    lost: np.ndarray
    settled: int


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

    Workers on other hosts do not see this memory. What they report about themselves is written here for them, by every
    worker of this host: what concerns the pair of the two by this worker alone, so that an entry still has one
    writer; the rest (masses, steps) by all alike.

    Args:
        memory: uint64 words of shape (size(num_blocks, world_size),), shared with the peers, zero at first.
        num_blocks: Number of blocks of the model.
        world_size: Number of workers.
        rank: This worker; it writes only its own entries.
        remote: Workers that do not share the memory.

    Attributes:
        settled: How often this worker has settled, which happens at consensus points.
        done: Optimizer steps that each worker has made, uint64 of shape (workers,). A worker writes its own entry.
        tokens: Input tokens that each worker has seen, likewise.
    """

    def __init__(
        self, memory: np.ndarray, num_blocks: int, world_size: int, rank: int, remote: Iterable[int] = ()
    ) -> None:
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
        self.settled = 0
        self._settled_at = np.zeros((2, num_blocks, world_size), dtype=np.uint64)  # given to and got from each by then
        self._remote = np.zeros(world_size, dtype=bool)
        self._remote[list(remote)] = True
        self._reports = threading.Lock()  # a background thread writes what peers report
        self._total = np.uint64(world_size * UNIT)
        self._own[:, rank] = UNIT
        self._own[:, self._remote] = UNIT
        self._losses[rank] = np.nan
        self._losses[self._remote] = np.nan

    @staticmethod
    def size(num_blocks: int, world_size: int) -> int:
        """Number of 8-byte words that a ledger takes."""
        return num_blocks * world_size * (2 * world_size + 3) + 3 * world_size

    @property
    def remote(self) -> list[int]:
        """Workers that do not share the memory."""
        return np.flatnonzero(self._remote).tolist()

    def own(self, block: int) -> int:
        """Mass that this worker holds and has offered to nobody."""
        return int(self._own[block, self.rank])

    def pending(self, block: int) -> list[tuple[int, int]]:
        """(peer, units) for every present peer whose offers this worker has not yet taken."""
        units = (self._offered[block, self.rank] - self._taken[block, self.rank]) * self._present
        return [(int(peer), int(units[peer])) for peer in np.flatnonzero(units)]

    def waiting(self) -> list[int]:
        """Blocks of which this worker has not yet taken some offer of a present peer."""
        offers = (self._offered[:, self.rank] != self._taken[:, self.rank]) & (self._present != 0)
        return np.flatnonzero(offers.any(axis=1)).tolist()

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
        with self._reports:
            if not self._present[peer]:
                return
            self._present[peer] = 0
            taken = self._taken[:, peer, self.rank].copy()  # as this worker knows it: the peer may write on
            self._own[:, self.rank] += self._offered[:, peer, self.rank] - taken
            given, got = self._settled_at[..., peer]
            self._lost += (taken - given) - (self._taken[:, self.rank, peer] - got)

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
            settled=self.settled,
        )

    def count_step(self, block: int) -> None:
        """Say that this worker has just stepped the block."""
        self._steps[block, self.rank] += np.uint64(1)
        self._stamps[block, self.rank] = self._steps[block].sum()

    def staleness(self, block: int, peer: int) -> int:
        """Steps that all workers together have made on the block since `peer` last stepped it."""
        return max(0, int(self._steps[block].sum()) - int(self._stamps[block, peer]))

    def masses(self) -> np.ndarray:
        """Effective mass (own and untaken) in units, uint64 of shape (blocks, workers).

        Exact while nobody writes; of workers on other hosts, what they reported last.
        """
        untaken = ((self._offered - self._taken) * self._present[None, :, None]).sum(axis=1)
        return (self._own + np.where(self._remote, np.uint64(0), untaken)) * self._present

    def settle(self, accounts: Mapping[int, Account]) -> None:
        """Take every offer that is in the accounts without merging it, and hold one `UNIT`. Part of a consensus point.

        A peer that has settled may offer again at once: that is not in its account, so it stays to be taken.

        Args:
            accounts: Of all present workers by rank, as they were gathered there.
        """
        me = self.rank
        with self._reports:
            for peer, account in accounts.items():
                self._taken[:, me, peer] = account.offered[:, me]
                if self._remote[peer]:  # which settles, too; what it offered last may not have been reported yet
                    self._offered[:, me, peer] = account.offered[:, me]
                    self._taken[:, peer, me] = self._offered[:, peer, me]
                    self._own[:, peer] = UNIT
            self._own[:, me] = UNIT
            self._lost[:] = 0
            self._settled_at = np.stack([self._offered[:, :, me], self._taken[:, me, :]])
            self.settled += 1  # what peers reported before they settled is out of date

    def waiting_from(self, peers: list[int]) -> np.ndarray:
        """Units that each of `peers` has offered and this worker has not taken, uint64 of shape (blocks, peers)."""
        return self._offered[:, self.rank, peers] - self._taken[:, self.rank, peers]

    def exchanged_with(self, peers: list[int]) -> np.ndarray:
        """What `peers` are waiting to hear: (offered to, taken from) each, uint64 of shape (2, blocks, peers)."""
        return np.stack([self._offered[:, peers, self.rank], self._taken[:, self.rank, peers]])

    def report_to(self, peer: int) -> np.ndarray:
        """What `peer`, on another host, is told about every block: an array of `REPORT`.

        `offered` to it and `taken` from it since the start; this worker's effective mass and steps, and the stamp of
        the last step.
        """
        me, report = self.rank, np.empty(len(self._own), dtype=REPORT)
        report["block"] = np.arange(len(report))
        report["offered"] = self._offered[:, peer, me]
        report["taken"] = self._taken[:, me, peer]
        untaken = ((self._offered[:, :, me] - self._taken[:, :, me]) * self._present).sum(axis=1)
        report["mass"] = self._own[:, me] + untaken
        report["steps"] = self._steps[:, me]
        report["stamp"] = self._stamps[:, me]
        return report

    def take_report(self, peer: int, report: np.ndarray, settled: int, done: int, tokens: int, loss: float) -> bool:
        """Write down what `peer`, on another host, reports. Called by a background thread.

        Args:
            peer: A present worker.
            report: Array of `REPORT`, of some or all blocks.
            settled: How often the peer had settled. If that is not as often as this worker, nothing is written.
            done: Optimizer steps that it has made.
            tokens: Tokens that it has seen.
            loss: Its latest mean training loss.

        Returns:
            Whether it was written.

        Raises:
            ValueError: The report cannot be true: it names masses that do not exist. Nothing is written.
        """
        me, blocks = self.rank, report["block"].astype(np.int64)
        with self._reports:
            if settled != self.settled or not self._present[peer]:
                return False
            offered, taken = self._offered[blocks, me, peer], self._taken[blocks, peer, me]
            mine = self._offered[blocks, peer, me]
            if bool((report["taken"] - taken > mine - taken).any()):  # modulo 2**64: going back is a huge step forward
                raise ValueError("taken mass")
            waiting = report["offered"] - self._taken[blocks, me, peer]
            if bool((report["offered"] - offered > self._total).any() or (waiting > self._total).any()):
                raise ValueError("offered mass")
            if bool((report["mass"] > self._total).any()):
                raise ValueError("mass")
            self._own[blocks, peer] = report["mass"]
            self._steps[blocks, peer] = np.maximum(self._steps[blocks, peer], report["steps"])
            self._stamps[blocks, peer] = np.maximum(self._stamps[blocks, peer], report["stamp"])
            self._taken[blocks, peer, me] = report["taken"]
            self._offered[blocks, me, peer] = report["offered"]
            self.done[peer] = max(int(self.done[peer]), done)
            self.tokens[peer] = max(int(self.tokens[peer]), tokens)
            self._losses[peer] = loss
            return True

    def loss(self) -> float:
        """The loss that this worker has published last; not a number before."""
        return float(self._losses[self.rank])

    def report_loss(self, loss: float) -> None:
        """Publish this worker's latest mean training loss."""
        self._losses[self.rank] = loss

    def mean_loss(self) -> float:
        """Mean over workers of the latest training loss that each has published."""
        return float(np.nanmean(self._losses))
