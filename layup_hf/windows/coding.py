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

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PIECE = 4096
"""Numbers that share a sum, at most; the last piece of a tensor may be smaller."""

LARGEST = 2**22
"""Counts are smaller than that: fp32 has room for them, with two bits to spare when they are searched for."""

_AT_ONCE = {"cpu": 2**5, "cuda": 2**12}
"""Pieces that torch's operations work on at a time: on a CPU what they make of them stays in its cache."""


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

    def encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: Tensor, into: Coded) -> bool:
        """Write what is to be sent of a tensor; False if that cannot be: some number is not finite, or too large for
        its step. Then what has been written means nothing.

        Args:
            plan: How.
            values: fp32, contiguous; any shape.
            steps: fp32 of shape (parts,).
            factors: Of `factors`, on the tensor's device.
            into: Where to.
        """

    def decode(self, plan: Plan, coded: Coded, steps: np.ndarray, factors: Tensor, mine: Tensor, into: Tensor) -> Seen:
        """Write the sender's numbers, as they were rounded.

        Args:
            plan: How.
            coded: What has come.
            steps: As they were for `encode`.
            factors: Likewise.
            mine: The receiver's own numbers: fp32, contiguous; any shape.
            into: fp32, contiguous, of that shape.
        """


class TorchCoder:
    """By torch's operations, on any device. On a GPU in a stream of its own: the caller alone waits for it.

    Args:
        seed: Of the draws. Torch's own generators are not touched.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at_once = _AT_ONCE.get(device.type, _AT_ONCE["cuda"])

    def encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: Tensor, into: Coded) -> bool:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return self._encode(plan, values, steps, factors, into)

    def _encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: Tensor, into: Coded) -> bool:
        each = _by_piece(plan, steps, values.device)
        fits = torch.ones((), dtype=torch.bool, device=values.device)
        for first, last, numbers in self._pieces(plan):
            at = slice(first * PIECE, first * PIECE + (last - first) * numbers)
            scaled = values.view(-1)[at].view(-1, numbers) / each[first:last, None]
            counts = scaled.floor()
            rest = scaled.sub_(counts)
            draws = torch.rand(rest.shape, generator=self._generator, device=rest.device)
            counts += draws < rest
            fits &= (counts.abs() < LARGEST).all()  # which is not so of what is not a number
            counts = torch.where(counts.abs() < LARGEST, counts, 0).int()
            into.sums[first:last] = _sums(counts, factors)
            if plan.bits == 4:
                half = plan.bytes_of(numbers)
                low, high = counts[:, :half] & 15, counts[:, half:] & 15
                low[:, : high.shape[1]] |= high << 4
                counts = low
            begin = first * plan.bytes_of(PIECE)
            into.words[begin : begin + counts.numel()] = counts.view(-1)  # the low bits
        return bool(fits)

    def decode(self, plan: Plan, coded: Coded, steps: np.ndarray, factors: Tensor, mine: Tensor, into: Tensor) -> Seen:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return self._decode(plan, coded, steps, factors, mine, into)

    def _decode(self, plan: Plan, coded: Coded, steps: np.ndarray, factors: Tensor, mine: Tensor, into: Tensor) -> Seen:
        each, span = _by_piece(plan, steps, mine.device), 2**plan.bits
        farthest, largest, wrong = (torch.zeros(plan.pieces, device=mine.device) for _ in range(3))
        for first, last, numbers in self._pieces(plan):
            at = slice(first * PIECE, first * PIECE + (last - first) * numbers)
            own, step = mine.view(-1)[at].view(-1, numbers), each[first:last, None]
            begin, width = first * plan.bytes_of(PIECE), plan.bytes_of(numbers)
            words = coded.words[begin : begin + (last - first) * width].view(-1, width)
            if plan.bits == 4:
                words = torch.cat([words & 15, words >> 4], dim=1)[:, :numbers]
            counts = words.float()
            counts += ((own / step - counts) / span).round_() * span
            is_count = counts.abs() < 2 * LARGEST  # else it cannot be right
            counts = torch.where(is_count, counts, 0)
            wrong[first:last] = (_sums(counts.int(), factors) != coded.sums[first:last]) | ~is_count.all(dim=1)
            value = counts * step
            into.view(-1)[at] = value.view(-1)
            largest[first:last] = value.abs().amax(dim=1)
            farthest[first:last] = value.sub_(own).abs_().amax(dim=1)
        found = torch.stack([farthest, largest, wrong]).cpu().numpy()
        begins = np.arange(0, plan.pieces, plan.pieces_each)
        return Seen(
            np.maximum.reduceat(found[0], begins),
            np.maximum.reduceat(found[1], begins),
            np.add.reduceat(found[2], begins).astype(np.int32),
        )

    def _pieces(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        """(first, last + 1, numbers of each) of pieces of one size that lie side by side."""
        whole, rest = divmod(plan.numel, PIECE)
        for first in range(0, whole, self._at_once):
            yield first, min(first + self._at_once, whole), PIECE
        if rest:
            yield whole, whole + 1, rest


@torch.no_grad()
def compare(plan: Plan, theirs: Tensor, mine: Tensor) -> Seen:
    """How far a tensor that has come as it is lies from the receiver's own, part by part."""
    found = []
    for part in range(plan.parts):
        numbers, own = (tensor.view(-1)[plan.numbers(part)] for tensor in (theirs, mine))
        found.append(torch.stack([(numbers - own).abs_().amax(), numbers.abs().amax()]))
    farthest, largest = torch.stack(found, dim=1).cpu().numpy()
    return Seen(farthest, largest, np.zeros(plan.parts, dtype=np.int32))


def _by_piece(plan: Plan, steps: np.ndarray, device: torch.device) -> Tensor:
    """The step of each piece."""
    return torch.from_numpy(np.repeat(steps, plan.pieces_each)[: plan.pieces]).to(device)


def _sums(counts: Tensor, factors: Tensor) -> Tensor:
    """Of pieces, one in a row."""
    return (counts.long() * factors[: counts.shape[1]].long()).sum(dim=1)


def make_coder(device: torch.device, seed: int) -> Coder:
    """What codes fastest on a device.

    Args:
        device: Of the blocks.
        seed: Of the draws.
    """
    if device.type == "cpu":
        try:
            from .native_coding import NativeCoder  # LLVM is loaded here and not before

            return NativeCoder(seed)
        except (ImportError, OSError, RuntimeError) as error:
            logger.warning(f"LayUp: coding blocks takes several times as long, as llvmlite does not work ({error}).")
    return TorchCoder(device, seed)
