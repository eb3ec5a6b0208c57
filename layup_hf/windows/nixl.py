"""Windows between workers of different hosts: blocks and messages go over the network, by NIXL."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blocks import Block
from ..device import Mark, Queues, queues_of
from ..fleet.data import travels
from ..fleet.network import reaches_gpus
from ..fleet.secret import TOKEN_VARIABLE, is_signed, sign
from ..ledger import Ledger
from ..trace.events import Trace
from .base import Gather
from .courier import Courier
from .layout import Layout
from .opening import Specification, require_one_model, specification, together
from .pace import BUDGET, Pace
from .peers import Peer, Postmark
from .receiving import Receiving
from .serving import Serving
from .staging import Staging
from .transport import Transport

logger = logging.getLogger(__name__)


@travels
@dataclass(frozen=True)
class Card:
    """How a worker introduces itself to the others.

    Attributes:
        rank: Its rank.
        address: How to connect to its NIXL agent.
        sends_from: The addresses of its machine.
        specification: Of its model.
        wire_dtype: What it sends blocks as.
        signature: Proof that it knows the job's secret.
    """

    rank: int
    address: bytes
    sends_from: tuple[str, ...]
    specification: Specification
    wire_dtype: str
    signature: bytes = b""

    def parts(self, job: bytes) -> tuple[bytes, ...]:
        """What is signed."""
        described = repr((self.rank, self.sends_from, self.specification, self.wire_dtype)).encode()
        return (b"card", job, described, self.address)


class NixlWindows:
    """Has blocks of peers written here when they have been offered, and reads them from there.

    A worker asks a peer for a block that this one has offered; the peer writes it, as it is then, into one of two slots
    of this worker; the training thread finds it there at the block's next boundary. So what is merged is as old as the
    network and the wait for the boundary make it, and a slow network carries as much as it can: a slot that is free
    goes to the block that has not been merged for the longest.

    Memory, beside the model: two slots of the size of the largest block; with `wire_dtype="bf16"` they are half as
    large, and there is a third one; with "int8" three buffers of a quarter of it more, with "int4" of an eighth.

    Where the blocks are on GPUs that the network does not reach by itself (Ethernet), the slots and one more buffer are
    pinned memory of the host, and two of the same size on the GPU. UCX would else copy each 8 KB of a GPU's memory by a
    call that waits for it.

    Make it with `NixlWindows.open`.
    """

    kind = "nixl"

    def __init__(self, ledger: Ledger, staging: Staging, courier: Courier, queues: Queues) -> None:
        self.ledger = ledger
        self.staging = staging
        self.courier = courier
        self._queues = queues
        courier.start()

    @classmethod
    def open(
        cls,
        blocks: Sequence[Block],
        rank: int,
        gather: Gather,
        ledger: Ledger,
        *,
        peers: Sequence[int],
        token: bytes,
        job: bytes,
        wire_dtype: str = "fp32",
        trace: Trace | None = None,
        through_host: bool | None = None,
        queues: Queues | None = None,
    ) -> NixlWindows:
        """Introduce this worker to all others and connect to `peers`. Collective: every worker returns, or every
        worker raises.

        Args:
            blocks: The model's blocks. Tensors that are not contiguous are made so, in place.
            rank: This worker.
            gather: Collects one object from every worker.
            ledger: Of this worker, with `peers` as remote.
            peers: Workers that are reached over the network.
            token: The job's secret.
            job: Names the job and the era, differently each time that windows are opened.
            wire_dtype: "fp32" sends blocks as they are, "bf16" sends tensors in fp32 as bf16, "int8" and "int4" with so
                many bits for each number, by what the receiver knows of it: see `coding.py`.
            trace: Where it is recorded how long blocks are on their way.
            through_host: Whether blocks go through the host's memory, if one worker says so; None: if they are on a
                GPU that the network does not reach.
            queues: Of the device that the blocks are on; for tests.

        Raises:
            ValueError: NIXL is not installed, or the workers have different secrets or models.
        """
        job = hashlib.blake2b(job, digest_size=16).digest()

        device = next((tensor.device for block in blocks for tensor in block.tensors), torch.device("cpu"))

        def needs_host() -> bool:
            if through_host is None:
                return device.type != "cpu" and not (device.type == "cuda" and reaches_gpus())
            return through_host

        on_host = any(gather(together(needs_host, gather)))
        queues = queues or queues_of(device)

        def prepare() -> tuple[Transport, Layout]:
            for block in blocks:
                for tensor in (*block.parameters, *block.buffers):
                    if not tensor.is_contiguous():
                        tensor.data = tensor.data.contiguous()
            layout = Layout(blocks, wire_dtype, on_host=on_host)
            transport = Transport(f"{job.hex()}/{rank}", torch.device("cpu") if on_host else device)
            if layout.goes_live:
                transport.register([tensor for block in blocks for tensor in block.tensors])
            return transport, layout

        transport, layout = together(prepare, gather)
        try:
            card = Card(rank, transport.address(), transport.sends_from, specification(blocks), wire_dtype)
            cards: list[Card] = gather(replace(card, signature=sign(token, *card.parts(job))))

            def admit() -> None:
                _require_trust(cards, token, job)
                require_one_model([other.specification for other in cards])
                if len({other.wire_dtype for other in cards}) > 1:
                    raise ValueError(f"Workers have different `wire_dtype`s: {[c.wire_dtype for c in cards]}.")
                transport.admit(address for card in cards for address in card.sends_from)

            def connect() -> tuple[Courier, Staging]:
                known = [Peer(peer, transport.connect(cards[peer].address), cards[peer].address) for peer in peers]
                staging, serving = Staging(layout, transport, queues), Serving(layout, transport, queues)
                pace = Pace(None if layout.device.type == "cuda" else BUDGET)
                postmark = Postmark(token, job, rank, len(cards), len(blocks))
                courier = Courier(transport, ledger, known, staging, Receiving(layout), serving, pace, postmark, trace)
                return courier, staging

            together(admit, gather)  # first: a packet that is not let in yet is sent again after a second
            courier, staging = together(connect, gather)
        except BaseException:
            transport.close()
            raise
        ways = os.environ.get("UCX_NET_DEVICES") or "any network device"
        where = "memory of the host" if on_host or device.type == "cpu" else "the GPU's memory"
        logger.info(
            f"Blocks go to {len(peers)} worker(s) on other hosts over {ways}, whichever UCX finds fastest, from and to "
            f"{where}."
        )
        return cls(ledger, staging, courier, queues)

    def read(self, peer: int, block: int) -> list[Tensor] | None:
        """The peer's block, as it was when the peer sent it; None if it has not come."""
        slot = self.staging.take_ready(peer, block)
        if slot is None:
            return None
        if slot.settled != self.ledger.settled:  # from before a consensus point
            self.staging.release(peer, block)
            return None
        return slot.views[block]

    def release(self, peer: int, block: int) -> None:
        """The block has been merged."""
        self.staging.release(peer, block)
        self.courier.note_merged(peer, block)

    def publish(self, block: int) -> Mark:
        """Peers are sent the block as it is when they ask."""
        return self._queues.mark()

    def arrived(self, is_free: Callable[[int], bool]) -> Sequence[int]:
        """Blocks that have come and wait to be merged."""
        ready = self.staging.ready
        return [block for _, block in list(ready)] if ready else ()

    def exclude(self, peer: int) -> None:
        """Have no more to do with a peer: ask it for nothing, send it nothing, refuse what it sends. Idempotent."""
        self.courier.exclude(peer)

    def figures(self) -> dict[str, float]:
        """`layup/link_busy`: share of the time in which a block was on its way here. `layup/megabytes_per_second`:
        what has come. `layup/refused_messages`: messages refused since the start, if any.
        """
        return self.courier.figures()

    def close(self) -> None:
        """End all connections. Idempotent, waits for no peer."""
        self.courier.close()


def _require_trust(cards: Sequence[Card], token: bytes, job: bytes) -> None:
    strangers = [
        rank
        for rank, card in enumerate(cards)
        if card.rank != rank or not is_signed(token, card.signature, *card.parts(job))
    ]
    if strangers:
        raise ValueError(
            f"Rank {', '.join(map(str, strangers))} did not prove to know the secret of this job. Give all workers the "
            f"same {TOKEN_VARIABLE}."
        )
