"""Where blocks of peers arrive."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from ..device import Mark, Queues
from .layout import Layout
from .transport import Transport

_REST = 10.0  # seconds in which a slot that is doubtful is not used again


class Slot:
    """Room for one block. It is written by one peer at a time, which has been asked to.

    Where the network does not reach the blocks' device, the peer writes to the host's memory, and what has come is
    copied to the device from there, beside the computation.

    Args:
        layout: How blocks lie in it.
        transport: Registers it.
        queues: Of the blocks' device.

    Attributes:
        buffer: The bytes that the peer writes.
        key: What it needs for that.
        views: For each block, its tensors on the blocks' device.
        coded: For each block, how and where they lie there if it comes coded.
        peer, block: What it holds or is to hold.
        number: Of the request.
        seed, steps: How it is coded; no steps: not at all.
        asked_at: When that was made: nanoseconds of the monotonic clock.
        settled: How often this worker had settled when it asked: what comes from before a consensus point is not used.
        used: When the training thread's work on it will have ended.
        is_doubtful: Whether the connection of the peer that was asked has broken since: what was under way on it may
            still come when the peer has written here over a new one.
        rests_until: When it can be used again; seconds of the monotonic clock.
    """

    def __init__(self, layout: Layout, transport: Transport, queues: Queues) -> None:
        self._layout, self._queues = layout, queues
        self.buffer = layout.new_buffer()
        transport.register([self.buffer])
        self.key = transport.key(self.buffer)
        self._mirror = layout.new_mirror() if layout.on_host else None
        here = self.buffer if self._mirror is None else self._mirror
        blocks = range(len(layout.num_bytes))
        self.views = [layout.views(here, block) for block in blocks]
        self.coded = [layout.coded_views(here[layout.size :], block) for block in blocks]
        self.seed, self.steps = 0, tuple[float, ...]()
        self.peer = self.block = self.number = self.settled = -1
        self.asked_at = 0
        self.used: Mark | None = None
        self._copied: Mark | None = None
        self.is_doubtful = False
        self.rests_until = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing still reads it or writes to it."""
        return (self.used is None or self.used.is_done()) and time.monotonic() >= self.rests_until

    def bring(self) -> None:
        """Begin to copy what has come to the blocks' device, if it is not there."""
        if self._mirror is None:
            return
        with self._queues.copying():  # nothing reads the mirror: the slot was idle when it was asked for
            for begin, size in self._layout.spans(self.block, bool(self.steps)):
                part = slice(begin, begin + size)
                self._mirror[part].copy_(self.buffer[part], non_blocking=self._layout.is_pinned)
        self._copied = self._queues.mark_copies()

    @property
    def is_here(self) -> bool:
        """Whether what has come is on the blocks' device."""
        return self._copied is None or self._copied.is_done()


class Staging:
    """The slots: two, however many peers there are.

    The courier takes a free one, and puts it among those that are ready when it has been written and its block is on
    the device. The training thread takes it from there, and gives it back. Each handing over is one operation on a dict
    or a deque: it needs no lock.

    Args:
        layout: How blocks lie in slots.
        transport: Registers them.
        queues: Of the blocks' device.
        count: Number of slots.
    """

    def __init__(self, layout: Layout, transport: Transport, queues: Queues, count: int = 2) -> None:
        self._layout, self._transport, self._queues = layout, transport, queues
        self._count = count
        self._coming: deque[Slot] = deque()
        self._slots: set[Slot] = set()
        self._aside: set[Slot] = set()
        self._free: deque[Slot] = deque()
        self.ready: dict[tuple[int, int], Slot] = {}  # by peer and block
        self._taken: dict[tuple[int, int], Slot] = {}
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        slot = Slot(self._layout, self._transport, self._queues)
        self._slots.add(slot)
        self._free.append(slot)

    def holds(self) -> set[tuple[int, int]]:
        """(peer, block) of all that has come and has not been given back."""
        return {*list(self.ready), *list(self._taken), *((slot.peer, slot.block) for slot in self._coming)}

    def bring(self, slot: Slot) -> None:
        """For the courier: a slot has been written. It is among those that `brought` gives when its block is here."""
        slot.bring()
        self._coming.append(slot)

    def brought(self) -> Iterator[Slot]:
        """For the courier: what is on the blocks' device now, in the order in which it has come."""
        while self._coming and self._coming[0].is_here:
            yield self._coming.popleft()

    @property
    def is_bringing(self) -> bool:
        """For the courier: whether something is on its way to the device."""
        return bool(self._coming)

    def take_free(self) -> Slot | None:
        """For the courier: a slot that nobody uses, if there is one now."""
        for _ in range(len(self._free)):
            slot = self._free.popleft()
            if not slot.is_idle:
                self._free.append(slot)
            elif len(self._slots) - len(self._aside) > self._count:  # it stood in for one that is back
                self._slots.remove(slot)
                self._transport.forget(slot.buffer)
            else:
                return slot
        return None

    def give_back(self, slot: Slot) -> None:
        """What is in the slot is not needed."""
        if slot.is_doubtful:
            slot.is_doubtful, slot.rests_until = False, time.monotonic() + _REST
        self._free.append(slot)

    def discard(self, peer: int | None = None) -> None:
        """For the courier: drop what is ready of one peer, or of all."""
        for key in list(self.ready):
            if (peer is None or key[0] == peer) and (slot := self.ready.pop(key, None)) is not None:
                self.give_back(slot)

    def replace(self, slot: Slot) -> None:
        """Let a new slot stand in for one that a silent or lost peer was asked to write: who knows when it does."""
        self._aside.add(slot)
        self._add()

    def take_back(self, slot: Slot) -> None:
        """A slot that has been replaced has been written after all."""
        self._aside.remove(slot)

    def take_ready(self, peer: int, block: int) -> Slot | None:
        """For the training thread: what has come, until `release`."""
        key = (peer, block)
        slot = self.ready.get(key)
        if slot is None:
            return None
        self._taken[key] = slot  # first: at no moment is it nowhere
        if self.ready.pop(key, None) is None:  # the courier has dropped it meanwhile
            del self._taken[key]
            return None
        return slot

    def release(self, peer: int, block: int) -> None:
        """For the training thread: it has used what it took; on a GPU, will have when its stream gets here."""
        slot = self._taken.pop((peer, block), None)
        if slot is not None:
            slot.used = self._queues.mark()
            self._free.append(slot)

    @property
    def num_bytes(self) -> int:
        """Memory that peers write to: of all slots, also of those that have been replaced and may still be written."""
        return sum(slot.buffer.nbytes for slot in self._slots)
