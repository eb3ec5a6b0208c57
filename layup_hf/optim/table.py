"""What a kernel is told of a block's step: where its tensors are, and by which numbers they are stepped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor


class Column(IntEnum):
    """Of a row of addresses, one for each parameter. Those of peers' parameters follow, one for each merge."""

    VALUE = 0
    GRADIENT = 1
    FIRST = 2
    SECOND = 3
    LENGTH = 4  # by what the step is longer; one number for each row
    THEIR_FIRST = 5  # a peer's first moment, if it is compared with
    SQUARE = 6  # of each row: receives the mean square of the difference to that
    SECOND_OF_ROW = 7  # of each row: receives the mean of the second moment before the step
    ROWS = 8  # a number, not an address
    WIDTH = 9  # of a row; a number, too


class Scalar(IntEnum):
    """Of a row of scalars. The weights of merges follow."""

    FACTOR = 0  # of the gradient, by clipping
    AHEAD = 1  # share of the gradient in what is stepped by
    FIRST = 2  # in the first moment
    SECOND = 3  # of its square in the second moment
    RATE = 4
    DECAY = 5
    ROOT = 6
    EPSILON = 7


PEERS, WEIGHTS = len(Column), len(Scalar)
BY_ROW = (Column.LENGTH, Column.SQUARE, Column.SECOND_OF_ROW)
BYTES = 4
"""Of a number in single precision."""


@dataclass
class Table:
    """A step of some parameters in single precision, all dense and laid out alike with their rows one after the other.

    Attributes:
        addresses: int64 of shape (parameters, columns); see `Column`.
        scalars: float32 of shape (parameters, scalars); see `Scalar`.
        merges: How many peers' parameters are merged.
        compares: Whether first moments are compared with a peer's. Rows are then to be kept apart.
        factor: Of all gradients, a scalar on their device, or a number on a CPU; None: 1.
        tensors: The parameters' gradients, say, whose device and stream the kernel goes by.
    """

    addresses: np.ndarray
    scalars: np.ndarray
    merges: int
    compares: bool
    factor: Tensor | float | None
    tensors: Sequence[Tensor]

    @staticmethod
    def columns(merges: int) -> int:
        """How many addresses a parameter has."""
        return PEERS + merges

    @staticmethod
    def numbers(merges: int) -> int:
        """How many scalars a parameter has."""
        return WEIGHTS + merges

    @property
    def numel(self) -> int:
        """Numbers that are stepped."""
        return int((self.addresses[:, Column.ROWS] * self.addresses[:, Column.WIDTH]).sum())

    def cut(self, most: int) -> Table:
        """The same step with parameters cut between rows: no piece has more than so many numbers, or one row."""
        rows, width = self.addresses[:, Column.ROWS], self.addresses[:, Column.WIDTH]
        rows_of_piece = np.maximum(1, most // np.maximum(width, 1))
        pieces = -(-rows // rows_of_piece)
        number = np.repeat(np.arange(len(rows)), pieces)
        first = (np.arange(len(number)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * rows_of_piece[number]
        addresses = self.addresses[number]
        rows_before = np.full(addresses.shape[1], 0)[None, :] + first[:, None] * BYTES
        by_row = np.zeros(addresses.shape[1], dtype=bool)
        by_row[list(BY_ROW)] = True
        shift = np.where(by_row, rows_before, rows_before * width[number][:, None])
        shift[:, [Column.ROWS, Column.WIDTH]] = 0
        addresses = np.where(addresses != 0, addresses + shift, 0)
        addresses[:, Column.ROWS] = np.minimum(rows[number] - first, rows_of_piece[number])
        return Table(addresses, self.scalars[number], self.merges, self.compares, self.factor, self.tensors)

    def shared_out(self, workers: int) -> list[Table]:
        """The same step as tables of about equal work, at most so many."""
        if workers <= 1:
            return [self]
        pieces = self.cut(-(-self.numel // (4 * workers)))
        work = np.cumsum(pieces.addresses[:, Column.ROWS] * pieces.addresses[:, Column.WIDTH])
        ends = np.searchsorted(work, work[-1] * np.arange(1, workers) / workers, side="left") + 1
        return [
            Table(addresses, scalars, self.merges, self.compares, self.factor, self.tensors)
            for addresses, scalars in zip(np.split(pieces.addresses, ends), np.split(pieces.scalars, ends), strict=True)
            if len(addresses)
        ]
