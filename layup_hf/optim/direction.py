"""What AdamW steps by where its worker is one of several: longer, and looking ahead."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from .adam import adam_groups, age_of, make_states, stepped_by_adam


class Direction:
    """Lets AdamW step by `c (m + l (g - m))` instead of its first moment m, with g the gradient.

    *Looking ahead* (l): while a worker computes a gradient the others step, so it comes late by up to a step of each.
    Where the loss is steep late gradients make momentum overshoot, and a rate that DDP bears well is then too high. An
    optimizer that looks as far ahead as one more step with the present gradient would lead makes up for that delay
    (Ajanthan et al., arXiv 2505.01099, for pipelines). With l = 1 - beta1, this is Nesterov's momentum as in NAdam
    (Dozat, ICLR 2016 workshop). On a quadratic of curvature h, with gradients that are one step late and a beta1 of
    0.9, rates up to 2.5 / h are then stable instead of 1 / h. What it gains is in `recipes/measure/results/`. With
    `l = (1 - beta1) (1 - beta1^t)` the first steps, in which a running mean that began at zero is small, are AdamW's
    own.

    *Lengths* (c): see `MeanMoments`.

    AdamW's own moments stay as it would have made them, but for rounding.

    - Where c is 1, AdamW steps with another beta1: `beta1 (1 - l)` makes `m' + l (g - m')` of m itself, with m' what
      AdamW would have made of it, which is found again from that and g in one pass. Rate and decay make up for what
      AdamW would correct otherwise for the beginning of its means.
    - Otherwise, and in less than single precision, in which m' would not be found again, AdamW is given another first
      moment while it steps a block,

          c (1 - l) m + (c (1 - beta1 + beta1 l) - (1 - beta1)) / beta1 g

      of which its step makes `c (m' + l (g - m'))`. The other is in memory while a block steps; on a CPU, where new
      memory costs as much as the step, all the time and in one place, as large as the largest block. Peers that read m
      meanwhile (`MeanMoments`) never see the other.

    If a GradScaler lets the optimizer skip the step on the device, moments stay, too.

    It needs torch's AdamW, see `is_plain_adam`. What Muon steps is left as it is.

    Args:
        blocks: The model's blocks.
        optimizer: Steps them; not a `BlockOptimizer`, but what is in it. It gets its state now if it has none yet.
        looks_ahead: By Nesterov's momentum; otherwise l is 0.
    """

    def __init__(self, blocks: Sequence[Block], optimizer: torch.optim.Optimizer, *, looks_ahead: bool) -> None:
        make_states(optimizer)
        self.looks_ahead = looks_ahead
        self._optimizer = optimizer
        self._members = {block.index: stepped_by_adam(optimizer, block.parameters) for block in blocks}
        self._ages = {index: age_of(optimizer, members[0]) for index, members in self._members.items() if members}
        self._room: dict[torch.dtype, Tensor] = {}

    def take_lead(self, block: Block) -> float:
        """l of the step that the block is about to make; to be asked once a step."""
        beta1, age = self._optimizer.param_groups[0]["betas"][0], self._ages[block.index]
        self._ages[block.index] += 1
        return (1 - beta1) * (1 - beta1**age) if self.looks_ahead else 0.0

    @contextlib.contextmanager
    @torch.no_grad()
    def stepping(self, block: Block, lengths: Sequence[Tensor] | None = None) -> Iterator[None]:
        """While the optimizer steps the block, whose gradients are complete, it steps by the direction.

        Args:
            block: All that the optimizer steps meanwhile.
            lengths: c of each parameter of the block that AdamW steps, of a shape that fits it; None: 1.
        """
        members = self._members[block.index]
        if not members:
            yield
            return
        beta1, age = self._optimizer.param_groups[0]["betas"][0], self._ages[block.index]
        lead = self.take_lead(block)
        of_all = [parameter.grad for parameter in members]
        is_stepped = [gradient is not None for gradient in of_all]
        if not any(is_stepped) or (lead == 0 and lengths is None):
            yield
            return
        stepped = list(itertools.compress(members, is_stepped))
        states = [self._optimizer.state[parameter] for parameter in stepped]
        gradients = [gradient for gradient in of_all if gradient is not None]
        first = [state["exp_avg"] for state in states]
        with self._unscaled(first, gradients, [p.grad for p in block.parameters if p.grad is not None]):
            if lengths is None and all(m.dtype in (torch.float32, torch.float64) for m in first):
                with self._other_beta(beta1, lead, age + 1):
                    yield
                torch._foreach_lerp_(first, gradients, -lead / (1 - lead))
            else:
                longer = list(itertools.compress(lengths, is_stepped)) if lengths is not None else None
                with _other_moments(states, self._ahead(first, gradients, lead, longer, beta1)):
                    yield
                torch._foreach_lerp_(first, gradients, 1 - beta1)

    @contextlib.contextmanager
    def _other_beta(self, beta1: float, lead: float, steps: int) -> Iterator[None]:
        """AdamW makes the direction of m itself; see the class.

        Args:
            beta1, lead: b and l.
            steps: That the moments are means of, with the one to come.
        """
        beta = beta1 * (1 - lead)
        longer = (1 - beta**steps) / (1 - beta1**steps)
        groups = adam_groups(self._optimizer)
        own = [{name: group[name] for name in ("betas", "lr", "weight_decay")} for group in groups]
        for group in groups:
            group["betas"] = (beta, group["betas"][1])
            group["lr"], group["weight_decay"] = group["lr"] * longer, group["weight_decay"] / longer
        try:
            yield
        finally:
            for group, options in zip(groups, own, strict=True):
                group.update(options)

    def _ahead(
        self, first: list[Tensor], gradients: list[Tensor], lead: float, lengths: list[Tensor] | None, beta1: float
    ) -> Sequence[Tensor]:
        """What AdamW is to take for its first moment; see the class."""
        room = self._room_for(first)
        if lengths is None:
            if room is None:
                return torch._foreach_lerp(first, gradients, lead)
            return [torch.lerp(m, g, lead, out=a) for m, g, a in zip(first, gradients, room, strict=True)]
        of_first = torch._foreach_mul(lengths, 1 - lead)
        of_gradient = torch._foreach_mul(lengths, (1 - beta1 + beta1 * lead) / beta1)
        torch._foreach_sub_(of_gradient, (1 - beta1) / beta1)
        ahead: tuple[Tensor, ...] | list[Tensor]
        if room is None:
            ahead = torch._foreach_mul(first, of_first)
        else:
            ahead = [torch.mul(m, c, out=a) for m, c, a in zip(first, of_first, room, strict=True)]
        torch._foreach_addcmul_(ahead, gradients, of_gradient)
        return ahead

    def _room_for(self, tensors: list[Tensor]) -> list[Tensor] | None:
        """Tensors like these on the CPU, with anything in them, where the last block's were. None on other devices."""
        if tensors[0].device.type != "cpu":  # an allocator keeps memory at hand there
            return None
        used: dict[torch.dtype, int] = {}
        offsets = []
        for tensor in tensors:
            offsets.append(used.get(tensor.dtype, 0))
            used[tensor.dtype] = offsets[-1] + tensor.numel()
        for dtype, count in used.items():
            if dtype not in self._room or self._room[dtype].numel() < count:
                self._room[dtype] = torch.empty(count, dtype=dtype)
        return [
            self._room[tensor.dtype].as_strided(tensor.size(), tensor.stride(), offset)
            for tensor, offset in zip(tensors, offsets, strict=True)
        ]

    @contextlib.contextmanager
    def _unscaled(self, first: list[Tensor], gradients: list[Tensor], of_all: list[Tensor]) -> Iterator[None]:
        """Do with gradients what a GradScaler wants of the optimizer in its step. Nothing waits for the device.

        Args:
            first, gradients: Of what AdamW steps.
            of_all: Gradients of the block, which are scaled, too.
        """
        scale, found_inf = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if isinstance(scale, Tensor):
            torch._foreach_div_(of_all, scale)
            vars(self._optimizer)["grad_scale"] = None
        if isinstance(found_inf, Tensor):  # then the optimizer changes nothing, and these gradients leave m as it is
            skips = found_inf.to(first[0].device) > 0
            for m, g in zip(first, gradients, strict=True):
                torch.where(skips, m, g, out=g)
        try:
            yield
        finally:
            if isinstance(scale, Tensor):
                vars(self._optimizer)["grad_scale"] = scale


@contextlib.contextmanager
def _other_moments(states: list[dict[str, Any]], ahead: Sequence[Tensor]) -> Iterator[None]:
    """AdamW finds other first moments in these states; see `Direction`."""
    first = [state["exp_avg"] for state in states]
    for state, a in zip(states, ahead, strict=True):
        state["exp_avg"] = a
    try:
        yield
    finally:
        for state, m in zip(states, first, strict=True):
            state["exp_avg"] = m
