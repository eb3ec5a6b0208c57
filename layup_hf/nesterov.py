"""Steps that look ahead, as gradients come late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .adam import age_of, is_plain_adam, make_states
from .blocks import Block


class Nesterov:
    """Lets AdamW step by Nesterov's momentum: as far ahead as one more step with the present gradient would lead.

    While a worker computes a gradient the others step, so it comes late by up to a step of each. Where the loss is
    steep late gradients make momentum overshoot, and a rate that DDP bears well is then too high. An optimizer that
    looks ahead makes up for that delay (Ajanthan et al., arXiv 2505.01099, for pipelines). AdamW steps by its first
    moment m, the running mean of the gradients g; with Nesterov's momentum it steps by

        m + (1 - beta1) (g - m)

    which is the step of NAdam (Dozat, ICLR 2016 workshop) with a constant momentum. On a quadratic of curvature h, with
    gradients that are one step late and a beta1 of 0.9, rates up to 2.5 / h are then stable instead of 1 / h. What it
    gains in training is in the README.

    Nothing is kept for it: while the optimizer steps, the first moment is `m + l (g - m)` with the m and g of before
    the step, and it is given back afterwards what AdamW makes of m (up to rounding). With `l = (1 - beta1) (1 -
    beta1^t)` the first steps, in which a running mean that began at zero is small, are AdamW's own.

    It needs torch's Adam or AdamW, see `can_look_ahead`.

    Args:
        blocks: The model's blocks.
        optimizer: Steps them; not a `BlockOptimizer`, but what is in it. It gets its state now if it has none yet.
    """

    def __init__(self, blocks: Sequence[Block], optimizer: torch.optim.Optimizer) -> None:
        make_states(optimizer)
        self._optimizer = optimizer
        self._ages = {block.index: age_of(optimizer, block.parameters[0]) for block in blocks if block.parameters}

    @contextlib.contextmanager
    @torch.no_grad()
    def stepping(self, block: Block) -> Iterator[None]:
        """While the optimizer steps the block, whose gradients are complete, its first moments look ahead."""
        stepped = [parameter for parameter in block.parameters if parameter.grad is not None]
        if not stepped:
            yield
            return
        first = [self._optimizer.state[parameter]["exp_avg"] for parameter in stepped]
        gradients = [parameter.grad for parameter in stepped]
        beta1, age = self._optimizer.param_groups[0]["betas"][0], self._ages[block.index]
        lead = (1 - beta1) * (1 - beta1**age) if beta1 else 0.0  # without momentum there is nothing to look ahead with
        self._ages[block.index] += 1
        torch._foreach_lerp_(first, gradients, lead)
        yield
        # With M = m + l (g - m), the step has made it U = beta1 M + (1 - beta1) g; (U - l g) / (1 - l) is what it would
        # have made of m.
        torch._foreach_lerp_(first, gradients, -lead / (1 - lead))


def can_look_ahead(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `Nesterov` can be used: torch's AdamW, or Adam without weight decay, which would go into the moments."""
    return is_plain_adam(optimizer) and all(
        group["decoupled_weight_decay"] or not group["weight_decay"] for group in optimizer.param_groups
    )
