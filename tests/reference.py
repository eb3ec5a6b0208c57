"""All workers simulated in one process, written for clarity: what the real engine must agree with to the last bit."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

UNIT = 2**40


class Simulation:
    """Every worker's copy of every block, the masses, and the offers under way.

    Args:
        blocks: For each worker and block, the tensors of the block; they are copied.
    """

    def __init__(self, blocks: list[list[list[Tensor]]]) -> None:
        self.values = [[[tensor.clone() for tensor in block] for block in worker] for worker in blocks]
        self.own = [[UNIT] * len(worker) for worker in blocks]
        self.offers: dict[tuple[int, int, int], int] = {}  # (sender, receiver, block) -> units not yet taken

    @property
    def world_size(self) -> int:
        return len(self.values)

    def untaken(self, worker: int, block: int) -> int:
        return sum(units for (sender, _, b), units in self.offers.items() if (sender, b) == (worker, block))

    def step(self, worker: int, block: int, change: float) -> None:
        """A stand-in for an optimizer step."""
        for tensor in self.values[worker][block]:
            tensor.mul_(1 - change).add_(change)

    def offer(self, worker: int, block: int, count: int) -> list[int]:
        """Offer to the first `count` peers that have taken the last offer; an equal part to each, one part is kept."""
        peers = [p for p in range(self.world_size) if p != worker and (worker, p, block) not in self.offers][:count]
        part = self.own[worker][block] // (len(peers) + 1) if peers else 0
        for peer in peers if part else []:
            self.offers[worker, peer, block] = part
            self.own[worker][block] -= part
        return peers if part else []

    def merge(self, worker: int, block: int) -> None:
        """Take every offer to `worker`, in the order of senders, from the senders' live values."""
        for sender in range(self.world_size):
            units = self.offers.get((sender, worker, block))
            if units is None:
                continue
            effective = self.own[worker][block] + self.untaken(worker, block)
            weight = units / (effective + units)
            for mine, theirs in zip(self.values[worker][block], self.values[sender][block], strict=True):
                mine.lerp_(theirs, weight)
            del self.offers[sender, worker, block]
            self.own[worker][block] += units

    def effective(self, worker: int, block: int) -> int:
        return self.own[worker][block] + self.untaken(worker, block)

    def total(self, block: int) -> int:
        return sum(self.effective(worker, block) for worker in range(self.world_size))

    def mean(self, block: int) -> list[list[Fraction]]:
        """Mass-weighted mean of the block over all workers, exact; a list of numbers for each tensor."""
        shares = [Fraction(self.effective(w, block), self.total(block)) for w in range(self.world_size)]
        means = []
        for copies in zip(*(worker[block] for worker in self.values), strict=True):
            columns = zip(*(copy.flatten().tolist() for copy in copies), strict=True)
            means.append([sum(s * Fraction(x) for s, x in zip(shares, column, strict=True)) for column in columns])
        return means


def random_schedule(world_size: int, num_blocks: int, length: int, seed: int) -> list[tuple]:
    """Operations: ("step", worker, block, change), ("offer", worker, block, count) or ("merge", worker, block)."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    operations: list[tuple] = []
    for _ in range(length):
        worker, block = below(world_size), below(num_blocks)
        match below(3):
            case 0:
                operations.append(("step", worker, block, (1 + below(50)) / 100))
            case 1:
                operations.append(("offer", worker, block, 1 + below(world_size - 1)))
            case _:
                operations.append(("merge", worker, block))
    return operations
