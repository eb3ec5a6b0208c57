"""Windows between workers of one host: parameters live in memory that the peers map."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
import torch.multiprocessing  # registers how ForkingPickler sends CUDA tensors
from torch import Tensor

from ..blocks import Block
from ..fleet.data import travels
from ..ledger import Ledger
from . import opening
from .base import Gather
from .opening import Specification, require_one_model, specification, together

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


@travels
@dataclass
class _Export:
    """What a worker tells its peers so that they can map its memory."""

    host: str
    specification: Specification
    parameters: _Segment | None = None
    ledger: _Segment | None = None
    handles: list[bytes | None] = field(default_factory=list)


@travels
@dataclass(frozen=True)
class _Segment:
    """A piece of anonymous memory: no name in any file system, gone with the last process that maps it."""

    process: int
    descriptor: int
    inode: int
    num_bytes: int

    @classmethod
    def create(cls, num_bytes: int) -> _Segment:
        """Reserve memory now, so that too little of it is an error here and not a crash later."""
        descriptor = os.memfd_create("layup_hf", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            os.close(descriptor)
            raise MemoryError(
                f"Cannot reserve {num_bytes / 2**20:.0f} MiB of shared memory for the parameters: {error.strerror}. "
                "Start fewer workers on this host, use a smaller model, or raise the memory limit of the container."
            ) from error
        return cls(os.getpid(), descriptor, os.fstat(descriptor).st_ino, num_bytes)

    def map(self, *, writable: bool) -> mmap.mmap:
        """Map the segment, from its own process or from another one of the same user."""
        path = f"/proc/{self.process}/fd/{self.descriptor}"
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise ValueError(
                f"Cannot map the memory of worker process {self.process} ({error.strerror}). Workers with shared "
                "windows must run as one user in one container, and the peer must be alive."
            ) from error
        try:
            if os.fstat(descriptor).st_ino != self.inode:
                raise ValueError(
                    f"Process {self.process} is not the worker it should be: run all workers in one container."
                )
            return mmap.mmap(descriptor, self.num_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Close the descriptor in the process that created the segment; mappings stay."""
        os.close(self.descriptor)


class SharedWindows:
    """Reads peers on the same host in place: no copy, no thread, no socket.

    On the CPU, parameters are moved into anonymous shared memory (a Linux memfd: /dev/shm and its size do not matter,
    and nothing can be left behind), which keeps the identity of every `Parameter`. Peers map it for reading only. On
    CUDA, parameters stay where they are and peers open them by CUDA IPC; between two GPUs, `read` copies one block.

    Make it with `SharedWindows.open`.
    """

    kind = "shared"

    def __init__(self, ledger: Ledger, peers: dict[int, list[list[Tensor]]], devices: list[torch.device]) -> None:
        self.ledger = ledger
        self._peers = peers
        self._devices = devices
        self.keeps_reads = all(device.type == "cpu" for device in devices)  # between GPUs each read is a copy

    @classmethod
    def open(
        cls, blocks: Sequence[Block], rank: int, gather: Gather, among: Sequence[int] | None = None
    ) -> SharedWindows:
        """Export this worker's blocks and map those of its peers. Collective among the workers of all hosts: every
        worker returns, or every worker raises.

        Args:
            blocks: The model's blocks.
            rank: This worker.
            gather: Collects one object from every worker.
            among: Workers of this host, this one too. The others cannot be read, and do not share the ledger. None:
                all, and it is an error if they are on several hosts.

        Raises:
            ValueError: The workers hold different models, or are on several hosts, or this is not Linux.
            MemoryError: There is not enough memory to share.
        """
        if not sys.platform.startswith("linux"):
            raise ValueError(f"Shared windows need Linux, not {sys.platform}. Train with one process, or on Linux.")
        export = _Export(opening.host(), specification(blocks))
        exports: list[_Export] = gather(export)
        if among is None:
            _require_one_host([other.host for other in exports])
        require_one_model([other.specification for other in exports])
        local = sorted(range(len(exports)) if among is None else among)
        remote = [other for other in range(len(exports)) if other not in local]
        size = Ledger.size(len(blocks), len(exports))

        def share() -> None:
            if len(local) == 1:
                return
            export.parameters, export.handles = _share(blocks)
            if rank == local[0]:
                export.ledger = _Segment.create(8 * size)

        def connect() -> SharedWindows:
            segment = exports[local[0]].ledger
            memory = np.frombuffer(segment.map(writable=True), np.uint64) if segment else np.zeros(size, np.uint64)
            ledger = Ledger(memory, len(blocks), len(exports), rank, remote)
            peers = {peer: _map_blocks(blocks, exports[peer]) for peer in local if peer != rank}
            return cls(ledger, peers, [block.tensors[0].device for block in blocks])

        try:
            together(share, gather)
            exports = gather(export)
            return together(connect, gather)
        finally:
            for segment in (export.parameters, export.ledger):
                if segment is not None:
                    segment.release()

    def read(self, peer: int, block: int) -> list[Tensor]:
        """The peer's live block: its own memory on this device, else a copy of it."""
        theirs, device = self._peers[peer][block], self._devices[block]
        if theirs[0].device == device:
            return theirs
        return [tensor.to(device, non_blocking=True) for tensor in theirs]

    def release(self, peer: int, block: int) -> None:
        """Nothing to do: what was read is the peer's."""

    def arrived(self) -> Sequence[int]:
        """Nothing comes in the background."""
        return ()

    def exclude(self, peer: int) -> None:
        """Read the peer no more. Idempotent."""
        self._peers.pop(peer, None)

    def figures(self) -> dict[str, float]:
        """Nothing: a read costs what the merge costs."""
        return {}

    def close(self) -> None:
        """Let go of the peers' memory. Idempotent."""
        self._peers = {}


