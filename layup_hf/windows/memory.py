"""How a worker's blocks lie where peers on its host can read them, by kind of memory."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..blocks import Block
from ..device import Mark, Queues
from ..fleet.data import travels
from .ipc import Ipc
from .layout import Layout, move_into
from .segment import Segment, as_bytes

logger = logging.getLogger(__name__)

PROBE = 4096
"""Bytes beside the blocks that no two workers have alike, so that nobody takes his own memory for a peer's."""

_PROVED = 2**24  # bytes of each block that are read on trial
_WORDS = 2**16  # of 8 bytes that go into a checksum


class Memory(Protocol):
    """Memory that holds the blocks of this worker, and lets it see those of others.

    `share` and `open` are each called once, on every worker of the host, one after the other.

    Attributes:
        kind: For people.
        flats: After `share`: the bytes of each block and at the end the probe, as this worker has them.
    """

    kind: str
    flats: list[Tensor]

    def share(self) -> Any:
        """Move the blocks there, in place. Gives what a peer's `open` needs, which is data."""

    def open(self, handle: Any) -> tuple[list[Tensor], bool]:
        """The bytes of a peer's blocks and its probe, and whether kernels of this worker's device may read them where
        they are: otherwise they are to be copied first.
        """

    def publish(self, block: int, queues: Queues) -> Mark:
        """Let peers see the block as what is queued for computing makes it; done when they do."""

    def release(self) -> None:
        """All peers have opened what `share` has given."""

    def close(self) -> None:
        """Let go of what belongs to the windows and not to the blocks; nothing is copied any more. Idempotent."""


def _new_probe(device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(os.urandom(PROBE)), dtype=torch.uint8).to(device)


