"""Clipping by the norm of the whole gradient, which a layer-wise step does not know yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..blocks import Block

_MOST = 100.0  # times by which a gradient is taken to have grown or shrunk as a whole, seen from a few blocks


class Estimate(Protocol):
    """Norms of blocks, and what they say of the norm of all."""

    @property
    def norms(self) -> Tensor:
        """Of this step as far as it has come, else of the last; shape (blocks,)."""

    def begin_step(self) -> None:
        """What is known is of the last step from here on."""

    def add(self, index: int, norms: Sequence[Tensor], skips_overflow: bool) -> None:
        """A block is complete.

        Args:
            index: Which.
            norms: Of its gradients, scalars; none if it has no gradient.
            skips_overflow: Let one that is not finite count with its last norm.
        """

    def factor(self, max_norm: float) -> Tensor | float:
        """By what the block is to be scaled that has been added last."""


class DeviceEstimate:
    """On a device, which it never waits for.

    Args:
        count: Number of blocks.
        dtype: Of the figures.
        device: Where they are.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.norms = torch.zeros(count, dtype=dtype, device=device)
        self._last = torch.zeros(count, dtype=dtype, device=device)
        # Of the completed blocks now and in the last step; of the others.
        self._squares = torch.zeros(3, dtype=dtype, device=device)

    def begin_step(self) -> None:
        # A norm that is not finite tells nothing about the next step, which it would take away from the others.
        self._last.copy_(torch.where(torch.isfinite(self.norms.square()), self.norms, 0.0))
        self._squares.zero_()
        self._squares[2] = self._last.square().sum()

    def add(self, index: int, norms: Sequence[Tensor], skips_overflow: bool) -> None:
        last = self._last[index]
        norm = torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros_like(last)
        if skips_overflow:
            norm = torch.where(torch.isfinite(norm), norm, last)
        self.norms[index] = norm
        self._squares += torch.stack([norm.square(), last.square(), -last.square()])

    def factor(self, max_norm: float) -> Tensor:
        now, before, others = self._squares
        growth = torch.where(before > 0, (now / before).clamp(_MOST**-2, _MOST**2), 1.0)
        estimate = (now + growth * others.clamp(min=0.0)).sqrt()
        return (max_norm / (estimate + 1e-6)).clamp(max=1.0)


class HostEstimate:
    """The same on a CPU, where numbers of Python take a tenth of the time of so small tensors."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self._dtype, self._largest = dtype, torch.finfo(dtype).max
        self._norms, self._last = [0.0] * count, [0.0] * count
        self._now = self._before = self._others = 0.0

    @property
    def norms(self) -> Tensor:
        return torch.tensor(self._norms, dtype=self._dtype)

    def begin_step(self) -> None:
        self._last = [norm if norm * norm <= self._largest else 0.0 for norm in self._norms]
        self._now = self._before = 0.0
        self._others = sum(norm * norm for norm in self._last)

    def add(self, index: int, norms: Sequence[Tensor], skips_overflow: bool) -> None:
        last, norm = self._last[index], math.hypot(*map(float, norms))
        if skips_overflow and not math.isfinite(norm):
            norm = last
        self._norms[index] = norm
        self._now += norm * norm
        self._before += last * last
        self._others -= last * last

    def factor(self, max_norm: float) -> float:
        if math.isnan(self._now):
            return math.nan
        growth = min(max(self._now / self._before, _MOST**-2), _MOST**2) if self._before > 0 else 1.0
        estimate = math.sqrt(self._now + growth * max(self._others, 0.0))
        return min(max_norm / (estimate + 1e-6), 1.0)


class BlockClipper:
    """Clips each block by the best estimate of the global gradient norm at that moment.

    Blocks that this backward has completed count with their norm now. The others count with their norm of the last
    step, times what the completed ones have grown by since: a spike is seen in the first blocks that backward comes to,
    and when it is over, the others no longer count with it. In the first step only the completed blocks count. The
    figures that speak for this rule are in `docs/clipping.md`.

    With `max_norm = 0` gradients are left as they are, and only measured. On a GPU everything stays on the device: no
    synchronisation.

    Args:
        blocks: The model's blocks. In every step each is to be clipped once, in any order.
        max_norm: Largest norm of the whole gradient; 0 for no clipping.
        device: Where the gradients are.
        skips_overflow: Whether a block with a gradient that is not finite does not step (loss scaling). It then counts
            with its last norm, as an infinite one would take the other blocks' steps away.
    """

    def __init__(
        self, blocks: Sequence[Block], max_norm: float, device: torch.device, skips_overflow: bool = False
    ) -> None:
        self._max_norm = max_norm
        self._skips_overflow = skips_overflow
        kinds = [{parameter.dtype for parameter in block.parameters} for block in blocks]
        is_double = any({torch.float64, torch.complex128} & kind for kind in kinds)
        dtype = torch.float64 if is_double else torch.float32
        numbered = zip(blocks, kinds, strict=True)
        self._complex = {block.index for block, kind in numbered if any(dtype.is_complex for dtype in kind)}
        self._estimate: Estimate = (
            HostEstimate(len(blocks), dtype) if device.type == "cpu" else DeviceEstimate(len(blocks), dtype, device)
        )
        self._dtype, self._count = dtype, len(blocks)
        self._completed = 0

    @property
    def norms(self) -> Tensor:
        """Of each block: of this step as far as it has come, else of the last."""
        return self._estimate.norms

    def clip_block(self, block: Block) -> None:
        """Scale the gradients of `block`, which must be complete, by `min(1, max_norm / estimate)`."""
        factor = self.factor_of(block)
        if factor is None or (isinstance(factor, float) and factor == 1):
            return
        torch._foreach_mul_([p.grad for p in block.parameters if p.grad is not None], factor)

    def factor_of(self, block: Block) -> Tensor | float | None:
        """By what the gradients of `block`, which must be complete, are to be scaled, on a device as a scalar there;
        None: not at all.

        To be asked once a step, instead of `clip_block`.
        """
        if self._completed == 0:
            self._estimate.begin_step()
        self._completed = (self._completed + 1) % self._count
        gradients = [parameter.grad for parameter in block.parameters if parameter.grad is not None]
        if block.index in self._complex:  # both parts of a number count
            gradients = [torch.view_as_real(one) if one.is_complex() else one for one in gradients]
        # As torch.nn.utils.clip_grad_norm_, without its grouping by device and dtype: this runs for every block.
        norms = torch._foreach_norm(gradients, 2, self._dtype) if gradients else ()
        self._estimate.add(block.index, norms, self._skips_overflow)
        if not gradients or self._max_norm <= 0:
            return None
        return self._estimate.factor(self._max_norm)

    def total_norm(self) -> Tensor:
        """Norm over all blocks, each with its latest figure; after backward, the exact norm before clipping. Scalar."""
        return torch.linalg.vector_norm(self.norms)
