"""Several workers in one process: real windows and engines, opened by threads, then driven one operation at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

from layup_hf.blocks import Block, split_into_blocks
from layup_hf.gossip.engine import GossipEngine
from layup_hf.gossip.topology import PeerSampler
from layup_hf.windows import NixlWindows, PeerWindows, open_windows, opening

LOOPBACK = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
"""Environment in which workers of one machine talk over TCP, as between hosts."""


class FirstPeers(PeerSampler):
    """Chooses as the reference does: the first peers, `count` of them."""

    def sample(self, eligible: Sequence[int], count: int | None = None) -> Sequence[int]:
        return eligible[: self.count if count is None else count]


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


def open_fleet(
    fleet: Sequence[Sequence[Block]],
    kind: str = "shared",
    *,
    hosts: Sequence[str] | None = None,
    tokens: Sequence[bytes] | None = None,
    wire_dtype: str = "fp32",
) -> list[Any]:
    """Windows of every worker, or for each the exception that it raised; `hosts` says where each pretends to be."""
    for_rank = gather_between_threads(len(fleet))
    place = threading.local()

    def host() -> str:
        return place.host

    def action(rank: int) -> PeerWindows:
        place.host = hosts[rank] if hosts else "here"
        token = tokens[rank] if tokens else b"secret"
        return open_windows(kind, fleet[rank], rank, for_rank(rank), token=token, job=job, wire_dtype=wire_dtype)

    job = os.urandom(16)
    with mock.patch.object(opening, "host", host), mock.patch.dict(os.environ, LOOPBACK):
        return together([lambda rank=rank: action(rank) for rank in range(len(fleet))])


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 20) -> Any:
    """What the condition gives, as soon as that is true."""
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.001)
    return result


class Fleet:
    """Workers that hold copies of small models and exchange them through windows of one kind.

    With windows over a network, each operation is carried out when all have heard of the one before, and nothing is
    asked for but what is about to be merged. So workers do exactly what those of a `reference.Simulation` do.
    """

    def __init__(self, models: Sequence[nn.Module], kind: str = "shared", **options: Any) -> None:
        self.blocks = [split_into_blocks(model) for model in models]
        self.windows = open_fleet(self.blocks, kind, **options)
        for windows in self.windows:
            if isinstance(windows, Exception):
                raise windows
        self.samplers = [FirstPeers(rank, len(models)) for rank in range(len(models))]
        self.engines = [
            GossipEngine(blocks, windows, sampler)
            for blocks, windows, sampler in zip(self.blocks, self.windows, self.samplers, strict=True)
        ]
        self.distant = [distant_part(windows) for windows in self.windows]
        self.gone: set[int] = set()
        for distant in filter(None, self.distant):
            distant.courier.accepts = lambda peer, block: False

    def wait_until_all_know(self) -> None:
        """Wait until what workers of different hosts have offered and taken has reached the others."""
        if any(self.distant):
            wait_until(self._all_know, "reports")

    def _all_know(self) -> bool:
        present = [rank for rank in range(len(self.blocks)) if rank not in self.gone]
        ledgers = {rank: self.windows[rank].ledger for rank in present}
        return all(
            np.array_equal(ledgers[a].account().offered[:, b], ledgers[b]._offered[:, b, a])
            and np.array_equal(ledgers[a].account().taken[:, b], ledgers[b]._taken[:, a, b])
            for a in present
            for b in present
        )

    def merge(self, worker: int, index: int) -> None:
        """Merge all that is offered, in the order of senders."""
        engine, windows, distant = self.engines[worker], self.windows[worker], self.distant[worker]
        block = self.blocks[worker][index]
        if distant is None:
            return engine.merge(block)
        for peer, _ in windows.ledger.pending(index):
            if not windows.ledger._remote[peer]:
                engine.take_offers(index)
                continue
            distant.courier.accepts = lambda p, b, peer=peer: (p, b) == (peer, index)
            wait_until(lambda peer=peer: (peer, index) in distant.staging.ready, f"block {index} of {peer} at {worker}")
            distant.courier.accepts = lambda p, b: False
            engine.merge(block)

    def run(self, operation: tuple) -> None:
        """Carry out one operation of a schedule, as `reference.Simulation` does."""
        name, worker, index, *rest = operation
        self.wait_until_all_know()
        if name == "merge":
            return self.merge(worker, index)
        apply_operation(self.engines[worker], self.samplers[worker], self.blocks[worker][index], name, *rest)

    def close(self) -> None:
        for windows in self.windows:
            windows.close()


def closed_at_the_end(make: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """For a fixture that makes any number of something: `make`, and at the end each that it has made is closed."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(contextlib.closing(make(*args, **options)))


def distant_part(windows: PeerWindows) -> NixlWindows | None:
    """What of the windows goes over a network."""
    windows = getattr(windows, "distant", windows)
    return windows if isinstance(windows, NixlWindows) else None


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
