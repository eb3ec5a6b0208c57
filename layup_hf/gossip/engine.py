"""The exchange itself: what one worker does at a block's boundary and before its forward."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..blocks import Block
from ..device import Mark, Queues, queues_of
from ..ledger.counts import percentile
from ..ledger.mixing import UNIT, merge_weight, share
from ..windows.base import PeerWindows
from .budget import ReadBudget
from .merging import Merger
from .topology import PeerSampler


class GossipEngine:
    """Offers this worker's blocks to peers and merges theirs. Never waits.

    Both calls are made by the training thread, at moments when autograd holds no copy of the block that it will still
    use.

    Args:
        blocks: The model's blocks, after the windows have been opened.
        windows: What this worker can see of its peers.
        sampler: Who is offered to.
        offer_every: A block is offered after every so many own steps of it.
        is_free: Whether the block with this index may be written now: then what has come of it in the background is
            merged at the next moment that this engine has; else it waits for the block's own boundary.
        budget: Decides how many offers of a block are made; None: as many as the sampler draws.
        queues: Of the device that the blocks are on; for tests.

    Attributes:
        ledger: Of the windows.
        mine: The tensors of each block of this worker, as merges write them.
        queues: Of the device that the blocks are on.
        counts: Totals since the start: `merges`, `offers`, `skipped_offers`, `bytes_read`.
        staleness: How many merges were how many clock steps old, since the start.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        windows: PeerWindows,
        sampler: PeerSampler,
        *,
        offer_every: int = 1,
        is_free: Callable[[int], bool] = lambda index: False,
        budget: ReadBudget | None = None,
        queues: Queues | None = None,
    ) -> None:
        self._windows = windows
        self.ledger = windows.ledger
        self._sampler = sampler
        self._offer_every = offer_every
        self._is_free = is_free
        self._budget = budget
        self._blocks = list(blocks)
        self.mine = [block.tensors for block in blocks]
        self.queues = queues or queues_of(self.mine[0][0].device)
        self._merger = Merger(windows.ledger.rank)
        self._unannounced: deque[tuple[int, int, Mark]] = deque()  # block, offers, and when the device has stepped it
        self._steps = [0] * len(self._blocks)
        self._bytes = [block.num_bytes for block in blocks]
        self.staleness: Counter[int] = Counter()
        self._logged_staleness: Counter[int] = Counter()
        self.counts = Counter(merges=0, offers=0, skipped_offers=0, bytes_read=0)

    @torch.no_grad()
    def merge(self, block: Block) -> None:
        """Take every pending offer of `block`: move towards the peer's live block by the weight of its mass.

        Whatever else has come in the background is merged, too, if its block is free: it need not wait, and keep room
        from other blocks, until its turn comes.
        """
        self.announce()
        self.take_offers(block.index)
        for index in self._windows.arrived(self._is_free):
            if self._is_free(index):
                self.take_offers(index)

    def take_offers(self, index: int) -> None:
        """Merge all that is offered and here of the block with this index, which must be free to be written."""
        ledger = self.ledger
        offers = ledger.pending(index)
        if not offers:
            return
        own, untaken = ledger.own(index), ledger.untaken(index)
        begin = self.queues.mark() if self._budget is not None else None
        taken: list[tuple[int, int]] = []
        peers: list[tuple[Sequence[Tensor], float]] = []
        for peer, units in offers:
            theirs = self._windows.read(peer, index)
            if theirs is not None:
                peers.append((theirs, self.weight(units, own, untaken)))
                taken.append((peer, units))
                own += units
        if not taken:
            return
        self._merger.merge(self.mine[index], peers)
        for peer, units in taken:
            ledger.take(index, peer, units)
            self._windows.release(peer, index)
            self.staleness[ledger.staleness(index, peer)] += 1
            self.counts["merges"] += 1
            self.counts["bytes_read"] += self._bytes[index]
        if self._budget is not None and begin is not None:
            self._budget.note_merge(index, len(taken), begin, self.queues.mark())

    def units(self, own: int, receivers: int) -> int:
        """Mass that each of so many peers is offered, in units: see `share`."""
        return share(own, receivers)

    def weight(self, units: int, own: int, untaken: int) -> float:
        """How far a merge moves this worker's block towards the peer's, between 0 and 1: see `merge_weight`."""
        return merge_weight(units, own, untaken)

    def offer(self, block: Block) -> None:
        """Offer `block`, just stepped, to peers that have taken the last offer of it; skip where there is none.

        On a GPU the step has only been queued: peers are told of it, and of the offer, when it has been made.
        """
        index = block.index
        self._steps[index] += 1
        offers = 0
        if self._steps[index] % self._offer_every == 0:
            offers = self._sampler.count if self._budget is None else self._budget.due(index)
        made = self._windows.publish(index) if offers else self.queues.mark()
        self._unannounced.append((index, offers, made))
        self.announce()

    def announce(self) -> None:
        """Tell peers of the steps that the device has made by now. Never waits for it."""
        while self._unannounced and self._unannounced[0][2].is_done():
            index, offers, _ = self._unannounced.popleft()
            self.announce_step(index, offers)

    def announce_step(self, index: int, offers: int) -> None:
        """Count a step of a block, and offer the block to so many peers."""
        ledger = self.ledger
        ledger.count_step(index)
        if not offers:
            return
        peers = self._sampler.sample(ledger.eligible(index), offers)
        units = self.units(ledger.own(index), len(peers)) if peers else 0
        if units:
            for peer in peers:
                ledger.offer(index, peer, units)
        offered = len(peers) if units else 0
        self.counts["offers"] += offered
        self.counts["skipped_offers"] += offers - offered

    def holding(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """While the block is stepped and offered. Here nothing else writes it."""
        return contextlib.nullcontext()

    def resume(self) -> None:
        """A step begins. Here merging needs no leave."""
        if self._budget is not None:
            self._budget.begin_step(time.perf_counter())

    def pause(self) -> None:
        """The workers meet, and no block is to change but by them all. Here nothing else changes it; what has not been
        offered yet need not be.
        """
        for index, _, _ in self._unannounced:
            self.ledger.count_step(index)
        self._unannounced.clear()

    def close(self) -> None:
        """Nothing is exchanged any more; before the windows are closed. Idempotent."""

    def exclude(self, peer: int) -> None:
        """Do without a peer whose lease has run out: take back what it was offered and has not taken. Idempotent."""
        if self.ledger.is_present(peer):
            self.ledger.exclude(peer)
            self._windows.exclude(peer)
            self._sampler.exclude(peer)
            if self._budget is not None:
                self._budget.most = self._sampler.count

    def require_same_memory(self) -> None:
        """Make sure that the model still lives where the peers read it.

        Raises:
            RuntimeError: A tensor was replaced, moved, cast or resized since the start.
        """
        for block, known in zip(self._blocks, self.mine, strict=True):
            for tensor, old in zip(block.tensors, known, strict=True):
                if tensor.data_ptr() != old.data_ptr() or tensor.shape != old.shape or tensor.dtype != old.dtype:
                    raise RuntimeError(
                        f"A tensor of block {block.name!r} was replaced during training: {tuple(old.shape)} of "
                        f"{old.dtype} is now {tuple(tensor.shape)} of {tensor.dtype}, elsewhere in memory, where peers "
                        "do not see it. Change tensors in place, or resize and cast the model before training."
                    )

    def figures(self) -> dict[str, float]:
        """What the logs say: totals, masses in units of one worker's share, and since the last call the staleness and
        what the windows have to say.
        """
        masses = self.ledger.masses() / UNIT
        figures = {f"layup/{name}": float(count) for name, count in self.counts.items()}
        figures.update(self._windows.figures())
        if self._budget is not None:
            figures["layup/peers_per_step"] = round(self._budget.peers, 3)
        figures["layup/mass_min"] = float(masses.min())
        figures["layup/mass_max"] = float(masses.max())
        if recent := self.staleness - self._logged_staleness:
            figures["layup/staleness"] = float(percentile(recent, 50))
            self._logged_staleness = self.staleness.copy()
        return figures
