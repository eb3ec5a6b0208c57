"""What codes blocks on which device: see `coding.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .coding import LARGEST, PIECE, Coded, Coder, Plan, Seen, compare

logger = logging.getLogger(__name__)

_AT_ONCE = {"cpu": 2**5, "cuda": 2**9}
"""Pieces that torch's operations work on at a time: on a CPU what they make of them stays in its cache, on a GPU it is
some ten megabytes each, whatever the size of the model."""


class TorchCoder:
    """By torch's operations, on any device. On a GPU in a stream of its own: the caller alone waits for it, as each
    operation ends with what a CPU needs to know.

    Args:
        seed: Of the draws. Torch's own generators are not touched.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at_once = _AT_ONCE.get(device.type, _AT_ONCE["cuda"])

    def encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: np.ndarray, into: Coded) -> bool:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return self._encode(plan, values, steps, factors, into)

    def _encode(self, plan: Plan, values: Tensor, steps: np.ndarray, factors: np.ndarray, into: Coded) -> bool:
        each, multipliers = _by_piece(plan, steps, values.device), _on(values.device, factors)
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
            into.sums[first:last] = _sums(counts, multipliers)
            if plan.bits == 4:
                half = plan.bytes_of(numbers)
                low, high = counts[:, :half] & 15, counts[:, half:] & 15
                low[:, : high.shape[1]] |= high << 4
                counts = low
            begin = first * plan.bytes_of(PIECE)
            into.words[begin : begin + counts.numel()] = counts.view(-1)  # the low bits
        return bool(fits)

    def decode(
        self, plan: Plan, coded: Coded, steps: np.ndarray, factors: np.ndarray, mine: Tensor, into: Tensor
    ) -> Seen:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return self._decode(plan, coded, steps, factors, mine, into)

    def _decode(
        self, plan: Plan, coded: Coded, steps: np.ndarray, factors: np.ndarray, mine: Tensor, into: Tensor
    ) -> Seen:
        each, multipliers = _by_piece(plan, steps, mine.device), _on(mine.device, factors)
        span = 2**plan.bits
        farthest, largest, wrong = (torch.zeros(plan.pieces, device=mine.device) for _ in range(3))
        for first, last, numbers in self._pieces(plan):
            at = slice(first * PIECE, first * PIECE + (last - first) * numbers)
            step = each[first:last, None]
            own = mine.view(-1)[at].view(-1, numbers).clone()  # the training thread may write it meanwhile
            begin, width = first * plan.bytes_of(PIECE), plan.bytes_of(numbers)
            words = coded.words[begin : begin + (last - first) * width].view(-1, width)
            if plan.bits == 4:
                words = torch.cat([words & 15, words >> 4], dim=1)[:, :numbers]
            counts = words.float()
            counts += ((own / step - counts) / span).round_() * span
            is_count = counts.abs() < 2 * LARGEST  # else it cannot be right
            counts = torch.where(is_count, counts, 0)
            wrong[first:last] = (_sums(counts.int(), multipliers) != coded.sums[first:last]) | ~is_count.all(dim=1)
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

    def compare(self, plan: Plan, theirs: Tensor, mine: Tensor) -> Seen:
        with torch.cuda.stream(self._stream):
            return compare(plan, theirs, mine)

    def _pieces(self, plan: Plan) -> Iterator[tuple[int, int, int]]:
        """(first, last + 1, numbers of each) of pieces of one size that lie side by side."""
        whole, rest = divmod(plan.numel, PIECE)
        for first in range(0, whole, self._at_once):
            yield first, min(first + self._at_once, whole), PIECE
        if rest:
            yield whole, whole + 1, rest


def _by_piece(plan: Plan, steps: np.ndarray, device: torch.device) -> Tensor:
    """The step of each piece."""
    return _on(device, np.repeat(steps, plan.pieces_each)[: plan.pieces])


def _on(device: torch.device, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers).to(device)


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
