"""Windows between workers of one host: parameters live in memory that the peers can read."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..blocks import Block
from ..device import Mark, Queues, queues_of
from ..fleet.data import travels
from ..ledger import Ledger
from . import opening
from .base import Gather
from .copies import PeerCopies
from .ipc import CudaIpc, Ipc
from .layout import Layout
from .memory import DeviceMemory, HostMemory, Memory, StagedMemory, checksum
from .opening import Specification, require_one_model, specification, together
from .segment import Pulse, Segment

logger = logging.getLogger(__name__)

SLOTS = 2
"""Blocks of peers that may be on their way to a GPU, or there and not merged yet."""


@travels
@dataclass
class _Export:
    """What a worker tells its peers so that they can read its memory."""

    host: str
    specification: Specification
    process: int
    ledger: Segment | None = None
    memory: Any = None
    checksums: list[int] = field(default_factory=list)


@dataclass
class _View:
    """What this worker sees of a peer.

    Attributes:
        flats: The bytes of each block, wherever they are.
        blocks: The tensors of each block in them, if they can be read there.
        pulse: Of the peer's process.
    """

    flats: list[Tensor]
    blocks: list[list[Tensor]] | None
    pulse: Pulse


class SharedWindows:
    """Reads peers on the same host, without thread or socket.

    Each block moves into one buffer, which keeps the identity of every `Parameter`. On the CPU that is shared memory,
    and peers are read in place; so they are between workers that share a GPU. Between two GPUs, and where a GPU's
    memory cannot be opened by others, blocks are copied beside the computation into a few slots: see `PeerCopies`.

    Make it with `SharedWindows.open`.

    Args:
        ledger: Of all workers.
        memory: This worker's blocks.
        layout: How blocks lie in it.
        queues: Of this worker's device.
        views: Of each peer that can be read.
        slots: For copies.
    """

    kind = "shared"

    def __init__(
        self,
        ledger: Ledger,
        memory: Memory | None,
        layout: Layout,
        queues: Queues,
        views: dict[int, _View],
        slots: int,
    ) -> None:
        self.ledger = ledger
        self._memory, self._queues, self._views = memory, queues, views
        self._far = [peer for peer, view in views.items() if view.blocks is None]
        self._copies = PeerCopies(layout, queues, ledger, self._bytes_of, slots) if self._far else None

    @classmethod
    def open(
        cls,
        blocks: Sequence[Block],
        rank: int,
        gather: Gather,
        among: Sequence[int] | None = None,
        *,
        may_end: bool = False,
        ipc: Ipc | None = None,
        queues: Queues | None = None,
        slots: int = SLOTS,
    ) -> SharedWindows:
        """Export this worker's blocks and open those of its peers. Collective among the workers of all hosts: every
        worker returns, or every worker raises.

        Args:
            blocks: The model's blocks.
            rank: This worker.
            gather: Collects one object from every worker.
            among: Workers of this host, this one too. The others cannot be read, and do not share the ledger. None:
                all, and it is an error if they are on several hosts.
            may_end: Whether workers may end while others go on. Then nothing on a GPU is read by others: what becomes
                of it when its process ends is not defined.
            ipc, queues: Of a GPU; for tests.
            slots: Blocks that may be copied from other GPUs ahead of their merge.

        Raises:
            ValueError: The workers hold different models, or are on several hosts, or this is not Linux.
            MemoryError: There is not enough memory to share.
        """
        if not sys.platform.startswith("linux"):
            raise ValueError(f"Shared windows need Linux, not {sys.platform}. Train with one process, or on Linux.")
        export = _Export(opening.host(), specification(blocks), opening.process())
        exports: list[_Export] = gather(export)
        if among is None:
            _require_one_host([other.host for other in exports])
        require_one_model([other.specification for other in exports])
        local = sorted(range(len(exports)) if among is None else among)
        layout = Layout(blocks)
        queues = queues or queues_of(layout.device)

        together(lambda: _require_known_devices(blocks), gather)
        memory: Memory | None = None
        kinds = _kinds_of_memory(blocks, layout, may_end, ipc)
        for make_memory in kinds:
            memory = make_memory(memory.flats if memory is not None else ()) if len(local) > 1 else None
            try:
                views = _open_memory(memory, export, layout, queues, rank, local, gather)
                break
            except Exception as error:
                if make_memory is kinds[-1]:
                    raise
                if rank == local[0] and memory is not None:
                    logger.warning(
                        f"LayUp: workers cannot read each other's blocks by {memory.kind}, and exchange them through "
                        f"pinned host memory, which is slower ({type(error).__name__}: {error}). GPUs without "
                        "peer-to-peer access, MIG, and containers that do not share `--ipc` and `--pid` need that; if "
                        "you have none of them, unset PYTORCH_CUDA_ALLOC_CONF and look into `nvidia-smi topo -p2p r`."
                    )
        ledger = _open_ledger(len(blocks), len(exports), rank, local, export, gather)
        return cls(ledger, memory, layout, queues, views, slots)

    def _bytes_of(self, peer: int, block: int) -> Tensor | None:
        view = self._views.get(peer)
        return view.flats[block] if view is not None and view.pulse.beats else None

    def read(self, peer: int, block: int) -> list[Tensor] | None:
        """The peer's live block where it is, or a copy of it that has come; None of a peer that has ended."""
        view = self._views.get(peer)
        if view is None or not view.pulse.beats:
            return None
        if view.blocks is not None:
            return view.blocks[block]
        return self._copies.take(peer, block) if self._copies is not None else None

    def release(self, peer: int, block: int) -> None:
        """What was read has been merged: on a GPU, is merged by what has been queued."""
        if self._copies is not None:
            self._copies.release(peer, block)

    def arrived(self, is_free: Callable[[int], bool]) -> Sequence[int]:
        """Blocks whose copies have come; more of what is offered is copied ahead."""
        if self._copies is None:
            return ()
        arrived = self._copies.ready()
        self._copies.begin_waiting(self._far, is_free)
        return arrived

    def publish(self, block: int) -> Mark:
        """Let peers see the block as it is now, or will be when the device gets here."""
        return self._memory.publish(block, self._queues) if self._memory is not None else self._queues.mark()

    def exclude(self, peer: int) -> None:
        """Read the peer no more. Idempotent."""
        if (view := self._views.pop(peer, None)) is not None:
            if self._copies is not None:
                self._copies.drop(peer)
            self._queues.finish()  # what has been queued may still read it
            view.pulse.close()

    def figures(self) -> dict[str, float]:
        """Nothing: a read costs what the merge costs."""
        return {}

    def close(self) -> None:
        """Let go of the peers' memory. Idempotent."""
        if self._memory is not None:
            with contextlib.suppress(RuntimeError):  # of the device: then that has ended training, and is told there
                self._queues.finish()
        for view in self._views.values():
            view.pulse.close()
        if self._memory is not None:
            self._memory.close()
        self._views, self._memory, self._copies, self._far = {}, None, None, []


