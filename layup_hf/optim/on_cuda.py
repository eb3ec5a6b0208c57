"""The one pass on a GPU: one kernel for a block, in Triton, which comes with torch."""

from __future__ import annotations

from types import FunctionType

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arithmetic
from .table import PEERS, WEIGHTS, Column, Scalar, Table

_TILE = 1024
"""Numbers that a program of the kernel has in its registers at a time."""

_PIECE = 16 * _TILE
"""Numbers that a program steps, or one row."""

# Triton looks for its language among the names of the module that a function is from.
towards, stepped = (
    triton.jit(FunctionType(function.__code__, globals())) for function in (arithmetic.towards, arithmetic.stepped)
)


class CudaPass:
    """Steps blocks on a GPU.

    A block takes one launch, whatever it holds: addresses and scalars of its parameters go to the device with it, in
    one copy from pinned memory, which nothing waits for. (Where rows are short, as LoRA's, one launch for each width.)

    Args:
        device: The GPU. Tests give a CPU, and let Triton interpret the kernel.
    """

    name = "by a kernel for the GPU"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, table: Table) -> None:
        """Make the step that the table says, on the current stream."""
        factor = torch.as_tensor(1.0 if table.factor is None else table.factor, device=self._device)
        columns = np.minimum(_TILE, 2 ** np.ceil(np.log2(np.maximum(table.addresses[:, Column.WIDTH], 1))).astype(int))
        for width in np.unique(columns).tolist():
            rows = columns == width
            of_width = Table(
                table.addresses[rows], table.scalars[rows], table.merges, table.compares, None, table.tensors
            )
            pieces = of_width.cut(_PIECE)
            addresses, scalars = self._sent(pieces.addresses), self._sent(pieces.scalars)
            _step_block[len(addresses),](
                addresses,
                scalars,
                factor.float(),
                addresses.shape[1],
                scalars.shape[1],
                MERGES=table.merges,
                COMPARES=table.compares,
                ROWS=_TILE // width,
                WIDTH=width,
            )

    def _sent(self, array: np.ndarray) -> Tensor:
        """A copy on the device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)  # torch keeps it until it has been copied

    def close(self) -> None:
        """Nothing is held."""


_VALUE, _GRADIENT, _FIRST, _SECOND = (
    tl.constexpr(int(c)) for c in (Column.VALUE, Column.GRADIENT, Column.FIRST, Column.SECOND)
)
_LENGTH, _THEIR_FIRST = tl.constexpr(int(Column.LENGTH)), tl.constexpr(int(Column.THEIR_FIRST))
_SQUARE, _SECOND_OF_ROW = tl.constexpr(int(Column.SQUARE)), tl.constexpr(int(Column.SECOND_OF_ROW))
_ROWS, _WIDTH = tl.constexpr(int(Column.ROWS)), tl.constexpr(int(Column.WIDTH))
_FACTOR, _AHEAD, _FIRST_SHARE, _SECOND_SHARE, _RATE, _DECAY, _ROOT, _EPSILON = (tl.constexpr(int(s)) for s in Scalar)
_PEERS, _WEIGHTS = tl.constexpr(PEERS), tl.constexpr(WEIGHTS)


@triton.jit
def _step_block(  # type: ignore[no-untyped-def] # Triton takes no names of types
    addresses,  # noqa: ANN001
    scalars,  # noqa: ANN001
    factor,  # noqa: ANN001
    columns,  # noqa: ANN001
    numbers,  # noqa: ANN001
    MERGES: tl.constexpr,
    COMPARES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One line of the table, by tiles of so many rows and so many numbers of each; see `Table`."""
    line, numbers_of = addresses + tl.program_id(0) * columns, scalars + tl.program_id(0) * numbers
    rows, width = tl.load(line + _ROWS), tl.load(line + _WIDTH)
    f32 = tl.pointer_type(tl.float32)
    values, gradients = tl.load(line + _VALUE).to(f32), tl.load(line + _GRADIENT).to(f32)
    firsts, seconds = tl.load(line + _FIRST).to(f32), tl.load(line + _SECOND).to(f32)
    lengths = tl.load(line + _LENGTH).to(f32)
    scale = tl.load(factor) * tl.load(numbers_of + _FACTOR)
    ahead_share, first_share = tl.load(numbers_of + _AHEAD), tl.load(numbers_of + _FIRST_SHARE)
    second_share, rate = tl.load(numbers_of + _SECOND_SHARE), tl.load(numbers_of + _RATE)
    decay, root_scale = tl.load(numbers_of + _DECAY), tl.load(numbers_of + _ROOT)
    epsilon = tl.load(numbers_of + _EPSILON)
    for row in range(0, rows, ROWS):
        of_rows = row + tl.arange(0, ROWS)
        length = tl.load(lengths + of_rows, of_rows < rows)[:, None]
        square, second_of_row = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for start in range(0, width, WIDTH):
            of_row = start + tl.arange(0, WIDTH)
            place = of_rows[:, None].to(tl.int64) * width + of_row[None, :]
            there = (of_rows < rows)[:, None] & (of_row < width)[None, :]
            value, gradient = tl.load(values + place, there), tl.load(gradients + place, there)
            first, second = tl.load(firsts + place, there), tl.load(seconds + place, there)
            for peer in tl.static_range(MERGES):
                theirs = tl.load(line + _PEERS + peer).to(f32)
                value = towards(value, tl.load(theirs + place, there), tl.load(numbers_of + _WEIGHTS + peer))
            gradient = gradient * scale
            if COMPARES:
                difference = first - tl.load(tl.load(line + _THEIR_FIRST).to(f32) + place, there)
                square += tl.sum(tl.where(there, difference * difference, 0.0), 1)
                second_of_row += tl.sum(tl.where(there, second, 0.0), 1)
            ahead = towards(first, gradient, ahead_share)
            second = towards(second, gradient * gradient, second_share)
            value = stepped(value, ahead, tl.sqrt_rn(second), length, rate, decay, root_scale, epsilon)
            tl.store(values + place, value, there)
            tl.store(firsts + place, towards(first, gradient, first_share), there)
            tl.store(seconds + place, second, there)
        if COMPARES:
            tl.store(tl.load(line + _SQUARE).to(f32) + of_rows, square / width, of_rows < rows)
            tl.store(tl.load(line + _SECOND_OF_ROW).to(f32) + of_rows, second_of_row / width, of_rows < rows)
