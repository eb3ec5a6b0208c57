"""AdamW's second moment as of the mean gradient of all workers, though each worker has an AdamW of its own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blocks import Block
from ..optim.adam import age_of, is_plain_adam, make_states, stepped_by_adam
from ..optim.onepass import Rows, rows_of
from ..windows.base import Gather
from ..windows.shared import SharedWindows

MEASURED_AT_FIRST = 100
"""So many own steps, the first ones of a run, are all measured: the gain is largest while the rate warms up."""

MEASURE_EVERY = 8
"""Own steps between two measurements of a block after that. With a beta1 of 0.9, first moments forget in about ten."""


@dataclass
class _Part:
    """What AdamW keeps of one block, and what is known of the noise in it; a tensor for each parameter.

    Attributes:
        first, second: AdamW's moments, as it keeps them.
        theirs: Number of the block in the windows.
        age: Steps that the moments are means of.
        noise: Running mean of its square, before correction for the beginning; one number for each row of all
            parameters, one after the other.
        steps: Own steps since this was opened.
        covered: Those of them that the running mean is of.
        by_row: By what steps are longer; one number for each row, as of `noise`. None before the first measurement.
        peer: With whom it is being compared.
    """

    first: list[Tensor]
    second: list[Tensor]
    theirs: int
    age: int
    noise: Tensor
    steps: int = 0
    covered: int = 0
    by_row: Tensor | None = None
    peer: int | None = None

    @property
    def lengths(self) -> list[Tensor] | None:
        """`by_row` of each parameter, of a shape that fits it."""
        if self.by_row is None:
            return None
        parts = self.by_row.split([rows_of(tensor) for tensor in self.second])
        return [
            part.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1)) if tensor.dim() else part[0].to(tensor.dtype)
            for part, tensor in zip(parts, self.second, strict=True)
        ]


class MeanMoments:
    """Finds by how much the noise of a worker's own gradients makes AdamW's steps too short.

    AdamW divides by the root of the mean square of the gradient. Of a worker's own gradient that is `s^2 + n^2`, with s
    what the batches of all workers share and n their noise; of the mean gradient of M workers, which DDP's AdamW sees,
    it is `s^2 + n^2 / M`. So own AdamWs make steps that are too short, by up to `sqrt(M)`, where a gradient is mostly
    noise. A higher learning rate does not make up for that: it is too high for all the rest.

    Workers tell noise from the rest by comparing themselves. A first moment is a running mean of gradients, in which
    `f = (1 - beta1) / (1 + beta1)` is left of the square of noise that is independent from step to step. So for any two
    workers i and j, `(m_i - m_j)^2 / 2f` is n^2, in the mean. (How *one* worker's gradient changes from step to step
    says nothing of n: along the steepest directions gradients go back and forth by themselves. Measured, that is worse
    than no correction.)

    In every one of the first hundred own steps, and in every eighth after that, the first moments that one peer on this
    host, drawn at random, has of a block are read in place, and a running mean with AdamW's own beta2 is kept of what
    they say. It is kept by row (the first axis of a parameter; of a vector there is one), which takes next to no
    memory. With the second moment times `1 - (1 - 1/M) n^2 / (s^2 + n^2)`, a step would be as the mean gradient's, so
    it is to be longer by the inverse root of that: see `Direction`. M counts the workers on this host.

    It needs torch's AdamW, see `is_plain_adam`; what Muon steps has no second moment. Make it with `MeanMoments.open`.

    Args:
        parts: By the block's index.
        windows: To the first moments of the peers.
        peers: Workers on this host, without this one.
        betas: Of the optimizer.
        seed: Of the draws of peers.
    """

    def __init__(
        self,
        parts: dict[int, _Part],
        windows: SharedWindows,
        peers: Sequence[int],
        betas: tuple[float, float],
        seed: str,
    ) -> None:
        self._parts, self._windows, self._peers, self._betas = parts, windows, list(peers), betas
        self._random = random.Random(seed)

    @classmethod
    def open(
        cls,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer,
        rank: int,
        peers: Sequence[int],
        gather: Gather,
        *,
        seed: int = 0,
        may_end: bool = False,
    ) -> MeanMoments | None:
        """Let the peers see this worker's first moments, and see theirs. Collective among the workers of all hosts.

        A CPU's first moments move into shared memory. The optimizer gets its state now if it has none yet.

        Args:
            blocks: The model's blocks.
            optimizer: Steps them; not a `BlockOptimizer`, but what is in it.
            rank: This worker.
            peers: The other workers on this host.
            gather: Collects one object from every worker.
            seed: Of the run.
            may_end: Whether workers may end while others go on: see `SharedWindows.open`.

        Returns:
            None where some worker's optimizer is of another kind, or a model has complex parameters: the square of
            such a gradient is not one number.

        Raises:
            MemoryError: There is not enough memory to share.
        """
        is_real = not any(parameter.is_complex() for block in blocks for parameter in block.parameters)
        if not all(gather(is_real and is_plain_adam(optimizer))):
            return None
        make_states(optimizer)
        parts: dict[int, _Part] = {}
        shown: list[Block] = []
        members = {block: stepped_by_adam(optimizer, block.parameters) for block in blocks}
        for block in (block for block in blocks if members[block]):
            states = [optimizer.state[parameter] for parameter in members[block]]
            first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
            noise = torch.zeros(sum(map(rows_of, second)), device=second[0].device)
            parts[block.index] = _Part(first, second, len(shown), age_of(optimizer, members[block][0]), noise)
            shown.append(replace(block, parameter_names=(), parameters=(), buffers=tuple(first)))
        windows = SharedWindows.open(shown, rank, gather, among=[*peers, rank], may_end=may_end, slots=1)
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        return cls(parts, windows, peers, (beta1, beta2), f"{seed}/{rank}")

    def lengths(self, block: Block) -> list[Tensor] | None:
        """By what the step that the block is about to make is to be longer than AdamW's; to be asked once a step.

        Returns:
            Of each parameter that AdamW steps one number for each row, to be multiplied with it; None where nothing is
            known.
        """
        part = self._parts.get(block.index)
        if part is None:
            return None
        lengths = part.lengths if self._peers else None
        with self.noting(block) as rows:
            if rows.theirs is not None:
                squares = [by_row_of_square(m - t) for m, t in zip(part.first, rows.theirs, strict=True)]
                torch.cat([square.flatten() for square in squares], out=rows.squares)
                torch.cat([by_row(second).flatten() for second in part.second], out=rows.seconds)
        return lengths

    @contextlib.contextmanager
    @torch.no_grad()
    def noting(self, block: Block) -> Iterator[Rows]:
        """While the block makes a step: what is known for it of its rows, and what the step is to find out.

        Nothing waits for the device. What is found out is used from the next step on: so a step need not go over its
        rows twice.
        """
        part = self._parts.get(block.index)
        if part is None or not self._peers:
            yield Rows()
            return
        rows, is_turn = Rows(part.by_row), (part.steps + block.index) % MEASURE_EVERY == 0
        peer = None
        if part.age and (is_turn or part.steps < MEASURED_AT_FIRST or part.peer is not None):
            peer = self._peer_of(part)
            rows.theirs = self._windows.read(peer, part.theirs)
        if rows.theirs is not None:
            rows.squares, rows.seconds = torch.empty_like(part.noise), torch.empty_like(part.noise)
        yield rows
        if peer is not None and rows.theirs is not None:  # else it is asked for again in the next step
            self._windows.release(peer, part.theirs)
            part.peer = None
            self._note(part, rows)
        part.age += 1
        part.steps += 1

    def _peer_of(self, part: _Part) -> int:
        """With whom to compare: whose moments are on their way, else one that is drawn."""
        if part.peer is None or part.peer not in self._peers:
            part.peer = self._random.choice(self._peers)
            self._windows.publish(part.theirs)
        return part.peer

    def _note(self, part: _Part, rows: Rows) -> None:
        beta1, beta2 = self._betas
        new = max(part.steps - part.covered, 1)
        part.covered += new
        weight, seen = 1 - beta2**new, 1 - beta2**part.covered
        part.noise.lerp_(rows.squares.div_(2 * left_of_noise(beta1, part.age)), weight)
        mean = rows.seconds.div_(1 - beta2**part.age).clamp_min_(torch.finfo(torch.float32).tiny)
        ratio = (part.noise / seen).div_(mean).clamp_max_(1.0)
        share = len(self._peers) / (len(self._peers) + 1)
        part.by_row = ratio.mul_(-share).add_(1).rsqrt_()

    @property
    def has_peers(self) -> bool:
        """Whether there is anybody to compare with."""
        return bool(self._peers)

    def require_same_memory(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that the optimizer still keeps its moments where they were.

        Raises:
            RuntimeError: They were replaced since the start.
        """
        known = {id(tensor) for part in self._parts.values() for tensor in part.first}
        states = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
        if any(id(tensor) not in known for tensor in states):
            raise RuntimeError(
                "The optimizer's state was replaced during training, by `load_state_dict` say, and the peers do not "
                "see the new one. Load it before training, or set `second_moment='own'`."
            )

    def exclude(self, peer: int) -> None:
        """Do without a peer. Idempotent."""
        if peer in self._peers:
            self._peers.remove(peer)
            self._windows.exclude(peer)

    def close(self) -> None:
        """Let go of the peers' memory. Idempotent."""
        self._windows.close()