def checksum(flat: Tensor, device: torch.device) -> int:
    """Of some of the bytes, wherever they differ, after they have been copied to a device as blocks are."""
    copied = flat[:_PROVED].to(device, copy=True)
    words = copied[: copied.numel() // 8 * 8].view(torch.int64)
    words = words[:: max(1, words.numel() // _WORDS)]
    factors = 2 * torch.arange(words.numel(), device=device) + 1  # odd: none loses a bit of its word
    return int((words * factors).sum())


class HostMemory:
    """Blocks on the CPU, in anonymous shared memory (a Linux memfd: /dev/shm and its size do not matter, and nothing
    can be left behind). Peers map it for reading only, and read it in place.
    """

    kind = "shared memory"

    def __init__(self, blocks: Sequence[Block], layout: Layout) -> None:
        self._blocks, self._layout = blocks, layout
        self._segment: Segment | None = None
        self.flats: list[Tensor] = []

    def share(self) -> Segment:
        """One segment for all blocks."""
        self._segment, self.flats = _new_segment([*self._layout.ends, PROBE])
        for number, block in enumerate(self._blocks):
            flat = self.flats[number]
            move_into(flat, block, self._layout.views(flat, number))
        self.flats[-1].copy_(_new_probe(torch.device("cpu")))
        return self._segment

    def open(self, handle: Segment) -> tuple[list[Tensor], bool]:
        """Map the peer's segment."""
        return _map_segment(handle, [*self._layout.ends, PROBE], writable=False), True

    def publish(self, block: int, queues: Queues) -> Mark:
        """Peers see every write."""
        return queues.mark()

    def release(self) -> None:
        """Close the descriptor. Mappings stay."""
        if self._segment is not None:
            self._segment.release()
            self._segment = None

    def close(self) -> None:
        """Nothing: the segment is where the blocks live."""


@travels
@dataclass(frozen=True)
class DeviceHandle:
    """What a worker tells of its memory on a GPU.

    Attributes:
        gpu: Names the GPU to all processes, whatever each of them sees.
        buffers: What opens each.
    """

    gpu: str
    buffers: tuple[Any, ...]


class DeviceMemory:
    """Blocks on a GPU, one buffer for each, which peers open by CUDA IPC. What is on the same GPU is read in place;
    between two of them blocks are copied, as copy engines load a link better than kernels and leave these alone.
    """

    kind = "CUDA IPC"

    def __init__(self, blocks: Sequence[Block], layout: Layout, ipc: Ipc) -> None:
        self._blocks, self._layout, self._ipc = blocks, layout, ipc
        self.flats: list[Tensor] = []

    def share(self) -> DeviceHandle:
        """One buffer for each block, and one handle."""
        layout, device = self._layout, self._layout.device
        for number, block in enumerate(self._blocks):
            flat = self._ipc.allocate(layout.ends[number], device)
            move_into(flat, block, layout.views(flat, number))
            self.flats.append(flat)
        self.flats.append(self._ipc.allocate(PROBE, device).copy_(_new_probe(device)))
        return DeviceHandle(self._ipc.name(device), tuple(self._ipc.export(flat) for flat in self.flats))

    def open(self, handle: DeviceHandle) -> tuple[list[Tensor], bool]:
        """On this worker's own device, whichever has the memory."""
        device = self._layout.device
        return [self._ipc.open(buffer, device) for buffer in handle.buffers], handle.gpu == self._ipc.name(device)

    def publish(self, block: int, queues: Queues) -> Mark:
        """Peers see every write of the device."""
        return queues.mark()

    def release(self) -> None:
        """Nothing: a handle is no resource."""

    def close(self) -> None:
        """Nothing: the buffers are where the blocks live."""


class StagedMemory:
    """Blocks on a GPU whose memory peers cannot open, or should not, as its worker may end: a copy of each block is in
    shared memory of the host, pinned, and is made anew when the block is offered.

    Args:
        blocks, layout: What and how.
        buffers: Those that the first blocks are in already, as peers could not open them: torch keeps what has been
            exported and not opened for ever, so they are not to be left.
    """

    kind = "pinned host memory"

    def __init__(self, blocks: Sequence[Block], layout: Layout, buffers: Sequence[Tensor] = ()) -> None:
        self._blocks, self._layout = blocks, layout
        self._buffers = list(buffers)
        self._segment: Segment | None = None
        self._pinned: list[Tensor] = []
        self._staged: list[Tensor] = []
        self.flats: list[Tensor] = []

    def share(self) -> Segment:
        """One buffer for each block on its device, and one segment of the host for all."""
        layout, device = self._layout, self._layout.device
        sizes = [*layout.ends, PROBE]
        self._segment, self._staged = _new_segment(sizes)
        self._pin(self._staged)
        self.flats = self._buffers[: len(layout.ends)]
        for number in range(len(self.flats), len(layout.ends)):
            flat = torch.empty(layout.ends[number], dtype=torch.uint8, device=device)
            move_into(flat, self._blocks[number], layout.views(flat, number))
            self.flats.append(flat)
        self.flats.append(_new_probe(device))
        for staged, flat in zip(self._staged, self.flats, strict=True):
            staged.copy_(flat)
        return self._segment

    def open(self, handle: Segment) -> tuple[list[Tensor], bool]:
        """Map the peer's copies. They can be written, as not every GPU takes memory that is for reading only."""
        flats = _map_segment(handle, [*self._layout.ends, PROBE], writable=True)
        self._pin(flats)
        return flats, False

    def publish(self, block: int, queues: Queues) -> Mark:
        """Copy the block to the host, beside what is computed."""
        with queues.copying(after=[queues.mark()]):
            self._staged[block].copy_(self.flats[block], non_blocking=True)
        return queues.mark_copies()

    def release(self) -> None:
        """Close the descriptor. Mappings stay."""
        if self._segment is not None:
            self._segment.release()
            self._segment = None

    def close(self) -> None:
        """Unpin. Idempotent."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())

    def _pin(self, flats: Sequence[Tensor]) -> None:
        """Let the device copy from and to the pages of a segment by itself."""
        if self._layout.device.type != "cuda":
            return
        for flat in flats:
            if flat.numel() and int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 1)) == 0:
                self._pinned.append(flat)
        if len(self._pinned) < sum(1 for flat in flats if flat.numel()):
            logger.warning(
                "LayUp: the memory through which workers exchange blocks cannot be pinned, so copies hold up training. "
                "Raise the limit on locked memory (`ulimit -l unlimited`)."
            )


def _new_segment(sizes: Sequence[int]) -> tuple[Segment, list[Tensor]]:
    """Memory that peers can map, and the pieces of it, each on pages of its own, so that it can be pinned alone."""
    segment = Segment.create(sum(map(_in_pages, sizes)))
    return segment, _map_segment(segment, sizes, writable=True)


def _map_segment(segment: Segment, sizes: Sequence[int], *, writable: bool) -> list[Tensor]:
    offsets = itertools.accumulate(map(_in_pages, sizes), initial=0)
    memory = segment.map(writable=writable)
    return [as_bytes(memory, offset, size) for offset, size in zip(offsets, sizes, strict=False)]


def _in_pages(size: int) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-size // page) * page
