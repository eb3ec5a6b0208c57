"""Which windows a job takes: shared memory for peers on this worker's host, the network for the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from torch import Tensor

from ..blocks import Block
from ..device import Mark
from ..trace.events import Trace
from . import opening
from .base import Gather, PeerWindows
from .nixl import NixlWindows
from .shared import SharedWindows


class MixedWindows:
    """Windows of two kinds, each for some of the peers; see `PeerWindows`.

    Args:
        shared: For the peers on this host.
        distant: For all others.
        local: Workers on this host.
    """

    kind = "shared and nixl"

    def __init__(self, shared: SharedWindows, distant: NixlWindows, local: Sequence[int]) -> None:
        self.ledger = distant.ledger
        self.shared, self.distant = shared, distant
        self._local = frozenset(local)
        self.figures = distant.figures

    def _of(self, peer: int) -> SharedWindows | NixlWindows:
        return self.shared if peer in self._local else self.distant

    def read(self, peer: int, block: int) -> list[Tensor] | None:
        """The peer's live block, if it is on this host; else what has come of it."""
        return self._of(peer).read(peer, block)

    def release(self, peer: int, block: int) -> None:
        """The block has been merged."""
        self._of(peer).release(peer, block)

    def arrived(self, is_free: Callable[[int], bool]) -> Sequence[int]:
        """What has come from this host or from others."""
        return [*self.shared.arrived(is_free), *self.distant.arrived(is_free)]

    def publish(self, block: int) -> Mark:
        """To those on this host; peers on others ask when they have been told."""
        return self.shared.publish(block)

    def exclude(self, peer: int) -> None:
        """Have no more to do with a peer. Idempotent."""
        self._of(peer).exclude(peer)

    def close(self) -> None:
        """Let go of all peers. Idempotent."""
        self.distant.close()
        self.shared.close()


def open_windows(
    kind: str,
    blocks: Sequence[Block],
    rank: int,
    gather: Gather,
    *,
    token: bytes,
    job: bytes,
    wire_dtype: str = "fp32",
    may_end: bool = False,
    trace: Trace | None = None,
) -> PeerWindows:
    """Open the windows that `kind` asks for. Collective: every worker returns, or every worker raises.

    Args:
        kind: "shared": all workers are on one host; "nixl": the network for all peers; "auto": shared memory for peers
            on the same host, the network for the others.
        blocks: The model's blocks.
        rank: This worker.
        gather: Collects one object from every worker.
        token: The job's secret.
        job: Names the job and the era, differently each time that windows are opened.
        wire_dtype: What blocks are sent over the network as: "fp32", "bf16", "int8" or "int4".
        may_end: Whether workers may end while others go on: see `SharedWindows.open`.
        trace: Where it is recorded how long blocks are on their way from other hosts.

    Raises:
        ValueError: With `shared`, the workers are on several hosts; where the network is needed, NIXL is not installed
            on one of them; the workers have different secrets or models.
        MemoryError: There is not enough memory to share.
    """
    if kind not in ("auto", "shared", "nixl"):
        raise ValueError(f"windows={kind!r} is unknown: use 'auto', 'shared' or 'nixl'.")
    if kind == "shared":
        return SharedWindows.open(blocks, rank, gather, may_end=may_end)
    answers: list[tuple[str, bool]] = gather((opening.host(), importlib.util.find_spec("nixl") is not None))
    hosts = [name for name, _ in answers]
    local = [other for other, name in enumerate(hosts) if name == hosts[rank]] if kind == "auto" else [rank]
    if len(set(hosts)) == 1 and kind == "auto":
        return SharedWindows.open(blocks, rank, gather, may_end=may_end)
    if missing := sorted({name for name, is_there in answers if not is_there}):
        raise ValueError(
            "Workers on several hosts exchange blocks through NIXL, which is not installed on "
            f"{'; '.join(missing)}: pip install 'layup_hf[nixl]'."
        )
    peers = [other for other in range(len(hosts)) if other not in local]
    shared = SharedWindows.open(blocks, rank, gather, among=local, may_end=may_end)
    try:
        distant = NixlWindows.open(
            blocks, rank, gather, shared.ledger, peers=peers, token=token, job=job, wire_dtype=wire_dtype, trace=trace
        )
    except BaseException:
        shared.close()
        raise
    return MixedWindows(shared, distant, local) if len(local) > 1 else distant