def _require_one_host(hosts: list[str]) -> None:
    if len(set(hosts)) > 1:
        places = "; ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts))
        raise ValueError(
            f"Shared windows need all workers on one host and in one container, but found {places}. Start all workers "
            "with one `accelerate launch` on one machine."
        )


def _share(blocks: Sequence[Block]) -> tuple[_Segment | None, list[bytes | None]]:
    """Make the blocks' tensors visible to peers; CPU tensors move into one segment, in place."""
    tensors = [tensor for block in blocks for tensor in (*block.parameters, *block.buffers)]
    strange = {tensor.device.type for tensor in tensors} - {"cpu", "cuda"}
    if strange:
        raise ValueError(
            f"Shared windows need parameters on CPUs or CUDA GPUs, not on {', '.join(sorted(strange))}: peers cannot "
            "read the memory of other devices."
        )
    offsets, total = _layout(tensors)
    handles = [bytes(ForkingPickler.dumps(tensor.detach())) if tensor.is_cuda else None for tensor in tensors]
    if total == 0:
        return None, handles
    segment = _Segment.create(total)
    memory = segment.map(writable=True)
    with torch.no_grad():
        for tensor, offset in zip(tensors, offsets, strict=True):
            if offset is not None:
                tensor.data = _view(memory, tensor, offset).copy_(tensor.data)
    return segment, handles


def _map_blocks(blocks: Sequence[Block], export: _Export) -> list[list[Tensor]]:
    """A peer's tensors, block by block, in the order of `Block.tensors`."""
    tensors = [tensor for block in blocks for tensor in block.tensors]
    offsets, _ = _layout(tensors)
    memory = export.parameters.map(writable=False) if export.parameters else None
    mapped = iter(
        pickle.loads(handle) if handle is not None else tensor if offset is None else _view(memory, tensor, offset)
        for tensor, offset, handle in zip(tensors, offsets, export.handles, strict=True)
    )
    return [[next(mapped) for _ in block.tensors] for block in blocks]


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int | None], int]:
    """Byte offset of each CPU tensor in its worker's segment (None: not in it), and the segment's size."""
    offsets: list[int | None] = []
    end = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            offsets.append(None)
            continue
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _view(memory: mmap.mmap | None, like: Tensor, offset: int) -> Tensor:
    """A contiguous tensor of the shape and dtype of `like`, with a storage of its own, at `offset` of `memory`."""
    assert memory is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # a peer's: for reading only
        flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)
