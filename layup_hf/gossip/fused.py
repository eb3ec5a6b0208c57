"""A merge of numbers with few digits as one kernel: they are read once, merged and rounded in registers, written once.

By torch's own operations the same takes a dozen kernels, most of them on fp32 copies: 38 passes over the block in place
of 3. The kernel is Triton's, which comes with torch for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # as with torch for CPUs
    triton = None

MOST = 4
"""Peers that are merged in one launch."""

_SIZE = 1024  # numbers of one program

if triton is not None:

    @triton.jit
    def _merge_kernel(  # type: ignore[no-untyped-def] # noqa: ANN202
        mine,  # noqa: ANN001 # Triton takes annotations for types of its own
        a,  # noqa: ANN001
        b,  # noqa: ANN001
        c,  # noqa: ANN001
        d,  # noqa: ANN001
        of_a,  # noqa: ANN001
        of_b,  # noqa: ANN001
        of_c,  # noqa: ANN001
        of_d,  # noqa: ANN001
        seed,  # noqa: ANN001
        count,  # noqa: ANN001
        PEERS: tl.constexpr,
        CUT: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = at < count
        x = tl.load(mine + at, mask=inside).to(tl.float32)
        x += of_a * (tl.load(a + at, mask=inside).to(tl.float32) - x)
        if PEERS > 1:
            x += of_b * (tl.load(b + at, mask=inside).to(tl.float32) - x)
        if PEERS > 2:
            x += of_c * (tl.load(c + at, mask=inside).to(tl.float32) - x)
        if PEERS > 3:
            x += of_d * (tl.load(d + at, mask=inside).to(tl.float32) - x)
        bits = x.to(tl.int32, bitcast=True)
        noise = tl.randint(seed, at.to(tl.int32)).to(tl.int32, bitcast=True) & ((1 << CUT) - 1)
        rounded = ((bits + noise) & -(1 << CUT)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the bits of a nan may run over
        tl.store(mine + at, x.to(mine.dtype.element_ty), mask=inside)


def can_merge(mine: Tensor, peers: Sequence[tuple[Tensor, float]]) -> bool:
    """Whether `merge` takes these."""
    tensors = [mine, *(theirs for theirs, _ in peers)]
    return triton is not None and 0 < len(peers) <= MOST and all(tensor.is_contiguous() for tensor in tensors)


def merge(mine: Tensor, peers: Sequence[tuple[Tensor, float]], cut: int, seed: int) -> None:
    """Move a tensor towards those of peers in fp32, one after the other, and round once, at random.

    Args:
        mine: bf16 or fp16; is written.
        peers: Tensors like it, and their weights.
        cut: Bits of fp32 that its dtype does not have.
        seed: Of the draws, another one each time.
    """
    theirs = [tensor for tensor, _ in peers] + [mine] * (MOST - len(peers))
    weights = [weight for _, weight in peers] + [0.0] * (MOST - len(peers))
    options: dict[str, Any] = {"PEERS": len(peers), "CUT": cut, "SIZE": _SIZE}
    if mine.numel():
        grid = (triton.cdiv(mine.numel(), _SIZE),)
        _merge_kernel[grid](mine, *theirs, *weights, seed, mine.numel(), **options)


def is_available(device: torch.device) -> bool:
    """Whether there are kernels for this device."""
    return triton is not None and device.type == "cuda"
