"""What the workers of an era exchange, and by what: opened and closed together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from ..blocks import Block
from ..gossip.arrival import ArrivalEngine
from ..gossip.budget import ReadBudget
from ..gossip.engine import GossipEngine
from ..gossip.moments import MeanMoments
from ..gossip.topology import PeerSampler
from ..ledger import Ledger
from ..windows import PeerWindows, open_windows
from .blockwise import BlockwiseModel
from .host import Host
from .members import Members
from .state import RunState
from .straggler import StragglerCallback
from .tracing import Tracing

logger = logging.getLogger(__name__)


class Exchange:
    """Windows to the peers, the engine that offers and merges over them, and a view of the peers' moments.

    Attributes:
        engine: Offers and merges; None while nothing is exchanged, as with one worker.
        moments: A view of the peers' first moments; None where each optimizer steps by its own gradients.
        masses: Of each worker at the latest consensus point, in units of an equal share.
    """

    def __init__(self, host: Host, state: RunState, members: Members, model: BlockwiseModel, tracing: Tracing) -> None:
        self._host, self._state, self._members, self._model, self._tracing = host, state, members, model, tracing
        self._windows: PeerWindows | None = None
        self._ledger: Ledger | None = None
        self.engine: GossipEngine | None = None
        self.moments: MeanMoments | None = None
        self.masses: tuple[float, ...] = ()

    @property
    def ledger(self) -> Ledger:
        """Of the present era, or of the latest one: offers, masses and step counts of all workers.

        Raises:
            RuntimeError: Nothing has been exchanged yet.
        """
        if self._ledger is None:
            raise RuntimeError("Nothing is exchanged before training begins, nor by one worker.")
        return self._ledger

    @property
    def _may_end(self) -> bool:
        """Whether workers may end while others go on; one launcher ends all."""
        return self._members.membership is not None

    @property
    def _finds_peers(self) -> bool:
        """Whether it is measured how many peers can be read: on GPUs, unless the user says how many. On CPUs it has not
        been measured what fewer peers make of the loss.
        """
        device = self._model.blocks[0].tensors[0].device
        return self._host.options.peers_per_step is None and device.type == "cuda"

    def open(self) -> None:
        """Open windows to the present workers, and begin to count anew. Collective."""
        host, options, blocks = self._host, self._host.options, self._model.blocks
        self._windows = windows = open_windows(
            options.windows,
            self.shown(blocks),
            host.rank,
            self._members.talk.gather,
            token=self._members.token,
            job=self._members.job_name[:8] + self._members.era.to_bytes(8, "big"),
            wire_dtype=options.wire_dtype,
            may_end=self._may_end,
            trace=self._tracing.trace,
        )
        for callback in host.callbacks.callbacks:
            if isinstance(callback, StragglerCallback):
                windows = callback.late_windows(windows, host.rank)
        self._windows, self._ledger = windows, windows.ledger
        sampler = PeerSampler(host.rank, host.world_size, options.peers_per_step, host.args.seed, windows.ledger.remote)
        self._share_moments(windows.ledger)
        # Last: whoever has to begin again, as a worker is gone, has none.
        self.engine = self.make_engine(blocks, windows, sampler)
        by_mean = self.moments is not None and self.moments.has_peers
        self.masses = (1.0,) * host.world_size
        self._state.note(peers_per_step=sampler.count, windows=windows.kind, steps_by_mean=by_mean)
        is_fixed = not self._finds_peers and len(sampler.remote) < 2  # of several on other hosts each has its turn
        offers = str(sampler.count) if is_fixed else f"up to {sampler.count}"
        logger.info(
            f"Gossip between {host.world_size} workers over {len(blocks)} blocks, {offers} offers a step; the "
            f"optimizer's second moment is of {'the mean gradient' if by_mean else 'own gradients'}."
        )

    def _share_moments(self, ledger: Ledger) -> None:
        """Let peers on this host see the optimizer's first moments, if it is to step as of their mean. Collective.

        Raises:
            ValueError: It is to and cannot, as another worker's optimizer is of another kind.
        """
        host, wanted = self._host, self._host.options.second_moment
        if wanted == "own":
            return
        near = [peer for peer in range(host.world_size) if peer not in (host.rank, *ledger.remote)]
        optimizer, seed = self._model.optimizer.inner, host.args.seed
        self.moments = MeanMoments.open(
            self._model.blocks,
            optimizer,
            host.rank,
            near,
            self._members.talk.gather,
            seed=seed,
            may_end=self._may_end,
        )
        if self.moments is None and wanted == "mean":
            raise ValueError(
                "`second_moment='mean'` and the optimizer of another worker exclude each other: give all workers the "
                "same, or leave `second_moment` at 'auto'."
            )

    def shown(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """What peers see of this worker's blocks: the blocks themselves, live."""
        return blocks

    def make_engine(self, blocks: Sequence[Block], windows: PeerWindows, sampler: PeerSampler) -> GossipEngine:
        """What offers and merges, over the windows that have been opened."""
        options = self._host.options
        budget = ReadBudget(len(blocks), sampler.count) if self._finds_peers else None
        before_merge = self._model.snapshots.before_merge
        common: dict[str, Any] = {"offer_every": options.offer_every, "budget": budget, "before_merge": before_merge}
        trace = self._tracing.trace
        if options.merge_at == "arrival":
            track = trace.track("merging on arrival") if trace is not None else None
            may_exchange = self._members.may_exchange
            return ArrivalEngine(blocks, windows, sampler, may_exchange=may_exchange, track=track, **common)
        is_free = self._model.is_free if options.merge_at == "boundary" else lambda index: False
        return GossipEngine(blocks, windows, sampler, is_free=is_free, track=self._tracing.track, **common)

    def close(self) -> None:
        """Exchange nothing more. Idempotent."""
        for part in (self.engine, self._windows, self.moments):
            if part is not None:
                part.close()
        self._windows = self.moments = self.engine = None

    def exclude(self, rank: int) -> None:
        """Exchange nothing more with a worker. Idempotent."""
        for part in (self.engine, self.moments):
            if part is not None:
                part.exclude(rank)

    def resume(self) -> None:
        """A step begins: blocks may change again."""
        if self.engine is not None:
            self.engine.resume()

    def holding(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """While the block is stepped and offered: nothing else writes it."""
        return self.engine.holding(block) if self.engine is not None else contextlib.nullcontext()

    def pause(self) -> None:
        """Keep blocks as they are while the workers agree on a model.

        Raises:
            RuntimeError: What peers see is not what this worker trains any more.
        """
        if self.engine is not None:
            self.engine.pause()
            self.engine.require_same_memory()
        if self.moments is not None:
            self.moments.require_same_memory(self._model.optimizer.inner)
