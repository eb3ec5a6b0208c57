"""The arithmetic of a merge: a block moves towards those of some peers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from . import fused

logger = logging.getLogger(__name__)

_ROUNDED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a number in fp32 that these do not have."""

_PIECE = {"cpu": 2**17, "cuda": 2**24}
"""Numbers that are held in fp32 at a time: on a CPU they stay in its cache."""


class Merger:
    """Merges a block with all peers that have offered it.

    In fp32 and better, one peer after the other; so the result is that of as many merges, to the last bit.

    bf16 and fp16 have too few digits for that: with a weight of 1/8 a number moves only if the two differ by 4 units in
    its last place, 1.6 to 3 % of it in bf16, and workers that are nearer to each other never come nearer. So there all
    peers are merged in fp32, and what comes out is rounded once, up or down at random, such that it is right in the
    mean.

    Args:
        seed: Of this worker's own draws. The Trainer's generators are not touched.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._has_kernel: bool | None = None
        self._launches = 0

    @torch.no_grad()
    def merge(self, mine: Sequence[Tensor], peers: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        """Move a block towards those of peers, one after the other, each by its weight.

        Args:
            mine: The block's tensors; they are written.
            peers: For each, tensors like these, on the same device, perhaps in another dtype, and a weight from 0 to 1.
        """
        exact = [n for n, m in enumerate(mine) if all(_is_exact(m, theirs[n]) for theirs, _ in peers)]
        if exact:
            chosen = [mine[n] for n in exact]
            for theirs, weight in peers:
                torch._foreach_lerp_(chosen, [theirs[n] for n in exact], weight)
        if len(exact) < len(mine):
            for number in sorted({*range(len(mine))} - {*exact}):
                self._merge_rounded(mine[number], [(theirs[number], weight) for theirs, weight in peers])

    def _merge_rounded(self, mine: Tensor, peers: Sequence[tuple[Tensor, float]]) -> None:
        """One tensor: by one kernel where there is one, else some of it at a time."""
        if mine.dtype in _ROUNDED and self._fuses(mine.device) and fused.can_merge(mine, peers):
            self._launches += 1
            fused.merge(mine, peers, _ROUNDED[mine.dtype], hash((self._seed, self._launches)) & 0x7FFFFFFF)
            return
        pieces = zip(*(_pieces(tensor) for tensor in (mine, *(theirs for theirs, _ in peers))), strict=True)
        for part, *theirs in pieces:
            is_rounded = part.dtype in _ROUNDED
            exact = part.float() if is_rounded else part
            for their, (_, weight) in zip(theirs, peers, strict=True):
                exact.lerp_(their.to(exact.dtype), weight)
            if is_rounded:
                part.copy_(round_at_random(exact, part.dtype, self._generator(part.device)))

    def _fuses(self, device: torch.device) -> bool:
        """Whether the kernel runs here: tried once, as a compiler may be missing."""
        if self._has_kernel is None:
            self._has_kernel = fused.is_available(device)
            if self._has_kernel:
                trial = torch.zeros(1, dtype=torch.bfloat16, device=device)
                try:
                    fused.merge(trial, [(trial.clone(), 0.5)], _ROUNDED[trial.dtype], 0)
                except Exception as error:
                    self._has_kernel = False
                    logger.warning(
                        f"LayUp: merges in bf16 and fp16 are slow, as Triton does not work ({type(error).__name__}: "
                        f"{error}). It needs a C compiler on this machine."
                    )
        return self._has_kernel

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if device.type == "meta":
            return None
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def is_exact(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether a block moves towards a peer's by arithmetic in its own dtype, tensor by tensor."""
    return all(_is_exact(*pair) for pair in zip(mine, theirs, strict=True))


def _is_exact(mine: Tensor, theirs: Tensor) -> bool:
    return mine.dtype not in _ROUNDED and theirs.dtype == mine.dtype


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    if not tensor.is_contiguous():
        return [tensor]
    return tensor.view(-1).split(_PIECE.get(tensor.device.type, _PIECE["cuda"])) if tensor.numel() else []


def round_at_random(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Numbers in fp32, rounded to one of their two neighbours in bf16 or fp16, with the mean that they have themselves.

    What can be represented stays as it is, and so does what is not finite. Below the normal numbers of fp16 (6e-5) the
    last rounding is to the nearest.

    Args:
        exact: fp32. Is changed.
        dtype: bf16 or fp16.
        generator: On the same device.
    """
    cut = _ROUNDED[dtype]
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << cut, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-(1 << cut)).view(torch.float32)
    return torch.where(exact == exact, rounded, exact).to(dtype)  # the bits of a nan may run over
