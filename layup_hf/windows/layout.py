"""How the tensors of a block lie in one piece of memory: in the windows, and on their way over a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Block
from .coding import Coded, Plan

Pieces = Sequence[tuple[int, int]]
"""Address and number of bytes of each part of a transfer."""

BITS = {"int8": 8, "int4": 4}
"""Of a word, by the `wire_dtype`s that code tensors in fp32; see `coding.py`."""

MOST_STEPS = 8192
"""With which a block is coded: they travel in the request for it."""

_PARTS, _PARTS_OF_BLOCK = 16, 2048  # of a tensor and of a block that have steps of their own, where that many are few

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class _Place(NamedTuple):
    """Of a tensor in a buffer."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


class _CodedPlace(NamedTuple):
    """Of a coded tensor in the room for what is coded."""

    offset: int
    plan: Plan

    @property
    def words(self) -> int:
        """Where they begin; sums come first."""
        return self.offset + 8 * self.plan.pieces

    @property
    def end(self) -> int:
        return self.words + self.plan.word_bytes


class Layout:
    """How the tensors of each block lie in a buffer.

    Args:
        blocks: The model's blocks, on one device.
        wire_dtype: "fp32": every tensor as it is; "bf16": tensors in fp32 as bf16; "int8" and "int4": they can be coded
            with so many bits, too, in a room behind the one for the block as it is.
        on_host: Buffers lie in the host's memory, wherever the blocks are.

    Attributes:
        on_host: The same.
        is_pinned: Whether they are pinned there, for copies that a GPU makes by itself.
        bits: Of a number that is coded; 0: none is.
        converts: Whether some tensor lies there in another dtype than it has.
        num_bytes: Of each block, without what alignment adds.
        coded_bytes: Likewise, if it is coded.
        num_steps: With how many steps each block is coded; 0: it cannot be.
        ends: Bytes that a buffer for each block takes.
        size: The largest of these.
        coded_size: Bytes of the room for a coded block.
        device: Where the blocks are.
    """

    def __init__(self, blocks: Sequence[Block], wire_dtype: str = "fp32", *, on_host: bool = False) -> None:
        self.on_host = on_host
        self._blocks = list(blocks)  # not their tensors: they would keep the memory that blocks move out of
        self._places: list[list[_Place]] = []
        self._coded: list[list[_CodedPlace | None]] = []
        self.bits = BITS.get(wire_dtype, 0)
        self.converts = False
        device = None
        for block in self._blocks:
            tensors, places, end = block.tensors, [], 0
            for tensor in tensors:
                is_rounded = wire_dtype == "bf16" and tensor.dtype == torch.float32
                place = _Place(end, torch.bfloat16 if is_rounded else tensor.dtype, tensor.shape)
                places.append(place)
                end = _aligned(place.end)
                self.converts |= is_rounded
                device = device or tensor.device
            self._places.append(places)
            self._coded.append(_coded_places(places, self.bits))
        self.num_bytes = [sum(place.num_bytes for place in places) for places in self._places]
        self.ends = [_aligned(places[-1].end) if places else 0 for places in self._places]
        self.size = max([1, *self.ends])
        self.num_steps = [sum(place.plan.parts for place in places if place) for places in self._coded]
        self._coded_ends = [max([0, *(place.end for place in places if place)]) for places in self._coded]
        self.coded_bytes = [
            end + sum(place.num_bytes for place, coded in zip(*both, strict=True) if coded is None)
            for end, both in zip(self._coded_ends, zip(self._places, self._coded, strict=True), strict=True)
        ]
        self.coded_size = _aligned(max([0, *self._coded_ends]))
        self.device = device or torch.device("cpu")
        self.is_pinned = on_host and self.device.type == "cuda"

    @property
    def goes_live(self) -> bool:
        """Whether blocks that are not coded are sent from where they lie."""
        return not (self.converts or self.on_host)

    def new_buffer(self) -> Tensor:
        """Bytes for any one block, as it is and coded."""
        return self._bytes(self.size + self.coded_size)

    def new_sending_buffer(self) -> Tensor | None:
        """Bytes for what of any one block is not sent from where it lies."""
        if self.on_host:
            return self.new_buffer()
        size = self.size if self.converts else self.coded_size
        return self._bytes(size) if size else None

    def new_mirror(self) -> Tensor:
        """Bytes like those of a buffer in the host's memory, where the blocks are."""
        return torch.empty(self.size + self.coded_size, dtype=torch.uint8, device=self.device)

    def new_coding_room(self) -> Tensor:
        """Bytes for a coded block alone, where the blocks are."""
        return torch.empty(self.coded_size, dtype=torch.uint8, device=self.device)

    def _bytes(self, size: int) -> Tensor:
        if not self.on_host:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.is_pinned)

    def spans(self, block: int, is_coded: bool) -> Pieces:
        """Where in a buffer something lies of a block that has come: begin and number of bytes."""
        return self.coded_pieces(0, block) if is_coded else [(0, self.ends[block])]

    def live(self, block: int) -> list[Tensor]:
        """The block itself."""
        return self._blocks[block].tensors

    def views(self, buffer: Tensor, block: int) -> list[Tensor]:
        """The block's tensors, as they lie in a buffer."""
        return [buffer[place.offset : place.end].view(place.dtype).view(place.shape) for place in self._places[block]]

    def plans(self, block: int) -> list[Plan | None]:
        """How each tensor is coded; None: not at all."""
        return [place.plan if place is not None else None for place in self._coded[block]]

    def coded_views(self, room: Tensor, block: int) -> list[tuple[Plan, Coded] | None]:
        """For each tensor how it is coded and where, in a room for what is coded; None: it is sent as it is."""

        def views(place: _CodedPlace) -> tuple[Plan, Coded]:
            sums = room[place.offset : place.words].view(torch.int64)
            return place.plan, Coded(sums, room[place.words : place.end])

        return [views(place) if place is not None else None for place in self._coded[block]]

    def coded_source(self, room: int, block: int) -> Pieces:
        """Where a coded block is sent from: a room for what is coded, at this address, and where the rest lies."""
        rest = [tensor for tensor, place in zip(self.live(block), self._coded[block], strict=True) if place is None]
        return [(room, self._coded_ends[block]), *((t.data_ptr(), t.nbytes) for t in rest if t.numel())]

    def coded_pieces(self, address: int, block: int) -> Pieces:
        """Where a coded block comes to lie in a buffer that begins at `address`; the rest of it as it is."""
        both = zip(self._places[block], self._coded[block], strict=True)
        rest = [(address + p.offset, p.num_bytes) for p, coded in both if coded is None and p.num_bytes]
        return [(address + self.size, self._coded_ends[block]), *rest]

    def pieces(self, address: int, block: int) -> Pieces:
        """Where the block's tensors lie in a buffer that begins at `address`."""
        return [(address + place.offset, place.num_bytes) for place in self._places[block] if place.num_bytes]

    def live_pieces(self, block: int) -> Pieces:
        """Where the block's tensors lie themselves."""
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in self.live(block) if tensor.numel()]


