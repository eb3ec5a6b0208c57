"""Clipping by the norm of the whole gradient, which a layer-wise step does not know yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Block


class BlockClipper:
    """Clips each block by the best estimate of the global gradient norm at that moment.

    Blocks that this backward has completed count with their norm now, the others with their norm of the last step (zero
    before their first). With `max_norm = 0` gradients are left as they are, and only measured. Everything stays on the
    device: no synchronisation.

    Args:
        blocks: The model's blocks.
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
        self._norms = torch.zeros(len(blocks), device=device)

    def clip_block(self, block: Block) -> None:
        """Scale the gradients of `block`, which must be complete, by `min(1, max_norm / estimate)`."""
        gradients = [parameter.grad for parameter in block.parameters if parameter.grad is not None]
        if not gradients:
            self._norms[block.index] = 0
            return
        # As torch.nn.utils.clip_grad_norm_, without its grouping by device and dtype: this runs for every block.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self._skips_overflow:
            norm = torch.where(torch.isfinite(norm), norm, self._norms[block.index])
        self._norms[block.index] = norm
        if self._max_norm > 0:
            torch._foreach_mul_(gradients, (self._max_norm / (self.total_norm() + 1e-6)).clamp(max=1.0))

    def total_norm(self) -> Tensor:
        """Norm over all blocks, each with its latest figure; after backward, the exact norm before clipping. Scalar."""
        return torch.linalg.vector_norm(self._norms)