def noise_between(mine: Sequence[Tensor], theirs: Sequence[Tensor], beta1: float, age: int) -> list[Tensor]:
    """Square of a gradient's noise, as two workers' first moments show it: `(m_i - m_j)^2 / 2f`, one number per row.

    Args:
        mine, theirs: First moments, before correction for the beginning, of each parameter.
        beta1: With which they are running means.
        age: Steps that they are means of; f is what such a mean has left of independent noise.
    """
    squares = [by_row_of_square(m - t) for m, t in zip(mine, theirs, strict=True)]
    torch._foreach_div_(squares, 2 * left_of_noise(beta1, age))
    return squares


def left_of_noise(beta1: float, age: int) -> float:
    """What a running mean of `age` steps has left of the square of independent noise: f of `noise_between`."""
    return (1 - beta1) ** 2 * (1 - beta1 ** (2 * age)) / (1 - beta1**2)


def by_row(tensor: Tensor) -> Tensor:
    """Mean over all axes but the first, which stay with length 1; of a vector or a number, over all of it."""
    axes = _within_row(tensor)
    return tensor.mean(axes, keepdim=True, dtype=_precision(tensor)).float() if axes else tensor.float().clone()


def by_row_of_square(tensor: Tensor) -> Tensor:
    """`by_row` of the square, in one pass."""
    axes = _within_row(tensor)
    if not axes:
        return tensor.float().square()
    norms = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True, dtype=_precision(tensor)).float()
    return norms.square_().mul_(norms.numel() / max(tensor.numel(), 1))


def _precision(tensor: Tensor) -> torch.dtype:
    """What is added up in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _within_row(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(1 if tensor.dim() > 1 else 0, tensor.dim()))