_MakeMemory = Callable[[Sequence[Tensor]], Memory]
"""Given the buffers that blocks are in already."""


def _kinds_of_memory(blocks: Sequence[Block], layout: Layout, may_end: bool, ipc: Ipc | None) -> list[_MakeMemory]:
    """What to try, the best first."""
    if layout.device.type == "cpu" and ipc is None:
        return [lambda buffers: HostMemory(blocks, layout)]
    staged: list[_MakeMemory] = [lambda buffers: StagedMemory(blocks, layout, buffers)]
    return staged if may_end else [lambda buffers: DeviceMemory(blocks, layout, ipc or CudaIpc()), *staged]


def _open_memory(
    memory: Memory | None,
    export: _Export,
    layout: Layout,
    queues: Queues,
    rank: int,
    local: Sequence[int],
    gather: Gather,
) -> dict[int, _View]:
    """Share this worker's blocks, and open those of its peers on this host, if there are any. Collective: every worker
    returns, or every worker raises.
    """
    exports: list[_Export] = []

    def share() -> None:
        if memory is not None:
            export.memory = memory.share()
            export.checksums = [checksum(flat, layout.device) for flat in memory.flats]
            queues.finish()  # peers do not wait for what is queued here

    def connect() -> dict[int, _View]:
        views: dict[int, _View] = {}
        if memory is None:
            return views
        for peer in local:
            if peer == rank:
                continue
            flats, in_place = memory.open(exports[peer].memory)
            if (seen := [checksum(flat, layout.device) for flat in flats]) != exports[peer].checksums:
                wrong = sum(a != b for a, b in zip(seen, exports[peer].checksums, strict=True))
                raise RuntimeError(f"{wrong} of {len(seen)} buffers of rank {peer} do not hold what it has written.")
            tensors = [layout.views(flat, block) for block, flat in enumerate(flats[:-1])] if in_place else None
            views[peer] = _View(flats, tensors, Pulse(exports[peer].process))
        return views

    try:
        together(share, gather)
        exports += gather(export)
        return together(connect, gather)
    except BaseException:
        if memory is not None:
            memory.close()
        raise
    finally:
        if memory is not None:
            memory.release()


def _open_ledger(
    num_blocks: int, world_size: int, rank: int, local: Sequence[int], export: _Export, gather: Gather
) -> Ledger:
    """Make or map what the workers of this host write into. Collective: all workers return, or all raise."""

    def make() -> None:
        if rank == local[0] and len(local) > 1:
            export.ledger = Segment.create(8 * size)

    def connect() -> Ledger:
        segment = exports[local[0]].ledger
        memory = np.frombuffer(segment.map(writable=True), np.uint64) if segment else np.zeros(size, np.uint64)
        return Ledger(memory, num_blocks, world_size, rank, remote)

    size = Ledger.size(num_blocks, world_size)
    remote = [other for other in range(world_size) if other not in local]
    try:
        together(make, gather)
        exports: list[_Export] = gather(export)
        return together(connect, gather)
    finally:
        if export.ledger is not None:
            export.ledger.release()


def _require_one_host(hosts: list[str]) -> None:
    if len(set(hosts)) > 1:
        places = "; ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts))
        raise ValueError(
            f"Shared windows need all workers on one host and in one container, but found {places}. Start all workers "
            "with one `accelerate launch` on one machine."
        )


def _require_known_devices(blocks: Sequence[Block]) -> None:
    """Make sure that peers can be let see where the blocks are."""
    devices = {(tensor.device.type, tensor.device.index or 0) for block in blocks for tensor in block.tensors}
    strange = {kind for kind, _ in devices} - {"cpu", "cuda"}
    if strange:
        raise ValueError(
            f"Shared windows need parameters on CPUs or CUDA GPUs, not on {', '.join(sorted(strange))}: peers cannot "
            "read the memory of other devices."
        )
    if len(devices) > 1 and {kind for kind, _ in devices} != {"cpu"}:
        names = ", ".join(sorted(f"{kind}:{index}" for kind, index in devices))
        raise ValueError(
            f"The model is on several devices ({names}), and a worker exchanges what is on one. Load it without "
            "`device_map`."
        )
