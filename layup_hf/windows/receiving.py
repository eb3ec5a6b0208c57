"""Makes blocks of what peers have written."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .coders import make_coder
from .coding import Coded, Plan, Seen, factors, reach
from .layout import Layout
from .staging import Slot
from .wire import LARGEST_STEP, LEAST_STEP

MARGIN = {8: 8.0, 4: 3.0}
"""By bits: how many times as far as they have been seen to be, two workers are taken to be apart when they are seen
next. Finer steps round less, and longer ones save blocks from being sent in vain; with 8 bits rounding is nothing."""

_KEPT = 0.8  # of what they were taken to be before, at least
_FURTHER = 4.0  # times as far, where they were further apart than that
_TRIES = 3  # to send a block coded, before it is sent as it is
_FINEST = 2.0**-20  # steps, of the largest number: fp32 has few more digits, and counts must not be too large


class Receiving:
    """Decides whether a block is asked for coded, and with which steps; and reads it when it has come.

    A block is coded by how far the peer's and this worker's own are apart. That is seen each time that one comes, in
    the pass that reads it: the largest distance in each part of each tensor. The first block is asked for as it is;
    after that, what is not known of a block is taken from another peer's, or from other blocks. If a block turns out to
    be further away than it was taken to be, it is not used, and asked for again with longer steps, in the end as it is:
    its offer is still there to be taken, as nothing has been merged.

    Args:
        layout: How blocks lie in slots.

    Attributes:
        resent: Blocks that came coded in vain, since the start.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._coder = make_coder(layout.device, secrets.randbits(60)) if layout.bits else None
        self._known: dict[tuple[int, int], np.ndarray] = {}  # distances and sizes, (2, steps), by block and peer
        self._failed: dict[tuple[int, int], int] = {}  # how often in turn, by block and peer
        self.resent = 0

    def prepare(self, slot: Slot) -> None:
        """Decide how the block that the slot is to hold is asked for."""
        slot.seed, slot.steps = 0, ()
        if self._coder is not None and (steps := self._steps(slot.peer, slot.block)) is not None:
            slot.seed, slot.steps = secrets.randbits(64), tuple(steps.tolist())

    def num_bytes(self, slot: Slot) -> int:
        """Of what comes."""
        return (self._layout.coded_bytes if slot.steps else self._layout.num_bytes)[slot.block]

    def accept(self, slot: Slot, is_written: bool) -> bool:
        """Read what has come in a slot. Whether the block is there now, as the peer has it or has rounded it."""
        if self._coder is None:
            return is_written
        key = (slot.block, slot.peer)
        if is_written and not slot.steps:
            self._failed.pop(key, None)
            if self._layout.num_steps[slot.block]:
                tensors = self._tensors(slot)
                self._note(key, [self._coder.compare(plan, theirs, mine) for plan, _, theirs, mine in tensors])
            return True
        if not is_written:  # not even sent
            self._failed[key] = _TRIES
            return False
        seen = self._decode(slot)
        wrong = np.concatenate([part.wrong for part in seen])
        if not wrong.any():
            self._failed.pop(key, None)
            self._note(key, seen)
            return True
        self.resent += 1
        self._failed[key] = self._failed.get(key, 0) + 1
        if (known := self._distances(*key)) is not None:
            distances, sizes = known
            tried = np.maximum(distances, np.array(slot.steps) * reach(self._layout.bits))
            self._known[key] = np.stack([np.where(wrong, _FURTHER * tried, distances), sizes])
        return False

    def _tensors(self, slot: Slot) -> Iterator[tuple[Plan, Coded, Tensor, Tensor]]:
        """Those that can be coded: how, where, where the numbers are to be, and the own ones."""
        block = slot.block
        for coded, theirs, mine in zip(slot.coded[block], slot.views[block], self._layout.live(block), strict=True):
            if coded is not None:
                yield *coded, theirs, mine

    def _decode(self, slot: Slot) -> list[Seen]:
        assert self._coder is not None
        steps, multipliers = np.array(slot.steps, dtype=np.float32), factors(slot.seed)
        seen, begin = list[Seen](), 0
        for plan, coded, theirs, mine in self._tensors(slot):
            own = np.ascontiguousarray(steps[begin : begin + plan.parts])
            seen.append(self._coder.decode(plan, coded, own, multipliers, mine, theirs))
            begin += plan.parts
        return seen

    def _note(self, key: tuple[int, int], seen: list[Seen]) -> None:
        """The block was so far away; it will be taken to be further next time."""
        farthest = np.concatenate([part.farthest for part in seen]) * MARGIN[self._layout.bits]
        largest = np.concatenate([part.largest for part in seen])
        before = self._known.get(key)
        if before is not None and bool(np.isfinite(before).all()):
            farthest = np.maximum(farthest, _KEPT * before[0])
        self._known[key] = np.stack([farthest, largest])

    def _distances(self, block: int, peer: int) -> np.ndarray | None:
        """How far away the parts of a block are taken to be, and their largest numbers: shape (2, steps)."""
        known = self._known.get((block, peer))
        if known is not None or not self._known or not self._layout.num_steps[block]:
            return known
        if others := [known for (of, _), known in self._known.items() if of == block]:
            return np.max(others, axis=0)
        distance = np.median(np.concatenate([distances for distances, _ in self._known.values()]))
        return np.stack([np.full(self._layout.num_steps[block], distance), self._sizes(block)])

    def _sizes(self, block: int) -> np.ndarray:
        """Largest numbers of this worker's own parts."""
        assert self._coder is not None
        tensors = zip(self._layout.plans(block), self._layout.live(block), strict=True)
        return np.concatenate([self._coder.compare(plan, own, own).largest for plan, own in tensors if plan])

    def _steps(self, peer: int, block: int) -> np.ndarray | None:
        """fp32, with which a block is coded; None: it is sent as it is."""
        known = self._distances(block, peer)
        if known is None or self._failed.get((block, peer), 0) >= _TRIES:
            return None
        distances, sizes = known
        steps = np.maximum(distances / reach(self._layout.bits), _FINEST * sizes)
        steps = np.maximum(steps, LEAST_STEP).astype(np.float32)
        return steps if bool((steps <= LARGEST_STEP).all()) else None  # nor if some are not numbers
