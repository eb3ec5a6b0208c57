"""What blocks were at one moment, to be read while they change: copied when they are about to change, not before."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .split import Block

PIECE = 1 << 23
"""Bytes that are read at a time: a step waits for the copying of so many at most."""

_LEAST = 1 << 12
"""Bytes of a tensor that are worth more than copying it at once."""

_FROZEN = -1  # in the place of a block's index: what is in no block


class Owner(NamedTuple):
    """Whose some memory is.

    Attributes:
        tensor: Of whose writes torch keeps count.
        block: The block's index, or `_FROZEN`.
        is_weight: A parameter; otherwise the optimizer's state of one.
    """

    tensor: Tensor
    block: int
    is_weight: bool


def owners_of(model: torch.nn.Module, blocks: Sequence[Block], states: Mapping[Any, Mapping[str, Any]]) -> list[Owner]:
    """What is known to change at a block's boundary only, or not at all: parameters, and what an optimizer has of them.

    Buffers are not among it: forward changes them. Nor is what is small.

    Args:
        model: What is trained.
        blocks: Of the model.
        states: The optimizer's, by parameter.
    """
    owners = []
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters}
    for block in blocks:
        for parameter in block.parameters:
            owners.append(Owner(parameter, block.index, is_weight=True))
            held = states[parameter].values() if parameter in states else ()
            owners += [Owner(value, block.index, is_weight=False) for value in held if isinstance(value, Tensor)]
    owners += [Owner(p, _FROZEN, is_weight=True) for p in model.parameters() if id(p) not in in_blocks]
    return [owner for owner in owners if owner.tensor.layout is torch.strided and owner.tensor.nbytes >= _LEAST]


class Extent:
    """Some bytes as they were when the snapshot was taken, to be read once. Made by `Snapshot.extent`.

    Attributes:
        size: How many.
        owner: Whose memory they are in as long as `source` is that; None where they are a copy from the beginning.
        source: Where they are: bytes on any device; None when they have been read.
        is_copied: Nobody else writes to `source`.
        taken: How many have been read.
        ready: On CUDA: the copy has been made, if it has been begun.
    """

    def __init__(self, source: Tensor, owner: Owner | None) -> None:
        self.size, self.owner, self.taken = source.numel(), owner, 0
        self.source: Tensor | None = source
        self.is_copied = owner is None
        self.ready: Any = None
        self._version = owner.tensor._version if owner is not None else 0

    def require_unchanged(self) -> None:
        """Make sure that nothing has written what is to be read.

        Raises:
            RuntimeError: Something has, and has not called `before_write`.
        """
        if self.owner is not None and not self.is_copied and self.owner.tensor._version != self._version:
            kind = "A parameter" if self.owner.is_weight else "The optimizer's state of a parameter"
            raise RuntimeError(
                f"{kind} of shape {tuple(self.owner.tensor.shape)} has been changed by something else than its "
                "block's step (a callback, say) before it was written to a checkpoint. Set `checkpoints='wait'`."
            )


class Snapshot:
    """Blocks and their optimizer's state at one moment, while training goes on.

    It takes no memory before something changes. Whoever is about to write a block calls `before_write`, which copies
    what of the block is in the snapshot and has not been read yet. Another thread reads, piece by piece; what has been
    read is let go. A lock keeps the two apart: a step waits for the copying of a piece, never for what the reader does
    with it.

    On CUDA, copies are made by a stream of their own into pinned memory. The stream that steps the block waits for its
    copy on the device; no thread of the processor does but the reader's. (`Tensor.copy_` between pinned memory and a
    device with `non_blocking=True` is queued on the present stream, and the host allocator notes that stream with the
    memory, so it is not used anew before: `copy_kernel_cuda` in torch's `ATen/native/cuda/Copy.cu`.)

    Args:
        owners: Whose memory changes when; see `owners_of`.

    Attributes:
        failure: Why it is of no use any more; None while it is.
    """

    def __init__(self, owners: Iterable[Owner]) -> None:
        self._lock = threading.Lock()
        self._owners: dict[int, Owner | None] = {}
        for owner in owners:
            address = owner.tensor.untyped_storage().data_ptr()
            known = self._owners.get(address, owner)
            self._owners[address] = owner if known is not None and known.block == owner.block else None
        self._weights: dict[int, list[Extent]] = {}  # by block: what is to be copied before it is written
        self._states: dict[int, list[Extent]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._room: Tensor | None = None
        self.failure: BaseException | None = None

    # ---- What is in it ----

    def extent(self, storage: torch.UntypedStorage, offset: int, size: int) -> Extent:
        """Some bytes of a storage. Those of an owner are noted, all others are copied now."""
        source = _bytes_of(storage)[offset : offset + size]
        owner = self._owners.get(storage.data_ptr()) if size >= _LEAST else None
        if owner is None:
            return Extent(source.to("cpu", copy=True), None)
        extent = Extent(source, owner)
        if source.device.type == "cuda":
            self._stream_of(source.device)
        groups = self._weights if owner.is_weight else self._states
        groups.setdefault(owner.block, []).append(extent)
        return extent

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        """On which copies are made; it waits there for what has been queued when it is first asked for."""
        if device not in self._streams:
            self._streams[device] = stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    # ---- Before it changes ----

    def before_write(self, block: int, weights_alone: bool = False) -> None:
        """Keep what a block was; it may be written when this returns.

        Args:
            block: Its index.
            weights_alone: What the optimizer has of it stays as it is.
        """
        if block not in self._weights and block not in self._states:
            return
        with self._lock:
            self._keep(self._weights, block)
            if not weights_alone:
                self._keep(self._states, block)

    def before_agreement(self) -> None:
        """All parameters are about to change, those in no block among them, but not the optimizer's state."""
        for block in list(self._weights):
            self.before_write(block, weights_alone=True)

    def _keep(self, groups: dict[int, list[Extent]], block: int) -> None:
        for extent in groups.get(block, ()):
            if extent.source is not None and not extent.is_copied and self.failure is None:
                try:
                    extent.require_unchanged()
                    self._copy(extent, extent.source)
                except (MemoryError, RuntimeError) as error:  # training is not to end in the middle of a step
                    self.failure = error
        groups.pop(block, None)

    def _copy(self, extent: Extent, source: Tensor) -> None:
        """Only what has not been read; so the bytes before that are left as they come."""
        on_cuda = source.device.type == "cuda"
        copy = torch.empty(extent.size, dtype=torch.uint8, pin_memory=on_cuda)
        if on_cuda:
            stream, current = self._stream_of(source.device), torch.cuda.current_stream(source.device)
            with torch.cuda.stream(stream):
                copy[extent.taken :].copy_(source[extent.taken :], non_blocking=True)
                extent.ready = stream.record_event()
            current.wait_event(extent.ready)
        else:
            copy[extent.taken :].copy_(source[extent.taken :])
        extent.source, extent.is_copied = copy, True

    # ---- Reading ----

    def read(self, extent: Extent) -> Iterator[memoryview]:
        """The bytes, piece by piece; each is to be used before the next is asked for. For one thread alone.

        Raises:
            RuntimeError: They cannot be known any more.
            MemoryError: There was no memory for a copy.
        """
        while extent.taken < extent.size:
            with self._lock:
                piece = self._next_piece(extent)
            yield memoryview(piece.numpy())  # type: ignore[arg-type] # numpy says so from Python 3.12 on
        with self._lock:
            extent.source = None

    def _next_piece(self, extent: Extent) -> Tensor:
        if self.failure is not None:
            raise self.failure
        assert extent.source is not None
        begin, end = extent.taken, min(extent.size, extent.taken + PIECE)
        extent.taken, part = end, extent.source[begin:end]
        if extent.is_copied:
            if extent.ready is not None:
                extent.ready.synchronize()
            return part
        extent.require_unchanged()
        if self._room is None:
            self._room = torch.empty(PIECE, dtype=torch.uint8, pin_memory=part.device.type == "cuda")
        room = self._room[: end - begin]
        if part.device.type == "cuda":
            stream = self._stream_of(part.device)
            with torch.cuda.stream(stream):
                room.copy_(part, non_blocking=True)
            stream.synchronize()
        elif part.device.type != "cpu":
            room.copy_(part)
        else:
            room.numpy()[:] = part.numpy()  # by this thread alone: torch would start others beside those that train
        return room

    def close(self) -> None:
        """Keep nothing any more. Idempotent."""
        with self._lock:
            self._weights, self._states, self._room = {}, {}, None
            self._owners.clear()


class Snapshots:
    """The snapshot that there is now, if there is one, for those who write blocks.

    Attributes:
        present: That snapshot. While there is none, asking costs one look.
    """

    def __init__(self) -> None:
        self.present: Snapshot | None = None

    def end(self) -> None:
        """Nobody reads the present one any more. Idempotent."""
        present, self.present = self.present, None
        if present is not None:
            present.close()

    def before_step(self, block: int) -> None:
        """The block with this index, and what the optimizer has of it, are about to be written.

        To be called while nothing else writes the block, on the device, too: what is queued there waits for the copy.
        """
        if (present := self.present) is not None:
            present.before_write(block)

    def before_merge(self, block: int) -> None:
        """The block with this index is about to be written, and what the optimizer has of it is not."""
        if (present := self.present) is not None:
            present.before_write(block, weights_alone=True)

    def before_agreement(self) -> None:
        """All workers are about to take one model."""
        if (present := self.present) is not None:
            present.before_agreement()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The whole of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
