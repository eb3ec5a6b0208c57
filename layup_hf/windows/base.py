"""What every kind of window offers to the gossip engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..ledger import Ledger


class PeerWindows(Protocol):
    """What a worker can see of its peers."""

    @property
    def ledger(self) -> Ledger:
        """Offers, masses and step counts of all workers."""

    def read(self, peer: int, block: int) -> Sequence[Tensor] | None:
        """The peer's block as it is now, tensors like `Block.tensors` on this worker's device; None: ask again later.

        The tensors may be the peer's own memory, which it goes on changing: read them once, at once.
        """

    def close(self) -> None:
        """Let go of the peers' memory. Idempotent, never waits for a peer; nothing may be read afterwards."""
