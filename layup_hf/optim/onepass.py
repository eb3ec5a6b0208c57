"""A block's step in one pass over its memory: merges, clipping, moments, and AdamW's step, number by number."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..blocks import Block
from .adam import adam_groups, age_of
from .direction import Direction
from .table import BYTES, WEIGHTS, Column, Scalar, Table

_WIDEST = 1 << 20
"""Numbers in a row, whose sum is made in single precision where rows are compared."""

_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Kernel(Protocol):
    """What makes the pass on one kind of device.

    Attributes:
        name: For people.
    """

    name: str

    def run(self, table: Table) -> None:
        """Make the step that the table says. Waits for no device."""

    def close(self) -> None:
        """Let go of what it holds. Idempotent."""


@dataclass
class Rows:
    """What is known of a block's rows, and what is to be found out; a row is what has one index on the first axis.

    Numbers of rows are float32, of all parameters of the block one after the other; see `rows_of`.

    Attributes:
        lengths: By what steps are longer; None: 1.
        theirs: A peer's first moments, one tensor for each parameter, to compare with; None: not now.
        squares: Then receives the mean square of the difference.
        seconds: Then receives the mean of the second moment before the step.
    """

    lengths: Tensor | None = None
    theirs: Sequence[Tensor] | None = None
    squares: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: Tensor = field(default_factory=lambda: torch.empty(0))


def rows_of(tensor: Tensor) -> int:
    """How many rows a tensor has: as many as its first axis is long; one, if it has no other."""
    return tensor.shape[0] if tensor.dim() > 1 else 1


@dataclass
class _Member:
    """A parameter, and what AdamW has of it; its steps are counted here, as on a device they are not to be read."""

    parameter: torch.nn.Parameter
    group: int
    first: Tensor
    second: Tensor
    counter: Tensor
    steps: int


class OnePass:
    """Steps blocks in the place of torch's AdamW, and does what belongs to a step with it.

    For each number of a block, what is read is the parameter, its gradient, both moments, the parameter of each peer
    that has offered it, and now and then the peer's first moment; what is written is the parameter and both moments.
    Only the gradient's norm takes a pass of its own, before it. Done one after the other by operations of torch, that
    is (`layup_hf.trainer.steps`; numbers read and written, per number of the block, beside one pass's):

    | part | torch | one pass |
    | -- | -- | -- |
    | norm | 1 | 1 |
    | merge, for each peer | 3 | 1 |
    | clipping | 2 | |
    | AdamW | 7 | 7 |
    | Nesterov's momentum alone | 3 | |
    | with lengths of rows | 9 | |
    | comparing first moments | 7 | 1 |

    What it makes is what they make, but for rounding. It knows dense parameters in single precision; blocks with
    others, or in which a gradient is missing, are for the optimizer: `fits` tells.

    Args:
        blocks: The model's blocks.
        optimizer: torch's AdamW, see `is_plain_adam`; not a `BlockOptimizer`, but what is in it.
        direction: What it steps by; counts the steps of blocks.
        kernel: Of the device.
    """

    def __init__(
        self, blocks: Sequence[Block], optimizer: torch.optim.Optimizer, direction: Direction, kernel: Kernel
    ) -> None:
        self._optimizer, self._direction, self._kernel = optimizer, direction, kernel
        self._group_of = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._members = {block.index: self._members_of(block) for block in blocks}
        self._ones: Tensor | None = None

    def _members_of(self, block: Block) -> list[_Member] | None:
        """None where the block has something that is not for the pass."""
        if not block.parameters or any(p.dtype != torch.float32 or p.numel() == 0 for p in block.parameters):
            return None
        if any(p.numel() // rows_of(p) > _WIDEST for p in block.parameters):
            return None
        members = []
        for parameter in block.parameters:
            state = self._optimizer.state.get(parameter)
            if state is None or "exp_avg" not in state or id(parameter) not in self._group_of:
                return None
            steps = age_of(self._optimizer, parameter)
            group = self._group_of[id(parameter)]
            members.append(_Member(parameter, group, state["exp_avg"], state["exp_avg_sq"], state["step"], steps))
        return members

    def fits(self, block: Block) -> bool:
        """Whether `step` can step the block, with the gradients that it has now."""
        members = self._members[block.index]
        if members is None:
            return False
        states = self._optimizer.state
        if any(states[member.parameter].get("exp_avg") is not member.first for member in members):  # loaded anew
            members = self._members[block.index] = self._members_of(block)
        return members is not None and all(
            (gradient := m.parameter.grad) is not None
            and gradient.layout is torch.strided
            and _is_by_rows(m.parameter)
            and _is_laid_out_as(m.parameter, (gradient, m.first, m.second))
            for m in members
        )

    @torch.no_grad()
    def step(
        self,
        block: Block,
        merges: Sequence[tuple[Sequence[Tensor], float]] = (),
        factor: Tensor | float | None = None,
        rows: Rows | None = None,
    ) -> None:
        """Step a block that fits. Gradients stay as they are.

        Args:
            block: Its gradients are complete.
            merges: What peers have of the block (tensors like `Block.tensors`), each with the share of the way that the
                block is to go to it, in this order, before the step.
            factor: By which gradients are to be multiplied, a scalar on their device, or a number on a CPU; None: 1.
            rows: By what steps are longer, and what is to be found out about rows.
        """
        members, rows = self._members[block.index] or [], rows or Rows()
        count, buffers = len(members), [buffer.detach() for buffer in block.buffers]
        parameters = [member.parameter for member in members]
        inside = []
        for theirs, weight in merges:
            if all(_is_laid_out_as(p, (their,)) for p, their in zip(parameters, theirs[:count], strict=True)):
                inside.append((theirs, weight))
                if buffers:
                    torch._foreach_lerp_(buffers, list(theirs[count:]), weight)
            else:  # which changes the order of merges, and by that nothing but rounding if there is one
                torch._foreach_lerp_(block.tensors, list(theirs), weight)
        compares = rows.theirs is not None
        apart = compares or rows.lengths is not None
        table = Table(
            self._addresses(members, [theirs for theirs, _ in inside], rows, apart),
            self._scalars(members, block, [weight for _, weight in inside]),
            len(inside),
            compares,
            factor,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
        )
        self._kernel.run(table)
        torch._foreach_add_([member.counter for member in members], 1)
        torch.autograd.graph.increment_version(parameters)  # as the kernel does not
        for member in members:
            member.steps += 1

    def _addresses(
        self, members: list[_Member], peers: Sequence[Sequence[Tensor]], rows: Rows, apart: bool
    ) -> np.ndarray:
        """One row for each parameter; see `Table`."""
        addresses = np.zeros((len(members), Table.columns(len(peers))), dtype=np.int64)
        lengths, seen = rows.lengths, 0
        if lengths is None:
            lengths = self._ones_for(max(rows_of(m.parameter) if apart else 1 for m in members), members[0].parameter)
        for number, member in enumerate(members):
            parameter, gradient = member.parameter, member.parameter.grad
            assert gradient is not None
            count = rows_of(parameter) if apart else 1
            line = [
                parameter.data_ptr(),
                gradient.data_ptr(),
                member.first.data_ptr(),
                member.second.data_ptr(),
                lengths.data_ptr() + (BYTES * seen if rows.lengths is not None else 0),
                *(0, 0, 0),
                count,
                parameter.numel() // count,
                *(theirs[number].data_ptr() for theirs in peers),
            ]
            if rows.theirs is not None:
                line[Column.THEIR_FIRST] = rows.theirs[number].data_ptr()
                line[Column.SQUARE] = rows.squares.data_ptr() + BYTES * seen
                line[Column.SECOND_OF_ROW] = rows.seconds.data_ptr() + BYTES * seen
            addresses[number] = line
            seen += count
        return addresses

    def _ones_for(self, rows: int, like: Tensor) -> Tensor:
        """Lengths of steps that are not longer, for so many rows."""
        if self._ones is None or len(self._ones) < rows:
            self._ones = torch.ones(rows, device=like.device)
        return self._ones

    def _scalars(self, members: list[_Member], block: Block, weights: list[float]) -> np.ndarray:
        """One row for each parameter; see `Table`."""
        lead = self._direction.take_lead(block)
        groups, known, lines = self._optimizer.param_groups, {}, []
        for member in members:
            if (key := (member.group, member.steps)) not in known:
                known[key] = _scalars_of(groups[member.group], member.steps + 1, lead) + weights
            lines.append(known[key])
        return np.array(lines, dtype=np.float32)

    def close(self) -> None:
        """Let go of what the kernel holds. Idempotent."""
        self._kernel.close()


def _scalars_of(group: dict[str, Any], steps: int, lead: float) -> list[float]:
    """The numbers by which a parameter makes its step number `steps`, in the order of `Scalar`."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    numbers = [0.0] * WEIGHTS
    numbers[Scalar.FACTOR] = 1.0
    numbers[Scalar.AHEAD] = 1 - beta1 * (1 - lead)
    numbers[Scalar.FIRST] = 1 - beta1
    numbers[Scalar.SECOND] = 1 - beta2
    numbers[Scalar.RATE] = rate / (1 - beta1**steps)
    numbers[Scalar.DECAY] = 1 - rate * group["weight_decay"]
    numbers[Scalar.ROOT] = (1 - beta2**steps) ** -0.5
    numbers[Scalar.EPSILON] = group["eps"]
    return numbers


def _is_by_rows(tensor: Tensor) -> bool:
    """Whether it is dense, with its rows one after the other."""
    return tensor.is_contiguous() or (
        tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=_FORMATS[tensor.dim() - 3])
    )


def _is_laid_out_as(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether each of the others is in single precision, on the same device, and has its numbers in the same order."""
    is_contiguous = tensor.is_contiguous()
    return all(
        other.dtype == torch.float32
        and other.device == tensor.device
        and (other.is_contiguous() if is_contiguous else other.stride() == tensor.stride())
        for other in others
    )


def make_kernel(device: torch.device, optimizer: torch.optim.Optimizer) -> Kernel | str:
    """What makes the pass on a device, or why nothing can."""
    groups = adam_groups(optimizer)
    if any(g.get("capturable") or g.get("differentiable") or isinstance(g["lr"], Tensor) for g in groups):
        return "the optimizer is capturable, differentiable, or its learning rate is a tensor"
    library = {"cpu": "llvmlite", "cuda": "triton"}.get(device.type)
    if library is None:
        return f"there is no kernel for {device.type}"
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    try:
        if device.type == "cpu":
            from .native import NativePass  # LLVM is loaded here and not before

            return NativePass()
        from .on_cuda import CudaPass

        return CudaPass(device)
    except (ImportError, RuntimeError, OSError) as error:
        return f"{library} does not work here ({error})"
