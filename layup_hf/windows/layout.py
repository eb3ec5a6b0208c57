"""How the tensors of a block lie in one piece of memory: in the windows, and on their way over a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Block

Pieces = Sequence[tuple[int, int]]
"""Address and number of bytes of each part of a transfer."""

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


class Layout:
    """How the tensors of each block lie in a buffer.

    Args:
        blocks: The model's blocks, on one device.
        wire_dtype: "fp32": every tensor as it is; "bf16": tensors in fp32 as bf16.

    Attributes:
        converts: Whether some tensor lies there in another dtype than it has.
        num_bytes: Of each block, without what alignment adds.
        ends: Bytes that a buffer for each block takes.
        size: The largest of these.
        device: Where the blocks are.
    """

    def __init__(self, blocks: Sequence[Block], wire_dtype: str = "fp32") -> None:
        self._blocks = list(blocks)  # not their tensors: they would keep the memory that blocks move out of
        self._places: list[list[_Place]] = []
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
        self.num_bytes = [sum(place.num_bytes for place in places) for places in self._places]
        self.ends = [_aligned(places[-1].end) if places else 0 for places in self._places]
        self.size = max([1, *self.ends])
        self.device = device or torch.device("cpu")

    def new_buffer(self) -> Tensor:
        """Bytes for any one block."""
        return torch.empty(self.size, dtype=torch.uint8, device=self.device)

    def live(self, block: int) -> list[Tensor]:
        """The block itself."""
        return self._blocks[block].tensors

    def views(self, buffer: Tensor, block: int) -> list[Tensor]:
        """The block's tensors, as they lie in a buffer."""
        return [buffer[place.offset : place.end].view(place.dtype).view(place.shape) for place in self._places[block]]

    def pieces(self, address: int, block: int) -> Pieces:
        """Where the block's tensors lie in a buffer that begins at `address`."""
        return [(address + place.offset, place.num_bytes) for place in self._places[block] if place.num_bytes]

    def live_pieces(self, block: int) -> Pieces:
        """Where the block's tensors lie themselves."""
        return [(tensor.data_ptr(), tensor.nbytes) for tensor in self.live(block) if tensor.numel()]


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