def _coded_places(places: Sequence[_Place], bits: int) -> list[_CodedPlace | None]:
    """Of a block's tensors, one after the other; None for those that are not coded."""
    numbers = [p.shape.numel() if bits and p.dtype == torch.float32 else 0 for p in places]
    count = sum(map(bool, numbers))
    if count > MOST_STEPS:
        return [None] * len(places)
    most_parts = max(1, min(_PARTS, _PARTS_OF_BLOCK // max(1, count)))
    coded, end = list[_CodedPlace | None](), 0
    for numel in numbers:
        place = _CodedPlace(end, Plan.of(numel, bits, most_parts)) if numel else None
        coded.append(place)
        end = _aligned(place.end) if place else end
    return coded


def move_into(buffer: Tensor, block: Block, views: Sequence[Tensor]) -> None:
    """Let the tensors of a block live in a buffer from here on: the same objects, with the same values.

    Each gets a storage of its own, which is a part of the buffer and keeps all of it alive. As views of one storage
    they would look tied: `save_pretrained` would copy every one of them first, and `torch.save` of one write all.

    Args:
        buffer: Bytes, on the block's device.
        block: Whose tensors move.
        views: Of the buffer, like the block's tensors.
    """
    with torch.no_grad():
        for tensor, view in zip((*block.parameters, *block.buffers), views, strict=True):
            if tensor.numel():
                tensor.data = torch.from_dlpack(view.copy_(tensor.data))
