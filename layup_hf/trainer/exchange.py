"""What the workers of an era exchange, and by what: opened and closed together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from ..blocks import Block
from ..gossip.arrival import ArrivalEngine
from ..gossip.engine import GossipEngine
from ..gossip.moments import MeanMoments
from ..gossip.topology import PeerSampler
from ..ledger import Ledger
from ..windows import PeerWindows, open_windows
from .report import RunFacts
from .straggler import StragglerCallback

logger = logging.get_logger(__name__)


def _gather(item: Any) -> list[Any]:
    """One object from every worker. Collective."""
    return gather_object([item])


class Exchange:
    """Windows to the peers, the engine that offers and merges over them, and a view of the peers' moments. To be mixed
    into a subclass of `Trainer`.
    """

    _blocks: list[Block]
    _windows: PeerWindows | None = None
    _engine: GossipEngine | None = None  # with one worker there is none
    _moments: MeanMoments | None = None
    _ledger: Ledger | None = None
    _facts: RunFacts | None = None

    def _open_exchange(self) -> None:
        """Open windows to the present workers, and begin to count anew. Collective."""
        rank, world_size = self.args.process_index, self.args.world_size
        kind = getattr(self.args, "windows", "auto")
        era = self._membership.era.number if self._membership is not None else 0
        self._windows = open_windows(
            kind,
            self._blocks,
            rank,
            _gather,
            token=self._token,
            job=self._job_name[:8] + era.to_bytes(8, "big"),
            wire_dtype=getattr(self.args, "wire_dtype", "fp32"),
        )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StragglerCallback):
                self._windows = callback.late_windows(self._windows, rank)
        self._ledger = self._windows.ledger
        peers_per_step = getattr(self.args, "peers_per_step", None)
        sampler = PeerSampler(rank, world_size, peers_per_step, self.args.seed, self._ledger.remote)
        self._share_moments()
        self._engine = self._make_engine(sampler)  # last: whoever has to begin again, as a worker is gone, has none
        by_mean = self._moments is not None and self._moments.has_peers
        self._masses = (1.0,) * world_size
        self._facts = replace(
            self._facts, peers_per_step=sampler.count, windows=self._windows.kind, steps_by_mean=by_mean
        )
        logger.info(
            f"Gossip between {world_size} workers over {len(self._blocks)} blocks, {sampler.count} offers a step; the "
            f"optimizer's second moment is of {'the mean gradient' if by_mean else 'own gradients'}."
        )

    def _share_moments(self) -> None:
        """Let peers on this host see the optimizer's first moments, if it is to step as of their mean. Collective.

        Raises:
            ValueError: It is to and cannot, as another worker's optimizer is of another kind.
        """
        wanted = getattr(self.args, "second_moment", "auto")
        if wanted == "own":
            return
        rank, optimizer = self.args.process_index, self._block_optimizer.inner
        near = [peer for peer in range(self.args.world_size) if peer not in (rank, *self._ledger.remote)]
        self._moments = MeanMoments.open(self._blocks, optimizer, rank, near, _gather, seed=self.args.seed)
        if self._moments is None and wanted == "mean":
            raise ValueError(
                "`second_moment='mean'` and the optimizer of another worker exclude each other: give all workers the "
                "same, or leave `second_moment` at 'auto'."
            )

    def _make_engine(self, sampler: PeerSampler) -> GossipEngine:
        """What offers and merges, over the windows that have been opened."""
        parts, offer_every = (self._blocks, self._windows, sampler), getattr(self.args, "offer_every", 1)
        if getattr(self.args, "merge_at", "boundary") == "arrival":
            return ArrivalEngine(*parts, offer_every=offer_every, may_exchange=self._may_exchange)
        return GossipEngine(
            *parts,
            offer_every=offer_every,
            is_free=lambda index: self._hooks is not None and self._hooks.is_free(index),
        )

    def _close_exchange(self) -> None:
        for part in (self._engine, self._windows, self._moments):
            if part is not None:
                part.close()
        self._windows = self._moments = self._engine = None

    def _exclude(self, rank: int) -> None:
        """Exchange nothing more with a worker. Idempotent."""
        for part in (self._engine, self._moments):
            if part is not None:
                part.exclude(rank)

    def _pause_exchange(self) -> None:
        """Keep blocks as they are while the workers agree on a model.

        Raises:
            RuntimeError: What peers see is not what this worker trains any more.
        """
        if self._engine is not None:
            self._engine.pause()
            self._engine.require_same_memory()
        if self._moments is not None:
            self._moments.require_same_memory(self._block_optimizer.inner)
