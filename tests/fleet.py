"""Several workers in one process: real windows and engines, opened by threads, then driven one operation at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from layup_hf.blocks import Block, split_into_blocks
from layup_hf.gossip import GossipEngine
from layup_hf.topology import PeerSampler
from layup_hf.windows import SharedWindows


class FirstPeers(PeerSampler):
    """Chooses as the reference does: the first peers, `count` of them."""

    def sample(self, eligible: Sequence[int]) -> Sequence[int]:
        return eligible[: self.count]


def gather_between_threads(world_size: int) -> Callable[[int], Callable[[Any], list[Any]]]:
    """Make, for each rank, a function that collects one object from every thread."""
    barrier, items = threading.Barrier(world_size, timeout=20), [None] * world_size

    def for_rank(rank: int) -> Callable[[Any], list[Any]]:
        def gather(item: Any) -> list[Any]:
            items[rank] = item
            barrier.wait()
            collected = list(items)
            barrier.wait()
            return collected

        return gather

    return for_rank


def together(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run one action per worker at the same time; returns results or the exceptions that they raised."""
    results: list[Any] = [None] * len(actions)

    def run(rank: int) -> None:
        try:
            results[rank] = actions[rank]()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a worker hangs"
    return results


def open_windows(fleet: Sequence[Sequence[Block]]) -> list[Any]:
    """Windows of every worker, or for each the exception that it raised."""
    for_rank = gather_between_threads(len(fleet))
    return together(
        [lambda r=rank, b=blocks: SharedWindows.open(b, r, for_rank(r)) for rank, blocks in enumerate(fleet)]
    )


class Fleet:
    """Workers that hold copies of small models and exchange them through shared windows."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.blocks = [split_into_blocks(model) for model in models]
        self.windows = open_windows(self.blocks)
        for windows in self.windows:
            if isinstance(windows, Exception):
                raise windows
        self.samplers = [FirstPeers(rank, len(models)) for rank in range(len(models))]
        self.engines = [
            GossipEngine(blocks, windows, sampler)
            for blocks, windows, sampler in zip(self.blocks, self.windows, self.samplers, strict=True)
        ]

    def run(self, operation: tuple) -> None:
        """Carry out one operation of a schedule, as `reference.Simulation` does."""
        name, worker, index, *rest = operation
        apply_operation(self.engines[worker], self.samplers[worker], self.blocks[worker][index], name, *rest)

    def close(self) -> None:
        for windows in self.windows:
            windows.close()


def apply_operation(engine: GossipEngine, sampler: PeerSampler, block: Block, name: str, *rest: Any) -> None:
    match name:
        case "step":
            for tensor in block.tensors:
                tensor.mul_(1 - rest[0]).add_(rest[0])
        case "offer":
            sampler.count = rest[0]
            engine.offer(block)
        case "merge":
            engine.merge(block)
