"""Clipping by the norm of the whole gradient, which a layer-wise step does not know yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import Block

_MOST = 100.0  # times by which a gradient is taken to have grown or shrunk as a whole, seen from a few blocks


class BlockClipper:
    """Clips each block by the best estimate of the global gradient norm at that moment.

    Blocks that this backward has completed count with their norm now. The others count with their norm of the last
    step, times what the completed ones have grown by since: a spike is seen in the first blocks that backward comes to,
    and when it is over, the others no longer count with it. In the first step only the completed blocks count. The
    figures that speak for this rule are in `docs/clipping.md`.

    With `max_norm = 0` gradients are left as they are, and only measured. Everything stays on the device: no
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
        # Of this step as far as it has come, else of the last.
        self.norms = torch.zeros(len(blocks), dtype=dtype, device=device)
        self._last = torch.zeros(len(blocks), dtype=dtype, device=device)
        # Of the completed blocks now and in the last step; of the others.
        self._squares = torch.zeros(3, dtype=dtype, device=device)
        self._completed = 0

    def clip_block(self, block: Block) -> None:
        """Scale the gradients of `block`, which must be complete, by `min(1, max_norm / estimate)`."""
        factor = self.factor_of(block)
        if factor is None or (factor.device.type == "cpu" and factor == 1):
            return
        torch._foreach_mul_([p.grad for p in block.parameters if p.grad is not None], factor)

    def factor_of(self, block: Block) -> Tensor | None:
        """By what the gradients of `block`, which must be complete, are to be scaled, as a scalar; None: not at all.

        To be asked once a step, instead of `clip_block`.
        """
        if self._completed == 0:
            # A norm that is not finite tells nothing about the next step, which it would take away from the others.
            self._last.copy_(torch.where(torch.isfinite(self.norms.square()), self.norms, 0.0))
            self._squares.zero_()
            self._squares[2] = self._last.square().sum()
        self._completed = (self._completed + 1) % len(self.norms)
        gradients = [parameter.grad for parameter in block.parameters if parameter.grad is not None]
        if block.index in self._complex:  # both parts of a number count
            gradients = [torch.view_as_real(one) if one.is_complex() else one for one in gradients]
        last = self._last[block.index]
        norm = torch.zeros_like(last)
        if gradients:
            # As torch.nn.utils.clip_grad_norm_, without its grouping by device and dtype: this runs for every block.
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, last.dtype)))
            if self._skips_overflow:
                norm = torch.where(torch.isfinite(norm), norm, last)
        self.norms[block.index] = norm
        self._squares += torch.stack([norm.square(), last.square(), -last.square()])
        if not gradients or self._max_norm <= 0:
            return None
        return (self._max_norm / (self._estimate() + 1e-6)).clamp(max=1.0)

    def _estimate(self) -> Tensor:
        now, before, others = self._squares
        growth = torch.where(before > 0, (now / before).clamp(_MOST**-2, _MOST**2), 1.0)
        return (now + growth * others.clamp(min=0.0)).sqrt()

    def total_norm(self) -> Tensor:
        """Norm over all blocks, each with its latest figure; after backward, the exact norm before clipping. Scalar."""
        return torch.linalg.vector_norm(self.norms)
