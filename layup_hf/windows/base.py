"""What every kind of window offers to the gossip engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..device import Mark
from ..ledger import Ledger

Gather = Callable[[Any], list[Any]]
"""Collects one object from every worker, in the order of ranks. Collective."""


class PeerWindows(Protocol):
    """What a worker can see of its peers.

    All methods are called by the training thread, and none waits for a peer.

    Attributes:
        kind: For people: "shared", "nixl", or both.
    """

    kind: str

    @property
    def ledger(self) -> Ledger:
        """Offers, masses and step counts of all workers."""

    def read(self, peer: int, block: int) -> list[Tensor] | None:
        """The peer's block, tensors like `Block.tensors` on this worker's device; None: not available now, ask later.

        The tensors may be the peer's own memory, which it goes on changing, or a copy that has come in the background,
        if need be in the dtype in which it has come. Use them once, soon, and then call `release`: until then a copy
        stays as it is, whatever else is read.
        """

    def release(self, peer: int, block: int) -> None:
        """Say that what `read` gave has been used (on CUDA: is used by what has been queued on the current stream)."""

    def arrived(self, is_free: Callable[[int], bool]) -> Sequence[int]:
        """Blocks that have come in the background and are to be merged when they can be.

        Args:
            is_free: Whether the block with this index may be written now. What may be merged at once is fetched first.
        """

    def publish(self, block: int) -> Mark:
        """Let peers see the block as what has been queued makes it; done when they do, and not before it is offered."""

    def exclude(self, peer: int) -> None:
        """Read the peer no more, and refuse what it still sends: its lease has run out. Idempotent."""

    def figures(self) -> dict[str, float]:
        """What the logs say about the exchange, since the last call."""

    def close(self) -> None:
        """Let go of the peers' memory. Idempotent, never waits for a peer; nothing may be read afterwards."""
