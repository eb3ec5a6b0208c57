"""Fewer bits for numbers of which the receiver has others that are close: modulo quantisation.

After Moniqua (arXiv 2002.11787). The sender divides each number by a step and rounds it to one of the two neighbouring
integers, at random, such that it is right in the mean. Of this integer, its *count*, it sends the low bits only, a
*word*. The receiver divides its own number by the same step: of all counts with these low bits, it takes the nearest
one. If the two numbers are less than `reach(bits)` steps apart, that is the sender's count, whatever the receiver's own
number is.

If they are further apart, it is another one: a wrap-around. So of every piece of numbers a sum is sent, too: of the
counts, each times a random factor that both know, modulo 2**64. For any two sequences of counts that differ, it is the
same with a probability of 2**-31 at most: of what a count that differs is multiplied by, 31 random bits, one value
alone makes up for the rest of the sum (counts have 23 bits, so their products with different factors differ modulo
2**64). The factors are drawn anew for each block that is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PIECE = 4096
"""Numbers that share a sum, at most; the last piece of a tensor may be smaller."""

LARGEST = 2**22
"""Counts are smaller than that: fp32 has room for them, with two bits to spare when they are searched for."""


def reach(bits: int) -> int:
    """Steps that two numbers may be apart: half of what words can tell apart, less the step that rounding may take."""
    return 2 ** (bits - 1) - 1


def factors(seed: int) -> np.ndarray:
    """What the counts of a piece are multiplied by in its sum: int32 of shape (PIECE,), from 0 up to 2**31.

    The same for a seed wherever it is computed: numpy keeps the raw stream of a bit generator as it is.
    """
    raw = np.random.Philox(key=seed).random_raw(PIECE // 2).astype("<u8")
    return (raw.view("<u4") >> 1).astype(np.int32)


@dataclass(frozen=True)
class Plan:
    """How a tensor is coded.

    Attributes:
        numel: Its numbers.
        bits: Of a word: 8, or 4, of which a byte holds two.
        parts: Each has a step of its own.
        pieces_each: Pieces of a part; the last part may have fewer.
    """

    numel: int
    bits: int
    parts: int
    pieces_each: int

    @classmethod
    def of(cls, numel: int, bits: int, most_parts: int) -> Plan:
        """Parts of equal size, and not more than there are pieces; `numel` is not 0."""
        pieces = -(-numel // PIECE)
        pieces_each = -(-pieces // most_parts)
        return cls(numel, bits, -(-pieces // pieces_each), pieces_each)

    @property
    def pieces(self) -> int:
        return -(-self.numel // PIECE)

    @property
    def word_bytes(self) -> int:
        """Of all words. A piece begins with a byte of its own."""
        whole, rest = divmod(self.numel, PIECE)
        return whole * self.bytes_of(PIECE) + self.bytes_of(rest)

    def bytes_of(self, numbers: int) -> int:
        """Bytes that the words of so many numbers of one piece take."""
        return numbers if self.bits == 8 else (numbers + 1) // 2

    def numbers(self, part: int) -> slice:
        """Which numbers a part has."""
        each = PIECE * self.pieces_each
        return slice(part * each, min((part + 1) * each, self.numel))


@dataclass(frozen=True)
class Coded:
    """What is sent of a tensor: views of a buffer.

    Attributes:
        sums: int64 of shape (pieces,).
        words: uint8 of shape (bytes,), piece by piece. With 4 bits, the first half of a piece's numbers is in the low
            halves of its bytes and the second one in the high halves.
    """

    sums: Tensor
    words: Tensor


@dataclass
class Seen:
    """What came out of decoding a tensor, part by part: arrays of shape (parts,).

    Attributes:
        farthest: Largest distance between a number of the sender and the receiver's own, if `wrong` is 0; fp32.
        largest: Largest absolute value of the sender's numbers, likewise.
        wrong: Pieces whose sum is not theirs; int32.
    """

    farthest: np.ndarray
    largest: np.ndarray
    wrong: np.ndarray


class Coder(Protocol):
    """Codes tensors on one device. Each number is read once, so what is written meanwhile is old or new, not both."""

    def encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: np.ndarray, into: Coded) -> bool:
        """Write what is to be sent of a tensor; False if that cannot be: some number is not finite, or too large for
        its step. Then what has been written means nothing.

        Args:
            plan: How.
            values: fp32, contiguous; any shape.
            steps: fp32 of shape (parts,).
            factors: Of `factors`.
            into: Where to.
        """

    def decode(
        self, plan: Plan, coded: Coded, steps: np.ndarray, factors: np.ndarray, mine: Tensor, into: Tensor
    ) -> Seen:
        """Write the sender's numbers, as they were rounded.

        Args:
            plan: How.
            coded: What has come.
            steps: As they were for `encode`.
            factors: Likewise.
            mine: The receiver's own numbers: fp32, contiguous; any shape.
            into: fp32, contiguous, of that shape.
        """

    def compare(self, plan: Plan, theirs: Tensor, mine: Tensor) -> Seen:
        """How far a tensor that has come as it is lies from the receiver's own, part by part."""


@torch.no_grad()
def compare(plan: Plan, theirs: Tensor, mine: Tensor) -> Seen:
    """As `Coder.compare`, by torch's operations in the present stream."""
    found = []
    for part in range(plan.parts):
        numbers, own = (tensor.view(-1)[plan.numbers(part)] for tensor in (theirs, mine))
        found.append(torch.stack([(numbers - own).abs_().amax(), numbers.abs().amax()]))
    farthest, largest = torch.stack(found, dim=1).cpu().numpy()
    return Seen(farthest, largest, np.zeros(plan.parts, dtype=np.int32))
